/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * The flow table for packets that are still the kernel's: pods whose hook is tc.
 *
 * Rule: as in flows.h; what is not certain goes to the forwarder as it came.
 *
 * Theory. A pod's packet comes to tc ingress as the skb that the pod's stack has made: data in pages
 * that are not copied, a checksum that may still be partial, up to 64 KB that the device at the end cuts
 * into segments. So it is rewritten by what keeps that so: headers in place, transport checksums by
 * bpf_l4_csum_replace (which knows whether there is one), tunnels by bpf_skb_adjust_room (which tells the
 * segmentation what is outside and what inside). A pod of this node gets it at once, in its own namespace
 * (bpf_redirect_peer). Of a large packet each segment has to fit the way.
 */
#ifndef PENSTOCK_SEGMENTS_H
#define PENSTOCK_SEGMENTS_H

#define SEGMENT_ROOM                                                                             \
  (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | BPF_F_ADJ_ROOM_ENCAP_L2_ETH |        \
   BPF_F_ADJ_ROOM_ENCAP_L2(14) | BPF_F_ADJ_ROOM_NO_CSUM_RESET)

/* Bytes of IP and transport header: what each segment of a large packet repeats. */
static __always_inline __u32 segment_headers(const struct flow_key *key, const void *at, const void *end)
{
  const __u8 *l4 = at + (key->four ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
  __u32 before = l4 - (const __u8 *)at;

  if ((__u8)(key->rest >> 32) == IPPROTO_UDP)
    return before + 8;
  return (const void *)(l4 + 20) > end ? 0 : before + (l4[12] >> 4) * 4;
}

/* Let the transport's checksum follow the new addresses and ports, whatever state it is in. */
static __always_inline int segment_sums(struct __sk_buff *skb, const struct flow_key *key,
                                        const struct flow_entry *e, __u32 l3)
{
  int tcp = (__u8)(key->rest >> 32) == IPPROTO_TCP;
  __u32 at = l3 + (key->four ? sizeof(struct iphdr) : sizeof(struct ipv6hdr)) + (tcp ? 16 : 6);
  __u64 flags = tcp ? 0 : BPF_F_MARK_MANGLED_0;
  __u32 ports = key->rest;
  __s64 sum;

  sum = bpf_csum_diff((__be32 *)key->source, 16, (__be32 *)e->new_source, 16, 0);
  if (sum < 0)
    return 0;
  sum = bpf_csum_diff((__be32 *)key->target, 16, (__be32 *)e->new_target, 16, sum);
  if (sum < 0 || bpf_l4_csum_replace(skb, at, 0, sum, flags | BPF_F_PSEUDO_HDR))
    return 0;
  sum = bpf_csum_diff(&ports, 4, (__be32 *)&e->new_source_port_be, 4, 0);
  return sum >= 0 && !bpf_l4_csum_replace(skb, at, 0, sum, flags);
}

/* Put a hop's header of `size` bytes (14, 64 or 84) in front of the IP packet that stands behind them, and
 * rewrite that; 0: its bytes are not there. */
static __always_inline int segment_write(struct __sk_buff *skb, const struct steering *s,
                                         const struct hop *hop, const struct flow_key *key,
                                         const struct flow_entry *e, __u32 size)
{
  void *data = (void *)(long)skb->data;
  void *end = (void *)(long)skb->data_end;
  void *at = data + size;

  if (data + size > end)
    return 0;
  __builtin_memcpy(data, hop->header, size);
  if (size != sizeof(struct ethhdr)) {
    if (s->flow_any_vni)
      __builtin_memcpy(data + size - 18, &e->tunnel, 4);
    if (!flow_outer(data, end, hop, e, key->length, key->tos))
      return 0;
  }
  if (key->four) {
    struct iphdr *ip = at;

    if ((void *)(ip + 1) > end || !flow_rewrite4(ip, end, e, 0))
      return 0;
  } else {
    struct ipv6hdr *ip = at;

    if ((void *)(ip + 1) > end || !flow_rewrite6(ip, end, e, 0))
      return 0;
  }
  return !(e->flags & (FLOW_NAT_SOURCE | FLOW_NAT_TARGET)) || segment_sums(skb, key, e, size);
}

/* Whether the packet, or each segment of it, fits the way; *count: how many there are. */
static __always_inline int segment_fits(struct __sk_buff *skb, const struct flow_key *key,
                                        const struct hop *hop, __u32 *count, __u32 *more)
{
  __u32 size = key->length, room = skb->len - key->l3;

  *count = 1;
  *more = 0;
  if (room < size || (room != size && hop->tunnel_family))
    return 0; /* padding is not carried into a tunnel */
  if (skb->gso_size) {
    __u32 headers = segment_headers(key, (void *)(long)skb->data + sizeof(struct ethhdr),
                                    (void *)(long)skb->data_end);

    if (!headers || !skb->gso_segs)
      return 0;
    size = headers + skb->gso_size;
    *count = skb->gso_segs;
    *more = (skb->gso_segs - 1) * headers;
  }
  return size <= hop->mtu;
}

/* Copy the DNS message of a packet; 0: it cannot be. */
static __always_inline int segment_copy(struct __sk_buff *skb, const struct steering *s,
                                        const struct flow_key *key, __u32 slot)
{
  __u32 at = flow_datagram(key, key->l3), length = key->length - (at - key->l3);
  struct dns_copy *copy = copy_begin(key->source, slot, length);

  if (!copy || skb->gso_size || bpf_skb_load_bytes(skb, at, copy->datagram, length))
    return 0;
  copy_end(s, copy, length);
  return 1;
}

/* Forward a packet of a pod, if the table has its flow; FLOW_MISS: it has not, and nothing was changed. */
static __noinline int segment_forward(struct __sk_buff *skb, const struct steering *s,
                                      const struct flow_key *key)
{
  struct flow_entry e;
  struct flow_entry *live;
  struct hop *hop;
  __u32 count, more, size, slot, *device;
  __u64 room = SEGMENT_ROOM;
  int done;

  if (!s || !key)
    return FLOW_MISS;
  live = flow_find(s, key, &e, &slot);
  if (!live)
    return FLOW_MISS;
  hop = bpf_map_lookup_elem(&hops, &e.hop);
  if (!hop || !segment_fits(skb, key, hop, &count, &more))
    return FLOW_MISS;
  device = bpf_map_lookup_elem(&flow_ifindexes, &hop->port);
  size = hop->header_length;
  if (!device || !*device || (size != sizeof(struct ethhdr) && size != 64 && size != 84))
    return FLOW_MISS;
  if (e.flags & FLOW_DNS && !segment_copy(skb, s, key, slot))
    return FLOW_MISS;
  room |= size == 84 ? BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 : BPF_F_ADJ_ROOM_ENCAP_L3_IPV4;
  if (size != sizeof(struct ethhdr) &&
      bpf_skb_adjust_room(skb, size - sizeof(struct ethhdr), BPF_ADJ_ROOM_MAC, room))
    return FLOW_MISS; /* of a kind that the kernel cannot segment behind a tunnel's header */
  if (size == sizeof(struct ethhdr))
    done = segment_write(skb, s, hop, key, &e, sizeof(struct ethhdr));
  else if (size == 64)
    done = segment_write(skb, s, hop, key, &e, 64);
  else
    done = segment_write(skb, s, hop, key, &e, 84);
  if (!done) {
    note_drop(DROP_POD_NO_DEVICE);
    return TC_ACT_SHOT;
  }
  __sync_fetch_and_add(&live->packets, count);
  __sync_fetch_and_add(&live->bytes, key->length + more);
  live->last_ns = bpf_ktime_get_coarse_ns();
  if (hop->kind == ADJACENCY_POD)
    return bpf_redirect_peer(*device, 0);
  return bpf_redirect(*device, 0);
}

#endif
