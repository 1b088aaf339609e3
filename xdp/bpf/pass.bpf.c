// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Small programs for tests and benchmarks: pass, drop, count, send back, generate, redirect.
 *
 * Rule: none of these is part of the dataplane.
 *
 * Theory. count_drop is the sink of a measurement; generate changes the UDP source port of a live
 * frame (flows_mask + 1 flows) and transmits it; redirect is the bare limit of XDP.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

struct count {
  __u64 packets;
  __u64 bytes;
};

struct {
  __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, struct count);
} counters SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_DEVMAP);
  __uint(max_entries, 8);
  __type(key, __u32);
  __type(value, __u32);
} devices SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, 1);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, __u64);
} flows_mask SEC(".maps");

static __always_inline void add(struct xdp_md *ctx)
{
  __u32 zero = 0;
  struct count *c = bpf_map_lookup_elem(&counters, &zero);

  if (c) {
    c->packets++;
    c->bytes += bpf_xdp_get_buff_len(ctx); /* all buffers */
  }
}

SEC("xdp.frags")
int pass(struct xdp_md *ctx)
{
  return XDP_PASS;
}

SEC("xdp.frags")
int drop(struct xdp_md *ctx)
{
  return XDP_DROP;
}

SEC("xdp.frags")
int count_drop(struct xdp_md *ctx)
{
  add(ctx);
  return XDP_DROP;
}

/* IPv4 UDP without checksum: the source port walks through flows_mask + 1 values. */
SEC("xdp.frags")
int generate(struct xdp_md *ctx)
{
  void *data = (void *)(long)ctx->data;
  void *end = (void *)(long)ctx->data_end;
  struct iphdr *ip = data + sizeof(struct ethhdr);
  struct udphdr *udp = (void *)(ip + 1);
  __u32 zero = 0;
  __u64 *mask = bpf_map_lookup_elem(&flows_mask, &zero);
  struct count *c = bpf_map_lookup_elem(&counters, &zero);

  if ((void *)(udp + 1) > end || !mask || !c)
    return XDP_ABORTED;
  udp->source = bpf_htons(1024 + (c->packets & *mask));
  c->packets++;
  c->bytes += bpf_xdp_get_buff_len(ctx); /* all buffers */
  return bpf_redirect_map(&devices, 0, XDP_DROP);
}

SEC("xdp.frags")
int redirect(struct xdp_md *ctx)
{
  add(ctx);
  return bpf_redirect_map(&devices, 1, XDP_DROP);
}

char _license[] SEC("license") = "Dual BSD/GPL";
