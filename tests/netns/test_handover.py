"""Between two forwarders: what XDP goes on forwarding, what it refuses, what the next takes up."""

import contextlib
import json
import os
import signal
import sys
import time
from functools import partial

import pytest
import yaml

from bench.lab import Lab, LabError, eventually
from bench.penstock import Cluster, PodSpec, Settings
from tests.netns.manifests import network_policy
from xdp.abi import value

pytestmark = pytest.mark.root

PORT = 5001
WRONG_VNI = value("REASON_WRONG_VNI")
EVERY_S = 0.002
# A number a datagram, and where each arrives: as it comes, with the time.
SEND = (
    "import itertools, socket, sys, time\n"
    "s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET, 2)\n"
    "s.connect((sys.argv[1], int(sys.argv[2])))\n"
    "for n in itertools.count():\n"
    "    try: s.send(n.to_bytes(8, 'big') + bytes(192))\n"
    "    except OSError: pass\n"
    f"    time.sleep({EVERY_S})\n"
)
RECEIVE = (
    "import json, signal, socket, sys, time\n"
    "s = socket.socket(socket.AF_INET6, 2)\n"
    "s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)\n"
    "s.bind(('::', int(sys.argv[1])))\n"
    "seen = []\n"
    "def tell(*_):\n"
    "    open(sys.argv[2], 'w').write(json.dumps(seen)); sys.exit(0)\n"
    "signal.signal(signal.SIGTERM, tell)\n"
    "print('ready', flush=True)\n"
    "while True: seen.append((int.from_bytes(s.recv(2048)[:8], 'big'), time.monotonic()))\n"
)


class Stream:
    """Numbered datagrams of one pod to another."""

    def __init__(self, source, target, family=4, port=PORT):
        self.file = target.node.folder / f"seen-{target.name}-{port}"
        words = (sys.executable, "-u", "-c")
        self.sink = target.namespace.spawn(
            *words, RECEIVE, str(port), str(self.file), log=f"sink{port}"
        )
        eventually(lambda: "ready" in self.sink.output(), "the receiver")
        self.source = source.namespace.spawn(
            *words, SEND, target.addresses[family], str(port), log=f"source{port}"
        )

    def end(self):
        """Stop; return [(number, moment)] as they came."""
        self.source.stop()
        time.sleep(0.1)
        self.sink.stop()
        return [tuple(one) for one in json.loads(self.file.read_text())]


@pytest.fixture(scope="module")
def world():
    with Lab() as lab:
        cluster = Cluster(lab, Settings()).start(2)
        one, two = cluster.nodes
        cluster.one = one
        cluster.a, cluster.b = one.pod("ha"), one.pod("hb", PodSpec(labels={"app": "hb"}))
        cluster.far = two.pod("far")
        yield cluster


@contextlib.contextmanager
def no_successor(node):
    """The supervisor sleeps meanwhile: a forwarder that dies has no successor."""
    os.kill(node.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(node.process.pid, signal.SIGCONT)


def in_table(node) -> int:
    """Entries of the node's flow table."""
    return node.ask("status")["forwarder"]["flow_table"]["entries"]


def next_forwarder(node, before: int) -> None:
    """Wait until another forwarder works."""

    def works() -> bool:
        with contextlib.suppress(LabError):  # `status` fails until the node is ready
            state = node.ask("status")
            return bool(state["ready"]) and state["forwarder"]["pid"] != before
        return False

    eventually(works, "the next forwarder", 60)


def whole(came) -> bool:
    """Every number from the first to the last, once and in order."""
    numbers = [number for number, _ in came]
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def counted(rows, sent: int) -> None:
    """Every packet is charged to the connection, whoever forwarded it."""
    eventually(lambda: rows()[0]["packets"] == sent, f"all of {sent} packets counted", 10)


@pytest.mark.parametrize("family", [4, 6])
def test_established_flows_lose_no_packet_when_the_forwarder_is_killed(world, family):
    """Same node and over the tunnel; the next forwarder takes up both, and their counters."""
    node = world.one
    near, far = PORT + family, PORT + 10 + family
    ports = {
        near: Stream(world.a, world.b, family, near),
        far: Stream(world.a, world.far, family, far),
    }
    eventually(lambda: in_table(node) >= 2, "entries in the flow table", 20)
    time.sleep(1.5)  # a turn of the forwarder: uplinks take redirected packets
    with no_successor(node):
        killed = node.kill_forwarder()
        died = time.monotonic()
        eventually(lambda: not node.pid("forwarder"), "the forwarder's end")
        time.sleep(1.5)
        with pytest.raises(LabError):  # new flows are refused
            world.a.namespace.run("ping", "-c1", "-W1", "-n", world.b.addresses[family])
    next_forwarder(node, killed)
    back = time.monotonic()
    world.a.namespace.run("ping", "-c1", "-W2", "-n", world.b.addresses[family])
    time.sleep(1.5)
    for port, stream in ports.items():
        came = stream.end()
        assert whole(came)
        assert sum(died < moment < back for _, moment in came) > (back - died) / EVERY_S / 4
        sent = came[-1][0] + 1
        rows = partial(node.ask, "ct", "list", "--protocol", "udp", "--port", str(port))
        counted(rows, sent)


def test_an_upgrade_in_place_loses_no_packet(world):
    """SIGHUP: agent, observer and forwarder are started anew."""
    node = world.one
    before = {name: node.pid(name) for name in ("agent", "forwarder")}
    stream = Stream(world.a, world.far)
    eventually(lambda: in_table(node) >= 1, "an entry in the flow table", 20)
    os.kill(node.process.pid, signal.SIGHUP)
    eventually(lambda: node.pid("agent") not in (0, before["agent"]), "another agent", 60)
    next_forwarder(node, before["forwarder"])
    time.sleep(0.5)
    assert whole(stream.end())


def start_anew(node, **network) -> None:
    """SIGHUP with another section `network`; return when the next forwarder works."""
    config = yaml.safe_load(node.config.read_text())
    config["network"] |= network
    node.config.write_text(yaml.safe_dump(config))
    before = node.pid("forwarder")
    os.kill(node.process.pid, signal.SIGHUP)
    next_forwarder(node, before)


def wrong_vni(node) -> int:
    rows = node.ask("counters")["reasons"]
    return sum(row["packets"] for row in rows if row["reason"] == WRONG_VNI)


def test_another_vni_holds_for_flows_that_the_table_has_from_before(world):
    """The next forwarder takes the table up, but no tunnel packet that has the old VNI."""
    node = world.one
    stream = Stream(world.far, world.a)
    eventually(lambda: in_table(node) >= 1, "an entry in the flow table", 20)
    try:
        start_anew(node, vni=4711)
        eventually(lambda: wrong_vni(node) > 0, "a packet with the wrong VNI", 20)
        since = time.monotonic() + 0.2
        time.sleep(1)
        assert max(moment for _, moment in stream.end()) < since
    finally:
        start_anew(node, vni="identity")
    again = Stream(world.far, world.a, port=PORT + 1)
    time.sleep(1)
    assert again.end()


def test_a_policy_stops_a_flow_though_no_forwarder_runs(world):
    """The agent's word in the generation: what it forbids stops at once."""
    node = world.one
    stream = Stream(world.a, world.b)
    eventually(lambda: in_table(node) >= 1, "an entry in the flow table", 20)
    with no_successor(node):
        killed = node.kill_forwarder()
        eventually(lambda: not node.pid("forwarder"), "the forwarder's end")
        time.sleep(0.5)
        world.apply(
            "policy-cut",
            network_policy(
                "cut", podSelector={"matchLabels": {"app": "hb"}}, policyTypes=["Ingress"]
            ),
        )

        def in_force() -> bool:
            rows = node.ask("policy", "get")
            return "cut" in json.dumps(rows)

        eventually(in_force, "the policy in force", 10)
        stopped = time.monotonic()
        time.sleep(1)
    next_forwarder(node, killed)
    time.sleep(0.5)
    came = stream.end()
    world.remove("policy-cut")
    assert came, "the stream ran"
    assert whole(came)
    assert max(moment for _, moment in came) <= stopped
