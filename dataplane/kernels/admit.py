"""Who may send what: source validation at every kind of port, and the way in through the tunnel.

Rule: after this stage a packet's source address is one that its port may use.

Theory. A pod sends with its own addresses only, and never to the tunnel's UDP port: it could
forge packets of another node. The node's own stack is trusted. From an uplink come tunnel
packets, which `decapsulate` opens, and packets from outside: for services, replies to masqueraded
connections and, with direct routing, packets to our pods. A source of ours coming from outside is
forged (RFC 2827), and an inner source must route back into the tunnel that it came from (RFC 3704,
strict reverse path). Multicast is not forwarded; the one multicast
that matters is the neighbour solicitation for the gateway, which `answer` takes up.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.batch import (
    FLAG_ADMITTED,
    FLAG_FRAGMENT,
    FLAG_MULTICAST,
    FLAG_OUTSIDE,
    KIND_ARP,
    KIND_IP4,
    KIND_IP6,
    KIND_OTHER,
    VERDICT_PENDING,
)
from dataplane.kernels.decap import decapsulate
from dataplane.kernels.house import inline, kernel, load8, load32be, load64be
from dataplane.kernels.parse import drop
from dataplane.kernels.route import lookup, peer_of
from xdp.abi import CONST, value

PORT_POD = value("PORT_POD")
PORT_HOST = value("PORT_HOST")
PORT_PROXY = value("PORT_PROXY")
PORT_UPLINK = value("PORT_UPLINK")
ADJACENCY_POD = value("ADJACENCY_POD")
ADJACENCY_HOST = value("ADJACENCY_HOST")
ADJACENCY_GATEWAY = value("ADJACENCY_GATEWAY")
ADJACENCY_TUNNEL = value("ADJACENCY_TUNNEL")
ADJACENCY_BLACKHOLE = value("ADJACENCY_BLACKHOLE")
TUNNEL_NONE = value("TUNNEL_NONE")

INVALID_SOURCE = value("REASON_INVALID_SOURCE_IP")
PROHIBITED = value("REASON_ENCAPSULATION_PROHIBITED")
UNKNOWN_SENDER = value("REASON_UNKNOWN_SENDER")
MULTICAST = value("REASON_MULTICAST")
PORT_GONE = value("REASON_PORT_GONE")

PEER_REMOTE_NODE = CONST["PEER_REMOTE_NODE"]
LINK_LOCAL = 0x3FA  # fe80::/10, the first ten bits
ZERO = np.uint64(0)


@inline
def is_gateway_solicitation(b, t, i):
    """True for a neighbour solicitation that asks for the gateway (RFC 4861 4.3).

    Only our own links may ask: an answer leaves by the port it came from, and the underlay is no
    link of the gateway's. A fragment is none (RFC 6980).
    """
    if b.kind[i] != KIND_IP6 or b.protocol[i] != wire.ICMP6 or b.ttl[i] != wire.ND_HOPS:
        return False
    if b.flags[i] & FLAG_FRAGMENT or t.ports[b.ingress[i]].kind == PORT_UPLINK:
        return False
    at = b.address[i] + b.l4[i]
    end = b.l4[i] + wire.ND_OPTIONS
    if end > b.length[i] or end > b.l3[i] + b.ip_length[i] or load8(at) != wire.ND_SOLICITATION:
        return False
    node = t.node[0]
    return (
        load64be(at + wire.ND_TARGET) == node.router6_hi
        and load64be(at + wire.ND_TARGET + 8) == node.router6_lo
    )


@inline
def _admit_pod(b, t, i):
    port = t.ports[b.ingress[i]]
    kind = b.kind[i]
    if kind == KIND_IP4:
        if b.source_lo[i] != np.uint64(port.address4) or port.address4 == 0:
            drop(b, i, INVALID_SOURCE)
            return
    elif kind == KIND_IP6:
        own = b.source_hi[i] == port.address6_hi and b.source_lo[i] == port.address6_lo
        present = port.address6_hi != ZERO or port.address6_lo != ZERO
        if not own or not present:
            _admit_control(b, t, i)
            return
    elif kind == KIND_ARP:
        sender = load32be(b.address[i] + b.l3[i] + wire.ARP_SENDER_IP)
        if sender != np.int64(port.address4) and sender != 0:
            drop(b, i, INVALID_SOURCE)
        return
    tunnel = t.node[0].tunnel_kind != TUNNEL_NONE
    if tunnel and b.protocol[i] == wire.UDP and b.target_port[i] == t.node[0].tunnel_port:
        drop(b, i, PROHIBITED)


@inline
def _admit_control(b, t, i):
    """A pod's IPv6 packet that is not from its address: link-local control traffic, or forged."""
    link_local = np.int64(b.source_hi[i] >> np.uint64(54)) == LINK_LOCAL
    unspecified = b.source_hi[i] == ZERO and b.source_lo[i] == ZERO
    if link_local and is_gateway_solicitation(b, t, i):
        return
    if (link_local or unspecified) and b.flags[i] & FLAG_MULTICAST:
        drop(b, i, MULTICAST)
    else:
        drop(b, i, INVALID_SOURCE)


@inline
def _admit_uplink(b, t, i):
    ip = b.kind[i] == KIND_IP4 or b.kind[i] == KIND_IP6
    tunnel = t.node[0].tunnel_kind != TUNNEL_NONE
    if tunnel and ip and b.protocol[i] == wire.UDP and b.target_port[i] == t.node[0].tunnel_port:
        if not decapsulate(b, t, i):
            return
        back = lookup(t, b.kind[i], b.source_hi[i], b.source_lo[i])
        row = t.adjacencies[back]
        if row.kind != ADJACENCY_TUNNEL:
            drop(b, i, INVALID_SOURCE)
        elif row.remote_hi != b.remote_hi[i] or row.remote_lo != b.remote_lo[i]:
            drop(b, i, INVALID_SOURCE)
    elif ip:
        b.flags[i] |= FLAG_OUTSIDE
        _admit_outside(b, t, i)
    else:
        drop(b, i, UNKNOWN_SENDER)


@inline
def _admit_outside(b, t, i):
    """A packet of the underlay: its source is not one of ours, nor of a pod behind the tunnel."""
    row = t.adjacencies[lookup(t, b.kind[i], b.source_hi[i], b.source_lo[i])]
    forged = (
        row.kind == ADJACENCY_POD
        or row.kind == ADJACENCY_HOST
        or row.kind == ADJACENCY_GATEWAY
        or row.kind == ADJACENCY_BLACKHOLE
    )
    if row.kind == ADJACENCY_TUNNEL:  # a node may speak for itself, not for its pods
        peer = t.peers[peer_of(t, b.kind[i], b.source_hi[i], b.source_lo[i])]
        forged = not peer.flags & PEER_REMOTE_NODE
    if forged:
        drop(b, i, INVALID_SOURCE)


@kernel
def admit(b, t):
    """Drop what its port may not send; open tunnel packets. About 3 ns for a pod's packet."""
    for i in range(b.count[0]):
        if b.verdict[i] != VERDICT_PENDING or b.flags[i] & FLAG_ADMITTED:
            continue
        kind = t.ports[b.ingress[i]].kind
        if kind == PORT_POD:
            _admit_pod(b, t, i)
        elif kind == PORT_UPLINK:
            _admit_uplink(b, t, i)
        elif kind != PORT_HOST and kind != PORT_PROXY:
            drop(b, i, PORT_GONE)
        if b.verdict[i] == VERDICT_PENDING and b.flags[i] & FLAG_MULTICAST:
            if b.kind[i] == KIND_OTHER or not is_gateway_solicitation(b, t, i):
                drop(b, i, MULTICAST)
