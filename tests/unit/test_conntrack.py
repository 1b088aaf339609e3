"""The forwarder's side of the table: taken up at the start, swept in slices, its gauges."""

import time

import numpy as np
import pytest

from dataplane.engine import conntrack
from dataplane.engine.conntrack import NAT_PORTS, Conntrack
from dataplane.kernels.connections import FIRST, LIMIT, MOST
from tests import records
from tests import segments as sg
from tests.places import OUT, PEERS, A, B, placed
from tests.segments import ACK, SYN
from tests.setting import Agent, Setting
from tests.worlds import POD_A
from xdp.abi import CONST

RECORDS = 8192


@pytest.fixture(scope="module")
def stage(worlds):
    world = worlds("TUNNEL_VXLAN", 4, 1_000_000, 2, RECORDS)
    return world, Agent(world)


@pytest.fixture
def world(stage):
    """An empty table, at the time that it is."""
    world, agent = stage
    agent.write(Setting(peers=PEERS, masquerade=True))
    world.forget()
    world.now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    return world


def fill(world, many: int, worker: int = 0) -> list[sg.Ends]:
    """Open UDP connections; every second one is answered."""
    flows = [sg.Ends(A[4], 1000 + n, B[4], 53 + worker) for n in range(many)]
    for start in range(0, many, 256):
        part = flows[start : start + 256]
        world.run([(POD_A, sg.udp(e)) for e in part], worker)
        world.run([placed(sg.udp(e.back())) for e in part[::2]], worker)
    return flows


@pytest.mark.parametrize("size", [64, 1000, 1 << 19])
def test_a_pass_is_made_of_slices(world, monkeypatch, size):
    """Each looks at so many records and no more; gauges change when a pass has come to its end."""
    monkeypatch.setattr(conntrack, "SLICE", size)
    fill(world, 500, 0)
    fill(world, 300, 1)
    used = sum(int(lane.tracker.words[LIMIT]) for lane in world.lanes)
    steps = 1
    while not world.conntrack.sweep():
        assert world.conntrack.live == 0
        steps += 1
    assert -(-used // size) <= steps <= used // size + 2
    assert world.conntrack.view() == {
        "connections": 800,
        "established": 400,
        "limit": RECORDS,
        "pressure_percent": round(100 * 800 / RECORDS, 1),
    }


def test_what_a_sweep_forgets_is_counted_and_found_no_more(world):
    flows = fill(world, 100)
    gone = [n for n, row in records.live(world).items() if records.sides(row)[0].source_port % 2]
    ago = -(-130_000_000_000 >> CONST["TICK_SHIFT"])
    for way in ("original", "reply"):
        world.shm.connections[f"last_{way}"][gone] -= ago
    assert world.conntrack.sweep()
    assert world.conntrack.live == 50
    assert int(world.shm.track_counters[-1]["expired"]) == 50
    records.audit(world)
    assert {records.sides(row)[0].source_port for row in records.live(world).values()} == {
        e.source_port for e in flows if e.source_port % 2 == 0
    }


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_another_number_of_workers_takes_all_connections_up(world, workers):
    """Each worker's hand starts with a part that holds every record that stands there."""
    flows = fill(world, 1500, 0) + fill(world, 700, 1)
    for e in flows[:5]:
        world.one(POD_A, sg.udp(e._replace(target=OUT[4], source_port=50000 + e.source_port)))
    before = {records.sides(row) for row in records.live(world).values()}
    ports = np.zeros(NAT_PORTS, np.uint32)
    again = Conntrack(world.shm, ports, workers)
    world.conntrack, world.nat_ports = again, ports
    assert again.live == len(before) == 2205
    assert {records.sides(row) for row in records.live(world).values()} == before
    records.audit(world)
    used = list(records.live(world))
    for n, tracker in enumerate(again.trackers):
        words = tracker.words
        mine = [number for number in used if number // (RECORDS // workers) == n]
        assert all(number < int(words[FIRST] + words[LIMIT]) for number in mine)
        assert int(words[LIMIT]) <= int(words[MOST])
    assert again.sweep()
    assert again.live == 2205


def test_a_size_that_is_none_becomes_one(world):
    for wanted, given in ((1, CONST["CONNECTIONS_LEAST"]), (2048, 2048), (0, conntrack.DEFAULT)):
        world.shm.node[0]["connections"] = wanted
        try:
            assert Conntrack(world.shm, np.zeros(NAT_PORTS, np.uint32), 1).records == given
        finally:
            world.shm.node[0]["connections"] = RECORDS


def test_a_table_that_became_smaller_forgets_what_is_behind_its_end(world):
    fill(world, 3000)
    world.shm.node[0]["connections"] = 2048
    try:
        again = Conntrack(world.shm, np.zeros(NAT_PORTS, np.uint32), 1)
        assert again.live <= 2048
        words = world.shm.connection_index[: 2048 * 4]
        assert np.count_nonzero(words > 1) == 2 * again.live
        assert np.count_nonzero(world.shm.connection_index[2048 * 4 : RECORDS * 4]) == 0
    finally:
        world.shm.node[0]["connections"] = RECORDS


def test_established_is_tcp_that_was_confirmed_and_datagrams_that_were_answered(world):
    e = sg.Ends(A[4], 1000, B[4], 80)
    for frame in (sg.tcp(e), sg.tcp(e.back(), SYN | ACK)):
        world.one(*placed(frame))
    world.conntrack.sweep()
    assert (world.conntrack.live, world.conntrack.established) == (1, 0)
    world.one(POD_A, sg.tcp(e, ACK))
    world.conntrack.sweep()
    assert (world.conntrack.live, world.conntrack.established) == (1, 1)
