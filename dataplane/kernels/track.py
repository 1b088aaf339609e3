"""Which connection a packet belongs to: the way of all packets but the first.

Rule: a packet whose connection was judged by the present policies goes on here; every other one is
put on the list `todo`, and `connect` decides.

Theory. Three passes over the vector, so that the cache misses of its packets overlap: bucket of the
index, record, tuple. What a packet then changes is in the record's third cache line: time,
counters, state, and only when it changes. The verdict of a policy is kept as the generation that
gave it; one increment of control.judgement sends every connection through `connect` once, with its
next packet. For translated connections the new addresses and ports are put into columns here, all
from one read of the record, which is checked to be the same afterwards: another worker may take it
meanwhile.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.admit import is_gateway_solicitation
from dataplane.kernels.batch import (
    FLAG_AUDITED,
    FLAG_FRAGMENT,
    FLAG_ICMP_ERROR,
    FLAG_LATER_FRAGMENT,
    FLAG_MULTICAST,
    FLAG_NAT,
    FLAG_NAT_SOURCE,
    FLAG_WORTH,
    KIND_IP4,
    KIND_IP6,
    VERDICT_PENDING,
)
from dataplane.kernels.connections import (
    BYTES,
    FLAGS,
    FLOW_SLOT,
    GENERATION,
    JUDGEMENT,
    LAST,
    LINE,
    LIVE,
    LOWER,
    MASK,
    NOTICED,
    OWNER,
    PLACE_GENERATION,
    RECORD,
    STATE,
    TICK,
    TICK_SHIFT,
    WORD,
    WORD_BASE,
    bucket_of,
    cut_flows,
    generation_at,
    offset,
    same_tuple,
    tag_of,
)
from dataplane.kernels.events import CHANGE, NOW, OFF, REPLY, note
from dataplane.kernels.house import (
    add32,
    inline,
    kernel,
    load8,
    load32,
    load32_acquire,
    load64,
    lowest_bit,
    match8,
    prefetch,
    store32,
    store64,
)
from dataplane.kernels.layout import PACKETS, TCP_SEEN
from dataplane.kernels.parse import mix
from dataplane.kernels.refuse import deny, served
from dataplane.kernels.states import (
    CLOSED,
    CLOSING,
    FLAGS_ARE_NEW,
    SETTLED_NO_MORE,
    advance,
    reopens,
)
from xdp.abi import CONST

NAT_SOURCE = CONST["CONNECTION_FLAG_NAT_SOURCE"]
NAT_TARGET = CONST["CONNECTION_FLAG_NAT_TARGET"]
DENIED = CONST["CONNECTION_FLAG_DENIED"]
AUDITED = CONST["CONNECTION_FLAG_AUDITED"]
DNS = CONST["CONNECTION_FLAG_DNS"]
REFUSAL, REASON, SERVICE = offset("refusal"), offset("reason"), offset("service")
SOURCE_IDENTITY, TARGET_IDENTITY = offset("source_identity"), offset("target_identity")
GENERATION_MASK = 0xFFFFFFFF
FLOW_EVERY = 7  # a direction's FLOW_LEAST'th packet is worth an entry, and each 8th from there
FLOW_LEAST = 4
FLOW_TCP = 2  # and TCP's second: there was a handshake, which no flood of single packets makes


@inline
def trackable(b, t, i):
    """True for packets that belong to a connection: not multicast, not neighbour discovery."""
    if b.verdict[i] != VERDICT_PENDING or b.flags[i] & FLAG_MULTICAST:
        return False
    if b.kind[i] != KIND_IP4 and b.kind[i] != KIND_IP6:
        return False
    return b.protocol[i] != wire.ICMP6 or not is_gateway_solicitation(b, t, i)


@inline
def hash_of(b, i):
    """Hash of packet i's tuple, with the ports that a fragment has by now."""
    if b.flags[i] & FLAG_FRAGMENT:
        return mix(b.source_hi[i], b.source_lo[i], b.target_hi[i], b.target_lo[i], b.word[i])
    return b.hash[i]


@inline
def translated(b, i, record, way):
    """Take the translation of packet i from its record; False when the record is no more."""
    other = record + (1 - way) * LINE
    b.nat_source_hi[i] = np.uint64(load64(other + 16))
    b.nat_source_lo[i] = np.uint64(load64(other + 24))
    b.nat_target_hi[i] = np.uint64(load64(other))
    b.nat_target_lo[i] = np.uint64(load64(other + 8))
    word = load64(other + WORD)
    b.nat_ports[i] = (((word >> 32) & 0xFFFF) << 16) | ((word >> 48) & 0xFFFF)
    if load32_acquire(record + OWNER) != LIVE or not _fits(b, i, record, way):
        return False
    if b.nat_source_lo[i] != b.source_lo[i] or b.nat_source_hi[i] != b.source_hi[i]:
        b.flags[i] |= FLAG_NAT_SOURCE
    b.first_target_hi[i], b.first_target_lo[i] = b.target_hi[i], b.target_lo[i]
    b.target_hi[i] = b.nat_target_hi[i]
    b.target_lo[i] = b.nat_target_lo[i]
    b.flags[i] |= FLAG_NAT
    return True


@inline
def _fits(b, i, record, way):
    return same_tuple(
        record + way * LINE,
        b.source_hi[i], b.source_lo[i], b.target_hi[i], b.target_lo[i], b.word[i],
    )  # fmt: skip


@inline
def count(b, i, record, way, tick):
    """Charge packet i to its connection."""
    store32(record + LAST + way * 4, tick)
    at = record + PACKETS + way * 8
    packets = load64(at) + 1
    store64(at, packets)
    worth = packets & FLOW_EVERY == FLOW_LEAST
    worth |= packets == FLOW_TCP and b.protocol[i] == wire.TCP
    if worth or load32(record + FLOW_SLOT + way * 4):
        b.flags[i] |= FLAG_WORTH
    at = record + BYTES + way * 8
    store64(at, load64(at) + b.ip_length[i])


@inline
def settle(b, i, record, way, tick, places, ring):
    """Let packet i of a judged connection pass, or refuse it; False when the record is no more."""
    flags = load8(record + FLAGS)
    if flags & DENIED:
        b.source_identity[i] = load32(record + (TARGET_IDENTITY if way else SOURCE_IDENTITY))
        b.target_identity[i] = load32(record + (SOURCE_IDENTITY if way else TARGET_IDENTITY))
        if not way and flags & NAT_TARGET:
            line = record + LINE
            hi, lo = np.uint64(load64(line)), np.uint64(load64(line + 8))
            served(b, i, load32(record + SERVICE), hi, lo, (load64(line + WORD) >> 48) & 0xFFFF)
        deny(b, i, load32(record + REASON), load32(record + REFUSAL))
        return True
    count(b, i, record, way, tick)
    if not b.flags[i] & FLAG_LATER_FRAGMENT:
        at = b.address[i] + b.l4[i]
        news = advance(record + STATE, record + TCP_SEEN, b.protocol[i], at, way)
        if news:
            if news & SETTLED_NO_MORE:
                cut_flows(places, record, b.connection[i])
            if news & FLAGS_ARE_NEW:
                flags_seen = load8(at + wire.TCP_FLAGS)
                note(ring, record, CHANGE, flags_seen, REPLY if way else 0)
    if flags & AUDITED:
        b.flags[i] |= FLAG_AUDITED
    if flags & (NAT_SOURCE | NAT_TARGET) and not translated(b, i, record, way):
        return False
    if flags & DNS:
        note_dns(b, i)
    return True


@inline
def note_dns(b, i):
    """Put packet i on the list of what `names` has to look at."""
    b.dns[b.dns_count[0]] = i
    b.dns_count[0] += 1


@inline
def is_new(b, i, record):
    """True when packet i opens a connection anew where a finished one stands."""
    state = load8(record + STATE)
    if state != CLOSED and state != CLOSING:
        return False
    later = b.flags[i] & FLAG_LATER_FRAGMENT
    return not later and reopens(state, b.protocol[i], b.address[i] + b.l4[i])


@inline
def _known(b, i, records, judgement, tick, places, ring):
    """True when packet i's connection is known, judged, and the packet dealt with."""
    number = b.connection[i]
    if number < 0:
        return False
    record = records + number * RECORD
    if load32_acquire(record + OWNER) != LIVE or not _fits(b, i, record, b.way[i]):
        b.connection[i] = -1
        return False
    if load32(record + GENERATION) != judgement or is_new(b, i, record):
        return False
    if not settle(b, i, record, b.way[i], tick, places, ring):
        b.connection[i] = -1
        return False
    return True


@inline
def _find_buckets(b, t, k):
    index, mask = t.connection_index.address, k.words[MASK]
    for i in range(b.count[0]):
        b.connection[i] = -1
        if not trackable(b, t, i) or b.flags[i] & FLAG_ICMP_ERROR:
            continue
        b.hashes[i] = hash_of(b, i)
        prefetch(bucket_of(index, mask, b.hashes[i]))
        b.connection[i] = 0


@inline
def _find_records(b, t, k):
    index, records = t.connection_index.address, t.connections.address
    mask = k.words[MASK]
    for i in range(b.count[0]):
        if b.connection[i] < 0:
            continue
        at = bucket_of(index, mask, b.hashes[i])
        hits = match8(at, tag_of(b.hashes[i])) & 0xFF
        b.connection[i] = -1
        if hits:
            lower = (load64(at + lowest_bit(hits) * 8) & LOWER) - WORD_BASE
            if lower >= 0:
                b.connection[i] = lower >> 1
                b.way[i] = lower & 1
                record = records + (lower >> 1) * RECORD
                prefetch(record + (lower & 1) * LINE)
                prefetch(record + OWNER)


@inline
def follow_tables(t, k):
    """Make the flow table stale if a table has changed; return its generation.

    The generation is read before the tables are, so an entry of this vector is stale if one of
    them changes from here on: their writer increments its own generation last.
    """
    at = k.places[PLACE_GENERATION]
    c = t.control[0]
    fresh = (np.int64(c.generation), np.int64(c.judgement), np.int64(c.ports_generation))
    changed = False
    for n in range(3):
        changed |= k.words[NOTICED + n] != fresh[n]
        k.words[NOTICED + n] = fresh[n]
    if changed and load32(at):
        add32(at, 1)
    return generation_at(at)


@kernel
def track(b, t, k):
    """Find every packet's connection. About 8 ns a packet of a known one. k: Tracker."""
    k.words[TICK] = b.now_ns[0] >> TICK_SHIFT
    k.ring[NOW], k.ring[OFF] = b.now_ns[0], np.int64(t.node[0].events_off)
    b.flow_generation[0] = follow_tables(t, k)
    k.words[JUDGEMENT] = np.int64(t.control[0].judgement) & GENERATION_MASK
    _find_buckets(b, t, k)
    _find_records(b, t, k)
    records = t.connections.address
    judgement, tick, places = k.words[JUDGEMENT], k.words[TICK], k.places.address
    ring = k.ring.address
    todo = 0
    b.dns_count[0] = 0
    for i in range(b.count[0]):
        if not trackable(b, t, i):
            continue
        if not _known(b, i, records, judgement, tick, places, ring):
            b.todo[todo] = i
            todo += 1
    b.todo_count[0] = todo
