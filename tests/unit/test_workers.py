"""Several workers over one table of connections, one after the other and at the same time."""

from collections import Counter
from threading import Barrier, Thread

import pytest

from tests import records
from tests import segments as sg
from tests.naive.packets import Tuple
from tests.places import FAMILIES, NODE, OUT, PEERS, SERVICES, VIPS, A, B, inside, is_drop
from tests.segments import ACK, SYN
from tests.setting import DENY, Agent, Policy, Setting, word
from tests.worlds import POD_A, POD_B, SECOND, UPLINK
from xdp.abi import value

BY_FAMILY = pytest.mark.parametrize("f", FAMILIES)
ROUNDS = 6


@pytest.fixture(scope="module")
def stage(worlds):
    world = worlds("TUNNEL_VXLAN", 4, 1_000_000, 2, 4096)
    return world, Agent(world)


@pytest.fixture
def world(stage):
    """Masquerading, services, open policies; no connection."""
    world, agent = stage
    agent.write(Setting(peers=PEERS, services=SERVICES, masquerade=True))
    world.forget()
    world.now += SECOND
    return world


@BY_FAMILY
def test_both_directions_of_a_connection_on_two_workers(world, f):
    e = sg.Ends(A[f], 1000, B[f], 80)
    assert world.one(POD_A, sg.tcp(e), worker=0).egress == POD_B
    assert world.one(POD_B, sg.tcp(e.back(), SYN | ACK), worker=1).egress == POD_A
    assert world.one(POD_A, sg.tcp(e, ACK), worker=0).egress == POD_B
    (row,) = records.live(world).values()
    assert records.state(row) == "ESTABLISHED"
    assert (int(row["packets_original"]), int(row["packets_reply"])) == (2, 1)
    created = [int(lane.tracker.counters[0]["created"]) for lane in world.lanes]
    assert created == [1, 0]


@BY_FAMILY
def test_a_translation_of_one_worker_is_the_others_too(world, f):
    out = inside(world.one(POD_A, sg.udp(sg.Ends(A[f], 1000, OUT[f], 53)), worker=0)).payload
    answer = sg.udp(sg.Ends(OUT[f], 53, NODE[f], out.payload.sport))
    assert inside(world.one(UPLINK, answer, worker=1)).payload.dst == str(A[f])
    got = inside(world.one(POD_B, sg.udp(sg.Ends(B[f], out.payload.sport, OUT[f], 53)), worker=1))
    assert got.payload.payload.sport != out.payload.sport  # that one is taken


def test_a_change_is_one_judgement_whoever_meets_it(stage, world):
    world, agent = stage
    e = sg.Ends(A[4], 1000, B[4], 53)
    world.one(POD_A, sg.udp(e), worker=0)
    no = Policy(ingress_otherwise=word(DENY, 3))
    agent.write(Setting(peers=PEERS, policies={POD_B: no}))
    assert is_drop(world.one(POD_B, sg.udp(e.back()), worker=1), "POLICY_DENIED")
    assert is_drop(world.one(POD_A, sg.udp(e), worker=0), "POLICY_DENIED")
    assert [int(lane.tracker.counters[0]["rejudged"]) for lane in world.lanes] == [0, 1]


def at_once(world, frames: list[list[tuple[int, bytes]]]) -> list:
    """Let both workers decide about a vector each at the same time; return their results."""
    sides = [world.beside(), world.beside()]
    barrier, results = Barrier(2), [None, None]

    def work(n: int) -> None:
        sides[n].load(frames[n])
        barrier.wait()
        sides[n].process(n)
        results[n] = [sides[n]._result(i) for i in range(len(frames[n]))]

    threads = [Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("kind", ["plain", "masqueraded", "service"])
def test_the_same_new_connections_at_the_same_time(world, kind):
    """Whichever record stands first counts; index, records and NAT ports fit together."""
    target = {"plain": (B[4], 80), "masqueraded": (OUT[4], 80), "service": (VIPS[4][1], 80)}[kind]
    for n in range(ROUNDS):
        flows = [sg.Ends(A[4], 1000 + 200 * n + m, *target) for m in range(200)]
        frames = [(POD_A, sg.tcp(e)) for e in flows]
        for results in at_once(world, [frames, frames[::-1]]):
            assert all(result.sent for result in results)
        records.audit(world, strict=False)
        tuples = Counter(records.sides(row)[0] for row in records.live(world).values())
        assert len(tuples) == 200 * (n + 1)
        assert sum(tuples.values()) - len(tuples) <= 2  # a race may be lost, rarely
        for e in flows[:5]:  # and all that follows goes one way
            ways = {
                inside(world.one(POD_A, sg.tcp(e, ACK), w)).payload.payload.sport for w in (0, 1)
            }
            assert len(ways) == 1


def test_both_directions_at_the_same_time_over_a_full_table(world):
    """New connections evict, answers look records up, while the other worker does the same."""
    old = [sg.Ends(A[4], 1000 + n, B[4], 80) for n in range(100)]
    for e in old:
        for port, frame in ((POD_A, sg.tcp(e)), (POD_B, sg.tcp(e.back(), SYN | ACK)),
                            (POD_A, sg.tcp(e, ACK))):  # fmt: skip
            world.one(port, frame, worker=0)
    for n in range(30):
        world.now += SECOND // 20
        fresh = [[sg.Ends(A[4], 2000 + m, OUT[4] + n % 40, 1 + 2 * n + side) for m in range(200)]
                 for side in (0, 1)]  # fmt: skip
        frames = [[(POD_A, sg.udp(e)) for e in side] for side in fresh]
        frames[0] += [(POD_A, sg.tcp(e, ACK)) for e in old[:50]]
        frames[1] += [(POD_B, sg.tcp(e.back(), ACK)) for e in old[50:]]
        results = at_once(world, frames)
        assert all(result.sent for side in results for result in side[200:])
        assert all(result.sent or is_drop(result, "CT_INSERTION_FAILED")
                   for side in results for result in side[:200])  # fmt: skip
        if n % 10 == 9:
            records.audit(world)
    assert len(records.live(world)) <= 4096
    assert sum(int(lane.tracker.counters[0]["evicted"]) for lane in world.lanes) > 1000
    assert all(records.of(world, Tuple(*e, sg.TCP)) is not None for e in old[:10])
    assert value("RECORD_CLAIMED") not in world.shm.connections[:4096]["owner"]
