"""A table that is full: floods of spoofed sources, what stays, what is refused, what it costs."""

from ipaddress import ip_address

import numpy as np
import pytest

from tests import records
from tests import segments as sg
from tests.places import FAMILIES, FAR, NODE, OUT, PEERS, A, B, is_drop, placed
from tests.segments import ACK, SYN
from tests.setting import Agent, Backend, Service, Setting
from tests.worlds import POD_B, SECOND, UPLINK
from xdp.abi import CONST

BY_FAMILY = pytest.mark.parametrize("f", FAMILIES)
RECORDS, PAGE = 1024, 4096
VECTOR = 256
REFUSED = "CT_INSERTION_FAILED"


@pytest.fixture(scope="module")
def stage(worlds):
    world = worlds("TUNNEL_VXLAN", 4, 1_000_000, 1, RECORDS)
    return world, Agent(world)


@pytest.fixture
def world(stage):
    world, agent = stage
    services = tuple(Service(((NODE[f], 30080, sg.TCP),), (Backend(B[f], 80),)) for f in FAMILIES)
    agent.write(Setting(peers=PEERS, services=services, masquerade=True))
    world.forget()
    world.now += SECOND
    return world


def establish(world, flows: list[sg.Ends]) -> None:
    """Complete handshakes."""
    for start in range(0, len(flows), VECTOR):
        part = flows[start : start + VECTOR]
        for frames in ([placed(sg.tcp(e)) for e in part],
                       [placed(sg.tcp(e.back(), SYN | ACK)) for e in part],
                       [placed(sg.tcp(e, ACK)) for e in part]):  # fmt: skip
            assert all(result.sent for result in world.run(frames))


def spoofed(f: int, n: int, target, port: int) -> bytes:
    """A SYN whose source nobody has."""
    source = ip_address("198.51.0.0" if f == 4 else "2001:db8:a::") + n
    return sg.tcp(sg.Ends(source, 1024 + n % 60000, target, port))


@BY_FAMILY
@pytest.mark.parametrize("through", ["service", "pod"])
def test_established_connections_live_through_a_flood(world, f, through):
    """400 of 1024 records established; 12 000 spoofed SYNs; every packet of theirs goes on."""
    flows = [sg.Ends(A[f], 1000 + n, (B if n % 2 else FAR)[f], 80) for n in range(400)]
    establish(world, flows)
    target = (NODE[f], 30080) if through == "service" else (B[f], 80)
    for n in range(0, 12_000, 200):
        world.now += SECOND // 10
        flood = [(UPLINK, spoofed(f, n + m, *target)) for m in range(200)]
        own = flows[n % 400 : n % 400 + 50]
        results = world.run([*flood, *(placed(sg.tcp(e, ACK)) for e in own)])
        assert all(result.sent for result in results[200:])
        assert all(r.egress == POD_B or is_drop(r, REFUSED) for r in results[:200])
        if n % 4000 == 0:
            results = world.run([placed(sg.tcp(e.back(), ACK)) for e in own])
            assert all(result.sent for result in results)
    counters = world.tracker.counters[0]
    assert int(counters["refused"]) < 12_000 // 20  # where established ones stand side by side
    assert int(counters["limit"]) == RECORDS
    states = [records.state(row) for row in records.live(world).values()]
    assert states.count("ESTABLISHED") == 400
    assert len(states) <= RECORDS
    records.audit(world)


def test_memory_is_bounded_by_the_table(world):
    """No page behind the table's last record, or its last index word, is ever touched."""
    for n in range(0, 4000, 200):
        world.run([(UPLINK, spoofed(4, n + m, NODE[4], 30080)) for m in range(200)])
    record, word = world.shm.connections.dtype.itemsize, 8
    for name, size in (("connections", record), ("connection_index", word)):
        most = RECORDS * (1 if name == "connections" else 4)
        end = max(end for _, end in world.shm.extents(name))
        assert end * size <= -(-most * size // PAGE) * PAGE


@BY_FAMILY
def test_a_table_of_established_connections_refuses_new_ones(world, f):
    """Drop 155, counted; nothing that lives is harmed; a minute's silence makes room."""
    flows = [sg.Ends(A[f], 1000 + n, B[f], 80) for n in range(RECORDS)]
    establish(world, flows)
    for n in range(50):
        assert is_drop(world.one(UPLINK, spoofed(f, n, B[f], 80)), REFUSED)
    assert int(world.tracker.counters[0]["refused"]) == 50
    for start in range(0, RECORDS, VECTOR):
        part = flows[start : start + VECTOR]
        assert all(r.sent for r in world.run([placed(sg.tcp(e, ACK)) for e in part]))
    world.now += 61 * SECOND
    assert world.one(UPLINK, spoofed(f, 99, B[f], 80)).egress == POD_B
    records.audit(world)


@pytest.mark.parametrize("second", ["fin", "reset", "data", "cookie"])
def test_a_second_packet_does_not_make_a_flood_look_established(world, second):
    """Invented connections of two packets each still go before every established one."""
    flows = [sg.Ends(A[4], 1000 + n, B[4], 80) for n in range(400)]
    establish(world, flows)
    for n in range(0, 3000, 120):
        world.now += SECOND // 10
        frames = []
        for m in range(n, n + 120):
            e = sg.Ends(ip_address("198.51.0.0") + m, 1024 + m, B[4], 80)
            if second == "cookie":
                frames += [(UPLINK, sg.sctp(e)), (UPLINK, sg.sctp(e, sg.COOKIE_ACK))]
            else:
                flags = {"fin": sg.FIN | ACK, "reset": sg.RST, "data": ACK}[second]
                frames += [(UPLINK, sg.tcp(e)), (UPLINK, sg.tcp(e, flags))]
        assert all(result.sent or is_drop(result, REFUSED) for result in world.run(frames))
    states = [records.state(row) for row in records.live(world).values()]
    assert states.count("ESTABLISHED") == 400


def test_an_answered_flood_does_not_evict_what_lives(world):
    """A server that answers every SYN (no cookies here) makes records SYN_RECEIVED, no more."""
    flows = [sg.Ends(A[4], 1000 + n, FAR[4], 80) for n in range(400)]
    establish(world, flows)
    for n in range(0, 3000, 120):
        world.now += SECOND // 10
        sources = [ip_address("198.51.0.0") + m for m in range(n, n + 120)]
        ends = [sg.Ends(source, 1024, B[4], 80) for source in sources]
        world.run([(UPLINK, sg.tcp(e)) for e in ends])
        world.run([(POD_B, sg.tcp(e.back(), SYN | ACK)) for e in ends])
    states = [records.state(row) for row in records.live(world).values()]
    assert states.count("ESTABLISHED") == 400


@BY_FAMILY
def test_masqueraded_connections_keep_their_ports_through_a_flood(world, f):
    """What uplinks steer to us follows the live connections exactly."""
    flows = [sg.Ends(A[f], 50000 + n, OUT[f], 80) for n in range(200)]
    for e in flows:
        back = sg.Ends(OUT[f], 80, NODE[f], e.source_port)
        for frame in (sg.tcp(e), sg.tcp(back, SYN | ACK), sg.tcp(e, ACK)):
            assert world.one(*placed(frame)).sent
    for n in range(0, 2400, 200):
        world.now += SECOND // 10
        world.run(
            [(POD_B, sg.udp(sg.Ends(B[f], 1024 + n + m, OUT[f] + 1, 53))) for m in range(200)]
        )
        records.audit(world)
    ports = world.nat_ports.reshape(CONST["NAT_PROTOCOLS"], 65536)
    assert np.flatnonzero(ports[0]).tolist() == list(range(50000, 50200))
