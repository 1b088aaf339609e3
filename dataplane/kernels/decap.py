"""The way out of the tunnel: VXLAN and Geneve, over IPv4 and IPv6.

Rule: nothing of the inner packet is looked at before the outer one is whole, ours and well-formed.

Theory. The packet is opened in place: `address` moves behind the tunnel header and the inner frame
is parsed like one from a port. RFC 7348: the I flag must be set, other bits are ignored on
receipt. RFC 8926: version 0, options skipped; one marked critical that we do not know is a drop
(4.3), and so is a control packet, whose payload must not go on (3.4). The outer UDP checksum is
not verified: zero is usual (RFC 6935), and a wrong one is caught by the inner checksums. ECN goes
from the outer header to the inner (RFC 6040 4.2); DSCP stays.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.batch import (
    FLAG_DECAPSULATED,
    FLAG_FRAGMENT,
    KIND_IP4,
    KIND_IP6,
    KIND_OTHER,
    VERDICT_PENDING,
)
from dataplane.kernels.house import (
    fold16,
    inline,
    load8,
    load16be,
    load32be,
    store8,
    store16be,
    store32be,
)
from dataplane.kernels.parse import drop, parse_one
from xdp.abi import CONST, value

NODE_IDENTITY_VNI = CONST["NODE_IDENTITY_VNI"]
TUNNEL_VXLAN = value("TUNNEL_VXLAN")
INVALID_TUNNEL = value("REASON_INVALID_TUNNEL")
CRITICAL_OPTION = value("REASON_CRITICAL_OPTION")
WRONG_VNI = value("REASON_WRONG_VNI")
UNKNOWN_SENDER = value("REASON_UNKNOWN_SENDER")
UNSUPPORTED_L3 = value("REASON_UNSUPPORTED_L3")

GENEVE_CONTROL = 0x80  # O bit
ECN_ECT1 = 1
ECN_ECT0 = 2


@inline
def _vxlan(b, t, i, at):
    """Length of the VXLAN header at `at`, or 0 after a drop."""
    if not load8(at) & wire.VXLAN_VALID:
        drop(b, i, INVALID_TUNNEL)
        return 0
    if not _accepts(b, t, i, load32be(at + wire.VXLAN_VNI) >> 8):
        return 0
    return wire.VXLAN_LENGTH


@inline
def _accepts(b, t, i, vni):
    """Whether a VNI is ours; where it carries an identity, any is, and the identity is kept."""
    if t.node[0].flags & NODE_IDENTITY_VNI:
        b.identity[i] = vni
        return True
    if vni == np.int64(t.node[0].vni):
        return True
    drop(b, i, WRONG_VNI)
    return False


@inline
def _geneve(b, t, i, at, room):
    """Length of the Geneve header at `at` with its options, or 0 after a drop."""
    first = load8(at)
    size = wire.GENEVE_LENGTH + (first & 0x3F) * 4
    if first >> 6 != 0 or size > room or load16be(at + wire.GENEVE_TYPE) != wire.TYPE_BRIDGED:
        drop(b, i, INVALID_TUNNEL)
        return 0
    if load8(at + 1) & GENEVE_CONTROL:
        drop(b, i, INVALID_TUNNEL)
        return 0
    if load8(at + 1) & wire.GENEVE_CRITICAL:
        drop(b, i, CRITICAL_OPTION)
        return 0
    if not _accepts(b, t, i, load32be(at + wire.GENEVE_VNI) >> 8):
        return 0
    option = at + wire.GENEVE_LENGTH
    end = at + size
    while option + 4 <= end:
        if load8(option + 2) & 0x80:
            drop(b, i, CRITICAL_OPTION)
            return 0
        option += 4 + (load8(option + 3) & 0x1F) * 4
    if option != end:
        drop(b, i, INVALID_TUNNEL)
        return 0
    return size


@inline
def _set_ecn(b, i, ecn):
    """Write the ECN field of packet i; the IPv4 checksum follows (RFC 1624 eqn. 3)."""
    at = b.address[i] + b.l3[i]
    b.tos[i] = (b.tos[i] & ~wire.ECN_MASK) | ecn
    if b.kind[i] == KIND_IP4:
        old = load16be(at)
        store8(at + wire.IP4_TOS, b.tos[i])
        total = (~load16be(at + wire.IP4_CHECKSUM) & 0xFFFF) + (~old & 0xFFFF) + load16be(at)
        store16be(at + wire.IP4_CHECKSUM, ~fold16(total) & 0xFFFF)
    else:
        store32be(at, (load32be(at) & ~(wire.ECN_MASK << 20)) | (ecn << 20))


@inline
def _congestion(b, i, outer):
    """RFC 6040 4.2, figure 4: combine the outer ECN field with the inner one."""
    inner = b.tos[i] & wire.ECN_MASK
    if outer == wire.ECN_CE and inner == wire.ECN_NOT:
        drop(b, i, INVALID_TUNNEL)  # a router marked what cannot react
    elif outer == wire.ECN_CE and inner != wire.ECN_CE:
        _set_ecn(b, i, wire.ECN_CE)
    elif outer == ECN_ECT1 and inner == ECN_ECT0:
        _set_ecn(b, i, ECN_ECT1)


@inline
def decapsulate(b, t, i):
    """Open tunnel packet i in place; True when an inner IP packet stands there, still pending."""
    outer_kind = b.kind[i]
    ip = outer_kind == KIND_IP4 or outer_kind == KIND_IP6
    node = t.node[0]
    if not ip or b.protocol[i] != wire.UDP or b.target_port[i] != node.tunnel_port:
        drop(b, i, UNKNOWN_SENDER)
        return False
    at = b.address[i] + b.l4[i] + wire.UDP_LENGTH
    room = b.length[i] - b.l4[i] - wire.UDP_LENGTH
    if b.flags[i] & FLAG_FRAGMENT or room < wire.VXLAN_LENGTH:
        drop(b, i, INVALID_TUNNEL)
        return False
    udp = load16be(b.address[i] + b.l4[i] + wire.UDP_LENGTH_FIELD)
    if udp != b.l3[i] + b.ip_length[i] - b.l4[i] or udp < wire.UDP_LENGTH + wire.VXLAN_LENGTH:
        drop(b, i, INVALID_TUNNEL)
        return False
    if node.tunnel_kind == TUNNEL_VXLAN:
        size = _vxlan(b, t, i, at)
    else:
        size = _geneve(b, t, i, at, room if room < udp - 8 else udp - 8)
    if size == 0:
        return False
    strip = at + size - b.address[i]
    outer = b.tos[i] & wire.ECN_MASK
    b.remote_hi[i] = b.source_hi[i]
    b.remote_lo[i] = b.source_lo[i]
    # Padding behind the outer packet is not part of the inner one.
    padding = b.total[i] - b.l3[i] - b.ip_length[i]
    b.total[i] -= strip + padding
    b.length[i] -= strip
    if b.length[i] > b.total[i]:
        b.length[i] = b.total[i]
    b.address[i] += strip
    b.kind[i] = KIND_OTHER
    b.flags[i] = FLAG_DECAPSULATED
    parse_one(b, i)
    if b.verdict[i] != VERDICT_PENDING:
        return False
    if b.kind[i] != KIND_IP4 and b.kind[i] != KIND_IP6:
        drop(b, i, UNSUPPORTED_L3)
        return False
    _congestion(b, i, outer)
    return b.verdict[i] == VERDICT_PENDING
