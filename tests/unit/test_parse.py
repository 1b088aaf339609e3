"""What parse promises beyond its twin: what scapy reads in a frame, segments, and RFC rules."""

import struct

import pytest
from scapy.all import ICMP, IP, TCP, UDP, Ether, IPv6, Raw, fragment, raw
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6MLReport2,
    ICMPv6PacketTooBig,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.sctp import SCTP

from dataplane.kernels import batch as columns
from dataplane.kernels.parse import parse
from tests import worlds as w
from tests.worlds import POD_A
from xdp.abi import value

L2 = Ether(src="0a:00:00:00:00:01", dst=w.GATEWAY_MAC.hex(":"))
A4, A6 = str(w.POD4[POD_A]), str(w.POD6[POD_A])
TO4, TO6 = "10.1.2.9", "fd00:1:2::9"
IP4, IP6 = IP(src=A4, dst=TO4), IPv6(src=A6, dst=TO6)


def parsed(world, frames, first=None):
    """The batch after parse; `first`: bytes in the first segment, the rest came in others."""
    world.load([(POD_A, raw(frame)) for frame in frames])
    if first is not None:
        world.batch.length[: len(frames)] = first
    parse(world.batch)
    return world.batch


def reason(world, frame, first=None) -> int:
    b = parsed(world, [frame], first)
    return int(b.reason[0]) if b.verdict[0] == columns.VERDICT_DROP else 0


@pytest.mark.parametrize(
    ("packet", "layer"),
    [
        (IP4 / TCP(sport=1, dport=65535) / Raw(b"x"), TCP),
        (IP4 / UDP(sport=53, dport=5353), UDP),
        (IP4 / SCTP(sport=7, dport=8), SCTP),
        (IP(src=A4, dst=TO4, options=[b"\x94\x04\x00\x00"], tos=7, ttl=3) / UDP(dport=4), UDP),
        (IP6 / TCP(sport=1, dport=2), TCP),
        (IP6 / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / UDP(sport=9, dport=8), UDP),
        (IP6 / IPv6ExtHdrRouting(type=4, segleft=0, addresses=["fd00::5"]) / TCP(dport=3), TCP),
        (IPv6(src=A6, dst=TO6, tc=0xB9, hlim=7) / SCTP(sport=1, dport=2), SCTP),
    ],
)
def test_columns_are_what_scapy_reads(world, packet, layer):
    frame = Ether(raw(L2 / packet / Raw(b"payload")))
    b = parsed(world, [frame])
    ip = frame.payload
    assert b.verdict[0] == columns.VERDICT_PENDING, int(b.reason[0])
    assert b.kind[0] == ip.version
    assert (b.source_port[0], b.target_port[0]) == (frame[layer].sport, frame[layer].dport)
    assert b.ip_length[0] == len(ip)
    assert b.l4[0] == raw(frame).index(raw(frame[layer]))
    tos, ttl = (ip.tos, ip.ttl) if ip.version == 4 else (ip.tc, ip.hlim)
    assert (b.tos[0], b.ttl[0]) == (tos, ttl)


def test_padding_behind_a_small_packet_is_forgotten(world):
    packet = L2 / IP4 / UDP(sport=1, dport=2)
    b = parsed(world, [raw(packet) + bytes(18)])
    assert b.verdict[0] == columns.VERDICT_PENDING
    assert b.ip_length[0] == 28


@pytest.mark.parametrize("ip", [IP4, IP6])
def test_a_packet_of_several_segments(world, ip):
    frame = raw(L2 / ip / TCP(sport=1, dport=2) / Raw(bytes(2000)))
    headers = len(frame) - 2000
    assert reason(world, frame, first=headers) == 0
    assert reason(world, frame, first=headers - 1) == value("REASON_INVALID_PACKET")
    # Bytes behind the IP packet would be sent on uncounted by the MTU.
    assert reason(world, frame + bytes(500), first=headers) == value("REASON_INVALID_PACKET")


@pytest.mark.parametrize("ip", [IP4, IP6])
def test_udp_needs_its_header_in_the_first_segment_only(world, ip):
    frame = raw(L2 / ip / UDP(sport=1, dport=2) / Raw(bytes(2000)))
    headers = len(frame) - 2000
    assert reason(world, frame, first=headers) == 0
    assert reason(world, frame, first=headers - 1) == value("REASON_INVALID_PACKET")


def test_all_fragments_of_a_datagram_have_one_hash_and_only_the_first_has_ports(world):
    pieces = fragment(IP4 / UDP(sport=1, dport=2, len=1608) / Raw(bytes(1600)), 600)
    b = parsed(world, [L2 / piece for piece in pieces])
    count = len(pieces)
    assert count == 3
    assert len(set(b.hash[:count].tolist())) == 1
    assert b.target_port[:count].tolist() == [2, 0, 0]
    assert [bool(f & columns.FLAG_LATER_FRAGMENT) for f in b.flags[:count]] == [False, True, True]
    assert all(f & columns.FLAG_FRAGMENT for f in b.flags[:count])
    six = [
        L2 / IP6 / IPv6ExtHdrFragment(nh=17, offset=0, m=1) / UDP(sport=1, dport=2, len=99),
        L2 / IP6 / IPv6ExtHdrFragment(nh=17, offset=5, m=0) / Raw(bytes(40)),
    ]
    b = parsed(world, six)
    assert b.hash[0] == b.hash[1]
    assert b.target_port[:2].tolist() == [2, 0]


def test_hashes_of_flows_differ(world):
    flows = [L2 / IP4 / UDP(sport=n, dport=53) for n in range(64)]
    flows += [L2 / IP(src=A4, dst=f"10.1.2.{n}") / TCP() for n in range(64)]
    flows += [L2 / IPv6(src=A6, dst=f"fd00:1:2::{n:x}") / TCP() for n in range(64)]
    hashes = parsed(world, flows).hash[: len(flows)].tolist()
    assert len(set(hashes)) == len(flows)
    # The low 14 bits choose the tunnel's source port, see forward.
    assert len({h & 0x3FFF for h in hashes}) > len(flows) - 10


def test_an_atomic_fragment_is_a_whole_packet(world):
    atomic = L2 / IP6 / IPv6ExtHdrFragment(nh=17, offset=0, m=0) / UDP(sport=1, dport=2)
    b = parsed(world, [atomic])  # RFC 6946
    assert not b.flags[0] & columns.FLAG_FRAGMENT
    assert b.target_port[0] == 2


@pytest.mark.parametrize(
    ("packet", "name"),
    [
        (IP(src=A4, dst=TO4, chksum=1) / UDP(), "L3_CHECKSUM"),
        (IP(src="0.0.0.0", dst=TO4) / UDP(), "INVALID_SOURCE_IP"),
        (IP(src="224.0.0.1", dst=TO4) / UDP(), "INVALID_SOURCE_IP"),
        (IP(src="255.255.255.255", dst=TO4) / UDP(), "INVALID_SOURCE_IP"),
        (IP(src=A4, dst="127.0.0.1") / UDP(), "UNKNOWN_TARGET"),
        (IPv6(src="::1", dst=TO6) / UDP(), "INVALID_SOURCE_IP"),
        (IPv6(src="ff02::1", dst=TO6) / UDP(), "INVALID_SOURCE_IP"),
        (IPv6(src="::ffff:10.1.1.2", dst=TO6) / UDP(), "INVALID_SOURCE_IP"),
        (IPv6(src=A6, dst="fe80::1") / UDP(), "UNKNOWN_TARGET"),
        (IPv6(src=A6, dst="::ffff:10.1.1.2") / UDP(), "UNKNOWN_TARGET"),
        (IPv6(src=A6, dst="::") / UDP(), "UNKNOWN_TARGET"),
        # RFC 1858: a first fragment without the flags, and one that overwrites them.
        (IP(src=A4, dst=TO4, flags="MF", proto=6) / Raw(bytes(8)), "INVALID_PACKET"),
        (IP(src=A4, dst=TO4, frag=1, proto=6) / Raw(bytes(40)), "INVALID_PACKET"),
        # A last fragment beyond 65535: the ping of death.
        (IP(src=A4, dst=TO4, frag=8191, proto=1) / Raw(bytes(40)), "INVALID_PACKET"),
        # RFC 7112: the first fragment holds the whole header chain.
        (IP6 / IPv6ExtHdrFragment(nh=60, m=1) / Raw(b"\x3c\x09" + bytes(14)), "INVALID_EXTENSION"),
        (IP6 / IPv6ExtHdrRouting(type=0, addresses=["fd00::5"]) / TCP(), "INVALID_EXTENSION"),
        (IPv6(src=A6, dst=TO6, plen=0) / IPv6ExtHdrHopByHop() / TCP(), "INVALID_EXTENSION"),
        (IP4 / TCP(dataofs=4), "INVALID_PACKET"),
        (IP4 / TCP(dataofs=15), "INVALID_PACKET"),
        (IP4 / UDP(len=7), "INVALID_PACKET"),
        (IP4 / UDP(len=100), "INVALID_PACKET"),
    ],
)
def test_what_is_refused(world, packet, name):
    assert reason(world, L2 / packet) == value(f"REASON_{name}")


@pytest.mark.parametrize(("headers", "name"), [(8, None), (9, "INVALID_EXTENSION")])
def test_a_chain_has_at_most_eight_headers(world, headers, name):
    packet = IP6
    for _ in range(headers):
        packet = packet / IPv6ExtHdrDestOpt()
    expected = value(f"REASON_{name}") if name else 0
    assert reason(world, L2 / packet / UDP(dport=1)) == expected


@pytest.mark.parametrize(
    ("ether_type", "name"),
    [
        (0x8100, "VLAN"),
        (0x88A8, "VLAN"),
        (0x05DC, "UNSUPPORTED_L2"),
        (0x0026, "UNSUPPORTED_L2"),
        (0x8847, "UNSUPPORTED_L3"),
        (0x0806, "INVALID_PACKET"),
    ],
)
def test_what_is_neither_arp_nor_ip(world, ether_type, name):
    frame = raw(L2)[:12] + struct.pack(">H", ether_type) + bytes(46)
    assert reason(world, frame) == value(f"REASON_{name}")


@pytest.mark.parametrize(
    ("packet", "error"),
    [(IP4 / ICMP(type=kind), kind in (3, 4, 5, 11, 12)) for kind in range(19)]
    + [
        (IP6 / ICMPv6PacketTooBig(), True),
        (IP6 / ICMPv6EchoRequest(), False),
        (IP6 / Raw(b"\x89" + bytes(39)), True),  # redirect, RFC 4443 2.4 e
        (IP6 / ICMPv6MLReport2(records_number=0), False),
    ],
)
def test_icmp_errors_are_known(world, packet, error):
    packet = packet.copy()
    if isinstance(packet, IPv6):
        packet.nh = 58
    b = parsed(world, [L2 / packet / Raw(bytes(28))])
    assert b.verdict[0] == columns.VERDICT_PENDING
    assert bool(b.flags[0] & columns.FLAG_ICMP_ERROR) == error


def test_multicast_is_flagged_in_both_layers(world):
    frames = [
        Ether(src="0a:00:00:00:00:01", dst="ff:ff:ff:ff:ff:ff") / IP(src=A4, dst=TO4) / UDP(),
        L2 / IP(src=A4, dst="255.255.255.255") / UDP(),
        L2 / IPv6(src=A6, dst="ff02::1") / UDP(),
        L2 / IP4 / UDP(),
    ]
    flags = parsed(world, frames).flags[:4] & (columns.FLAG_MULTICAST | columns.FLAG_L2_MULTICAST)
    expected = [columns.FLAG_L2_MULTICAST, columns.FLAG_MULTICAST, columns.FLAG_MULTICAST, 0]
    assert flags.tolist() == expected
