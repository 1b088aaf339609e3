"""Scale in small: the benchmark's world compiles, changes and storms, and its numbers add up."""

from bench.scale_policy import measure
from dataplane.objects.collect import collect
from dataplane.policy.engine import PolicyEngine
from dataplane.policy.options import LocalEndpoint, LocalView, PolicyOptions
from dataplane.tables.policies import PolicyWriter
from dataplane.tables.shm import Shm
from tests.policy_world import namespace, node, pod, policy


def test_the_benchmark_runs(tmp_path):
    result = measure(rules=1000, identities=200, locals_=20)
    assert result["pods"] == 400
    assert result["policy rows"] == 20
    assert result["entries"] >= 900
    assert set(result["changes_ms"]) == {
        "remote pod more", "remote pod gone", "local pod more", "local pod gone", "policy more",
        "policy changed", "policy gone", "namespace labels",
    }  # fmt: skip
    assert result["storm_per_s"] > 0


def test_a_rule_about_a_thousand_pods_is_one_entry(tmp_path):
    """They are told apart by nothing, though each has labels of its own."""
    manifests = [node(1), namespace("x"), namespace("y")]
    for n in range(1000):
        one = pod("y", f"p{n}", 2, 2, app="web", n=f"n{n}")
        one["status"]["podIPs"] = [{"ip": f"10.244.{8 + n // 250}.{n % 250}"}]
        manifests.append(one)
    rule = {"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}}]}
    manifests += [pod("x", "a", 10, 1), policy("x", "p", {"podSelector": {}, "ingress": [rule]})]
    objects = collect(manifests)
    with Shm.create(tmp_path) as shm:
        engine = PolicyEngine(PolicyWriter(shm), PolicyOptions(), tmp_path / "rules")
        (one,) = [end for end in objects.pods.values() if end.name == "a"]
        local = LocalView("n1", endpoints=(LocalEndpoint(2, "x", "a", one.ips),))
        assert engine.update(objects, local) == []
        entries = PolicyWriter(shm).entries
        assert entries.count == 3, "the thousand, and the own node in each family"
        wide = engine.partition.selection.wide.values()
        assert (1000, 1) in [(len(one.members), len(one.groups)) for one in wide if one.rows]


def test_a_rule_about_many_pods_that_others_tell_apart_is_one_entry(tmp_path):
    """So are all pods, every address and a label that most have; a few are an entry each."""
    manifests = [node(1), namespace("x"), namespace("y"), pod("x", "a", 10, 1)]
    for n in range(300):
        one = pod("y", f"p{n}", 2, 2, app="web", n=f"n{n}", few=f"{n < 50}".lower())
        one["status"]["podIPs"] = [{"ip": f"10.244.{8 + n // 250}.{n % 250}"}]
        manifests.append(one)

    def rule(peer: dict, number: int) -> dict:
        return {"from": [peer], "ports": [{"port": number}]}

    def pods(**labels: str) -> dict:
        return {"namespaceSelector": {}, "podSelector": {"matchLabels": labels}}

    each = {"podSelector": {}, "ingress": [rule(pods(n=f"n{n}"), 1 + n) for n in range(300)]}
    manifests.append(policy("x", "each", each))
    objects = collect(manifests)
    (one,) = [end for end in objects.pods.values() if end.name == "a"]
    local = LocalView("n1", endpoints=(LocalEndpoint(2, "x", "a", one.ips),))
    with Shm.create(tmp_path) as shm:
        writer = PolicyWriter(shm)
        engine = PolicyEngine(writer, PolicyOptions(), tmp_path / "rules")
        engine.update(objects, local)
        count = writer.entries.count
        assert count == 302, "and the own node in each family"
        for more, peer in (
            (2, {"namespaceSelector": {}}),  # a wide group of each family: they differ in ::/0
            (2, {"ipBlock": {"cidr": "0.0.0.0/0"}}),  # pods, all others
            (1, pods(app="web")),
            (50, pods(few="true")),
        ):
            wide = {"podSelector": {}, "ingress": [rule(peer, 1000)]}
            assert engine.update(collect([*manifests, policy("x", "wide", wide)]), local) == []
            assert writer.entries.count == count + more, peer
            engine.update(objects, local)
            assert writer.entries.count == count
