"""Truth tables with real packets: everybody tries everybody, and an independent reader judges.

Nine pods in three namespaces on two nodes, and both nodes, try each other's TCP, UDP and SCTP ports
and echo, in both families, under policies that are hand-written or drawn. What answers must be what
tests/naive/netpol.py allows after reading the same files as the nodes; it shares no code with them.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
import yaml

from bench.lab import ROOT, Lab, eventually
from bench.penstock import Cluster, Pod, PodSpec
from tests.naive.netpol import Oracle
from tests.policy_strategies import LABELS, NAMED, NAMESPACES, any_policy, network_policy, some
from tests.policy_world import namespace

pytestmark = [pytest.mark.root, pytest.mark.net]

# Protocol and port, or ICMP type, as policies see them.
SEEN_AS = {
    "tcp/80": (6, 80), "tcp/8080": (6, 8080), "tcp/443": (6, 443), "udp/53": (17, 53),
    "sctp/80": (132, 80),
}  # fmt: skip
ECHO = {4: (1, 8), 6: (58, 128)}
PORTS = (*SEEN_AS, "icmp/0")
TRY_S, SETTLED_S = 1.0, 30.0
RANDOM_TABLES = 5


class World:
    """The pods, and what each can reach."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.pods: dict[str, Pod] = {}
        self._sources: dict[tuple[str, str], str] = {}

    def attach(self) -> None:
        """Nine pods, every second on node 1, with drawn labels and named ports."""
        r = Random(7)
        teams = ({"team": "red"}, {"team": "blue"}, {})
        spaces = [namespace(name, **team) for name, team in zip(NAMESPACES, teams, strict=True)]
        self.cluster.apply("namespaces", *spaces)
        for place in range(9):
            labels = {key: r.choice(values) for key, values in LABELS.items() if r.random() < 0.8}
            named = {(name, kind): (name, number, kind) for name, number, kind in some(r, NAMED, 3)}
            ports = tuple(
                {"name": name, "containerPort": number, "protocol": kind}
                for name, number, kind in named.values()
            )
            where, name = NAMESPACES[place // 3], f"{NAMESPACES[place // 3]}{place % 3}"
            self.pods[name] = self.cluster.nodes[place % 2].pod(name, PodSpec(where, labels, ports))
        for name, pod in self.pods.items():
            words = ("-m", "tests.netns.probe", "serve", name, *SEEN_AS)
            env = {"PYTHONPATH": str(ROOT)}
            server = pod.namespace.spawn(sys.executable, *words, env=env, log=f"serve-{name}")
            eventually(lambda one=server: "serving" in one.output(), "the server")
        for node in self.cluster.nodes:
            node.namespace.sysctl({"net.ipv4.ping_group_range": "0 0"})
        for pod in self.pods.values():
            pod.namespace.sysctl({"net.ipv4.ping_group_range": "0 0"})

    def places(self) -> dict:
        """Who tries: pods and nodes."""
        return self.pods | {node.name: node for node in self.cluster.nodes}

    def source(self, place, target, family: int) -> str:
        """The address that a packet has: a node has several, and its kernel takes one."""
        if place in self.pods.values():
            return place.addresses[family]
        key = place.name, target.addresses[family]
        if key not in self._sources:
            (way,) = place.namespace.show("route", "get", target.addresses[family])
            self._sources[key] = way["prefsrc"]
        return self._sources[key]

    def _try(self, name: str, place) -> dict[tuple, bool]:
        targets = {
            f"{address},{port}": (name, pod.name, family, port)
            for pod in self.pods.values()
            if pod is not place
            for family, address in pod.addresses.items()
            for port in PORTS
        }
        words = (sys.executable, "-m", "tests.netns.probe", "ask", str(TRY_S), *targets)
        said = json.loads(place.namespace.run("env", f"PYTHONPATH={ROOT}", *words))
        for target, answer in said.items():
            assert answer in ("", "echo", targets[target][1]), f"{target} was answered by {answer}"
        return {targets[target]: bool(answer) for target, answer in said.items()}

    def tried(self) -> dict[tuple, bool]:
        """What answers: (source, target, family, port) -> whether."""
        found: dict[tuple, bool] = {}
        with ThreadPoolExecutor(4) as pool:
            for one in pool.map(lambda item: self._try(*item), self.places().items()):
                found |= one
        return found

    def allowed(self) -> dict[tuple, bool]:
        """What the oracle says of the same."""
        files = sorted(self.cluster.manifests.glob("*.yaml"))
        manifests = [one for path in files for one in yaml.safe_load_all(path.read_text())]
        oracles = {}
        for node in self.cluster.nodes:
            mine = {
                pod.name: (pod.spec.namespace, pod.name, tuple(pod.addresses.values()))
                for pod in node.pods
            }
            oracles[node.name] = Oracle(manifests, node.name, node.addresses.values(), mine)
        found = {}
        for name, place in self.places().items():
            for target in self.pods.values():
                for family in (4, 6) if target is not place else ():
                    ends = self.source(place, target, family), target.addresses[family]
                    for port in PORTS:
                        what = SEEN_AS.get(port) or ECHO[family]
                        way_in = oracles[target.node.name].allowed(
                            target.name, "ingress", ends[0], *what
                        )
                        way_out = name not in self.pods or oracles[place.node.name].allowed(
                            name, "egress", ends[1], *what
                        )
                        found[name, target.name, family, port] = way_in and way_out
        return found

    def check(self, *policies: dict) -> dict[tuple, bool]:
        """Apply policies; what answers must come to be what is allowed. Returns that."""
        self.cluster.apply("policies", *policies)
        wanted = self.allowed()
        end = time.monotonic() + SETTLED_S
        while (found := self.tried()) != wanted and time.monotonic() < end:
            pass
        differ = [
            f"{' '.join(map(str, key))}: {'answered' if found[key] else 'silent'}"
            for key in wanted
            if found[key] != wanted[key]
        ]
        assert not differ, "\n".join([f"{len(differ)} of {len(wanted)}", *differ[:20]])
        return wanted


@pytest.fixture(scope="module")
def world():
    with Lab() as lab:
        made = World(Cluster(lab).start())
        made.attach()
        yield made


TABLES = {
    "nothing is selected": """
kind: NetworkPolicy
metadata: {name: nobody, namespace: x}
spec: {podSelector: {matchLabels: {no: one}}}
""",
    "deny all ingress, then one namespace and one port of it": """
kind: NetworkPolicy
metadata: {name: deny, namespace: x}
spec: {podSelector: {}}
---
kind: NetworkPolicy
metadata: {name: some, namespace: x}
spec:
  podSelector: {}
  ingress:
  - from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: y}}}]
    ports: [{port: 80}]
""",
    "egress to labels in red namespaces, to a block with a hole, by name, range and SCTP": """
kind: NetworkPolicy
metadata: {name: out, namespace: y}
spec:
  podSelector: {}
  policyTypes: [Egress]
  egress:
  - to:
    - podSelector: {matchLabels: {app: a}}
      namespaceSelector: {matchLabels: {team: red}}
    ports: [{port: http}]
  - to: [{ipBlock: {cidr: 10.244.0.0/16, except: [10.244.2.0/24]}}]
    ports: [{port: 53, protocol: UDP}, {port: 80, protocol: SCTP}]
  - to: [{namespaceSelector: {}}]
    ports: [{port: 400, endPort: 500}]
""",
    "both selectors in one element, and in two": """
kind: NetworkPolicy
metadata: {name: and, namespace: z}
spec:
  podSelector: {matchLabels: {app: a}}
  ingress:
  - from:
    - podSelector: {matchLabels: {tier: front}}
      namespaceSelector: {matchLabels: {team: red}}
---
kind: NetworkPolicy
metadata: {name: or, namespace: z}
spec:
  podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [a]}]}
  ingress:
  - from:
    - podSelector: {matchLabels: {tier: front}}
    - namespaceSelector: {matchLabels: {team: red}}
""",
    "a deny rule beats what another policy allows, and echo has rules of its own": """
kind: CiliumClusterwideNetworkPolicy
metadata: {name: no-web}
spec:
  endpointSelector: {}
  ingressDeny:
  - fromEndpoints: [{matchLabels: {"k8s:io.kubernetes.pod.namespace": y}}]
    toPorts: [{ports: [{port: "80", protocol: ANY}]}]
  ingress: [{fromEntities: [all]}]
---
kind: CiliumNetworkPolicy
metadata: {name: echo, namespace: x}
spec:
  endpointSelector: {}
  egress:
  - toEntities: [cluster]
    icmps: [{fields: [{type: 8}]}]
  - toEndpoints: [{}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
""",
}
GROUPS = {"N": "networking.k8s.io/v1", "C": "cilium.io/v2"}


@pytest.mark.parametrize("title", TABLES)
def test_written(world, title):
    policies = list(yaml.safe_load_all(TABLES[title]))
    for one in policies:
        one["apiVersion"] = GROUPS[one["kind"][0]]
    found = world.check(*policies)
    assert any(found.values())
    assert all(found.values()) == (title == "nothing is selected")


@pytest.mark.parametrize("seed", range(RANDOM_TABLES))
def test_drawn(world, seed):
    r = Random(seed)
    drawn = [network_policy(r), *(any_policy(r) for _ in range(4))]
    distinct = {(one["kind"], *sorted(one["metadata"].items())): one for one in drawn}
    found = world.check(*distinct.values())
    assert any(found.values())
    assert not all(found.values())
