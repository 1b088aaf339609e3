"""ICMP errors: about which connection, and in which direction.

Rule: an error passes only when the packet that it quotes belongs to a connection that may pass.

Theory. RFC 792 and RFC 4443 quote the packet as its sender of the error saw it: after translation.
An error travels against that packet, so the connection's direction is that of the quoted tuple
turned round. Eight bytes of transport header are always there (RFC 792), and hold the ports. Errors
need no rule of their own and keep nothing alive (RFC 5508 3.2); so nobody may quote what does not
exist, or send an error to another than the sender of what it quotes (`connect` sees to that).
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.batch import KIND_IP4
from dataplane.kernels.connections import CLAIMED, LINE, MASK, OWNER, find, same_tuple
from dataplane.kernels.house import inline, load8, load16be, load32_acquire, load32be, load64be
from dataplane.kernels.parse import mix, query_ports, tuple_word

CHAIN_MOST = 4  # extension headers of a quoted IPv6 packet
ZERO = np.uint64(0)


@inline
def quoted_room(b, i):
    """Bytes of the quoted packet that lie in the first segment."""
    end = b.l3[i] + b.ip_length[i]
    if end > b.length[i]:
        end = b.length[i]
    return end - b.l4[i] - wire.ICMP_LENGTH


@inline
def quoted_transport(kind, at, room):
    """Offset << 8 | protocol of the transport header of the packet quoted at `at`, -1: none.

    Its first eight bytes are there.
    """
    if kind == KIND_IP4:
        if room < wire.IP4_LENGTH or load8(at) >> 4 != 4:
            return -1
        header = (load8(at) & 15) * 4
        later = load16be(at + wire.IP4_FRAGMENT) & wire.IP4_OFFSET
        if header < wire.IP4_LENGTH or later or room < header + 8:
            return -1
        return header << 8 | load8(at + wire.IP4_PROTOCOL)
    if room < wire.IP6_LENGTH or load8(at) >> 4 != 6:
        return -1
    protocol = load8(at + wire.IP6_NEXT)
    header = wire.IP6_LENGTH
    for _ in range(CHAIN_MOST + 1):
        if room < header + 8:
            return -1
        plain = protocol == wire.HOP_BY_HOP or protocol == wire.DESTINATION
        if plain or protocol == wire.ROUTING or protocol == wire.MOBILITY:
            size = (load8(at + header + 1) + 1) * 8
        elif protocol == wire.FRAGMENT:
            if load16be(at + header + 2) & 0xFFF8:
                return -1
            size = 8
        else:
            return header << 8 | protocol
        protocol = load8(at + header)
        header += size
    return -1


@inline
def quoted_ports(protocol, at):
    """Source port << 16 | target port of the transport header at `at`, as parse has them."""
    if protocol == wire.TCP or protocol == wire.UDP or protocol == wire.SCTP:
        return load32be(at)
    if protocol == wire.ICMP or protocol == wire.ICMP6:
        ports = query_ports(protocol, at)
        return ports if ports > 0 else 0
    return 0


@inline
def _turned(kind, at, where):
    """Tuple of the packet quoted at `at`, turned round; where: as `quoted_transport` says."""
    protocol = where & 0xFF
    ports = quoted_ports(protocol, at + (where >> 8))
    word = tuple_word(ports & 0xFFFF, ports >> 16, protocol, kind)
    if kind == KIND_IP4:
        source_hi = target_hi = ZERO
        source_lo = np.uint64(load32be(at + wire.IP4_SOURCE))
        target_lo = np.uint64(load32be(at + wire.IP4_TARGET))
    else:
        source_hi = load64be(at + wire.IP6_SOURCE)
        source_lo = load64be(at + wire.IP6_SOURCE + 8)
        target_hi = load64be(at + wire.IP6_TARGET)
        target_lo = load64be(at + wire.IP6_TARGET + 8)
    return target_hi, target_lo, source_hi, source_lo, word


@inline
def find_related(b, t, k, i):
    """Record << 1 | way of the connection that the ICMP error i is about, -1: none."""
    kind = b.kind[i]
    at = b.address[i] + b.l4[i] + wire.ICMP_LENGTH
    where = quoted_transport(kind, at, quoted_room(b, i))
    if where < 0:
        return -1
    source_hi, source_lo, target_hi, target_lo, word = _turned(kind, at, where)
    return find(
        t.connection_index.address, t.connections.address, k.words[MASK],
        source_hi, source_lo, target_hi, target_lo, word,
        mix(source_hi, source_lo, target_hi, target_lo, word),
    )  # fmt: skip


@inline
def is_about(kind, at, where, record, way):
    """Whether the packet quoted at `at` is still that of a record's direction.

    A record that has been given back keeps its tuples for a while.
    """
    source_hi, source_lo, target_hi, target_lo, word = _turned(kind, at, where)
    same = same_tuple(record + way * LINE, source_hi, source_lo, target_hi, target_lo, word)
    return same and load32_acquire(record + OWNER) != CLAIMED
