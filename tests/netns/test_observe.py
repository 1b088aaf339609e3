"""Flows of real pods through the whole chain: forwarder, ring, observer, gRPC, command line."""

import json
import os
import signal
import subprocess

import pytest

from bench.lab import Lab, eventually
from bench.penstock import Cluster, PodSpec
from tests.netns.manifests import namespace, network_policy, service, slices

pytestmark = [pytest.mark.root, pytest.mark.net]

VIP = {4: "10.96.7.7", 6: "fd00:96::77"}
SERVER = (
    "import http.server, socket\n"
    "class Server(http.server.ThreadingHTTPServer):\n"
    "    address_family = socket.AF_INET6\n"
    "Server(('::', 8080), http.server.SimpleHTTPRequestHandler).serve_forever()\n"
)


@pytest.fixture(scope="module")
def world():
    with Lab() as lab:
        cluster = Cluster(lab).start(nodes=1)
        node = cluster.nodes[0]
        cluster.apply("namespaces", namespace("shop"))
        cluster.web = node.pod("web", PodSpec("shop", {"app": "web"}))
        cluster.db = node.pod("db", PodSpec("shop", {"app": "db"}))
        cluster.stranger = node.pod("stranger", PodSpec("shop", {"app": "stranger"}))
        cluster.db.namespace.spawn("python3", "-c", SERVER)
        cluster.apply(
            "service", service("database", list(VIP.values()), [(80, 8080)], space="shop"),
            *slices("database", [(80, 8080)], [(node.name, cluster.db.addresses)], space="shop"),
        )  # fmt: skip
        rule = {
            "from": [{"podSelector": {"matchLabels": {"app": "web"}}}],
            "ports": [{"port": 8080}],
        }
        chosen = {"matchLabels": {"app": "db"}}
        cluster.apply(
            "policy",
            network_policy(
                "db", "shop", podSelector=chosen, policyTypes=["Ingress"], ingress=[rule]
            ),
        )
        eventually(lambda: _fetch(cluster.web, f"http://{VIP[4]}/"), "the service")
        eventually(lambda: not _fetch(cluster.stranger, _direct(cluster, 4)), "the policy")
        yield cluster


def _direct(cluster, family: int) -> str:
    address = cluster.db.addresses[family]
    return f"http://{f'[{address}]' if family == 6 else address}:8080/"


def _fetch(pod, url: str) -> bool:
    words = ["curl", "-sfg", "-o", "/dev/null", "--max-time", "2", url]
    return subprocess.run(pod.namespace.wrap(words), check=False).returncode == 0


def observed(cluster, *words: str) -> list[dict]:
    """Flows that `penstock observe` finds."""
    said = cluster.nodes[0].command("observe", "-o", "json", *words)
    return [json.loads(line)["flow"] for line in said.splitlines()]


@pytest.mark.parametrize("family", [4, 6])
def test_an_allowed_connection_names_pods_service_and_policy(world, family):
    host = f"[{VIP[6]}]" if family == 6 else VIP[4]
    assert _fetch(world.web, f"http://{host}/")
    words = ("--from-pod", "shop/web", "--type", "policy-verdict", f"-{family}", "--last", "1")
    (flow,) = eventually(lambda: observed(world, *words), "the flow")
    assert (flow["source"]["pod_name"], flow["destination"]["pod_name"]) == ("web", "db")
    assert "k8s:app=web" in flow["source"]["labels"]
    assert flow["destination_service"] == {"name": "database", "namespace": "shop"}
    assert flow["IP"]["destination"] == world.db.addresses[family]
    assert flow["l4"]["TCP"]["destination_port"] == 8080
    assert (flow["verdict"], flow["traffic_direction"]) == ("FORWARDED", "INGRESS")
    (policy,) = flow["ingress_allowed_by"]
    assert (policy["kind"], policy["name"]) == ("NetworkPolicy", "db")


def test_its_end_has_all_bytes(world):
    node, mine = world.nodes[0], ("--ip", world.web.addresses[4])
    assert _fetch(world.web, f"http://{VIP[4]}/")

    def closed() -> dict | None:  # curl's FIN passes the worker, which may be later than curl's end
        (newest,) = node.ask("ct", "list", *mine, "--protocol", "tcp", "--last", "1")
        return newest if newest["state"] == "closed" else None

    port = eventually(closed, "the last packet")["source_port"]
    node.command("ct", "flush", *mine)

    def ended():
        words = ("--from-pod", "shop/web", "-4", "--type", "trace", "--last", "1000")
        found = observed(world, *words)
        ends = [flow for flow in found if flow["extensions"]["event"] == "end"]
        return [flow for flow in ends if flow["l4"].get("TCP", {}).get("source_port") == port]

    (flow,) = eventually(ended, "the end")
    more = flow["extensions"]
    assert int(more["packets"]) >= 4
    assert int(more["reply_bytes"]) > 200
    assert "ended after" in flow["Summary"]


@pytest.mark.parametrize("family", [4, 6])
def test_a_denied_one_names_who_denies_it(world, family):
    assert not _fetch(world.stranger, _direct(world, family))
    words = ("--pod", "shop/stranger", "--verdict", "DROPPED", f"-{family}", "--last", "1")
    (flow,) = eventually(lambda: observed(world, *words), "the drop")
    assert flow["drop_reason_desc"] == "POLICY_DENIED"
    assert flow["source"]["pod_name"] == "stranger"
    (policy,) = flow["ingress_denied_by"]
    assert (policy["namespace"], policy["name"]) == ("shop", "db")


def test_the_lines_that_people_know(world):
    assert not _fetch(world.stranger, _direct(world, 4))
    words = ("--pod", "shop/stranger", "--verdict", "DROPPED", "--print-policy-names")
    line = eventually(lambda: world.nodes[0].command("observe", *words), "it").splitlines()[-1]
    assert "shop/stranger:" in line
    assert "<> shop/db:8080 (ID:" in line
    assert "Policy denied DROPPED (TCP Flags: SYN" in line
    assert "INGRESS DENIED BY NetworkPolicy shop/db" in line


def test_an_observer_that_is_killed_comes_again_with_what_the_rings_hold(world):
    assert _fetch(world.web, f"http://{VIP[4]}/")
    before = world.nodes[0].pid("forwarder")
    os.kill(world.nodes[0].pid("observer"), signal.SIGKILL)
    assert _fetch(world.web, f"http://{VIP[4]}/"), "nobody waits for it"

    def again():
        try:
            return observed(world, "--from-pod", "shop/web", "--last", "1")
        except Exception:  # it is not there yet
            return None

    assert eventually(again, "the observer")[0]["destination"]["pod_name"] == "db"
    assert world.nodes[0].pid("forwarder") == before


def test_flows_on_disk_and_a_policy_that_is_tried_on_them(world):
    """The observer writes when it ends; what it wrote is read without any daemon."""
    node = world.nodes[0]
    assert _fetch(world.web, f"http://{VIP[4]}/")
    eventually(lambda: observed(world, "--from-pod", "shop/web", "--last", "1"), "the flow")
    folder = node.folder / "state" / "flows"
    before = set(folder.glob("*.parquet"))
    os.kill(node.pid("observer"), signal.SIGTERM)
    eventually(lambda: set(folder.glob("*.parquet")) - before, "the file")
    words = ("--input", str(folder), "--from-pod", "shop/web", "--to-port", "8080", "--last", "1")
    (flow,) = observed(world, *words)
    assert flow["destination"]["pod_name"] == "db"
    chosen = {"matchLabels": {"app": "db"}}
    file = node.folder / "closed.json"
    closed = network_policy("db", "shop", podSelector=chosen, policyTypes=["Ingress"], ingress=[])
    file.write_text(json.dumps(closed))
    said = subprocess.run(
        node.namespace.wrap(node.words("policy", "try", str(file), "-o", "json")),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 1, said.stderr
    found = json.loads(said.stdout)
    named = {
        (row["source"], row["destination"], row["port"], row["was"], row["becomes"])
        for row in found["changes"]
    }
    assert ("shop/web", "shop/db", "8080", "allowed", "denied") in named
    assert not any(row["becomes"] == "allowed" for row in found["changes"])
    assert found["judged"] >= found["changed"] > 0
