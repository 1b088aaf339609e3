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

/* Whether the transport header at l4 is sent to (or, in a quoted packet, from) one of our ports. */
static __always_inline int nat_ports_match(__u8 protocol, const __u8 *l4, const void *end, int quoted)
{
  int row = nat_row(protocol);

  if (l4 + 8 > (const __u8 *)end)
    return 0;
  if (row >= 0)
    return nat_port_taken(row, *(const __u16 *)(l4 + (quoted ? 0 : 2)));
  if (protocol != IPPROTO_ICMP && protocol != IPPROTO_ICMPV6)
    return 0;
  /* Replies to queries; in a quoted packet, the query itself. Both have the identifier. */
  return nat_port_taken(NAT_ROW_ICMP, *(const __u16 *)(l4 + 4));
}

static __always_inline int nat_is_error4(const __u8 *icmp)
{
  return icmp[0] == 3 || icmp[0] == 11 || icmp[0] == 12;
}

/* An IPv4 packet to the address that we masquerade with. */
static __always_inline int nat_ours4(const struct iphdr *ip, const void *end)
{
  const __u8 *l4 = (const __u8 *)ip + ip->ihl * 4;
  const struct iphdr *quoted = (const void *)(l4 + 8);

  if (ip->ihl < 5 || ip->frag_off & bpf_htons(0x1fff) || l4 + 8 > (const __u8 *)end)
    return 0;
  if (ip->protocol != IPPROTO_ICMP || !nat_is_error4(l4))
    return nat_ports_match(ip->protocol, l4, end, 0);
  if ((const void *)(quoted + 1) > end || quoted->ihl != 5 || quoted->saddr != ip->daddr)
    return 0;
  return nat_ports_match(quoted->protocol, (const __u8 *)(quoted + 1), end, 1);
}

/* An IPv6 packet to the address that we masquerade with. */
static __always_inline int nat_ours6(const struct ipv6hdr *ip, const void *end)
{
  const __u8 *l4 = (const __u8 *)(ip + 1);
  const struct ipv6hdr *quoted = (const void *)(l4 + 8);
  __u8 protocol = ip->nexthdr;

  if (protocol == IPPROTO_FRAGMENT) {
    if (l4 + 8 > (const __u8 *)end || *(const __u16 *)(l4 + 2) & bpf_htons(0xfff8))
      return 0;
    protocol = l4[0];
    return nat_ports_match(protocol, l4 + 8, end, 0);
  }
  if (l4 + 8 > (const __u8 *)end)
    return 0;
  if (protocol != IPPROTO_ICMPV6 || l4[0] > 127)
    return nat_ports_match(protocol, l4, end, 0);
  if ((const void *)(quoted + 1) > end)
    return 0;
  return nat_ports_match(quoted->nexthdr, (const __u8 *)(quoted + 1), end, 1);
}

#endif
