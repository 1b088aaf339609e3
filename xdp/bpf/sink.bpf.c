// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* The sink of the benchmarks: counts the generator's frames where they arrive, or sends them back.
 *
 * Rule: a frame without the generator's mark passes, as if nobody were here.
 *
 * Theory. The mark stands first in the UDP payload, so ARP, neighbour discovery and the peers' own
 * packets are neither counted nor lost, and a frame is known whatever was translated on its way. A
 * frame that carries the time goes into a log-linear histogram (BUCKETS_MAX buckets of 1.6 % a
 * CPU). `reflect` exchanges sender and receiver: with it every flow gets its replies, through
 * whatever stands between; checksums do not change by an exchange. It leaves by a redirect to the device
 * itself: veth wakes a far end that has NAPI without a program for that, and not for XDP_TX
 * (drivers/net/veth.c, veth_xdp_flush).
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "generator.h"
#include "histogram.h"

struct {
  __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, struct sink_count);
} counts SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
  __uint(max_entries, BUCKETS_MAX);
  __type(key, __u32);
  __type(value, __u64);
} buckets SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_DEVMAP);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, __u32);
} self SEC(".maps");

struct stamp {
  __u16 mark;
  __u8 template;
  __u8 zero;
  __u32 time[2];
} __attribute__((packed));

/* The payload of a UDP packet, 0 when this is none. */
static __always_inline void *payload_of(void *data, void *end)
{
  struct ethhdr *eth = data;

  if ((void *)(eth + 1) > end)
    return 0;
  if (eth->h_proto == bpf_htons(ETH_P_IP)) {
    struct iphdr *ip = (void *)(eth + 1);

    if ((void *)(ip + 1) > end || ip->protocol != IPPROTO_UDP || ip->ihl != 5)
      return 0;
    return (void *)(ip + 1) + sizeof(struct udphdr);
  }
  if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
    struct ipv6hdr *ip = (void *)(eth + 1);

    if ((void *)(ip + 1) > end || ip->nexthdr != IPPROTO_UDP)
      return 0;
    return (void *)(ip + 1) + sizeof(struct udphdr);
  }
  return 0;
}

static __always_inline void note_time(struct sink_count *c, const struct stamp *s)
{
  __u64 then = (__u64)s->time[1] << 32 | s->time[0], took;
  __u32 bucket;
  __u64 *count;

  if (!then)
    return;
  took = bpf_ktime_get_ns() - then;
  if (took >> 40) /* the clocks of two cores may differ a little: not negative, not an hour */
    took = 0;
  c->stamped++;
  c->sum_ns += took;
  if (took > c->most_ns)
    c->most_ns = took;
  bucket = bucket_of(took);
  count = bpf_map_lookup_elem(&buckets, &bucket);
  if (count)
    ++*count;
}

/* Count a frame of ours; 0 for another. */
static __always_inline struct stamp *counted(struct xdp_md *ctx)
{
  void *data = (void *)(long)ctx->data;
  void *end = (void *)(long)ctx->data_end;
  struct stamp *s = payload_of(data, end);
  __u32 zero = 0;
  struct sink_count *c = bpf_map_lookup_elem(&counts, &zero);

  if (!c)
    return 0;
  if (!s || (void *)(s + 1) > end || s->mark != bpf_htons(MARK_BE)) {
    c->others++;
    return 0;
  }
  c->packets++;
  c->bytes += bpf_xdp_get_buff_len(ctx);
  c->by_template[s->template & (TEMPLATES_MAX - 1)]++;
  note_time(c, s);
  return s;
}

SEC("xdp.frags")
int collect(struct xdp_md *ctx)
{
  return counted(ctx) ? XDP_DROP : XDP_PASS;
}

static __always_inline void exchange(void *one, void *two, int words)
{
  __u32 *a = one, *b = two;

#pragma unroll
  for (int n = 0; n < 4; n++)
    if (n < words) {
      __u32 kept = a[n];

      a[n] = b[n];
      b[n] = kept;
    }
}

SEC("xdp.frags")
int reflect(struct xdp_md *ctx)
{
  void *data = (void *)(long)ctx->data;
  void *end = (void *)(long)ctx->data_end;
  struct ethhdr *eth = data;
  struct udphdr *udp;
  __u8 mac[ETH_ALEN];
  __u16 port;

  if (!counted(ctx))
    return XDP_PASS;
  if ((void *)(eth + 1) + sizeof(struct iphdr) + sizeof(*udp) > end)
    return XDP_ABORTED;
  if (eth->h_proto == bpf_htons(ETH_P_IP)) {
    struct iphdr *ip = (void *)(eth + 1);

    exchange(&ip->saddr, &ip->daddr, 1);
    udp = (void *)(ip + 1);
  } else {
    struct ipv6hdr *ip = (void *)(eth + 1);

    if ((void *)(ip + 1) + sizeof(*udp) > end)
      return XDP_ABORTED;
    exchange(&ip->saddr, &ip->daddr, 4);
    udp = (void *)(ip + 1);
  }
  port = udp->source;
  udp->source = udp->dest;
  udp->dest = port;
  __builtin_memcpy(mac, eth->h_source, ETH_ALEN);
  __builtin_memcpy(eth->h_source, eth->h_dest, ETH_ALEN);
  __builtin_memcpy(eth->h_dest, mac, ETH_ALEN);
  return bpf_redirect_map(&self, 0, XDP_DROP);
}

char _license[] SEC("license") = "Dual BSD/GPL";
