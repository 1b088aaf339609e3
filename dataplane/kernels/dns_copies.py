"""Copies of the DNS messages that the flow table has forwarded: read when there is time.

Rule: what stands here has been forwarded: it is counted and told as if it had come through the
stages, and nothing more can be done about it.

Theory. xdp/bpf/copies.h leaves them in a BPF ring: a word with the length, whose upper bits say
that a record is still being written or was given up, a word of the kernel's own, the record, and
room up to a multiple of 8. Positions run freely. A copy names the entry that has forwarded it, and
so the connection; an entry that is another flow's by now says nothing of it, so such a copy is
lost, and counted. All workers may read, one at a time: when a vector has come all copies are read
before it is looked into, since the query that an answer belongs to may be one of them. When there
is nothing else to do one worker looks in each millisecond, as long as copies come; `rest` says how
long it may sleep. A wake-up is asked for a turn before it sleeps long, so none is missed.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.connections import LIVE, OWNER, RECORD, TICK_SHIFT
from dataplane.kernels.dns_judge import judge_query
from dataplane.kernels.dns_lead import DNS
from dataplane.kernels.dns_teach import judge_answer
from dataplane.kernels.flow_entry import ENTRY
from dataplane.kernels.house import (
    inline,
    load16be,
    load32,
    load32_acquire,
    load64,
    load64_acquire,
    store32,
    store32_release,
    store64_release,
    swap32,
)
from dataplane.kernels.layout import offset_of
from dataplane.kernels.rows import Rows

# Words of Flows.copies.
CONSUMER, PRODUCER, RECORDS = 0, 1, 2  # memory addresses; 0: there is no ring
MASK = 3
LOCK = 4  # 1: a worker reads
WAKE = 5  # memory address of steering.dns_wake
COPIES_WORDS = 6

HEAD = 8  # BPF_RINGBUF_HDR_SZ
BUSY, DISCARD = 1 << 31, 1 << 30
LENGTH_MASK = DISCARD - 1
ALIGN = 7
TUPLE_MASK = 0xFFFFFFFFFFFF  # of `rest`: what stands behind is not the tuple's
WORD_BYTES = 8
MOST = 64  # copies a turn when there is time: none waits long for the worker
LOOK_NS = 1_000_000
SHORT_MS = 1
ONE = np.uint64(1)

SOURCE, SLOT, DATAGRAM = (offset_of("dns_copy", name) for name in ("source", "slot", "datagram"))
TUPLE_WORDS = 5  # source, target, rest


def make_copies(ring: tuple[np.ndarray, ...] | None, steering: np.ndarray) -> Rows:
    """Return Flows.copies. ring: an xdp.maps.RingMemory; steering: steering[1]; both outlive it.

    None: nothing makes copies.
    """
    words = np.zeros(COPIES_WORDS, np.int64)
    words[WAKE] = steering.ctypes.data + offset_of("steering", "dns_wake")
    if ring is not None:
        consumer, producer, records = ring
        words[CONSUMER], words[PRODUCER] = consumer.ctypes.data, producer.ctypes.data
        words[RECORDS], words[MASK] = records.ctypes.data, len(records) // 2 - 1
    return Rows(words)


@inline
def _connection(t, f, at):
    """Record of the connection whose message was copied; -1: it is not known any more."""
    slot = load32(at + SLOT)
    entry = f.entries.address + slot * ENTRY
    other = (load64(entry + 32) ^ load64(at + SOURCE + 32)) & TUPLE_MASK
    for n in range(TUPLE_WORDS - 1):
        other |= load64(entry + n * WORD_BYTES) ^ load64(at + SOURCE + n * WORD_BYTES)
    if other:
        return np.int64(-1)
    number = np.int64(f.seen[slot].record)
    con = t.connections[number]
    if load32_acquire(t.connections.address + number * RECORD + OWNER) != LIVE:
        return np.int64(-1)
    if con.created != f.seen[slot].created or not con.flags & DNS:
        return np.int64(-1)
    return number


@inline
def _read(t, f, c, at):
    """Count and tell one message. at: memory address of its struct dns_copy."""
    number = _connection(t, f, at)
    if number < 0:
        c.dns_notes[0].copies_lost += ONE
        return
    c.dns_notes[0].copies += ONE
    now = load64(at)
    message = at + DATAGRAM + wire.UDP_LENGTH
    size = load16be(at + DATAGRAM + wire.UDP_LENGTH_FIELD) - wire.UDP_LENGTH
    if f.seen[load32(at + SLOT)].way:
        judge_answer(t, c, number, message, size, True, now, now >> TICK_SHIFT)
    else:
        judge_query(t, c, number, message, size, now, now >> TICK_SHIFT)


@inline
def _read_all(t, f, c, most):
    consumer, end = load64(f.copies[CONSUMER]), load64_acquire(f.copies[PRODUCER])
    count = np.int64(0)
    while consumer < end and count < most:
        head = f.copies[RECORDS] + (consumer & f.copies[MASK])
        length = load32_acquire(head)
        if length & BUSY:
            break
        if not length & DISCARD:
            _read(t, f, c, head + HEAD)
        consumer += (HEAD + (length & LENGTH_MASK) + ALIGN) & ~ALIGN
        store64_release(f.copies[CONSUMER], consumer)
        count += 1
    return count


@inline
def read_copies(t, f, c, most):
    """Read up to so many copies of those that are there now; return how many it were.

    t: Tables, f: Flows, c: Counters.
    """
    if f.copies[CONSUMER] == 0 or load64(f.copies[CONSUMER]) == load64(f.copies[PRODUCER]):
        return np.int64(0)
    lock = f.copies.address + LOCK * WORD_BYTES
    while not swap32(lock, 0, 1):
        pass  # another worker's, which reads for some microseconds
    count = _read_all(t, f, c, most)
    store32_release(lock, 0)
    return count


@inline
def rest(f, count, longest):
    """Ms that a worker may sleep which has just read so many copies. longest: when none come."""
    wake = f.copies[WAKE]
    if count > 0:
        store32(wake, 0)
        return np.int64(SHORT_MS)
    if load32(wake) == 0:
        store32(wake, 1)
        return np.int64(SHORT_MS)
    return longest
