"""Path MTU: the routes say it, the forwarder enforces it, transfers live with it."""

import re

import pytest

from bench import checks
from bench.lab import Lab, LabError, eventually
from bench.penstock import Cluster, Settings

pytestmark = [pytest.mark.root, pytest.mark.net]

# Outer headers: Ethernet of the inner frame, VXLAN or Geneve, UDP, IP (RFC 7348, RFC 8926).
CASES = {
    "vxlan-4": (Settings(), 1450),
    "geneve-6": (Settings(tunnel="geneve", underlay_family=6), 1430),
    "direct": (Settings(mode="direct"), 1500),
    "jumbo": (Settings(mtu=9000), 8950),
}
HEADERS = {4: 28, 6: 48}  # IP and ICMP echo
EXACT = ("-M", "do")  # don't fragment: more than the known MTU is an error


@pytest.fixture(scope="module", params=list(CASES))
def world(request):
    settings, mtu = CASES[request.param]
    with Lab() as lab:
        cluster = Cluster(lab, settings).start()
        one, two = cluster.nodes
        pods = one.pod("here"), two.pod("there")
        yield *pods, mtu, cluster


@pytest.mark.parametrize("family", [4, 6])
def test_the_route_carries_the_path_mtu(world, family):
    here, there, mtu, cluster = world
    assert cluster.nodes[0].ask("status")["node"]["path_mtu"] == mtu
    address, size = there.addresses[family], mtu - HEADERS[family]
    checks.ping(here.namespace, address, size=size, options=EXACT)
    with pytest.raises(LabError, match=r"too long|too large|message size"):
        checks.ping(here.namespace, address, size=size + 1, options=EXACT, count=1, wait=1)


@pytest.mark.parametrize("family", [4, 6])
def test_a_pod_that_ignores_its_route_is_told(world, family):
    """With the route's MTU taken away the pod sends too much, and learns from our answer."""
    here, there, mtu, _ = world
    address = there.addresses[family]
    prefix = "32" if family == 4 else "128"
    router = here.namespace.show(f"-{family}", "route", "get", address)[0]["gateway"]
    here.namespace.ip(f"route add {address}/{prefix} via {router} dev eth0 mtu 65000")
    try:

        def told() -> bool:
            words = ["ping", "-n", "-c", "1", "-W", "1", *EXACT, "-s", str(mtu + 100), address]
            with pytest.raises(LabError) as refused:
                here.namespace.run(*words)
            return bool(re.search(rf"mtu ?= ?{mtu}\b", str(refused.value)))

        eventually(told, f"an answer that names {mtu}")
    finally:
        here.namespace.ip(f"route del {address}/{prefix}")


@pytest.mark.parametrize("family", [4, 6])
def test_large_transfers_arrive_whole(world, family):
    here, there, _, _ = world
    servers = checks.serve(there.namespace)
    try:
        for _ in range(5):
            checks.curl(here.namespace, there.addresses[family], servers)
        checks.iperf3(here.namespace, there.addresses[family], amount="50M")
    finally:
        for process in servers.processes:
            process.stop()


def test_pods_of_a_node_use_large_packets(world):
    here, _, _, cluster = world
    near = cluster.nodes[0].pod("near")
    for family, address in near.addresses.items():
        checks.ping(here.namespace, address, size=60000 - HEADERS[family], options=EXACT)
    near.delete()
