"""What an entry of the flow table says, and what it is found by.

Rule: all of an entry but its counters is written here, between two increments of its `sequence`, in
the order of bytes in which XDP compares and copies it.

Theory. A packet's columns say what it was and what the stages made of it; an entry is the
difference: new addresses and ports, and the sums by which checksums change (RFC 1624 eqn. 3). What
stands in front of the packet on its way out is a copy of its adjacency's template, a `hop`, shared
by all entries that leave that way. The hash is flow_hash of xdp/bpf/flows.h.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.batch import FLAG_DECAPSULATED, FLAG_NAT, KIND_IP4
from dataplane.kernels.connections import offset_of
from dataplane.kernels.forward import vni_of
from dataplane.kernels.house import (
    copy32,
    fence,
    fold16,
    inline,
    load32,
    store16be,
    store32,
    store32_release,
    store32be,
    store64,
    store64be,
)
from dataplane.kernels.route import lookup
from dataplane.kernels.translate import address_sum
from xdp.abi import CONST, DTYPE, value

ENTRY, HOP = DTYPE["flow_entry"].itemsize, DTYPE["hop"].itemsize
HEADER_MAX = CONST["HEADER_MAX"]
NAT_BITS = CONST["FLOW_NAT_SOURCE"] | CONST["FLOW_NAT_TARGET"]
KEEP_HOPS, FLOW_DNS = CONST["FLOW_KEEP_HOPS"], CONST["FLOW_DNS"]
DNS = CONST["CONNECTION_FLAG_DNS"]
ADJACENCY_HOST = value("ADJACENCY_HOST")
ONES16 = 0xFFFF

MIX_A = np.uint64(0x9E3779B97F4A7C15)
MIX_B = np.uint64(0xC2B2AE3D27D4EB4F)
MIX_C = np.uint64(0xD6E8FEB86659FD93)
SHIFT = np.uint64(32)
OUTER_MASK = np.uint64(wire.TUNNEL_PORTS_MASK)


def _at(field: str) -> int:
    return offset_of("flow_entry", field)


TARGET, PORTS, PROTOCOL = _at("target"), _at("source_port_be"), _at("protocol")
IFINDEX, SEQUENCE, GENERATION, FLAGS = map(_at, ("ifindex", "sequence", "generation", "flags"))
L3_DELTA, L4_DELTA, HOP_ROW, TUNNEL = map(_at, ("l3_delta", "l4_delta", "hop", "tunnel"))
NEW_SOURCE, NEW_TARGET, NEW_PORTS = map(_at, ("new_source", "new_target", "new_source_port_be"))
LAST_NS = _at("last_ns")
HOP_REMOTE = offset_of("hop", "remote")


@inline
def _wire_words(kind, hi, lo):
    """An address as the two native words that XDP loads: IPv4 in the first four bytes."""
    if kind == KIND_IP4:
        low = np.int64(lo)
        swapped = (low & 0xFF) << 24 | (low & 0xFF00) << 8 | (low >> 8) & 0xFF00 | low >> 24
        return np.uint64(swapped), np.uint64(0)
    return _swap64(hi), _swap64(lo)


@inline
def _swap64(word):
    word = ((word & np.uint64(0x00FF00FF00FF00FF)) << np.uint64(8)) | (
        (word >> np.uint64(8)) & np.uint64(0x00FF00FF00FF00FF)
    )
    word = ((word & np.uint64(0x0000FFFF0000FFFF)) << np.uint64(16)) | (
        (word >> np.uint64(16)) & np.uint64(0x0000FFFF0000FFFF)
    )
    return (word << SHIFT) | (word >> SHIFT)


@inline
def _swap16(number):
    return (number & 0xFF) << 8 | (number >> 8) & 0xFF


@inline
def hash_of(b, i, ifindex, seed):
    """Hash of packet i's flow, as flow_hash of flows.h computes it."""
    kind = b.kind[i]
    source0, source1 = _wire_words(kind, b.source_hi[i], b.source_lo[i])
    hi, lo = received_target(b, i)
    target0, target1 = _wire_words(kind, hi, lo)
    source, target = b.source_port[i], b.target_port[i]
    ports = _swap16(source) | _swap16(target) << 16
    rest = np.uint64(ports | b.protocol[i] << 32 | kind << 40)
    h = (source0 ^ seed ^ (source1 * MIX_B)) * MIX_A
    h ^= h >> SHIFT
    h = (h ^ target0 ^ (target1 * MIX_C)) * MIX_B
    h ^= h >> SHIFT
    h = (h ^ rest ^ (np.uint64(ifindex) << np.uint64(40))) * MIX_C
    h = (h ^ (h >> SHIFT)) * MIX_A
    return h ^ (h >> SHIFT)


@inline
def received_target(b, i):
    """The target that packet i came with, as host order halves."""
    if b.flags[i] & FLAG_NAT:
        return b.first_target_hi[i], b.first_target_lo[i]
    return b.target_hi[i], b.target_lo[i]


@inline
def mirror(t, f, row):
    """Copy an adjacency to the hops of XDP; the same content may be written again."""
    a = t.adjacencies[row]
    at = f.hops.address + row * HOP
    template = t.rewrites.address + row * HEADER_MAX
    for n in range(0, HEADER_MAX, 32):
        copy32(at + n, template + n)
    if a.tunnel_family == 4:
        store64(at + HOP_REMOTE, 0)
        store64(at + HOP_REMOTE + 8, 0)
        store32be(at + HOP_REMOTE, np.int64(a.remote_lo))
    else:
        store64be(at + HOP_REMOTE, a.remote_hi)
        store64be(at + HOP_REMOTE + 8, a.remote_lo)
    f.hops[row].mtu = a.mtu
    f.hops[row].header_length = a.header_length
    f.hops[row].outer_sum = a.outer_sum
    f.hops[row].port = a.port
    f.hops[row].tunnel_family = a.tunnel_family
    f.hops[row].kind = a.kind


@inline
def fill(b, t, f, i, at, ifindex):
    """Write everything but tag and counters of an entry, between two increments of its sequence."""
    kind = b.kind[i]
    sequence = load32(at + SEQUENCE) | 1
    store32_release(at + SEQUENCE, sequence)
    fence()
    source0, source1 = _wire_words(kind, b.source_hi[i], b.source_lo[i])
    hi, lo = received_target(b, i)
    target0, target1 = _wire_words(kind, hi, lo)
    store64(at, np.int64(source0))
    store64(at + 8, np.int64(source1))
    store64(at + TARGET, np.int64(target0))
    store64(at + TARGET + 8, np.int64(target1))
    ports = b.source_port[i] << 16 | b.target_port[i]
    store32be(at + PORTS, ports)
    store32(at + PROTOCOL, b.protocol[i] | kind << 8 | _swap16(_entropy(b, i)) << 16)
    store32(at + IFINDEX, ifindex)
    store32(at + GENERATION, b.flow_generation[0])
    flags = np.int64(0)
    if t.adjacencies[b.adjacency[i]].kind == ADJACENCY_HOST:
        flags |= KEEP_HOPS
    if t.connections[b.connection[i]].flags & DNS:
        flags |= FLOW_DNS
    l3 = l4 = np.int64(0)
    if b.flags[i] & FLAG_NAT:
        flags |= NAT_BITS
        l3, l4 = _translation(b, i, at, kind, ports)
    store32(at + FLAGS, flags)
    store16be(at + L3_DELTA, l3)
    store16be(at + L4_DELTA, l4)
    store32(at + HOP_ROW, b.adjacency[i])
    _fill_tunnel(b, t, f, i, at)
    fence()
    store32_release(at + SEQUENCE, sequence + 1)


@inline
def _entropy(b, i):
    return wire.TUNNEL_PORTS_BASE + np.int64(b.hash[i] & OUTER_MASK)


@inline
def _translation(b, i, at, kind, ports):
    """Store new addresses and ports; return the differences of the checksums, folded."""
    source0, source1 = _wire_words(kind, b.nat_source_hi[i], b.nat_source_lo[i])
    target0, target1 = _wire_words(kind, b.nat_target_hi[i], b.nat_target_lo[i])
    store64(at + NEW_SOURCE, np.int64(source0))
    store64(at + NEW_SOURCE + 8, np.int64(source1))
    store64(at + NEW_TARGET, np.int64(target0))
    store64(at + NEW_TARGET + 8, np.int64(target1))
    store32be(at + NEW_PORTS, b.nat_ports[i])
    old = address_sum(b.source_hi[i], b.source_lo[i])
    old += address_sum(b.first_target_hi[i], b.first_target_lo[i])  # FLAG_NAT is set
    new = address_sum(b.nat_source_hi[i], b.nat_source_lo[i])
    new += address_sum(b.nat_target_hi[i], b.nat_target_lo[i])
    addresses = _difference(old, new)
    return addresses, fold16(addresses + _difference(ports, b.nat_ports[i]))


@inline
def _difference(old, new):
    """One's complement sum of the complement of an old sum and a new one, folded."""
    old = fold16((old & 0xFFFFFFFF) + (old >> 32))
    new = fold16((new & 0xFFFFFFFF) + (new >> 32))
    return fold16((~old & ONES16) + new)


@inline
def _fill_tunnel(b, t, f, i, at):
    """Where a tunnel packet must come from, or the VNI of one that leaves."""
    if b.flags[i] & FLAG_DECAPSULATED:
        back = lookup(t, b.kind[i], b.source_hi[i], b.source_lo[i])
        mirror(t, f, back)
        store32(at + TUNNEL, back)
    else:
        store32be(at + TUNNEL, vni_of(b, t, i) << 8)
