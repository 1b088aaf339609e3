"""What does not fit is refused as a whole, told, and tried again."""

import pytest

from dataplane.tables.errors import TableFull
from tests.policy_node import C4, begin, peer, row_of, write
from tests.policy_world import PolicyWorld, addresses, pod, policy
from xdp.abi import CONST, value


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    made = PolicyWorld(tmp_path_factory.mktemp("world"))
    yield made
    made.shm.close()


@pytest.fixture
def world(shared):
    return begin(shared)


# --- limits ---------------------------------------------------------------------------------------


def many(count: int, first: int = 1) -> str:
    ports = ", ".join(f"{{port: {2 * n}}}" for n in range(first, first + count))
    return f"{{podSelector: {{matchLabels: {{app: a}}}}, ingress: [{{ports: [{ports}]}}]}}"


def test_a_policy_beyond_the_limit_is_refused_and_the_last_good_one_stays(world):
    world.start(entries_max=256)
    write(world, "p", many(100))
    assert world.update() == []
    row = row_of(world, 2)
    write(world, "q", many(300, 500))
    (problem,) = world.update()
    for word in ("x/a", "needs 4", "limit 256", "policy.entries_max", "last good policy stays"):
        assert word in problem
    assert row_of(world, 2) == row
    assert world.allows(2, "ingress", C4, 6, 4)
    assert not world.allows(2, "ingress", C4, 6, 1002)
    assert world.engine.ready_for(2)
    world.put(pod("y", "d", 13, 2, app="d"))
    assert world.update() == [problem], "it is told as long as it is so"
    write(world, "q", many(100, 500))
    assert world.update() == []
    assert world.allows(2, "ingress", C4, 6, 1002)


def test_a_pod_whose_first_policy_does_not_fit_is_closed(world):
    world.start(entries_max=256)
    write(world, "q", many(300))
    world.endpoints.pop(2)
    world.update()
    world.attach(2, world.manifests["Pod", "x", "a"])
    (problem,) = world.update()
    assert "it is closed" in problem
    assert row_of(world, 2) == 0
    assert not world.engine.ready_for(2)
    del world.manifests["NetworkPolicy", "x", "q"]
    assert world.update() == []
    assert row_of(world, 2) == 1


def test_peers_that_make_a_policy_outgrow_its_limit_close_it(world):
    """A range of 18 prefixes for one group is one thing, for thirty another."""
    world.start(entries_max=256)
    write(world, "p", "{podSelector: {matchLabels: {app: a}}, ingress: [{from: "
          "[{namespaceSelector: {matchLabels: {team: red}}}], "
          "ports: [{port: 1, endPort: 1000}]}]}")  # fmt: skip
    for n in range(30):
        world.put(pod("y", f"n{n}", 50 + n, 2, n=f"v{n}"))
    assert world.update() == []
    peers = [
        {"namespaceSelector": {}, "podSelector": {"matchLabels": {"n": f"v{n}"}}} for n in range(30)
    ]
    for n, one in enumerate(peers):  # rules of another pod tell them apart
        world.put(policy("x", f"s{n}", {
            "podSelector": {"matchLabels": {"app": "b"}},
            "ingress": [{"from": [one], "ports": [{"port": 10 + n}]}],
        }))  # fmt: skip
    (problem,) = world.update()
    assert "x/a" in problem and "it is closed" in problem
    assert row_of(world, 2) == 0
    assert world.allows(3, "ingress", addresses(2, 57)[0], 6, 17)


def test_a_full_table_refuses_what_grows_and_leaves_the_rest(world, monkeypatch):
    write(world, "p", "{podSelector: {matchLabels: {app: b}}, ingress: [{ports: [{port: 1}]}]}")
    world.update()
    monkeypatch.setattr(world.writer.entries, "most", world.writer.entries.count + 50)
    write(world, "q", many(100))
    (problem,) = world.update()
    assert "x/a" in problem and "50 are left" in problem
    assert world.allows(3, "ingress", C4, 6, 1)
    assert world.allows(2, "ingress", C4, 6, 80), "it had no policy before"


def test_no_slot_in_reach_is_a_full_table_too(world, monkeypatch):
    write(world, "p", "{podSelector: {matchLabels: {app: b}}, ingress: [{ports: [{port: 1}]}]}")
    world.update()
    place = world.writer.entries._place

    def crowded(batch, now):
        if len(batch) > 50:
            raise TableFull("no slot within 64 probes")
        return place(batch, now)

    monkeypatch.setattr(world.writer.entries, "_place", crowded)
    write(world, "q", many(100))
    write(world, "p", "{podSelector: {matchLabels: {app: b}}, ingress: [{ports: [{port: 2}]}]}")
    (problem,) = world.update()
    assert "no slot within 64 probes" in problem
    assert world.allows(3, "ingress", C4, 6, 2)


def test_no_policy_row_is_left(world, monkeypatch):
    monkeypatch.setattr(world.writer.policies, "_free", [])
    monkeypatch.setattr(world.writer.policies, "_next", CONST["POLICIES_MAX"])
    write(world, "p", "{podSelector: {matchLabels: {app: a}}}")
    (problem,) = world.update()
    assert "no policy row is left" in problem and "limit" in problem
    monkeypatch.undo()
    world.now += 10
    world.put(pod("y", "d", 13, 2, app="d"))
    assert world.update() == [], "it is tried again"
    assert not world.allows(2, "ingress", C4, 6, 80)


def test_no_row_of_peers_is_left(world, monkeypatch):
    monkeypatch.setattr(world.writer.peers, "_free", [])
    monkeypatch.setattr(world.writer.peers, "_next", CONST["PEERS_MAX"])
    world.put(pod("y", "d", 13, 2, app="new"))
    (problem,) = world.update()
    assert "2 addresses without their identity" in problem and "limit" in problem
    assert peer(world, addresses(2, 13)[0])[0] == value("IDENTITY_UNMANAGED")
    monkeypatch.undo()
    world.put(pod("y", "e", 14, 2, app="new"))
    assert world.update() == []
    assert peer(world, addresses(2, 13)[0])[0] >= value("IDENTITY_HASHED_FIRST")
