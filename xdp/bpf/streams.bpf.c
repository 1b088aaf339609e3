// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Streams of frames with variables in them, and what has arrived of them (bench/trex).
 *
 * Rule: a frame leaves as its stream's body says, with the variables, sums and stamp of its turn.
 *
 * Theory. Live frames of BPF_PROG_RUN are recycled pages, so the whole body is copied into each. It
 * lies in mapped memory and is changed there: offsets need no comparing with the end of a packet, and
 * sums are made with one helper call over memory. Every turn the stream that is due first has a frame
 * sent; streams that count their frames are never cut short, only late, while those without an end
 * leave out what could not be sent in time and count it. On arrival frames are told apart by a mark
 * in the IPv4 identification or the IPv6 flow label, so their payload stays what it was; only timed
 * ones carry a stamp at their end. A port is the generator's: but for ARP and ICMP nothing passes on.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "histogram.h"
#include "streams.h"

#define LINE 64
#define ALWAYS 0xffffffffu

#define MAPPED(name, count, kind)          \
  struct {                                 \
    __uint(type, BPF_MAP_TYPE_ARRAY);      \
    __uint(max_entries, count);            \
    __uint(map_flags, BPF_F_MMAPABLE);     \
    __type(key, __u32);                    \
    __type(value, kind);                   \
  } name SEC(".maps")

MAPPED(control, 1, struct stream_control);
MAPPED(streams, STREAMS_MAX, struct stream);
MAPPED(bodies, STREAMS_MAX, struct stream_body);
MAPPED(lists, VALUES_MAX, __u64);
MAPPED(times, TIMED_MAX, struct group_times);
MAPPED(buckets, TIMED_MAX * TIME_BUCKETS, __u64);

struct {
  __uint(type, BPF_MAP_TYPE_DEVMAP);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, __u32);
} device SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
  __uint(max_entries, GROUPS_MAX + 1); /* the last one: everything */
  __type(key, __u32);
  __type(value, struct group_count);
} groups SEC(".maps");

/* --- sending ------------------------------------------------------------------------------- */

/* The running stream that is due first; STREAMS_MAX: none is due. What is found so far stands in the
 * map, not in registers, so that the verifier need not tell all the ways that lead here apart. */
static __always_inline __u32 pick(struct stream_control *c)
{
  c->due = ~0ull;
  c->pick = STREAMS_MAX;
  for (__u32 n = 0; n < STREAMS_MAX; n++) {
    __u32 key = n;
    struct stream *s;

    if (n >= c->streams)
      break;
    s = bpf_map_lookup_elem(&streams, &key);
    if (s && s->state == STREAM_RUNNING && s->next < c->due) {
      c->due = s->next;
      c->pick = n;
    }
  }
  if (c->due > c->now) {
    c->now = (bpf_ktime_get_ns() - c->start_ns) << 16;
    if (c->due > c->now)
      return STREAMS_MAX;
  }
  return c->pick;
}

static __always_inline __u64 mixed(__u64 x)
{
  x += 0x9e3779b97f4a7c15ull; /* splitmix64, Steele et al. 2014 */
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

static __always_inline __u64 within(const struct stream_variable *v, __u64 random)
{
  __u64 range = v->most - v->least + 1;

  return v->least + (range ? random % range : random);
}

/* Go on to a variable's next value; 1: it has gone round. */
static __always_inline int advance(struct stream_variable *v)
{
  switch (v->kind) {
  case VARIABLE_UP:
    if (v->value <= v->most && v->most - v->value >= v->step) {
      v->value += v->step;
      return 0;
    }
    v->value = v->least;
    return 1;
  case VARIABLE_DOWN:
    if (v->value >= v->least && v->value - v->least >= v->step) {
      v->value -= v->step;
      return 0;
    }
    v->value = v->most;
    return 1;
  case VARIABLE_RANDOM:
    v->value = within(v, (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32());
    return 0;
  default:
    v->turn = v->turn + 1 < v->limit ? v->turn + 1 : 0;
    v->value = within(v, mixed(v->seed + v->turn));
    return v->turn == 0;
  }
}

static __always_inline void advance_all(struct stream *s)
{
  int again = s->period && ++s->used >= s->period;
  __u32 round = 1; /* bit n + 1: variable n has gone round; bit 0: every frame */

  if (again)
    s->used = 0;
  for (__u32 n = 0; n < VARIABLES_MAX; n++) {
    struct stream_variable *v = &s->variables[n];

    if (n >= s->variable_count)
      break;
    if (again) {
      v->value = v->first;
      v->turn = 0;
    } else if (round >> (v->driver & 15) & 1) {
      round |= (__u32)advance(v) << (n + 1);
    }
  }
}

static __always_inline __u64 value_of(const struct stream *s, __u32 n)
{
  const struct stream_variable *v = &s->variables[n & (VARIABLES_MAX - 1)];
  __u64 *listed;
  __u32 key;

  if (!v->values)
    return v->value;
  key = v->values - 1 + (__u32)v->value;
  listed = bpf_map_lookup_elem(&lists, &key);
  return listed ? *listed : 0;
}

static __always_inline void write_all(const struct stream *s, struct stream_body *b)
{
  for (__u32 n = 0; n < WRITES_MAX; n++) {
    const struct stream_write *w = &s->writes[n];
    void *at = b->bytes + (w->offset & (WRITE_REACH - 1));
    __u64 value;

    if (n >= s->write_count)
      break;
    value = value_of(s, w->variable) + w->add;
    value = (value << (w->left & 63)) >> (w->right & 63) & w->mask;
    switch (w->width) {
    case 1:
      *(__u8 *)at = (*(__u8 *)at & ~(__u8)w->mask) | (__u8)value;
      break;
    case 2: {
      __u16 mask = (__u16)w->mask, put = (__u16)value;

      if (!w->little) {
        mask = bpf_htons(mask);
        put = bpf_htons(put);
      }
      *(__u16 *)at = (*(__u16 *)at & ~mask) | put;
      break;
    }
    case 4: {
      __u32 mask = (__u32)w->mask, put = (__u32)value;

      if (!w->little) {
        mask = bpf_htonl(mask);
        put = bpf_htonl(put);
      }
      *(__u32 *)at = (*(__u32 *)at & ~mask) | put;
      break;
    }
    default: {
      __u64 mask = w->mask, put = value;

      if (!w->little) {
        mask = bpf_cpu_to_be64(mask);
        put = bpf_cpu_to_be64(put);
      }
      *(__u64 *)at = (*(__u64 *)at & ~mask) | put;
    }
    }
  }
}

static __always_inline __u16 folded(__u64 sum)
{
  sum = (sum & 0xffffffff) + (sum >> 32);
  sum = (sum & 0xffff) + (sum >> 16);
  sum = (sum & 0xffff) + (sum >> 16);
  sum = (sum & 0xffff) + (sum >> 16);
  return (__u16)~sum;
}

static __always_inline __u64 sum_of(void *at, __u32 size)
{
  return (__u32)bpf_csum_diff(0, 0, at, size, 0);
}

static __always_inline void sum_all(const struct stream *s, struct stream_body *b, void *stamp)
{
  if (s->ip_at) {
    __u8 *ip = b->bytes + (s->ip_at & (WRITE_REACH - 1));

    *(__u16 *)(ip + 10) = 0;
    *(__u16 *)(ip + 10) = folded(sum_of(ip, sizeof(struct iphdr)));
  }
  if (s->l4_check) {
    __u8 *l4 = b->bytes + (s->l4_at & (WRITE_REACH - 1));
    __u16 *check = (void *)b->bytes + (s->l4_check & (WRITE_REACH - 1));
    __u64 sum = s->l4_rest;

    *check = 0;
    sum += sum_of(l4, s->l4_window & (2 * WRITE_REACH - 4));
    if (s->pseudo_size == 8)
      sum += sum_of(b->bytes + (s->pseudo_at & (WRITE_REACH - 1)), 8);
    else if (s->pseudo_size)
      sum += sum_of(b->bytes + (s->pseudo_at & (WRITE_REACH - 1)), 32);
    if (s->timed) {
      __u64 more = sum_of(stamp, sizeof(struct stream_stamp));

      sum += s->stamp_odd ? more << 8 : more; /* by a byte, modulo 0xffff */
    }
    *check = folded(sum);
    if (!*check && s->l4_zero)
      *check = 0xffff;
  }
}

struct block {
  __u64 words[8];
};

struct last {
  __u64 words[7];
  __u32 word;
} __attribute__((packed));

/* Copy a body into a frame of `length` bytes: lines, then the last line, which overlaps; 0: it does
 * not fit. */
static __always_inline int copy(struct stream_body *b, void *data, void *end, __u32 length)
{
  __u32 rest;

  if (length < LINE) {
    rest = (length - FRAME_LEAST) & 3;
    if (data + FRAME_LEAST > end || data + rest + FRAME_LEAST > end)
      return 0;
    *(struct last *)data = *(struct last *)b->bytes;
    *(struct last *)(data + rest) = *(struct last *)(b->bytes + rest);
    return 1;
  }
  for (__u32 at = 0; at + LINE <= BODY_BYTES; at += LINE) {
    if (at + LINE > length)
      break;
    if (data + at + LINE > end)
      return 0;
    *(struct block *)(data + at) = *(struct block *)(b->bytes + at);
  }
  rest = (length - LINE) & 4095;
  if (rest > BODY_BYTES - LINE || data + rest + LINE > end)
    return 0;
  *(struct block *)(data + rest) = *(struct block *)(b->bytes + rest);
  return 1;
}

static __always_inline void finish(struct stream *s)
{
  __u32 key = s->following - 1;
  struct stream *f;

  s->state = STREAM_DONE;
  if (!s->following || !s->follows)
    return;
  if (s->follows != ALWAYS)
    s->follows--;
  f = bpf_map_lookup_elem(&streams, &key);
  if (!f)
    return;
  f->next = s->next + f->delay;
  f->left = f->burst;
  f->bursts_left = f->bursts;
  f->state = STREAM_RUNNING;
}

/* When the next frame of a stream is due. */
static __always_inline void schedule(struct stream_control *c, struct stream *s)
{
  s->next += s->gap;
  if (s->next < c->now && c->now - s->next > c->lag) {
    if (s->burst) {
      s->next = c->now;
    } else if (s->gap) {
      __u64 missed = (c->now - s->next) / s->gap;

      s->left_out += missed;
      s->next += missed * s->gap;
    }
  }
  if (!s->burst || --s->left)
    return;
  if (s->bursts_left > 1) {
    s->bursts_left--;
    s->left = s->burst;
    s->next += s->rest - s->gap;
  } else {
    finish(s);
  }
}

SEC("xdp")
int transmit(struct xdp_md *ctx)
{
  struct stream_stamp stamp = {.magic = STAMP_MAGIC};
  struct stream_control *c;
  struct stream_body *b;
  struct stream *s;
  __u32 key = 0, length;
  void *data, *end;

  c = bpf_map_lookup_elem(&control, &key);
  if (!c || c->stop)
    return XDP_DROP;
  c->turns++;
  if (!c->start_ns)
    c->start_ns = bpf_ktime_get_ns();
  key = pick(c);
  s = bpf_map_lookup_elem(&streams, &key);
  b = bpf_map_lookup_elem(&bodies, &key);
  if (!s || !b)
    return XDP_DROP;
  if (s->end && s->next >= s->end) {
    s->state = STREAM_DONE;
    return XDP_DROP;
  }
  length = s->length;
  if (s->trim)
    length = (__u32)value_of(s, s->trim - 1);
  if (length < FRAME_LEAST)
    length = FRAME_LEAST;
  if (s->timed) {
    stamp.flow_sequence = (__u8)s->flow_sequence;
    stamp.group = (__u16)s->group;
    stamp.sequence = s->sequence;
    stamp.time = bpf_ktime_get_ns();
  }
  write_all(s, b);
  sum_all(s, b, &stamp);
  data = (void *)(long)ctx->data;
  end = (void *)(long)ctx->data_end;
  if (length != (__u32)(end - data)) {
    if (bpf_xdp_adjust_tail(ctx, (int)length - (int)(end - data)))
      return XDP_ABORTED;
    data = (void *)(long)ctx->data;
    end = (void *)(long)ctx->data_end;
  }
  if (!copy(b, data, end, length))
    return XDP_ABORTED;
  if (s->timed) {
    __u32 at = (length - STAMP_SIZE) & 4095;

    if (data + at + STAMP_SIZE > end)
      return XDP_ABORTED;
    *(struct stream_stamp *)(data + at) = stamp;
    s->sequence++;
  }
  advance_all(s);
  schedule(c, s);
  s->sent++;
  s->bytes += length;
  return bpf_redirect_map(&device, 0, XDP_DROP);
}

/* --- arriving ------------------------------------------------------------------------------ */

static __always_inline void note_sequence(struct group_times *t, const struct stream_stamp *stamp)
{
  if (stamp->sequence == t->expected) {
    t->expected++;
  } else if (stamp->sequence > t->expected) {
    t->lost += stamp->sequence - t->expected;
    t->too_high++;
    t->expected = stamp->sequence + 1;
  } else {
    t->too_low++;
    if (stamp->sequence + 1 == t->expected) {
      t->duplicate++;
    } else {
      t->reordered++;
      if (t->lost)
        t->lost--;
    }
  }
}

static __always_inline void note_stamp(struct xdp_md *ctx, __u32 group)
{
  struct group_times *t = bpf_map_lookup_elem(&times, &group);
  __u32 length = (__u32)bpf_xdp_get_buff_len(ctx), key;
  struct stream_stamp stamp;
  __u64 took, change, *count;

  if (!t)
    return;
  if (length < STAMP_SIZE || bpf_xdp_load_bytes(ctx, length - STAMP_SIZE, &stamp, STAMP_SIZE) ||
      stamp.magic != STAMP_MAGIC || stamp.group != group) {
    t->bad++;
    return;
  }
  if (stamp.flow_sequence != (__u8)t->flow_sequence) {
    t->old++;
    return;
  }
  note_sequence(t, &stamp);
  took = bpf_ktime_get_ns() - stamp.time;
  if (took >> 40) /* the clocks of two cores may differ a little: not negative */
    took = 0;
  if (t->timed) {
    change = took > t->last_ns ? took - t->last_ns : t->last_ns - took;
    t->jitter_ns += change - ((t->jitter_ns + 8) >> 4);
  }
  if (!t->timed || took < t->least_ns)
    t->least_ns = took;
  if (took > t->most_ns)
    t->most_ns = took;
  t->last_ns = took;
  t->sum_ns += took;
  t->timed++;
  key = group * TIME_BUCKETS + bucket_of(took);
  count = bpf_map_lookup_elem(&buckets, &key);
  if (count)
    ++*count;
}

static __always_inline void note(__u32 key, __u32 bytes)
{
  struct group_count *g = bpf_map_lookup_elem(&groups, &key);

  if (g) {
    g->packets++;
    g->bytes += bytes;
  }
}

SEC("xdp.frags")
int arrive(struct xdp_md *ctx)
{
  void *data = (void *)(long)ctx->data;
  void *end = (void *)(long)ctx->data_end;
  struct ethhdr *eth = data;
  __u16 kind, mark = 0;
  int ours = 1;
  void *l3;

  if ((void *)(eth + 1) > end)
    return XDP_DROP;
  note(GROUPS_MAX, (__u32)bpf_xdp_get_buff_len(ctx));
  l3 = eth + 1;
  kind = eth->h_proto;
  if (kind == bpf_htons(ETH_P_8021Q) && l3 + 4 <= end) {
    kind = *(__u16 *)(l3 + 2);
    l3 += 4;
  }
  if (kind == bpf_htons(ETH_P_IP)) {
    struct iphdr *ip = l3;

    if ((void *)(ip + 1) > end)
      return XDP_DROP;
    mark = bpf_ntohs(ip->id);
    ours = ip->protocol != IPPROTO_ICMP;
  } else if (kind == bpf_htons(ETH_P_IPV6)) {
    struct ipv6hdr *ip = l3;

    if ((void *)(ip + 1) > end)
      return XDP_DROP;
    mark = (__u16)(ip->flow_lbl[1] << 8 | ip->flow_lbl[2]);
    ours = ip->nexthdr != IPPROTO_ICMPV6;
  } else {
    return kind == bpf_htons(ETH_P_ARP) ? XDP_PASS : XDP_DROP;
  }
  if (mark >= GROUP_MARK && mark < GROUP_MARK + GROUPS_MAX) {
    note(mark - GROUP_MARK, (__u32)bpf_xdp_get_buff_len(ctx));
    if (mark - GROUP_MARK < TIMED_MAX)
      note_stamp(ctx, mark - GROUP_MARK);
    return XDP_DROP;
  }
  return ours ? XDP_DROP : XDP_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
