"""The last stage: count down TTL, put the adjacency's header in front, choose the port.

Rule: what leaves here is complete; the engine only moves frame numbers.

Theory. An adjacency's template is everything that stands before the IP packet on the way out: an
Ethernet header, or Ethernet, IP, UDP, VXLAN or Geneve and inner Ethernet. It is copied over the old
Ethernet header into the headroom; lengths, TOS, source port and the outer checksum are patched. The
outer IPv4 checksum is the template's precomputed sum plus two words. The source port carries the
inner flow's entropy (RFC 7348 5, RFC 8926 3.3), and so does IPv6's flow label; DF is set (RFC 7348
4.3), the outer UDP checksum is 0 (RFC 6935 for IPv6), TTL is the template's 64, DSCP and ECN are
copied (RFC 2983 uniform, RFC 6040 normal mode). TTL's checksum change is incremental (RFC 1141, RFC
1624).
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.batch import (
    FLAG_LOCAL,
    FLAG_NAT_SOURCE,
    KIND_IP4,
    KIND_IP6,
    VERDICT_PENDING,
    VERDICT_SEND,
)
from dataplane.kernels.house import (
    copy32,
    fold16,
    inline,
    kernel,
    load16be,
    load64,
    prefetch,
    store8,
    store16be,
    store32be,
    store64,
)
from dataplane.kernels.parse import drop
from xdp.abi import CONST, value

ADJACENCY_HOST = value("ADJACENCY_HOST")
ADJACENCY_GATEWAY = value("ADJACENCY_GATEWAY")
UNKNOWN_TARGET = value("REASON_UNKNOWN_TARGET")
HEADER_MAX = CONST["HEADER_MAX"]
PORT_MASK = np.uint64(wire.TUNNEL_PORTS_MASK)

PORT_POD = value("PORT_POD")
REMOTE_NODE = value("IDENTITY_REMOTE_NODE")
NODE_IDENTITY_VNI = CONST["NODE_IDENTITY_VNI"]
VNI_FROM_END = wire.ETHER_LENGTH + wire.VXLAN_LENGTH - wire.VXLAN_VNI

OUTER = wire.ETHER_LENGTH
OUTER_UDP4 = OUTER + wire.IP4_LENGTH
OUTER_UDP6 = OUTER + wire.IP6_LENGTH


@inline
def _count_down(b, i):
    at = b.address[i] + b.l3[i]
    if b.kind[i] == KIND_IP4:
        store8(at + wire.IP4_TTL, b.ttl[i] - 1)
        check = load16be(at + wire.IP4_CHECKSUM) + 0x0100
        store16be(at + wire.IP4_CHECKSUM, check + 1 if check >= 0xFFFF else check)
    else:
        store8(at + wire.IP6_HOPS, b.ttl[i] - 1)


@inline
def _copy_template(at, template, size):
    """Write exactly `size` bytes: 14, or at least 32."""
    if size == wire.ETHER_LENGTH:
        store64(at, load64(template))
        store64(at + 6, load64(template + 6))
        return
    copy32(at, template)
    copy32(at + 32, template + 32)
    if size > 64:
        copy32(at + size - 32, template + size - 32)


@inline
def vni_of(b, t, i):
    """The identity that a packet carries through the tunnel: its pod's, or that of a node."""
    pod = t.ports[b.ingress[i]].kind == PORT_POD
    if pod and not b.flags[i] & (FLAG_LOCAL | FLAG_NAT_SOURCE):
        return np.int64(t.subjects[b.ingress[i]].identity)
    return REMOTE_NODE


@inline
def _patch_outer(b, t, i, at, size, row):
    """Fill the outer header's lengths, TOS, checksum, source port, VNI; at: start of the frame."""
    if t.node[0].flags & NODE_IDENTITY_VNI:  # VXLAN and Geneve have it in the same place
        store32be(at + size - VNI_FROM_END, vni_of(b, t, i) << 8)
    payload = size + b.ip_length[i]
    source = wire.TUNNEL_PORTS_BASE + np.int64(b.hash[i] & PORT_MASK)
    if row.tunnel_family == 4:
        total = payload - OUTER
        check = fold16(np.int64(row.outer_sum) + total + b.tos[i])
        store8(at + OUTER + wire.IP4_TOS, b.tos[i])
        store16be(at + OUTER + wire.IP4_TOTAL, total)
        store16be(at + OUTER + wire.IP4_CHECKSUM, ~check & 0xFFFF)
        store16be(at + OUTER_UDP4, source)
        store16be(at + OUTER_UDP4 + wire.UDP_LENGTH_FIELD, payload - OUTER_UDP4)
    else:
        store32be(at + OUTER, (6 << 28) | (b.tos[i] << 20) | source)  # RFC 6438: label
        store16be(at + OUTER + wire.IP6_PAYLOAD, payload - OUTER_UDP6)
        store16be(at + OUTER_UDP6, source)
        store16be(at + OUTER_UDP6 + wire.UDP_LENGTH_FIELD, payload - OUTER_UDP6)


@inline
def _forward_one(b, t, i, rewrites):
    row = t.adjacencies[b.adjacency[i]]
    if not b.flags[i] & FLAG_LOCAL:
        if row.kind != ADJACENCY_HOST and row.kind != ADJACENCY_GATEWAY:
            _count_down(b, i)
    size = np.int64(row.header_length)
    moved = b.l3[i] - size
    at = b.address[i] + moved
    _copy_template(at, rewrites + b.adjacency[i] * HEADER_MAX, size)
    if row.tunnel_family:
        _patch_outer(b, t, i, at, size, row)
    b.address[i] = at
    if b.total[i] > b.length[i]:
        b.length[i] -= moved
        b.total[i] -= moved
    else:
        b.length[i] = size + b.ip_length[i]  # Ethernet padding ends here
        b.total[i] = b.length[i]
    b.egress[i] = row.port
    b.verdict[i] = VERDICT_SEND


@kernel
def forward(b, t):
    """Complete every packet that is still pending. About 10 ns into VXLAN."""
    count = b.count[0]
    rewrites = t.rewrites.address
    for i in range(count):
        prefetch(rewrites + b.adjacency[i] * HEADER_MAX)
        prefetch(b.address[i] - 64)
    for i in range(count):
        if b.verdict[i] != VERDICT_PENDING:
            continue
        if b.kind[i] == KIND_IP4 or b.kind[i] == KIND_IP6:
            _forward_one(b, t, i, rewrites)
        else:  # ARP that is not for the gateway
            drop(b, i, UNKNOWN_TARGET)
