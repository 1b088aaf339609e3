"""What leaves, byte by byte: the kernel against its twin, which sums every checksum anew."""

import struct
from ipaddress import IPv4Address, ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels.batch import VERDICT_SEND
from dataplane.tables.model import Adjacency
from tests import worlds as w
from tests.naive import forward as twin
from tests.naive import headers, node
from tests.worlds import HEADROOM, POD_A

TARGETS4 = [w.POD4[w.POD_B], w.NODE4, w.ROUTER4, *map(ip_address, ("10.1.2.9", "198.51.100.7"))]
TARGETS6 = [w.POD6[w.POD_B], w.NODE6, w.ROUTER6, *map(ip_address, ("fd00:1:2::9", "2001:db8:f::1"))]


def ip4(target, segment, *, tos=0, word=0, ident=0, ttl=64, protocol=253, options=b"") -> bytes:
    """A frame with IPv4 from pod A."""
    size = 20 + len(options) + len(segment)
    start = struct.pack(">BBHHHBB", 0x45 + len(options) // 4, tos, size, ident, word, ttl, protocol)
    ends = w.POD4[POD_A].packed + target.packed + options
    check = struct.pack(">H", ~headers.ones_sum(start + ends) & 0xFFFF)
    return bytes(12) + b"\x08\x00" + start + check + ends + segment


def ip6(target, segment, *, tos=0, label=0, ttl=64, protocol=253) -> bytes:
    """A frame with IPv6 from pod A."""
    start = struct.pack(">IHBB", 6 << 28 | tos << 20 | label, len(segment), protocol, ttl)
    ends = w.POD6[POD_A].packed + target.packed
    return bytes(12) + b"\x86\xdd" + start + ends + segment


@st.composite
def routable(draw) -> bytes:
    """A frame of pod A that may go on."""
    protocol = draw(st.sampled_from([17, 253]))
    data = draw(st.binary(max_size=30)) * draw(st.sampled_from([1, 1, 30]))
    if protocol == 17:
        source, target = draw(st.integers(0, 65535)), draw(st.sampled_from([53, 4789, 65535]))
        data = struct.pack(">HHHH", source, target, 8 + len(data), 0) + data
    tos, ttl = draw(st.integers(0, 255)), draw(st.integers(2, 255))
    padding = bytes(draw(st.sampled_from([0, 0, 7])))
    if draw(st.booleans()):
        options = b"\x01" * 4 * draw(st.sampled_from([0, 0, 1, 10]))
        word, ident = draw(st.sampled_from([0, 0x4000, 0x2000, 9])), draw(st.integers(0, 65535))
        frame = ip4(
            draw(st.sampled_from(TARGETS4)), data, tos=tos, word=word, ident=ident, ttl=ttl,
            protocol=protocol, options=options,
        )  # fmt: skip
        return frame + padding
    label = draw(st.integers(0, 0xFFFFF))
    target6 = draw(st.sampled_from(TARGETS6))
    return ip6(target6, data, tos=tos, label=label, ttl=ttl, protocol=protocol) + padding


def way(world, found: dict) -> Adjacency:
    """The adjacency that tests/worlds.py gives the target of a packet."""
    size = 4 if found["kind"] == 4 else 16
    return node.adjacency(world, ip_address(found["target"].to_bytes(size, "big")))


WORLDS = [
    ("TUNNEL_NONE", 4),
    ("TUNNEL_VXLAN", 4),
    ("TUNNEL_VXLAN", 6),
    ("TUNNEL_GENEVE", 4),
    ("TUNNEL_GENEVE", 6),
]


def first_of(frame: bytes, found: dict) -> bytes:
    """The first fragment of a later one's datagram: without it, the later one would wait."""
    header = bytearray(frame[14 : found["l4"]])
    size = len(header) + 8
    header[2:4], header[6:8], header[10:12] = struct.pack(">H", size), b"\x20\x00", bytes(2)
    header[10:12] = struct.pack(">H", ~headers.ones_sum(bytes(header)) & 0xFFFF)
    return frame[:14] + bytes(header) + struct.pack(">HHHH", 5, 6, 8, 0)


@pytest.mark.parametrize(("tunnel", "underlay"), WORLDS)
@settings(max_examples=60, deadline=None)
@given(frames=st.lists(routable(), min_size=1, max_size=16))
def test_the_way_out_is_its_twin(worlds, tunnel, underlay, frames):
    world = worlds(tunnel, underlay)
    later = [(frame, found) for frame in frames if (found := headers.parse(frame))["later"]]
    world.run([(POD_A, first_of(frame, found)) for frame, found in later])
    results = world.run([(POD_A, frame) for frame in frames])
    for i, (frame, result) in enumerate(zip(frames, results, strict=True)):
        found = headers.parse(frame)
        adjacency = way(world, found)
        assert (result.verdict, result.reason) == (VERDICT_SEND, 0), frame.hex()
        assert result.egress == adjacency.port
        assert result.frame == twin.forward(frame, found, adjacency), frame.hex()
        assert world.untouched(i, len(frame))


@pytest.mark.parametrize("check", [0x0000, 0x0001, 0x00FF, 0xFEFE, 0xFEFF, 0xFF00, 0xFFFE])
def test_counting_down_is_right_at_the_edges_of_the_checksum(world, check):
    """RFC 1624 section 3: the incremental sum must not confuse 0x0000 and 0xFFFF."""
    target = w.POD4[w.POD_B]
    others = headers.ones_sum(ip4(target, b"")[14:24] + ip4(target, b"")[26:34])
    ident = (~check - others) & 0xFFFF
    ident = next(n & 0xFFFF for n in (ident, ident - 1) if _check(target, n & 0xFFFF) == check)
    frame = ip4(target, b"", ident=ident)
    found = headers.parse(frame)
    assert world.one(POD_A, frame).frame == twin.forward(frame, found, way(world, found))


def _check(target: IPv4Address, ident: int) -> int:
    return struct.unpack(">H", ip4(target, b"", ident=ident)[24:26])[0]


@pytest.mark.parametrize("underlay", [4, 6])
def test_a_packet_in_segments_is_encapsulated_as_a_whole(worlds, underlay):
    """Only the first segment is at hand; lengths are those of the packet."""
    world = worlds("TUNNEL_VXLAN", underlay)
    frame = ip4(ip_address("10.1.2.9"), bytes(range(256)) * 5)
    world.load([(POD_A, frame[:300])])
    b = world.batch
    b.total[0] = len(frame)
    world.process()
    found = headers.parse(frame)
    whole = twin.forward(frame, found, world.far())
    size = len(whole) - len(frame) + 300
    start = int(b.address[0]) - world.area.ctypes.data
    assert start == HEADROOM + 300 - size
    assert (b.verdict[0], b.length[0], b.total[0]) == (VERDICT_SEND, size, len(whole))
    assert world.area[start : start + size].tobytes() == whole[:size]
