/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * Which packets from outside answer a connection that was masqueraded with this node's address.
 *
 * Rule: a packet is taken only when its port is in use by one of our connections; all else that is
 * sent to the node's address is the node's own.
 *
 * Theory. The forwarder counts its connections by (protocol, port) in `nat_ports`, which it has mapped, and
 * takes no port that the node uses (kernels/nat.py), so a port alone tells whose a packet is; the
 * exact tuple is looked up later. ICMP errors are told by the packet that they quote.
 */
#ifndef PENSTOCK_NAT_H
#define PENSTOCK_NAT_H

#include "transport.h"

struct nat_pair {
  __u32 connections[2]; /* of an even port and the next one */
};

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, NAT_PROTOCOLS << 15);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, struct nat_pair);
} nat_ports SEC(".maps");

#define NAT_ROW_ICMP 3

static __always_inline int nat_row(__u8 protocol)
{
  if (protocol == IPPROTO_TCP)
    return 0;
  if (protocol == IPPROTO_UDP)
    return 1;
  return protocol == IPPROTO_SCTP ? 2 : -1;
}

static __always_inline int nat_port_taken(int row, __u16 port_be)
{
  __u32 port = bpf_ntohs(port_be);
  __u32 key = ((__u32)row << 15) | (port >> 1);
  const struct nat_pair *pair = bpf_map_lookup_elem(&nat_ports, &key);

  return pair && pair->connections[port & 1];
}

/* Whether a transport header is sent to (or, in a quoted packet, from) one of our ports. */
static __always_inline int nat_matches(__u8 protocol, const __u16 *words, const void *end, int quoted)
{
  int row = nat_row(protocol);

  if ((const void *)(words + 4) > end)
    return 0;
  if (row >= 0)
    return nat_port_taken(row, words[quoted ? 0 : 1]);
  if (protocol != IPPROTO_ICMP && protocol != IPPROTO_ICMPV6)
    return 0;
  return nat_port_taken(NAT_ROW_ICMP, words[2]); /* the identifier, of query and reply alike */
}

/* An IPv4 packet to the address that we masquerade with. */
static __always_inline int nat_ours4(const struct iphdr *ip, void *end)
{
  struct fragment_key fragment = {};
  struct transport t = {};
  const __u16 *words;

  if (!transport4(ip, end, &t))
    return 0;
  if (t.first || t.later)
    name_fragment(&fragment, &ip->saddr, &ip->daddr, 4, &t);
  if (t.later)
    return is_followed(&fragment);
  words = (void *)ip + t.at;
  if ((void *)(words + 4) > end)
    return 0;
  if (t.protocol == IPPROTO_ICMP && is_error4(*(const __u8 *)words)) {
    const struct iphdr *quoted = (void *)words + ICMP_QUOTED;

    if (!transport4(quoted, end, &t) || t.later || quoted->saddr != ip->daddr)
      return 0;
    return nat_matches(t.protocol, (void *)quoted + t.at, end, 1);
  }
  if (!nat_matches(t.protocol, words, end, 0))
    return 0;
  if (t.first)
    follow(&fragment);
  return 1;
}

/* An IPv6 packet to the address that we masquerade with. */
static __always_inline int nat_ours6(const struct ipv6hdr *ip, void *end)
{
  struct fragment_key fragment = {};
  struct transport t = {};
  const __u16 *words;

  if (!transport6(ip, end, &t))
    return 0;
  if (t.first || t.later)
    name_fragment(&fragment, &ip->saddr, &ip->daddr, 6, &t);
  if (t.later)
    return is_followed(&fragment);
  words = (void *)ip + t.at;
  if ((void *)(words + 4) > end)
    return 0;
  if (t.protocol == IPPROTO_ICMPV6 && *(const __u8 *)words < 128) {
    const struct ipv6hdr *quoted = (void *)words + ICMP_QUOTED;

    if (!transport6(quoted, end, &t) || t.later)
      return 0;
    return nat_matches(t.protocol, (void *)quoted + t.at, end, 1);
  }
  if (!nat_matches(t.protocol, words, end, 0))
    return 0;
  if (t.first)
    follow(&fragment);
  return 1;
}

#endif
