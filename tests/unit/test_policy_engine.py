"""The engine's turns: in place, apart, refused, attributed, restarted."""

import copy

import pytest

from dataplane.objects.collect import Objects
from tests.policy_node import A4, ALLOW_C, B4, C4, CCNP, CNP, HTTP, begin, row_of, write
from tests.policy_world import OWN, PolicyWorld, addresses, pod
from xdp.abi import value


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    made = PolicyWorld(tmp_path_factory.mktemp("world"))
    yield made
    made.shm.close()


@pytest.fixture
def world(shared):
    return begin(shared)


# --- rows -----------------------------------------------------------------------------------------


def test_pods_without_policy_are_open_and_gone_ones_closed(world):
    assert (row_of(world, 2), row_of(world, 3)) == (1, 1)
    assert world.engine.ready_for(2)
    assert not world.engine.ready_for(9)
    del world.endpoints[3]
    world.update()
    assert world.writer.subject(3) == (0, 0)
    assert not world.engine.ready_for(3)


def test_pods_with_the_same_rules_share_a_row_until_they_part(world):
    write(world, "p", ALLOW_C)
    world.update()
    shared = row_of(world, 2)
    assert shared == row_of(world, 3) > 1
    entries = world.writer.entries.count
    apart = write(
        world, "q", "{podSelector: {matchLabels: {app: a}}, ingress: [{ports: [{port: 1}]}]}"
    )
    world.update()
    assert row_of(world, 3) == shared, "who stays keeps the row"
    assert row_of(world, 2) != shared
    assert world.allows(2, "ingress", B4, 6, 1)
    assert not world.allows(3, "ingress", A4, 6, 1)
    assert world.allows(2, "ingress", C4, 17, 9)
    world.drop(apart)
    world.update()
    assert row_of(world, 2) == row_of(world, 3)
    assert world.writer.entries.count == entries


def test_a_policy_of_all_pods_of_a_row_is_written_in_place(world):
    write(world, "p", ALLOW_C)
    world.update()
    row = row_of(world, 2)
    before = world.writer.entries.count
    write(world, "q", "{podSelector: {}, ingress: [{ports: [{port: 1}]}]}")
    world.update()
    assert row_of(world, 2) == row_of(world, 3) == row
    assert world.writer.entries.count == before + 1


def test_a_row_that_others_want_as_it_is_is_not_changed_in_place(world):
    """In one turn one pod leaves the row of a key to which another comes."""
    for app in "abc":
        write(world, app, f"{{podSelector: {{matchLabels: {{app: {app}}}}}, "
              f"ingress: [{{ports: [{{port: {ord(app)}}}]}}]}}")  # fmt: skip
    world.update()
    first, second = row_of(world, 2), row_of(world, 3)
    world.put(pod("x", "a", 10, 1, HTTP, app="c"), pod("x", "b", 11, 1, HTTP, app="a"))
    world.update()
    assert row_of(world, 3) == first
    assert row_of(world, 2) != first
    assert world.allows(2, "ingress", C4, 6, ord("c"))
    assert world.allows(3, "ingress", C4, 6, ord("a"))
    assert not world.allows(3, "ingress", C4, 6, ord("b"))
    assert second != first


def test_a_row_that_is_copied_knows_the_groups_of_the_same_turn(world):
    write(world, "p", ALLOW_C)
    world.update()
    write(world, "q", "{podSelector: {matchLabels: {app: a}}, ingress: [{ports: [{port: 1}]}]}")
    world.put(pod("y", "d", 13, 2, HTTP, app="c", other="label"))
    write(world, "r", "{podSelector: {matchLabels: {app: b}}, ingress: [{from: [{podSelector: "
          "{matchLabels: {other: label}}}]}]}")  # fmt: skip
    world.update()
    d4 = addresses(2, 13)[0]
    for port in (2, 3):
        assert world.allows(port, "ingress", d4, 6, 80)
        assert world.allows(port, "ingress", C4, 6, 80)


def test_a_change_of_one_rule_leaves_the_others_alone(world):
    text = "{podSelector: {}, ingress: [{ports: [{port: 1}]}, {ports: [{port: 2}]}]}"
    write(world, "p", text)
    world.update()
    words = {n: world.word(2, "ingress", C4, 6, n) for n in (1, 2)}
    write(world, "p", text.replace("port: 2", "port: 3"))
    world.update()
    assert world.word(2, "ingress", C4, 6, 1) == words[1]
    assert world.word(2, "ingress", C4, 6, 3) == words[2], "the rule keeps its number"
    assert not world.allows(2, "ingress", C4, 6, 2)


# --- when something changes -----------------------------------------------------------------------


def judgement(world) -> int:
    return int(world.shm.control[0]["judgement"])


def test_connections_are_judged_again_only_for_a_reason(world):
    write(world, "p", ALLOW_C)
    world.update()
    seen = judgement(world)
    world.update()
    world.engine.update(world.objects(), world.local())
    write(world, "elsewhere", "{podSelector: {}}", space="z")
    assert world.update() == []
    world.put(copy.deepcopy(next(m for m in world.manifests.values() if m["kind"] == "Pod")))
    world.update()
    assert judgement(world) == seen
    world.put(pod("y", "c", 12, 2, HTTP, app="other"))
    world.update()
    assert judgement(world) > seen


def test_without_its_own_node_nothing_is_changed(world):
    write(world, "p", "{podSelector: {}}")
    world.update()
    rows = [row_of(world, port) for port in (2, 3)]
    assert world.engine.update(Objects(), world.local()) == [
        "no Node 'n1' among the objects: policies stay as they are"
    ]
    assert [row_of(world, port) for port in (2, 3)] == rows


def test_after_an_unexpected_error_the_next_turn_works_all_out(world, monkeypatch):
    write(world, "p", "{podSelector: {matchLabels: {app: a}}}")
    with monkeypatch.context() as patch:
        patch.setattr(world.writer, "set_policy", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            world.update()
    assert not world.allows(2, "ingress", C4, 6, 80) or row_of(world, 2) == 1
    world.update()
    assert not world.allows(2, "ingress", C4, 6, 80)
    assert world.allows(3, "ingress", C4, 6, 80)


def test_a_restart_writes_nothing_that_stands(world, monkeypatch):
    write(world, "p", ALLOW_C)
    write(world, "q", "{podSelector: {matchLabels: {app: a}}, ingress: [{ports: [{port: 1}]}]}")
    world.update()
    entries = world.shm.policy_entries.copy()
    subjects, policies = world.shm.subjects.copy(), world.shm.policies.copy()
    word = world.word(2, "ingress", C4, 6, 80)
    world.start()
    wrote = []
    monkeypatch.setattr(world.writer, "set_subject", lambda *a: wrote.append(a) or False)
    world.update()
    assert (world.shm.policy_entries == entries).all()
    assert (world.shm.policies == policies).all()
    assert (world.shm.subjects == subjects).all()
    assert world.word(2, "ingress", C4, 6, 80) == word
    assert all(world.writer.subject(port) == (identity, row) for port, identity, row in wrote)


def test_a_restart_after_changes_opens_nothing(world):
    write(world, "p", ALLOW_C)
    world.update()
    del world.manifests["NetworkPolicy", "x", "p"]
    write(world, "q", "{podSelector: {}, ingress: [{ports: [{port: 1}]}]}")
    world.put(pod("y", "c", 12, 2, HTTP, app="z"))
    world.start()
    world.update()
    assert not world.allows(2, "ingress", C4, 6, 80)
    assert world.allows(2, "ingress", C4, 6, 1)
    about = world.about(2, "ingress", C4, 6, 80)
    assert [one["name"] for one in about["policies"]] == ["q"]


# --- pods that are not known, containers ----------------------------------------------------------


def test_a_pod_before_its_object_is_isolated_and_meets_no_allowance(world):
    write(world, "p", "{podSelector: {matchLabels: {app: n}}, ingress: [{}]}")
    write(world, "q", "{podSelector: {matchLabels: {app: a}}, ingress: [{from: [{podSelector: "
          "{matchLabels: {app: n}}}, {podSelector: {matchLabels: {zone: far}}}]}]}")  # fmt: skip
    write(world, "r", "{endpointSelector: {matchLabels: {app: b}}, ingressDeny: [{fromEndpoints: "
          "[{matchLabels: {app: n}}]}], enableDefaultDeny: {ingress: false}}", CNP)  # fmt: skip
    new = pod("x", "n", 40, 1, HTTP, app="n")
    world.attach(7, new)
    world.update()
    n4 = addresses(1, 40)[0]
    assert world.writer.subject(7)[0] == value("IDENTITY_INIT")
    assert not world.allows(7, "ingress", C4, 6, 80), "some policy may select it"
    assert not world.allows(2, "ingress", n4, 6, 80), "it may not be the one that is allowed"
    assert not world.allows(3, "ingress", n4, 6, 80), "it may be the one that is denied"
    assert world.allows(7, "egress", C4, 6, 80)
    assert world.allows(7, "ingress", OWN[0], 6, 80), "probes"
    world.put(new)
    world.update()
    assert world.allows(7, "ingress", C4, 6, 80)
    assert world.allows(2, "ingress", n4, 6, 80)
    assert not world.allows(3, "ingress", n4, 6, 80)


def test_a_rule_for_all_pods_of_a_namespace_holds_for_the_unknown_too(world):
    write(world, "p", "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}")
    world.attach(7, pod("x", "n", 40, 1))
    world.update()
    assert world.allows(2, "ingress", addresses(1, 40)[0], 6, 80)
    assert world.allows(7, "ingress", A4, 6, 80)
    assert not world.allows(7, "ingress", C4, 6, 80)


def test_a_container_without_pod_is_init(world):
    world.endpoints[8] = "", "", ("10.244.1.99",)
    write(world, "w", "{endpointSelector: {matchLabels: {'reserved:init': ''}}, "
          "ingress: [{fromEntities: [init]}]}", CCNP, "")  # fmt: skip
    world.update()
    assert world.writer.subject(8)[0] == value("IDENTITY_INIT")
    assert world.allows(8, "ingress", "10.244.1.99", 6, 1)
    assert not world.allows(8, "ingress", A4, 6, 1)
    assert row_of(world, 2) == 1
