"""What is rewritten, judged by scapy: every checksum is what it computes anew.

RFC 1624 (incremental sums), RFC 768 and RFC 6936 (no UDP checksum), RFC 4443 2.3, RFC 9260 6.8.
"""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.all import ICMP, IP, TCP, UDP, Ether, IPv6, Raw, defragment6, raw
from scapy.layers.inet import defragment
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6ExtHdrDestOpt
from scapy.layers.sctp import SCTP, SCTPChunkData

from tests import segments as sg
from tests import worlds as w
from tests.naive.rewrite import crc32c, is_right
from tests.places import (
    FAMILIES,
    FAR,
    HTTP,
    NODE,
    OUT,
    PEERS,
    SERVICES,
    VIPS,
    A,
    B,
    inside,
    is_drop,
    send,
)
from tests.setting import Agent, Setting
from tests.worlds import POD_A, POD_B, UPLINK

BY_FAMILY = pytest.mark.parametrize("f", FAMILIES)
L2 = Ether(src=w.POD_MACS[POD_A].hex(":"), dst=w.GATEWAY_MAC.hex(":"))
SUMS = ("chksum", "cksum")


@pytest.fixture(scope="module")
def stage(worlds):
    world = worlds("TUNNEL_VXLAN", 4, 1_000_000, 1, 1024)
    return world, Agent(world)


@pytest.fixture
def world(stage):
    """Masquerading, services, open policies; no connection."""
    world, agent = stage
    agent.write(Setting(peers=PEERS, services=SERVICES, masquerade=True, nat=(50000, 1000)))
    world.forget()
    return world


def as_scapy_says(packet) -> bool:
    """Scapy writes the same bytes once all checksums are deleted."""
    again = packet.copy()
    layer = again
    while layer:
        for name in SUMS:
            if name in getattr(layer, "fields", {}):
                if not isinstance(layer, UDP) or layer.chksum != 0:
                    delattr(layer, name)
        layer = layer.payload
    return raw(again) == raw(packet)


def ip(f: int, source, target, **fields):
    return (IP if f == 4 else IPv6)(src=str(source), dst=str(target), **fields)


TRANSPORTS = {
    "tcp": lambda data: TCP(sport=1000, dport=HTTP, flags="PA", seq=5, ack=6) / Raw(data),
    "udp": lambda data: UDP(sport=1000, dport=HTTP) / Raw(data),
    "sctp": lambda data: SCTP(sport=1000, dport=HTTP, tag=7) / SCTPChunkData(data=data),
}


@BY_FAMILY
@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 700, 1201])
def test_masqueraded_packets_and_their_answers(world, f, kind, size):
    packet = ip(f, A[f], OUT[f]) / TRANSPORTS[kind](bytes(n % 251 for n in range(size)))
    result = world.one(POD_A, raw(L2 / packet))
    assert result.egress == UPLINK
    got = inside(result)
    assert as_scapy_says(got)
    layer = got.payload.payload
    assert (got.payload.src, layer.dport) == (str(NODE[f]), HTTP)
    assert 50000 <= layer.sport < 51000
    answer = ip(f, OUT[f], NODE[f]) / TRANSPORTS[kind](b"answer" * size)
    answer.payload.sport, answer.payload.dport = HTTP, layer.sport
    back = inside(send(world, raw(Ether() / answer)))
    assert as_scapy_says(back)
    assert (back.payload.src, back.payload.dst) == (str(OUT[f]), str(A[f]))
    assert (back.payload.payload.sport, back.payload.payload.dport) == (HTTP, 1000)
    assert raw(back.payload.payload)[20:] == raw(answer.payload)[20:]


@BY_FAMILY
@pytest.mark.parametrize("size", [0, 1, 56])
def test_masqueraded_pings(world, f, size):
    data = bytes(range(size))
    ask = ICMP(id=77, seq=3) / Raw(data) if f == 4 else ICMPv6EchoRequest(id=77, seq=3, data=data)
    got = inside(world.one(POD_A, raw(L2 / ip(f, A[f], OUT[f]) / ask)))
    assert as_scapy_says(got)
    identifier = got.payload.payload.id
    assert 50000 <= identifier < 51000
    answer = ICMP(type=0, id=identifier, seq=3) if f == 4 else ICMPv6EchoReply(id=identifier, seq=3)
    back = inside(send(world, raw(Ether() / ip(f, OUT[f], NODE[f]) / answer)))
    assert as_scapy_says(back)
    assert (back.payload.dst, back.payload.payload.id) == (str(A[f]), 77)


@BY_FAMILY
@pytest.mark.parametrize("kind", [13, 15, 17])
def test_other_queries_of_icmp_have_identifiers_too(world, f, kind):
    """RFC 5508 REQ-1: timestamp, information, mask."""
    if f == 6:
        return
    got = inside(world.one(POD_A, raw(L2 / ip(4, A[4], OUT[4]) / ICMP(type=kind, id=77))))
    assert as_scapy_says(got)
    answer = ip(4, OUT[4], NODE[4]) / ICMP(type=kind + 1, id=got[ICMP].id)
    back = inside(send(world, raw(Ether() / answer)))
    assert as_scapy_says(back)
    assert (back[IP].dst, back[ICMP].id) == (str(A[4]), 77)


@BY_FAMILY
@pytest.mark.parametrize("kind", ["tcp", "sctp", "udp"])
def test_services_both_ways(world, f, kind):
    front = {"tcp": (VIPS[f][2], HTTP, 8080), "udp": (VIPS[f][5], 53, 53),
             "sctp": (VIPS[f][6], 9, 99)}[kind]  # fmt: skip
    vip, port, real = front
    packet = ip(f, A[f], vip) / TRANSPORTS[kind](b"question")
    packet.payload.dport = port
    result = world.one(POD_A, raw(L2 / packet))
    got = inside(result)
    assert as_scapy_says(got)
    backend = B[f] if result.egress == POD_B else FAR[f]
    assert (got.payload.dst, got.payload.payload.dport) == (str(backend), real)
    answer = ip(f, backend, A[f]) / TRANSPORTS[kind](b"answers")
    answer.payload.sport, answer.payload.dport = real, 1000
    back = inside(send(world, raw(L2 / answer)))
    assert as_scapy_says(back)
    assert (back.payload.src, back.payload.payload.sport) == (str(vip), port)


@pytest.mark.parametrize("f", FAMILIES)
def test_a_udp_checksum_that_is_none_stays_none(world, f):
    """RFC 768; over IPv6 RFC 6935 and RFC 6936 4.1: tunnels send it, and it must not become one."""
    frame = bytearray(sg.udp(sg.Ends(A[f], 1000, OUT[f], 4789)))
    at = 14 + (20 if f == 4 else 40)
    frame[at + 6 : at + 8] = bytes(2)
    got = inside(world.one(POD_A, bytes(frame)))
    assert got.payload.src == str(NODE[f])
    assert raw(got)[at + 6 : at + 8] == bytes(2)


@BY_FAMILY
@settings(max_examples=60, deadline=None)
@given(pad=st.binary(min_size=2, max_size=2), data=st.binary(max_size=5))
def test_a_sum_that_becomes_zero_is_sent_as_ones(stage, f, pad, data):
    """UDP whose translated sum is zero: RFC 768. All 65536 sums are reached by two bytes."""
    world, _ = stage
    frame = sg.udp(sg.Ends(A[f], 50001, OUT[f], 53), pad + data)
    left = raw(inside(world.one(POD_A, frame)).payload)
    assert is_right(left, 20 if f == 4 else 40, sg.UDP)
    at = 20 if f == 4 else 40
    # The same packet with the two bytes chosen so that the sum of what leaves is 0xFFFF.
    check = struct.unpack(">H", left[at + 6 : at + 8])[0]
    first = (struct.unpack(">H", pad)[0] + check) % 0xFFFF
    frame = sg.udp(sg.Ends(A[f], 50001, OUT[f], 53), struct.pack(">H", first) + data)
    left = raw(inside(world.one(POD_A, frame)).payload)
    assert left[at + 6 : at + 8] == b"\xff\xff"
    assert is_right(left, at, sg.UDP)


@BY_FAMILY
@pytest.mark.parametrize("sizes", [[300], [100, 1], [100, 700, 33], [80, 1, 1, 1]])
def test_the_crc_of_sctp_goes_over_all_segments(world, f, sizes):
    frame = sg.sctp(sg.Ends(A[f], 1000, OUT[f], 9), sg.DATA, bytes(range(256)) * 4)
    world.load_segments(POD_A, frame, sizes)
    world.process()
    b = world.batch
    start = int(b.address[0]) - world.area.ctypes.data
    head = world.area[start : start + int(b.length[0])].tobytes()
    packet = head[14:] + frame[sizes[0] :]
    at = 20 if f == 4 else 40
    segment = bytearray(packet[at:])
    claimed = segment[8:12]
    segment[8:12] = bytes(4)
    assert claimed == struct.pack("<I", crc32c(bytes(segment)))
    assert packet[at : at + 2] != frame[14 + at : 16 + at]  # the port is another


def test_a_translated_packet_with_options_and_extension_headers(world):
    four = ip(4, A[4], OUT[4], options=[b"\x01\x01\x01\x00"]) / TRANSPORTS["tcp"](b"x")
    assert as_scapy_says(inside(world.one(POD_A, raw(L2 / four))))
    six = ip(6, A[6], OUT[6]) / IPv6ExtHdrDestOpt() / TRANSPORTS["udp"](b"x")
    got = inside(world.one(POD_A, raw(L2 / six)))
    assert as_scapy_says(got)
    assert got[IPv6].src == str(NODE[6])


# --- fragments that are translated ----------------------------------------------------------------


def pieces(f: int, packet, identification: int) -> list:
    """A datagram in three fragments."""
    whole = raw(packet)[20 if f == 4 else 40 :]
    protocol = packet.proto if f == 4 else packet.nh
    cuts = (whole[:400], whole[400:800], whole[800:])
    found = []
    for n, part in enumerate(cuts):
        more = int(n < 2)
        if f == 4:
            head = IP(src=packet.src, dst=packet.dst, id=identification, proto=protocol,
                      flags=more, frag=50 * n)  # fmt: skip
            found.append(raw(L2 / head / Raw(part)))
        else:
            shim = struct.pack(">BBHI", protocol, 0, 400 * n | more, identification)
            head = IPv6(src=packet.src, dst=packet.dst, nh=44)
            found.append(raw(L2 / head / Raw(shim + part)))
    return found


@BY_FAMILY
@pytest.mark.parametrize("kind", ["udp", "tcp", "ping"])
@pytest.mark.parametrize("target", ["outside", "service"])
def test_a_fragmented_packet_is_whole_and_right_at_its_target(world, f, kind, target):
    if kind == "ping":
        ask = ICMP(id=7) if f == 4 else ICMPv6EchoRequest(id=7)
        packet = ip(f, A[f], OUT[f]) / ask / Raw(bytes(range(256)) * 4)
    else:
        there = OUT[f] if target == "outside" else VIPS[f][5 if kind == "udp" else 2]
        packet = ip(f, A[f], there) / TRANSPORTS[kind](bytes(range(256)) * 4)
        packet.payload.dport = 53 if kind == "udp" else HTTP
    packet = type(packet)(raw(packet))  # scapy's own checksums
    results = [world.one(POD_A, frame) for frame in pieces(f, packet, 99)]
    parts = [inside(result).payload for result in results]
    assert len({(part.src, part.dst) for part in parts}) == 1
    whole = defragment(parts)[0] if f == 4 else defragment6(parts)
    whole = type(whole)(raw(whole))
    assert len(whole) == len(packet)
    assert as_scapy_says(whole)
    if kind != "ping" and target == "service":
        assert whole.payload.dport == (53 if kind == "udp" else 8080)
    else:
        assert whole.src == str(NODE[f])


@BY_FAMILY
def test_the_port_of_fragmented_sctp_cannot_be_changed(world, f):
    """Its CRC covers fragments that have not come yet (RFC 9260 6.8): better none than wrong."""
    packet = ip(f, A[f], OUT[f]) / TRANSPORTS["sctp"](bytes(1200))
    assert is_drop(world.one(POD_A, pieces(f, packet, 98)[0]), "NAT_UNSUPPORTED")
    packet.payload.sport = 50001  # a port that is kept: only addresses change
    results = [world.one(POD_A, frame) for frame in pieces(f, packet, 97)]
    parts = [inside(result).payload for result in results]
    whole = defragment(parts)[0] if f == 4 else defragment6(parts)
    assert as_scapy_says(type(whole)(raw(whole)))
