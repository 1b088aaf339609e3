"""What `connect` is about to look up, asked for from memory before it looks.

Rule: nothing is decided here; what was guessed wrong costs a line of the cache.

Theory. The first packet of a connection meets a dozen cache lines that nobody has touched lately:
frontends, routes and identities of both ends, policy entries, the bucket of the reply. One packet
after the other that is a dozen waits; asked for a vector at a time, the waits overlap, as in
`track`. CHUNK packets at a time, since more would push each other out of the first cache. Each
pass over them needs what the pass before has asked for: where addresses and frontends stand; the
entries of both ends' policies, or a service's choice; then, if there is one, where its backend
stands, and the policies about that. Session affinity is not followed, nor is a new source address
or port.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.batch import FLAG_ICMP_ERROR, FLAG_OUTSIDE, KIND_IP4
from dataplane.kernels.connections import MASK, bucket_of
from dataplane.kernels.house import inline, load32, prefetch
from dataplane.kernels.parse import mix, tuple_word
from dataplane.kernels.policy import egress_ahead, ingress_ahead
from dataplane.kernels.route import FIB6_MASK, IPCACHE6_MASK, lookup, peer_of, slot6
from dataplane.kernels.service import FRONTEND, choice_at, find_frontend, slot_of
from xdp.abi import DTYPE, value

ADJACENCY_POD = value("ADJACENCY_POD")
BACKEND, FIB6 = DTYPE["backend"].itemsize, DTYPE["fib6_entry"].itemsize
CHUNK = 32  # packets
HOST_DEPTH = 129  # of struct fib6_entry: a whole address
BLOCK = np.uint64(8)  # an entry of a wide table has 256 addresses
ZERO = np.uint64(0)


@inline
def ask_place(t, kind, hi, lo):
    """Ask for where the route and the identity of an address stand."""
    if kind == KIND_IP4:
        at = np.int64(lo >> BLOCK) * 4
        prefetch(t.fib4_wide.address + at)
        prefetch(t.ipcache4_wide.address + at)
    else:
        prefetch(t.fib6.address + slot6(hi, lo, HOST_DEPTH, FIB6_MASK) * FIB6)
        prefetch(t.ipcache6.address + slot6(hi, lo, HOST_DEPTH, IPCACHE6_MASK) * FIB6)


@inline
def ask_policies(t, kind, source_hi, source_lo, target_hi, target_lo, protocol, port):
    """Ask for the entries that the policies of both ends may have about a connection."""
    sender = t.adjacencies[lookup(t, kind, source_hi, source_lo)]
    receiver = t.adjacencies[lookup(t, kind, target_hi, target_lo)]
    if sender.kind == ADJACENCY_POD:
        groups = t.peers[peer_of(t, kind, target_hi, target_lo)].groups
        egress_ahead(t, np.int64(t.subjects[sender.port].policy), groups, protocol, port)
    if receiver.kind == ADJACENCY_POD:
        groups = t.peers[peer_of(t, kind, source_hi, source_lo)].groups
        ingress_ahead(t, np.int64(t.subjects[receiver.port].policy), groups, protocol, port)


@inline
def _has_service(b, i):
    protocol = b.protocol[i]
    return protocol == wire.TCP or protocol == wire.UDP or protocol == wire.SCTP


@inline
def _ask_bucket(b, t, k, i, hi, lo, port):
    """Ask for the bucket of the reply from (hi, lo, port), if the source stays what it is."""
    word = tuple_word(port, b.source_port[i], b.protocol[i], b.kind[i])
    hashed = mix(hi, lo, b.source_hi[i], b.source_lo[i], word)
    prefetch(bucket_of(t.connection_index.address, k.words[MASK], hashed))


@inline
def _ask_places(b, t, k, first, end):
    frontends = t.frontends.address
    for n in range(first, end):
        i = b.todo[n]
        hi, lo, port = b.target_hi[i], b.target_lo[i], b.target_port[i]
        ask_place(t, b.kind[i], b.source_hi[i], b.source_lo[i])
        ask_place(t, b.kind[i], hi, lo)
        if _has_service(b, i):
            prefetch(frontends + slot_of(hi, lo, port, b.protocol[i]) * FRONTEND)
        prefetch(frontends + slot_of(hi, lo, 0, 0) * FRONTEND)
        _ask_bucket(b, t, k, i, hi, lo, port)


@inline
def _ask_choices(b, t, first, end):
    """Where there is no service, the policies' entries; return how many have a service."""
    served = 0
    for n in range(first, end):
        i = b.todo[n]
        b.ahead[i] = 0
        hi, lo, port, protocol = b.target_hi[i], b.target_lo[i], b.target_port[i], b.protocol[i]
        service = np.int64(0)
        if _has_service(b, i):
            service = find_frontend(t.frontends.address, hi, lo, port, protocol)
        if service:
            outside = (b.flags[i] & FLAG_OUTSIDE) != 0
            b.ahead[i] = choice_at(t, service, outside, b.hashes[i])
            prefetch(b.ahead[i])
            served += 1
        elif not b.flags[i] & FLAG_ICMP_ERROR:
            ask_policies(
                t, b.kind[i], b.source_hi[i], b.source_lo[i], hi, lo, protocol, port
            )  # fmt: skip
    return served


@inline
def _ask_backends(b, t, k, first, end):
    for n in range(first, end):
        i = b.todo[n]
        if b.ahead[i]:
            b.ahead[i] = load32(b.ahead[i])
            prefetch(t.backends.address + b.ahead[i] * BACKEND)
    for n in range(first, end):
        i = b.todo[n]
        if b.ahead[i]:
            row = t.backends[b.ahead[i]]
            ask_place(t, b.kind[i], row.hi, row.lo)
            _ask_bucket(b, t, k, i, row.hi, row.lo, np.int64(row.port))
    for n in range(first, end):
        i = b.todo[n]
        if b.ahead[i]:
            row = t.backends[b.ahead[i]]
            ask_policies(
                t, b.kind[i], b.source_hi[i], b.source_lo[i], row.hi, row.lo, b.protocol[i],
                np.int64(row.port),
            )  # fmt: skip


@inline
def ask_all(b, t, k, first, end):
    """Ask for what a part of the list `todo` will need, CHUNK packets at most. k: Tracker."""
    _ask_places(b, t, k, first, end)
    if _ask_choices(b, t, first, end):
        _ask_backends(b, t, k, first, end)
