"""Services as the kernel sees them: frontends, choice, affinity, source ranges, nobody there.

Compiled services against manifests are test_services_*.py's; here rows are made up.
"""

from collections import Counter
from ipaddress import ip_network

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import records
from tests import segments as sg
from tests.naive.forward import mix
from tests.places import (
    ADDRESS,
    CLUSTER_IP,
    FAMILIES,
    FAR,
    NODE,
    OUT,
    PEERS,
    VIPS,
    A,
    B,
    inside,
    is_drop,
    send,
)
from tests.setting import Agent, Backend, Service, Setting, frontend_slot, halves
from tests.worlds import POD_A, POD_B, SECOND, UPLINK
from xdp.abi import CONST, value

BY_FAMILY = pytest.mark.parametrize("f", FAMILIES)
PROBES, SLOTS = CONST["FRONTEND_PROBES_MAX"], CONST["FRONTEND_SLOTS"]
TCP, UDP, SCTP = sg.TCP, sg.UDP, sg.SCTP


@pytest.fixture(scope="module")
def stage(worlds):
    world = worlds("TUNNEL_VXLAN", 4, 1_000_000, 1, 1024)
    return world, Agent(world)


@pytest.fixture
def told(stage):
    """Return a function that makes services stand; no connection is there."""
    world, agent = stage
    world.forget()
    world.now += SECOND

    def tell(*services: Service, flags: int = CONST["NODE_REJECT"]):
        agent.write(Setting(peers=PEERS, services=services, flags=flags))
        return world

    return tell


def pods(f: int, count: int, port: int = 8080, protocol: int = TCP) -> tuple[Backend, ...]:
    """Backends on node 2: they need no pod here."""
    return tuple(Backend(FAR[f] + n, port, protocol) for n in range(count))


def backend_of(world, frame: bytes):
    """Where a packet leaves to."""
    return inside(send(world, frame)).payload.dst


# --- frontends ----------------------------------------------------------------------------------


@BY_FAMILY
def test_a_frontend_is_address_port_and_protocol(told, f):
    vip = VIPS[f][1]
    world = told(
        Service(((vip, 80, TCP),), pods(f, 1)),
        Service(((vip, 80, UDP),), (Backend(FAR[f] + 1, 8080, UDP),)),
        Service(((vip, 81, TCP),), (Backend(FAR[f] + 2, 8080),)),
    )
    assert backend_of(world, sg.tcp(sg.Ends(A[f], 1, vip, 80))) == str(FAR[f])
    assert backend_of(world, sg.udp(sg.Ends(A[f], 1, vip, 80))) == str(FAR[f] + 1)
    assert backend_of(world, sg.tcp(sg.Ends(A[f], 1, vip, 81))) == str(FAR[f] + 2)
    assert send(world, sg.udp(sg.Ends(A[f], 1, vip, 81))).reason == value("REASON_UNROUTABLE")
    assert send(world, sg.sctp(sg.Ends(A[f], 1, vip, 80))).reason == value("REASON_UNROUTABLE")
    assert send(world, sg.echo(sg.Ends(A[f], 1, vip, 0))).reason == value("REASON_UNROUTABLE")


def crowd(count: int) -> list[tuple]:
    """Frontends whose first slots are among the last 8 of the table."""
    vip, found = VIPS[4][1], []
    low = np.uint64(int(vip)) + np.arange(1 << 16, dtype=np.uint64)
    for port in range(1, 100):
        third = (port << 8 | TCP) * 0xD6E8FEB86659FD93 & (1 << 64) - 1
        mixed = low * np.uint64(0xC2B2AE3D27D4EB4F) ^ np.uint64(third)
        mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(0x9E3779B97F4A7C15)
        slots = (mixed ^ mixed >> np.uint64(29)) & np.uint64(SLOTS - 1)
        found += [(vip + int(n), port, TCP) for n in np.flatnonzero(slots >= SLOTS - 8)]
    assert all(frontend_slot(*halves(v), p, t) >= SLOTS - 8 for v, p, t in found[:count])
    return found[:count]


def test_runs_of_slots_are_searched_to_their_limit_and_no_further(told):
    """A lookup passes others' frontends and deleted ones, over the end of the table."""
    fronts = crowd(16)
    backends = pods(4, len(fronts))
    world = told(*(Service((front,), (backends[n],)) for n, front in enumerate(fronts)))
    rows = world.shm.frontends

    def goes_to(n: int):
        address, port, _ = fronts[n]
        world.forget()
        return send(world, sg.tcp(sg.Ends(A[4], 1, address, port)))

    for n, backend in enumerate(backends):
        assert inside(goes_to(n)).payload.dst == str(backend.address)
    slots = [int(slot) for slot in np.flatnonzero(rows["state"])]
    assert min(slots) < 12  # the run goes over the end
    assert max(slots) >= SLOTS - 8
    of = {int(rows[slot]["service"]) - 1: slot for slot in slots}
    for n in range(1, len(fronts), 2):
        rows[of[n]]["state"] = value("SLOT_DELETED")
    for n in range(len(fronts)):
        assert goes_to(n).reason == (value("REASON_UNROUTABLE") if n % 2 else 0)
    everything = rows.copy()
    try:
        address, port, _ = fronts[0]
        first = frontend_slot(*halves(address), port, TCP)
        mine = rows[of[0]].copy()
        for probe in range(PROBES + 1):
            rows[(first + probe) % SLOTS] = (1, 1, 1, TCP, value("SLOT_USED"), 1, 0)
        rows[(first + PROBES - 1) % SLOTS] = mine
        assert goes_to(0).reason == 0
        rows[(first + PROBES - 1) % SLOTS]["lo"] = 1
        rows[(first + PROBES) % SLOTS] = mine
        assert goes_to(0).reason == value("REASON_UNROUTABLE")
    finally:
        rows[:] = everything


# --- which backend ------------------------------------------------------------------------------


@BY_FAMILY
def test_connections_spread_evenly_and_stay(told, f):
    vip, backends = VIPS[f][1], pods(f, 10)
    world = told(Service(((vip, 80, TCP),), backends))
    flows = [sg.Ends(A[f], 1000 + n, vip, 80) for n in range(1000)]
    seen: Counter = Counter()
    for start in range(0, 1000, 200):
        first = world.run([(POD_A, sg.tcp(e)) for e in flows[start : start + 200]])
        again = world.run([(POD_A, sg.tcp(e, sg.ACK)) for e in flows[start : start + 200]])
        chosen = [inside(result).payload.dst for result in first]
        assert chosen == [inside(result).payload.dst for result in again]
        seen.update(chosen)
    assert len(seen) == 10
    assert all(65 <= count <= 140 for count in seen.values())  # 100, 4 sigma


@BY_FAMILY
@pytest.mark.parametrize("size", [7, 251])
def test_a_table_has_the_say(told, f, size):
    """Word number hash modulo size: every node finds the same one for a flow."""
    vip, backends = VIPS[f][1], pods(f, 3)
    table = tuple(np.random.default_rng(size).integers(0, 3, size).tolist())
    world = told(Service(((vip, 80, UDP),), pods(f, 3, 53, UDP), table=table))
    for n in range(100):
        e = sg.Ends(A[f], 1000 + n, vip, 80)
        word = e.source_port << 48 | 80 << 32 | UDP << 8 | f
        place = (mix(int(A[f]), int(vip), word) >> 32) % size
        assert backend_of(world, sg.udp(e)) == str(backends[table[place]].address)


@BY_FAMILY
def test_inside_and_outside_have_lists_of_their_own(told, f):
    """Traffic policies: pods, nodes and what comes through the tunnel are inside."""
    vip, out = NODE[f], (Backend(B[f], 8080),)
    world = told(Service(((vip, 30080, TCP),), pods(f, 1), out))
    for source in (A[f], B[f], FAR[f] + 1, NODE[f]):
        assert backend_of(world, sg.tcp(sg.Ends(source, 1, vip, 30080))) == str(FAR[f])
    assert backend_of(world, sg.tcp(sg.Ends(OUT[f], 1, vip, 30080))) == str(B[f])


@BY_FAMILY
@pytest.mark.parametrize("state", ["TERMINATING", "EMPTY"])
def test_a_terminating_backend_serves_a_removed_one_does_not(told, f, state):
    vip = VIPS[f][1]
    world = told(Service(((vip, 80, TCP),), (Backend(B[f], 8080, TCP, state),)))
    result = send(world, sg.tcp(sg.Ends(A[f], 1, vip, 80)))
    if state == "TERMINATING":
        assert result.egress == POD_B
    else:
        assert result.reason == value("REASON_NO_BACKEND")


# --- nobody there, and echo ---------------------------------------------------------------------


@BY_FAMILY
@pytest.mark.parametrize("reject", [True, False])
@pytest.mark.parametrize("source", [A, OUT, FAR], ids=["pod", "outside", "far"])
def test_a_service_without_backends_is_a_refusal_or_silence(told, f, reject, source):
    vip = NODE[f]
    world = told(
        Service(((vip, 30080, TCP), (vip, 30080, UDP))), flags=CONST["NODE_REJECT"] if reject else 0
    )
    for frame in (
        sg.tcp(sg.Ends(source[f], 1, vip, 30080)),
        sg.udp(sg.Ends(source[f], 1, vip, 30080)),
    ):
        result = send(world, frame)
        assert result.reason == value("REASON_NO_BACKEND")
        assert result.sent == reject
        if reject:
            assert result.egress == (POD_A if source is A else UPLINK)
    assert not records.live(world)


@BY_FAMILY
def test_a_virtual_address_answers_pings_and_refuses_the_rest(told, f):
    vip = VIPS[f][1]
    world = told(Service(((vip, 80, TCP),), pods(f, 1)), Service(((vip, 0, 0),), flags=ADDRESS))
    result = send(world, sg.echo(sg.Ends(A[f], 77, vip, 0)))
    assert result.reason == value("REASON_ANSWERED_ECHO")
    got = inside(result).payload
    assert (got.src, got.dst, got.payload.id) == (str(vip), str(A[f]), 77)
    other = 13 if f == 4 else 139  # another question than an echo's
    for frame in (sg.tcp(sg.Ends(A[f], 1, vip, 81)), sg.udp(sg.Ends(A[f], 1, vip, 80)),
                  sg.error(sg.Ends(A[f], 0, vip, 0), other, 0, b"who")):  # fmt: skip
        result = send(world, frame)
        assert (result.reason, result.egress) == (value("REASON_NO_BACKEND"), POD_A)
    result = send(world, sg.echo(sg.Ends(A[f], 0, vip, 9), reply=True))  # nobody has asked
    assert result.dropped
    assert result.reason == value("REASON_CT_INVALID")
    assert backend_of(world, sg.tcp(sg.Ends(A[f], 1, vip, 80))) == str(FAR[f])


@BY_FAMILY
def test_a_cluster_ip_is_for_the_cluster(told, f):
    """Cilium's drop 174; kube-proxy would take it, from whoever routes it here."""
    vip = VIPS[f][1]
    world = told(
        Service(((vip, 80, TCP),), pods(f, 1), flags=CLUSTER_IP),
        Service(((vip, 0, 0),), flags=ADDRESS | CLUSTER_IP),
    )
    for frame in (sg.tcp(sg.Ends(OUT[f], 1, vip, 80)), sg.tcp(sg.Ends(OUT[f], 1, vip, 81)),
                  sg.echo(sg.Ends(OUT[f], 1, vip, 0))):  # fmt: skip
        assert is_drop(send(world, frame), "IS_CLUSTER_IP")
    assert send(world, sg.tcp(sg.Ends(FAR[f] + 1, 1, vip, 80))).reason == 0


# --- source ranges ------------------------------------------------------------------------------

RANGES = {4: ["198.51.100.0/29", "198.51.100.64/26", "198.51.100.200/32"],
          6: ["2001:db8:f::/125", "2001:db8:f::40/122", "2001:db8:f::c8/128"]}  # fmt: skip


@BY_FAMILY
@pytest.mark.parametrize("last", [0, 1, 7, 8, 63, 64, 127, 128, 199, 200, 201])
def test_only_some_may_come_from_outside(told, f, last):
    networks = tuple(map(ip_network, RANGES[f]))
    vip = NODE[f]
    world = told(Service(((vip, 30080, TCP),), (Backend(B[f], 8080),), sources=networks))
    source = OUT[f] - 7 + last
    result = send(world, sg.tcp(sg.Ends(source, 1, vip, 30080)))
    if any(source in network for network in networks):
        assert result.egress == POD_B
    else:
        assert is_drop(result, "SOURCE_RANGE")
    assert send(world, sg.tcp(sg.Ends(A[f], 1, vip, 30080))).egress == POD_B  # inside: all may


# --- session affinity ---------------------------------------------------------------------------


def resolver(f: int, count: int, seconds: int = 60, first: int = 0) -> Service:
    backends = tuple(Backend(FAR[f] + n, 53, UDP) for n in range(first, first + count))
    return Service(((VIPS[f][5], 53, UDP),), backends, affinity_s=seconds)


def asks(world, f: int, port: int, source=None) -> str:
    return backend_of(world, sg.udp(sg.Ends(source or A[f], port, VIPS[f][5], 53)))


@BY_FAMILY
def test_a_client_keeps_its_backend(told, f):
    world = told(resolver(f, 10))
    assert len({asks(world, f, port) for port in range(1000, 1030)}) == 1
    clients = [FAR[f] + n for n in range(20, 60)]
    chosen = {str(c): asks(world, f, 1, c) for c in clients}
    assert len(set(chosen.values())) > 5
    assert all(asks(world, f, 2, c) == chosen[str(c)] for c in clients)


@BY_FAMILY
def test_affinity_ends_when_the_client_was_away_for_its_time(told, f):
    """sessionAffinityConfig.clientIP.timeoutSeconds; each connection starts the time anew."""
    world = told(resolver(f, 40))
    first = asks(world, f, 1000)
    told(resolver(f, 40, first=1) if first == str(FAR[f]) else resolver(f, 41))
    for port in range(1001, 1004):
        world.now += 59 * SECOND
        assert asks(world, f, port) == first
    world.now += 62 * SECOND
    assert asks(world, f, 1005) == picked(f, 41)


def picked(f: int, count: int) -> str:
    """The backend that a client without one gets: by the hash of client and service."""
    return str(FAR[f] + (mix(int(A[f]), 1, 0) >> 32) % count)


@BY_FAMILY
def test_affinity_does_not_outlive_the_backend(told, f):
    world = told(resolver(f, 3))
    first = asks(world, f, 1000)
    index = int(first.split(".")[-1] if f == 4 else first.split(":")[-1], 16 if f == 6 else 10) - 9
    told(resolver(f, 3, first=index + 1))
    assert asks(world, f, 1001) == str(FAR[f] + index + 1 + (mix(int(A[f]), 1, 0) >> 32) % 3)
    assert asks(world, f, 1002) == asks(world, f, 1003)


def test_services_do_not_share_affinity(told):
    other = Service(((VIPS[4][6], 53, UDP),), (Backend(B[4], 53, UDP),), affinity_s=60)
    world = told(resolver(4, 5), other)
    first = asks(world, 4, 1000)
    assert backend_of(world, sg.udp(sg.Ends(A[4], 1000, VIPS[4][6], 53))) == str(B[4])
    assert asks(world, 4, 1001) == first


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 40)), max_size=60))
def test_a_full_set_forgets_who_was_away_longest(stage, steps):
    """Clients whose hash falls into one set of four: a list with the latest last is its twin."""
    world, agent = stage
    agent.write(Setting(peers=PEERS, services=(resolver(4, 5, 10_000),)))
    world.forget()
    world.now += 1000 * SECOND
    clients = sharers(8)
    recent: list[int] = []
    for n, wait in steps:
        world.now += wait * SECOND + (1 << CONST["TICK_SHIFT"])
        asks(world, 4, 1000 + world.now % 5000, clients[n])
        if n in recent:
            recent.remove(n)
        recent = [*recent, n][-CONST["AFFINITY_WAYS"] :]
        rows = world.shm.affinities
        known = rows[rows["service"] != 0]["client_lo"].tolist()
        assert sorted(known) == sorted(int(clients[m]) for m in recent)


def sharers(count: int) -> list:
    """Pods of node 2's prefix do not suffice: clients outside whose affinities share a set."""
    mask = CONST["AFFINITY_SLOTS"] // CONST["AFFINITY_WAYS"] - 1
    if not _sharers:
        wanted = mix(int(OUT[4]), 1, 0) & mask
        start = int(ip_network("198.0.0.0/8")[0])
        n = start
        while len(_sharers) < count:
            if mix(n, 1, 0) & mask == wanted and n >> 8 != int(NODE[4]) >> 8:
                _sharers.append(type(OUT[4])(n))
            n += 1
    return _sharers


_sharers: list = []


@pytest.mark.parametrize("start", [(1 << 32) - 1000, 1 << 32])
def test_affinity_knows_time_after_834_days(told, start):
    world = told(resolver(4, 40))
    before = world.now
    try:
        world.now = start << CONST["TICK_SHIFT"]
        first = asks(world, 4, 1000)
        told(resolver(4, 41))
        for port in range(1001, 1005):
            world.now += 50 * SECOND
            assert asks(world, 4, port) == first
    finally:
        world.now = before
