"""What the node answers itself: ARP, neighbour solicitations, pings, ICMP errors, TCP resets.

Rule: an answer is written over the packet that asked for it; nothing is allocated or copied.

Theory. ARP and ND replies go back out of the port they came from, which is never an uplink. Echo
replies and ICMP errors are IP packets to the old source: they get the route of that address and
leave through `forward`, so they find their way into a tunnel too. Pings are answered for the
gateway and for the addresses of services. An echo request with IP options or extension headers is
left to the node's own stack, which knows what to do with them. An error quotes the packet from its
IP header on, as much as fits 576 bytes (RFC 1812 4.3.2.3) or 1280 (RFC 4443 3), and is written into
the headroom before it. All answers but ARP and ND draw on one token bucket a worker (RFC 1812
4.3.2.8, RFC 4443 2.4 f): without a token the packet is dropped as rate limited.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.admit import is_gateway_solicitation
from dataplane.kernels.batch import (
    FLAG_ANSWER,
    FLAG_DECAPSULATED,
    FLAG_DF,
    FLAG_ECHO,
    FLAG_LOCAL,
    FLAG_NOTED,
    FLAG_OUTSIDE,
    FLAG_RESET,
    KIND_ARP,
    KIND_IP4,
    KIND_IP6,
    VERDICT_PENDING,
    VERDICT_SEND,
)
from dataplane.kernels.drops import note_drop
from dataplane.kernels.house import (
    fold16,
    inline,
    kernel,
    load8,
    load16be,
    load32be,
    load64be,
    store8,
    store16be,
    store32be,
    store64be,
    sum16,
)
from dataplane.kernels.nat import node_source
from dataplane.kernels.parse import drop, flow_hash, is_echo
from dataplane.kernels.route import lookup
from dataplane.kernels.tables import BUCKET_DENIED, BUCKET_TIME, BUCKET_TOKENS
from xdp.abi import value

ADJACENCY_GATEWAY = value("ADJACENCY_GATEWAY")
ADJACENCY_NONE = value("ADJACENCY_NONE")
ADJACENCY_UNRESOLVED = value("ADJACENCY_UNRESOLVED")
ADJACENCY_BLACKHOLE = value("ADJACENCY_BLACKHOLE")
PORT_HOST = value("PORT_HOST")
ANSWERED_ARP = value("REASON_ANSWERED_ARP")
ANSWERED_ND = value("REASON_ANSWERED_ND")
ANSWERED_ECHO = value("REASON_ANSWERED_ECHO")
RATE_LIMITED = value("REASON_RATE_LIMITED")
UNKNOWN_TARGET = value("REASON_UNKNOWN_TARGET")
MULTICAST = value("REASON_MULTICAST")
INVALID_PACKET = value("REASON_INVALID_PACKET")

QUOTED4_MOST = 576 - wire.IP4_LENGTH - wire.ICMP_LENGTH
QUOTED6_MOST = 1280 - wire.IP6_LENGTH - wire.ICMP_LENGTH
TTL = 64
TOS_CONTROL = 0xC0  # RFC 1812 4.3.2.5: precedence of ICMP errors
NA_FLAGS = 0xE0000000  # router, solicited, override
NA_LENGTH = 32  # with the target link-layer address option
ZERO = np.uint64(0)


@inline
def _token(b, t):
    """Take a token from the worker's bucket; False when it is empty. Rate 0: there are none."""
    rate = np.int64(t.node[0].error_rate)
    most = np.int64(t.node[0].error_burst) * 1000
    passed = b.now_ns[0] - t.buckets[BUCKET_TIME]
    tokens = t.buckets[BUCKET_TOKENS]
    time = b.now_ns[0]
    if rate == 0:
        tokens = 0
    elif (
        passed < 0 or passed > most * 1_000_000 // rate
    ):  # time to fill it: the product is in range
        tokens = most
    else:
        tokens += passed * rate // 1_000_000
        time -= passed * rate % 1_000_000 // rate  # what was not enough for a unit counts next time
        tokens = tokens if tokens < most else most
    t.buckets[BUCKET_TIME] = time
    if tokens < 1000:
        t.buckets[BUCKET_TOKENS] = tokens
        t.buckets[BUCKET_DENIED] += 1
        return False
    t.buckets[BUCKET_TOKENS] = tokens - 1000
    return True


@inline
def _store_mac(at, t):
    node = t.node[0]
    for n in range(6):
        store8(at + n, np.int64(node.gateway_mac[n]))


@inline
def _turn_ether(b, t, i):
    """Send the frame back to where it came from, from the gateway's MAC."""
    at = b.address[i]
    store32be(at, load32be(at + wire.ETHER_SOURCE))
    store16be(at + 4, load16be(at + wire.ETHER_SOURCE + 4))
    _store_mac(at + wire.ETHER_SOURCE, t)


@inline
def _send_back(b, i, size, reason):
    b.total[i] = size
    b.length[i] = size
    b.egress[i] = b.ingress[i]
    b.verdict[i] = VERDICT_SEND
    b.reason[i] = reason


@inline
def _answer_arp(b, t, i):
    at = b.address[i] + b.l3[i]
    target = load32be(at + wire.ARP_TARGET_IP)
    ours = target == np.int64(t.node[0].router4) and target != 0
    ours = ours or t.ports[b.ingress[i]].kind == PORT_HOST
    sender = load32be(at + wire.ARP_SENDER_IP)
    if load16be(at + wire.ARP_OPERATION) != wire.ARP_REQUEST or not ours or sender == target:
        drop(b, i, UNKNOWN_TARGET)
        return
    _turn_ether(b, t, i)
    store16be(at + wire.ARP_OPERATION, wire.ARP_REPLY)
    for n in range(10):
        store8(at + wire.ARP_TARGET_MAC + n, load8(at + wire.ARP_SENDER_MAC + n))
    _store_mac(at + wire.ARP_SENDER_MAC, t)
    store32be(at + wire.ARP_SENDER_IP, target)
    _send_back(b, i, wire.ETHER_LENGTH + wire.ARP_LENGTH, ANSWERED_ARP)


@inline
def _pseudo6(at, length, protocol):
    """Pseudo header sum of the IPv6 packet at `at` (RFC 8200 8.1)."""
    return sum16(at + wire.IP6_SOURCE, 32) + length + protocol


@inline
def _answer_nd(b, t, i):
    at = b.address[i] + b.l3[i]
    icmp = b.address[i] + b.l4[i]
    size = b.l3[i] + b.ip_length[i] - b.l4[i]
    if b.source_hi[i] == ZERO and b.source_lo[i] == ZERO:
        drop(b, i, MULTICAST)  # somebody tests whether the address is taken; it is, by the router
        return
    whole = b.total[i] == b.length[i] and load8(icmp + wire.ICMP_CODE) == 0
    if not whole or fold16(_pseudo6(at, size, wire.ICMP6) + sum16(icmp, size)) != 0xFFFF:
        drop(b, i, INVALID_PACKET)
        return
    node = t.node[0]
    _turn_ether(b, t, i)
    store32be(at, 6 << 28)
    store16be(at + wire.IP6_PAYLOAD, NA_LENGTH)
    store8(at + wire.IP6_NEXT, wire.ICMP6)
    store8(at + wire.IP6_HOPS, wire.ND_HOPS)
    store64be(at + wire.IP6_SOURCE, node.router6_hi)
    store64be(at + wire.IP6_SOURCE + 8, node.router6_lo)
    store64be(at + wire.IP6_TARGET, b.source_hi[i])
    store64be(at + wire.IP6_TARGET + 8, b.source_lo[i])
    icmp = at + wire.IP6_LENGTH
    store32be(icmp, wire.ND_ADVERTISEMENT << 24)
    store32be(icmp + 4, NA_FLAGS)
    store64be(icmp + wire.ND_TARGET, node.router6_hi)
    store64be(icmp + wire.ND_TARGET + 8, node.router6_lo)
    store16be(icmp + wire.ND_OPTIONS, 0x0201)
    _store_mac(icmp + wire.ND_OPTIONS + 2, t)
    check = fold16(_pseudo6(at, NA_LENGTH, wire.ICMP6) + sum16(icmp, NA_LENGTH))
    store16be(icmp + wire.ICMP_CHECKSUM, ~check & 0xFFFF)
    _send_back(b, i, b.l3[i] + wire.IP6_LENGTH + NA_LENGTH, ANSWERED_ND)


@inline
def return_to_source(b, t, i, from_hi, from_lo):
    """Make packet i one from the given address of ours to its old source, ready for forward."""
    b.target_hi[i] = b.source_hi[i]
    b.target_lo[i] = b.source_lo[i]
    b.source_hi[i] = from_hi
    b.source_lo[i] = from_lo
    b.ttl[i] = TTL
    b.flags[i] = (b.flags[i] & (FLAG_DECAPSULATED | FLAG_DF | FLAG_NOTED)) | FLAG_LOCAL
    b.hash[i] = flow_hash(b, i)
    b.adjacency[i] = lookup(t, b.kind[i], b.target_hi[i], b.target_lo[i])
    kind = t.adjacencies[b.adjacency[i]].kind
    if kind == ADJACENCY_NONE or kind == ADJACENCY_UNRESOLVED or kind == ADJACENCY_BLACKHOLE:
        drop(b, i, b.reason[i] if b.reason[i] > 129 else UNKNOWN_TARGET)


@inline
def _answer_echo(b, t, i):
    if not _token(b, t):
        drop(b, i, RATE_LIMITED)
        return
    at = b.address[i] + b.l3[i]
    icmp = b.address[i] + b.l4[i]
    check = load16be(icmp + wire.ICMP_CHECKSUM)
    if b.kind[i] == KIND_IP4:
        # Type 8 -> 0: the checksum grows by what the sum loses. Addresses change places.
        store8(icmp, wire.ICMP_ECHO_REPLY)
        store16be(icmp + wire.ICMP_CHECKSUM, fold16(check + (wire.ICMP_ECHO << 8)))
        store32be(at + wire.IP4_SOURCE, np.int64(b.target_lo[i]))
        store32be(at + wire.IP4_TARGET, np.int64(b.source_lo[i]))
        store8(at + wire.IP4_TTL, TTL)
        store16be(at + wire.IP4_CHECKSUM, 0)
        header = b.l4[i] - b.l3[i]
        store16be(at + wire.IP4_CHECKSUM, ~fold16(sum16(at, header)) & 0xFFFF)
    else:
        store8(icmp, wire.ICMP6_ECHO_REPLY)
        store16be(icmp + wire.ICMP_CHECKSUM, fold16(check + 0xFEFF))  # 0x8000 -> 0x8100
        store64be(at + wire.IP6_SOURCE, b.target_hi[i])
        store64be(at + wire.IP6_SOURCE + 8, b.target_lo[i])
        store64be(at + wire.IP6_TARGET, b.source_hi[i])
        store64be(at + wire.IP6_TARGET + 8, b.source_lo[i])
        store8(at + wire.IP6_HOPS, TTL)
    b.reason[i] = ANSWERED_ECHO
    return_to_source(b, t, i, b.target_hi[i], b.target_lo[i])


@inline
def _quoted(b, i, most):
    """Bytes of packet i that an error quotes."""
    size = b.length[i] - b.l3[i]
    if size > b.ip_length[i]:
        size = b.ip_length[i]
    return size if size < most else most


@inline
def _error_source(b, t, i):
    """Address that an error about packet i comes from; 0: none.

    The router's that pods know; to who is outside, where nobody routes to that one, the node's.
    """
    four = b.kind[i] == KIND_IP4
    if b.flags[i] & FLAG_OUTSIDE:
        return node_source(t, four)
    if four:
        return ZERO, t.node[0].router4
    return t.node[0].router6_hi, t.node[0].router6_lo


@inline
def _error4(b, t, i):
    quoted = _quoted(b, i, QUOTED4_MOST)
    at = b.address[i] + b.l3[i] - wire.ICMP_LENGTH - wire.IP4_LENGTH
    total = wire.IP4_LENGTH + wire.ICMP_LENGTH + quoted
    icmp = at + wire.IP4_LENGTH
    store16be(icmp, (b.answer_type[i] << 8) | b.answer_code[i])
    store16be(icmp + wire.ICMP_CHECKSUM, 0)
    store32be(icmp + wire.ICMP_REST, b.answer_value[i] & 0xFFFF)
    check = fold16(sum16(icmp, wire.ICMP_LENGTH + quoted))
    store16be(icmp + wire.ICMP_CHECKSUM, ~check & 0xFFFF)
    _, own = _error_source(b, t, i)
    store16be(at, (0x45 << 8) | TOS_CONTROL)
    store16be(at + wire.IP4_TOTAL, total)
    store32be(at + wire.IP4_ID, wire.IP4_DF)  # atomic: its identification means nothing, RFC 6864
    store16be(at + wire.IP4_TTL, (TTL << 8) | wire.ICMP)
    store16be(at + wire.IP4_CHECKSUM, 0)
    store32be(at + wire.IP4_SOURCE, np.int64(own))
    store32be(at + wire.IP4_TARGET, np.int64(b.source_lo[i]))
    store16be(at + wire.IP4_CHECKSUM, ~fold16(sum16(at, wire.IP4_LENGTH)) & 0xFFFF)
    _settle_error(b, t, i, at, total, wire.ICMP, ZERO, own)


@inline
def _error6(b, t, i):
    quoted = _quoted(b, i, QUOTED6_MOST)
    at = b.address[i] + b.l3[i] - wire.ICMP_LENGTH - wire.IP6_LENGTH
    size = wire.ICMP_LENGTH + quoted
    icmp = at + wire.IP6_LENGTH
    own_hi, own_lo = _error_source(b, t, i)
    store32be(at, (6 << 28) | (TOS_CONTROL << 20))
    store16be(at + wire.IP6_PAYLOAD, size)
    store8(at + wire.IP6_NEXT, wire.ICMP6)
    store8(at + wire.IP6_HOPS, TTL)
    store64be(at + wire.IP6_SOURCE, own_hi)
    store64be(at + wire.IP6_SOURCE + 8, own_lo)
    store64be(at + wire.IP6_TARGET, b.source_hi[i])
    store64be(at + wire.IP6_TARGET + 8, b.source_lo[i])
    store16be(icmp, (b.answer_type[i] << 8) | b.answer_code[i])
    store16be(icmp + wire.ICMP_CHECKSUM, 0)
    store32be(icmp + wire.ICMP_REST, b.answer_value[i])
    check = fold16(_pseudo6(at, size, wire.ICMP6) + sum16(icmp, size))
    store16be(icmp + wire.ICMP_CHECKSUM, ~check & 0xFFFF)
    _settle_error(b, t, i, at, wire.IP6_LENGTH + size, wire.ICMP6, own_hi, own_lo)


@inline
def _settle_error(b, t, i, at, size, protocol, own_hi, own_lo):
    """Columns of the ICMP error, or reset, whose IP header stands at `at`."""
    b.address[i] = at - wire.ETHER_LENGTH
    b.l3[i] = wire.ETHER_LENGTH
    four = b.kind[i] == KIND_IP4
    b.l4[i] = wire.ETHER_LENGTH + (wire.IP4_LENGTH if four else wire.IP6_LENGTH)
    b.ip_length[i] = size
    b.total[i] = wire.ETHER_LENGTH + size
    b.length[i] = b.total[i]
    b.protocol[i] = protocol
    b.tos[i] = TOS_CONTROL
    b.source_port[i] = 0
    b.target_port[i] = 0
    return_to_source(b, t, i, own_hi, own_lo)


@inline
def _answer_reset(b, t, c, i):
    """A TCP reset from the packet's target (RFC 9293 3.5.2, 3.10.7.1), written over the packet."""
    if not _token(b, t):
        drop(b, i, RATE_LIMITED)
        return
    note_drop(b, t, c, i)
    four = b.kind[i] == KIND_IP4
    at, tcp = b.address[i] + b.l3[i], b.address[i] + b.l4[i]
    flags = load8(tcp + wire.TCP_FLAGS)
    data = b.l3[i] + b.ip_length[i] - b.l4[i] - (load8(tcp + wire.TCP_OFFSET) >> 4) * 4
    if flags & wire.TCP_ACK:
        sequence, acknowledged = load32be(tcp + wire.TCP_ACKNOWLEDGED), 0
        answer_flags = wire.TCP_RST
    else:
        data += (flags & wire.TCP_SYN) // wire.TCP_SYN + (flags & wire.TCP_FIN)
        sequence, acknowledged = 0, load32be(tcp + wire.TCP_SEQUENCE) + data
        answer_flags = wire.TCP_RST | wire.TCP_ACK
    ports = load32be(tcp)
    if four:
        from_hi, from_lo = ZERO, np.uint64(load32be(at + wire.IP4_TARGET))
    else:
        from_hi = load64be(at + wire.IP6_TARGET)
        from_lo = load64be(at + wire.IP6_TARGET + 8)
    to_hi, to_lo = b.source_hi[i], b.source_lo[i]
    header = _header4(at, from_lo, to_lo) if four else _header6(at, from_hi, from_lo, to_hi, to_lo)
    tcp = at + header
    store32be(tcp, ((ports & 0xFFFF) << 16) | (ports >> 16))
    store32be(tcp + wire.TCP_SEQUENCE, sequence)
    store32be(tcp + wire.TCP_ACKNOWLEDGED, acknowledged & 0xFFFFFFFF)
    store32be(tcp + wire.TCP_OFFSET, (5 << 28) | (answer_flags << 16))
    store32be(tcp + wire.TCP_CHECKSUM, 0)
    pseudo = sum16(at + wire.IP4_SOURCE, 8) if four else sum16(at + wire.IP6_SOURCE, 32)
    check = fold16(pseudo + wire.TCP_LENGTH + wire.TCP + sum16(tcp, wire.TCP_LENGTH))
    store16be(tcp + wire.TCP_CHECKSUM, ~check & 0xFFFF)
    _settle_error(b, t, i, at, header + wire.TCP_LENGTH, wire.TCP, from_hi, from_lo)


@inline
def _header4(at, source, target):
    """Write an IPv4 header for a reset; return its length."""
    store32be(at, (0x45 << 24) | (wire.IP4_LENGTH + wire.TCP_LENGTH))
    store32be(at + wire.IP4_ID, wire.IP4_DF)
    store32be(at + wire.IP4_TTL, (TTL << 24) | (wire.TCP << 16))
    store32be(at + wire.IP4_SOURCE, np.int64(source))
    store32be(at + wire.IP4_TARGET, np.int64(target))
    store16be(at + wire.IP4_CHECKSUM, ~fold16(sum16(at, wire.IP4_LENGTH)) & 0xFFFF)
    return wire.IP4_LENGTH


@inline
def _header6(at, source_hi, source_lo, target_hi, target_lo):
    """Write an IPv6 header for a reset; return its length."""
    store32be(at, 6 << 28)
    store32be(at + wire.IP6_PAYLOAD, (wire.TCP_LENGTH << 16) | (wire.TCP << 8) | TTL)
    store64be(at + wire.IP6_SOURCE, source_hi)
    store64be(at + wire.IP6_SOURCE + 8, source_lo)
    store64be(at + wire.IP6_TARGET, target_hi)
    store64be(at + wire.IP6_TARGET + 8, target_lo)
    return wire.IP6_LENGTH


@inline
def _answer_error(b, t, c, i):
    hi, lo = _error_source(b, t, i)
    if hi | lo == ZERO:
        drop(b, i, b.reason[i])
    elif not _token(b, t):
        drop(b, i, RATE_LIMITED)
    else:
        note_drop(b, t, c, i)
        if b.kind[i] == KIND_IP4:
            _error4(b, t, i)
        else:
            _error6(b, t, i)


@kernel
def answer(b, t, c):
    """Write every answer that the vector asks for; other packets cost about 1 ns. c: Counters.

    What is answered instead of forwarded is told as a drop, while the packet still stands.
    """
    for i in range(b.count[0]):
        if b.verdict[i] != VERDICT_PENDING:
            continue
        if b.flags[i] & FLAG_RESET:
            _answer_reset(b, t, c, i)
        elif b.flags[i] & FLAG_ANSWER:
            _answer_error(b, t, c, i)
        elif b.kind[i] == KIND_ARP:
            _answer_arp(b, t, i)
        elif b.kind[i] == KIND_IP6 and is_gateway_solicitation(b, t, i):
            _answer_nd(b, t, i)
        elif b.flags[i] & FLAG_ECHO:
            _answer_echo(b, t, i)
        elif t.adjacencies[b.adjacency[i]].kind == ADJACENCY_GATEWAY and is_echo(b, i):
            _answer_echo(b, t, i)
