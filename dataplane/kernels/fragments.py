"""Ports for fragments that carry none.

Rule: a later fragment goes the way of its datagram's first one, or waits for it, or is dropped.

Theory. Only the first fragment has ports, and policies and NAT need them (RFC 2663 calls virtual
reassembly what we do: nothing is put together). The first one leaves its ports in a small table
under (source, target, identification, and for IPv4 protocol: RFC 791 3.2, RFC 8200 4.5); later ones
take them from there, and the protocol, which IPv6 options may hide from them. One that comes
before the first is held: its frame stays with the engine until the first one arrives, at most
HOLD_NS, and HELD_MAX of them a worker. Fragments of one datagram have one hash (parse.py) and so
one worker.
"""

from typing import NamedTuple

import numpy as np

from dataplane.kernels.batch import (
    FLAG_DECAPSULATED,
    FLAG_FRAGMENT,
    FLAG_LATER_FRAGMENT,
    FLAG_OUTSIDE,
    KIND_IP4,
    KIND_IP6,
    VERDICT_HOLD,
    VERDICT_PENDING,
)
from dataplane.kernels.house import inline, kernel
from dataplane.kernels.parse import drop, mix, tuple_word
from dataplane.kernels.rows import Rows
from xdp.abi import value

SETS_MASK = np.uint64(255)
WAYS = 4
HELD_MAX = 64
HOLD_NS = 500_000_000
KEEP_NS = 30_000_000_000  # as long as a receiver waits for the rest (RFC 791 3.2, RFC 8200 4.5)

HELD = value("REASON_HELD")
NOT_FOUND = value("REASON_FRAGMENT_NOT_FOUND")

SLOT_FREE, SLOT_WAITING, SLOT_READY = 0, 1, 2

_DATAGRAM = (
    *((f"{end}_{half}", "u8") for end in ("source", "target") for half in ("hi", "lo")),
    ("identification", "i8"),
    ("kind", "i8"),
)
KNOWN = np.dtype(
    [
        *_DATAGRAM,
        ("ports", "i8"),
        ("seen_ns", "i8"),
    ]
)
"""A first fragment. kind: as `_kind`; ports: protocol << 32 | source << 16 | target."""

WAITING = np.dtype(
    [
        *_DATAGRAM,
        *((name, "i8") for name in ("since_ns", "state", "address", "frame", "length")),
        *((name, "i8") for name in ("ingress", "flags", "identity")),
    ]
)
"""A later fragment that came first, with what the engine needs to receive it again."""


class Fragments(NamedTuple):
    """A worker's own memory of fragments."""

    known: Rows  # KNOWN[256 * WAYS]
    waiting: Rows  # WAITING[HELD_MAX]
    waiting_count: Rows  # int64[1]: slots that are not free


def make_fragments() -> Fragments:
    """Return empty Fragments."""
    return Fragments(
        Rows(np.zeros((int(SETS_MASK) + 1) * WAYS, KNOWN)),
        Rows(np.zeros(HELD_MAX, WAITING)),
        Rows(np.zeros(1, np.int64)),
    )


@inline
def _kind(b, i):
    """What tells datagrams of one identification apart: the family, and for IPv4 the protocol."""
    return (b.protocol[i] << 8) | KIND_IP4 if b.kind[i] == KIND_IP4 else KIND_IP6


@inline
def _first_of(b, i):
    """First slot of the set of packet i's datagram."""
    word = np.uint64((b.fragment[i] << 16) | _kind(b, i))
    hashed = mix(b.source_hi[i], b.source_lo[i], b.target_hi[i], b.target_lo[i], word)
    return np.int64(hashed & SETS_MASK) * WAYS


@inline
def _is_of(b, i, row):
    """Whether packet i belongs to the datagram of a row."""
    return (
        row.source_lo == b.source_lo[i]
        and row.target_lo == b.target_lo[i]
        and row.source_hi == b.source_hi[i]
        and row.target_hi == b.target_hi[i]
        and row.identification == b.fragment[i]
        and row.kind == _kind(b, i)
    )


@inline
def _remember(b, f, i):
    """Keep the ports of a first fragment, and let those go that wait for it."""
    now = b.now_ns[0]
    first = _first_of(b, i)
    at = first
    for n in range(first, first + WAYS):
        if _is_of(b, i, f.known[n]):
            at = n
            break
        if f.known[n].seen_ns < f.known[at].seen_ns:
            at = n
    f.known[at].source_hi = b.source_hi[i]
    f.known[at].source_lo = b.source_lo[i]
    f.known[at].target_hi = b.target_hi[i]
    f.known[at].target_lo = b.target_lo[i]
    f.known[at].identification = b.fragment[i]
    f.known[at].kind = _kind(b, i)
    ports = (b.source_port[i] << 16) | b.target_port[i]
    f.known[at].ports = (b.protocol[i] << 32) | ports
    f.known[at].seen_ns = now
    if f.waiting_count[0]:
        for n in range(HELD_MAX):
            if f.waiting[n].state == SLOT_WAITING and _is_of(b, i, f.waiting[n]):
                f.waiting[n].state = SLOT_READY


@inline
def _ports_of(b, f, i):
    """Protocol and ports of packet i's datagram, -1: its first fragment has not been seen."""
    first = _first_of(b, i)
    for n in range(first, first + WAYS):
        if _is_of(b, i, f.known[n]) and b.now_ns[0] - f.known[n].seen_ns < KEEP_NS:
            return f.known[n].ports
    return np.int64(-1)


@inline
def _hold(b, f, i, counters):
    """Keep packet i until its first fragment comes, or drop it."""
    at = np.int64(-1)
    for n in range(HELD_MAX):
        if f.waiting[n].state == SLOT_FREE:
            at = n
            break
    if at < 0 or b.segments[i]:
        counters[0].fragments_lost += np.uint64(1)
        drop(b, i, NOT_FOUND)
        return
    f.waiting[at].source_hi = b.source_hi[i]
    f.waiting[at].source_lo = b.source_lo[i]
    f.waiting[at].target_hi = b.target_hi[i]
    f.waiting[at].target_lo = b.target_lo[i]
    f.waiting[at].identification = b.fragment[i]
    f.waiting[at].kind = _kind(b, i)
    f.waiting[at].since_ns = b.now_ns[0]
    f.waiting[at].address = b.address[i]
    f.waiting[at].frame = b.frame[i]
    f.waiting[at].length = b.length[i]
    f.waiting[at].ingress = b.ingress[i]
    f.waiting[at].flags = b.flags[i] & (FLAG_DECAPSULATED | FLAG_OUTSIDE)
    f.waiting[at].identity = b.identity[i]
    f.waiting[at].state = SLOT_WAITING
    f.waiting_count[0] += 1
    counters[0].fragments_held += np.uint64(1)
    b.verdict[i] = VERDICT_HOLD
    b.reason[i] = HELD


@kernel
def fragments(b, f, k):
    """Give later fragments the ports of their first. f: Fragments; k: Tracker, for its counters."""
    for i in range(b.count[0]):
        if b.verdict[i] != VERDICT_PENDING:
            if b.reason[i] == NOT_FOUND:  # `receive` has given it up
                k.counters[0].fragments_lost += np.uint64(1)
            continue
        if not b.flags[i] & FLAG_FRAGMENT:
            continue
        if b.kind[i] != KIND_IP4 and b.kind[i] != KIND_IP6:
            continue
        if not b.flags[i] & FLAG_LATER_FRAGMENT:
            _remember(b, f, i)
            continue
        ports = _ports_of(b, f, i)
        if ports < 0:
            _hold(b, f, i, k.counters)
            continue
        b.protocol[i] = ports >> 32
        b.source_port[i] = (ports >> 16) & 0xFFFF
        b.target_port[i] = ports & 0xFFFF
        b.word[i] = tuple_word(b.source_port[i], b.target_port[i], b.protocol[i], b.kind[i])
