"""Templates: the bytes that an adjacency puts in front of an IP packet.

Rule: what is the same for every packet of an adjacency is written here once; what differs is 0 here
and patched by kernels/forward.py.

Theory. Without a tunnel the template is an Ethernet header. With one it is Ethernet, IPv4 (DF, TTL
64) or IPv6 (hop limit 64), UDP with checksum 0, VXLAN (RFC 7348) or Geneve without options
(RFC 8926), inner Ethernet. `outer_sum` is the one's complement sum of the IPv4 header as it stands
in the template, so the kernel adds only the total length and TOS.
"""

import struct

from dataplane.tables.model import Adjacency, Tunnel
from xdp.abi import CONST, value

TUNNEL_VXLAN = value("TUNNEL_VXLAN")
TYPE = {4: 0x0800, 6: 0x86DD}
HOPS = 64
UDP = 17
DF = 0x4000


def template(adjacency: Adjacency, family: int) -> tuple[bytes, int]:
    """Return (template, outer_sum). family: of the IP packet that follows, 4 or 6."""
    outer = adjacency.tunnel.remote.version if adjacency.tunnel else family
    ether = adjacency.destination_mac + adjacency.source_mac + struct.pack(">H", TYPE[outer])
    if adjacency.tunnel is None:
        return ether, 0
    header, total = _ip(adjacency.tunnel)
    udp = struct.pack(">HHHH", 0, adjacency.tunnel.port, 0, 0)
    inner = adjacency.tunnel.inner_destination_mac + adjacency.tunnel.inner_source_mac
    raw = ether + header + udp + _shim(adjacency.tunnel) + inner + struct.pack(">H", TYPE[family])
    assert len(raw) <= CONST["HEADER_MAX"], f"template of {len(raw)} bytes"
    return raw, total


def _ip(tunnel: Tunnel) -> tuple[bytes, int]:
    local, remote = tunnel.local.packed, tunnel.remote.packed
    if tunnel.remote.version == 6:
        return struct.pack(">IHBB", 6 << 28, 0, UDP, HOPS) + local + remote, 0
    raw = struct.pack(">BBHHHBBH", 0x45, 0, 0, 0, DF, HOPS, UDP, 0) + local + remote
    total = sum(struct.unpack(">10H", raw))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return raw, total


def _shim(tunnel: Tunnel) -> bytes:
    if tunnel.kind == TUNNEL_VXLAN:
        return struct.pack(">II", 0x08 << 24, tunnel.vni << 8)
    return struct.pack(">BBHI", 0, 0, 0x6558, tunnel.vni << 8)
