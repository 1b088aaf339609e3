"""The flow table as workers see it: which directions get an entry, and where it stands.

Rule: an entry says what the stages have just done with a packet, under the generation that the
vector began with; nothing is decided here.

Theory. xdp/bpf/flows.h reads what stands here, while it is written. An entry is claimed by
compare-and-swap, filled (flow_entry.py), and found by its tag, which is stored last and taken away
first. Worth an entry is a direction with a few packets (`track`), of UDP or of established TCP,
that is plain: no fragments, options or ICMP. Between two pods of the node the last packet of
TCP's handshake says what the answers' entry is, before one comes. DNS that policies look into has
none; other DNS leaves copies of its messages (dns_copies.py). Where its bucket is full, one
that has been idle for IDLE_EVICT_NS is retired for the next to come; until then it stays with the
stages.
"""

from typing import NamedTuple

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.batch import (
    FLAG_AUDITED,
    FLAG_DECAPSULATED,
    FLAG_FRAGMENT,
    FLAG_LOCAL,
    FLAG_NAT,
    FLAG_OPTIONS,
    FLAG_RELATED,
    FLAG_WORTH,
    VERDICT_SEND,
    WAY_ORIGINAL,
)
from dataplane.kernels.connections import (
    ESTABLISHED,
    FLOW_LIVE,
    FLOW_SLOT,
    LIVE,
    OWNER,
    RECORD,
    SEEN,
    SEEN_STATE,
    STATE,
    offset_of,
    retire,
)
from dataplane.kernels.dns_copies import make_copies
from dataplane.kernels.dns_lead import DNS
from dataplane.kernels.flow_entry import (
    ENTRY,
    GENERATION,
    IFINDEX,
    LAST_NS,
    fill,
    hash_of,
    mirror,
)
from dataplane.kernels.house import (
    add32,
    fence,
    inline,
    kernel,
    load8,
    load32,
    load32_acquire,
    load64,
    outline,
    store32,
    store32_release,
    store64,
    swap32,
)
from dataplane.kernels.layout import PACKETS
from dataplane.kernels.policy import NAMES
from dataplane.kernels.route import lookup
from dataplane.kernels.rows import Rows
from dataplane.kernels.track import FLOW_TCP
from xdp.abi import CONST, DTYPE, value

IDLE_EVICT_NS = 100_000_000
WAYS = CONST["FLOW_WAYS"]
HOPS = CONST["ADJACENCIES_MAX"]
FLOW_EMPTY, FLOW_WRITTEN = value("FLOW_EMPTY"), value("FLOW_WRITTEN")
ADJACENCY_POD, ADJACENCY_HOST = value("ADJACENCY_POD"), value("ADJACENCY_HOST")
ADJACENCY_NEXTHOP, ADJACENCY_TUNNEL = value("ADJACENCY_NEXTHOP"), value("ADJACENCY_TUNNEL")
SHIFT = np.uint64(32)
ONES16, LOWER = 0xFFFF, 0xFFFFFFFF
TAG_BIT = 2  # of every tag: 0 is an empty one
FLOW_GENERATION = offset_of("steering", "flow_generation")


class Flows(NamedTuple):
    """The flow table as a worker sees it; all but `devices` is memory that XDP shares."""

    tags: Rows  # uint32[slots]: FLOW_WAYS a bucket
    entries: Rows  # flow_entry[slots]
    hops: Rows  # hop[ADJACENCIES_MAX]
    seen: Rows  # flow_seen[slots]
    steering: Rows  # steering[1]
    devices: Rows  # uint8[PORTS_MAX]: bits 1 << enum port_hook: what programs there may send to it
    copies: Rows  # int64[COPIES_WORDS]: the ring of copies of DNS messages


def make_flows(slots: int = 0) -> Flows:
    """Return a table of our own memory, for stages without XDP; 0 slots: it is off."""
    steering, devices = np.zeros(1, DTYPE["steering"]), np.zeros(CONST["PORTS_MAX"], np.uint8)
    steering["flow_generation"], steering["flow_mask"] = slots > 0, max(slots // WAYS, 1) - 1
    tags, seen = np.zeros(slots, np.uint32), np.zeros(slots, DTYPE["flow_seen"])
    entries, hops = (np.zeros(n, DTYPE[name]) for name, n in (("flow_entry", slots), ("hop", HOPS)))
    rows = map(Rows, (tags, entries, hops, seen, steering, devices))
    return Flows(*rows, make_copies(None))


def places_of(nat_ports: np.ndarray, flows: Flows) -> np.ndarray:
    """Return Tracker.places, int64[4]. nat_ports: uint32[4 * 65536]; all must outlive it."""
    generation = flows.steering.address + FLOW_GENERATION
    return np.array(
        [nat_ports.ctypes.data, flows.tags.address, flows.seen.address, generation], np.int64
    )


@inline
def _takes(t, f, port, ingress):
    """Whether a port takes what the program of another one redirects."""
    return f.devices[port] >> t.ports[ingress].hook & 1 != 0


@inline
def _is_worth(b, t, f, i):
    """Whether packet i's direction may have an entry."""
    if b.verdict[i] != VERDICT_SEND or b.connection[i] < 0:
        return False
    if b.flags[i] & (FLAG_FRAGMENT | FLAG_OPTIONS | FLAG_LOCAL | FLAG_RELATED | FLAG_AUDITED):
        return False
    protocol, con = b.protocol[i], t.connections[b.connection[i]]
    if protocol == wire.TCP:
        if con.state != ESTABLISHED:
            return False
    elif protocol != wire.UDP:
        return False
    if con.flags & DNS and (con.names or con.egress_rule & NAMES):
        return False
    row = t.adjacencies[b.adjacency[i]]
    known = row.kind == ADJACENCY_POD or row.kind == ADJACENCY_NEXTHOP
    if not known and row.kind != ADJACENCY_TUNNEL and row.kind != ADJACENCY_HOST:
        return False
    if row.kind == ADJACENCY_TUNNEL and b.flags[i] & FLAG_DECAPSULATED:
        return False
    return _takes(t, f, row.port, b.ingress[i])


@outline
def _claim(tags, entries, seen, bucket, now):
    """Return a slot of a bucket, now FLOW_WRITTEN, or -1: all are in use. Idle ones are retired.

    tags, entries, seen: memory addresses; now: ns.
    """
    idle = np.int64(-1)
    oldest = now - IDLE_EVICT_NS
    for slot in range(bucket * WAYS, bucket * WAYS + WAYS):
        at = seen + slot * SEEN + SEEN_STATE
        state = load32_acquire(at)
        if state == FLOW_EMPTY:
            if swap32(at, FLOW_EMPTY, FLOW_WRITTEN):
                return slot
        elif state == FLOW_LIVE:
            last = load64(entries + slot * ENTRY + LAST_NS)
            if last < oldest:
                idle = slot
                oldest = last
    if idle >= 0:
        retire(tags + idle * 4, seen + idle * SEEN)
    return np.int64(-1)


@inline
def _refresh(b, t, f, i, slot, ifindex):
    """Bring a direction's own entry up to date; False when it has none any more."""
    seen = f.seen[slot]
    record = t.connections[b.connection[i]]
    if seen.record != b.connection[i] or seen.created != record.created or seen.way != b.way[i]:
        return False
    state = f.seen.address + slot * SEEN + SEEN_STATE
    if load32_acquire(state) != FLOW_LIVE:
        return False
    at = f.entries.address + slot * ENTRY
    stale = load32(at + GENERATION) != b.flow_generation[0]
    if not stale or load32(at + IFINDEX) != ifindex or not swap32(state, FLOW_LIVE, FLOW_WRITTEN):
        return True
    mirror(t, f, b.adjacency[i])
    fill(b, t, f, i, at, ifindex)
    store32_release(state, FLOW_LIVE)
    _recall(b, t, f, i, slot)
    return True


@inline
def _recall(b, t, f, i, slot):
    """Retire an entry whose connection another thread has ended while it was written.

    Who ends one changes its record first and then looks for entries; here it is the other way
    round, so one of the two sees the other.
    """
    fence()
    record = t.connections.address + b.connection[i] * RECORD
    ended = load32_acquire(record + OWNER) != LIVE
    if b.protocol[i] == wire.TCP:
        ended |= load8(record + STATE) != ESTABLISHED
    if ended:
        retire(f.tags.address + slot * 4, f.seen.address + slot * SEEN)


@inline
def _install(b, t, f, i, seed):
    """Give packet i's direction an entry, or bring its entry up to date."""
    record = t.connections.address + b.connection[i] * RECORD
    mine = record + FLOW_SLOT + b.way[i] * 4
    ifindex = np.int64(t.ports[b.ingress[i]].ifindex)
    slot = load32(mine) - 1
    if slot >= 0 and _refresh(b, t, f, i, slot, ifindex):
        return
    hashed = hash_of(b, i, ifindex, seed)
    bucket = np.int64(hashed & np.uint64(LOWER)) & np.int64(f.steering[0].flow_mask)
    slot = _claim(f.tags.address, f.entries.address, f.seen.address, bucket, b.now_ns[0])
    if slot < 0:
        store32(mine, 0)
        return
    at = f.entries.address + slot * ENTRY
    mirror(t, f, b.adjacency[i])
    fill(b, t, f, i, at, ifindex)
    store64(at + LAST_NS, b.now_ns[0])
    f.seen[slot].record = b.connection[i]
    f.seen[slot].created = t.connections[b.connection[i]].created
    f.seen[slot].port = b.ingress[i]
    f.seen[slot].way = b.way[i]
    store32_release(f.seen.address + slot * SEEN + SEEN_STATE, FLOW_LIVE)
    store32_release(mine, slot + 1)
    store32_release(f.tags.address + slot * 4, np.int64(hashed >> SHIFT) | TAG_BIT)
    _recall(b, t, f, i, slot)


@inline
def _way_back(b, t, f, i):
    """Adjacency to who sent packet i, which ends a handshake of two pods of this node; else -1.

    Their answers go the same way back, so what their entry says is known before one comes.
    """
    if b.protocol[i] != wire.TCP or b.way[i] != WAY_ORIGINAL:
        return np.int64(-1)
    record = t.connections.address + b.connection[i] * RECORD
    if load64(record + PACKETS) != FLOW_TCP or load32(record + FLOW_SLOT + 4):
        return np.int64(-1)
    if t.adjacencies[b.adjacency[i]].kind != ADJACENCY_POD:
        return np.int64(-1)
    back = np.int64(lookup(t, b.kind[i], b.source_hi[i], b.source_lo[i]))
    ingress = t.adjacencies[b.adjacency[i]].port
    if t.adjacencies[back].kind != ADJACENCY_POD:
        return np.int64(-1)
    return back if _takes(t, f, t.adjacencies[back].port, ingress) else np.int64(-1)


@inline
def _turn(b, t, i, back):
    """Make packet i's columns those of an answer to it."""
    ingress = t.adjacencies[b.adjacency[i]].port
    source_hi, source_lo = b.source_hi[i], b.source_lo[i]
    source, target = b.source_port[i], b.target_port[i]
    if b.flags[i] & FLAG_NAT:
        ports = b.nat_ports[i]
        b.source_hi[i], b.source_lo[i] = b.nat_target_hi[i], b.nat_target_lo[i]
        b.source_port[i], b.target_port[i] = ports & ONES16, ports >> 16
        first_hi, first_lo = b.first_target_hi[i], b.first_target_lo[i]
        b.first_target_hi[i], b.first_target_lo[i] = b.nat_source_hi[i], b.nat_source_lo[i]
        b.nat_source_hi[i], b.nat_source_lo[i] = first_hi, first_lo
        b.nat_target_hi[i], b.nat_target_lo[i] = source_hi, source_lo
        b.nat_ports[i] = target << 16 | source
    else:
        b.source_hi[i], b.source_lo[i] = b.target_hi[i], b.target_lo[i]
        b.target_hi[i], b.target_lo[i] = source_hi, source_lo
        b.source_port[i], b.target_port[i] = target, source
    b.way[i] = 1 - b.way[i]
    b.ingress[i], b.adjacency[i] = ingress, back


@inline
def _install_both(b, t, f, i, seed):
    """Give packet i's direction an entry and, where the handshake is over, the answers' too."""
    _install(b, t, f, i, seed)
    back = _way_back(b, t, f, i)
    if back < 0:
        return
    ingress, adjacency = b.ingress[i], b.adjacency[i]
    _turn(b, t, i, back)
    _install(b, t, f, i, seed)
    _turn(b, t, i, adjacency)
    b.ingress[i] = ingress


@kernel
def install(b, t, f):
    """Give every direction that is worth it an entry. f: Flows. Runs when the vector is decided."""
    if b.flow_generation[0] == 0:
        return
    seed = np.uint64(f.steering[0].flow_seed)
    for i in range(b.count[0]):
        if b.flags[i] & FLAG_WORTH and _is_worth(b, t, f, i):
            _install_both(b, t, f, i, seed)


@kernel
def renew(f):
    """Make every entry stale. f: Flows."""
    at = f.steering.address + FLOW_GENERATION
    if load32(at):
        add32(at, 1)
