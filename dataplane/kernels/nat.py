"""Source addresses and ports for connections that must not keep their own.

Rule: no two connections have the same reply tuple, and no port that the node itself uses is taken.

Theory. A port is taken for one destination only: what must be unique is the tuple of the replies,
so one node address serves as many connections as there are ports for each destination (RFC 4787
calls it address and port-dependent mapping; RFC 7857 wants ports kept apart only where they meet).
The connection's own port is kept when its tuple is free; else ports are tried one after the other
from a place that the flow's hash gives (RFC 6056 3.3.3). When TRIES ports are taken the packet is
dropped and the destination is remembered, since it is the destination that has run out, not the
node.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.batch import FLAG_OUTSIDE, KIND_IP4
from dataplane.kernels.connections import MASK, find, port_row
from dataplane.kernels.house import inline
from dataplane.kernels.parse import mix, tuple_word
from dataplane.kernels.route import peer_of
from xdp.abi import CONST, value

PORT_POD, PORT_HOST, PORT_UPLINK, PORT_PROXY = (
    value(f"PORT_{name}") for name in ("POD", "HOST", "UPLINK", "PROXY")
)
ADJACENCY_POD = value("ADJACENCY_POD")
ADJACENCY_HOST = value("ADJACENCY_HOST")
ADJACENCY_GATEWAY = value("ADJACENCY_GATEWAY")
ADJACENCY_NEXTHOP = value("ADJACENCY_NEXTHOP")
ADJACENCY_TUNNEL = value("ADJACENCY_TUNNEL")
PEER_KEEP_SOURCE = CONST["PEER_KEEP_SOURCE"]
NAT_SOURCE = CONST["CONNECTION_FLAG_NAT_SOURCE"]
PORT_TAKEN = CONST["CONNECTION_FLAG_PORT_TAKEN"]
HAIRPIN = CONST["CONNECTION_FLAG_HAIRPIN"]
ZERO = np.uint64(0)

TRIES = 256
ANY_FIRST, ANY_COUNT = 1024, 64512  # where the address is not the node's own
EXHAUSTED_MASK = np.uint64(CONST["EXHAUSTED_MAX"] - 1)
NO_PORT = -1
UNSUPPORTED = -2


@inline
def node_source(t, four):
    """The node's own address as a source: as configured for masquerading, else the router's."""
    node = t.node[0]
    if four:
        return ZERO, node.masquerade4 if node.masquerade4 != ZERO else node.router4
    if node.masquerade6_hi != ZERO or node.masquerade6_lo != ZERO:
        return node.masquerade6_hi, node.masquerade6_lo
    return node.router6_hi, node.router6_lo


@inline
def new_source(b, t, i, service, adjacency):
    """How the source of a new connection changes: (flags, hi, lo); flags 0: not at all.

    PORT_TAKEN among the flags: the address is the node's own. The target is the backend by now.
    """
    node = t.node[0]
    row = t.adjacencies[adjacency]
    kind = t.ports[b.ingress[i]].kind
    four = b.kind[i] == KIND_IP4
    leaves = row.kind == ADJACENCY_NEXTHOP
    if service:
        back_to_pod = row.kind == ADJACENCY_POD and row.port == b.ingress[i]
        here = row.kind == ADJACENCY_HOST or row.kind == ADJACENCY_GATEWAY
        # The node's stack would answer a client outside past us; not so the loopback address.
        if back_to_pod or (here and (kind == PORT_HOST or b.flags[i] & FLAG_OUTSIDE)):
            if four:
                return NAT_SOURCE | HAIRPIN, ZERO, node.loopback4
            return NAT_SOURCE | HAIRPIN, node.loopback6_hi, node.loopback6_lo
        if kind == PORT_UPLINK and (leaves or row.kind == ADJACENCY_TUNNEL):
            hi, lo = node_source(t, four)  # so that replies come back this way
            return NAT_SOURCE | PORT_TAKEN, hi, lo
    from_pod = kind == PORT_POD or kind == PORT_PROXY
    if leaves and (from_pod or (service and kind == PORT_HOST)):
        peer = t.peers[peer_of(t, b.kind[i], b.target_hi[i], b.target_lo[i])]
        wanted = node.masquerade4 if four else node.masquerade6_hi | node.masquerade6_lo
        if wanted != ZERO and not peer.flags & PEER_KEEP_SOURCE:
            hi, lo = node_source(t, four)
            return NAT_SOURCE | PORT_TAKEN, hi, lo
    return 0, b.source_hi[i], b.source_lo[i]


@inline
def has_ports(protocol):
    """Whether a protocol can share an address by ports (or identifiers)."""
    return (
        protocol == wire.TCP
        or protocol == wire.UDP
        or protocol == wire.SCTP
        or protocol == wire.ICMP
        or protocol == wire.ICMP6
    )


@inline
def _is_free(t, k, kind, protocol, source_hi, source_lo, port, target_hi, target_lo, own):
    """Whether no connection has a reply tuple with target port `own`."""
    word = tuple_word(port, own, protocol, kind)
    hashed = mix(target_hi, target_lo, source_hi, source_lo, word)
    return (
        find(
            t.connection_index.address, t.connections.address, k.words[MASK],
            target_hi, target_lo, source_hi, source_lo, word, hashed,
        )
        < 0
    )  # fmt: skip


@inline
def _is_nodes(t, protocol, port):
    """Whether the node's own sockets use a port."""
    return (np.int64(t.node_ports[(port_row(protocol) << 13) + (port >> 3)]) >> (port & 7)) & 1


@inline
def take_port(t, k, kind, protocol, hi, lo, target_hi, target_lo, target_port, own, nodes, hashed):
    """Return a source port for a connection from address (hi, lo), NO_PORT or UNSUPPORTED.

    own: its present port, which is kept when it can be; nodes: the address is the node's own, so
    that the port must be in its range (if it has one) and not in use by the node.
    """
    first, many = ANY_FIRST, ANY_COUNT
    if nodes:
        first, many = np.int64(t.node[0].nat_first), np.int64(t.node[0].nat_count)
    inside = many == 0 or first <= own < first + many
    allowed = not nodes or (inside and not _is_nodes(t, protocol, own))
    if allowed and _is_free(t, k, kind, protocol, hi, lo, target_port, target_hi, target_lo, own):
        return own
    if not has_ports(protocol):
        return UNSUPPORTED
    start = np.int64(hashed >> np.uint64(16)) & 0xFFFFFFFF
    for n in range(TRIES if many > TRIES else many):
        port = first + (start + n) % many
        if nodes and _is_nodes(t, protocol, port):
            continue
        if _is_free(t, k, kind, protocol, hi, lo, target_port, target_hi, target_lo, port):
            return port
    return NO_PORT


@inline
def note_exhausted(k, hi, lo, port, protocol, now):
    """Count a destination for which there was no port."""
    word = np.uint64((port << 8) | protocol)
    row = np.int64(mix(hi, lo, np.uint64(0), np.uint64(0), word) & EXHAUSTED_MASK)
    known = k.exhausted[row]
    same = known.hi == hi and known.lo == lo and known.port == port and known.protocol == protocol
    if not same:
        k.exhausted[row].hi = hi
        k.exhausted[row].lo = lo
        k.exhausted[row].port = port
        k.exhausted[row].protocol = protocol
        k.exhausted[row].count = 0
    k.exhausted[row].count += np.uint64(1)
    k.exhausted[row].last_ns = np.uint64(now)
    k.counters[0].nat_exhausted += np.uint64(1)
