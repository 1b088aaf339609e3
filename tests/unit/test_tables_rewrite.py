"""Templates, patched as the kernel does it, judged by scapy."""

import itertools
import struct
from ipaddress import ip_address

import pytest
from scapy.contrib.geneve import GENEVE
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Raw

from dataplane.tables.model import Adjacency, Tunnel
from dataplane.tables.rewrite import template
from xdp.abi import CONST, value

SOURCE, TARGET = bytes.fromhex("025000000001"), bytes.fromhex("02aabbccddee")
INNER = bytes.fromhex("0250c0000201"), bytes.fromhex("0250c0000202")
UNDERLAY = {4: ("192.0.2.1", "198.51.100.255"), 6: ("2001:db8::1", "2001:db8:ffff::2")}


def text(mac: bytes) -> str:
    return mac.hex(":")


def payload(family: int) -> bytes:
    if family == 4:
        return bytes(IP(src="10.9.0.2", dst="10.9.1.2") / UDP(sport=5, dport=6) / b"abc")
    return bytes(IPv6(src="fd09::2", dst="fd09:0:0:1::2") / UDP(sport=5, dport=6) / b"abc")


@pytest.mark.parametrize("family", [4, 6])
def test_without_a_tunnel_it_is_an_ethernet_header(family):
    adjacency = Adjacency(value("ADJACENCY_POD"), 1, 1500, SOURCE, TARGET)
    raw, total = template(adjacency, family)
    assert (len(raw), total) == (14, 0)
    frame = Ether(raw + payload(family))
    assert (frame.src, frame.dst) == (text(SOURCE), text(TARGET))
    assert frame.haslayer(IP if family == 4 else IPv6)
    assert frame[UDP].payload.load == b"abc"


def patched(raw: bytes, total: int, outer: int, tos: int, inner: bytes) -> bytes:
    """What kernels/forward.py does to a template."""
    frame = bytearray(raw + inner)
    size = len(frame) - 14
    if outer == 4:
        frame[15] = tos
        frame[16:18] = struct.pack(">H", size)
        check = total + size + tos
        while check >> 16:
            check = (check & 0xFFFF) + (check >> 16)
        frame[24:26] = struct.pack(">H", ~check & 0xFFFF)
        udp = 34
    else:
        frame[14:18] = struct.pack(">I", 6 << 28 | tos << 20 | 0x12345)
        frame[18:20] = struct.pack(">H", size - 40)
        udp = 54
    frame[udp : udp + 2] = struct.pack(">H", 50000)
    frame[udp + 4 : udp + 6] = struct.pack(">H", len(frame) - udp)
    return bytes(frame)


@pytest.mark.parametrize(
    ("kind", "outer", "family"), list(itertools.product(["VXLAN", "GENEVE"], [4, 6], [4, 6]))
)
def test_with_a_tunnel_scapy_reads_every_layer(kind, outer, family):
    local, remote = UNDERLAY[outer]
    port = 8472 if kind == "VXLAN" else 6081
    tunnel = Tunnel(
        value(f"TUNNEL_{kind}"), ip_address(local), ip_address(remote), port, 0xABCDE1, *INNER
    )
    adjacency = Adjacency(value("ADJACENCY_TUNNEL"), 3, 1450, SOURCE, TARGET, tunnel)
    raw, total = template(adjacency, family)
    assert len(raw) == (64 if outer == 4 else 84) <= CONST["HEADER_MAX"]
    frame = Ether(patched(raw, total, outer, 0xB8, payload(family)))
    assert (frame.src, frame.dst) == (text(SOURCE), text(TARGET))
    ip = frame.payload
    assert (ip.src, ip.dst) == (local, remote)
    if outer == 4:
        assert isinstance(ip, IP)
        assert (ip.flags, ip.ttl, ip.tos, ip.proto, ip.id) == ("DF", 64, 0xB8, 17, 0)
        found = ip.chksum
        del ip.chksum
        assert IP(bytes(ip)).chksum == found
        assert ip.len == len(bytes(frame)) - 14
    else:
        assert isinstance(ip, IPv6)
        assert (ip.hlim, ip.tc, ip.fl, ip.nh) == (64, 0xB8, 0x12345, 17)
        assert ip.plen == len(bytes(frame)) - 54
    udp = ip.payload
    assert (udp.sport, udp.dport, udp.chksum) == (50000, port, 0)
    assert udp.len == len(bytes(udp))
    decode = VXLAN if kind == "VXLAN" else GENEVE
    header = decode(bytes(udp.payload))
    assert header.vni == 0xABCDE1
    if kind == "VXLAN":
        assert int(header.flags) == 0x08
    else:
        assert (header.version, header.optionlen, header.proto) == (0, 0, 0x6558)
        assert (header.oam, header.critical) == (0, 0)
    inner = header.payload
    assert isinstance(inner, Ether)
    assert (inner.src, inner.dst) == (text(INNER[0]), text(INNER[1]))
    assert inner.type == (0x0800 if family == 4 else 0x86DD)
    assert inner[Raw].load == b"abc"
