"""Pods on two nodes with the real daemon, attached by the real plugin, in every mode."""

import pytest

from bench import checks
from bench.lab import Lab
from bench.penstock import Cluster, Settings

pytestmark = [pytest.mark.root, pytest.mark.net]

MODES = {
    "vxlan-4": Settings(),
    "vxlan-6": Settings(underlay_family=6),
    "geneve-4": Settings(tunnel="geneve"),
    "direct": Settings(mode="direct"),
}


@pytest.fixture(scope="module", params=list(MODES))
def cluster(request):
    with Lab() as lab:
        cluster = Cluster(lab, MODES[request.param]).start()
        cluster.servers = {}
        for node in cluster.nodes:
            for letter in "ab":
                pod = node.pod(f"{node.name}{letter}")
                cluster.servers[pod.name] = checks.serve(pod.namespace)
            cluster.servers[node.name] = checks.serve(node.namespace)
        yield cluster


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("path", ["same node", "across"])
def test_pods_talk(cluster, family, path):
    one, two = cluster.nodes
    source = one.pods[0]
    target = one.pods[1] if path == "same node" else two.pods[0]
    address = target.addresses[family]
    checks.ping(source.namespace, address)
    checks.ping(source.namespace, address, size=1200)
    checks.curl(source.namespace, address, cluster.servers[target.name])
    assert checks.iperf3(source.namespace, address, amount="20M").gbits > 0
    assert checks.request_response(source.namespace, address, "udp", 0.1)["transactions"] > 0


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("path", ["same node", "across"])
def test_node_and_pod_talk(cluster, family, path):
    one, two = cluster.nodes
    node = one if path == "same node" else two
    pod = one.pods[0]
    for source, target, servers in (
        (node.namespace, pod.addresses[family], cluster.servers[pod.name]),
        (pod.namespace, node.addresses[family], cluster.servers[node.name]),
    ):
        checks.ping(source, target)
        checks.curl(source, target, servers)


@pytest.mark.parametrize("family", [4, 6])
def test_the_gateway_answers(cluster, family):
    node = cluster.nodes[0]
    router = node.ask("status")["node"]["routers"][str(family)]
    checks.ping(node.pods[0].namespace, router)


def test_the_nodes_own_traffic_is_untouched(cluster):
    one, two = cluster.nodes
    for family in (4, 6):
        checks.ping(one.namespace, two.addresses[family])
        checks.curl(one.namespace, two.addresses[family], cluster.servers[two.name])


def test_nothing_was_dropped(cluster):
    for node in cluster.nodes:
        drops = [row for row in node.ask("counters")["reasons"] if row["drop"]]
        # Neighbour discovery and multicast listener reports of the pods' kernels.
        assert {row["text"] for row in drops} <= {"Multicast handled"}, drops


def test_the_command_line_agrees(cluster):
    node = cluster.nodes[0]
    listed = {row["pod"]: row for row in node.ask("endpoint")}
    for pod in node.pods:
        row = listed[f"default/{pod.name}"]
        assert {4: row["ipv4"], 6: row["ipv6"]} == pod.addresses
    assert {row["name"] for row in node.ask("node")} == {"node1", "node2"}
