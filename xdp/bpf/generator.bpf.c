// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* The packet generator of the benchmarks.
 *
 * Rule: every frame leaves as the template says, with the next UDP source port.
 *
 * Theory. Live frames of BPF_PROG_RUN are recycled pages, and who receives one may have changed it
 * (a router: MAC addresses, TTL, checksum). So the headers are written anew each time. IPv4 without
 * options, UDP without checksum: the port can change and nothing else has to.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define HEADERS (sizeof(struct ethhdr) + sizeof(struct iphdr) + sizeof(struct udphdr))
#define FIRST_PORT 1024

struct template {
  __u64 flows_mask; /* flows - 1, a power of two less one */
  __u64 sent;
  __u8 headers[48]; /* the first HEADERS bytes of a frame */
};

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, struct template);
} templates SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_DEVMAP);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, __u32);
} devices SEC(".maps");

SEC("xdp")
int generate(struct xdp_md *ctx)
{
  void *data = (void *)(long)ctx->data;
  void *end = (void *)(long)ctx->data_end;
  struct udphdr *udp = data + sizeof(struct ethhdr) + sizeof(struct iphdr);
  __u32 zero = 0;
  struct template *t = bpf_map_lookup_elem(&templates, &zero);

  if (!t || data + HEADERS > end)
    return XDP_ABORTED;
  __builtin_memcpy(data, t->headers, HEADERS);
  udp->source = bpf_htons(FIRST_PORT + (t->sent++ & t->flows_mask));
  return bpf_redirect_map(&devices, 0, XDP_DROP);
}

char _license[] SEC("license") = "Dual BSD/GPL";
