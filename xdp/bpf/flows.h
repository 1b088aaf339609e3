/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * The flow table: packets of established connections are forwarded here and never leave the kernel.
 *
 * Rule: what is not certain is a miss, and a miss goes to the forwarder; nothing is decided here.
 *
 * Theory. The vector kernels write an entry for each direction of a connection that they have judged: what
 * its packets' headers become, in front of what, and where to. It holds for the generation in which it
 * was written: one increment makes every entry stale. A lookup reads a line of eight tags and one entry.
 * The forwarder may rewrite an entry at any time, so all of it is copied before any of it is believed
 * (`sequence`), as a seqlock's reader does; torn or stale is a miss. What could change a connection's
 * state or needs more than a rewrite is a miss as well: TCP SYN, FIN and RST, fragments, IP options and extension
 * headers, an expiring TTL, packets larger than the way allows, ICMP. DNS that policies look into has no entry,
 * other DNS leaves a copy (copies.h). Checksums change by the
 * difference that the entry holds (RFC 1624 eqn. 3), so one that is wrong stays wrong and its
 * receiver drops it. A UDP checksum of zero stays zero (RFC 768, RFC 6936). The seqlock needs loads
 * that stay in order, as x86's do.
 */
#ifndef PENSTOCK_FLOWS_H
#define PENSTOCK_FLOWS_H

struct flow_line {
  __u32 tags[FLOW_WAYS];
};

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, FLOW_SLOTS_MOST / FLOW_WAYS);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, struct flow_line);
} flow_tags SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, FLOW_SLOTS_MOST);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, struct flow_entry);
} flow_entries SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, ADJACENCIES_MAX);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, struct hop);
} hops SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_DEVMAP);
  __uint(max_entries, PORTS_MAX);
  __type(key, __u32);
  __type(value, __u32);
} flow_devices SEC(".maps");

/* The same for programs at tc, which may not look into a device map: ifindex by port, 0: none. */
struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, PORTS_MAX);
  __type(key, __u32);
  __type(value, __u32);
} flow_ifindexes SEC(".maps");

#define FLOW_MISS -1
#define FLOW_MIX_A 0x9E3779B97F4A7C15ULL
#define FLOW_MIX_B 0xC2B2AE3D27D4EB4FULL
#define FLOW_MIX_C 0xD6E8FEB86659FD93ULL
#define TCP_STATE_FLAGS 0x07 /* FIN, SYN, RST */
#define ECN_MASK 3
#define barrier() asm volatile("" ::: "memory")

/* What the programs have dropped or lost, by enum program_drop; behind that, what of it the forwarders have
 * counted. */
struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, 2 * PROGRAM_DROPS);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, __u64);
} program_drops SEC(".maps");

static __always_inline void note_drop(__u32 why)
{
  __u64 *count = bpf_map_lookup_elem(&program_drops, &why);

  if (count)
    __sync_fetch_and_add(count, 1);
}

#include "copies.h"

/* What a packet is looked up by, and what is needed of it to rewrite it. */
struct flow_key {
  __u64 source[2];
  __u64 target[2];
  __u64 rest;                    /* ports, protocol, family, 0: as struct flow_entry has them */
  __u32 ifindex;
  __u32 length;                  /* of the IP packet */
  __u32 l3;                      /* offset of the IP header */
  __u32 tunnelled;
  __u32 remote[4];               /* where the tunnel packet came from */
  __u8 four;
  __u8 tos;
  __u8 uplink;                   /* it came in there */
  __u8 reserved[5];
};

static __always_inline __u64 flow_hash(const struct flow_key *key, __u64 seed)
{
  __u64 h = (key->source[0] ^ seed ^ key->source[1] * FLOW_MIX_B) * FLOW_MIX_A;

  h ^= h >> 32;
  h = (h ^ key->target[0] ^ key->target[1] * FLOW_MIX_C) * FLOW_MIX_B;
  h ^= h >> 32;
  h = (h ^ key->rest ^ (__u64)key->ifindex << 40) * FLOW_MIX_C;
  h = (h ^ h >> 32) * FLOW_MIX_A;
  return h ^ h >> 32;
}

/* Whether the transport header at l4, of an IP packet with `room` bytes for it, is a plain one. */
static __always_inline int is_plain(const __u8 *l4, const void *end, __u8 protocol, __u32 room)
{
  if (protocol == IPPROTO_TCP) {
    if ((const void *)(l4 + 20) > end || l4[13] & TCP_STATE_FLAGS)
      return 0;
    return l4[12] >> 4 >= 5 && (l4[12] >> 4) * 4 <= room;
  }
  if (protocol == IPPROTO_UDP) {
    __u32 length;

    if ((const void *)(l4 + 8) > end)
      return 0;
    length = l4[4] << 8 | l4[5];
    return length >= 8 && length <= room;
  }
  return 0;
}

/* Fill the key of the IP packet at ip; 0: it is not one for the table. */
static __always_inline int flow_key4(const struct iphdr *ip, const void *end, struct flow_key *key)
{
  const __u8 *l4 = (const void *)(ip + 1);

  if ((const void *)(ip + 1) > end || ip->version != 4 || ip->ihl != 5 || ip->ttl <= 1 ||
      ip->frag_off & bpf_htons(0x3fff) || l4 + 8 > (const __u8 *)end)
    return 0;
  key->length = bpf_ntohs(ip->tot_len);
  if (key->length < sizeof(*ip) || !is_plain(l4, end, ip->protocol, key->length - sizeof(*ip)))
    return 0;
  key->source[0] = ip->saddr;
  key->target[0] = ip->daddr;
  key->source[1] = key->target[1] = 0;
  key->rest = *(const __u32 *)l4 | (__u64)ip->protocol << 32 | 4ULL << 40;
  return 1;
}

static __always_inline int flow_key6(const struct ipv6hdr *ip, const void *end, struct flow_key *key)
{
  const __u8 *l4 = (const void *)(ip + 1);

  if (l4 + 8 > (const __u8 *)end || ip->version != 6 || ip->hop_limit <= 1)
    return 0;
  key->length = bpf_ntohs(ip->payload_len) + sizeof(*ip);
  if (!is_plain(l4, end, ip->nexthdr, key->length - sizeof(*ip)))
    return 0;
  __builtin_memcpy(key->source, &ip->saddr, 16);
  __builtin_memcpy(key->target, &ip->daddr, 16);
  key->rest = *(const __u32 *)l4 | (__u64)ip->nexthdr << 32 | 6ULL << 40;
  return 1;
}

/* The present entry of a key, copied, and its slot; 0: there is none. The counters stay behind `live`. */
static __always_inline struct flow_entry *flow_find(const struct steering *s,
                                                    const struct flow_key *key,
                                                    struct flow_entry *copy, __u32 *found)
{
  __u64 h = flow_hash(key, s->flow_seed);
  __u32 bucket = (__u32)h & s->flow_mask;
  __u32 tag = (__u32)(h >> 32) | 2; /* 0: empty, 1: being written */
  struct flow_line *line = bpf_map_lookup_elem(&flow_tags, &bucket);

  if (!line)
    return 0;
  for (__u32 way = 0; way < FLOW_WAYS; way++) {
    __u32 slot = bucket * FLOW_WAYS + way;
    struct flow_entry *live;
    __u32 sequence;

    if (line->tags[way] != tag)
      continue;
    live = bpf_map_lookup_elem(&flow_entries, &slot);
    if (!live)
      return 0;
    sequence = *(volatile __u32 *)&live->sequence;
    barrier();
    __builtin_memcpy(copy, live, __builtin_offsetof(struct flow_entry, packets));
    barrier();
    if (sequence & 1 || *(volatile __u32 *)&live->sequence != sequence)
      return 0;
    const __u64 *have = (const void *)copy;
    if ((have[0] ^ key->source[0]) | (have[1] ^ key->source[1]) | (have[2] ^ key->target[0]) |
        (have[3] ^ key->target[1]) | (((have[4] ^ key->rest) & 0xffffffffffffULL)))
      continue;
    if (copy->ifindex == key->ifindex && copy->generation == s->flow_generation + s->flow_tables) {
      *found = slot;
      return live;
    }
  }
  return 0;
}

static __always_inline __u16 fold(__u32 sum)
{
  sum = (sum & 0xffff) + (sum >> 16);
  return (sum & 0xffff) + (sum >> 16);
}

/* Add a difference to a checksum: it is complemented, the difference is not. */
static __always_inline __u16 csum_add(__u16 check, __u32 delta)
{
  return ~fold((__u16)~check + delta);
}

/* New ports. sums: the checksum is in the packet, complete, and follows. */
static __always_inline void flow_ports(__u8 *l4, __u8 protocol, const struct flow_entry *e, int sums)
{
  __u16 *ports = (void *)l4;
  __u16 *check = (void *)(l4 + (protocol == IPPROTO_TCP ? 16 : 6));

  ports[0] = e->new_source_port_be;
  ports[1] = e->new_target_port_be;
  if (!sums || (protocol == IPPROTO_UDP && !*check))
    return; /* none was computed */
  *check = csum_add(*check, e->l4_delta);
  if (protocol == IPPROTO_UDP && !*check)
    *check = 0xffff;
}

/* Rewrite the IP packet at ip by an entry. The packet's bounds have been proven by flow_key. */
static __always_inline int flow_rewrite4(struct iphdr *ip, const void *end,
                                         const struct flow_entry *e, int sums)
{
  __u8 *l4 = (void *)(ip + 1);
  __u32 delta = e->l3_delta;

  if (l4 + 20 > (__u8 *)end && (ip->protocol == IPPROTO_TCP || l4 + 8 > (__u8 *)end))
    return 0;
  if (e->flags & (FLOW_NAT_SOURCE | FLOW_NAT_TARGET)) {
    ip->saddr = *(__u32 *)e->new_source;
    ip->daddr = *(__u32 *)e->new_target;
    if (ip->protocol == IPPROTO_TCP) {
      if (l4 + 20 > (__u8 *)end)
        return 0;
      flow_ports(l4, IPPROTO_TCP, e, sums);
    } else {
      flow_ports(l4, IPPROTO_UDP, e, sums);
    }
  }
  if (!(e->flags & FLOW_KEEP_HOPS)) {
    ip->ttl--;
    delta += bpf_htons(0xfeff); /* the complement of 0x0100 */
  }
  ip->check = csum_add(ip->check, delta);
  return 1;
}

static __always_inline int flow_rewrite6(struct ipv6hdr *ip, const void *end,
                                         const struct flow_entry *e, int sums)
{
  __u8 *l4 = (void *)(ip + 1);

  if (l4 + 8 > (__u8 *)end)
    return 0;
  if (e->flags & (FLOW_NAT_SOURCE | FLOW_NAT_TARGET)) {
    __builtin_memcpy(&ip->saddr, e->new_source, 16);
    __builtin_memcpy(&ip->daddr, e->new_target, 16);
    if (ip->nexthdr == IPPROTO_TCP) {
      if (l4 + 20 > (__u8 *)end)
        return 0;
      flow_ports(l4, IPPROTO_TCP, e, sums);
    } else {
      flow_ports(l4, IPPROTO_UDP, e, sums);
    }
  }
  if (!(e->flags & FLOW_KEEP_HOPS))
    ip->hop_limit--;
  return 1;
}

/* Fill what differs from packet to packet in a tunnel's outer header. eth: start of the frame. */
static __always_inline int flow_outer(void *eth, const void *end, const struct hop *hop,
                                      const struct flow_entry *e, __u32 length, __u8 tos)
{
  __u32 total = hop->header_length + length - sizeof(struct ethhdr);

  if (hop->tunnel_family == 4) {
    struct iphdr *ip = eth + sizeof(struct ethhdr);
    struct udphdr *udp = (void *)(ip + 1);

    if ((void *)(udp + 1) > end)
      return 0;
    ip->tos = tos;
    ip->tot_len = bpf_htons(total);
    ip->check = ~bpf_htons(fold(hop->outer_sum + total + tos));
    udp->source = e->entropy_be;
    udp->len = bpf_htons(total - sizeof(*ip));
  } else {
    struct ipv6hdr *ip = eth + sizeof(struct ethhdr);
    struct udphdr *udp = (void *)(ip + 1);

    if ((void *)(udp + 1) > end)
      return 0;
    *(__u32 *)ip = bpf_htonl(6U << 28 | (__u32)tos << 20 | bpf_ntohs(e->entropy_be));
    ip->payload_len = bpf_htons(total - sizeof(*ip));
    udp->source = e->entropy_be;
    udp->len = bpf_htons(total - sizeof(*ip));
  }
  return 1;
}

/* Offset of the UDP header of a packet whose IP header stands at l3. */
static __always_inline __u32 flow_datagram(const struct flow_key *key, __u32 l3)
{
  return l3 + (key->four ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
}

/* Copy the DNS message of a frame; 0: it cannot be. */
static __always_inline int flow_copy(struct xdp_md *ctx, const struct steering *s,
                                     const struct flow_key *key, __u32 slot)
{
  __u32 at = flow_datagram(key, key->l3), length = key->length - (at - key->l3);
  struct dns_copy *copy = copy_begin(key->source, slot, length);

  if (!copy || bpf_xdp_load_bytes(ctx, at, copy->datagram, length))
    return 0;
  copy_end(s, copy, length);
  return 1;
}

/* Put a hop's header in front of the IP packet that begins at byte HEADER; 0: it does not fit. */
#define FLOW_PUT(size)                                                     \
  do {                                                                     \
    if (data + (size) > end)                                               \
      return XDP_ABORTED;                                                  \
    __builtin_memcpy(data, hop->header, (size));                           \
  } while (0)

/* Send a rewritten packet and count it. */
static __always_inline int flow_send(struct flow_entry *live, __u32 port, const struct flow_key *key)
{
  int verdict = bpf_redirect_map(&flow_devices, port, XDP_ABORTED);

  if (verdict == XDP_REDIRECT) {
    /* A flow's packets may come in on two queues at a time. */
    __sync_fetch_and_add(&live->packets, 1);
    __sync_fetch_and_add(&live->bytes, key->length);
    live->last_ns = bpf_ktime_get_coarse_ns();
  } else {
    note_drop(key->uplink ? DROP_UPLINK_NO_DEVICE : DROP_POD_NO_DEVICE);
  }
  return verdict;
}

/* Forward a packet, if the table has its flow; FLOW_MISS: it has not, and nothing was changed. */
static __noinline int flow_forward(struct xdp_md *ctx, const struct steering *s,
                                   const struct flow_key *key)
{
  struct flow_entry e;
  struct flow_entry *live;
  struct hop *hop;
  __u32 room, size, slot;
  void *data, *end;

  if (!s || !key)
    return FLOW_MISS;
  live = flow_find(s, key, &e, &slot);
  if (!live)
    return FLOW_MISS;
  room = bpf_xdp_get_buff_len(ctx) - key->l3;
  hop = bpf_map_lookup_elem(&hops, &e.hop);
  if (!hop || key->length > hop->mtu || room < key->length)
    return FLOW_MISS;
  size = hop->header_length;
  data = (void *)(long)ctx->data;
  end = (void *)(long)ctx->data_end;
  if (room != key->length && (hop->tunnel_family || data + key->l3 + room > end))
    return FLOW_MISS; /* padding is not carried into a tunnel, nor behind other segments */
  if (key->tunnelled) {
    const struct hop *back = bpf_map_lookup_elem(&hops, &e.tunnel);

    if (!back || !e.tunnel || *(__u32 *)&back->remote[0] != key->remote[0] ||
        *(__u32 *)&back->remote[4] != key->remote[1] ||
        *(__u32 *)&back->remote[8] != key->remote[2] ||
        *(__u32 *)&back->remote[12] != key->remote[3])
      return FLOW_MISS;
  }
  if (size != sizeof(struct ethhdr) && size != 64 && size != 84)
    return FLOW_MISS;
  if (e.flags & FLOW_DNS && !flow_copy(ctx, s, key, slot))
    return FLOW_MISS;
  if (key->l3 != size && bpf_xdp_adjust_head(ctx, (int)key->l3 - (int)size))
    return FLOW_MISS;
  data = (void *)(long)ctx->data;
  end = (void *)(long)ctx->data_end;
  if (size == sizeof(struct ethhdr)) {
    FLOW_PUT(14);
  } else if (size == 64) {
    FLOW_PUT(64);
    data += 50;
  } else {
    FLOW_PUT(84);
    data += 70;
  }
  /* data stands 14 bytes before the IP header, whatever is in front of that. */
  if (key->four) {
    struct iphdr *ip = data + sizeof(struct ethhdr);

    if ((void *)(ip + 1) > end || !flow_rewrite4(ip, end, &e, 1))
      return XDP_ABORTED;
  } else {
    struct ipv6hdr *ip = data + sizeof(struct ethhdr);

    if ((void *)(ip + 1) > end || !flow_rewrite6(ip, end, &e, 1))
      return XDP_ABORTED;
  }
  if (size != sizeof(struct ethhdr)) {
    if (s->flow_any_vni)
      __builtin_memcpy(data - 4, &e.tunnel, 4);
    if (!flow_outer((void *)(long)ctx->data, end, hop, &e, key->length, key->tos))
      return XDP_ABORTED;
  }
  return flow_send(live, hop->port, key);
}

/* Fill the key of the IP packet at `at`, whose EtherType is kind; 0: it is not one for the table. */
static __always_inline int flow_key(const void *at, const void *end, __u16 kind, struct flow_key *key)
{
  if (kind == bpf_htons(ETH_P_IP)) {
    const struct iphdr *ip = at;

    if (!flow_key4(ip, end, key))
      return 0;
    key->four = 1;
    key->tos = ip->tos;
    return 1;
  }
  if (kind == bpf_htons(ETH_P_IPV6)) {
    const struct ipv6hdr *ip = at;

    if (!flow_key6(ip, end, key))
      return 0;
    key->four = 0;
    key->tos = bpf_ntohl(*(const __u32 *)ip) >> 20;
    return 1;
  }
  return 0;
}

/* Look up the IP packet at key->l3, whose EtherType is kind, and forward it. */
static __always_inline int flow_packet(struct xdp_md *ctx, const struct steering *s,
                                       struct flow_key *key, __u32 l3, __u16 kind)
{
  key->l3 = l3;
  key->ifindex = ctx->ingress_ifindex;
  if (!flow_key((void *)(long)ctx->data + l3, (void *)(long)ctx->data_end, kind, key))
    return FLOW_MISS;
  return flow_forward(ctx, s, key);
}

/* The tunnel header at `at`, behind the outer UDP header: whether it is one that may be opened here. */
static __always_inline int flow_opens(const struct steering *s, const __u8 *at, const void *end)
{
  __u32 vni;

  if (at + 8 > (const __u8 *)end)
    return 0;
  vni = bpf_ntohl(*(const __u32 *)(at + 4)) >> 8;
  if (!s->flow_any_vni && vni != s->flow_vni)
    return 0;
  if (s->flow_tunnel == TUNNEL_VXLAN)
    return at[0] & 0x08; /* RFC 7348 5: the VNI is valid */
  /* RFC 8926 3.4: version 0, no options, neither control nor critical, Ethernet inside. */
  return !at[0] && !(at[1] & 0xc0) && *(const __u16 *)(at + 2) == bpf_htons(0x6558);
}

/* A tunnel packet for this node; key->remote says from where. l4: length of the outer Ethernet and
 * IP header; payload: of what the outer IP header says is behind it; tos: outer. */
static __always_inline int flow_tunnelled(struct xdp_md *ctx, const struct steering *s,
                                          struct flow_key *key, __u32 l4, __u32 payload, __u8 tos)
{
  void *data = (void *)(long)ctx->data;
  void *end = (void *)(long)ctx->data_end;
  const struct udphdr *udp = data + l4;
  const __u8 *tunnel = (const void *)(udp + 1);
  const struct ethhdr *inner = (const void *)(tunnel + 8);

  if ((void *)(inner + 1) > end || !flow_opens(s, tunnel, end))
    return FLOW_MISS;
  if (l4 + payload != bpf_xdp_get_buff_len(ctx) || bpf_ntohs(udp->len) != payload)
    return FLOW_MISS;
  if ((tos & ECN_MASK) == 3 || (tos & ECN_MASK) == 1)
    return FLOW_MISS; /* RFC 6040 4.2: the inner packet must be marked */
  key->tunnelled = 1;
  return flow_packet(ctx, s, key, l4 + sizeof(*udp) + 8 + sizeof(*inner), inner->h_proto);
}

#endif
