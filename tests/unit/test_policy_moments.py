"""While a change is written: no packet passes that neither the old nor the new policy lets pass.

Each step of the writer is followed by a look at the tables, as a worker in another process may look
at them at any time. A change of labels concerns a pod twice, as a peer and as a subject, and a
namespace's many pods: there old and new may meet for a moment, so these are looked at only where
one of the two ends changes.
"""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dataplane.policy.engine import PolicyEngine
from dataplane.tables.entries import Plan
from dataplane.tables.policies import PolicyWriter
from tests.naive import policy as naive
from tests.policy_strategies import change, fill
from tests.policy_world import PolicyWorld, addresses

PEERS = [addresses(place % 2 + 1, 2 + place)[place % 2] for place in range(9)]
PEERS += ["10.1.2.3", "8.8.8.8", "192.0.2.2", "10.244.1.200"]
POLICIES = {"policy", "no policy"}
PORTS = ((6, 80), (6, 8080), (17, 53), (1, 8))


class Watched(PolicyWriter):
    """A writer that is looked at after every step."""

    def __init__(self, shm, clock) -> None:
        super().__init__(shm, clock)
        self.look = None
        for name in ("widen", "set_policy", "set_groups", "map", "unmap", "map_identity",
                     "set_subject", "clear_policy"):  # fmt: skip
            setattr(self, name, self._then_look(getattr(self, name)))
        self.entries.write = self._by_steps(self.entries.write)
        for name in ("delete", "free", "keep"):
            setattr(self.entries, name, self._then_look(getattr(self.entries, name)))

    def _then_look(self, act):
        def acted(*arguments):
            result = act(*arguments)
            if self.look:
                self.look()
            return result

        return acted

    def _by_steps(self, write):
        """Entries one by one, denies before allows."""

        def written(plan):
            for batch, where in plan.steps:
                for n in range(len(batch)):
                    write(Plan(((batch.part(slice(n, n + 1)), where[n : n + 1]),), 0))
                    if self.look:
                        self.look()
            self.entries.count += plan.added

        return written


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = PolicyWorld(tmp_path_factory.mktemp("world"))
    yield made
    made.shm.close()


def passes(world, ports) -> set:
    """Every question that is answered by yes."""
    shm = world.shm
    groups_of = {peer: naive.groups_of(shm, peer) for peer in PEERS}
    rows = {port: int(shm.subjects[port]["policy"]) for port in ports}
    said: dict = {}
    for row in set(rows.values()):
        for groups in set(groups_of.values()):
            for turn in (0, 1):
                for protocol, number in PORTS:
                    word = naive.ask(shm, row, groups, turn, protocol, number)
                    said[row, groups, turn, protocol, number] = naive.allows(word)
    return {
        (port, peer, turn, protocol, number)
        for port, row in rows.items()
        for peer, groups in groups_of.items()
        for turn in (0, 1)
        for protocol, number in PORTS
        if said[row, groups, turn, protocol, number] and peer not in world.endpoints[port][2]
    }


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32), wide_from=st.sampled_from([3, 256]))
@example(seed=185, wide_from=256)  # a pod joins a row that another's change narrows in place
def test_every_moment_is_the_old_the_new_or_stricter(world, seed, wide_from):
    r = Random(seed)
    fill(r, world)
    world.options = replace(world.options, wide_from=wide_from)
    world.writer = Watched(world.shm, lambda: world.now)
    world.engine = PolicyEngine(world.writer, world.options, world.rules, lambda: world.now)
    world.update()
    for _ in range(3):
        ends = dict(world.endpoints)
        before = passes(world, ends)
        what = [change(r, world) for _ in range(r.choice([1, 1, 2]))]
        if "namespace" in what or (len(what) > 1 and not set(what) <= POLICIES):
            world.update()
            continue
        world.endpoints = {**world.endpoints, **ends}
        moments: list[set] = []
        world.writer.look = lambda moments=moments, ends=ends: moments.append(passes(world, ends))
        world.update()
        world.writer.look = None
        after = passes(world, ends)
        for moment in moments:
            assert moment <= before | after, "more passes than before and after"
            if len(what) == 1:
                assert moment >= before & after, (
                    "what is allowed before and after is denied between"
                )
        world.now += 0.3
