/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * Copies of the DNS messages that the flow table forwards.
 *
 * Rule: a message goes on whether there is room for its copy or not; what is lost is counted.
 *
 * Theory. Names are read in user space (dataplane/kernels/dns_copies.py), but of a pod whose policies
 * name no names nothing is decided by them: so its messages go on at once, and a copy is left in a BPF
 * ring (Documentation/bpf/ringbuf.rst) for whoever counts them. That one looks into the ring again and
 * again while there is something; a wake-up, which costs more than the copy, is only sent when it has
 * gone to sleep for longer, as AF_XDP's need_wakeup does. A message that is larger than a copy may be
 * takes the way through the forwarder.
 */
#ifndef PENSTOCK_COPIES_H
#define PENSTOCK_COPIES_H

struct {
  __uint(type, BPF_MAP_TYPE_RINGBUF);
  __uint(max_entries, DNS_COPIES);
} dns_copies SEC(".maps");

/* Where a copy is put together. */
struct {
  __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, struct dns_copy);
} dns_scratch SEC(".maps");

/* Begin the copy of a datagram of `length` bytes; tuple: source, target and rest of struct flow_key. 0: it
 * is not one that is copied. */
static __always_inline struct dns_copy *copy_begin(const __u64 *tuple, __u32 slot, __u32 length)
{
  __u32 zero = 0;
  struct dns_copy *copy = bpf_map_lookup_elem(&dns_scratch, &zero);

  if (!copy || length < sizeof(struct udphdr) || length > sizeof(copy->datagram))
    return 0;
  copy->time_ns = bpf_ktime_get_ns();
  __builtin_memcpy(copy->source, tuple, 40);
  copy->slot = slot;
  copy->length = length;
  return copy;
}

/* Leave a copy, whose datagram of `length` bytes is there, to who reads them. */
static __always_inline void copy_end(const struct steering *s, struct dns_copy *copy, __u32 length)
{
  __u64 flags = *(volatile __u32 *)&s->dns_wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP;

  if (bpf_ringbuf_output(&dns_copies, copy, __builtin_offsetof(struct dns_copy, datagram) + length, flags))
    note_drop(LOST_DNS_COPY);
}

#endif
