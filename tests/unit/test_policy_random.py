"""Random policies and changes: the tables say what an independent reading of the manifests says."""

from ipaddress import ip_address
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.policy_strategies import PORTS, WORLD, change, fill
from tests.policy_world import DIRECTIONS, OWN, PolicyWorld, addresses

PODS = [ip for place in range(9) for ip in addresses(place % 2 + 1, 2 + place)]
PEERS = [*PODS, *WORLD, *OWN, "192.0.2.2", "10.244.1.1", "10.244.2.1", "10.244.1.77"]
CHANGES = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = PolicyWorld(tmp_path_factory.mktemp("world"))
    yield made
    made.shm.close()


def size(world) -> tuple[int, int, int]:
    """Entries, policy rows and prefixes that stand."""
    rows = set(world.shm.subjects["policy"].tolist())
    return (
        world.writer.entries.count,
        len(rows),
        sum(len(fib.routes) for fib in world.writer.ipcache.values()),
    )


def explained(world) -> None:
    """`why`, which reads policies rule by rule, agrees with the oracle, too."""
    oracle, explainer = world.oracle(), world.engine.explainer()
    for port, (_, _, ips) in world.endpoints.items():
        subject = explainer.of_address(ip_address(ips[0]))
        for text in PEERS:
            address = ip_address(text)
            peer = explainer.of_address(address)
            for turn, name in enumerate(DIRECTIONS):
                for protocol, number in PORTS:
                    said = explainer.judge(turn, subject, peer, address, protocol, number)
                    wanted = oracle.allowed(port, name, text, protocol, number)
                    assert said.allowed == wanted, (ips[0], name, text, protocol, number, said)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 1 << 32),
    match=st.sampled_from(["kubernetes", "cilium"]),
    wide_from=st.sampled_from([0, 4, 256]),
)
def test_every_change_leads_where_a_fresh_reading_leads(world, seed, match, wide_from):
    """wide_from: all selectors make wide groups, those that fit half of the pods, or none."""
    r = Random(seed)
    fill(r, world)
    options = {"cidr_match": match, "wide_from": wide_from}
    world.start(**options)  # over what another example left in the tables
    assert world.update() == []
    world.check(PEERS, PORTS)
    for _ in range(CHANGES):
        for _ in range(r.choice([1, 1, 2, 4])):
            change(r, world)
        world.update()
        world.now += 0.5
        world.check(PEERS, PORTS)
    explained(world)
    step_by_step = size(world)
    judgement = int(world.shm.control[0]["judgement"])
    world.update()
    assert int(world.shm.control[0]["judgement"]) == judgement, "nothing is new"
    world.start(**options)
    world.update()
    world.check(PEERS, PORTS)
    if wide_from != 4:  # where it grew step by step, a selector may have been narrow at first
        assert size(world) == step_by_step, "step by step something was left behind"
