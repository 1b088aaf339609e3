/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * Services on the uplink: which packets from outside are for a frontend.
 *
 * Rule: a packet is taken only if its own bytes prove that it is for a frontend; what cannot be
 * read is the kernel's.
 *
 * Theory. The map `frontends` holds (address, port, protocol) of NodePorts and host ports, and
 * (address, 0, 0) for addresses that are services' alone, such as load balancer IPs: of these every
 * packet is taken, so that a ping is answered and an unknown port refused. Only the first fragment
 * of a packet has ports, so a taken one is remembered by (source, target, id, protocol) and the later
 * ones follow it; one that overtakes it is the kernel's. An ICMP error is for a frontend if the packet
 * that it quotes came from it: without these, path MTU discovery towards clients would fail.
 * Neighbour discovery is never taken: who announces a service's address answers it (RFC 4861 7.2).
 */
#ifndef PENSTOCK_FRONTENDS_H
#define PENSTOCK_FRONTENDS_H

#define FRAGMENT_AGE_NS 60000000000ULL  /* RFC 8200 4.5: a packet is put together within 60 s */
#define EXTENSIONS_MAX 8                /* as kernels/wire.py */
#define ANY_FRAGMENT 0x3fff             /* more fragments, and the offset */
#define OFFSET 0x1fff
#define MORE 0x2000
#define ICMP_QUOTED 8                   /* bytes before the packet that an ICMP error quotes */

struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, FRONTEND_SLOTS);
  __uint(map_flags, BPF_F_NO_PREALLOC);
  __type(key, struct frontend_key);
  __type(value, __u32);
} frontends SEC(".maps");

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
} frontend_fragments SEC(".maps");

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

static __always_inline int is_frontend(const void *address, __u8 family, __u16 port_be, __u8 protocol)
{
  struct frontend_key key = { .port_be = port_be, .protocol = protocol, .family = family };

  if (family == 4)
    __builtin_memcpy(key.address, address, 4);
  else
    __builtin_memcpy(key.address, address, 16);
  return bpf_map_lookup_elem(&frontends, &key) != 0;
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
  __u64 *seen_ns = bpf_map_lookup_elem(&frontend_fragments, key);

  return seen_ns && bpf_ktime_get_ns() - *seen_ns < FRAGMENT_AGE_NS;
}

static __always_inline void follow(const struct fragment_key *key)
{
  __u64 now_ns = bpf_ktime_get_ns();

  bpf_map_update_elem(&frontend_fragments, key, &now_ns, BPF_ANY);
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

/* Whether the packet that an ICMP error quotes came from a frontend. quoted: its IP header. */
static __always_inline int quotes_frontend(const void *quoted, void *end, __u8 family,
                                           const __u32 *target)
{
  const __u32 *source;
  struct transport t;
  const __u16 *ports;

  if (family == 4) {
    if (!transport4(quoted, end, &t))
      return 0;
    source = &((const struct iphdr *)quoted)->saddr;
    if (source[0] != target[0])
      return 0;
  } else {
    if (!transport6(quoted, end, &t))
      return 0;
    source = (const __u32 *)&((const struct ipv6hdr *)quoted)->saddr;
    if (source[0] != target[0] || source[1] != target[1] || source[2] != target[2] ||
        source[3] != target[3])
      return 0;
  }
  ports = quoted + t.at;
  if (t.later || !has_ports(t.protocol) || (void *)(ports + 2) > end)
    return 0;
  return is_frontend(source, family, ports[0], t.protocol);
}

static __always_inline int is_error4(__u8 kind)
{
  return (kind >= 3 && kind <= 5) || kind == 11 || kind == 12;  /* RFC 792 */
}

/* Whether an IPv4 packet from outside is for a service. */
static __always_inline int frontend4(const struct iphdr *ip, void *end)
{
  struct fragment_key fragment = {};
  struct transport t = {};
  const __u16 *ports;

  if (is_frontend(&ip->daddr, 4, 0, 0))
    return 1;
  if (!transport4(ip, end, &t))
    return 0;
  if (t.first || t.later)
    name_fragment(&fragment, &ip->saddr, &ip->daddr, 4, &t);
  if (t.later)
    return is_followed(&fragment);
  ports = (void *)ip + t.at;
  if ((void *)(ports + 2) > end)
    return 0;
  if (t.protocol == IPPROTO_ICMP)
    return is_error4(*(__u8 *)ports) &&
           quotes_frontend((void *)ports + ICMP_QUOTED, end, 4, &ip->daddr);
  if (!has_ports(t.protocol) || !is_frontend(&ip->daddr, 4, ports[1], t.protocol))
    return 0;
  if (t.first)
    follow(&fragment);
  return 1;
}

/* Whether an IPv6 packet from outside is for a service. */
static __always_inline int frontend6(const struct ipv6hdr *ip, void *end)
{
  struct fragment_key fragment = {};
  struct transport t = {};
  const __u16 *ports;
  int whole = is_frontend(&ip->daddr, 6, 0, 0);

  if (!transport6(ip, end, &t))
    return whole;
  if (t.first || t.later)
    name_fragment(&fragment, &ip->saddr, &ip->daddr, 6, &t);
  if (t.later)
    return whole || is_followed(&fragment);
  ports = (void *)ip + t.at;
  if ((void *)(ports + 2) > end)
    return whole;
  if (t.protocol == IPPROTO_ICMPV6) {
    __u8 kind = *(__u8 *)ports;

    if (kind >= 133 && kind <= 137)  /* RFC 4861 4 */
      return 0;
    return whole || (kind < 128 && quotes_frontend((void *)ports + ICMP_QUOTED, end, 6,
                                                   (const __u32 *)&ip->daddr));
  }
  if (whole)
    return 1;
  if (!has_ports(t.protocol) || !is_frontend(&ip->daddr, 6, ports[1], t.protocol))
    return 0;
  if (t.first)
    follow(&fragment);
  return 1;
}

#endif
