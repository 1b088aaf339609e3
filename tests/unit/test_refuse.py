"""How packets are refused: resets and ICMP messages, when, by whom, with which numbers.

RFC 9293 3.10.7.1 (resets), RFC 792, RFC 1812 4.3.2 and 5.2.7.1, RFC 4443 2.4 and 3.1.
"""

import struct
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.all import IP, TCP, Ether, IPv6, raw
from scapy.layers.inet6 import IPv6ExtHdrDestOpt

from tests import segments as sg
from tests import worlds as w
from tests.naive.rewrite import completed
from tests.places import (
    FAMILIES,
    FAR,
    NODE,
    OUT,
    PEERS,
    ROUTER,
    SERVICES,
    VIPS,
    A,
    B,
    inside,
    is_drop,
    send,
)
from tests.segments import ACK, FIN, RST, SYN
from tests.setting import DENY, Agent, Policy, Setting, word
from tests.worlds import HOST, POD_A, POD_B, SECOND, UPLINK
from xdp.abi import value

BY_FAMILY = pytest.mark.parametrize("f", FAMILIES)
DENIED = value("REASON_POLICY_DENIED")


@pytest.fixture(scope="module")
def stage(worlds):
    world = worlds("TUNNEL_VXLAN", 4, 1_000_000, 1, 1024)
    return world, Agent(world)


@pytest.fixture
def told(stage):
    """Return a function that denies everything in a way."""
    world, agent = stage
    world.forget()
    world.now += SECOND

    def tell(answer: str, side: str = "egress", port: int = POD_A):
        no = Policy(**{f"{side}_otherwise": word(DENY, 9, answer)})
        agent.write(Setting(peers=PEERS, policies={port: no}, services=SERVICES))
        return world

    return tell


def right(packet) -> bool:
    """Scapy computes the same checksums; quoted packets keep theirs."""
    data = raw(packet)
    at = 20 if packet.version == 4 else 40
    protocol = data[9] if packet.version == 4 else data[6]
    return completed(data, at, protocol) == data and raw(type(packet)(data)) == data


# --- resets -------------------------------------------------------------------------------------


@BY_FAMILY
@settings(max_examples=60, deadline=None)
@given(
    flags=st.integers(0, 255),
    data=st.binary(max_size=30),
    sequence=st.sampled_from([0, 7, (1 << 32) - 1, (1 << 32) - 5]),
    seen=st.sampled_from([0, 9, (1 << 32) - 1]),
)
def test_a_reset_is_what_rfc_9293_says(stage, f, flags, data, sequence, seen):
    """With ACK: <SEQ=SEG.ACK><CTL=RST>; else <SEQ=0><ACK=SEG.SEQ+SEG.LEN><CTL=RST,ACK>."""
    world, agent = stage
    world.now += SECOND
    no = Policy(egress_otherwise=word(DENY, 9, "RESET"))
    agent.write(Setting(peers=PEERS, policies={POD_A: no}))
    e = sg.Ends(A[f], 1000, B[f], 80)
    result = world.one(POD_A, sg.tcp(e, flags, data, sequence, seen))
    assert result.reason == DENIED
    if flags & RST:
        assert result.dropped
        return
    assert result.egress == POD_A
    got = inside(result).payload
    tcp = got[TCP]
    assert (got.src, got.dst) == (str(B[f]), str(A[f]))  # as if its target had said it
    assert (tcp.sport, tcp.dport, tcp.dataofs, len(tcp)) == (80, 1000, 5, 20)
    if flags & ACK:
        assert (tcp.seq, tcp.ack, tcp.flags) == (seen, 0, "R")
    else:
        size = len(data) + bool(flags & SYN) + bool(flags & FIN)
        assert (tcp.seq, tcp.ack, tcp.flags) == (0, (sequence + size) % (1 << 32), "RA")
    assert right(got)


@BY_FAMILY
def test_a_reset_counts_the_data_of_all_segments(told, f):
    world = told("RESET")
    frame = sg.tcp(sg.Ends(A[f], 1000, B[f], 80), 0, bytes(900), sequence=5)
    world.load_segments(POD_A, frame, [200, 300])
    world.process()
    b = world.batch
    start = int(b.address[0]) - world.area.ctypes.data
    got = Ether(world.area[start : start + int(b.length[0])].tobytes()).payload
    assert got[TCP].ack == 905
    assert int(b.total[0]) == int(b.length[0]) == 14 + len(got)
    assert right(got)


def test_a_reset_of_a_segment_with_options(told):
    """What stood between the headers is gone from the answer."""
    world = told("RESET")
    l2 = Ether(src=w.POD_MACS[POD_A].hex(":"), dst=w.GATEWAY_MAC.hex(":"))
    four = IP(src=str(A[4]), dst=str(B[4]), options=[b"\x01\x01\x01\x00"])
    six = IPv6(src=str(A[6]), dst=str(B[6])) / IPv6ExtHdrDestOpt()
    for ip in (four, six):
        tcp = TCP(sport=1, dport=2, flags="S", options=[("MSS", 1400)])
        got = inside(world.one(POD_A, raw(l2 / ip / tcp))).payload
        assert got[TCP].ack == 1
        assert len(got) == (40 if ip is four else 60)
        assert right(got)


# --- ICMP ---------------------------------------------------------------------------------------


@BY_FAMILY
@pytest.mark.parametrize("answer", ["ICMP", "RESET"])
@pytest.mark.parametrize("make", [sg.udp, sg.sctp, sg.echo, sg.gre, sg.tcp])
def test_administratively_prohibited(told, f, answer, make):
    """Code 13 (RFC 1812 5.2.7.1), code 1 (RFC 4443 3.1); also where only TCP could be reset."""
    if make is sg.tcp and answer == "RESET":
        return
    world = told(answer)
    frame = make(sg.Ends(A[f], 1000, B[f], 0 if make in (sg.echo, sg.gre) else 80))
    result = world.one(POD_A, frame)
    assert (result.reason, result.egress) == (DENIED, POD_A)
    got = inside(result).payload
    icmp = got.payload
    assert (got.src, got.dst) == (str(ROUTER[f]), str(A[f]))
    assert (icmp.type, icmp.code) == ((3, 13) if f == 4 else (1, 1))
    assert raw(icmp)[8:] == frame[14:]
    assert right(got)


@BY_FAMILY
@pytest.mark.parametrize("vip", [1, 4])
def test_port_unreachable(stage, f, vip):
    """What nobody serves is refused as by a host without a listener: code 3, code 4."""
    world, agent = stage
    agent.write(Setting(peers=PEERS, services=SERVICES))
    world.forget()
    frame = sg.udp(sg.Ends(A[f], 1000, VIPS[f][vip], 53))
    result = world.one(POD_A, frame)
    assert (result.reason, result.egress) == (value("REASON_NO_BACKEND"), POD_A)
    icmp = inside(result).payload.payload
    assert (icmp.type, icmp.code) == ((3, 3) if f == 4 else (1, 4))
    assert raw(icmp)[8:] == frame[14:]  # as it was sent: not translated
    tcp = world.one(POD_A, sg.tcp(sg.Ends(A[f], 1000, VIPS[f][vip], 81 if vip == 1 else 80)))
    got = inside(tcp).payload
    assert (got.src, got[TCP].flags) == (str(VIPS[f][vip]), "RA")
    assert right(got)


@BY_FAMILY
@pytest.mark.parametrize("masquerade", [True, False])
def test_a_client_outside_hears_from_the_nodes_own_address(stage, f, masquerade):
    """RFC 5508 REQ-5c: nobody outside has a way to the router's, which is a pod network's."""
    world, agent = stage
    agent.write(Setting(services=SERVICES, peers=PEERS, masquerade=masquerade))
    world.forget()
    frame = sg.udp(sg.Ends(OUT[f], 1000, VIPS[f][4], 53))
    result = world.one(UPLINK, frame)
    assert (result.reason, result.egress) == (value("REASON_NO_BACKEND"), UPLINK)
    got = inside(result).payload
    assert (got.src, got.dst) == (str(NODE[f] if masquerade else ROUTER[f]), str(OUT[f]))
    assert raw(got.payload)[8:] == frame[14:]
    assert right(got)


@BY_FAMILY
@pytest.mark.parametrize("answer", ["DROP", "ICMP", "RESET"])
@pytest.mark.parametrize("what", ["later", "multicast", "broadcast", "error"])
def test_never_in_answer_to(stage, f, answer, what):
    """RFC 1812 4.3.2.7, RFC 4443 2.4 e: errors, later fragments, what went to many."""
    world, agent = stage
    agent.write(Setting(peers=PEERS))
    world.forget()
    e = sg.Ends(A[f], 1000, B[f], 80)
    world.one(POD_A, sg.udp(e))
    answered = raw(inside(world.one(POD_B, sg.udp(e.back()))).payload)
    no = Policy(egress_otherwise=word(DENY, 9, answer))
    agent.write(Setting(peers=PEERS, policies={POD_A: no}))
    frame = bytearray(sg.udp(e))
    if what == "broadcast":
        frame[:6] = b"\xff" * 6
    elif what == "error":
        frame = bytearray(sg.error(e, *((3, 3) if f == 4 else (1, 4)), answered))
    elif what == "multicast":
        group = ip_address("224.0.0.9" if f == 4 else "ff05::2")
        frame = bytearray(sg.udp(e._replace(target=group)))
    else:
        first, later = (fragment(e, offset) for offset in (0, 80))
        assert world.one(POD_A, first).reason == DENIED
        frame = bytearray(later)
    result = world.one(POD_A, bytes(frame))
    assert result.dropped
    assert result.reason == (value("REASON_MULTICAST") if what == "multicast" else DENIED)


def fragment(e: sg.Ends, offset: int) -> bytes:
    body = struct.pack(">HHHH", e.source_port, e.target_port, 500, 1) + bytes(72)
    if e.source.version == 4:
        head = struct.pack(">BBHHHBBH", 0x45, 0, 100, 5, offset >> 3 | 0x2000, 64, 17, 0)
        return sg.ethernet(completed(head + e.source.packed + e.target.packed + body, 20, 0))
    shim = struct.pack(">BBHI", 17, 0, offset | 1, 5)
    head = struct.pack(">IHBB", 6 << 28, 88, 44, 64)
    return sg.ethernet(head + e.source.packed + e.target.packed + shim + body)


@BY_FAMILY
def test_a_first_fragment_of_tcp_is_not_reset(told, f):
    """Its length is not known, so neither is the number to acknowledge."""
    world = told("RESET")
    body = struct.pack(">HHIIBBHHH", 1000, 80, 5, 0, 0x50, SYN, 9, 0, 0) + bytes(60)
    e = sg.Ends(A[f], 1000, B[f], 80)
    if f == 4:
        head = struct.pack(">BBHHHBBH", 0x45, 0, 100, 5, 0x2000, 64, 6, 0)
        packet = completed(head + e.source.packed + e.target.packed + body, 20, 0)
    else:
        shim = struct.pack(">BBHI", 6, 0, 1, 5)
        packet = struct.pack(">IHBB", 6 << 28, 88, 44, 64) + e.source.packed + e.target.packed
        packet += shim + body
    assert is_drop(world.one(POD_A, sg.ethernet(packet)), "POLICY_DENIED")


# --- who is told, and how often ---------------------------------------------------------------


@BY_FAMILY
@pytest.mark.parametrize("answer", ["ICMP", "RESET"])
def test_whoever_is_denied_is_told_where_it_is(told, f, answer):
    """By the receiver's policy: pods, the node, other nodes through the tunnel, outside."""
    world = told(answer, "ingress", POD_B)
    for source, egress in ((A[f], POD_A), (NODE[f], HOST), (FAR[f], UPLINK), (OUT[f], UPLINK)):
        result = send(world, sg.tcp(sg.Ends(source, 1000, B[f], 80)))
        assert (result.reason, result.egress) == (DENIED, egress)
        got = inside(result).payload
        assert got.dst == str(source)
        assert got.src == str(B[f] if answer == "RESET" else ROUTER[f])
        assert right(got)
        outer = Ether(result.frame).payload
        assert outer.dst == (str(w.REMOTE4) if source == FAR[f] else str(source))


@BY_FAMILY
@pytest.mark.parametrize("answer", ["ICMP", "RESET"])
def test_a_live_connection_that_is_cut_is_told_on_both_sides(stage, f, answer):
    world, agent = stage
    agent.write(Setting(peers=PEERS))
    world.forget()
    world.now += SECOND
    e = sg.Ends(A[f], 1000, B[f], 80)
    for frame in (sg.tcp(e), sg.tcp(e.back(), SYN | ACK), sg.tcp(e, ACK)):
        assert send(world, frame).reason == 0
    no = Policy(ingress_otherwise=word(DENY, 9, answer))
    agent.write(Setting(peers=PEERS, policies={POD_B: no}))
    for _ in range(2):
        for ends, port in ((e, POD_A), (e.back(), POD_B)):
            result = send(world, sg.tcp(ends, ACK, b"more"))
            assert (result.reason, result.egress) == (DENIED, port)
            got = inside(result).payload
            assert got.dst == str(ends.source)
            if answer == "RESET":
                assert (got.src, got[TCP].seq, got[TCP].flags) == (str(ends.target), 9, "R")


@BY_FAMILY
def test_a_denied_client_of_a_service_hears_of_the_service(told, f):
    """It has never heard of the backend: the reset comes from the address that it asked."""
    world = told("RESET", "ingress", POD_B)
    got = inside(send(world, sg.tcp(sg.Ends(A[f], 1000, VIPS[f][2], 80)))).payload
    assert (got.src, got[TCP].sport) == (str(VIPS[f][2]), 80)
    world = told("ICMP", "ingress", POD_B)
    result = send(world, sg.tcp(sg.Ends(A[f], 1000, VIPS[f][2], 80)))
    icmp = inside(result).payload.payload
    quoted = (IP if f == 4 else IPv6)(raw(icmp)[8:])
    assert (quoted.dst, quoted[TCP].dport) == (str(VIPS[f][2]), 80)


@pytest.mark.parametrize("answer", ["ICMP", "RESET"])
def test_refusals_draw_on_the_token_bucket(stage, answer):
    """RFC 1812 4.3.2.8: a flood of denied packets is answered at most so often, and counted."""
    world, agent = stage
    no = Policy(egress_otherwise=word(DENY, 9, answer))
    agent.write(Setting(peers=PEERS, policies={POD_A: no}))
    world.writer.set_node(error_rate=10, error_burst=7)
    try:
        world.now += 60 * SECOND
        results = world.run([(POD_A, sg.tcp(sg.Ends(A[4], n, B[4], 80))) for n in range(1, 101)])
        assert sum(result.sent for result in results) == 7
        assert {r.reason for r in results if r.dropped} == {value("REASON_RATE_LIMITED")}
        assert (world.batch.refusal[:100] == word(DENY, 9, answer)).all()
    finally:
        world.writer.set_node(error_rate=1_000_000, error_burst=1_000_000)


def test_silence_is_the_default(told):
    world = told("DROP")
    for frame in (sg.tcp(sg.Ends(A[4], 1, B[4], 80)), sg.udp(sg.Ends(A[4], 1, B[4], 80))):
        assert is_drop(world.one(POD_A, frame), "POLICY_DENIED")
