"""The forwarder alone: tables written by hand, no agent, real veths and real programs."""

import contextlib
import ctypes
import ipaddress
import json
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from tests.worlds import open_pods
from xdp.abi import value
from xdp.handover import Handover

pytestmark = [pytest.mark.root, pytest.mark.net]

GATEWAY = bytes.fromhex("025000000001")
ROUTER4, ROUTER6 = "10.9.0.1", "fd09::1"


def sh(command: str) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def inside(namespace: str):
    """Run the body of this thread in a network namespace (threads started inside stay there)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
        assert libc.setns(there.fileno(), 0x40000000) == 0
        try:
            yield
        finally:
            assert libc.setns(home.fileno(), 0x40000000) == 0


class World:
    """A node namespace with pods, and the forwarder in this process."""

    def __init__(self, pods: int = 2) -> None:
        self.tag = uuid.uuid4().hex[:6]
        self.node = f"pe{self.tag}n"
        self.pods = [f"pe{self.tag}p{number}" for number in range(pods)]
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.run_dir = Path(self.folder.name)
        self.forwarder = None

    def start(self) -> None:
        from dataplane.daemon.forwarder import Forwarder, Ground
        from dataplane.tables.model import Adjacency, Port
        from dataplane.tables.shm import Shm
        from dataplane.tables.writer import TableWriter

        sh(f"ip netns add {self.node} && ip -n {self.node} link set lo up")
        self.shm = Shm.create(self.run_dir)
        writer = TableWriter(self.shm)
        writer.set_node(
            gateway_mac=GATEWAY, workers=1, frame_count=4096, spin_us=50, watchdog_ms=3000,
            error_rate=100, error_burst=100,
            router4=int(ipaddress.ip_address(ROUTER4)),
            router6_hi=int(ipaddress.ip_address(ROUTER6)) >> 64,
            router6_lo=int(ipaddress.ip_address(ROUTER6)) & (1 << 64) - 1,
        )  # fmt: skip
        routes = {}
        for number, pod in enumerate(self.pods):
            four = ipaddress.ip_address(f"10.9.0.{number + 2}")
            six = ipaddress.ip_address(f"fd09::{number + 2}")
            ifindex, mac = self._pod(pod, number, str(four), str(six))
            port = Port(
                kind=value("PORT_POD"), name=f"h{number}", ifindex=ifindex, mtu=65000,
                queue_count=1, mac=GATEWAY, peer_mac=mac, address4=four, address6=six,
                endpoint=number + 1,
            )  # fmt: skip
            writer.set_port(number, port)
            adjacency = Adjacency(
                kind=value("ADJACENCY_POD"), port=number, mtu=65000, source_mac=GATEWAY,
                destination_mac=mac,
            )  # fmt: skip
            routes[ipaddress.ip_network(four)] = adjacency
            routes[ipaddress.ip_network(six)] = adjacency
        gateway = Adjacency(
            kind=value("ADJACENCY_GATEWAY"), port=0, mtu=65000, source_mac=GATEWAY,
            destination_mac=GATEWAY,
        )  # fmt: skip
        routes[ipaddress.ip_network(ROUTER4)] = gateway
        routes[ipaddress.ip_network(ROUTER6)] = gateway
        writer.replace_routes(routes)
        writer.publish()
        open_pods(self.shm, dict.fromkeys(range(len(self.pods)), 70000))
        (self.run_dir / "shm" / "steering.json").write_text(
            json.dumps({"tunnel_port": 8472, "locals": ["192.0.2.1"], "prefixes": [], "nat": []})
        )
        with inside(self.node):
            state = self.run_dir / "state"
            self.forwarder = Forwarder(
                self.shm, self.run_dir, state, Handover({}), Ground(self.shm, {})
            )
            ports = self.forwarder.sync()
        assert all(port["ready"] for port in ports), [port["error"] for port in ports]

    def _pod(self, pod: str, number: int, four: str, six: str) -> tuple[int, bytes]:
        sh(f"ip netns add {pod}")
        sh(
            f"ip -n {self.node} link add h{number} mtu 65000 numrxqueues 1 numtxqueues 1 type veth "
            f"peer name eth0 netns {pod} mtu 65000 numrxqueues 1 numtxqueues 1"
        )
        sh(f"ip netns exec {pod} sysctl -qw net.ipv6.conf.all.disable_ipv6=0")
        sh(f"ip -n {pod} link set lo up && ip -n {pod} link set eth0 up")
        sh(f"ip -n {self.node} link set h{number} up")
        sh(f"ip netns exec {pod} ethtool -K eth0 tx off")
        sh(
            f"ip -n {pod} addr add {four}/32 dev eth0 && "
            f"ip -n {pod} addr add {six}/128 dev eth0 nodad"
        )
        sh(
            f"ip -n {pod} route add {ROUTER4} dev eth0 && "
            f"ip -n {pod} route add default via {ROUTER4}"
        )
        sh(f"ip -n {pod} -6 route add {ROUTER6} dev eth0")
        sh(f"ip -n {pod} -6 route add default via {ROUTER6}")
        link = json.loads(sh(f"ip -n {self.node} -j link show h{number}"))[0]
        peer = json.loads(sh(f"ip -n {pod} -j link show eth0"))[0]
        return link["ifindex"], bytes.fromhex(peer["address"].replace(":", ""))

    def reasons(self) -> dict[int, int]:
        rows = self.shm.reasons["packets"].sum(axis=(0, 1))
        return {int(number): int(rows[number]) for number in rows.nonzero()[0]}

    def close(self) -> None:
        if self.forwarder:
            with inside(self.node):
                self.forwarder.close(keep_pods=False)
            self.forwarder.umem.close()
        for namespace in [*self.pods, self.node]:
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)
        self.folder.cleanup()


@pytest.fixture(scope="module")
def world():
    world = World()
    try:
        world.start()
        yield world
    finally:
        world.close()


def eventually(check, seconds: float = 10.0):
    deadline = time.monotonic() + seconds
    while not (found := check()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("target", [ROUTER4, ROUTER6])
def test_the_gateway_answers(world, target):
    sh(f"ip netns exec {world.pods[0]} ping -c 3 -i 0.05 -W 5 {target}")
    assert world.reasons()[value("REASON_ANSWERED_ECHO")] >= 3


@pytest.mark.parametrize("target", ["10.9.0.3", "fd09::3"])
def test_pods_reach_each_other(world, target):
    sh(f"ip netns exec {world.pods[0]} ping -c 3 -i 0.05 -W 5 {target}")
    sh(f"ip netns exec {world.pods[0]} ping -c 3 -i 0.05 -W 5 -s 30000 {target}")


def test_a_pod_cannot_use_another_address(world):
    before = world.reasons().get(value("REASON_INVALID_SOURCE_IP"), 0)
    sh(f"ip -n {world.pods[0]} addr add 10.9.0.77/32 dev eth0")
    try:
        subprocess.run(
            f"ip netns exec {world.pods[0]} ping -c 2 -i 0.05 -W 1 -I 10.9.0.77 10.9.0.3",
            shell=True, capture_output=True, check=False,
        )  # fmt: skip
    finally:
        sh(f"ip -n {world.pods[0]} addr del 10.9.0.77/32 dev eth0")
    assert eventually(
        lambda: world.reasons().get(value("REASON_INVALID_SOURCE_IP"), 0) >= before + 2
    )


def test_an_unknown_target_is_answered_as_unreachable(world):
    done = subprocess.run(
        ["ip", "netns", "exec", world.pods[0], "ping", "-c", "1", "-W", "5", "10.77.0.1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Unreachable" in done.stdout, done.stdout


def test_tcp_of_large_segments(world):
    server = subprocess.Popen(
        ["ip", "netns", "exec", world.pods[1], "iperf3", "-s", "-1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        listening = f"ip netns exec {world.pods[1]} ss -Hltn sport = 5201"
        assert eventually(lambda: sh(listening).strip())
        out = sh(f"ip netns exec {world.pods[0]} iperf3 -c 10.9.0.3 -n 50M -J")
        assert json.loads(out)["end"]["sum_received"]["bytes"] >= 49_000_000
    finally:
        server.kill()
        server.wait()


def test_a_device_that_vanishes_is_set_aside_and_others_go_on():
    world = World(pods=3)
    try:
        world.start()
        sh(f"ip -n {world.node} link del h2")
        with inside(world.node):
            assert eventually(lambda: world.forwarder.ports.check() == ["h2"] or None)
        views = {port["name"]: port for port in world.forwarder.ports.view()}
        assert "gone" in views["h2"]["error"]
        sh(f"ip netns exec {world.pods[0]} ping -c 3 -i 0.05 -W 5 10.9.0.3")
        worker = world.forwarder.workers[0]
        held = int((worker.rings.owner.array >= 0).sum()) + int(worker.rings.free_count[0])
        assert held <= len(worker.rings.free)
    finally:
        world.close()
