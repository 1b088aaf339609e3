"""Headers into columns: Ethernet, ARP, IPv4, IPv6, and the ports of TCP, UDP, SCTP, ICMP.

Rule: after this stage every later kernel may read what the columns promise without a check; a
packet that lies about a length never gets that far.

Theory. All headers must lie within the first segment. Lengths that a header claims must fit in what
came; padding behind the IP packet is allowed (Ethernet pads to 60 bytes) and forgotten, but not in
a packet of several segments, which needs none. IPv4 header checksums are verified (RFC 1812 5.2.2).
Addresses that never leave a host or link are refused (RFC 1122 3.2.1.3, RFC 4291 2.5). Fragments
have ports only in the first one, and none in their hash, so that all take one way; a first TCP
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
UNKNOWN_TARGET = value("REASON_UNKNOWN_TARGET")
L3_CHECKSUM = value("REASON_L3_CHECKSUM")
UNSUPPORTED_L2 = value("REASON_UNSUPPORTED_L2")
UNSUPPORTED_L3 = value("REASON_UNSUPPORTED_L3")
VLAN = value("REASON_VLAN")

AHEAD = 8  # packets whose headers are fetched before their turn
MIX_A = np.uint64(0x9E3779B97F4A7C15)
MIX_B = np.uint64(0xC2B2AE3D27D4EB4F)
MIX_C = np.uint64(0xD6E8FEB86659FD93)
SHIFT = np.uint64(32)
TOP8 = np.uint64(56)
TOP10 = np.uint64(54)
MULTICAST = np.uint64(0xFF)  # ff00::/8
LINK_LOCAL = np.uint64(0x3FA)  # fe80::/10
ZERO = np.uint64(0)
NO_PORTS = np.uint64(0xFFFFFFFF)


@inline
def drop(b, i, reason):
    """End packet i with a drop reason."""
    b.verdict[i] = VERDICT_DROP
    b.reason[i] = reason


@inline
def mix(source_hi, source_lo, target_hi, target_lo, word):
    """Mix four address halves and a tuple's word into 64 bits: the hash of a flow."""
    h = (source_lo ^ (source_hi * MIX_B)) * MIX_A
    h ^= h >> SHIFT
    h = (h ^ target_lo ^ (target_hi * MIX_C)) * MIX_B
    h ^= h >> SHIFT
    h = (h ^ word) * MIX_C
    h = (h ^ (h >> SHIFT)) * MIX_A  # ports stand high in the word: bring them down
    return h ^ (h >> SHIFT)


@inline
def tuple_word(source_port, target_port, protocol, kind):
    """The part of a tuple beside its addresses, as struct connection keeps it."""
    return np.uint64((source_port << 48) | (target_port << 32) | (protocol << 8) | kind)


@inline
def flow_hash(b, i):
    """Hash of packet i by its columns, as parse computes it: without ports for a fragment."""
    word = tuple_word(b.source_port[i], b.target_port[i], b.protocol[i], b.kind[i])
    if b.flags[i] & FLAG_FRAGMENT:
        word &= NO_PORTS
    return mix(b.source_hi[i], b.source_lo[i], b.target_hi[i], b.target_lo[i], word)


@inline
def _settle(b, i, ports):
    """Store ports and flow hash; ports: source << 16 | target, negative: malformed, dropped."""
    if ports < 0:
        drop(b, i, INVALID_PACKET)
        return
    b.source_port[i] = ports >> 16
    b.target_port[i] = ports & 0xFFFF
    word = tuple_word(ports >> 16, ports & 0xFFFF, b.protocol[i], b.kind[i])
    b.word[i] = word
    if b.flags[i] & FLAG_FRAGMENT:
        word &= NO_PORTS
    b.hash[i] = mix(b.source_hi[i], b.source_lo[i], b.target_hi[i], b.target_lo[i], word)


@inline
def query_ports(protocol, at):
    """Ports word of the ICMP or ICMPv6 message at `at`, -1 when it has no identifier.

    The identifier of a query (echo, timestamp, information, mask: RFC 792, 950) is its source port
    and its reply's target port, so that a reply's tuple is the query's turned round.
    """
    kind = load8(at)
    if protocol == wire.ICMP:
        query = kind == wire.ICMP_ECHO or kind == 13 or kind == 15 or kind == 17
        reply = kind == wire.ICMP_ECHO_REPLY or kind == 14 or kind == 16 or kind == 18
    else:
        query = kind == wire.ICMP6_ECHO
        reply = kind == wire.ICMP6_ECHO_REPLY
    if query:
        return load16be(at + wire.ICMP_REST) << 16
    return load16be(at + wire.ICMP_REST) if reply else -1


@inline
def is_echo(b, i):
    """True for a whole echo request without options: one that can be answered in place."""
    if b.flags[i] & (FLAG_FRAGMENT | FLAG_OPTIONS):
        return False
    at = b.address[i] + b.l4[i]
    if b.kind[i] == KIND_IP4:
        return b.protocol[i] == wire.ICMP and load8(at) == wire.ICMP_ECHO
    return b.protocol[i] == wire.ICMP6 and load8(at) == wire.ICMP6_ECHO


@inline
def is_reply(b, i):
    """True for the reply to an ICMP or ICMPv6 query; its identifier is its target port."""
    if b.protocol[i] != wire.ICMP and b.protocol[i] != wire.ICMP6:
        return False
    if b.target_port[i] or b.flags[i] & FLAG_LATER_FRAGMENT:
        return b.target_port[i] != 0
    kind = load8(b.address[i] + b.l4[i])
    if b.protocol[i] == wire.ICMP6:
        return kind == wire.ICMP6_ECHO_REPLY
    return kind == wire.ICMP_ECHO_REPLY or kind == 14 or kind == 16 or kind == 18


@inline
def _icmp(b, i, at, protocol):
    """Ports word of ICMP or ICMPv6; flags errors."""
    kind = load8(at)
    if protocol == wire.ICMP:
        error = 3 <= kind <= 5 or kind == 11 or kind == 12
    else:
        error = kind < 128 or kind == 137
    if error:
        b.flags[i] |= FLAG_ICMP_ERROR
    ports = query_ports(protocol, at)
    return ports if ports > 0 else 0


@inline
def _ports(b, i, at, room, protocol, whole):
    """Ports word of the transport at `at`, -1 when it is malformed.

    room: bytes of it that came in the first segment. whole: bytes of it that the IP packet holds,
    or more in a fragment.
    """
    if protocol == wire.UDP:
        if room < wire.UDP_LENGTH:
            return -1
        size = load16be(at + wire.UDP_LENGTH_FIELD)
        return load32be(at) if wire.UDP_LENGTH <= size <= whole else -1
    if protocol == wire.TCP:
        if room < wire.TCP_LENGTH:
            return -1
        size = (load8(at + wire.TCP_OFFSET) >> 4) * 4
        return load32be(at) if wire.TCP_LENGTH <= size <= room else -1
    if protocol == wire.SCTP:
        return load32be(at) if room >= wire.SCTP_LENGTH else -1
    if protocol == wire.ICMP or protocol == wire.ICMP6:
        return _icmp(b, i, at, protocol) if room >= wire.ICMP_LENGTH else -1
    return 0


@inline
def _fills(b, i, end):
    """True when an IP packet that ends at `end` is all there, with no more than padding behind."""
    if b.total[i] > b.length[i]:
        return end == b.total[i]
    return end <= b.total[i]


@inline
def _ip4(b, i, at, reach):
    """IPv4 header at `at`; reach: bytes from there that headers may use."""
    if reach < wire.IP4_LENGTH:
        drop(b, i, INVALID_PACKET)
        return
    first = load8(at)
    header = (first & 15) * 4
    total = load16be(at + wire.IP4_TOTAL)
    if first >> 4 != 4 or header < wire.IP4_LENGTH or header > total or header > reach:
        drop(b, i, INVALID_PACKET)
        return
    if not _fills(b, i, wire.ETHER_LENGTH + total):
        drop(b, i, INVALID_PACKET)
        return
    source = load32be(at + wire.IP4_SOURCE)
    target = load32be(at + wire.IP4_TARGET)
    check = load32be(at) + load32be(at + 4) + load32be(at + 8) + source + target
    flags = b.flags[i]
    if header > wire.IP4_LENGTH:
        flags |= FLAG_OPTIONS
        check += sum16(at + wire.IP4_LENGTH, header - wire.IP4_LENGTH)
    if fold16(check) != 0xFFFF:
        drop(b, i, L3_CHECKSUM)
        return
    protocol = load8(at + wire.IP4_PROTOCOL)
    b.kind[i] = KIND_IP4
    b.ip_length[i] = total
    b.tos[i] = load8(at + wire.IP4_TOS)
    b.ttl[i] = load8(at + wire.IP4_TTL)
    b.protocol[i] = protocol
    b.source_hi[i] = ZERO
    b.source_lo[i] = np.uint64(source)
    b.target_hi[i] = ZERO
    b.target_lo[i] = np.uint64(target)
    b.l4[i] = wire.ETHER_LENGTH + header
    if source >> 28 >= 14 or source >> 24 == 127 or source >> 24 == 0:
        drop(b, i, INVALID_SOURCE)
        return
    if target >> 24 == 127 or target >> 24 == 0:
        drop(b, i, UNKNOWN_TARGET)
        return
    if target >> 28 >= 14:
        flags |= FLAG_MULTICAST
    word = load16be(at + wire.IP4_FRAGMENT)
    if word & wire.IP4_DF:
        flags |= FLAG_DF
    room = total - header
    whole = room
    offset = 0
    if word & (wire.IP4_MF | wire.IP4_OFFSET):
        flags |= FLAG_FRAGMENT
        whole = 65535
        offset = (word & wire.IP4_OFFSET) * 8
        b.fragment[i] = load16be(at + wire.IP4_ID)
        if offset:
            flags |= FLAG_LATER_FRAGMENT
        if offset + room > 65535 or (offset == 8 and protocol == wire.TCP):
            drop(b, i, INVALID_PACKET)
            return
    b.flags[i] = flags
    if room > reach - header:
        room = reach - header
    _settle(b, i, 0 if offset else _ports(b, i, at + header, room, protocol, whole))


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
            b.fragment[i] = load32be(at + 4)
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
def _stays_inside(hi, lo):
    """True for ::, ::1 and ::ffff:0:0/96, which are never on the wire (RFC 4291 2.5, RFC 4942)."""
    return hi == ZERO and (lo <= np.uint64(1) or lo >> SHIFT == np.uint64(0xFFFF))


@inline
def _ip6(b, i, at, reach):
    """IPv6 header at `at`; reach: bytes from there that headers may use."""
    if reach < wire.IP6_LENGTH:
        drop(b, i, INVALID_PACKET)
        return
    word = load32be(at)
    total = load16be(at + wire.IP6_PAYLOAD) + wire.IP6_LENGTH
    if word >> 28 != 6 or not _fills(b, i, wire.ETHER_LENGTH + total):
        drop(b, i, INVALID_PACKET)
        return
    source_hi = load64be(at + wire.IP6_SOURCE)
    source_lo = load64be(at + wire.IP6_SOURCE + 8)
    target_hi = load64be(at + wire.IP6_TARGET)
    target_lo = load64be(at + wire.IP6_TARGET + 8)
    b.kind[i] = KIND_IP6
    b.ip_length[i] = total
    b.tos[i] = (word >> 20) & 0xFF
    b.ttl[i] = load8(at + wire.IP6_HOPS)
    b.source_hi[i] = source_hi
    b.source_lo[i] = source_lo
    b.target_hi[i] = target_hi
    b.target_lo[i] = target_lo
    unspecified = source_hi == ZERO and source_lo == ZERO  # duplicate address detection
    if source_hi >> TOP8 == MULTICAST or (_stays_inside(source_hi, source_lo) and not unspecified):
        drop(b, i, INVALID_SOURCE)
        return
    if _stays_inside(target_hi, target_lo) or target_hi >> TOP10 == LINK_LOCAL:
        drop(b, i, UNKNOWN_TARGET)
        return
    b.flags[i] |= FLAG_DF
    if target_hi >> TOP8 == MULTICAST:
        b.flags[i] |= FLAG_MULTICAST
    if reach > total:
        reach = total
    protocol = load8(at + wire.IP6_NEXT)
    offset = _extensions(b, i, at + wire.IP6_LENGTH, at + reach, protocol)
    if offset < 0:
        return
    header = b.l4[i] - wire.ETHER_LENGTH
    whole = 65535 if b.flags[i] & FLAG_FRAGMENT else total - header
    l4 = at + header
    _settle(b, i, 0 if offset else _ports(b, i, l4, reach - header, b.protocol[i], whole))


@inline
def _arp(b, i, at, reach):
    """ARP packet at `at`: IPv4 over Ethernet, or invalid."""
    if reach >= wire.ARP_LENGTH and load32be(at) == 0x00010800 and load16be(at + 4) == 0x0604:
        b.kind[i] = KIND_ARP
    else:
        drop(b, i, INVALID_PACKET)


@inline
def parse_one(b, i):
    """Fill the columns of packet i from its Ethernet header on (again, after decapsulation)."""
    at = b.address[i]
    b.source_port[i] = 0
    b.target_port[i] = 0
    b.protocol[i] = 0
    b.word[i] = ZERO
    b.hash[i] = ZERO
    b.l3[i] = wire.ETHER_LENGTH
    reach = b.length[i] - wire.ETHER_LENGTH
    if reach < 0:
        drop(b, i, INVALID_PACKET)
        return
    if load8(at) & 1:
        b.flags[i] |= FLAG_L2_MULTICAST
    kind = load16be(at + wire.ETHER_TYPE)
    if kind == wire.TYPE_IP4:
        _ip4(b, i, at + wire.ETHER_LENGTH, reach)
    elif kind == wire.TYPE_IP6:
        _ip6(b, i, at + wire.ETHER_LENGTH, reach)
    elif kind == wire.TYPE_ARP:
        _arp(b, i, at + wire.ETHER_LENGTH, reach)
    elif kind == wire.TYPE_VLAN or kind == wire.TYPE_QINQ:
        drop(b, i, VLAN)
    elif kind < wire.TYPE_LEAST:
        drop(b, i, UNSUPPORTED_L2)
    else:
        drop(b, i, UNSUPPORTED_L3)


@kernel
def parse(b):
    """Parse every pending packet of the vector. About 12 ns a packet for UDP."""
    count = b.count[0]
    for i in range(count):
        if i + AHEAD < count:
            prefetch(b.address[i + AHEAD])
        if b.verdict[i] == VERDICT_PENDING:
            parse_one(b, i)
