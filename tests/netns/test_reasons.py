"""Why can this pod not reach that name? One command, five causes, made by real packets."""

import contextlib
import re
import subprocess
import sys

import pytest

from bench import checks
from bench.lab import ROOT, Lab, LabError, eventually
from bench.penstock import Cluster, PodSpec, Settings
from bench.resolver import ADDRESSES, Resolver, publish
from tests.netns.manifests import cilium_policy, namespace, network_policy, service, slices

pytestmark = [pytest.mark.root, pytest.mark.net]

STORE, NEXT, BIG = "11.2.0.1", "11.2.0.2", "11.2.0.4"
SERVED = {"db": "10.96.0.90", "cart": "10.96.0.91"}
ZONES = {
    "myblobstorage.com": f"@ 1 A {STORE}\nbig A {BIG}\n",
    "default.svc.cluster.local": "".join(f"{n} A {at}\n" for n, at in SERVED.items()),
    "example.org": "@ A 11.2.0.9\n",
}
CLIENT = {"app": "genai_backend"}
POD = "default/genai"
SEND = (  # a program that finds the MTU out for itself, and never lowers its packets
    "import socket, sys, time\n"
    "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "s.setsockopt(socket.IPPROTO_IP, 10, 3)\n"  # IP_MTU_DISCOVER, IP_PMTUDISC_PROBE
    "for _ in range(6):\n"
    "    s.sendto(bytes(2000), (sys.argv[1], 4433)); time.sleep(0.4)\n"
)


def rules() -> dict:
    """The pod may ask for and reach the store, and services of its namespace."""
    names = [{"matchName": "myblobstorage.com"}, {"matchPattern": "*.myblobstorage.com"}]
    dns = {"k8s:io.kubernetes.pod.namespace": "kube-system", "k8s-app": "kube-dns"}
    may_ask = [*names, {"matchPattern": "*.default.svc.cluster.local"}]
    ports = {"ports": [{"port": "53", "protocol": "ANY"}], "rules": {"dns": may_ask}}
    egress = [
        {"toFQDNs": names},
        {"toEndpoints": [{}]},
        {"toEndpoints": [{"matchLabels": dns}], "toPorts": [ports]},
    ]
    return cilium_policy("genai", endpointSelector={"matchLabels": CLIENT}, egress=egress)


@pytest.fixture(scope="module")
def world():
    with Lab() as lab:
        settings = Settings(more={"dns": {"grace_s": 0}})
        cluster = Cluster(lab, settings).start(nodes=1)
        cluster.join()
        one, two = cluster.nodes
        far = cluster.outside()
        for address in (STORE, NEXT, BIG):
            far.namespace.ip(f"addr add {address}/32 dev lo")
            for node in cluster.nodes:
                node.namespace.ip(f"route add {address}/32 via {far.underlay[4]} dev eth0")
        cluster.apply("namespaces", namespace("default"), namespace("kube-system"))
        dns = two.pod("dns", PodSpec("kube-system", {"k8s-app": "kube-dns"}))
        cluster.genai = one.pod("genai", PodSpec(labels=CLIENT))
        db = two.pod("db", PodSpec(labels={"app": "db"}))
        cluster.resolver = Resolver(dns.namespace, ZONES)
        publish(cluster, dns)
        for where in (far.namespace, db.namespace):
            checks.serve(where)
        for name, address in SERVED.items():
            behind = [(two.name, db.addresses)] if name == "db" else []
            ports = [(checks.HTTP_PORT, checks.HTTP_PORT)]
            objects = [service(name, [address], ports), *slices(name, ports, behind)]
            cluster.apply(f"service-{name}", *objects)
        cluster.apply("policy-genai", rules())
        eventually(lambda: ask(cluster, "example.org") == "", "the policy", 30)
        yield cluster


def ask(world, name: str) -> str:
    """What the pod is told that a name leads to."""
    words = ("+short", "+time=2", "+tries=2", name)
    with contextlib.suppress(LabError):
        return world.genai.namespace.run("dig", f"@{ADDRESSES[4]}", *words).strip()
    return "no answer"


def fetch(world, host: str) -> bool:
    """Whether curl gets the page."""
    url = f"http://{host}:{checks.HTTP_PORT}/"
    with contextlib.suppress(LabError):
        world.genai.namespace.run("curl", "-sS", "-o", "/dev/null", "-m", "1", url)
        return True
    return False


def why(world, name: str) -> str:
    """What the command says."""
    node = world.nodes[0]
    words = node.namespace.wrap(node.words("fqdn", "why", name, "--pod", POD))
    said = subprocess.run(words, capture_output=True, text=True, check=False)
    assert said.returncode == ("WHY NOT" in said.stdout), said
    return said.stdout


def reason(told: str) -> str:
    """The reason, if there is one and no other."""
    found = re.findall(r"WHY NOT: (.*)", told)
    return found[0] if len(found) == 1 else told


def shown_in_readme(told: str, name: str) -> None:
    """README shows lines of the answer; numbers may differ."""

    def plain(text: str) -> str:
        return re.sub(r"\d+", "0", " ".join(text.replace("a packet ", "1 packets ").split()))

    block = rf"^\$ penstock fqdn why {re.escape(name)} --pod \S+\n(.*?)(?=^\$|^```)"
    shown = re.search(block, (ROOT / "README.md").read_text(), re.M | re.S)
    assert shown, f"README does not show {name}"
    for line in re.sub(r"\n {4,}", " ", shown[1]).splitlines():
        assert plain(line) in plain(told)


def test_the_name_is_refused(world):
    ask(world, "example.org")
    told = why(world, "example.org")
    assert reason(told).startswith("the pod may not ask")
    shown_in_readme(told, "example.org")


def test_nothing_is_a_reason_for_what_works(world):
    assert ask(world, "big.myblobstorage.com") == BIG
    assert fetch(world, BIG)
    told = why(world, "big.myblobstorage.com")
    assert "nothing is in the way of default/genai" in told


def test_the_address_is_stale(world):
    """Learned for its TTL and not used; the program keeps it, the name leads elsewhere."""
    assert ask(world, "myblobstorage.com") == STORE
    node = world.nodes[0]
    gone = lambda: STORE not in {row["address"] for row in node.ask("fqdn", "list")}  # noqa: E731
    eventually(gone, "the end of its TTL", 20, 0.3)
    assert not fetch(world, STORE)
    told = why(world, "myblobstorage.com")
    assert "leads nowhere now" in reason(told)
    world.resolver.change("myblobstorage.com", f"@ 60 A {NEXT}\nbig A {BIG}\n")
    eventually(lambda: ask(world, "myblobstorage.com") == NEXT, "the next address", 20)
    told = why(world, "myblobstorage.com")
    assert f"leads to {NEXT} now" in reason(told)
    shown_in_readme(told, "myblobstorage.com")
    eventually(lambda: ask(world, "myblobstorage.com") and fetch(world, NEXT), "the store", 10)
    assert "nothing is in the way" in why(world, "myblobstorage.com"), "what was is no reason"


def test_policy_on_the_other_side(world):
    name = "db.default.svc.cluster.local"
    assert ask(world, name) == SERVED["db"]
    assert fetch(world, SERVED["db"])
    peers = [{"from": [{"podSelector": {"matchLabels": {"role": "admin"}}}]}]
    world.apply(
        "policy-db",
        network_policy("db", podSelector={"matchLabels": {"app": "db"}},
                       policyTypes=["Ingress"], ingress=peers),
    )  # fmt: skip
    eventually(lambda: not fetch(world, SERVED["db"]), "the policy in force", 20)
    told = why(world, name)
    assert reason(told).startswith("policy on the other side: default/db")
    shown_in_readme(told, name)


def test_a_service_without_backend(world):
    name = "cart.default.svc.cluster.local"
    assert ask(world, name) == SERVED["cart"]
    assert not fetch(world, SERVED["cart"])
    told = why(world, name)
    assert reason(told).startswith("service default/cart")
    shown_in_readme(told, name)


def test_packets_that_do_not_fit(world):
    name = "big.myblobstorage.com"
    assert ask(world, name) == BIG
    world.genai.namespace.run(sys.executable, "-c", SEND, BIG)
    told = why(world, name)
    assert reason(told).startswith("MTU: ")
    shown_in_readme(told, name)
