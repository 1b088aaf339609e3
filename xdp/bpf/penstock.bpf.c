// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Steering: which packets go to the forwarder's AF_XDP sockets.
 *
 * Rule: a pod's packet goes to our socket or is dropped; a packet of the node on an uplink passes
 * to the kernel unless it is certainly ours and a forwarder is alive.
 *
 * Theory. Nothing is decided here but the way: every decision about a packet is made once, in the
 * vector kernels; what they have decided of a flow stands in the flow table (flows.h), which is asked
 * first. Of the rest pod_rx takes everything, and so does pod_tc (segments.h), which has no socket of its
 * own: it sends over the trunk, the veth that joins the node's stack, at whose other end pod_rx takes
 * what comes. uplink_rx takes UDP packets to the tunnel port at one of
 * our underlay addresses, packets to our pod prefixes, to services' frontends (frontends.h) and to
 * connections that were masqueraded (nat.h); packets with IPv4 options, fragments and IPv6 extension
 * headers are never tunnel packets of ours.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/in.h>
#include <linux/udp.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "abi.h"
#include "nat.h"
#include "frontends.h"
#include "flows.h"
#include "segments.h"

struct {
  __uint(type, BPF_MAP_TYPE_XSKMAP);
  __uint(max_entries, SOCKETS_MAX);
  __type(key, __u32);
  __type(value, __u32);
} xsks SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, PORTS_MAX);
  __type(key, __u32);
  __type(value, struct xdp_port);
} xdp_ports SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, 1);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, struct steering);
} steering SEC(".maps");

static __always_inline int to_socket(struct xdp_md *ctx, int otherwise)
{
  __u32 ifindex = ctx->ingress_ifindex;
  struct xdp_port *port = bpf_map_lookup_elem(&xdp_ports, &ifindex);

  if (!port || ctx->rx_queue_index >= port->queue_count)
    return otherwise;
  return bpf_redirect_map(&xsks, port->socket_base + ctx->rx_queue_index, otherwise);
}

SEC("xdp.frags")
int pod_rx(struct xdp_md *ctx)
{
  void *data = (void *)(long)ctx->data;
  void *end = (void *)(long)ctx->data_end;
  const struct ethhdr *eth = data;
  __u32 zero = 0;
  const struct steering *s = bpf_map_lookup_elem(&steering, &zero);

  if (s && s->flow_generation && (void *)(eth + 1) <= end && !(eth->h_dest[0] & 1)) {
    struct flow_key key = {};
    int verdict = flow_packet(ctx, s, &key, sizeof(*eth), eth->h_proto);

    if (verdict != FLOW_MISS)
      return verdict;
  }
  int verdict = to_socket(ctx, XDP_DROP);

  if (verdict == XDP_DROP)
    note_drop(DROP_POD_NO_SOCKET);
  return verdict;
}

/* Send a pod's packet to the sockets of the trunk: VLAN tag n says that it is port n's. */
static __always_inline int to_trunk(struct __sk_buff *skb)
{
  __u32 ifindex = skb->ifindex;
  struct xdp_port *port = bpf_map_lookup_elem(&xdp_ports, &ifindex);

  if (!port || !port->trunk || bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q), port->index)) {
    note_drop(DROP_POD_NO_SOCKET);
    return TC_ACT_SHOT;
  }
  return bpf_redirect(port->trunk, 0);
}

SEC("tc")
int pod_tc(struct __sk_buff *skb)
{
  void *data = (void *)(long)skb->data;
  void *end = (void *)(long)skb->data_end;
  const struct ethhdr *eth = data;
  __u32 zero = 0;
  const struct steering *s = bpf_map_lookup_elem(&steering, &zero);

  if (s && s->flow_generation && (void *)(eth + 1) <= end && !(eth->h_dest[0] & 1)) {
    struct flow_key key = {.l3 = sizeof(*eth), .ifindex = skb->ifindex};

    if (!skb->vlan_present && flow_key(eth + 1, end, eth->h_proto, &key)) {
      int verdict = segment_forward(skb, s, &key);

      if (verdict != FLOW_MISS)
        return verdict;
    }
  }
  return to_trunk(skb);
}

static __always_inline int is_alive(const struct steering *s)
{
  if (!s->timeout_ns)
    return 1;
  /* Signed: a heartbeat written between the two reads lies in the future. */
  return (__s64)(bpf_ktime_get_ns() - s->heartbeat_ns) < (__s64)s->timeout_ns;
}

static __always_inline int in_prefix(const struct steer_prefix *prefix, const __u32 *address, int words)
{
  const __u32 *net = (const __u32 *)prefix->address;
  const __u32 *mask = (const __u32 *)prefix->mask;

#pragma unroll
  for (int w = 0; w < 4; w++)
    if (w < words && (address[w] & mask[w]) != net[w])
      return 0;
  return 1;
}

enum { NOT_OURS = 0, OURS = 1, OURS_TUNNEL = 2 };

static __always_inline int ours4(const struct steering *s, const struct iphdr *ip, void *end)
{
  __u32 target = ip->daddr;

  for (__u32 n = 0; n < PREFIXES_MAX && n < s->prefix4_count; n++)
    if (in_prefix(&s->prefix4[n], &target, 1))
      return OURS;
  if (s->nat4_be && target == s->nat4_be && nat_ours4(ip, end))
    return OURS;
  if (!s->tunnel_port_be || ip->version != 4 || ip->ihl != 5 || ip->protocol != IPPROTO_UDP ||
      (ip->frag_off & bpf_htons(0x3fff)))
    return NOT_OURS;

  const struct udphdr *udp = (void *)(ip + 1);

  if ((void *)(udp + 1) > end || udp->dest != (__u16)s->tunnel_port_be)
    return NOT_OURS;
  for (__u32 n = 0; n < LOCALS_MAX && n < s->local4_count; n++)
    if (s->local4_be[n] == target)
      return OURS_TUNNEL;
  return NOT_OURS;
}

static __always_inline int is_nat6(const struct steering *s, const __u32 *target)
{
  const __u32 *nat = (const __u32 *)s->nat6;

  return (nat[0] | nat[1] | nat[2] | nat[3]) && nat[0] == target[0] && nat[1] == target[1] &&
         nat[2] == target[2] && nat[3] == target[3];
}

static __always_inline int ours6(const struct steering *s, const struct ipv6hdr *ip, void *end)
{
  __u32 target[4];

  __builtin_memcpy(target, &ip->daddr, sizeof(target));
  for (__u32 n = 0; n < PREFIXES_MAX && n < s->prefix6_count; n++)
    if (in_prefix(&s->prefix6[n], target, 4))
      return OURS;
  if (is_nat6(s, target) && nat_ours6(ip, end))
    return OURS;
  if (!s->tunnel_port_be || ip->version != 6 || ip->nexthdr != IPPROTO_UDP)
    return NOT_OURS;

  const struct udphdr *udp = (void *)(ip + 1);

  if ((void *)(udp + 1) > end || udp->dest != (__u16)s->tunnel_port_be)
    return NOT_OURS;
  for (__u32 n = 0; n < LOCALS_MAX && n < s->local6_count; n++) {
    const __u32 *local = (const __u32 *)&s->local6[n * 16];

    if (local[0] == target[0] && local[1] == target[1] && local[2] == target[2] &&
        local[3] == target[3])
      return OURS_TUNNEL;
  }
  return NOT_OURS;
}

/* What the flow table makes of a packet that is ours. */
static __always_inline int by_flow(struct xdp_md *ctx, const struct steering *s, int ours)
{
  void *data = (void *)(long)ctx->data;
  void *end = (void *)(long)ctx->data_end;
  const struct ethhdr *eth = data;
  struct flow_key key = {.uplink = 1};

  if ((void *)(eth + 1) > end)
    return FLOW_MISS;
  if (ours != OURS_TUNNEL)
    return flow_packet(ctx, s, &key, sizeof(*eth), eth->h_proto);
  if (eth->h_proto == bpf_htons(ETH_P_IP)) {
    const struct iphdr *ip = (void *)(eth + 1);

    if ((void *)(ip + 1) > end)
      return FLOW_MISS;
    key.remote[0] = ip->saddr;
    return flow_tunnelled(ctx, s, &key, sizeof(*eth) + sizeof(*ip),
                          bpf_ntohs(ip->tot_len) - sizeof(*ip), ip->tos);
  }
  const struct ipv6hdr *ip = (void *)(eth + 1);

  if ((void *)(ip + 1) > end)
    return FLOW_MISS;
  __builtin_memcpy(key.remote, &ip->saddr, 16);
  return flow_tunnelled(ctx, s, &key, sizeof(*eth) + sizeof(*ip), bpf_ntohs(ip->payload_len),
                        bpf_ntohl(*(const __u32 *)ip) >> 20);
}

SEC("xdp.frags")
int uplink_rx(struct xdp_md *ctx)
{
  void *data = (void *)(long)ctx->data;
  void *end = (void *)(long)ctx->data_end;
  const struct ethhdr *eth = data;
  __u32 zero = 0;
  const struct steering *s = bpf_map_lookup_elem(&steering, &zero);
  int ours = NOT_OURS;

  if (!s || (void *)(eth + 1) > end || (eth->h_dest[0] & 1))
    return XDP_PASS;
  if (eth->h_proto == bpf_htons(ETH_P_IP)) {
    const struct iphdr *ip = (void *)(eth + 1);

    if ((void *)(ip + 1) <= end)
      ours = ours4(s, ip, end);
    if ((void *)(ip + 1) <= end && !ours && s->frontend_count)
      ours = frontend4(ip, end);
  } else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
    const struct ipv6hdr *ip = (void *)(eth + 1);

    if ((void *)(ip + 1) <= end)
      ours = ours6(s, ip, end);
    if ((void *)(ip + 1) <= end && !ours && s->frontend_count)
      ours = frontend6(ip, end);
  }
  if (!ours)
    return XDP_PASS;
  if (s->flow_generation) {
    int verdict = by_flow(ctx, s, ours);

    if (verdict != FLOW_MISS)
      return verdict;
  }
  return is_alive(s) ? to_socket(ctx, XDP_PASS) : XDP_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
