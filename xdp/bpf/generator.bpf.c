// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* The packet generator of the benchmarks.
 *
 * Rule: every frame leaves as its template says; only the flow's fields, the time, and the checksums
 * that follow from them differ.
 *
 * Theory. Live frames of BPF_PROG_RUN are recycled pages, and who receives one may have changed it
 * (a router: MAC addresses, TTL, checksum). So the headers are written anew each time. A round of the
 * schedule says which template is next (sizes of IMIX, families, streams); the flow is a permutation
 * of a counter or the next entry of a sequence (Zipf, any number of flows), and up to FIELDS_MAX
 * fields follow from its number. With a rate the clock is read only when no frame is due; who has
 * fallen behind by more than `lag` leaves frames out and counts them, rather than send a burst that
 * nobody asked for. When nothing is due the frame is dropped here, which is how the program waits.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "generator.h"

#define SHORT4 60 /* the least frames: 64 bytes, and CSIT's 78 for IPv6, less FCS */
#define SHORT6 74
#define ODD 0x9E3779B1u /* flows in an order that is not that of their numbers */

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, 1);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, struct generator_control);
} control SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, TEMPLATES_MAX);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, struct generator_template);
} templates SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, SLOTS_MAX);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, __u64);
} schedule SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, SEQUENCE_MAX / 2);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, __u64); /* two flow numbers */
} sequence SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_DEVMAP);
  __uint(max_entries, DEVICES_MAX);
  __type(key, __u32);
  __type(value, __u32);
} devices SEC(".maps");

struct stamp {
  __u16 mark;
  __u8 template;
  __u8 zero;
  __u32 time[2];
};

/* Is a frame due? */
static __always_inline int due(struct generator_control *c)
{
  if (c->done || c->stop)
    return 0;
  if (c->limit && c->sent >= c->limit) {
    c->done = 1;
    return 0;
  }
  if (!c->start_ns) {
    c->start_ns = bpf_ktime_get_ns();
    c->now = c->next = 0;
  }
  if (c->next > c->now || (!c->gap && !(c->turns & 63))) {
    c->now = (bpf_ktime_get_ns() - c->start_ns) << 16;
    if (c->duration_ns && c->now >> 16 >= c->duration_ns) {
      c->done = 1;
      return 0;
    }
    if (c->next > c->now)
      return 0;
    if (c->gap && c->now - c->next > c->lag) {
      __u64 missed = (c->now - c->next) / c->gap;

      c->left_out += missed;
      c->next += missed * c->gap;
    }
  }
  c->next += c->gap;
  return 1;
}

static __always_inline __u32 flow_number(const struct generator_control *c)
{
  __u32 at = (__u32)(c->sent & c->sequence_mask), half = at >> 1;
  __u64 *pair;

  if (!c->sequence_mask)
    return ((__u32)c->sent * ODD) & (__u32)c->flow_mask;
  pair = bpf_map_lookup_elem(&sequence, &half);
  if (!pair)
    return 0;
  return at & 1 ? (__u32)(*pair >> 32) : (__u32)*pair;
}

static __always_inline __u16 folded(__u64 sum)
{
  sum = (sum & 0xffffffff) + (sum >> 32);
  sum = (sum & 0xffff) + (sum >> 16);
  sum = (sum & 0xffff) + (sum >> 16);
  sum = (sum & 0xffff) + (sum >> 16);
  return (__u16)~sum;
}

/* Write a flow's field; returns what it adds to a checksum. */
static __always_inline __u32 put(void *data, void *end, const struct generator_field *f, __u32 flow)
{
  __u32 value = f->first + ((flow >> (f->shift & 31)) & f->mask);
  void *at = data + (f->offset & 127);

  if (at + 4 > end)
    return 0;
  if (f->width == 4) {
    *(__u32 *)at = bpf_htonl(value);
    return (*(__u32 *)at & 0xffff) + (*(__u32 *)at >> 16);
  }
  *(__u16 *)at = bpf_htons((__u16)value);
  return *(__u16 *)at;
}

SEC("xdp")
int generate(struct xdp_md *ctx)
{
  __u32 zero = 0, number, slot;
  struct generator_control *c = bpf_map_lookup_elem(&control, &zero);
  struct generator_template *t;
  __u64 sums = 0, *which;
  void *data, *end;

  if (!c)
    return XDP_ABORTED;
  c->turns++;
  if (!due(c))
    return XDP_DROP;
  slot = c->slot;
  c->slot = slot + 1 < c->slots ? slot + 1 : 0;
  which = bpf_map_lookup_elem(&schedule, &slot);
  if (!which)
    return XDP_ABORTED;
  number = (__u32)*which;
  t = bpf_map_lookup_elem(&templates, &number);
  if (!t)
    return XDP_ABORTED;
  data = (void *)(long)ctx->data;
  end = (void *)(long)ctx->data_end;
  if (t->length != (__u16)(end - data)) {
    if (bpf_xdp_adjust_tail(ctx, (int)t->length - (int)(end - data)))
      return XDP_ABORTED;
    data = (void *)(long)ctx->data;
    end = (void *)(long)ctx->data_end;
  }
  if (data + SHORT4 > end)
    return XDP_ABORTED;
  if (data + HEADERS_MAX <= end)
    __builtin_memcpy(data, t->headers, HEADERS_MAX);
  else if (data + SHORT6 <= end)
    __builtin_memcpy(data, t->headers, SHORT6);
  else
    __builtin_memcpy(data, t->headers, SHORT4);

  __u32 flow = flow_number(c), addresses = 0, ports = 0;

#pragma unroll
  for (int n = 0; n < FIELDS_MAX; n++) {
    if (n < t->field_count) {
      __u32 sum = put(data, end, &t->fields[n], flow);

      if (t->fields[n].width == 4)
        addresses += sum;
      else
        ports += sum;
    }
  }
  sums = t->udp_sum + addresses + ports;
  if (t->stamped && !(c->sent & c->stamp_mask)) {
    struct stamp *s = data + (t->stamp & 127);

    if ((void *)(s + 1) <= end) {
      __u64 now = bpf_ktime_get_ns();

      s->time[0] = (__u32)now;
      s->time[1] = (__u32)(now >> 32);
      sums += (now & 0xffffffff) + (now >> 32);
    }
  }
  if (t->ip_check) {
    __u16 *check = data + (t->ip_check & 127);

    if ((void *)(check + 1) <= end)
      *check = folded(t->ip_sum + addresses);
  }
  if (t->udp_check) {
    __u16 *check = data + (t->udp_check & 127);

    if ((void *)(check + 1) <= end) {
      *check = folded(sums);
      if (!*check)
        *check = 0xffff;
    }
  }
  c->sent++;
  c->last_ns = c->now;
  t->sent++;
  t->bytes += t->length;
  return bpf_redirect_map(&devices, t->device, XDP_DROP);
}

char _license[] SEC("license") = "Dual BSD/GPL";
