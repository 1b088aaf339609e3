"""Source ports: kept, shared by destination, taken from the node's range, run out, given back.

RFC 4787, RFC 5382, RFC 5508 (what a NAT owes its hosts), RFC 6056 (ports that cannot be guessed).
"""

import numpy as np
import pytest

from tests import records
from tests import segments as sg
from tests import worlds as w
from tests.naive.packets import Tuple
from tests.places import (
    FAMILIES,
    FAR,
    HTTP,
    LOOPBACK,
    NODE,
    OUT,
    OUT_KEPT,
    PEERS,
    ROUTER,
    SERVICES,
    VIPS,
    A,
    B,
    inside,
    send,
)
from tests.segments import ACK, SYN
from tests.setting import Agent, Backend, Service, Setting
from tests.worlds import HOST, POD_A, POD_B, SECOND, UPLINK
from xdp.abi import CONST, value

BY_FAMILY = pytest.mark.parametrize("f", FAMILIES)
FIRST, COUNT = 50000, 8


@pytest.fixture(scope="module")
def stage(worlds):
    world = worlds("TUNNEL_VXLAN", 4, 1_000_000, 1, 1024)
    return world, Agent(world)


@pytest.fixture
def told(stage):
    """Return a function that makes a setting stand; no connection is there."""
    world, agent = stage
    world.forget()
    world.now += SECOND

    def tell(**fields):
        usual = {"peers": PEERS, "services": SERVICES, "masquerade": True, "nat": (FIRST, COUNT)}
        agent.write(Setting(**(usual | fields)))
        return world

    return tell


def left(result) -> sg.Ends:
    """Ends of the packet that left."""
    packet = inside(result).payload
    layer = packet.payload
    identifier = getattr(layer, "id", None)
    ports = (layer.sport, layer.dport) if identifier is None else (identifier, 0)
    return sg.ends(packet.src, ports[0], packet.dst, ports[1])


def is_prohibited(result, name: str) -> bool:
    """Whether a packet was refused for a reason, and its sender told (RFC 5508 REQ-8)."""
    icmp = inside(result).payload.payload
    told = (icmp.type, icmp.code) in ((3, 13), (1, 1))
    return told and result.reason == value(f"REASON_{name}")


MAKERS = {sg.TCP: sg.tcp, sg.UDP: sg.udp, sg.SCTP: sg.sctp, sg.ICMP: sg.echo}


def out(world, protocol: int, source, port: int, target, there: int):
    """Send the first packet of a connection."""
    there = 0 if protocol == sg.ICMP else there
    return send(world, MAKERS[protocol](sg.Ends(source, port, target, there)))


# --- which packets ------------------------------------------------------------------------------


@BY_FAMILY
def test_only_what_leaves_the_cluster_gets_the_nodes_address(told, f):
    world = told()
    for target, source in ((OUT[f], NODE[f]), (OUT_KEPT[f], A[f]), (FAR[f], A[f]), (B[f], A[f]),
                           (NODE[f], A[f]), (ROUTER[f], A[f])):  # fmt: skip
        assert left(out(world, sg.UDP, A[f], 1000, target, 53)).source == source, target
    assert left(out(world, sg.UDP, NODE[f], 1000, OUT[f], 53)).source == NODE[f]
    assert records.of(world, Tuple(NODE[f], 1000, OUT[f], 53, sg.UDP)) is not None
    records.audit(world)


@BY_FAMILY
def test_without_masquerading_pods_keep_their_address(told, f):
    world = told(masquerade=False)
    assert left(out(world, sg.TCP, A[f], 1000, OUT[f], 80)) == sg.Ends(A[f], 1000, OUT[f], 80)


@BY_FAMILY
def test_what_has_no_ports_cannot_be_masqueraded(told, f):
    world = told()
    assert is_prohibited(send(world, sg.gre(sg.Ends(A[f], 0, OUT[f], 0))), "NAT_UNSUPPORTED")
    assert send(world, sg.gre(sg.Ends(A[f], 0, OUT_KEPT[f], 0))).egress == UPLINK
    assert send(world, sg.gre(sg.Ends(A[f], 0, B[f], 0))).egress == POD_B


# --- which port ---------------------------------------------------------------------------------


@BY_FAMILY
@pytest.mark.parametrize("protocol", MAKERS)
def test_a_port_of_the_range_is_kept(told, f, protocol):
    world = told()
    for port in (FIRST, FIRST + COUNT - 1):
        assert left(out(world, protocol, A[f], port, OUT[f], 80)).source_port == port
    for port in (FIRST - 1, FIRST + COUNT, 1):
        assert (
            FIRST <= left(out(world, protocol, A[f], port, OUT[f], 80)).source_port < FIRST + COUNT
        )
    records.audit(world)


@BY_FAMILY
@pytest.mark.parametrize("protocol", MAKERS)
def test_two_pods_with_one_port_get_two(told, f, protocol):
    world = told()
    first, second = (left(out(world, protocol, pod, FIRST, OUT[f], 80)).source_port
                     for pod in (A[f], B[f]))  # fmt: skip
    assert first == FIRST
    assert second != FIRST


@BY_FAMILY
@pytest.mark.parametrize("protocol", MAKERS)
def test_the_nodes_own_ports_are_never_taken(told, f, protocol):
    mine = {FIRST, FIRST + 1, FIRST + 5}
    world = told(node_ports=frozenset((protocol, port) for port in mine))
    ports = [left(out(world, protocol, A[f], n, OUT[f], 80)).source_port
             for n in (*mine, *range(1, COUNT - len(mine) - 2))]  # fmt: skip
    assert len(set(ports)) == len(ports)
    assert not mine & set(ports)


def test_the_nodes_ports_count_by_protocol(told):
    world = told(node_ports=frozenset({(sg.UDP, FIRST)}))
    assert left(out(world, sg.TCP, A[4], FIRST, OUT[4], 80)).source_port == FIRST
    assert left(out(world, sg.UDP, A[4], FIRST, OUT[4], 80)).source_port != FIRST


@BY_FAMILY
@pytest.mark.parametrize("protocol", MAKERS)
def test_each_destination_has_all_ports(told, f, protocol):
    """One address of the node serves more connections than it has ports (RFC 7857 3: per tuple)."""
    world = told()
    targets = [OUT[f] + n for n in range(0, 60, 2)]
    for target in targets:
        ports = {left(out(world, protocol, A[f], n, target, 80)).source_port for n in range(COUNT)}
        assert ports == set(range(FIRST, FIRST + COUNT))
    if protocol != sg.ICMP:
        assert left(out(world, protocol, A[f], 0, targets[0], 81)).source_port
    assert len(records.live(world)) >= len(targets) * COUNT
    records.audit(world)


@BY_FAMILY
@pytest.mark.parametrize("protocol", MAKERS)
def test_a_destination_whose_ports_ran_out_is_named(told, f, protocol):
    world = told()
    for n in range(COUNT):
        assert out(world, protocol, A[f], n, OUT[f], 80).sent
    for _ in range(3):
        assert is_prohibited(out(world, protocol, A[f], 999, OUT[f], 80), "NO_NAT_MAPPING")
    assert out(world, protocol, A[f], 999, OUT[f] + 1, 80).sent
    assert int(world.tracker.counters[0]["nat_exhausted"]) == 3
    (row,) = world.shm.exhausted[0][world.shm.exhausted[0]["count"] > 0]
    number = int(row["hi"]) << 64 | int(row["lo"])
    assert number == int(OUT[f])
    there = 0 if protocol == sg.ICMP else 80
    wanted = {sg.ICMP: {4: 1, 6: 58}[f]}.get(protocol, protocol)
    assert (int(row["port"]), int(row["protocol"]), int(row["count"])) == (there, wanted, 3)
    assert int(row["last_ns"]) == world.now
    assert len(records.live(world)) == COUNT + 1


@BY_FAMILY
def test_ports_come_back_when_their_connections_go(told, f):
    world = told()
    for n in range(COUNT):
        out(world, sg.UDP, A[f], n, OUT[f], 53)
    assert int(world.nat_ports.sum()) == COUNT
    world.now += 121 * SECOND
    assert world.sweep() == COUNT
    assert int(world.nat_ports.sum()) == 0
    assert all(out(world, sg.UDP, A[f], n, OUT[f], 53).sent for n in range(COUNT))
    records.audit(world)
    world.restart()
    assert int(world.nat_ports.sum()) == COUNT
    records.audit(world)


@BY_FAMILY
def test_without_a_range_ports_are_kept_or_there_are_none(told, f):
    """struct node: nat_count 0: only ports that are kept."""
    world = told(nat=(FIRST, 0))
    assert left(out(world, sg.UDP, A[f], 1000, OUT[f], 53)) == sg.Ends(NODE[f], 1000, OUT[f], 53)
    assert is_prohibited(out(world, sg.UDP, B[f], 1000, OUT[f], 53), "NO_NAT_MAPPING")
    assert out(world, sg.UDP, B[f], 1000, OUT[f] + 1, 53).sent


def test_ports_are_not_handed_out_one_after_the_other(told):
    """RFC 6056 3.1: the place where the search starts follows from a hash of both ends."""
    world = told(nat=(40960, 24576))
    ports = [left(out(world, sg.UDP, A[4], n, OUT[4] + n % 50, 53)).source_port for n in range(200)]
    steps = np.abs(np.diff(ports))
    assert (steps > 16).mean() > 0.95
    assert np.std(ports) > 5000


def test_answers_only_from_where_was_asked(told):
    """RFC 4787 5: address and port-dependent filtering; a stranger reaches the node, no pod."""
    world = told()
    port = left(out(world, sg.UDP, A[4], 1000, OUT[4], 53)).source_port
    assert send(world, sg.udp(sg.Ends(OUT[4], 53, NODE[4], port))).egress == POD_A
    for source, there in ((OUT[4] + 1, 53), (OUT[4], 54)):
        assert send(world, sg.udp(sg.Ends(source, there, NODE[4], port))).egress == HOST
    assert len(records.live(world)) == 1


# --- services and sources -----------------------------------------------------------------------


@BY_FAMILY
def test_one_backend_behind_two_addresses_and_one_client_port(told, f):
    """Both connections work at a time: the second one gets another port on its way."""
    world = told(services=tuple(Service(((vip, 80, sg.TCP),), (Backend(B[f], 8080),))
                                for vip in VIPS[f][1:3]))  # fmt: skip
    ends = [sg.Ends(A[f], 1000, vip, HTTP) for vip in VIPS[f][1:3]]
    seen = [left(send(world, sg.tcp(e))) for e in ends]
    assert {e.target for e in seen} == {B[f]}
    assert seen[0].source_port == 1000
    assert seen[1].source_port != 1000
    for e, received in zip(ends, seen, strict=True):
        assert left(send(world, sg.tcp(received.back(), SYN | ACK))) == e.back()
        assert left(send(world, sg.tcp(e, ACK))) == received
    records.audit(world)


@BY_FAMILY
def test_a_pod_reaches_itself_through_its_service(told, f):
    """It sees the loopback address, answers it, and the answer comes from the service."""
    world = told()
    e = sg.Ends(A[f], 1000, VIPS[f][3], HTTP)
    received = left(send(world, sg.tcp(e)))
    assert received == sg.Ends(LOOPBACK[f], 1000, A[f], 8080)
    assert world.one(POD_A, sg.tcp(received.back(), SYN | ACK)).egress == POD_A
    assert left(world.one(POD_A, sg.tcp(received.back(), SYN | ACK))) == e.back()
    assert "HAIRPIN" in records.flags(next(iter(records.live(world).values())))


@BY_FAMILY
def test_the_node_reaches_its_own_backend_through_a_service(told, f):
    world = told(services=(Service(((VIPS[f][1], 80, sg.TCP),), (Backend(NODE[f], 6443),)),))
    e = sg.Ends(NODE[f], 1000, VIPS[f][1], 80)
    received = left(send(world, sg.tcp(e)))
    assert received == sg.Ends(LOOPBACK[f], 1000, NODE[f], 6443)
    assert left(world.one(HOST, sg.tcp(received.back(), SYN | ACK))) == e.back()


@BY_FAMILY
@pytest.mark.parametrize("masquerade", [True, False])
def test_a_client_outside_and_a_backend_elsewhere(told, f, masquerade):
    """The node puts its own address in between, so that the answer comes back this way."""
    world = told(
        masquerade=masquerade,
        services=(Service(((NODE[f], 30080, sg.TCP),), (Backend(FAR[f], 8080),)),),
    )
    e = sg.Ends(OUT[f], 1000, NODE[f], 30080)
    result = send(world, sg.tcp(e))
    received = left(result)
    assert result.egress == UPLINK
    assert received.source == (NODE[f] if masquerade else ROUTER[f])
    answer = sg.tcp(received.back(), SYN | ACK)
    assert left(world.one(UPLINK, sg.vxlan(answer, w.REMOTE4, w.NODE4, w.VNI))) == e.back()
    assert records.flags(next(iter(records.live(world).values()))) == {
        "NAT_SOURCE", "NAT_TARGET", "OUTSIDE", "PORT_TAKEN"
    }  # fmt: skip


@BY_FAMILY
def test_a_client_outside_keeps_its_address_towards_a_pod_of_this_node(told, f):
    world = told(services=(Service(((NODE[f], 30080, sg.TCP),), (Backend(B[f], 8080),)),))
    e = sg.Ends(OUT[f], 1000, NODE[f], 30080)
    assert left(send(world, sg.tcp(e))) == sg.Ends(OUT[f], 1000, B[f], 8080)
    answer = sg.tcp(sg.Ends(B[f], 8080, OUT[f], 1000), SYN | ACK)
    assert left(send(world, answer)) == e.back()
    assert int(world.nat_ports.sum()) == 0


@BY_FAMILY
def test_a_client_outside_and_a_backend_on_the_nodes_own_network(told, f):
    """The node would answer the client directly, under the backend's port: it must not know it."""
    world = told(services=(Service(((NODE[f], 30443, sg.TCP),), (Backend(NODE[f], 443),)),))
    e = sg.Ends(OUT[f], 1000, NODE[f], 30443)
    received = left(send(world, sg.tcp(e)))
    assert received == sg.Ends(LOOPBACK[f], 1000, NODE[f], 443)
    result = world.one(HOST, sg.tcp(received.back(), SYN | ACK))
    assert result.egress == UPLINK
    assert left(result) == e.back()


def test_the_flags_of_a_record_say_what_was_done(told):
    world = told()
    stories = {
        (A[4], 1000, B[4], 54): set(),
        (A[4], 1000, B[4], 53): {"DNS"},
        (A[4], 1000, OUT[4], 53): {"NAT_SOURCE", "PORT_TAKEN", "DNS"},
        (A[4], 1000, VIPS[4][5], 53): {"NAT_TARGET", "DNS"},
        (OUT[4], 1000, B[4], 53): {"OUTSIDE"},
    }
    for ends, flags in stories.items():
        assert send(world, sg.udp(sg.Ends(*ends))).sent
        row = records.of(world, Tuple(*ends, sg.UDP))
        assert row is not None
        assert records.flags(row) == flags
    assert CONST["CONNECTION_FLAG_PORT_TAKEN"] == 16
