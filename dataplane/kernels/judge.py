"""What may not go on: no route, no time left, too large.

Rule: judge decides and notes which ICMP error the sender deserves; `answer` writes it.

Theory. A router tells the source why it drops (RFC 1812 4.3, RFC 4443 2.4, RFC 1191, RFC 8201), but
never about an ICMP error, a multicast, or a fragment other than the first, which could multiply
traffic. IPv4 packets that are too large are refused with or without DF: the forwarder does not
fragment. A packet that came through an uplink is for this node; it does not go out again.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.admit import is_gateway_solicitation
from dataplane.kernels.batch import (
    FLAG_ANSWER,
    FLAG_ICMP_ERROR,
    FLAG_L2_MULTICAST,
    FLAG_LATER_FRAGMENT,
    FLAG_LOCAL,
    FLAG_MULTICAST,
    KIND_IP4,
    KIND_IP6,
    VERDICT_PENDING,
)
from dataplane.kernels.house import inline, kernel, prefetch
from dataplane.kernels.parse import drop
from xdp.abi import value

ADJACENCY_NONE = value("ADJACENCY_NONE")
ADJACENCY_POD = value("ADJACENCY_POD")
ADJACENCY_HOST = value("ADJACENCY_HOST")
ADJACENCY_GATEWAY = value("ADJACENCY_GATEWAY")
ADJACENCY_NEXTHOP = value("ADJACENCY_NEXTHOP")
ADJACENCY_TUNNEL = value("ADJACENCY_TUNNEL")
ADJACENCY_BLACKHOLE = value("ADJACENCY_BLACKHOLE")
PORT_UPLINK = value("PORT_UPLINK")

UNROUTABLE = value("REASON_UNROUTABLE")
FIB_FAILED = value("REASON_FIB_FAILED")
NO_TUNNEL = value("REASON_NO_TUNNEL")
TTL_EXCEEDED = value("REASON_TTL_EXCEEDED")
FRAGMENTATION_NEEDED = value("REASON_FRAGMENTATION_NEEDED")

SILENT = FLAG_ICMP_ERROR | FLAG_MULTICAST | FLAG_LATER_FRAGMENT | FLAG_L2_MULTICAST
ADJACENCY_BYTES = 32
ZERO = np.uint64(0)


@inline
def _refuse(b, i, reason, type4, code4, type6, code6, rest):
    """Note the reason, and the ICMP error to send if the packet may be answered."""
    unnamed = b.source_hi[i] == ZERO and b.source_lo[i] == ZERO
    if b.flags[i] & SILENT or unnamed:
        drop(b, i, reason)
        return
    b.reason[i] = reason
    b.flags[i] |= FLAG_ANSWER
    b.answer_type[i] = type4 if b.kind[i] == KIND_IP4 else type6
    b.answer_code[i] = code4 if b.kind[i] == KIND_IP4 else code6
    b.answer_value[i] = rest


@inline
def _judge_one(b, t, i):
    row = t.adjacencies[b.adjacency[i]]
    kind = row.kind
    if kind == ADJACENCY_HOST or kind == ADJACENCY_GATEWAY:
        return
    if kind == ADJACENCY_NONE:
        _refuse(b, i, UNROUTABLE, wire.ICMP_UNREACHABLE, 0, wire.ICMP6_UNREACHABLE, 0, 0)
        return
    if kind == ADJACENCY_BLACKHOLE:
        _refuse(b, i, UNROUTABLE, wire.ICMP_UNREACHABLE, 1, wire.ICMP6_UNREACHABLE, 3, 0)
        return
    if kind != ADJACENCY_POD and kind != ADJACENCY_NEXTHOP and kind != ADJACENCY_TUNNEL:
        drop(b, i, NO_TUNNEL if row.tunnel_family else FIB_FAILED)
        return
    if kind != ADJACENCY_POD and t.ports[b.ingress[i]].kind == PORT_UPLINK:
        drop(b, i, UNROUTABLE)
        return
    if b.ttl[i] <= 1 and not b.flags[i] & FLAG_LOCAL:
        _refuse(b, i, TTL_EXCEEDED, wire.ICMP_TIME_EXCEEDED, 0, wire.ICMP6_TIME_EXCEEDED, 0, 0)
        return
    if b.ip_length[i] > row.mtu:
        mtu = np.int64(row.mtu)
        _refuse(b, i, FRAGMENTATION_NEEDED, wire.ICMP_UNREACHABLE, 4, wire.ICMP6_TOO_BIG, 0, mtu)


@kernel
def judge(b, t):
    """Refuse what cannot be forwarded. About 2 ns a packet that can."""
    count = b.count[0]
    rows = t.adjacencies.ctypes.data
    for i in range(count):
        prefetch(rows + b.adjacency[i] * ADJACENCY_BYTES)
    for i in range(count):
        if b.verdict[i] != VERDICT_PENDING:
            continue
        if b.kind[i] == KIND_IP4:
            _judge_one(b, t, i)
        elif b.kind[i] == KIND_IP6:
            if b.protocol[i] != wire.ICMP6 or not is_gateway_solicitation(b, t, i):
                _judge_one(b, t, i)
