"""Connections over time: what is counted, judged again, taken anew, kept over restarts.

The twin of test_connect.py says what becomes of random packets; here are the stories that matter.
"""

import numpy as np
import pytest

from dataplane.tables import events
from tests import records
from tests import segments as sg
from tests.naive.packets import Tuple
from tests.places import (
    FAMILIES,
    FAR,
    HOLE,
    HTTP,
    NODE,
    NOWHERE,
    OUT,
    PEERS,
    SERVICES,
    VIPS,
    A,
    B,
    inside,
    is_drop,
    placed,
    send,
)
from tests.segments import ACK, FIN, RST, SYN
from tests.setting import ALLOW, DENY, Agent, Backend, Entry, Policy, Service, Setting, word
from tests.worlds import HOST, POD_A, POD_B, SECOND, UPLINK
from xdp.abi import CONST, value

BY_FAMILY = pytest.mark.parametrize("f", FAMILIES)
OPEN = Setting(peers=PEERS, services=SERVICES, masquerade=True)


@pytest.fixture(scope="module")
def stage(worlds):
    world = worlds("TUNNEL_VXLAN", 4, 1_000_000, 1, 1024)
    return world, Agent(world)


@pytest.fixture
def world(stage):
    """Masquerading, services, open policies; no connection."""
    world, agent = stage
    agent.write(OPEN)
    world.forget()
    world.now += SECOND
    return world


@pytest.fixture
def agent(stage, world):
    return stage[1]


def only(world) -> np.void:
    (row,) = records.live(world).values()
    return row


def handshake(world, e: sg.Ends, back: sg.Ends | None = None):
    """Open a TCP connection; return its record."""
    back = back or e.back()
    for frame in (sg.tcp(e), sg.tcp(back, SYN | ACK), sg.tcp(e, ACK)):
        assert send(world, frame).reason == 0
    row = records.of(world, Tuple(*e, sg.TCP))
    assert row is not None
    assert records.state(row) == "ESTABLISHED"
    return row


# --- counters and time --------------------------------------------------------------------------


@BY_FAMILY
def test_packets_bytes_and_time_are_the_connections(world, f):
    e = sg.Ends(A[f], 1000, B[f], 53)
    sizes = (20, 300, 7)
    for size in sizes:
        send(world, sg.udp(e, bytes(size)))
    world.now += 5 * SECOND
    send(world, sg.udp(e.back(), bytes(9)))
    row = only(world)
    header = (20 if f == 4 else 40) + 8
    assert int(row["packets_original"]) == 3
    assert int(row["bytes_original"]) == sum(sizes) + 3 * header
    assert (int(row["packets_reply"]), int(row["bytes_reply"])) == (1, 9 + header)
    ticks = (5 * SECOND) >> CONST["TICK_SHIFT"]
    assert int(row["last_reply"]) - int(row["last_original"]) in (ticks, ticks + 1)
    assert (int(row["port"]), records.state(row)) == (POD_A, "REPLIED")


def test_a_bit_of_everything_in_one_vector(world):
    """New connections and their own later packets, in one vector of 256."""
    flows = [sg.Ends(A[4], 1000 + n, B[4], 53) for n in range(64)]
    frames = [(POD_A, sg.udp(e)) for e in flows] * 2
    frames += [(POD_B, sg.udp(e.back())) for e in flows] * 2
    assert all(result.sent for result in world.run(frames))
    rows = records.live(world).values()
    assert len(rows) == 64
    assert {(int(r["packets_original"]), int(r["packets_reply"])) for r in rows} == {(2, 2)}
    records.audit(world)


@BY_FAMILY
def test_what_has_no_way_is_not_remembered(world, f):
    """Spoofed packets to nowhere must not fill the table."""
    for target in (NOWHERE[f], HOLE[f]):
        result = send(world, sg.udp(sg.Ends(A[f], 1000, target, 53)))
        assert result.reason == value("REASON_UNROUTABLE")
        assert result.egress == POD_A  # it is told so
    assert is_drop(send(world, sg.udp(sg.Ends(OUT[f], 1, OUT[f] + 1, 53))), "UNROUTABLE")
    assert is_drop(send(world, sg.udp(sg.Ends(OUT[f], 1, FAR[f], 53))), "UNROUTABLE")
    assert not records.live(world)


@BY_FAMILY
@pytest.mark.parametrize("port", [1000, 0])
def test_a_reply_that_nobody_asked_for_opens_nothing(world, f, port):
    """An echo reply is no query: it is dropped, from whom and to whom it may be."""
    ways = (
        (POD_A, A, B),
        (POD_A, A, OUT),
        (POD_A, A, VIPS[f][1]),
        (UPLINK, OUT, A),
        (HOST, NODE, A),
    )
    for here, source, target in ways:
        ends = (place[f] if isinstance(place, dict) else place for place in (source, target))
        e = sg.Ends(next(ends), 0, next(ends), port)
        assert is_drop(world.one(here, sg.echo(e, reply=True)), "CT_INVALID")
    assert not records.live(world)
    e = sg.Ends(A[f], port, B[f], 0)
    assert world.one(POD_A, sg.echo(e)).egress == POD_B
    assert world.one(POD_B, sg.echo(e.back(), reply=True)).egress == POD_A


@BY_FAMILY
def test_replies_from_outside_to_the_node_are_the_nodes(world, f):
    e = sg.Ends(NODE[f], 1000, OUT[f], 0)
    assert world.one(UPLINK, sg.echo(e.back(), reply=True)).egress == HOST
    assert not records.live(world)


@BY_FAMILY
def test_the_nodes_own_packets_from_outside_are_not_remembered(world, f):
    frame = sg.tcp(sg.Ends(OUT[f], 1000, NODE[f], 22))
    result = send(world, frame)
    assert result.frame[14:] == frame[14:]
    assert not records.live(world)


# --- opened anew --------------------------------------------------------------------------------


@BY_FAMILY
@pytest.mark.parametrize("copies", [1, 2, 5])
@pytest.mark.parametrize("masqueraded", [False, True])
def test_a_syn_opens_anew_what_is_over(world, f, copies, masqueraded):
    """Also when it comes twice in one vector: there is one connection, and the port is kept."""
    target = OUT[f] if masqueraded else B[f]
    e = sg.Ends(A[f], 50000, target, HTTP)
    back = sg.Ends(target, HTTP, NODE[f], 50000) if masqueraded else e.back()
    handshake(world, e, back)
    send(world, sg.tcp(back, RST))
    assert records.state(only(world)) == "CLOSED"
    created = int(only(world)["created"])
    world.now += 2 * SECOND
    results = world.run([(POD_A, sg.tcp(e))] * copies)
    assert all(result.sent for result in results)
    row = only(world)
    assert int(row["created"]) != created
    assert records.state(row) == "SYN_SENT"
    assert int(row["packets_original"]) == copies
    assert records.sides(row)[1].target_port == 50000
    records.audit(world)


@pytest.mark.parametrize("flags", [ACK, FIN | ACK, RST, SYN | ACK, 0])
def test_nothing_else_opens_anew(world, flags):
    e = sg.Ends(A[4], 50000, B[4], HTTP)
    row = handshake(world, e)
    created = int(row["created"])
    send(world, sg.tcp(e.back(), RST))
    world.now += 2 * SECOND
    send(world, sg.tcp(e, flags))
    assert int(only(world)["created"]) == created


def test_a_syn_on_a_live_connection_changes_nothing(world):
    """RFC 9293 3.10.7.4: the receiver answers it with a challenge; nobody is cut off this way."""
    e = sg.Ends(A[4], 50000, B[4], HTTP)
    row = handshake(world, e)
    created = int(row["created"])
    send(world, sg.tcp(e, SYN))
    send(world, sg.tcp(e.back(), SYN))
    assert records.state(only(world)) == "ESTABLISHED"
    assert int(only(world)["created"]) == created


# --- judged again -------------------------------------------------------------------------------


def closed(answer: str = "DROP", side: str = "egress") -> Policy:
    return Policy(**{f"{side}_otherwise": word(DENY, 9, answer)})


@BY_FAMILY
@pytest.mark.parametrize("side", ["egress", "ingress"])
@pytest.mark.parametrize("first", ["original", "reply"])
def test_a_change_cuts_a_live_connection_both_ways(world, agent, f, side, first):
    e = sg.Ends(A[f], 1000, B[f], HTTP)
    handshake(world, e)
    port = POD_A if side == "egress" else POD_B
    agent.write(Setting(peers=PEERS, policies={port: closed(side=side)}))
    frames = [sg.tcp(e, ACK), sg.tcp(e.back(), ACK)]
    if first == "reply":
        frames.reverse()
    for frame in frames * 2:
        assert is_drop(send(world, frame), "POLICY_DENIED")
        assert int(world.batch.refusal[0]) == word(DENY, 9)
        world.tally()
    counters = world.tracker.counters[0]
    assert (int(counters["rejudged"]), int(counters["cut"])) == (1, 1)
    row = only(world)
    assert "DENIED" in records.flags(row)
    assert int(row["refusal"]) == word(DENY, 9)
    assert int(row["reason"]) == value("REASON_POLICY_DENIED")


@BY_FAMILY
def test_another_change_lets_it_live_again(world, agent, f):
    e = sg.Ends(A[f], 1000, B[f], HTTP)
    handshake(world, e)
    agent.write(Setting(peers=PEERS, policies={POD_B: closed(side="ingress")}))
    assert send(world, sg.tcp(e, ACK)).dropped
    agent.write(OPEN)
    assert send(world, sg.tcp(e.back(), ACK)).sent
    assert send(world, sg.tcp(e, ACK)).sent
    assert records.state(only(world)) == "ESTABLISHED"
    assert "DENIED" not in records.flags(only(world))
    assert int(world.tracker.counters[0]["cut"]) == 1


def test_what_is_denied_keeps_nothing_alive(world, agent):
    e = sg.Ends(A[4], 1000, B[4], 53)
    send(world, sg.udp(e))
    agent.write(Setting(peers=PEERS, policies={POD_A: closed()}))
    for _ in range(13):
        world.now += 10 * SECOND
        assert send(world, sg.udp(e)).dropped
    assert world.sweep() == 1


@pytest.mark.parametrize("way", ["original", "reply"])
def test_a_denied_packet_of_a_known_connection_says_who_is_who(world, agent, way):
    """The flow that is noted has the policy's word and both identities, the sender's first."""
    e = sg.Ends(A[4], 1000, B[4], 53)
    send(world, sg.udp(e))
    agent.write(Setting(peers=PEERS, policies={POD_A: closed()}))
    frame = sg.udp(e if way == "original" else e.back())
    for _ in range(2):
        assert send(world, frame).dropped
        world.tally()
        flow = events.latest(world.shm, value("EVENT_DROP"), 9)[0]
        assert int(flow["egress_rule"]) == word(DENY, 9)
        identities = [int(flow["source_identity"]), int(flow["target_identity"])]
        assert identities == ([70001, 70002] if way == "original" else [70002, 70001])


@pytest.mark.parametrize("direction", ["original", "reply"])
def test_all_connections_are_judged_again_in_one_vector(world, agent, direction):
    flows = [sg.Ends(A[4], 1000 + n, B[4], 80 + n % 2) for n in range(128)]
    world.run([(POD_A, sg.udp(e)) for e in flows])
    ends = Entry(word(DENY, 4), 0, sg.UDP, 81, 16)
    agent.write(Setting(peers=PEERS, policies={POD_B: Policy(ingress=(ends,))}))
    frames = [placed(sg.udp(e if direction == "original" else e.back())) for e in flows]
    results = world.run(frames)
    assert [result.sent for result in results] == [n % 2 == 0 for n in range(128)]
    assert int(world.tracker.counters[0]["rejudged"]) == 128
    assert int(world.tracker.counters[0]["cut"]) == 64
    assert [result.sent for result in world.run(frames)] == [n % 2 == 0 for n in range(128)]
    assert int(world.tracker.counters[0]["rejudged"]) == 128


def test_the_rules_that_let_it_pass_are_kept_with_it(world, agent):
    out = Entry(word(ALLOW, 11), 2, sg.UDP, 53, 16)
    into = Entry(word(ALLOW, 12), 1, sg.UDP, 53, 16)
    policies = {POD_A: Policy(egress=(out,)), POD_B: Policy(ingress=(into,))}
    agent.write(Setting(peers=PEERS, policies=policies))
    send(world, sg.udp(sg.Ends(A[4], 1000, B[4], 53)))
    row = only(world)
    assert (int(row["egress_rule"]), int(row["ingress_rule"])) == (word(ALLOW, 11), word(ALLOW, 12))
    assert (int(row["source_identity"]), int(row["target_identity"])) == (70001, 70002)
    agent.write(OPEN)
    send(world, sg.udp(sg.Ends(A[4], 1000, B[4], 53)))
    assert (int(row["egress_rule"]), int(row["ingress_rule"])) == (ALLOW, ALLOW)


def test_a_record_that_goes_in_the_same_vector_lets_nobody_pass(stage):
    """A stale record is found, then evicted for another connection before its turn comes."""
    world, agent = stage
    agent.write(Setting(peers=PEERS))
    world.forget()
    old = sg.Ends(A[4], 9, B[4], 53)
    number = world.conntrack.records
    world.one(POD_A, sg.udp(old))
    for first in range(0, number - 1, 128):
        world.now += SECOND
        flows = [sg.Ends(A[4], 1000 + n, B[4], 53) for n in range(first, first + 128)]
        world.run([(POD_A, sg.udp(e)) for e in flows[: number - 1 - first]])
    assert len(records.live(world)) == number
    no = Entry(word(DENY, 4), 0, sg.UDP, 53, 16)
    agent.write(Setting(peers=PEERS, policies={POD_B: Policy(ingress=(no,))}))
    world.tracker.words[0] = next(n for n, r in records.live(world).items()
                                  if records.sides(r)[0] == Tuple(*old, sg.UDP))  # fmt: skip
    fresh = sg.udp(sg.Ends(A[4], 7, B[4], 54))
    results = world.run([(POD_A, fresh), (POD_A, sg.udp(old))])
    assert results[0].sent
    assert is_drop(results[1], "POLICY_DENIED_BY_RULE")
    records.audit(world)


# --- backends that go ---------------------------------------------------------------------------


def dns(f: int, *backends) -> Setting:
    """A resolver with these backends, by UDP and TCP."""
    services = tuple(
        Service(((VIPS[f][5], 53, protocol),), tuple(Backend(b, 53, protocol) for b in backends))
        for protocol in (sg.UDP, sg.TCP)
    )
    return Setting(peers=PEERS, services=services)


@BY_FAMILY
def test_datagrams_leave_a_backend_that_is_gone(world, agent, f):
    """A resolver whose pod went must not be asked for ever (kube-proxy deletes such entries)."""
    agent.write(dns(f, B[f]))
    e = sg.Ends(A[f], 1000, VIPS[f][5], 53)
    assert send(world, sg.udp(e)).egress == POD_B
    agent.write(dns(f, FAR[f]))
    assert send(world, sg.udp(e)).egress == UPLINK
    assert len(records.live(world)) == 1


@BY_FAMILY
def test_tcp_stays_with_its_backend_unless_it_has_not_answered(world, agent, f):
    agent.write(dns(f, B[f]))
    e = sg.Ends(A[f], 1000, VIPS[f][5], 53)
    handshake(world, e, sg.Ends(B[f], 53, A[f], 1000))
    waiting = e._replace(source_port=1001)
    send(world, sg.tcp(waiting))
    agent.write(dns(f, FAR[f]))
    assert send(world, sg.tcp(e, ACK)).egress == POD_B
    assert send(world, sg.tcp(waiting)).egress == UPLINK


# --- restarts -----------------------------------------------------------------------------------


@BY_FAMILY
def test_connections_outlive_the_forwarder(world, f):
    """Kill -9: translation, ports, counters and states go on; what was half made does not."""
    out = inside(send(world, sg.tcp(sg.Ends(A[f], 1000, OUT[f], HTTP)))).payload
    send(world, sg.tcp(sg.Ends(OUT[f], HTTP, NODE[f], out.payload.sport), SYN | ACK))
    send(world, sg.udp(sg.Ends(A[f], 1000, VIPS[f][5], 53)))
    half = next(n for n, r in records.live(world).items() if records.state(r) == "UNREPLIED")
    world.shm.connections[half]["owner"] = value("RECORD_CLAIMED")
    world.shm.connection_index[:64] = 0x1234567890  # rubbish
    world.restart()
    records.audit(world)
    assert len(records.live(world)) == 1
    back = send(world, sg.tcp(sg.Ends(OUT[f], HTTP, NODE[f], out.payload.sport), ACK))
    assert inside(back).payload.dst == str(A[f])
    assert int(only(world)["packets_reply"]) == 2
    assert int(world.conntrack.live) == 1
