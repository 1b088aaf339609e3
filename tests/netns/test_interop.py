"""A node that is plain Linux, with a kernel vxlan device, and Penstock's pods."""

import pytest

from bench import checks
from bench.lab import Lab
from bench.peers import LinuxNode
from bench.penstock import Cluster, Settings

pytestmark = [pytest.mark.root, pytest.mark.net]

LINUX_MAC = "02:11:22:33:44:55"
NUMBER = 2


@pytest.fixture(scope="module", params=[4, 6], ids=["underlay4", "underlay6"])
def world(request):
    underlay = request.param
    with Lab() as lab:
        cluster = Cluster(lab, Settings(underlay_family=underlay, network={"vni": 1})).start(
            nodes=1
        )
        plain = LinuxNode(lab.namespace("plain"), NUMBER)
        assert lab.connect(plain.namespace) == NUMBER
        plain.overlay(underlay, LINUX_MAC)
        theirs = plain.pod("theirs")
        node = cluster.nodes[0]
        plain.reach(node.number, underlay, node.ask("status")["node"]["gateway_mac"])
        cluster.announce("plain", NUMBER, {"penstock.io/vtep-mac": LINUX_MAC})
        yield node.pod("ours"), theirs


@pytest.fixture(scope="module")
def servers(world):
    return {pod.name: checks.serve(pod.namespace) for pod in world}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("direction", ["to linux", "from linux"])
def test_pods_talk_through_the_kernels_vxlan(world, servers, family, direction):
    ours, theirs = world
    source, target = (ours, theirs) if direction == "to linux" else (theirs, ours)
    address = target.addresses[family]
    checks.eventually_pings(source.namespace, address)
    checks.ping(source.namespace, address, size=1300)
    checks.curl(source.namespace, address, servers[target.name])
    assert checks.iperf3(source.namespace, address, amount="20M").gbits > 0
    assert checks.request_response(source.namespace, address, "udp", 0.1)["transactions"] > 0
