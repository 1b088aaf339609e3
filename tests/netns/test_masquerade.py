"""Pods and the world: source addresses, ports, errors, fragments; nft beside us as the oracle."""

import json
import sys

import pytest

from bench import checks
from bench.lab import ROOT, Lab, LabError, eventually
from bench.penstock import Cluster, Settings

pytestmark = [pytest.mark.root, pytest.mark.net]

EXCLUDED = {4: "11.9.0.1", 6: "2001:db8:9::1"}
PORTS = "40960-41023"
# A server of many addresses answers from the one that it was asked at (RFC 3542 6).
UDP_ECHO = (
    "import socket\n"
    "s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.bind(('::', 7070))\n"
    "s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)\n"
    "while True:\n"
    "    data, control, _, peer = s.recvmsg(65535, 200)\n"
    "    head = f'{peer[0]} {peer[1]} '.encode()\n"
    "    at = [(a, b, c[:16] + bytes(4)) for a, b, c in control]\n"
    "    s.sendmsg([head + data], at, 0, peer)\n"
)
ASK = (
    "import socket, sys\n"
    "family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n"
    "s = socket.socket(family, socket.SOCK_DGRAM); s.settimeout(5)\n"
    "s.bind(('', int(sys.argv[2]))); s.sendto(b'x' * int(sys.argv[3]), (sys.argv[1], 7070))\n"
    "data = s.recv(65535); host, port, rest = data.split(b' ', 2)\n"
    "print(host.decode().removeprefix('::ffff:'), port.decode(), len(rest))\n"
)


@pytest.fixture(scope="module", params=["overlay", "direct"])
def world(request):
    masquerade = {
        "exclude": [f"{EXCLUDED[4]}/32", f"{EXCLUDED[6]}/128"],
        "ports": PORTS,
    }
    with Lab() as lab:
        settings = Settings(mode=request.param, more={"masquerade": masquerade})
        cluster = Cluster(lab, settings).start(nodes=1)
        cluster.join()
        cluster.far = cluster.outside()
        cluster.one, cluster.two = (node.pod(f"pod{node.number}") for node in cluster.nodes)
        cluster.other = cluster.nodes[0].pod("other")
        far = cluster.far.namespace
        for family, bits in ((4, 32), (6, 128)):
            far.ip(f"addr add {EXCLUDED[family]}/{bits} dev lo")
            via = cluster.far.underlay[family]
            cluster.nodes[0].namespace.ip(f"route add {EXCLUDED[family]}/{bits} via {via} dev eth0")
            pods = {4: "10.244.1.0/24", 6: "fd00:244:0:1::/64"}[family]
            far.ip(f"route add {pods} via {cluster.nodes[0].addresses[family]} dev eth0")
        cluster.servers = checks.serve(far)
        far.spawn("python3", "-c", UDP_ECHO, log="udp-echo")
        eventually(lambda: _is_listening(far), "the echo server")
        for family in (4, 6):
            checks.eventually_pings(cluster.one.namespace, cluster.far.addresses[family])
        yield cluster


def _is_listening(namespace) -> bool:
    return "7070" in namespace.run("ss", "-Hlun", "sport = 7070")


def ask(pod, address: str, port: int = 0, size: int = 10) -> tuple[str, int, int]:
    """What the world saw of a pod's datagram: address, port, size."""
    found = pod.namespace.run("python3", "-c", ASK, address, str(port), str(size)).split()
    return found[0], int(found[1]), int(found[2])


@pytest.mark.parametrize("family", [4, 6])
def test_the_world_sees_the_node(world, family):
    target = world.far.addresses[family]
    for pod, node in ((world.one, world.nodes[0]), (world.two, world.nodes[1])):
        assert ask(pod, target)[0] == node.addresses[family]
    checks.ping(world.one.namespace, target, count=5)
    checks.curl(world.one.namespace, target, world.servers)
    assert checks.iperf3(world.one.namespace, target, amount="20M").gbits > 0


@pytest.mark.parametrize("family", [4, 6])
def test_a_port_is_kept_when_it_can_be(world, family):
    target, node = world.far.addresses[family], world.nodes[0].addresses[family]
    world.nodes[0].command("ct", "flush")  # an earlier test's connection may have the port
    assert ask(world.one, target, 40970)[:2] == (node, 40970)
    address, port, _ = ask(world.other, target, 40970)  # another pod has it towards the same peer
    assert (address, port != 40970, 40960 <= port <= 41023) == (node, True, True)
    address, port, _ = ask(world.one, target, 2222)  # out of range
    assert 40960 <= port <= 41023


@pytest.mark.parametrize("family", [4, 6])
def test_excluded_destinations_see_the_pod(world, family):
    found = ask(world.one, EXCLUDED[family], 2223)
    if world.settings.mode == "overlay":
        assert found[:2] == (world.one.addresses[family], 2223)
    else:
        assert found[0] == world.one.addresses[family]


@pytest.mark.parametrize("family", [4, 6])
def test_the_cluster_sees_the_pod(world, family):
    for target in (world.two, world.other):
        servers = checks.serve(target.namespace)
        checks.curl(world.one.namespace, target.addresses[family], servers)
        log = (target.namespace.lab.folder / f"{target.namespace.short}-http.log").read_text()
        last = [line for line in log.splitlines() if "GET" in line][-1].split()[0]
        assert last.removeprefix("::ffff:") == world.one.addresses[family]
        for process in servers.processes:
            process.stop()


@pytest.mark.parametrize("family", [4, 6])
def test_ports_run_out_by_destination_and_the_destination_is_named(world, family):
    code = (
        "import errno, socket, sys\n"
        "family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n"
        "good, errors = 0, set()\n"
        "socks = [socket.socket(family, socket.SOCK_DGRAM) for _ in range(100)]\n"
        "for s in socks:\n"
        "    s.settimeout(0.3); s.connect((sys.argv[1], 7070)); s.send(b'x')\n"
        "for s in socks:\n"
        "    try: s.recv(100); good += 1\n"
        "    except OSError as error: errors.add(errno.errorcode.get(error.errno))\n"
        "print(good, *errors)\n"
    )
    node = world.nodes[1]
    words = ("python3", "-c", code, world.far.addresses[family])
    good, *errors = world.two.namespace.run(*words).split()
    assert 0 < int(good) <= 64, "as many as there are ports"
    assert {4: "EHOSTUNREACH", 6: "EACCES"}[family] in errors, "the rest is told at once"
    rows = node.ask("nat", "exhausted")
    named = [row for row in rows if row["destination"] == world.far.addresses[family]]
    assert named
    assert named[0]["port"] == 7070
    other = world.far.underlay[family]  # another destination has ports of its own
    assert ask(world.two, other)[0] == node.addresses[family]
    texts = {row["text"] for row in node.ask("counters")["reasons"] if row["drop"]}
    assert "No mapping for NAT masquerade" in texts
    node.command("ct", "flush")


@pytest.mark.parametrize("family", [4, 6])
def test_errors_of_the_world_find_the_pod(world, family):
    """Port unreachable comes back through NAT and is believed by the pod's socket."""
    code = (
        "import socket, sys\n"
        "family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n"
        "s = socket.socket(family, socket.SOCK_DGRAM); s.settimeout(5)\n"
        "s.connect((sys.argv[1], 9999)); s.send(b'x')\n"
        "try: s.recv(100)\n"
        "except ConnectionRefusedError: print('refused')\n"
    )
    target = world.far.addresses[family]
    assert world.one.namespace.run("python3", "-c", code, target).strip() == "refused"


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("size", [1400, 4000, 20000])
def test_datagrams_in_fragments_cross_both_ways(world, family, size):
    assert ask(world.one, world.far.addresses[family], size=size)[2] == size


@pytest.mark.parametrize("family", [4, 6])
def test_traceroute_finds_its_way_back(world, family):
    """Time exceeded about a translated packet quotes what the pod has sent."""
    target = world.far.addresses[family]
    with pytest.raises(LabError, match=r"(?i)time to live exceeded|hop limit|Time exceeded"):
        world.one.namespace.run("ping", "-n", "-c", "1", "-W", "3", "-t", "1", target)


def test_the_nodes_own_connections_are_not_touched(world):
    node = world.nodes[0].namespace
    for family in (4, 6):
        checks.curl(node, world.far.addresses[family], world.servers)
    reserved = node.run("sysctl", "-n", "net.ipv4.ip_local_reserved_ports").strip()
    assert "40960-41023" in reserved


@pytest.fixture(scope="module")
def beside(world):
    """A namespace behind the kernel's own NAT (nft's masquerade), on the same node."""
    pod = world.lab.namespace(f"linux{world.settings.mode}")
    host = world.nodes[0].namespace
    world.lab.wire(host, pod, ("k0", "eth0"))
    host.ip("addr add 10.77.0.1/24 dev k0", "addr add fd77::1/64 dev k0 nodad")
    pod.ip(
        "addr add 10.77.0.2/24 dev eth0", "route add default via 10.77.0.1",
        "addr add fd77::2/64 dev eth0 nodad", "route add default via fd77::1",
    )  # fmt: skip
    host.sysctl({"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1})
    host.run("nft", "add table inet oracle")
    host.run("nft", "add chain inet oracle post { type nat hook postrouting priority 100; }")
    host.run("nft", "add rule inet oracle post ip saddr 10.77.0.0/24 masquerade")
    host.run("nft", "add rule inet oracle post ip6 saddr fd77::/64 masquerade")
    server = world.far.namespace.spawn(
        sys.executable, "-m", "tests.netns.exchanges", "serve", env={"PYTHONPATH": str(ROOT)}
    )
    eventually(lambda: "serving" in server.output(), "the server of exchanges")
    yield pod
    server.stop()
    host.run("nft", "delete table inet oracle")
    host.ip("link del k0")


@pytest.mark.parametrize("family", [4, 6])
def test_the_kernel_does_what_we_do(world, beside, family):
    """The same list of exchanges through nft's NAT and through ours: the same is seen of each."""
    target, node = world.far.addresses[family], world.nodes[0].addresses[family]
    world.nodes[0].command("ct", "flush")  # an earlier test's connection may have a port
    seen = []
    for namespace, first in ((beside, 50100), (world.one.namespace, 40980)):
        words = (sys.executable, "-m", "tests.netns.exchanges", "ask", target, str(first))
        seen.append(json.loads(namespace.run("env", f"PYTHONPATH={ROOT}", *words)))
    kernel, ours = seen
    assert ours == kernel
    assert ours["datagram"] == [node, 0, 10], "the node's address, and the port is kept"
    assert ours["closed port"] == ours["closed port, stream"] == "ECONNREFUSED"
