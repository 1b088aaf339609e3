"""ICMP errors: whose they are, who may send them, and that the quoted packet is what was sent.

RFC 792, RFC 4443 2.4; RFC 5508 4 and 5 (NAT); RFC 5927 (errors that nobody sent).
"""

import pytest
from scapy.all import IP, IPv6, raw

from tests import records
from tests import segments as sg
from tests.naive.packets import Tuple, read
from tests.naive.rewrite import completed, is_right
from tests.places import (
    BETWEEN,
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
from tests.setting import DENY, Agent, Policy, Setting, word
from tests.worlds import HOST, POD_A, POD_B, UPLINK
from xdp.abi import value

BY_FAMILY = pytest.mark.parametrize("f", FAMILIES)
UNREACHABLE = {4: (3, 1), 6: (1, 3)}
TOO_BIG = {4: (3, 4), 6: (2, 0)}


@pytest.fixture(scope="module")
def stage(worlds):
    world = worlds("TUNNEL_VXLAN", 4, 1_000_000, 1, 1024)
    return world, Agent(world)


@pytest.fixture
def world(stage):
    """Masquerading, services, open policies; no connection."""
    world, agent = stage
    agent.write(Setting(peers=PEERS, services=SERVICES, masquerade=True))
    world.forget()
    world.now += 1_000_000_000
    return world


def seen_by_target(result) -> bytes:
    """The IP packet that left."""
    return raw(inside(result).payload)


def about(f: int, sender, receiver, packet: bytes, kind=UNREACHABLE, rest=0, most=None) -> bytes:
    """An error of `sender` about a packet, to its receiver."""
    size = most or (28 if f == 4 else 48)
    return sg.error(sg.Ends(sender, 0, receiver, 0), *kind[f], packet[:size], rest)


def quoted(result) -> Tuple:
    """What the error that left quotes."""
    packet = read(0, raw(inside(result).payload))
    assert packet.error
    assert packet.quoted is not None
    return packet.quoted


# --- whose errors pass -------------------------------------------------------------------------


@BY_FAMILY
@pytest.mark.parametrize("make", [sg.udp, sg.tcp, sg.sctp, sg.echo])
@pytest.mark.parametrize("back", [False, True])
def test_an_error_about_a_known_packet_passes_as_it_came(world, f, make, back):
    """From the end itself or a router between, about either direction, without translation."""
    e = sg.Ends(A[f], 1000, FAR[f], 80)
    e = e._replace(target_port=0) if make is sg.echo else e
    packet = seen_by_target(send(world, make(e)))
    sender, receiver, way_out = FAR[f], A[f], POD_A
    if back:
        answer = sg.echo(e.back(), reply=True) if make is sg.echo else make(e.back())
        packet = seen_by_target(send(world, answer))
        sender, receiver, way_out = A[f], FAR[f], UPLINK
    error = about(f, sender, receiver, packet, most=len(packet))
    result = send(world, error)
    assert result.reason == 0
    assert result.egress == way_out
    got = seen_by_target(result)
    assert got[20 if f == 4 else 40 :] == error[14:][20 if f == 4 else 40 :]


@BY_FAMILY
def test_an_error_keeps_nothing_alive_and_counts_nowhere(world, f):
    """RFC 5508 REQ-7 (and RFC 5382, RFC 4787): an error does not end or prolong a mapping."""
    packet = seen_by_target(send(world, sg.udp(sg.Ends(A[f], 1000, OUT[f], 53))))
    (before,) = [row.copy() for row in records.live(world).values()]
    world.now += 5_000_000_000
    assert send(world, about(f, BETWEEN[f], NODE[f], packet)).egress == POD_A
    (after,) = records.live(world).values()
    assert after.tobytes() == before.tobytes()


@BY_FAMILY
def test_an_error_goes_only_to_who_sent_what_it_quotes(world, f):
    """Else a quote of one's own connection would open the way to everybody."""
    packet = seen_by_target(send(world, sg.udp(sg.Ends(A[f], 1000, B[f], 53))))
    back = seen_by_target(send(world, sg.udp(sg.Ends(B[f], 53, A[f], 1000))))
    for receiver in (FAR[f], OUT[f], NODE[f]):
        assert is_drop(send(world, about(f, A[f], receiver, back)), "CT_INVALID")
        assert is_drop(send(world, about(f, B[f], receiver, packet)), "CT_INVALID")
    assert send(world, about(f, A[f], B[f], back)).egress == POD_B


@BY_FAMILY
def test_a_pod_speaks_only_of_what_it_has_received(world, f):
    """A pod is no router: it cannot end the connections of others."""
    packet = seen_by_target(send(world, sg.udp(sg.Ends(A[f], 1000, FAR[f], 53))))
    assert is_drop(send(world, about(f, B[f], A[f], packet)), "CT_INVALID")
    assert send(world, about(f, FAR[f], A[f], packet)).egress == POD_A


@BY_FAMILY
def test_the_node_and_routers_outside_speak_of_what_they_forward(world, f):
    packet = seen_by_target(send(world, sg.udp(sg.Ends(A[f], 1000, FAR[f], 53))))
    assert send(world, about(f, NODE[f], A[f], packet)).egress == POD_A
    assert send(world, about(f, BETWEEN[f], A[f], packet)).egress == POD_A


@BY_FAMILY
def test_an_error_about_nothing_goes_to_the_node_if_it_is_the_nodes(world, f):
    stranger = sg.packet(sg.Ends(NODE[f], 5, OUT[f], 6), sg.UDP, b"\0\5\0\6\0\x08\0\0")
    error = about(f, BETWEEN[f], NODE[f], stranger)
    result = send(world, error)
    assert (result.reason, result.egress) == (0, HOST)
    assert result.frame[14:] == error[14:]
    pods = sg.packet(sg.Ends(A[f], 5, OUT[f], 6), sg.UDP, b"\0\5\0\6\0\x08\0\0")
    assert is_drop(send(world, about(f, BETWEEN[f], A[f], pods)), "CT_INVALID")


@BY_FAMILY
@pytest.mark.parametrize("size", range(0, 48, 3))
def test_a_quote_that_is_cut_before_the_ports_is_about_nothing(world, f, size):
    packet = seen_by_target(send(world, sg.udp(sg.Ends(A[f], 1000, B[f], 53))))
    least = 28 if f == 4 else 48
    frame = sg.error(sg.Ends(B[f], 0, A[f], 0), *UNREACHABLE[f], packet[: min(size, least)])
    assert is_drop(send(world, frame), "CT_INVALID") == (size < least)


@pytest.mark.parametrize("damage", ["version", "header", "later", "protocol", "ports"])
def test_a_quote_that_does_not_fit_is_about_nothing(world, damage):
    packet = bytearray(seen_by_target(send(world, sg.udp(sg.Ends(A[4], 1000, B[4], 53)))))
    where = {"version": (0, 0x65), "header": (0, 0x44), "later": (7, 5), "protocol": (9, 6),
             "ports": (23, 54)}[damage]  # fmt: skip
    packet[where[0]] = where[1]
    assert is_drop(send(world, about(4, B[4], A[4], bytes(packet))), "CT_INVALID")


def test_an_error_about_a_denied_connection_is_denied(stage, world):
    world, agent = stage
    packet = seen_by_target(send(world, sg.udp(sg.Ends(A[4], 1000, B[4], 53))))
    closed = Policy(egress_otherwise=word(DENY, 7, "ICMP"))
    agent.write(Setting(peers=PEERS, policies={POD_A: closed}))
    result = send(world, about(4, B[4], A[4], packet))
    assert is_drop(result, "POLICY_DENIED")  # no error about an error
    assert int(world.batch.refusal[0]) == word(DENY, 7, "ICMP")


# --- translation: RFC 5508 -------------------------------------------------------------------


@BY_FAMILY
@pytest.mark.parametrize("make", [sg.udp, sg.tcp, sg.echo])
@pytest.mark.parametrize("sender", [OUT, BETWEEN], ids=["end", "router"])
@pytest.mark.parametrize("most", ["least", "odd", "all"])
def test_an_error_about_a_masqueraded_packet_quotes_what_the_pod_has_sent(
    world, f, make, sender, most
):
    e = sg.Ends(A[f], 1000, OUT[f], 0 if make is sg.echo else 80)
    sent = make(e)[14:]
    left = seen_by_target(send(world, sg.ethernet(sent)))
    least = 28 if f == 4 else 48
    size = {"least": least, "odd": least + 5, "all": len(left)}[most]
    result = send(world, about(f, sender[f], NODE[f], left, TOO_BIG, 1400, size))
    assert result.egress == POD_A
    got = inside(result)
    ip = got[IP] if f == 4 else got[IPv6]
    assert (ip.src, ip.dst) == (str(sender[f]), str(A[f]))
    body = raw(ip.payload)
    assert body[4:8] == (1400).to_bytes(4, "big")
    assert is_right(raw(ip), 20 if f == 4 else 40, sg.ICMP if f == 4 else sg.ICMP6)
    expected = bytearray(sent[:size])  # as it was sent, but for what routers change
    hops = 8 if f == 4 else 7
    expected[hops] = left[hops]
    if f == 4:
        expected = bytearray(completed(bytes(expected), 0, 0))
    assert body[8:] == bytes(expected)


@BY_FAMILY
def test_an_error_about_an_answer_of_a_service(world, f):
    """From the client, to a backend behind a virtual address: the address becomes the backend's."""
    vip = VIPS[f][2]
    e = sg.Ends(A[f], 1000, vip, HTTP)
    assert send(world, sg.tcp(e)).egress == POD_B
    answer = sg.tcp(sg.Ends(B[f], 8080, A[f], 1000), sg.SYN | sg.ACK)
    received = seen_by_target(send(world, answer))
    error = about(f, A[f], vip, received, UNREACHABLE, 0, len(received))
    result = send(world, error)
    assert result.egress == POD_B
    ip = inside(result).payload
    assert (ip.src, ip.dst) == (str(A[f]), str(B[f]))
    assert quoted(result) == Tuple(B[f], 8080, A[f], 1000, sg.TCP)
    body = raw(ip)[(20 if f == 4 else 40) + 8 :]
    assert is_right(body, 20 if f == 4 else 40, sg.TCP)  # the whole packet is quoted


@BY_FAMILY
def test_an_error_of_a_backend_reaches_the_client_from_the_virtual_address(world, f):
    vip = VIPS[f][2]
    delivered = seen_by_target(send(world, sg.tcp(sg.Ends(A[f], 1000, vip, HTTP))))
    result = send(world, about(f, B[f], A[f], delivered))
    ip = inside(result).payload
    assert (result.egress, ip.src, ip.dst) == (POD_A, str(vip), str(A[f]))
    assert quoted(result) == Tuple(A[f], 1000, vip, HTTP, sg.TCP)


@BY_FAMILY
def test_an_error_from_outside_about_a_node_port(world, f):
    """Client outside, backend on another node: both ends of the connection are translated."""
    seen = set()
    for port in range(1000, 1040):
        e = sg.Ends(OUT[f], port, NODE[f], 30080)
        result = send(world, sg.tcp(e))
        seen.add(result.egress)
        if result.egress != UPLINK:
            continue
        left = seen_by_target(result)
        back = send(world, about(f, FAR[f], NODE[f], left))
        ip = inside(back).payload
        assert (back.egress, ip.src, ip.dst) == (UPLINK, str(NODE[f]), str(OUT[f]))
        assert quoted(back) == Tuple(*e, sg.TCP)
    assert seen == {POD_B, UPLINK}


def test_a_record_that_goes_in_the_same_vector_translates_no_error(worlds):
    """The table is full; the new connection takes the place of the one that the error is about."""
    world = worlds("TUNNEL_VXLAN", 4, 1_000_001, 1, 1024)
    Agent(world).write(Setting(peers=PEERS, masquerade=True))
    world.forget()
    flows = [sg.udp(sg.Ends(A[4], 1000 + n, OUT[4], 53)) for n in range(1024)]
    for first in range(0, 1024, 256):
        world.now += 100_000_000
        results = world.run([(POD_A, frame) for frame in flows[first : first + 256]])
        assert all(result.sent for result in results)
    left = seen_by_target(world.one(POD_A, flows[0]))
    mine = records.of(world, Tuple(A[4], 1000, OUT[4], 53, sg.UDP))
    assert mine is not None
    mine["state"] = value("CONNECTION_CLOSED")  # the best victim of all
    fresh = sg.udp(sg.Ends(A[4], 7000, OUT[4], 54))
    error = about(4, BETWEEN[4], NODE[4], left)
    for _ in range(40):  # until the clock hand comes by
        results = world.run([(UPLINK, error), (POD_A, fresh)])
        if records.of(world, Tuple(A[4], 1000, OUT[4], 53, sg.UDP)) is None:
            break
        world.now += 100_000_000
        fresh = sg.udp(sg.Ends(A[4], 7001 + _, OUT[4], 54))
    else:
        raise AssertionError("the record never went")
    assert results[1].sent
    if results[0].sent:
        assert quoted(results[0]) == Tuple(A[4], 1000, OUT[4], 53, sg.UDP)
    else:
        assert is_drop(results[0], "CT_INVALID")
