"""Copies of the DNS messages that the flow table has forwarded: read when there is time.

Rule: what stands here has been forwarded: it is counted and told as if it had come through the
stages, and nothing more can be done about it.

Theory. xdp/bpf/copies.h leaves them in a BPF ring: a word with the length, whose upper bits say
that a record is still being written or was given up, a word of the kernel's own, the record, and
room up to a multiple of 8. Positions run freely. A copy names the entry that has forwarded it, and
so the connection; an entry that is another flow's by now says nothing of it, so such a copy is
lost, and counted. Several threads read: one that does nothing else and is in no hurry
(engine/copies.py), and each worker that meets DNS in its vector, since the query that an answer
belongs to may be among the copies. None waits for another: a thread says which record it means
(`held`), then takes that and a few behind it by moving `cursor`, with compare-and-swap. What the
kernel may write over ends at the first record that somebody still holds. Few at a time, since what
a thread has taken and not yet read nobody else sees; not one, since the words that all share cost
a third of the reading.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.connections import LIVE, OWNER, RECORD, TICK_SHIFT
from dataplane.kernels.dns_judge import judge_query
from dataplane.kernels.dns_lead import DNS
from dataplane.kernels.dns_teach import judge_answer
from dataplane.kernels.flow_entry import ENTRY
from dataplane.kernels.house import (
    fence,
    inline,
    kernel,
    load16be,
    load32,
    load32_acquire,
    load64,
    load64_acquire,
    sched_yield,
    store64,
    store64_release,
    swap64,
)
from dataplane.kernels.layout import offset_of
from dataplane.kernels.rows import Rows
from xdp.abi import CONST

# Words of Flows.copies.
CONSUMER, PRODUCER, RECORDS = 0, 1, 2  # memory addresses; 0: there is no ring
MASK = 3
CURSOR = 4  # position of the next record that nobody has taken
HELD = 5  # by lane: position of the record that it is at
LANES = CONST["DNS_LANES"]
COPIES_WORDS = HELD + LANES
NONE = 1 << 62  # held by nobody
ALL = 1 << 32  # more copies than a ring holds
TAKEN = 8  # records at a time

HEAD = 8  # BPF_RINGBUF_HDR_SZ
BUSY, DISCARD = 1 << 31, 1 << 30
LENGTH_MASK = DISCARD - 1
ALIGN = 7
TUPLE_MASK = 0xFFFFFFFFFFFF  # of `rest`: what stands behind is not the tuple's
WORD_BYTES = 8
ONE = np.uint64(1)

SOURCE, SLOT, DATAGRAM = (offset_of("dns_copy", name) for name in ("source", "slot", "datagram"))
TUPLE_WORDS = 5  # source, target, rest


def make_copies(ring: tuple[np.ndarray, ...] | None) -> Rows:
    """Return Flows.copies. ring: an xdp.maps.RingMemory, which outlives it; None: no copies."""
    words = np.full(COPIES_WORDS, NONE, np.int64)
    words[:HELD] = 0
    if ring is not None:
        consumer, producer, records = ring
        words[CONSUMER], words[PRODUCER] = consumer.ctypes.data, producer.ctypes.data
        words[RECORDS], words[MASK] = records.ctypes.data, len(records) // 2 - 1
        words[CURSOR] = consumer[0]
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
def _give_back(f):
    """Let the kernel write over what nobody needs any more."""
    free = load64_acquire(f.copies.address + CURSOR * WORD_BYTES)
    for lane in range(LANES):
        held = load64_acquire(f.copies.address + (HELD + lane) * WORD_BYTES)
        free = held if held < free else free
    stands = load64(f.copies[CONSUMER])
    while free > stands and not swap64(f.copies[CONSUMER], stands, free):
        stands = load64(f.copies[CONSUMER])


@inline
def _behind(f, at, end, most):
    """Position behind the whole records from `at` on, `most` of them; how many these are."""
    count = np.int64(0)
    while at < end and count < most:
        length = load32_acquire(f.copies[RECORDS] + (at & f.copies[MASK]))
        if length & BUSY:
            break
        at += (HEAD + (length & LENGTH_MASK) + ALIGN) & ~ALIGN
        count += 1
    return at, count


@inline
def read_copies(t, f, c, most):
    """Read up to so many copies of those that are there now; return how many it were.

    t: Tables, f: Flows, c: Counters or DnsLane.
    """
    count = np.int64(0)
    if f.copies[CONSUMER] == 0:
        return count
    cursor, held = f.copies.address + CURSOR * WORD_BYTES, f.copies.address + HELD * WORD_BYTES
    held += c.dns_lane[0] * WORD_BYTES
    end = load64_acquire(f.copies[PRODUCER])
    at = load64_acquire(cursor)
    while at < end and count < most:
        store64(held, at)
        fence()  # it is seen before the records are ours
        behind, some = _behind(f, at, end, min(TAKEN, most - count))
        if some == 0:
            break
        if swap64(cursor, at, behind):
            count += some
            while at < behind:
                head = f.copies[RECORDS] + (at & f.copies[MASK])
                length = load32_acquire(head)
                if not length & DISCARD:
                    _read(t, f, c, head + HEAD)
                at += (HEAD + (length & LENGTH_MASK) + ALIGN) & ~ALIGN
            store64_release(held, NONE)
            _give_back(f)
        at = load64_acquire(cursor)
    store64_release(held, NONE)
    return count


@kernel
def read(t, f, c, most, piece):
    """`read_copies`, for a thread of its own, which lets others run every `piece`. c: DnsLane."""
    count = np.int64(0)
    while count < most:
        some = read_copies(t, f, c, min(piece, most - count))
        count += some
        if some < piece:
            break
        sched_yield()
    return count
