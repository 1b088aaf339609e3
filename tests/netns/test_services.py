"""Services by real programs: pods, nodes and a client outside, in both families."""

import json
import socket
import sys
import time

import pytest
import yaml

from bench import checks
from bench.lab import ROOT, Lab, eventually
from bench.penstock import Cluster

pytestmark = [pytest.mark.root, pytest.mark.net]

PORT = 8000  # of the pods' server
LOOPBACK = {4: "169.254.42.1", 6: "fd00:42::1"}
NODE_PORT, LOCAL_PORT, HOST_PORT = 30080, 30081, 8888
FAMILIES = pytest.mark.parametrize("family", [4, 6])
PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp"])


def vip(number: int, family: int) -> str:
    return f"10.96.0.{number}" if family == 4 else f"fd00:96::{number:x}"


def balanced(number: int, family: int) -> str:
    return f"203.0.113.{number}" if family == 4 else f"2001:db8:7::{number:x}"


def service(name: str, number: int, node_port: int = 0, **spec) -> dict:
    """A Service with TCP and UDP on port 80."""
    ports = [
        {"name": protocol.lower(), "protocol": protocol, "port": 80, "targetPort": PORT}
        | ({"nodePort": node_port} if node_port else {})
        for protocol in ("TCP", "UDP")
    ]
    status = spec.pop("status", {})
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIPs": [vip(number, 4), vip(number, 6)], "ports": ports, **spec},
        "status": status,
    }


def slices(name: str, *ends) -> list[dict]:
    """EndpointSlices of both families. ends: (addresses by family, node, conditions)."""
    ports = [{"name": p.lower(), "protocol": p, "port": PORT} for p in ("TCP", "UDP")]
    return [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{name}-v{family}",
                "namespace": "default",
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": f"IPv{family}",
            "ports": ports,
            "endpoints": [
                {"addresses": [addresses[family]], "nodeName": node, "conditions": conditions}
                for addresses, node, conditions in ends
            ],
        }
        for family in (4, 6)
    ]


class World:
    """Two nodes, two pods each, and a client on the same underlay."""

    def __init__(self, lab: Lab) -> None:
        self.cluster = Cluster(lab).start(1)
        self.cluster.join()
        self.one, self.two = self.cluster.nodes
        self.pods = {}
        for node in self.cluster.nodes:
            for letter in "ab":
                pod = node.pod(f"{node.name}{letter}")
                self.pods[pod.name] = pod
                self.serve(pod.namespace, pod.name)
            self.serve(node.namespace, node.name)
        self.client = lab.namespace("client")
        number = lab.connect(self.client)
        self.client_at = {4: f"192.0.2.{number}", 6: f"2001:db8::{number:x}"}
        for family, network in ((4, "203.0.113.0/24"), (6, "2001:db8:7::/48")):
            self.client.ip(f"route add {network} via {self.one.addresses[family]}")
        self.apply("base", *self.base())

    def base(self):
        ends = [self.end(name) for name in self.pods]
        status = {"loadBalancer": {"ingress": [{"ip": balanced(10, f)} for f in (4, 6)]}}
        yield service("all", 10, NODE_PORT, type="LoadBalancer", status=status)
        yield from slices("all", *ends)
        yield service("local", 11, LOCAL_PORT, type="NodePort", externalTrafficPolicy="Local")
        yield from slices("local", *ends)
        yield service("own", 12)
        yield from slices("own", self.end("node1a"))
        yield service("empty", 13)
        yield service("host", 14, 30082, type="NodePort")
        yield from slices("host", (self.one.addresses, "node1", {}))
        open_to = [
            f"{at}/{32 if at_family == 4 else 128}" for at_family, at in self.client_at.items()
        ]
        for number, name, ranges in (
            (15, "guarded", open_to),
            (16, "shut", ["198.51.100.0/24", "2001:db8:ffff::/48"]),
        ):
            status = {"loadBalancer": {"ingress": [{"ip": balanced(number, f)} for f in (4, 6)]}}
            spec = {"type": "LoadBalancer", "loadBalancerSourceRanges": ranges}
            yield service(name, number, status=status, **spec)
            yield from slices(name, *ends)

    def end(self, name: str, **conditions):
        pod = self.pods[name]
        return pod.addresses, pod.node.name, conditions

    def serve(self, namespace, name: str) -> None:
        words = (sys.executable, "-m", "tests.netns.whoami", "serve", name, str(PORT))
        namespace.spawn(*words, env={"PYTHONPATH": str(ROOT)}, log=f"{name}-whoami")
        eventually(
            lambda: namespace.run("ss", "-Hltn", f"sport = {PORT}").strip(), f"{name} serves"
        )

    def apply(self, name: str, *documents: dict) -> None:
        """Write manifests and wait until both agents have them in force."""
        beside = self.cluster.manifests / f".{name}"
        beside.write_text(yaml.safe_dump_all(documents))
        beside.rename(self.cluster.manifests / f"{name}.yaml")
        time.sleep(1.5)  # inotify's batch, and the forwarder's turn

    def ask(self, source, address: str, port: int = 80, protocol="tcp", count=1, length=1):
        words = (sys.executable, "-m", "tests.netns.whoami", "ask", protocol, address)
        told = source.run(*words, str(port), str(count), str(length), timeout=120)
        return json.loads(told)


@pytest.fixture(scope="module")
def world():
    with Lab() as lab:
        yield World(lab)


def names(answers) -> set[str]:
    assert all("error" not in one for one in answers), answers
    return {one["name"] for one in answers}


@FAMILIES
@PROTOCOLS
def test_pods_reach_every_backend_of_a_cluster_ip(world, family, protocol):
    pod = world.pods["node1a"]
    answers = world.ask(pod.namespace, vip(10, family), 80, protocol, 60)
    assert names(answers) == set(world.pods)
    for one in answers:
        own = one["name"] == "node1a"
        assert one["seen"] == (LOOPBACK[family] if own else pod.addresses[family])


@FAMILIES
def test_a_pod_reaches_itself(world, family):
    answers = world.ask(world.pods["node1a"].namespace, vip(12, family), count=5)
    assert names(answers) == {"node1a"}
    assert {one["seen"] for one in answers} == {LOOPBACK[family]}


@FAMILIES
@PROTOCOLS
def test_nodes_reach_cluster_ips(world, family, protocol):
    answers = world.ask(world.two.namespace, vip(10, family), 80, protocol, 40)
    assert names(answers) == set(world.pods)
    router = world.two.ask("status")["node"]["routers"][str(family)]
    assert {one["seen"] for one in answers} == {router}


@FAMILIES
@PROTOCOLS
def test_clients_outside_reach_node_ports(world, family, protocol):
    node = world.one.addresses[family]
    answers = world.ask(world.client, node, NODE_PORT, protocol, 60)
    assert names(answers) == set(world.pods)
    for one in answers:
        here = one["name"].startswith("node1")
        assert one["seen"] == (world.client_at[family] if here else node)


@FAMILIES
@PROTOCOLS
def test_traffic_policy_local_keeps_the_client(world, family, protocol):
    for node in (world.one, world.two):
        answers = world.ask(world.client, node.addresses[family], LOCAL_PORT, protocol, 30)
        assert names(answers) == {f"{node.name}a", f"{node.name}b"}
        assert {one["seen"] for one in answers} == {world.client_at[family]}


@FAMILIES
def test_clients_outside_reach_load_balancer_addresses(world, family):
    answers = world.ask(world.client, balanced(10, family), 80, "tcp", 40)
    assert names(answers) == set(world.pods)
    checks.ping(world.client, balanced(10, family))


@FAMILIES
def test_source_ranges_bind_clients_outside(world, family):
    assert "name" in world.ask(world.client, balanced(15, family))[0]
    assert world.ask(world.client, balanced(16, family))[0]["error"] == "TimeoutError"
    assert "name" in world.ask(world.pods["node1a"].namespace, balanced(16, family))[0]


@FAMILIES
def test_pods_reach_load_balancer_addresses_and_node_ports(world, family):
    pod = world.pods["node1a"].namespace
    for address, port in (
        (balanced(10, family), 80),
        (world.one.addresses[family], NODE_PORT),
        (world.two.addresses[family], NODE_PORT),
        (world.one.addresses[family], LOCAL_PORT),
    ):
        assert names(world.ask(pod, address, port, "tcp", 60)) == set(world.pods), (address, port)


@FAMILIES
def test_a_cluster_ip_is_answered_and_refused(world, family):
    pod = world.pods["node2a"].namespace
    checks.ping(pod, vip(10, family))
    for address, port in ((vip(13, family), 80), (vip(10, family), 81)):
        for protocol in ("tcp", "udp"):
            told = world.ask(pod, address, port, protocol)[0]
            assert told["error"] == "ConnectionRefusedError", (address, port, protocol)
            assert told["seconds"] < 1


@FAMILIES
@PROTOCOLS
def test_a_backend_of_the_host_network(world, family, protocol):
    pod = world.pods["node2a"]
    answers = world.ask(pod.namespace, vip(14, family), 80, protocol, 3)
    assert names(answers) == {"node1"}
    assert {one["seen"] for one in answers} == {pod.addresses[family]}
    answers = world.ask(world.client, world.two.addresses[family], 30082, protocol, 3)
    assert names(answers) == {"node1"}
    answers = world.ask(world.client, world.one.addresses[family], 30082, protocol, 3)
    assert names(answers) == {"node1"}, "client and backend are on the same side"
    answers = world.ask(world.one.namespace, vip(14, family), 80, protocol, 3)
    assert names(answers) == {"node1"}


@FAMILIES
def test_fragments_reach_a_node_port(world, family):
    node = world.one.addresses[family]
    world.ask(world.client, node, NODE_PORT, "udp", 30, 3000)  # the client learns the path MTU
    for size in (1400, 3000, 20000):
        answers = world.ask(world.client, node, NODE_PORT, "udp", 10, size)
        assert {one.get("bytes") for one in answers} == {size}, answers


def test_host_ports(world):
    pod = world.pods["node2b"]
    world.apply(
        "zz-hostport",  # read last: the lab writes the pod as well
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "node2b", "namespace": "default"},
            "spec": {
                "nodeName": "node2",
                "containers": [
                    {"name": "c", "ports": [{"containerPort": PORT, "hostPort": HOST_PORT}]}
                ],
            },
            "status": {"podIPs": [{"ip": at} for at in pod.addresses.values()]},
        },
    )
    for family in (4, 6):
        node = world.two.addresses[family]
        eventually(
            lambda node=node: "name" in world.ask(world.client, node, HOST_PORT)[0], "a host port"
        )
        answers = world.ask(world.client, node, HOST_PORT, "tcp", 5)
        assert names(answers) == {"node2b"}
        assert {one["seen"] for one in answers} == {world.client_at[family]}
        assert world.ask(world.client, world.one.addresses[family], HOST_PORT)[0]["error"]


def test_a_terminating_backend_keeps_its_connections(world):
    terminating = {"ready": False, "serving": True, "terminating": True}
    pod = world.pods["node2a"]
    with pod.namespace.inside():
        one = socket.create_connection((vip(12, 4), 80), 10)
    with one:
        assert b"node1a" in one.recv(1000)
        world.apply(
            "base",
            *(doc for doc in world.base() if doc["metadata"]["name"] not in ("own-v4", "own-v6")),
            *slices("own", world.end("node1a", **terminating), world.end("node2b")),
        )
        assert names(world.ask(pod.namespace, vip(12, 4), count=20)) == {"node2b"}
        one.sendall(b"still there?")
        assert one.recv(1000) == b"still there?"
    world.apply("base", *world.base())
    assert names(world.ask(pod.namespace, vip(12, 4), count=5)) == {"node1a"}


def test_an_agent_that_dies_and_comes_back_breaks_no_service(world):
    pod = world.pods["node1b"].namespace
    pid = world.one.kill_agent()
    answers = world.ask(pod, vip(10, 4), 80, "tcp", 300)
    eventually(lambda: world.one.pid("agent") not in (0, pid), "another agent", 60)
    world.one.wait()
    answers += world.ask(pod, vip(10, 6), 80, "tcp", 300)
    assert names(answers) == set(world.pods)


def test_the_command_line_shows_it(world):
    rows = {row["frontend"]: row for row in world.one.ask("lb", "list")}
    one = rows["10.96.0.10:80/tcp"]
    assert (one["service"], one["kind"]) == ("default/all:tcp", "cluster")
    assert {b["address"] for b in one["inside_backends"]} == {
        pod.addresses[4] for pod in world.pods.values()
    }
    assert world.one.ask("status")["errors"] == []
