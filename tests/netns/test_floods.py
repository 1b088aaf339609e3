"""A flood of spoofed SYNs, a storm of changes, a full table: who is connected stays connected."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench import checks
from bench.lab import Lab, eventually
from bench.penstock import Cluster, PodSpec, Settings
from tests.netns.manifests import namespace, network_policy, service, slices
from tests.netns.test_policy import ECHO, TALK

pytestmark = [pytest.mark.root, pytest.mark.net]

RECORDS = 4096  # of the table: a flood fills it at once
NODE_PORT = 30080
VIP = {4: "10.96.0.90", 6: "fd00:96::90"}
FLOOD_S = 4.0
CHANGES = 1000
# SYNs from everywhere to one port; the kernel fills the IP header's checksum.
FLOOD = (
    "import os, random, socket, struct, sys, time\n"
    "target, port, seconds = socket.inet_aton(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])\n"
    "s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)\n"
    "end, sent = time.monotonic() + seconds, 0\n"
    "while time.monotonic() < end:\n"
    "    source = bytes([random.randrange(20, 100), *os.urandom(3)])\n"
    "    ip = struct.pack('!BBHHHBBH4s4s', 69, 0, 40, 0, 0, 64, 6, 0, source, target)\n"
    "    own = random.randrange(1024, 65536)\n"
    "    tcp = struct.pack('!HHIIBBHHH', own, port, 1, 0, 80, 2, 1, 0, 0)\n"
    "    s.sendto(ip + tcp, (sys.argv[1], 0)); sent += 1\n"
    "print(sent)\n"
)


@pytest.fixture(scope="module")
def world():
    with Lab() as lab:
        settings = Settings(more={"conntrack": {"max": RECORDS}})
        cluster = Cluster(lab, settings)
        cluster.far = cluster.start_beside()
        cluster.apply("namespaces", namespace("default"))
        cluster.server = cluster.nodes[0].pod("server", PodSpec(labels={"app": "server"}))
        cluster.client = cluster.nodes[0].pod("client", PodSpec(labels={"app": "client"}))
        cluster.servers = checks.serve(cluster.server.namespace)
        ports = [(80, checks.HTTP_PORT)]
        cluster.apply(
            "web",
            service("web", list(VIP.values()), ports, type="NodePort", node_ports=[NODE_PORT]),
            *slices("web", ports, [("node1", cluster.server.addresses)]),
        )
        cluster.far.namespace.spawn(sys.executable, "-c", ECHO, log="echo")
        eventually(
            lambda: "9000" in cluster.far.namespace.run("ss", "-Hltn", "sport = 9000"), "the server"
        )
        yield cluster


class Talk:
    """A live connection of a pod with the world, and whether it is."""

    def __init__(self, world) -> None:
        words = [sys.executable, "-u", "-c", TALK, world.far.addresses[4]]
        self.process = subprocess.Popen(
            world.client.namespace.wrap(words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def alive(self) -> bool:
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip() == "True"

    def __enter__(self) -> "Talk":
        for _ in range(5):  # established, for a full table too
            assert self.alive()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


def _keeps_on(talk: Talk, during) -> int:
    """Talk until something has ended; returns how often. Each time there was an answer."""
    times = 0
    while not during.done():
        assert talk.alive(), f"after {times} answers"
        times += 1
        time.sleep(0.02)
    return times


def test_a_flood_of_spoofed_syns_over_a_full_table(world):
    node = world.nodes[0]
    words = (sys.executable, "-c", FLOOD, node.addresses[4], str(NODE_PORT), str(FLOOD_S))
    with Talk(world) as talk, ThreadPoolExecutor(1) as pool:
        flood = pool.submit(world.far.namespace.run, *words)
        assert _keeps_on(talk, flood) > 20
        assert int(flood.result()) > 2 * RECORDS
        state = node.ask("status")["forwarder"]["conntrack"]
        assert state["limit"] == RECORDS
        assert 0.9 * RECORDS < state["connections"] <= RECORDS
        assert state["pressure_percent"] > 80
        rows = node.ask("counters")["reasons"]
        assert all(row["text"] for row in rows if row["packets"])
        assert talk.alive()
    checks.curl(world.client.namespace, world.server.addresses[4], world.servers)
    assert node.ask("status")["ready"]


def test_a_storm_of_changes_under_traffic(world):
    """A thousand changes of policies and pods: live traffic goes on, and the last one counts."""
    node = world.nodes[0]

    def storm() -> float:
        start = time.monotonic()
        for number in range(CHANGES):
            port = 1 + number % 60000
            world.apply(
                f"storm-{number % 50}",
                network_policy(
                    f"storm-{number % 50}",
                    podSelector={"matchLabels": {"app": "server"}},
                    ingress=[{"ports": [{"port": port}, {"port": checks.HTTP_PORT}]}],
                ),
            )
        return CHANGES / (time.monotonic() - start)

    with Talk(world) as talk, ThreadPoolExecutor(1) as pool:
        changes = pool.submit(storm)
        assert _keeps_on(talk, changes) > 5
        assert changes.result() > 0
        checks.curl(world.client.namespace, world.server.addresses[4], world.servers)
        asked = ("default/client", "default/server", f"{CHANGES}/tcp")  # of the last change
        eventually(lambda: _allowed(node, *asked), "the last change", 30)
        assert talk.alive()
    assert node.ask("status")["errors"] == []
    for number in range(50):
        world.remove(f"storm-{number}")


def _allowed(node, *asked: str) -> bool:
    words = node.namespace.wrap(node.words("policy", "why", *asked))
    return subprocess.run(words, capture_output=True, check=False).returncode == 0
