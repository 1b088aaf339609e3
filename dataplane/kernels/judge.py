"""What may not go on: no route, no time left, too large.

Rule: judge decides and notes which ICMP error the sender deserves; `answer` writes it.

Theory. IPv4 packets that are too large are refused with or without DF: the forwarder does not
fragment (RFC 1191, RFC 8201). A packet that came through an uplink is for this node; only one that
a service sends on goes out again. What `connect` has refused already is left alone.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.admit import is_gateway_solicitation
from dataplane.kernels.batch import (
    FLAG_ANSWER,
    FLAG_ECHO,
    FLAG_LOCAL,
    FLAG_NAT,
    KIND_IP4,
    KIND_IP6,
    VERDICT_PENDING,
)
from dataplane.kernels.house import inline, kernel, prefetch
from dataplane.kernels.parse import drop
from dataplane.kernels.refuse import refuse
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

ADJACENCY_BYTES = 32


@inline
def _judge_one(b, t, i):
    row = t.adjacencies[b.adjacency[i]]
    kind = row.kind
    if kind == ADJACENCY_HOST or kind == ADJACENCY_GATEWAY:
        return
    if kind == ADJACENCY_NONE:
        refuse(b, i, UNROUTABLE, wire.ICMP_UNREACHABLE, 0, wire.ICMP6_UNREACHABLE, 0, 0)
        return
    if kind == ADJACENCY_BLACKHOLE:
        refuse(b, i, UNROUTABLE, wire.ICMP_UNREACHABLE, 1, wire.ICMP6_UNREACHABLE, 3, 0)
        return
    if kind != ADJACENCY_POD and kind != ADJACENCY_NEXTHOP and kind != ADJACENCY_TUNNEL:
        drop(b, i, NO_TUNNEL if row.tunnel_family else FIB_FAILED)
        return
    through = t.ports[b.ingress[i]].kind == PORT_UPLINK and not b.flags[i] & FLAG_NAT
    if kind != ADJACENCY_POD and through:
        drop(b, i, UNROUTABLE)
        return
    if b.ttl[i] <= 1 and not b.flags[i] & FLAG_LOCAL:
        refuse(b, i, TTL_EXCEEDED, wire.ICMP_TIME_EXCEEDED, 0, wire.ICMP6_TIME_EXCEEDED, 0, 0)
        return
    if b.ip_length[i] > row.mtu:
        mtu = np.int64(row.mtu)
        refuse(b, i, FRAGMENTATION_NEEDED, wire.ICMP_UNREACHABLE, 4, wire.ICMP6_TOO_BIG, 0, mtu)


@kernel
def judge(b, t):
    """Refuse what cannot be forwarded. About 2 ns a packet that can."""
    count = b.count[0]
    rows = t.adjacencies.address
    for i in range(count):
        prefetch(rows + b.adjacency[i] * ADJACENCY_BYTES)
    for i in range(count):
        if b.verdict[i] != VERDICT_PENDING or b.flags[i] & (FLAG_ANSWER | FLAG_ECHO):
            continue
        if b.kind[i] == KIND_IP4:
            _judge_one(b, t, i)
        elif b.kind[i] == KIND_IP6:
            if b.protocol[i] != wire.ICMP6 or not is_gateway_solicitation(b, t, i):
                _judge_one(b, t, i)
