"""The way in through the tunnel against its twin, and what may not come in."""

import struct
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.all import Ether, IPv6, Raw, raw
from scapy.layers.inet6 import ICMPv6ND_NS, IPv6ExtHdrFragment

from dataplane.kernels.admit import admit
from dataplane.kernels.batch import (
    FLAG_DECAPSULATED,
    FLAG_OUTSIDE,
    VERDICT_DROP,
    VERDICT_PENDING,
)
from dataplane.kernels.parse import parse
from tests import strategies
from tests import worlds as w
from tests.naive import admit as twin
from tests.naive import node
from tests.naive.headers import Refused, ones_sum
from tests.worlds import POD_A, UPLINK
from xdp.abi import value

SOURCES4 = [ip_address(text) for text in ("10.1.2.9", "10.1.1.3", "198.51.100.7", "10.99.0.1")]
SOURCES6 = [ip_address(text) for text in ("fd00:1:2::9", "fd00:1:1::3", "fd99::1", "fe80::1", "::")]
FORGED4 = [w.POD4[POD_A], w.NODE4, w.ROUTER4, *map(ip_address, ("10.1.1.99", "10.1.2.9"))]
FORGED6 = [w.POD6[POD_A], w.NODE6, w.ROUTER6, *map(ip_address, ("fd00:1:1::99", "fd00:1:2::9"))]
OURS = ("pod", "host", "gateway", "blackhole", "tunnel")
FLAWS = (
    *("vni", "i-flag", "version", "control", "critical", "options", "type", "lie", "port"),
    *("protocol", "source", "inner-source", "inner-target", "fragment", "cut", "padding", "inner"),
    "forged",
)


class Draw:
    """Draws the fields of one tunnel packet, of which at most one is flawed."""

    def __init__(self, draw) -> None:
        self.draw = draw
        flawed = draw(st.booleans())
        self.flaw = draw(st.sampled_from(FLAWS)) if flawed else None

    def field(self, flaw: str, usual, *others):
        """The usual value, or one of the others when this is the flaw."""
        return self.draw(st.sampled_from(others)) if flaw == self.flaw else usual


def header4(source, target, tos, protocol, size, word=0) -> bytes:
    start = struct.pack(">BBHHHBBH", 0x45, tos, 20 + size, 0, word, 64, protocol, 0)
    raw4 = start + source.packed + target.packed
    return raw4[:10] + struct.pack(">H", ~ones_sum(raw4) & 0xFFFF) + raw4[12:]


def header6(source, target, tos, protocol, size) -> bytes:
    word = 6 << 28 | tos << 20
    return struct.pack(">IHBB", word, size, protocol, 64) + source.packed + target.packed


def inner_frame(of: Draw) -> bytes:
    if of.flaw == "inner":
        return of.draw(strategies.frames)
    tos = of.draw(st.integers(0, 255))
    data = of.draw(st.binary(max_size=20))
    udp = struct.pack(">HHHH", 7, 8, 8 + len(data), 0) + data
    if of.draw(st.booleans()):
        source = of.field("inner-source", *SOURCES4)
        target = of.field("inner-target", w.POD4[POD_A], ip_address("224.0.0.1"))
        return bytes(12) + b"\x08\x00" + header4(source, target, tos, 17, len(udp)) + udp
    source = of.field("inner-source", *SOURCES6)
    target = of.field("inner-target", w.POD6[POD_A], ip_address("ff02::1"))
    return bytes(12) + b"\x86\xdd" + header6(source, target, tos, 17, len(udp)) + udp


def shim(of: Draw, geneve: bool) -> bytes:
    """A VXLAN or Geneve header; bits that a receiver must ignore are drawn at random."""
    vni = of.field("vni", w.VNI, 0, 8, 0xFFFFFF) << 8 | of.draw(st.sampled_from([0, 0xFF]))
    ignored = of.draw(st.sampled_from([0, 0x37]))
    if not geneve:
        return struct.pack(">BBHI", of.field("i-flag", 0x08, 0) | ignored, 0, 0, vni)
    options = b""
    for words in of.draw(st.lists(st.sampled_from([0, 1, 30]), max_size=2)):
        kind = of.field("critical", 1, 0x81)
        options += struct.pack(">HBB", 0x0102, kind, words) + b"\xff" * words * 4
    first = len(options) // 4 + of.field("options", 0, 1, 0x3F - len(options) // 4)
    flags = of.field("control", 0, 0x80) | of.field("critical", 0, 0, 0x40) | ignored
    kind = of.field("type", 0x6558, 0x0800)
    return struct.pack(">BBHI", first | of.field("version", 0, 0x40), flags, kind, vni) + options


@st.composite
def tunnelled(draw, world) -> bytes:
    """A frame from the uplink: every second one a right tunnel packet, the others with a flaw."""
    of = Draw(draw)
    body = shim(of, world.tunnel == value("TUNNEL_GENEVE")) + inner_frame(of)
    size = 8 + len(body) + of.field("lie", 0, 1, -1, -8, -30)
    port = 53 if of.flaw == "forged" else of.field("port", world.port, 53)
    segment = struct.pack(">HHHH", 5, port, size, 0) + body
    protocol, tos = of.field("protocol", 17, 6, 253), draw(st.integers(0, 255))
    if world.underlay == 4:
        source = of.field("source", w.REMOTE4, ip_address("192.0.2.77"))
        source = of.field("forged", source, *FORGED4)
        word = of.field("fragment", 0x4000, 0x2000, 5)
        ip = b"\x08\x00" + header4(source, w.NODE4, tos, protocol, len(segment), word)
    else:
        source = of.field("source", w.REMOTE6, ip_address("2001:db8::77"))
        source = of.field("forged", source, *FORGED6)
        ip = b"\x86\xdd" + header6(source, w.NODE6, tos, protocol, len(segment))
    frame = bytes(12) + ip + segment
    cut = of.field("cut", len(frame), 42, 50, 58, 70, 90)
    return frame[:cut] + bytes(of.field("padding", 0, 6))


def expected(world, frame: bytes) -> tuple[bytes, dict]:
    remote = int(w.REMOTE4 if world.underlay == 4 else w.REMOTE6)

    def remotes(kind: int, source: int) -> int | None:
        address = ip_address(source.to_bytes(4 if kind == 4 else 16, "big"))
        return remote if address in (w.FAR4 if kind == 4 else w.FAR6) else None

    def ours(kind: int, source: int) -> bool:
        return node.route(ip_address(source.to_bytes(4 if kind == 4 else 16, "big")))[0] in OURS

    open_shim = twin.vxlan if world.tunnel == value("TUNNEL_VXLAN") else twin.geneve
    return twin.from_uplink(frame, world.port, w.VNI, open_shim, remotes, ours)


@pytest.mark.parametrize("underlay", [4, 6])
@pytest.mark.parametrize("tunnel", ["TUNNEL_VXLAN", "TUNNEL_GENEVE"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_way_in_is_its_twin(worlds, tunnel, underlay, data):
    world = worlds(tunnel, underlay)
    frames = data.draw(st.lists(tunnelled(world), min_size=1, max_size=12))
    world.load([(UPLINK, frame) for frame in frames])
    b = world.batch
    parse(b)
    admit(b, world.tables)
    for i, frame in enumerate(frames):
        try:
            inner, found = expected(world, frame)
        except Refused as refused:
            assert b.verdict[i] == VERDICT_DROP, (frame.hex(), str(refused))
            assert b.reason[i] == value(f"REASON_{refused}"), (frame.hex(), str(refused))
            continue
        assert b.verdict[i] == VERDICT_PENDING, (frame.hex(), int(b.reason[i]))
        start = int(b.address[i]) - world.area.ctypes.data
        assert world.area[start : start + int(b.length[i])].tobytes() == inner
        assert (b.total[i], b.tos[i], b.kind[i]) == (len(inner), found["tos"], found["kind"])
        way_in = FLAG_OUTSIDE if found["outside"] else FLAG_DECAPSULATED
        assert b.flags[i] & (FLAG_OUTSIDE | FLAG_DECAPSULATED) == way_in


def test_the_way_in_counts_later_segments(world):
    """A packet in two segments: the tunnel's header leaves the first one."""
    body = struct.pack(">II", 0x08 << 24, w.VNI << 8) + bytes(12) + b"\x08\x00"
    body += header4(SOURCES4[0], w.POD4[POD_A], 0, 253, 3000) + bytes(3000)
    segment = struct.pack(">HHHH", 5, world.port, 8 + len(body), 0) + body
    whole = bytes(12) + b"\x08\x00" + header4(w.REMOTE4, w.NODE4, 0, 17, len(segment)) + segment
    world.load([(UPLINK, whole[:2048])])
    b = world.batch
    b.total[0] = len(whole)
    parse(b)
    admit(b, world.tables)
    assert b.verdict[0] == VERDICT_PENDING
    assert (b.length[0], b.total[0]) == (2048 - 50, len(whole) - 50)


# --- neighbour solicitations that nobody on the link sent --------------------------------------


def solicitation(source, target):
    return IPv6(src=source, dst=target, hlim=255) / ICMPv6ND_NS(tgt=str(w.ROUTER6))


def through_the_tunnel(world, packet) -> bytes:
    inner = raw(Ether() / packet)
    body = struct.pack(">II", 0x08 << 24, w.VNI << 8) + inner
    segment = struct.pack(">HHHH", 5, world.port, 8 + len(body), 0) + body
    return bytes(12) + b"\x08\x00" + header4(w.REMOTE4, w.NODE4, 0, 17, len(segment)) + segment


def test_a_solicitation_out_of_the_tunnel_is_not_answered_on_the_underlay(world):
    multicast = through_the_tunnel(world, solicitation("fd00:1:2::9", "ff02::1:ff00:1"))
    assert world.one(UPLINK, multicast).reason == value("REASON_MULTICAST")
    unicast = through_the_tunnel(world, solicitation("fd00:1:2::9", str(w.ROUTER6)))
    assert world.one(UPLINK, unicast).egress == w.HOST


def test_a_solicitation_from_the_uplink_is_not_answered(worlds):
    world = worlds("TUNNEL_NONE")
    frame = raw(Ether() / solicitation("2001:db8:f::9", str(w.ROUTER6)))
    assert world.one(UPLINK, frame).egress == w.HOST


def test_a_fragment_is_no_solicitation(world):
    """RFC 6980; what follows the header of a later fragment is not even ICMPv6."""
    whole = solicitation(str(w.POD6[POD_A]), "ff02::1:ff00:1")
    ask = raw(whole)[40:]
    head = IPv6(src=whole.src, dst=whole.dst, hlim=255)
    for fragment in (IPv6ExtHdrFragment(m=1, nh=58), IPv6ExtHdrFragment(offset=3, nh=58)):
        result = world.one(POD_A, raw(Ether() / head / fragment / Raw(ask)))
        assert result.dropped
        assert result.reason == value("REASON_MULTICAST")
