"""The table of connections: find, make, publish, remove, age.

Rule: a record is written only while its `owner` is CLAIMED by the one thread that made it so; what
changes with each packet (its third cache line) is written by whoever has the packet.

Theory. The index is buckets of eight words, one cache line: the upper half of a word is the upper
half of the flow hash (a tag), the lower half names record and direction, so a lookup that misses
reads one line and one that hits reads one more, the tuple itself. A connection has two words: the
tuple that its first packet carries and the tuple of a reply, after translation. Two tuples say all
that NAT has to do, as in the kernel's nf_conntrack. An overflowing bucket continues in the next, up
to BUCKETS_MOST; a removed word in a full bucket stays DELETED so that what lies behind is found.

Records are taken by a clock hand: it goes over the first `limit` records of the worker's part,
takes one that is free, and remembers the best victim on its way. When nothing is free the limit
doubles; at its end the victim gives way: closed and half-open ones first, established ones last and
only when idle for EVICT_IDLE ticks. So memory follows the peak of live connections and a full table
costs SCAN steps a new connection on average: steps that finding a free record has spared are saved,
and spent when the hand comes upon many that stay, which would hide the free ones behind them. A
freed record rests REST ticks: a worker in the middle of a vector may still look at it. All numbers
are memory addresses and int64, as house.py says.
"""

from typing import NamedTuple

import numpy as np

from dataplane.kernels.events import end, make_ring
from dataplane.kernels.house import (
    add32,
    inline,
    load8,
    load32,
    load32_acquire,
    load64,
    lowest_bit,
    match8,
    outline,
    prefetch,
    store32,
    store32_release,
    store64,
    swap32,
    swap64,
)
from dataplane.kernels.layout import (
    CREATED,
    FLAGS,
    LINE,
    STATE,
    WORD,
    offset,
    offset_of,
)
from dataplane.kernels.parse import mix
from dataplane.kernels.rows import Rows
from xdp.abi import CONST, DTYPE, value

RECORD = DTYPE["connection"].itemsize
OWNER = offset("owner")
GENERATION = offset("generation")
LAST = offset("last_original")
BYTES = offset("bytes_original")
FLOW_SLOT = offset("flow_original")
HASH = offset("hash")
REPLY_HASH = offset("reply_hash")

FLOW_SLOTS_MOST = CONST["FLOW_SLOTS_MOST"]
FREE, CLAIMED, LIVE = (value(f"RECORD_{name}") for name in ("FREE", "CLAIMED", "LIVE"))
ESTABLISHED = value("CONNECTION_ESTABLISHED")
REPLIED = value("CONNECTION_REPLIED")
PORT_TAKEN = CONST["CONNECTION_FLAG_PORT_TAKEN"]

FLOW_LIVE, FLOW_RESTING = value("FLOW_LIVE"), value("FLOW_RESTING")
SEEN = DTYPE["flow_seen"].itemsize
SEEN_RECORD, SEEN_STATE = (offset_of("flow_seen", name) for name in ("record", "state"))

BUCKET = 64  # bytes
WAYS = CONST["INDEX_WAYS"]
BUCKETS_MOST = 4  # that a lookup may touch
WORD_EMPTY, WORD_DELETED, WORD_BASE = 0, 1, 2
LOWER = 0xFFFFFFFF
SHIFT = np.uint64(32)
TICK_SHIFT = CONST["TICK_SHIFT"]

SCAN = 32  # records that a worker's hand goes over for a new connection
SAVED_MOST = 4096  # of saved steps that it goes at a time, about 20 us
REST = 2  # ticks that a freed record rests
EVICT_IDLE = 3600  # ticks (a minute): an established connection idle for less is never evicted
LIMIT_LEAST = 4096

# Words of Tracker.places: memory addresses.
PLACE_NAT_PORTS, PLACE_TAGS, PLACE_SEEN, PLACE_GENERATION = 0, 1, 2, 3

# Words of Tracker.words: a worker's own state.
HAND, FIRST, LIMIT, MOST = 0, 1, 2, 3  # next record, first of its part, records in use, in its part
MASK = 4  # buckets of the index - 1
JUDGEMENT = 5  # of the tables, read once a vector
TICK = 6  # now
WORKERS = 7
SAVED = 8  # steps of the hand that were spared
NOTICED = 9  # 9, 10, 11: generations of the tables that the flow table follows
RING = 12  # memory address of its ring's words: where it tells of connections that go
WORDS = 16


class Tracker(NamedTuple):
    """What a worker needs for connections beside the shared tables."""

    words: Rows  # int64[WORDS]
    counters: Rows  # track_counter[1]: its row
    exhausted: Rows  # exhausted[EXHAUSTED_MAX]: its row
    nat_ports: Rows  # uint32[NAT_PROTOCOLS * 65536]: connections by NAT port
    places: Rows  # int64[4]: memory addresses of what goes with a connection
    ring: Rows  # of events.make_ring


def make_tracker(
    counters: np.ndarray,
    exhausted: np.ndarray,
    nat_ports: np.ndarray,
    places: np.ndarray,
    records: int,
    worker: int = 0,
    workers: int = 1,
    ring: Rows | None = None,
) -> Tracker:
    """Return the Tracker of a worker over its part of `records` (a power of two) records.

    counters: track_counter[1]; exhausted: exhausted[EXHAUSTED_MAX]; nat_ports: uint32[4 * 65536];
    places: of flows.places_of; ring: of events.make_ring, none: nobody watches.
    """
    words = np.zeros(WORDS, np.int64)
    part = records // workers
    words[FIRST] = part * worker
    words[MOST] = part if worker < workers - 1 else records - part * worker
    words[LIMIT] = min(LIMIT_LEAST, int(words[MOST]))
    words[MASK] = records * 4 // WAYS - 1
    words[WORKERS] = workers
    counters[0]["limit"] = words[LIMIT]
    ring = ring or make_ring()
    words[RING] = ring.address
    rows = (Rows(one) for one in (words, counters, exhausted, nat_ports, places))
    return Tracker(*rows, ring)


@inline
def bucket_of(index, mask, hashed):
    """Memory address of the bucket of a hash (uint64)."""
    return index + (np.int64(hashed & np.uint64(LOWER)) & mask) * BUCKET


@inline
def tag_of(hashed):
    """Tag of a hash (uint64), as int64."""
    return np.int64(hashed >> SHIFT)


@inline
def same_tuple(line, source_hi, source_lo, target_hi, target_lo, word):
    """True when the tuple that stands at `line` is this one (all uint64)."""
    different = np.uint64(load64(line)) ^ source_hi
    different |= np.uint64(load64(line + 8)) ^ source_lo
    different |= np.uint64(load64(line + 16)) ^ target_hi
    different |= np.uint64(load64(line + 24)) ^ target_lo
    different |= np.uint64(load64(line + 32)) ^ word
    return different == np.uint64(0)


@outline
def find(index, records, mask, source_hi, source_lo, target_hi, target_lo, word, hashed):
    """Return record << 1 | direction of a live connection's tuple, -1 when there is none."""
    tag = tag_of(hashed)
    number = np.int64(hashed & np.uint64(LOWER)) & mask
    for _ in range(BUCKETS_MOST):
        at = index + number * BUCKET
        found = match8(at, tag)
        hits = found & 0xFF
        while hits:
            way = lowest_bit(hits)
            hits &= hits - 1
            lower = load64(at + way * 8) & LOWER
            if lower < WORD_BASE:
                continue
            lower -= WORD_BASE
            record = records + (lower >> 1) * RECORD
            if load32_acquire(record + OWNER) != LIVE:
                continue
            line = record + (lower & 1) * LINE
            if same_tuple(line, source_hi, source_lo, target_hi, target_lo, word):
                return lower
        if found >> 8:
            return -1
        number = (number + 1) & mask
    return -1


@outline
def _put(index, mask, hashed, lower):
    """Publish a word for a tuple; False when its buckets are full."""
    number = np.int64(hashed & np.uint64(LOWER)) & mask
    word = (tag_of(hashed) << 32) | (lower + WORD_BASE)
    for _ in range(BUCKETS_MOST):
        at = index + number * BUCKET
        for way in range(WAYS):
            old = load64(at + way * 8)
            if old == WORD_EMPTY or old == WORD_DELETED:
                if swap64(at + way * 8, old, word):
                    return True
        number = (number + 1) & mask
    return False


@outline
def _take(index, mask, lower_hash, lower):
    """Remove the word of a tuple, by the lower half of its hash; False when there is none."""
    number = lower_hash & mask
    wanted = lower + WORD_BASE
    for _ in range(BUCKETS_MOST):
        at = index + number * BUCKET
        full = True
        where = np.int64(0)
        old = np.int64(0)
        for way in range(WAYS):
            present = load64(at + way * 8)
            if present == WORD_EMPTY:
                full = False
            elif present & LOWER == wanted:
                where = at + way * 8
                old = present
        if where:
            # Others may lie behind a full bucket; where one was not, nothing does.
            return swap64(where, old, WORD_DELETED if full else WORD_EMPTY)
        if not full:
            return False
        number = (number + 1) & mask
    return False


@outline
def publish(index, records, mask, number, hashed, reply_hashed):
    """Make a filled, CLAIMED record findable in both directions; False, with nothing left, if not.

    hashed, reply_hashed: uint64, of its two tuples.
    """
    record = records + number * RECORD
    store32(record + HASH, np.int64(hashed & np.uint64(LOWER)))
    store32(record + REPLY_HASH, np.int64(reply_hashed & np.uint64(LOWER)))
    if not _put(index, mask, reply_hashed, number << 1 | 1):
        return False
    if not _put(index, mask, hashed, number << 1):
        _take(index, mask, np.int64(reply_hashed & np.uint64(LOWER)), number << 1 | 1)
        return False
    store32_release(record + OWNER, LIVE)
    return True


@outline
def unlink(index, records, mask, number, places):
    """Make a CLAIMED record unfindable; NAT port and flow entries go. places: memory address."""
    record = records + number * RECORD
    cut_flows(places, record, number)
    _take(index, mask, load32(record + HASH), number << 1)
    _take(index, mask, load32(record + REPLY_HASH), number << 1 | 1)
    if load8(record + FLAGS) & PORT_TAKEN:
        count_port(load64(places + PLACE_NAT_PORTS * 8), record, -1)


@outline
def cut_flows(places, record, number):
    """Take a connection's entries out of the flow table: its packets come back to the workers."""
    for way in range(2):
        at = record + FLOW_SLOT + way * 4
        slot = load32(at) - 1
        if slot < 0:
            continue
        store32(at, 0)
        seen = load64(places + PLACE_SEEN * 8) + slot * SEEN
        if load32(seen + SEEN_RECORD) == number:
            retire(load64(places + PLACE_TAGS * 8) + slot * 4, seen)


@inline
def keep_flows(places, record, number):
    """Forget which entries of the flow table a connection had, but for those that are still its."""
    for way in range(2):
        at = record + FLOW_SLOT + way * 4
        slot = load32(at) - 1
        seen = load64(places + PLACE_SEEN * 8) + slot * SEEN
        mine = 0 <= slot < FLOW_SLOTS_MOST and load32(seen + SEEN_STATE) == FLOW_LIVE
        if not mine or load32(seen + SEEN_RECORD) != number:
            store32(at, 0)


@inline
def generation_at(at):
    """Generation of entries that are written now, 0: off. at: address of flow_generation."""
    mine = load32_acquire(at)
    return (mine + load32_acquire(at + 4)) & 0xFFFFFFFF if mine else mine


@inline
def retire(tag, seen):
    """Take an entry of the flow table out of XDP's sight. tag, seen: memory addresses."""
    store32_release(tag, 0)
    swap32(seen + SEEN_STATE, FLOW_LIVE, FLOW_RESTING)


@inline
def port_row(protocol):
    """Row of the port tables of a protocol: TCP, UDP, SCTP, else ICMP identifiers."""
    if protocol == 6:
        return 0
    if protocol == 17:
        return 1
    return 2 if protocol == 132 else 3


@inline
def count_port(nat_ports, record, change):
    """Count a connection with a NAT port of this node: what uplinks steer to us (xdp)."""
    word = load64(record + LINE + WORD)
    add32(nat_ports + ((port_row((word >> 8) & 0xFF) << 16) + ((word >> 32) & 0xFFFF)) * 4, change)


@inline
def since(tick, then):
    """Ticks since a 32-bit tick, which wraps after 834 days; negative: it is still to come."""
    return ((tick - then + (1 << 31)) & LOWER) - (1 << 31)


@inline
def idle_of(record, tick):
    """Ticks since the last packet of a record, either direction."""
    original = since(tick, load32(record + LAST))
    reply = since(tick, load32(record + LAST + 4))
    return original if original < reply else reply


@inline
def _rank(record, tick):
    """How much a live record deserves to stay; an established, active one: 2**40 and more."""
    state = load8(record + STATE)
    idle = idle_of(record, tick)
    if idle < 0:
        idle = 0
    kept = (state << 32) - idle
    if state == ESTABLISHED and idle < EVICT_IDLE:
        kept += 1 << 40
    return kept


@outline
def allocate(index, records, words, places, counters):
    """Return the number of a record that is now CLAIMED, -1 when no room can be made.

    words, places, counters: memory addresses of Tracker's arrays.
    """
    first, limit = load64(words + FIRST * 8), load64(words + LIMIT * 8)
    most, tick = load64(words + MOST * 8), load64(words + TICK * 8)
    start, saved = load64(words + HAND * 8), load64(words + SAVED * 8)
    hand = start
    victim = far = np.int64(-1)
    least = np.int64(1) << 40
    steps = SCAN
    if limit == most:
        steps += saved if saved < SAVED_MOST else SAVED_MOST
    for n in range(steps):
        number = first + hand
        hand += 1
        if hand >= limit:
            hand = 0
        record = records + number * RECORD
        prefetch(record + 4 * RECORD + OWNER)
        owner = load32_acquire(record + OWNER)
        if owner == FREE:
            rested = load32(record + CREATED) == 0 or since(tick, load32(record + LAST)) >= REST
            if rested and swap32(record + OWNER, FREE, CLAIMED):
                store64(words + HAND * 8, hand)
                saved += SCAN - 1 - n
                store64(words + SAVED * 8, saved if saved < most else most)
                return number
        elif owner == LIVE:
            rank = _rank(record, tick)
            if rank < least:
                least = rank
                victim, far = number, n
    store64(words + HAND * 8, hand)
    store64(words + SAVED * 8, saved - (steps - SCAN))
    if limit < most:
        wider = limit * 2 if limit * 2 < most else most
        store64(words + LIMIT * 8, wider)
        store64(counters + LIMIT_COUNTER, wider)
        store64(words + HAND * 8, limit + 1 if limit + 1 < wider else 0)
        number = first + limit
        if swap32(records + number * RECORD + OWNER, FREE, CLAIMED):
            return number
    if victim >= 0 and swap32(records + victim * RECORD + OWNER, LIVE, CLAIMED):
        mask = load64(words + MASK * 8)
        end(load64(words + RING * 8), records + victim * RECORD)
        unlink(index, records, mask, victim, places)
        # The others that it has seen are seen again: else a hand that comes round to many that
        # stay every few evictions would refuse as often as it evicts.
        store64(words + HAND * 8, (start + (1 if far < SCAN else far + 1)) % limit)
        store64(counters + EVICTED_COUNTER, load64(counters + EVICTED_COUNTER) + 1)
        return victim
    return np.int64(-1)


LIMIT_COUNTER = offset_of("track_counter", "limit")
EVICTED_COUNTER = offset_of("track_counter", "evicted")


@inline
def release(records, number, tick):
    """Give a CLAIMED record back; it rests before it is used again."""
    record = records + number * RECORD
    store32(record + LAST, tick)
    store32_release(record + OWNER, FREE)


@inline
def remove(index, records, words, places, number):
    """Take a live connection out of the table; False when another thread is at it."""
    if not swap32(records + number * RECORD + OWNER, LIVE, CLAIMED):
        return False
    end(load64(words + RING * 8), records + number * RECORD)
    unlink(index, records, load64(words + MASK * 8), number, places)
    release(records, number, load64(words + TICK * 8))
    return True


@inline
def hash_at(line):
    """Flow hash of the tuple that stands at a line."""
    return mix(
        np.uint64(load64(line)),
        np.uint64(load64(line + 8)),
        np.uint64(load64(line + 16)),
        np.uint64(load64(line + 24)),
        np.uint64(load64(line + 32)),
    )
