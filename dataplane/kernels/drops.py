"""Events about single packets: drops, gathered, and samples.

Rule: each dropped packet is in exactly one event, and the first of its kind is told at once.

Theory. Drops come in floods. What is dropped again, the same packet for the same reason, is counted
in `pending`, direct-mapped by the flow's hash, and told once a second, when another flow wants its
place, or when the worker has nothing to do. So one pod that knocks at a closed door cannot push
everything else out of the ring, and the counts stay exact. Identities that the stages have not
asked for are looked up here, for the few that are told. A sample is one packet of 2**n that the
worker has seen; it costs a vector, not a packet.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.batch import (
    FLAG_LATER_FRAGMENT,
    FLAG_NOTED,
    FLAG_SERVED,
    KIND_IP4,
    KIND_IP6,
)
from dataplane.kernels.events import (
    COUNTS,
    EGRESS,
    EVENT,
    EVENT_FLAGS,
    FAMILY,
    INGRESS,
    PORTS,
    REPLY,
    SERVICE,
    SIZE,
    SOURCE,
    SOURCE_IDENTITY,
    TARGET,
    TARGET_IDENTITY,
    TCP,
    TIME,
    announce,
    place,
)
from dataplane.kernels.house import (
    copy32,
    inline,
    load8,
    load16be,
    load32,
    load64,
    outline,
    store8,
    store32,
    store64,
)
from dataplane.kernels.route import peer_of
from xdp.abi import value

DROP, SAMPLE = value("EVENT_DROP"), value("EVENT_SAMPLE")
SECOND = 1_000_000_000
PENDING = 1024  # flows whose drops are gathered
FLUSHED, SKIPPED = 0, 1  # words of Counters.watch: when `pending` was looked through; packets
WATCH_WORDS = 2


@inline
def _is_ip(b, i):
    return b.kind[i] == KIND_IP4 or b.kind[i] == KIND_IP6


@inline
def _ports_of(b, i):
    """Ports of a packet as a record has them; ICMP: its type and code in the place of the target's.

    With FLAG_SERVED the target's is the backend's.
    """
    source, target = b.source_port[i], b.target_port[i]
    if b.flags[i] & FLAG_SERVED:
        target = b.nat_ports[i] & 0xFFFF
    if b.protocol[i] == wire.ICMP or b.protocol[i] == wire.ICMP6:
        target = 0 if b.flags[i] & FLAG_LATER_FRAGMENT else load16be(b.address[i] + b.l4[i])
    return source | (target << 16) | (source << 32) | (b.ingress[i] << 48)


@inline
def _kinds_of(b, i, kind):
    """Family, protocol, kind and reason of a packet's event, as one word."""
    if not _is_ip(b, i):
        return (kind << 16) | (b.reason[i] << 24)
    return b.kind[i] | (b.protocol[i] << 8) | (kind << 16) | (b.reason[i] << 24)


@inline
def _identity(t, b, i, known, hi, lo):
    """Identity of an address of packet i, where the stages have not asked for it."""
    if known or not _is_ip(b, i):
        return known
    return np.int64(t.peers[peer_of(t, b.kind[i], hi, lo)].identity)


@inline
def _write(b, t, i, at, kind, tcp, flags):
    """Write packet i's event at a memory address."""
    target_hi, target_lo = b.target_hi[i], b.target_lo[i]
    if b.flags[i] & FLAG_SERVED:
        target_hi, target_lo = b.nat_target_hi[i], b.nat_target_lo[i]
    source_hi, source_lo = b.source_hi[i], b.source_lo[i]
    if not _is_ip(b, i):
        source_hi = source_lo = target_hi = target_lo = np.uint64(0)
    store64(at + SOURCE, np.int64(source_hi))
    store64(at + SOURCE + 8, np.int64(source_lo))
    store64(at + TARGET, np.int64(target_hi))
    store64(at + TARGET + 8, np.int64(target_lo))
    store64(at + TARGET + 16, np.int64(source_hi))
    store64(at + TARGET + 24, np.int64(source_lo))
    store64(at + TIME, b.now_ns[0])
    store64(at + COUNTS, 1)
    store64(at + COUNTS + 8, 0)
    store64(at + SIZE, b.total[i])
    store64(at + SIZE + 8, 0)
    store32(at + EGRESS, b.refusal[i])
    store32(at + INGRESS, 0)
    source = _identity(t, b, i, b.source_identity[i], source_hi, source_lo)
    target = _identity(t, b, i, b.target_identity[i], target_hi, target_lo)
    store32(at + SOURCE_IDENTITY, source)
    store32(at + TARGET_IDENTITY, target)
    store64(at + PORTS, _ports_of(b, i))
    store64(at + SERVICE, b.service[i] if b.flags[i] & FLAG_SERVED else 0)
    store32(at + FAMILY, _kinds_of(b, i, kind))
    store32(at + EVENT_FLAGS, flags | (tcp << 16))


@inline
def tcp_flags(b, i):
    """TCP flags of packet i, 0 when it has none."""
    if b.protocol[i] != wire.TCP or b.flags[i] & FLAG_LATER_FRAGMENT or not _is_ip(b, i):
        return np.int64(0)
    return load8(b.address[i] + b.l4[i] + wire.TCP_FLAGS)


@outline
def _tell(ring, pending):
    """Put a gathered drop into the ring; its counts begin again."""
    at = place(ring)
    for n in range(0, EVENT, 32):
        copy32(at + n, pending + n)
    announce(ring)
    store64(pending + COUNTS, 0)
    store64(pending + SIZE, 0)


@inline
def _same(b, i, pending):
    """Whether packet i was dropped as what is gathered here."""
    if load32(pending + FAMILY) != _kinds_of(b, i, DROP):
        return False
    if load64(pending + PORTS) != _ports_of(b, i) or load32(pending + EGRESS) != b.refusal[i]:
        return False
    if not _is_ip(b, i):
        return True
    target_hi, target_lo = b.target_hi[i], b.target_lo[i]
    if b.flags[i] & FLAG_SERVED:
        target_hi, target_lo = b.nat_target_hi[i], b.nat_target_lo[i]
    different = np.uint64(load64(pending + SOURCE)) ^ b.source_hi[i]
    different |= np.uint64(load64(pending + SOURCE + 8)) ^ b.source_lo[i]
    different |= np.uint64(load64(pending + TARGET)) ^ target_hi
    different |= np.uint64(load64(pending + TARGET + 8)) ^ target_lo
    return different == np.uint64(0)


@inline
def note_drop(b, t, c, i):
    """Tell that packet i is dropped, or count it to those of its kind. c: Counters."""
    b.flags[i] |= FLAG_NOTED
    row = np.int64(b.hash[i] >> np.uint64(32)) + b.reason[i]
    pending = c.pending.address + (row & (PENDING - 1)) * EVENT
    if _same(b, i, pending):
        store64(pending + COUNTS, load64(pending + COUNTS) + 1)
        store64(pending + SIZE, load64(pending + SIZE) + b.total[i])
        store64(pending + TIME, b.now_ns[0])
        store8(pending + TCP, load8(pending + TCP) | tcp_flags(b, i))
        return
    if load64(pending + COUNTS):
        _tell(c.ring.address, pending)
    _write(b, t, i, pending, DROP, tcp_flags(b, i), 0)
    _tell(c.ring.address, pending)


@outline
def _tell_all(ring, pending):
    """Tell what is gathered. ring, pending: memory addresses."""
    for number in range(PENDING):
        row = pending + number * EVENT
        if load64(row + COUNTS):
            _tell(ring, row)


@inline
def tell_drops(c):
    """Tell what is gathered. c: Counters."""
    _tell_all(c.ring.address, c.pending.address)


@inline
def flush_drops(c, now):
    """Tell what is gathered, once a second. c: Counters; now: ns."""
    if now - c.watch[FLUSHED] >= SECOND:
        c.watch[FLUSHED] = now
        tell_drops(c)


@inline
def sample(b, t, c):
    """Tell one packet of 2**sample_shift that the worker has seen; c: Counters."""
    shift = np.int64(t.node[0].sample_shift)
    if shift == 0 or b.count[0] == 0:
        return
    seen = c.watch[SKIPPED] + b.count[0]
    c.watch[SKIPPED] = seen & ((1 << shift) - 1)
    if seen >> shift:
        i = b.count[0] - 1 - c.watch[SKIPPED]
        i = i if i > 0 else np.int64(0)
        if _is_ip(b, i):
            ring = c.ring.address
            flags = REPLY if b.connection[i] >= 0 and b.way[i] else 0
            _write(b, t, i, place(ring), SAMPLE, tcp_flags(b, i), flags)
            announce(ring)
