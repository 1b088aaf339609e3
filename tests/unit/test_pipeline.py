"""All stages, frame by frame; scapy builds what goes in and judges what comes out."""

import pytest
from scapy.all import ARP, ICMP, IP, TCP, UDP, Ether, IPv6, Raw, raw
from scapy.contrib.geneve import GENEVE, GeneveOptions
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
)
from scapy.layers.vxlan import VXLAN

from tests import worlds as w
from tests.worlds import HOST, POD_A, POD_B, UPLINK
from xdp.abi import value

MAC = w.GATEWAY_MAC.hex(":")
A = w.POD_MACS[POD_A].hex(":")
A4, B4, A6, B6 = str(w.POD4[POD_A]), str(w.POD4[POD_B]), str(w.POD6[POD_A]), str(w.POD6[POD_B])
FAR4, FAR6 = "10.1.2.9", "fd00:1:2::9"
# Scapy asks the network for a MAC that it is not given.
INNER = Ether(src=w.REMOTE_MAC.hex(":"), dst=MAC)


def ether(dst=MAC, src=A):
    return Ether(dst=dst, src=src)


def checksums_hold(packet, quotes=None) -> bool:
    """Scapy computes the same bytes again once all checksums are deleted.

    quotes: layer of an ICMP error, whose quoted packet is cut off and keeps its checksums.
    """
    again = packet.copy()
    if quotes is not None:
        error = again[quotes]
        quoted = raw(error.payload)
        error.remove_payload()
        error.add_payload(Raw(quoted))
    layer = again
    while layer:
        for name in ("chksum", "cksum"):
            if name in getattr(layer, "fields", {}) and not (
                isinstance(layer, UDP) and layer.chksum == 0
            ):
                delattr(layer, name)
        layer = layer.payload
    return raw(again) == raw(packet)


@pytest.mark.parametrize(("ip", "target"), [(IP, B4), (IPv6, B6)])
def test_a_pod_reaches_another_on_its_node(world, ip, target):
    source = A4 if ip is IP else A6
    sent = ether() / ip(src=source, dst=target) / UDP(sport=1000, dport=53) / Raw(b"question")
    result = world.one(POD_A, raw(sent))
    assert result.sent
    assert result.egress == POD_B
    got = Ether(result.frame)
    assert (got.src, got.dst) == (MAC, w.POD_MACS[POD_B].hex(":"))
    assert (got[ip].ttl if ip is IP else got[ip].hlim) == 63
    assert got[UDP].payload == sent[UDP].payload
    assert checksums_hold(got)


@pytest.mark.parametrize("underlay", [4, 6])
@pytest.mark.parametrize("tunnel", ["TUNNEL_VXLAN", "TUNNEL_GENEVE"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_pod_reaches_another_node_through_the_tunnel(worlds, tunnel, underlay, family):
    world = worlds(tunnel, underlay)
    ip = IP(src=A4, dst=FAR4, tos=0xB9) if family == 4 else IPv6(src=A6, dst=FAR6, tc=0xB9)
    result = world.one(POD_A, raw(ether() / ip / TCP(sport=4000, dport=80) / Raw(b"x" * 100)))
    assert result.egress == UPLINK
    got = Ether(result.frame)
    outer = got.payload
    assert (got.src, got.dst) == (w.UPLINK_MAC.hex(":"), w.NEIGHBOUR_MAC.hex(":"))
    assert outer.version == underlay
    if underlay == 4:
        assert (outer.src, outer.dst) == (str(w.NODE4), str(w.REMOTE4))
        assert (outer.ttl, outer.tos, outer.flags) == (64, 0xB9, "DF")
        assert outer.len == len(got) - 14
    else:
        assert (outer.src, outer.dst) == (str(w.NODE6), str(w.REMOTE6))
        assert (outer.hlim, outer.tc, outer.plen) == (64, 0xB9, len(got) - 54)
        assert outer.fl
    udp = outer[UDP]
    assert (udp.dport, udp.chksum, udp.len) == (world.port, 0, len(raw(udp)))
    assert 49152 <= udp.sport <= 65535
    shim = got[VXLAN] if tunnel == "TUNNEL_VXLAN" else got[GENEVE]
    assert shim.vni == w.VNI
    inner = shim.payload
    assert (inner.src, inner.dst) == (MAC, w.REMOTE_MAC.hex(":"))
    assert inner[TCP].payload == Raw(b"x" * 100)
    assert checksums_hold(inner)


def test_the_source_port_is_the_same_for_a_flow_and_differs_between_flows(world):
    def port(sport):
        frame = raw(ether() / IP(src=A4, dst=FAR4) / UDP(sport=sport, dport=9) / Raw(b"y"))
        return Ether(world.one(POD_A, frame).frame)[UDP].sport

    assert port(1) == port(1)
    assert len({port(number) for number in range(1, 65)}) > 32


def outer(world, inner, vni=w.VNI, flags=0x08, dport=None, tos=0, source=None):
    ip = (
        IP(src=source or str(w.REMOTE4), dst=str(w.NODE4), tos=tos)
        if world.underlay == 4
        else IPv6(src=source or str(w.REMOTE6), dst=str(w.NODE6), tc=tos)
    )
    shim = (
        VXLAN(vni=vni, flags=flags)
        if world.tunnel == value("TUNNEL_VXLAN")
        else GENEVE(vni=vni, proto=0x6558)
    )
    udp = UDP(sport=55555, dport=dport or world.port, chksum=0)
    return raw(
        Ether(src=w.NEIGHBOUR_MAC.hex(":"), dst=w.UPLINK_MAC.hex(":")) / ip / udp / shim / inner
    )


def arriving(target=A4, source=FAR4, tos=0):
    return INNER / IP(src=source, dst=target, tos=tos) / UDP(sport=7, dport=8) / Raw(b"z" * 40)


@pytest.mark.parametrize("underlay", [4, 6])
@pytest.mark.parametrize("tunnel", ["TUNNEL_VXLAN", "TUNNEL_GENEVE"])
def test_tunnel_packets_reach_the_pod(worlds, tunnel, underlay):
    world = worlds(tunnel, underlay)
    result = world.one(UPLINK, outer(world, arriving()))
    assert result.sent, result
    assert result.egress == POD_A
    got = Ether(result.frame)
    assert (got.dst, got[IP].ttl, got[Raw].load) == (A, 63, b"z" * 40)
    assert checksums_hold(got)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (lambda x: outer(x, arriving(), vni=8), "REASON_WRONG_VNI"),
        (lambda x: outer(x, arriving(), flags=0), "REASON_INVALID_TUNNEL"),
        (lambda x: outer(x, arriving(source="10.1.1.3")), "REASON_INVALID_SOURCE_IP"),
        (lambda x: outer(x, arriving(), source="192.0.2.77"), "REASON_INVALID_SOURCE_IP"),
        (lambda x: outer(x, arriving(source="198.51.100.1")), "REASON_INVALID_SOURCE_IP"),
        (lambda x: outer(x, ARP()), "REASON_UNSUPPORTED_L2"),
        (lambda x: outer(x, INNER / ARP()), "REASON_UNSUPPORTED_L3"),
        (lambda x: outer(x, arriving())[:60], "REASON_INVALID_PACKET"),
        (lambda x: outer(x, arriving(target=FAR4)), "REASON_UNROUTABLE"),
        (lambda x: outer(x, arriving(), tos=3), "REASON_INVALID_TUNNEL"),
    ],
)
def test_bad_tunnel_packets_are_dropped_with_their_reason(world, frame, reason):
    result = world.one(UPLINK, frame(world))
    assert result.dropped
    assert result.reason == value(reason)


@pytest.mark.parametrize(
    ("inner", "outside", "expected"),
    [  # RFC 6040 figure 4
        (0, 0, 0), (0, 1, 0), (0, 2, 0), (2, 0, 2), (2, 1, 1), (2, 2, 2), (2, 3, 3),
        (1, 0, 1), (1, 1, 1), (1, 2, 1), (1, 3, 3), (3, 0, 3), (3, 3, 3),
    ],
)  # fmt: skip
def test_congestion_marks_follow_rfc_6040(world, inner, outside, expected):
    result = world.one(UPLINK, outer(world, arriving(tos=0xB8 | inner), tos=outside))
    got = Ether(result.frame)
    assert got[IP].tos == 0xB8 | expected
    assert checksums_hold(got)


@pytest.mark.parametrize(("kind", "reason"), [(0x81, "REASON_CRITICAL_OPTION"), (0x01, None)])
def test_an_unknown_critical_geneve_option_is_a_drop(worlds, kind, reason):
    world = worlds("TUNNEL_GENEVE", 4)
    option = GeneveOptions(classid=0x0102, type=kind, data=b"opts")
    frame = Ether(outer(world, arriving()))
    shim = GENEVE(vni=w.VNI, proto=0x6558, options=[option]) / arriving()
    udp = UDP(sport=55555, dport=world.port, chksum=0)
    outside = IP(src=str(w.REMOTE4), dst=str(w.NODE4))
    result = world.one(UPLINK, raw(Ether(src=frame.src, dst=frame.dst) / outside / udp / shim))
    assert result.sent == (reason is None)
    assert result.reason == (value(reason) if reason else 0)


# --- who may send what -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (IP(src="10.1.1.3", dst=B4) / UDP(), "REASON_INVALID_SOURCE_IP"),
        (IPv6(src=B6, dst=B6) / UDP(), "REASON_INVALID_SOURCE_IP"),
        (IP(src=A4, dst=FAR4) / UDP(dport=8472), "REASON_ENCAPSULATION_PROHIBITED"),
        (IP(src=A4, dst="224.0.0.1") / UDP(), "REASON_MULTICAST"),
        (IPv6(src="fe80::1", dst="ff02::2") / UDP(), "REASON_MULTICAST"),
        (IP(src="127.0.0.1", dst=B4) / UDP(), "REASON_INVALID_SOURCE_IP"),
    ],
)
def test_a_pod_may_not_send(world, packet, reason):
    result = world.one(POD_A, raw(ether() / packet))
    assert result.dropped
    assert result.reason == value(reason)


def test_a_vlan_tag_is_a_drop(world):
    frame = raw(ether() / IP(src=A4, dst=B4) / UDP())
    tagged = frame[:12] + b"\x81\x00\x00\x05" + frame[12:]
    assert world.one(POD_A, tagged).reason == value("REASON_VLAN")


def test_the_node_reaches_its_pods_and_pods_the_node(world):
    down = raw(Ether(dst=MAC) / IP(src=str(w.ROUTER4), dst=A4) / TCP(dport=80))
    assert world.one(HOST, down).egress == POD_A
    up = raw(ether() / IP(src=A4, dst=str(w.NODE4), ttl=1) / TCP(dport=10250))
    result = world.one(POD_A, up)
    assert result.egress == HOST
    assert Ether(result.frame).dst == w.HOST_MAC.hex(":")
    assert Ether(result.frame)[IP].ttl == 1


def test_direct_routing_leaves_packets_as_they_are(worlds):
    world = worlds("TUNNEL_NONE")
    result = world.one(POD_A, raw(ether() / IP(src=A4, dst=FAR4) / UDP() / Raw(b"d")))
    got = Ether(result.frame)
    assert (result.egress, got.dst) == (UPLINK, w.NEIGHBOUR_MAC.hex(":"))
    assert (got[IP].src, got[IP].dst, got[IP].ttl) == (A4, FAR4, 63)
    back = raw(INNER / IP(src=FAR4, dst=A4) / UDP() / Raw(b"e"))
    assert world.one(UPLINK, back).egress == POD_A
    forged = raw(INNER / IP(src=B4, dst=A4) / UDP())
    assert world.one(UPLINK, forged).reason == value("REASON_INVALID_SOURCE_IP")


# --- what the node answers ---------------------------------------------------------------------


def test_arp_for_the_gateway_is_answered(world):
    ask = ether("ff:ff:ff:ff:ff:ff") / ARP(op=1, hwsrc=A, psrc=A4, pdst=str(w.ROUTER4))
    result = world.one(POD_A, raw(ask))
    assert result.reason == value("REASON_ANSWERED_ARP")
    got = Ether(result.frame)
    assert (result.egress, got.dst, got[ARP].op) == (POD_A, A, 2)
    assert (got[ARP].hwsrc, got[ARP].psrc) == (MAC, str(w.ROUTER4))
    assert (got[ARP].hwdst, got[ARP].pdst) == (A, A4)


@pytest.mark.parametrize(("who", "reason"), [(B4, "UNKNOWN_TARGET"), (None, "INVALID_SOURCE_IP")])
def test_other_arp_is_not_answered(world, who, reason):
    ask = ARP(op=1, hwsrc=A, psrc=A4 if who else "10.9.9.9", pdst=who or str(w.ROUTER4))
    result = world.one(POD_A, raw(ether("ff:ff:ff:ff:ff:ff") / ask))
    assert result.dropped
    assert result.reason == value(f"REASON_{reason}")


@pytest.mark.parametrize("source", [A6, "fe80::a"])
def test_a_neighbour_solicitation_for_the_gateway_is_answered(world, source):
    ask = (
        ether("33:33:ff:00:00:01")
        / IPv6(src=source, dst="ff02::1:ff00:1")
        / ICMPv6ND_NS(tgt=str(w.ROUTER6))
        / ICMPv6NDOptSrcLLAddr(lladdr=A)
    )
    result = world.one(POD_A, raw(ask))
    assert result.reason == value("REASON_ANSWERED_ND")
    got = Ether(result.frame)
    assert (got.dst, got[IPv6].src, got[IPv6].dst) == (A, str(w.ROUTER6), source)
    assert (got[IPv6].hlim, got[ICMPv6ND_NA].tgt) == (255, str(w.ROUTER6))
    assert (got[ICMPv6ND_NA].R, got[ICMPv6ND_NA].S, got[ICMPv6ND_NA].O) == (1, 1, 1)
    assert got[ICMPv6NDOptDstLLAddr].lladdr == MAC
    assert checksums_hold(got)


def test_duplicate_address_detection_is_not_answered(world):
    probe = ether("33:33:ff:00:00:01") / IPv6(src="::", dst="ff02::1:ff00:1")
    result = world.one(POD_A, raw(probe / ICMPv6ND_NS(tgt=str(w.ROUTER6))))
    assert result.dropped


@pytest.mark.parametrize("size", [0, 1, 56, 1400])
def test_pings_of_the_gateway_are_answered(world, size):
    ask = ether() / IP(src=A4, dst=str(w.ROUTER4)) / ICMP(id=5, seq=9) / Raw(b"p" * size)
    result = world.one(POD_A, raw(ask))
    assert result.reason == value("REASON_ANSWERED_ECHO")
    got = Ether(result.frame)
    assert (got.dst, got[IP].src, got[IP].dst) == (A, str(w.ROUTER4), A4)
    assert (got[ICMP].type, got[ICMP].id, got[ICMP].seq) == (0, 5, 9)
    assert checksums_hold(got)
    six = ether() / IPv6(src=A6, dst=str(w.ROUTER6)) / ICMPv6EchoRequest(id=5, data=b"p" * size)
    got = Ether(world.one(POD_A, raw(six)).frame)
    assert (got[IPv6].src, got[ICMPv6EchoReply].id) == (str(w.ROUTER6), 5)
    assert checksums_hold(got)


ERRORS4 = [
    ({"dst": "10.1.1.99"}, 3, 1, "REASON_UNROUTABLE"),
    ({"dst": "10.99.0.1"}, 3, 0, "REASON_UNROUTABLE"),
    ({"dst": B4, "ttl": 1}, 11, 0, "REASON_TTL_EXCEEDED"),
]


@pytest.mark.parametrize(("fields", "kind", "code", "reason"), ERRORS4)
def test_icmp_errors(world, fields, kind, code, reason):
    sent = ether() / IP(src=A4, **fields) / UDP(sport=1, dport=2) / Raw(b"q" * 700)
    result = world.one(POD_A, raw(sent))
    assert result.reason == value(reason)
    got = Ether(result.frame)
    assert (result.egress, got.dst, got[IP].src, got[IP].dst) == (POD_A, A, str(w.ROUTER4), A4)
    assert (got[ICMP].type, got[ICMP].code) == (kind, code)
    assert len(got) == 14 + 576
    assert raw(got[ICMP])[8:] == raw(sent[IP])[: 576 - 28]
    assert checksums_hold(got, ICMP)


ERRORS6 = [
    ({"dst": "fd00:1:1::99"}, ICMPv6DestUnreach, 3),
    ({"dst": "fd99::1"}, ICMPv6DestUnreach, 0),
    ({"dst": B6, "hlim": 1}, ICMPv6TimeExceeded, 0),
]


@pytest.mark.parametrize(("fields", "kind", "code"), ERRORS6)
def test_icmp6_errors(world, fields, kind, code):
    sent = ether() / IPv6(src=A6, **fields) / UDP(sport=1, dport=2) / Raw(b"q" * 1300)
    got = Ether(world.one(POD_A, raw(sent)).frame)
    assert (got[IPv6].src, got[IPv6].dst, got[kind].code) == (str(w.ROUTER6), A6, code)
    assert len(got) == 14 + 1280
    assert raw(got[kind])[8:] == raw(sent[IPv6])[: 1280 - 48]
    assert checksums_hold(got, kind)


def test_too_big_names_the_path_mtu(world):
    four = ether() / IP(src=A4, dst=FAR4, flags="DF") / UDP() / Raw(b"m" * 1500)
    result = world.one(POD_A, raw(four))
    got = Ether(result.frame)
    assert (got[ICMP].type, got[ICMP].code, got[ICMP].nexthopmtu) == (3, 4, w.PATH_MTU)
    assert result.reason == value("REASON_FRAGMENTATION_NEEDED")
    assert checksums_hold(got, ICMP)
    six = ether() / IPv6(src=A6, dst=FAR6) / UDP() / Raw(b"m" * 1500)
    got = Ether(world.one(POD_A, raw(six)).frame)
    assert got[ICMPv6PacketTooBig].mtu == w.PATH_MTU
    assert checksums_hold(got, ICMPv6PacketTooBig)


@pytest.mark.parametrize(
    "packet",
    [
        IP(src=A4, dst="10.99.0.1") / ICMP(type=3, code=1) / Raw(b"e" * 28),
        IPv6(src=A6, dst="fd99::1") / ICMPv6DestUnreach() / Raw(b"e" * 48),
    ],
)
def test_errors_about_nothing_are_dropped_without_an_error(world, packet):
    result = world.one(POD_A, raw(ether() / packet))
    assert result.dropped
    assert result.reason == value("REASON_CT_INVALID")


def test_a_fragment_before_its_first_is_held(world):
    later = ether() / IP(src=A4, dst=B4, id=9, frag=10, proto=17) / Raw(b"later fragment")
    result = world.one(POD_A, raw(later))
    assert result.held
    assert result.reason == value("REASON_HELD")


def test_errors_for_a_remote_pod_go_back_through_the_tunnel(world):
    inner = INNER / IP(src=FAR4, dst="10.1.1.99") / UDP() / Raw(b"t")
    result = world.one(UPLINK, outer(world, inner))
    got = Ether(result.frame)
    assert (result.egress, got[IP].dst) == (UPLINK, str(w.REMOTE4))
    error = got[VXLAN][IP]
    assert (error.src, error.dst, error[ICMP].type) == (str(w.ROUTER4), FAR4, 3)
    assert checksums_hold(got[VXLAN].payload)


def test_an_unresolved_neighbour_is_a_counted_drop(world):
    result = world.one(POD_A, raw(ether() / IP(src=A4, dst="203.0.113.9") / UDP()))
    assert result.dropped
    assert result.reason == value("REASON_FIB_FAILED")


def test_answers_are_rate_limited(worlds):
    world = worlds("TUNNEL_VXLAN", 4, rate=5)
    ping = raw(ether() / IP(src=A4, dst=str(w.ROUTER4)) / ICMP())
    world.now += 10_000_000_000
    results = world.run([(POD_A, ping)] * 20)
    assert sum(result.sent for result in results) == 5
    assert {r.reason for r in results if r.dropped} == {value("REASON_RATE_LIMITED")}
    world.now += 400_000_000
    assert sum(result.sent for result in world.run([(POD_A, ping)] * 20)) == 2
