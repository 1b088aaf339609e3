"""Headers into columns: Ethernet, ARP, IPv4, IPv6, and the ports of TCP, UDP, SCTP, ICMP.

Rule: after this stage every later kernel may read what the columns promise without a check; a
packet that lies about a length never gets that far.

Theory. All headers must lie within the first segment. Lengths that a header claims must fit in what
came; padding behind the IP packet is allowed (Ethernet pads to 60 bytes) and forgotten. IPv4 header
checksums are verified (RFC 1812 5.2.2). Fragments have ports only in the first one; a first TCP
fragment that does not hold the flags is an attack on filters (RFC 1858) and invalid. An IPv6 chain
may have EXTENSIONS_MAX headers; routing type 0 is refused (RFC 5095).
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.batch import (
    FLAG_DF,
    FLAG_FRAGMENT,
    FLAG_ICMP_ERROR,
    FLAG_L2_MULTICAST,
    FLAG_LATER_FRAGMENT,
    FLAG_MULTICAST,
    FLAG_OPTIONS,
    KIND_ARP,
    KIND_IP4,
    KIND_IP6,
    VERDICT_DROP,
    VERDICT_PENDING,
)
from dataplane.kernels.house import (
    fold16,
    inline,
    kernel,
    load8,
    load16be,
    load32be,
    load64be,
    prefetch,
    sum16,
)
from xdp.abi import value

INVALID_PACKET = value("REASON_INVALID_PACKET")
INVALID_SOURCE = value("REASON_INVALID_SOURCE_IP")
INVALID_EXTENSION = value("REASON_INVALID_EXTENSION")
L3_CHECKSUM = value("REASON_L3_CHECKSUM")
UNSUPPORTED_L2 = value("REASON_UNSUPPORTED_L2")
UNSUPPORTED_L3 = value("REASON_UNSUPPORTED_L3")
VLAN = value("REASON_VLAN")

AHEAD = 8  # packets whose headers are fetched before their turn
MIX_A = np.uint64(0x9E3779B97F4A7C15)
MIX_B = np.uint64(0xC2B2AE3D27D4EB4F)
MIX_C = np.uint64(0xD6E8FEB86659FD93)
SHIFT = np.uint64(32)
ZERO = np.uint64(0)


@inline
def drop(b, i, reason):
    """End packet i with a drop reason."""
    b.verdict[i] = VERDICT_DROP
    b.reason[i] = reason


@inline
def flow_hash(b, i):
    """Mix addresses, protocol and ports into 64 bits (multiply and xor-shift)."""
    h = (b.source_lo[i] ^ (b.source_hi[i] * MIX_B)) * MIX_A
    h ^= h >> SHIFT
    h = (h ^ b.target_lo[i] ^ (b.target_hi[i] * MIX_C)) * MIX_B
    h ^= h >> SHIFT
    ports = (b.source_port[i] << 32) | (b.target_port[i] << 8) | b.protocol[i]
    h = (h ^ np.uint64(ports)) * MIX_C
    return h ^ (h >> SHIFT)


@inline
def _ports(b, i, at, room, protocol):
    """Ports or the echo identifier of the transport at `at`; 0 and a drop when it is malformed."""
    if protocol == wire.TCP:
        size = (load8(at + wire.TCP_OFFSET) >> 4) * 4 if room >= wire.TCP_LENGTH else 0
        if size < wire.TCP_LENGTH or size > room:
            drop(b, i, INVALID_PACKET)
            return
    elif protocol == wire.UDP:
        size = load16be(at + wire.UDP_LENGTH_FIELD) if room >= wire.UDP_LENGTH else 0
        if size < wire.UDP_LENGTH or (size > room and not b.flags[i] & FLAG_FRAGMENT):
            drop(b, i, INVALID_PACKET)
            return
    elif protocol == wire.SCTP:
        if room < wire.SCTP_LENGTH:
            drop(b, i, INVALID_PACKET)
            return
    elif protocol == wire.ICMP or protocol == wire.ICMP6:
        if room < wire.ICMP_LENGTH:
            drop(b, i, INVALID_PACKET)
            return
        kind = load8(at)
        if protocol == wire.ICMP:
            if 3 <= kind <= 5 or kind == 11 or kind == 12:
                b.flags[i] |= FLAG_ICMP_ERROR
            echo = kind == wire.ICMP_ECHO or kind == wire.ICMP_ECHO_REPLY
        else:
            if kind < 128 or kind == 137:
                b.flags[i] |= FLAG_ICMP_ERROR
            echo = kind == wire.ICMP6_ECHO or kind == wire.ICMP6_ECHO_REPLY
        b.source_port[i] = load16be(at + wire.ICMP_REST) if echo else 0
        b.target_port[i] = 0
        return
    else:
        return
    b.source_port[i] = load16be(at)
    b.target_port[i] = load16be(at + 2)


@inline
def _reach(b, i):
    """Bytes of packet i that headers may use: its first segment."""
    return b.length[i] if b.length[i] < b.total[i] else b.total[i]


@inline
def _ip4(b, i):
    l3 = b.l3[i]
    at = b.address[i] + l3
    reach = _reach(b, i)
    if reach < l3 + wire.IP4_LENGTH:
        drop(b, i, INVALID_PACKET)
        return
    first = load8(at)
    header = (first & 15) * 4
    total = load16be(at + wire.IP4_TOTAL)
    if (
        first >> 4 != 4
        or header < wire.IP4_LENGTH
        or total < header
        or l3 + total > b.total[i]
        or l3 + header > reach
    ):
        drop(b, i, INVALID_PACKET)
        return
    if fold16(sum16(at, header)) != 0xFFFF:
        drop(b, i, L3_CHECKSUM)
        return
    b.kind[i] = KIND_IP4
    b.ip_length[i] = total
    b.tos[i] = load8(at + wire.IP4_TOS)
    b.ttl[i] = load8(at + wire.IP4_TTL)
    protocol = load8(at + wire.IP4_PROTOCOL)
    b.protocol[i] = protocol
    source = load32be(at + wire.IP4_SOURCE)
    target = load32be(at + wire.IP4_TARGET)
    b.source_hi[i] = ZERO
    b.source_lo[i] = np.uint64(source)
    b.target_hi[i] = ZERO
    b.target_lo[i] = np.uint64(target)
    b.l4[i] = l3 + header
    if source >> 28 >= 14 or source >> 24 == 127 or source >> 24 == 0:
        drop(b, i, INVALID_SOURCE)
        return
    flags = b.flags[i]
    if target >> 28 >= 14:
        flags |= FLAG_MULTICAST
    if header > wire.IP4_LENGTH:
        flags |= FLAG_OPTIONS
    word = load16be(at + wire.IP4_FRAGMENT)
    if word & wire.IP4_DF:
        flags |= FLAG_DF
    offset = (word & wire.IP4_OFFSET) * 8
    if word & (wire.IP4_MF | wire.IP4_OFFSET):
        flags |= FLAG_FRAGMENT
        if offset + total - header > 65535 or (offset == 8 and protocol == wire.TCP):
            drop(b, i, INVALID_PACKET)
            return
    b.flags[i] = flags
    if offset:
        b.flags[i] = flags | FLAG_LATER_FRAGMENT
        return
    room = total - header
    if room > reach - b.l4[i]:
        room = reach - b.l4[i] if protocol != wire.UDP else room
        if reach - b.l4[i] < wire.UDP_LENGTH:
            drop(b, i, INVALID_PACKET)
            return
    _ports(b, i, at + header, room, protocol)


@inline
def _extensions(b, i, at, end, protocol):
    """Walk the IPv6 extension headers from `at`; set l4, protocol and fragment flags.

    at, end: memory addresses. Returns the fragment offset in bytes, -1 after a drop.
    """
    offset = 0
    for _ in range(wire.EXTENSIONS_MAX + 1):
        plain = (
            protocol == wire.HOP_BY_HOP
            or protocol == wire.DESTINATION
            or protocol == wire.ROUTING
            or protocol == wire.MOBILITY
        )
        if not plain and protocol != wire.FRAGMENT and protocol != wire.AUTHENTICATION:
            b.protocol[i] = protocol
            b.l4[i] = at - b.address[i]
            return offset
        if at + 8 > end:
            break
        b.flags[i] |= FLAG_OPTIONS
        size = (load8(at + 1) + 1) * 8
        if protocol == wire.AUTHENTICATION:
            size = (load8(at + 1) + 2) * 4
        if protocol == wire.ROUTING and load8(at + 2) == 0:
            break
        if protocol == wire.FRAGMENT:
            size = 8
            word = load16be(at + 2)
            offset = word & 0xFFF8
            if word & 0xFFF9:
                b.flags[i] |= FLAG_FRAGMENT
            if offset:
                b.flags[i] |= FLAG_LATER_FRAGMENT
                b.protocol[i] = load8(at)
                b.l4[i] = at + size - b.address[i]
                return offset
        if at + size > end:
            break
        protocol = load8(at)
        at += size
    drop(b, i, INVALID_EXTENSION)
    return -1


@inline
def _ip6(b, i):
    l3 = b.l3[i]
    at = b.address[i] + l3
    reach = _reach(b, i)
    if reach < l3 + wire.IP6_LENGTH:
        drop(b, i, INVALID_PACKET)
        return
    word = load32be(at)
    total = load16be(at + wire.IP6_PAYLOAD) + wire.IP6_LENGTH
    if word >> 28 != 6 or l3 + total > b.total[i]:
        drop(b, i, INVALID_PACKET)
        return
    b.kind[i] = KIND_IP6
    b.ip_length[i] = total
    b.tos[i] = (word >> 20) & 0xFF
    b.ttl[i] = load8(at + wire.IP6_HOPS)
    source_hi = load64be(at + wire.IP6_SOURCE)
    source_lo = load64be(at + wire.IP6_SOURCE + 8)
    target_hi = load64be(at + wire.IP6_TARGET)
    b.source_hi[i] = source_hi
    b.source_lo[i] = source_lo
    b.target_hi[i] = target_hi
    b.target_lo[i] = load64be(at + wire.IP6_TARGET + 8)
    b.flags[i] |= FLAG_DF
    if target_hi >> np.uint64(56) == np.uint64(0xFF):
        b.flags[i] |= FLAG_MULTICAST
    mapped = source_hi == ZERO and source_lo >> SHIFT == np.uint64(0xFFFF)
    loopback = source_hi == ZERO and source_lo == np.uint64(1)
    if source_hi >> np.uint64(56) == np.uint64(0xFF) or mapped or loopback:
        drop(b, i, INVALID_SOURCE)
        return
    end = b.address[i] + (l3 + total if l3 + total < reach else reach)
    protocol = load8(at + wire.IP6_NEXT)
    offset = _extensions(b, i, at + wire.IP6_LENGTH, end, protocol)
    if offset != 0:
        return
    room = l3 + total - b.l4[i]
    if b.protocol[i] != wire.UDP and room > reach - b.l4[i]:
        room = reach - b.l4[i]
    if room > reach - b.l4[i] and reach - b.l4[i] < wire.UDP_LENGTH:
        drop(b, i, INVALID_PACKET)
        return
    _ports(b, i, b.address[i] + b.l4[i], room, b.protocol[i])


@inline
def parse_one(b, i):
    """Fill the columns of packet i from its Ethernet header on (again, after decapsulation)."""
    at = b.address[i]
    b.source_port[i] = 0
    b.target_port[i] = 0
    b.protocol[i] = 0
    b.hash[i] = ZERO
    b.l3[i] = wire.ETHER_LENGTH
    if _reach(b, i) < wire.ETHER_LENGTH:
        drop(b, i, INVALID_PACKET)
        return
    if load8(at) & 1:
        b.flags[i] |= FLAG_L2_MULTICAST
    kind = load16be(at + wire.ETHER_TYPE)
    if kind == wire.TYPE_IP4:
        _ip4(b, i)
        b.hash[i] = flow_hash(b, i)
    elif kind == wire.TYPE_IP6:
        _ip6(b, i)
        b.hash[i] = flow_hash(b, i)
    elif kind == wire.TYPE_ARP:
        arp = at + wire.ETHER_LENGTH
        whole = _reach(b, i) >= wire.ETHER_LENGTH + wire.ARP_LENGTH
        if whole and load32be(arp) == 0x00010800 and load16be(arp + 4) == 0x0604:
            b.kind[i] = KIND_ARP
        else:
            drop(b, i, INVALID_PACKET)
    elif kind == wire.TYPE_VLAN or kind == wire.TYPE_QINQ:
        drop(b, i, VLAN)
    elif kind < 1536:
        drop(b, i, UNSUPPORTED_L2)
    else:
        drop(b, i, UNSUPPORTED_L3)


@kernel
def parse(b):
    """Parse every pending packet of the vector. About 8 ns a packet for UDP."""
    count = b.count[0]
    for i in range(count):
        if i + AHEAD < count:
            prefetch(b.address[i + AHEAD])
        if b.verdict[i] == VERDICT_PENDING:
            parse_one(b, i)
