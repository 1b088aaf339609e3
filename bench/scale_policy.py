"""Policies at scale: compile time, latency of a change, entries and memory.

Rule: what is timed is PolicyEngine.update() with real tables, on objects as a source yields them.

Theory. `python -m bench.scale_policy` builds a cluster of 10 k identities (two pods each) whose
100 k rules all concern pods of this node: 250 local pods, each selected by 40 policies of 10 rules.
Rules name peers by namespace and label, some by address block, with a port or a range. Then the
engine compiles from nothing, once more after a restart, and single changes are made: a remote pod,
a local pod, a policy, a rule changed, a policy gone, a namespace's labels. The storm is a thousand
changes, twenty an update. `--json FILE` writes the numbers.
"""

import argparse
import gc
import json
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path
from random import Random
from typing import Any
from weakref import ref

from dataplane.objects.collect import Objects, Since, collect, interpret
from dataplane.policy.engine import PolicyEngine
from dataplane.policy.options import LocalEndpoint, LocalView, PolicyOptions
from dataplane.tables.policies import PolicyWriter
from dataplane.tables.shm import Shm

APPS = 10  # identities of a namespace
RULES = 10  # of a policy
GATHERED = 20  # changes of one update in the storm
ROUNDS = 40  # of each kind of single change
_V1, _V2 = "networking.k8s.io/v1", "cilium.io/v2"
WIDE = {  # rules about very many peers
    "all pods": (_V1, "ingress", {"from": [{"namespaceSelector": {}}]}),
    "0.0.0.0/0": (_V1, "egress", {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}),
    "all pods, port http": (
        _V1,
        "egress",
        {"to": [{"namespaceSelector": {}}], "ports": [{"port": "http"}]},
    ),
    "half of the pods": (
        _V1,
        "ingress",
        {"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"half": "0"}}}]},
    ),
    "cluster": (_V2, "ingress", {"fromEntities": ["cluster"]}),
    "cluster denied": (_V2, "ingressDeny", {"fromEntities": ["cluster"]}),
}
SUBJECTS = {
    "of one pod": ("CiliumNetworkPolicy", {"matchLabels": {"app": "app-0"}}),
    "of 10 pods": ("CiliumNetworkPolicy", {}),
    "of every pod": ("CiliumClusterwideNetworkPolicy", {}),
}


def _ips(number: int) -> list[str]:
    """Addresses of pod `number`: local pods are of 10.200.0.0/22."""
    return [
        f"10.{200 + (number >> 16)}.{number >> 8 & 255}.{number & 255}",
        f"fd00:244::{number:x}",
    ]


def _pod(number: int, identity: int, local: bool) -> dict[str, Any]:
    return {
        "kind": "Pod",
        "metadata": {
            "name": f"pod-{number}",
            "namespace": f"ns-{identity // APPS}",
            "labels": {
                "app": f"app-{identity % APPS}",
                "half": f"{identity % 2}",
                "pod-template-hash": f"{identity:x}",
            },
        },
        "spec": {
            "nodeName": "here" if local else f"node-{number % 100}",
            "containers": [{"ports": [{"name": "http", "containerPort": 8080}]}],
        },
        "status": {"podIPs": [{"ip": ip} for ip in _ips(number)]},
    }


def _rule(random: Random, identities: int) -> dict[str, Any]:
    peer = random.randrange(identities)
    space = {"kubernetes.io/metadata.name": f"ns-{peer // APPS}"}
    element: dict[str, Any] = {"namespaceSelector": {"matchLabels": space}}
    kind = random.random()
    if kind < 0.85:
        element["podSelector"] = {"matchLabels": {"app": f"app-{peer % APPS}"}}
    elif kind < 0.9:
        first = random.randrange(1, 200)
        element = {"ipBlock": {"cidr": f"{first}.{random.randrange(256)}.0.0/16"}}
    ports: list[dict[str, Any]] = [{"port": random.randrange(1, 30000)}]
    if kind < 0.05:
        ports = [{"port": 8000, "endPort": 8080}, {"port": 53, "protocol": "UDP"}]
    return {"peers": [element], "ports": ports}


def _policy(number: int, identity: int, random: Random, identities: int) -> dict[str, Any]:
    rules = [_rule(random, identities) for _ in range(RULES)]
    ingress = [{"from": rule["peers"], "ports": rule["ports"]} for rule in rules[: RULES // 2]]
    egress = [{"to": rule["peers"], "ports": rule["ports"]} for rule in rules[RULES // 2 :]]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"policy-{number}", "namespace": f"ns-{identity // APPS}"},
        "spec": {
            "podSelector": {"matchLabels": {"app": f"app-{identity % APPS}"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    }


class World:
    """The cluster as objects, and what of it is on this node."""

    def __init__(self, rules: int, identities: int, locals_: int) -> None:
        """locals_: pods of this node, each of an identity of its own."""
        self.random = Random(1)
        self.identities, self.locals = identities, locals_
        started = time.perf_counter()
        node = {
            "kind": "Node",
            "metadata": {"name": "here"},
            "spec": {"podCIDRs": ["10.200.0.0/22"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
        }
        manifests: list[dict[str, Any]] = [node]
        manifests += [
            {"kind": "Namespace", "metadata": {"name": f"ns-{n}"}}
            for n in range(identities // APPS)
        ]
        for number in range(2 * identities):
            identity = number % identities
            manifests.append(_pod(256 + number, identity, number < locals_))
        for number in range(rules // RULES):
            manifests.append(_policy(number, number % locals_, self.random, identities))
        self.objects = collect(manifests)
        self.parsed_s = time.perf_counter() - started
        self.endpoints = [
            LocalEndpoint(
                2 + n,
                f"ns-{n // APPS}",
                f"pod-{256 + n}",
                tuple(map(ip_address, _ips(256 + n))),
            )
            for n in range(locals_)
        ]

    def local(self) -> LocalView:
        """Return this node."""
        return LocalView(
            "here",
            frozenset({ip_address("192.0.2.1")}),
            tuple(self.endpoints),
            clusters=(ip_network("10.200.0.0/14"), ip_network("fd00:244::/48")),
            keep_source=(ip_network("10.0.0.0/8"),),
        )

    def with_object(self, manifest: dict[str, Any]) -> Objects:
        """Return the objects with one more or another one, as a source would yield them."""
        field, key, one = interpret(manifest)
        mapping = dict(getattr(self.objects, field))
        mapping[key] = one
        return self._next(field, key, mapping)

    def without(self, field: str, key: Any) -> Objects:
        """Return the objects without one."""
        mapping = dict(getattr(self.objects, field))
        del mapping[key]
        return self._next(field, key, mapping)

    def _next(self, field: str, key: Any, mapping: dict[Any, Any]) -> Objects:
        changed = {field: frozenset({key})}
        since = Since(ref(self.objects), changed)
        self.before = self.objects  # what is in force lives until the next is
        self.objects = replace(self.objects, since=since)
        object.__setattr__(self.objects, field, mapping)
        return self.objects


def _timed(act: Callable[[], Any]) -> float:
    started = time.perf_counter()
    act()
    return (time.perf_counter() - started) * 1000


def _changes(world: World, engine: PolicyEngine) -> dict[str, list[float]]:
    """Make single changes; return the milliseconds of each, by kind."""
    found: dict[str, list[float]] = {}

    def update(kind: str, objects: Objects) -> None:
        local = world.local()
        found.setdefault(kind, []).append(_timed(lambda: engine.update(objects, local)))

    random, most = world.random, 2 * world.identities
    for turn in range(ROUNDS):
        mine = random.randrange(world.locals)
        number = 256 + most + turn
        update("remote pod more", world.with_object(_pod(number, random.randrange(most), False)))
        update("remote pod gone", world.without("pods", _last_pod(world, number)))
        local = number + 5000
        pod = _pod(local, mine, True)
        objects = world.with_object(pod)
        ips = tuple(map(ip_address, _ips(local)))
        world.endpoints.append(LocalEndpoint(900, f"ns-{mine // APPS}", f"pod-{local}", ips))
        update("local pod more", objects)
        world.endpoints.pop()
        update("local pod gone", world.without("pods", (f"ns-{mine // APPS}", f"pod-{local}")))
        name = 1_000_000 + turn
        policy = _policy(name, mine, random, world.identities)
        update("policy more", world.with_object(policy))
        policy = json.loads(json.dumps(policy))
        policy["spec"]["ingress"][0]["ports"] = [{"port": 65000}]
        update("policy changed", world.with_object(policy))
        key = ("NetworkPolicy", policy["metadata"]["namespace"], policy["metadata"]["name"])
        update("policy gone", world.without("policies", key))
        labels = {"team": f"team-{turn}"}
        space = f"ns-{random.randrange(world.identities // APPS)}"
        manifest = {"kind": "Namespace", "metadata": {"name": space, "labels": labels}}
        update("namespace labels", world.with_object(manifest))
    return found


def _last_pod(world: World, number: int) -> tuple[str, str]:
    return next(key for key in world.objects.pods if key[1] == f"pod-{number}")


def _wide(world: World, engine: PolicyEngine) -> dict[str, float]:
    """Policies about very many peers, of one pod, of a namespace and of all pods of this node."""
    found = {}
    for peers, (api, way, rule) in WIDE.items():
        for pods, (kind, selector) in SUBJECTS.items():
            cilium = api == _V2
            if not cilium and kind == "CiliumClusterwideNetworkPolicy":
                continue
            policy = {
                "apiVersion": api,
                "kind": kind if cilium else "NetworkPolicy",
                "metadata": {"name": "wide", "namespace": "ns-0"},
                "spec": {"endpointSelector" if cilium else "podSelector": selector, way: [rule]},
            }
            _, key, _ = interpret(policy)
            steps = [("", world.with_object(policy)), (", gone", world.without("policies", key))]
            for what, objects in steps:
                change = partial(engine.update, objects, world.local())
                found[f"{peers}, {pods}{what}"] = _timed(change)
    return found


def _storm(world: World, engine: PolicyEngine, count: int = 1000) -> float:
    """Change pods and policies, gathered by twenty as the agent does; return changes a second."""
    random, local = world.random, world.local()
    plan = []
    for turn in range(count):
        if turn % 2:
            number = 300 + random.randrange(2 * world.identities)
            plan.append(_pod(number, random.randrange(world.identities), False))
        else:
            mine = random.randrange(world.locals)
            plan.append(_policy(2_000_000 + turn % 50, mine, random, world.identities))
    spent = 0.0
    for first in range(0, count, GATHERED):
        base = world.objects
        changed: dict[str, set[Any]] = {"pods": set(), "policies": set()}
        for manifest in plan[first : first + GATHERED]:
            field, key, _ = interpret(manifest)
            changed[field].add(key)
            world.with_object(manifest)
        keys = {field: frozenset(some) for field, some in changed.items()}
        world.objects = replace(world.objects, since=Since(ref(base), keys))
        spent += _timed(partial(engine.update, world.objects, local))
    return count / spent * 1000


def measure(rules: int, identities: int, locals_: int) -> dict[str, Any]:
    """Run everything once in a folder on tmpfs; return the numbers."""
    run_dir = Path(tempfile.mkdtemp(prefix="penstock-scale-", dir="/dev/shm"))
    try:
        world = World(rules, identities, locals_)
        gc.collect()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        shm = Shm.create(run_dir)
        engine = PolicyEngine(PolicyWriter(shm), PolicyOptions(), run_dir / "rules.db")
        local = world.local()
        compile_ms = _timed(lambda: _check(engine.update(world.objects, local)))
        result: dict[str, Any] = {
            "rules": rules,
            "identities": identities,
            "local pods": locals_,
            "pods": len(world.objects.pods),
            "parse_s": round(world.parsed_s, 2),
            "compile_s": round(compile_ms / 1000, 2),
            "entries": PolicyWriter(shm).entries.count,
            "groups": len(engine.partition.groups()),
            "policy rows": len(engine.distiller.rows),
            "engine_MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10,
            "tables_MiB": sum(f.stat().st_blocks for f in (run_dir / "shm").iterdir()) >> 11,
        }
        engine.close()
        again = PolicyEngine(PolicyWriter(shm), PolicyOptions(), run_dir / "rules.db")
        gc.collect()
        result["restart_s"] = round(_timed(lambda: again.update(world.objects, local)) / 1000, 2)
        gc.collect()
        gc.freeze()  # as the agent does after its first turn
        result["changes_ms"] = {
            kind: {
                "median": round(statistics.median(some), 2),
                "p99": round(sorted(some)[int(len(some) * 0.99)], 2),
            }
            for kind, some in _changes(world, again).items()
        }
        result["wide_ms"] = {k: round(v, 1) for k, v in _wide(world, again).items()}
        result["storm_per_s"] = round(_storm(world, again))
        again.close()
        shm.close()
        return result
    finally:
        shutil.rmtree(run_dir)


def _check(problems: list[str]) -> None:
    if problems:
        raise SystemExit(f"the engine refuses its own benchmark: {problems}")


def main() -> None:
    """Print the numbers as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rules", type=int, default=100_000)
    parser.add_argument("--identities", type=int, default=10_000)
    parser.add_argument("--locals", type=int, default=250)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options.rules, options.identities, options.locals)
    for name, one in result.items():
        if isinstance(one, dict):
            for kind, some in one.items():
                print(f"{name + ': ' + kind:<48} {some}")
        else:
            print(f"{name:<48} {one}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
