"""A packet on its way out, slowly: twin of kernels/forward.py.

Rule: an adjacency and an IP packet in, the frame on the wire out; every checksum is summed anew.

Theory. The outer headers are written from the RFCs and from the adjacency as the agent states it,
not from the template that the table's writer makes of it. The source port is the flow's: the mix of
kernels/parse.py in unbounded integers.
"""

import struct

from dataplane.tables.model import Adjacency
from tests.naive.headers import ones_sum
from xdp.abi import value

ETHER_TYPES = {4: 0x0800, 6: 0x86DD}
MASK64 = (1 << 64) - 1
HERE = (value("ADJACENCY_HOST"), value("ADJACENCY_GATEWAY"))
VXLAN = value("TUNNEL_VXLAN")


def mix(source: int, target: int, word: int) -> int:
    """Mix two addresses and a tuple's word into 64 bits."""
    a, b, c = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93
    mixed = ((source & MASK64) ^ ((source >> 64) * b & MASK64)) * a & MASK64
    mixed ^= mixed >> 32
    mixed = (mixed ^ (target & MASK64) ^ ((target >> 64) * c & MASK64)) * b & MASK64
    mixed ^= mixed >> 32
    mixed = (mixed ^ word) * c & MASK64
    mixed = (mixed ^ (mixed >> 32)) * a & MASK64
    return mixed ^ (mixed >> 32)


def flow_hash(found: dict) -> int:
    """Mix what tests/naive/headers.py found of a packet into 64 bits."""
    source_port, target_port = (0, 0) if found["fragment"] else found["ports"]
    word = source_port << 48 | target_port << 32 | found["protocol"] << 8 | found["kind"]
    return mix(found["source"], found["target"], word)


def forward(frame: bytes, found: dict, adjacency: Adjacency) -> bytes:
    """Return the frame that leaves. frame: Ethernet with an IP packet; found: its headers."""
    packet = bytearray(frame[14 : 14 + found["ip_length"]])
    if adjacency.kind not in HERE:
        _count_down(packet, found)
    inner = struct.pack(">H", ETHER_TYPES[found["kind"]])
    if adjacency.tunnel is None:
        return adjacency.destination_mac + adjacency.source_mac + inner + bytes(packet)
    return _encapsulate(packet, found, adjacency, inner)


def _count_down(packet: bytearray, found: dict) -> None:
    if found["kind"] == 6:
        packet[7] -= 1
        return
    packet[8] -= 1
    packet[10:12] = bytes(2)
    header = bytes(packet[: found["l4"] - 14])
    packet[10:12] = struct.pack(">H", ~ones_sum(header) & 0xFFFF)


def _encapsulate(packet: bytearray, found: dict, adjacency: Adjacency, inner: bytes) -> bytes:
    tunnel = adjacency.tunnel
    assert tunnel is not None
    mixed = flow_hash(found)
    if tunnel.kind == VXLAN:
        shim = struct.pack(">BBHI", 0x08, 0, 0, tunnel.vni << 8)
    else:
        shim = struct.pack(">BBHI", 0, 0, 0x6558, tunnel.vni << 8)
    body = shim + tunnel.inner_destination_mac + tunnel.inner_source_mac + inner + bytes(packet)
    port = 49152 + (mixed & 0x3FFF)
    udp = struct.pack(">HHHH", port, tunnel.port, 8 + len(body), 0) + body
    addresses = tunnel.local.packed + tunnel.remote.packed
    family, tos = tunnel.remote.version, found["tos"]
    if family == 4:
        start = struct.pack(">BBHHHBBH", 0x45, tos, 20 + len(udp), 0, 0x4000, 64, 17, 0)
        check = ~ones_sum(start + addresses) & 0xFFFF
        ip = start[:10] + struct.pack(">H", check) + addresses
    else:
        word = 6 << 28 | tos << 20 | port  # one entropy for both: the flow table keeps it once
        ip = struct.pack(">IHBB", word, len(udp), 17, 64) + addresses
    outer = struct.pack(">H", ETHER_TYPES[family])
    return adjacency.destination_mac + adjacency.source_mac + outer + ip + udp
