/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * Where the transport header of a packet is, and which fragments go with one that was taken.
 *
 * Rule: nothing is read before its bytes are known to be there; what cannot be read is the kernel's.
 *
 * Theory. Only the first fragment of a packet has ports, so a taken one is remembered by (source, target,
 * id, protocol) and the later ones follow it; one that overtakes it is the kernel's.
 */
#ifndef PENSTOCK_TRANSPORT_H
#define PENSTOCK_TRANSPORT_H

#define FRAGMENT_AGE_NS 60000000000ULL  /* RFC 8200 4.5: a packet is put together within 60 s */
#define EXTENSIONS_MAX 8                /* as kernels/wire.py */
#define ANY_FRAGMENT 0x3fff             /* more fragments, and the offset */
#define OFFSET 0x1fff
#define MORE 0x2000
#define ICMP_QUOTED 8                   /* bytes before the packet that an ICMP error quotes */

struct fragment_key {
  __u8 source[16];
  __u8 target[16];
  __u32 id;
  __u8 protocol;
  __u8 family;
  __u16 reserved;
};

struct {
  __uint(type, BPF_MAP_TYPE_LRU_HASH);
  __uint(max_entries, STEERED_FRAGMENTS);
  __type(key, struct fragment_key);
  __type(value, __u64);
} steered_fragments SEC(".maps");

/* The transport header of a packet: where it is, what it is, and what fragment it is part of. */
struct transport {
  __u32 at;                      /* offset from the IP header */
  __u32 id;
  __u8 protocol;
  __u8 first;                    /* first fragment of several */
  __u8 later;                    /* a later one: there is no header */
};

static __always_inline int has_ports(__u8 protocol)
{
  return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP;
}

static __always_inline void name_fragment(struct fragment_key *key, const void *source,
                                          const void *target, __u8 family, const struct transport *t)
{
  key->id = t->id;
  key->protocol = family == 4 ? t->protocol : 0;  /* RFC 8200 4.5: not part of IPv6's name */
  key->family = family;
  if (family == 4) {
    __builtin_memcpy(key->source, source, 4);
    __builtin_memcpy(key->target, target, 4);
  } else {
    __builtin_memcpy(key->source, source, 16);
    __builtin_memcpy(key->target, target, 16);
  }
}

static __always_inline int is_followed(const struct fragment_key *key)
{
  __u64 *seen_ns = bpf_map_lookup_elem(&steered_fragments, key);

  return seen_ns && bpf_ktime_get_ns() - *seen_ns < FRAGMENT_AGE_NS;
}

static __always_inline void follow(const struct fragment_key *key)
{
  __u64 now_ns = bpf_ktime_get_ns();

  bpf_map_update_elem(&steered_fragments, key, &now_ns, BPF_ANY);
}

/* Find the transport header of an IPv4 packet; 0: it cannot be read. */
static __always_inline int transport4(const struct iphdr *ip, void *end, struct transport *t)
{
  __u32 word;

  if ((void *)(ip + 1) > end || ip->version != 4 || ip->ihl < 5)
    return 0;
  word = bpf_ntohs(ip->frag_off);
  t->at = ip->ihl * 4;
  t->id = ip->id;
  t->protocol = ip->protocol;
  t->later = (word & OFFSET) != 0;
  t->first = (word & ANY_FRAGMENT) == MORE;
  return 1;
}

/* Find the transport header of an IPv6 packet behind its extension headers; 0: it cannot be read. */
static __always_inline int transport6(const struct ipv6hdr *ip, void *end, struct transport *t)
{
  __u32 at = sizeof(*ip);
  __u8 next;

  if ((void *)(ip + 1) > end || ip->version != 6)
    return 0;
  next = ip->nexthdr;
  t->id = t->first = t->later = 0;
  for (int n = 0; n <= EXTENSIONS_MAX; n++) {
    const __u8 *header = (void *)ip + at;

    if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
        next != IPPROTO_FRAGMENT && next != IPPROTO_AH) {
      t->at = at;
      t->protocol = next;
      return 1;
    }
    if (n == EXTENSIONS_MAX || (void *)(header + 8) > end)
      return 0;
    if (next == IPPROTO_FRAGMENT) {
      __u16 word = header[2] << 8 | header[3];

      __builtin_memcpy(&t->id, header + 4, 4);
      t->later = word >> 3 != 0;
      t->first = !t->later && word & 1;
      at += 8;
    } else {
      at += next == IPPROTO_AH ? (header[1] + 2) * 4 : (header[1] + 1) * 8;
    }
    next = header[0];
    if (t->later) {
      t->at = at;
      t->protocol = next;
      return 1;
    }
  }
  return 0;
}

static __always_inline int is_error4(__u8 kind)
{
  return (kind >= 3 && kind <= 5) || kind == 11 || kind == 12;  /* RFC 792 */
}

#endif
