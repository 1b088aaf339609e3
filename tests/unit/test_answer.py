"""When the node answers, and when it is silent: RFC 1812 4.3.2, RFC 4443 2.4, RFC 4861 7.1.1."""

from ipaddress import ip_network

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.all import ARP, ICMP, IP, UDP, Ether, IPv6, Raw, raw
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    ICMPv6ND_Redirect,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
)
from scapy.layers.vxlan import VXLAN

from dataplane.kernels.batch import VERDICT_SEND
from tests import worlds as w
from tests.worlds import HOST, POD_A, UPLINK
from xdp.abi import value

MAC, A = w.GATEWAY_MAC.hex(":"), w.POD_MACS[POD_A].hex(":")
L2 = Ether(src=A, dst=MAC)
A4, A6 = str(w.POD4[POD_A]), str(w.POD6[POD_A])
ROUTER4, ROUTER6 = str(w.ROUTER4), str(w.ROUTER6)
NOWHERE4, NOWHERE6 = "10.99.0.1", "fd99::1"
BROADCAST = "ff:ff:ff:ff:ff:ff"
KINDS4 = [(64, 3), (64, 4), (64, 5), (1, 11), (64, 12)]  # TTL, type of an ICMP error
KINDS6 = [
    (64, ICMPv6DestUnreach),
    (64, ICMPv6PacketTooBig),
    (1, ICMPv6TimeExceeded),
    (64, ICMPv6ParamProblem),
]


def in_segments(world, frame: bytes, first: int):
    """Send a frame whose first segment has `first` bytes; return the batch."""
    world.load([(POD_A, frame[:first])])
    world.batch.total[0] = len(frame)
    world.batch.segments[0] = 1
    world.process()
    return world.batch


def tunnelled(inner) -> bytes:
    outside = Ether(src=w.NEIGHBOUR_MAC.hex(":"), dst=w.UPLINK_MAC.hex(":"))
    ip = IP(src=str(w.REMOTE4), dst=str(w.NODE4))
    return raw(outside / ip / UDP(sport=50000, dport=8472, chksum=0) / VXLAN(vni=w.VNI) / inner)


def test_an_arp_reply_is_no_longer_than_arp(world):
    ask = raw(Ether(src=A, dst=BROADCAST) / ARP(hwsrc=A, psrc=A4, pdst=ROUTER4))
    assert len(world.one(POD_A, ask + bytes(18)).frame) == 42
    b = in_segments(world, ask + bytes(50_000), first=2000)
    assert (b.verdict[0], b.length[0], b.total[0]) == (VERDICT_SEND, 42, 42)


def test_an_error_about_a_packet_of_several_segments_quotes_the_first(world):
    frame = raw(L2 / IP(src=A4, dst=NOWHERE4) / UDP() / Raw(bytes(9000)))
    b = in_segments(world, frame, first=200)
    assert (b.verdict[0], b.length[0], b.total[0]) == (VERDICT_SEND, 214 + 14, 214 + 14)
    six = raw(L2 / IPv6(src=A6, dst=NOWHERE6) / UDP() / Raw(bytes(9000)))
    b = in_segments(world, six, first=3000)
    assert (b.length[0], b.total[0]) == (1294, 1294)


def test_a_large_ping_is_answered_with_its_segments(world):
    frame = raw(L2 / IP(src=A4, dst=ROUTER4) / ICMP(id=3) / Raw(bytes(range(256)) * 20))
    b = in_segments(world, frame, first=1000)
    assert b.reason[0] == value("REASON_ANSWERED_ECHO")
    assert (b.length[0], b.total[0]) == (1000, len(frame))
    start = int(b.address[0]) - world.area.ctypes.data
    reply = Ether(world.area[start : start + 1000].tobytes() + frame[1000:])
    claimed = reply[ICMP].chksum
    del reply[ICMP].chksum
    assert Ether(raw(reply))[ICMP].chksum == claimed


@pytest.mark.parametrize("code", [0, 7, 255])
def test_an_echo_reply_keeps_code_and_payload(world, code):
    ask = L2 / IP(src=A4, dst=ROUTER4, tos=3, ttl=1) / ICMP(code=code, id=1, seq=2) / Raw(b"abc")
    got = Ether(world.one(POD_A, raw(ask)).frame)
    assert (got[ICMP].type, got[ICMP].code, got[IP].ttl) == (0, code, 64)
    claimed = got[ICMP].chksum
    del got[ICMP].chksum
    assert Ether(raw(got))[ICMP].chksum == claimed


@pytest.mark.parametrize(
    "packet",
    [
        IP(src=A4, dst=ROUTER4, options=[b"\x07\x07\x04\x00\x00\x00\x00\x00"]) / ICMP(),
        IPv6(src=A6, dst=ROUTER6) / IPv6ExtHdrDestOpt() / ICMPv6EchoRequest(),
        IP(src=A4, dst=ROUTER4, flags="MF") / ICMP() / Raw(bytes(8)),
        IP(src=A4, dst=ROUTER4) / ICMP(type=13),
        IP(src=A4, dst=str(w.NODE4)) / ICMP(),
        IP(src=A4, dst=ROUTER4, ttl=1) / UDP(dport=53),
    ],
)
def test_the_rest_for_the_gateway_goes_to_the_node_untouched(world, packet):
    sent = raw(L2 / packet)
    result = world.one(POD_A, sent)
    assert (result.sent, result.reason, result.egress) == (True, 0, HOST)
    assert result.frame[14:] == sent[14:]


@pytest.mark.parametrize(
    ("frame", "name"),
    [
        (Ether(src=A, dst=BROADCAST) / IP(src=A4, dst=NOWHERE4) / UDP(), "UNROUTABLE"),
        (L2 / IP(src=A4, dst="224.0.0.9", ttl=1) / UDP(), "MULTICAST"),
        (L2 / IP(src="0.0.0.0", dst=NOWHERE4) / UDP(), "INVALID_SOURCE_IP"),
        (L2 / IP(src=A4, dst=NOWHERE4, chksum=5) / UDP(), "L3_CHECKSUM"),
        (L2 / IPv6(src=A6, dst="ff05::2", hlim=1) / UDP(), "MULTICAST"),
        (Ether(src=A, dst=BROADCAST) / IPv6(src=A6, dst=NOWHERE6) / UDP(), "UNROUTABLE"),
    ],
)
def test_no_error_is_sent_about(world, frame, name):
    result = world.one(POD_A, raw(frame / Raw(bytes(48))))
    assert result.dropped
    assert result.reason == value(f"REASON_{name}")


LOST4, LOST6 = "10.98.0.1", "fd98::1"


@pytest.fixture
def lost(world):
    """Targets that pod A has a connection to, and whose routes have gone since."""
    for text, ip in ((LOST4, IP(src=A4, dst=LOST4)), (LOST6, IPv6(src=A6, dst=LOST6))):
        network = ip_network(text)
        world.writer.set_route(network, world.far())
        assert world.one(POD_A, raw(L2 / ip / UDP(sport=1, dport=2))).sent
        world.writer.delete_route(network)


def quoted(ip, port=2):
    """What the target has sent to pod A, as an error of pod A quotes it."""
    source, target = (LOST4, A4) if ip is IP else (LOST6, A6)
    return raw(ip(src=source, dst=target) / UDP(sport=port, dport=1))


@pytest.mark.parametrize(
    ("error", "reason"),
    [(IP(src=A4, dst=LOST4, ttl=ttl) / ICMP(type=kind), "UNROUTABLE") for ttl, kind in KINDS4]
    + [(IPv6(src=A6, dst=LOST6, hlim=hops) / kind(), "UNROUTABLE") for hops, kind in KINDS6]
    + [(IPv6(src=A6, dst=LOST6) / ICMPv6ND_Redirect(), "CT_INVALID")],  # it quotes elsewhere
)
@pytest.mark.usefixtures("lost")
def test_no_error_is_sent_about_an_error(world, error, reason):
    """The connection is known, so that the error gets as far as the missing route."""
    result = world.one(POD_A, raw(L2 / error / Raw(quoted(type(error)))))
    assert result.dropped
    assert result.reason == value(f"REASON_{reason}")


@pytest.mark.parametrize(
    "error",
    [IP(src=A4, dst=NOWHERE4) / ICMP(type=kind) for _, kind in KINDS4]
    + [IPv6(src=A6, dst=NOWHERE6) / kind() for _, kind in KINDS6]
    + [IPv6(src=A6, dst=NOWHERE6) / ICMPv6ND_Redirect()],
)
def test_an_error_about_nothing_that_is_known_is_dropped(world, error):
    result = world.one(POD_A, raw(L2 / error / Raw(quoted(type(error), port=3))))
    assert result.dropped
    assert result.reason == value("REASON_CT_INVALID")


@pytest.mark.parametrize("ip", [IP(src=A4, dst=NOWHERE4, id=77), IPv6(src=A6, dst=NOWHERE6)])
def test_no_error_is_sent_about_a_later_fragment(world, ip):
    if isinstance(ip, IP):
        first = IP(src=ip.src, dst=ip.dst, id=77, flags="MF") / UDP(sport=1, dport=2, len=40)
        later = IP(src=ip.src, dst=ip.dst, id=77, frag=2, proto=17)
    else:
        first = ip / IPv6ExtHdrFragment(nh=17, m=1, id=77) / UDP(sport=1, dport=2, len=40)
        later = ip / IPv6ExtHdrFragment(nh=17, offset=2, id=77)
    assert world.one(POD_A, raw(L2 / first / Raw(bytes(8)))).egress == POD_A
    result = world.one(POD_A, raw(L2 / later / Raw(bytes(48))))
    assert result.dropped
    assert result.reason == value("REASON_UNROUTABLE")


def test_an_error_is_an_atomic_datagram_that_quotes_all_of_a_short_packet(world):
    sent = L2 / IP(src=A4, dst=NOWHERE4) / UDP(sport=1, dport=2) / Raw(b"abc")
    got = Ether(world.one(POD_A, raw(sent) + bytes(15)).frame)  # Ethernet padding is not quoted
    assert (got[IP].flags, got[IP].ttl, got[IP].tos) == ("DF", 64, 0xC0)
    assert raw(got[ICMP])[8:] == raw(sent[IP])


def test_without_a_router_address_there_are_no_errors(worlds):
    world = worlds("TUNNEL_VXLAN", 4, rate=999)
    world.writer.set_node(router4=0, router6_hi=0, router6_lo=0)
    try:
        for packet in (IP(src=A4, dst=NOWHERE4) / UDP(), IPv6(src=A6, dst=NOWHERE6) / UDP()):
            result = world.one(POD_A, raw(L2 / packet))
            assert result.dropped
            assert result.reason == value("REASON_UNROUTABLE")
    finally:
        world._node(999)


# --- neighbour solicitations -------------------------------------------------------------------


def solicitation(source=A6, **fields):
    ip = IPv6(src=source, dst=ROUTER6, **fields)
    return Ether(src=A, dst=MAC) / ip / ICMPv6ND_NS(tgt=ROUTER6)


def test_a_unicast_solicitation_is_answered(world):
    assert world.one(POD_A, raw(solicitation())).reason == value("REASON_ANSWERED_ND")


def test_a_solicitation_that_crossed_a_router_is_none(world):
    result = world.one(POD_A, raw(solicitation(hlim=254)))
    assert result.reason != value("REASON_ANSWERED_ND")


@pytest.mark.parametrize("damage", ["checksum", "code", "fragment"])
def test_a_damaged_solicitation_is_not_answered(world, damage):
    frame = solicitation()
    if damage == "checksum":
        frame[ICMPv6ND_NS].cksum = 7
    elif damage == "code":
        frame[ICMPv6ND_NS].code = 1
    else:  # RFC 6980: neighbour discovery is never fragmented
        whole = Ether(raw(frame))
        fragment = IPv6ExtHdrFragment(nh=58, m=1) / Raw(raw(whole[ICMPv6ND_NS]))
        frame = L2 / IPv6(src=A6, dst=ROUTER6, hlim=255) / fragment
    result = world.one(POD_A, raw(frame))
    assert result.reason != value("REASON_ANSWERED_ND")
    assert result.egress != POD_A


def test_a_solicitation_from_an_uplink_is_not_answered(worlds):
    inner = Ether(src=w.REMOTE_MAC.hex(":"), dst=MAC)
    inner /= IPv6(src="fd00:1:2::9", dst=ROUTER6, hlim=255) / ICMPv6ND_NS(tgt=ROUTER6)
    for world, frame in (
        (worlds(), tunnelled(inner)),
        (worlds("TUNNEL_NONE"), raw(inner)),
    ):
        result = world.one(UPLINK, frame)
        assert result.reason != value("REASON_ANSWERED_ND")
        assert result.egress != UPLINK


# --- the token bucket --------------------------------------------------------------------------


class Bucket:
    """The bucket in exact arithmetic: tokens are fractions of a packet, time is nanoseconds."""

    def __init__(self, rate: int, burst: int, now: int) -> None:
        self.rate, self.burst, self.now = rate, burst, now
        self.units = burst * 10**9

    def take(self, now: int, wanted: int) -> int:
        self.units = min(self.burst * 10**9, self.units + (now - self.now) * self.rate)
        self.now = now
        given = min(wanted, self.units // 10**9)
        self.units -= given * 10**9
        return given


@settings(max_examples=60, deadline=None)
@given(
    rate=st.sampled_from([1, 3, 7, 1000, 999_983, 4_000_000_000]),
    burst=st.integers(1, 50),
    steps=st.lists(
        st.tuples(st.integers(0, 10**4) | st.integers(0, 2 * 10**9), st.integers(1, 40)),
        min_size=1,
        max_size=12,
    ),
)
def test_the_bucket_is_its_twin(worlds, rate, burst, steps):
    world = worlds("TUNNEL_VXLAN", 4, rate=17)
    world.writer.set_node(error_rate=rate, error_burst=burst)
    world.now += 3600 * 10**9
    ping = raw(L2 / IP(src=A4, dst=ROUTER4) / ICMP())
    world.tables.buckets[:] = 0  # never used: the first look fills it
    twin = Bucket(rate, burst, world.now)
    given, expected = 0, 0
    for wait, wanted in steps:
        world.now += wait
        given += sum(result.sent for result in world.run([(POD_A, ping)] * wanted))
        expected += twin.take(world.now, wanted)
        # The kernel counts in thousandths of a packet, and loses less than one of them in all.
        assert expected - 1 <= given <= expected
    denied = int(world.tables.buckets[2])
    assert denied == sum(wanted for _, wanted in steps) - given


def test_rate_zero_answers_nothing_but_arp_and_nd(worlds):
    world = worlds("TUNNEL_VXLAN", 4, rate=0)
    world.tables.buckets[:] = np.array([5000, 0, 0, 0])
    ping = world.one(POD_A, raw(L2 / IP(src=A4, dst=ROUTER4) / ICMP()))
    assert ping.reason == value("REASON_RATE_LIMITED")
    arp = raw(Ether(src=A, dst=BROADCAST) / ARP(hwsrc=A, psrc=A4, pdst=ROUTER4))
    assert world.one(POD_A, arp).reason == value("REASON_ANSWERED_ARP")
    assert world.one(POD_A, raw(solicitation())).reason == value("REASON_ANSWERED_ND")
