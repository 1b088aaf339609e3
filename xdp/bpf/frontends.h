/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * Services on the uplink: which packets from outside are for a frontend.
 *
 * Rule: a packet is taken only if its own bytes prove that it is for a frontend; what cannot be
 * read is the kernel's.
 *
 * Theory. The map `frontends` holds (address, port, protocol) of NodePorts and host ports, and
 * (address, 0, 0) for addresses that are services' alone, such as load balancer IPs: of these every
 * packet is taken, so that a ping is answered and an unknown port refused. An ICMP error is for a frontend if the packet
 * that it quotes came from it: without these, path MTU discovery towards clients would fail.
 * Neighbour discovery is never taken: who announces a service's address answers it (RFC 4861 7.2).
 */
#ifndef PENSTOCK_FRONTENDS_H
#define PENSTOCK_FRONTENDS_H

#include "transport.h"

struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, FRONTEND_SLOTS);
  __uint(map_flags, BPF_F_NO_PREALLOC);
  __type(key, struct frontend_key);
  __type(value, __u32);
} frontends SEC(".maps");

static __always_inline int is_frontend(const void *address, __u8 family, __u16 port_be, __u8 protocol)
{
  struct frontend_key key = { .port_be = port_be, .protocol = protocol, .family = family };

  if (family == 4)
    __builtin_memcpy(key.address, address, 4);
  else
    __builtin_memcpy(key.address, address, 16);
  return bpf_map_lookup_elem(&frontends, &key) != 0;
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
