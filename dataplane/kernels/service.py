"""Services: from a virtual address to a backend.

Rule: only the first packet of a connection comes here; the choice is kept with the connection.

Theory. A frontend is (address, port, protocol); its service row names two parts of the backend
lists, one for clients inside the cluster and one for those outside, whose traffic policies differ.
A backend is taken by the flow's hash, from the list or from a Maglev table (Eisenbud et al., NSDI
2016), the same on every node because hash and table are. Session affinity keeps client and backend
together in a set-associative table: a set that is full forgets who was away longest. Kubernetes:
Service v1, sessionAffinity ClientIP; Cilium: bpf/lib/lb.h.
"""

import numpy as np

from dataplane.kernels.connections import since
from dataplane.kernels.house import inline, load32, load64, outline
from dataplane.kernels.parse import mix
from xdp.abi import CONST, DTYPE, value

SLOTS_MASK = CONST["FRONTEND_SLOTS"] - 1
PROBES_MAX = CONST["FRONTEND_PROBES_MAX"]
FRONTEND = DTYPE["frontend"].itemsize
WAYS = CONST["AFFINITY_WAYS"]
SETS_MASK = CONST["AFFINITY_SLOTS"] // WAYS - 1
TICK_SHIFT = CONST["TICK_SHIFT"]
SLOT_EMPTY, SLOT_USED = value("SLOT_EMPTY"), value("SLOT_USED")
BACKEND_EMPTY = value("BACKEND_EMPTY")

MIX_A = np.uint64(0x9E3779B97F4A7C15)
MIX_B = np.uint64(0xC2B2AE3D27D4EB4F)
MIX_C = np.uint64(0xD6E8FEB86659FD93)
SHIFT = np.uint64(32)
ZERO = np.uint64(0)
LOWER = np.uint64(0xFFFFFFFF)


@inline
def slot_of(hi, lo, port, protocol):
    """First slot of a frontend; the table's writer uses the same mix. hi, lo: uint64."""
    h = (hi * MIX_A) ^ (lo * MIX_B) ^ (np.uint64((port << 8) | protocol) * MIX_C)
    h ^= h >> SHIFT
    h *= MIX_A
    h ^= h >> np.uint64(29)
    return np.int64(h) & SLOTS_MASK


@outline
def find_frontend(frontends, hi, lo, port, protocol):
    """Row of the service behind (address, port, protocol), 0: none. frontends: memory address."""
    slot = slot_of(hi, lo, port, protocol)
    for n in range(PROBES_MAX):
        at = frontends + ((slot + n) & SLOTS_MASK) * FRONTEND
        third = load64(at + 16)
        state = (third >> 24) & 0xFF
        if state == SLOT_EMPTY:
            return np.int64(0)
        if (
            state == SLOT_USED
            and third & 0xFFFF == port
            and (third >> 16) & 0xFF == protocol
            and np.uint64(load64(at)) == hi
            and np.uint64(load64(at + 8)) == lo
        ):
            return (third >> 32) & 0xFFFFFFFF
    return np.int64(0)


@inline
def may_come(t, part, hi, lo):
    """Whether a client's address is in a service's source ranges; part: of source_ranges."""
    first, count = np.int64(part >> SHIFT), np.int64(part & np.uint64(0xFFFFFFFF))
    for n in range(first, first + count):
        row = t.source_ranges[n]
        if (hi & row.mask_hi) == row.hi and (lo & row.mask_lo) == row.lo:
            return True
    return False


@inline
def _word_of(t, part, table, hashed):
    """Memory address of the word that names the backend for a hash.

    part: of backend_lists, not empty; table: of maglev, or 0.
    """
    if table != ZERO:
        number = np.int64(table >> SHIFT) + np.int64(hashed % (table & LOWER))
        return t.maglev.address + number * 4
    number = np.int64(part >> SHIFT) + np.int64(hashed % (part & LOWER))
    return t.backend_lists.address + number * 4


@inline
def _pick(t, part, table, hashed):
    """Row of the backend for a hash."""
    return load32(_word_of(t, part, table, hashed))


@inline
def choice_at(t, service, outside, hashed):
    """Memory address of the word that names a new connection's backend; 0: it has no such word."""
    row = t.services[service]
    part = row.outside if outside else row.inside
    table = row.outside_table if outside else row.inside_table
    if part & LOWER == ZERO or row.affinity_s:
        return np.int64(0)
    return _word_of(t, part, table, hashed >> SHIFT)


@inline
def _serves(t, part, backend):
    """Whether a backend is in a service's list."""
    first, count = np.int64(part >> SHIFT), np.int64(part & np.uint64(0xFFFFFFFF))
    for n in range(first, first + count):
        if np.int64(t.backend_lists[n]) == backend:
            return True
    return False


@inline
def _affine(t, service, part, table, hi, lo, tick):
    """Row of the backend that a client of a service had last, or has from now on."""
    hashed = mix(hi, lo, ZERO, np.uint64(service), ZERO)
    first = (np.int64(hashed) & SETS_MASK) * WAYS
    oldest = first
    for at in range(first, first + WAYS):
        row = t.affinities[at]
        if row.service == service and row.client_hi == hi and row.client_lo == lo:
            idle_s = (since(tick, np.int64(row.last)) << TICK_SHIFT) // 1_000_000_000
            backend = np.int64(row.backend)
            if idle_s > np.int64(t.services[service].affinity_s) or not _serves(t, part, backend):
                backend = _pick(t, part, table, hashed >> SHIFT)
                t.affinities[at].backend = backend
            t.affinities[at].last = tick
            return backend
        away = since(tick, np.int64(row.last))
        longest = since(tick, np.int64(t.affinities[oldest].last))
        if row.service == 0 or (t.affinities[oldest].service != 0 and away > longest):
            oldest = at
    backend = _pick(t, part, table, hashed >> SHIFT)
    t.affinities[oldest].service = 0
    t.affinities[oldest].client_hi = hi
    t.affinities[oldest].client_lo = lo
    t.affinities[oldest].backend = backend
    t.affinities[oldest].last = tick
    t.affinities[oldest].service = service
    return backend


@inline
def choose(t, service, outside, hi, lo, hashed, tick):
    """Row of the backend for a new connection, 0: there is none.

    outside: the client is not in the cluster; hi, lo: its address; hashed: its flow hash.
    """
    row = t.services[service]
    part = row.outside if outside else row.inside
    table = row.outside_table if outside else row.inside_table
    if part & np.uint64(0xFFFFFFFF) == ZERO:
        return np.int64(0)
    if row.affinity_s:
        backend = _affine(t, service, part, table, hi, lo, tick)
    else:
        backend = _pick(t, part, table, hashed >> SHIFT)
    return np.int64(0) if t.backends[backend].state == BACKEND_EMPTY else backend
