"""The real shim binary against the real server, in network namespaces of their own."""

import concurrent.futures
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.cni.model import host_name, macs
from dataplane.cni.protocol import VERSIONS
from ipam.service import Ipam
from tests.cni_agent import NODE, QUEUES
from tests.cni_node import SHIM, Namespaces, Node, command, wait_until

pytestmark = [pytest.mark.root, pytest.mark.net]

REFERENCE = Path("/usr/lib/cni")


@pytest.fixture(scope="module")
def standing(tmp_path_factory) -> Iterator[Node]:
    namespaces = Namespaces()
    made = None
    try:
        made = Node(namespaces.new("node"), tmp_path_factory.mktemp("node"), namespaces)
        made.start()
        yield made
    finally:
        if made is not None:
            made.kill()
        namespaces.close()


@pytest.fixture
def node(standing) -> Iterator[Node]:
    """The node without pods; an agent that a test killed runs again."""
    yield standing
    for flag in ("hold", "unready"):
        (standing.folder / flag).unlink(missing_ok=True)
    if standing.agent is None:
        standing.start()
    assert standing.cni("GC", "", "", **{"cni.dev/valid-attachments": []}) == (0, None)
    standing.namespaces.close(keep=standing.name)
    standing.assert_clean()


def pod_json(pod: str, *words: str) -> list:
    return json.loads(command("ip", "-n", pod, "-j", "-d", *words))


def test_add_makes_what_it_tells(node):
    pod = node.namespaces.new("pod")
    status, result = node.cni("ADD", "c1", pod)
    assert status == 0, result
    assert result["cniVersion"] == "1.1.0"
    mac, host_mac = macs("c1", "eth0")
    assert result["interfaces"] == [
        {"name": host_name("c1", "eth0"), "mac": host_mac, "mtu": 65000},
        {"name": "eth0", "mac": mac, "mtu": 65000, "sandbox": f"/run/netns/{pod}"},
    ]

    [eth0] = pod_json(pod, "addr", "show", "eth0")
    assert eth0["address"] == mac
    assert eth0["mtu"] == 65000
    assert eth0["num_tx_queues"] == eth0["num_rx_queues"] == QUEUES
    addresses = {f"{a['local']}/{a['prefixlen']}": a for a in eth0["addr_info"]}
    assert {ip["address"] for ip in result["ips"]} <= addresses.keys()
    assert not any(a.get("tentative") for a in eth0["addr_info"] if a["scope"] == "global")
    [lo] = pod_json(pod, "addr", "show", "lo")
    assert "UP" in lo["flags"]
    [end] = json.loads(command("ip", "-n", node.name, "-j", "addr", "show", node.host_ends()[0]))
    assert end["addr_info"] == []
    assert "UP" in end["flags"]
    assert end["address"] == host_mac


def test_add_routes_through_the_router(node):
    pod = node.namespaces.new("pod")
    status, result = node.cni("ADD", "c1", pod)
    assert status == 0, result
    for family, far, near, router in (
        ("-4", "192.0.2.1", "10.77.0.9", str(NODE.router4)),
        ("-6", "2001:db8::1", "fd77::9", str(NODE.router6)),
    ):
        routes = pod_json(pod, family, "route")
        default = next(r for r in routes if r["dst"] == "default")
        assert default["gateway"] == router
        assert default["metrics"] == [{"mtu": NODE.path_mtu}]
        for target in (far, near):
            [chosen] = json.loads(command("ip", "-n", pod, "-j", family, "route", "get", target))
            assert chosen["gateway"] == router
        local = next(r for r in routes if "/" in r["dst"] and r.get("gateway") == router)
        assert local["metrics"] == [{"mtu": 65000}]
        [neighbour] = [n for n in pod_json(pod, family, "neigh") if n["dst"] == router]
        assert neighbour["lladdr"] == NODE.gateway_mac
        assert neighbour["state"] == ["PERMANENT"]
    offloads = command("ip", "netns", "exec", pod, "ethtool", "-k", "eth0")
    assert "tx-checksumming: off" in offloads


def test_ipv6_is_switched_on_where_the_namespace_has_it_off(node):
    pod = node.namespaces.new("pod")
    command("ip", "netns", "exec", pod, "sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
    status, result = node.cni("ADD", "c1", pod)
    assert status == 0, result
    [eth0] = pod_json(pod, "-6", "addr", "show", "eth0", "scope", "global")
    assert eth0["addr_info"][0]["prefixlen"] == 128


@pytest.mark.parametrize("version", VERSIONS)
def test_the_life_of_an_attachment_in_each_version(node, version):
    pod = node.namespaces.new("pod")
    status, result = node.cni("ADD", "c1", pod, version)
    assert status == 0, result
    assert result["cniVersion"] == version
    if version >= "0.4.0":
        assert node.cni("CHECK", "c1", pod, version, prevResult=result) == (0, None)
    assert node.cni("DEL", "c1", pod, version, prevResult=result) == (0, None)
    assert node.cni("DEL", "c1", "", version) == (0, None)
    assert pod_json(pod, "link") == [link for link in pod_json(pod, "link") if link["ifindex"] == 1]
    node.assert_clean()
    status, told = node.cni("VERSION", "", "", version)
    assert status == 0
    assert told == {"cniVersion": version, "supportedVersions": list(VERSIONS)}


def test_results_have_the_shape_of_the_reference_plugin(node):
    pod, other = node.namespaces.new("pod"), node.namespaces.new("pod")
    if not (REFERENCE / "ptp").exists():
        pytest.skip("containernetworking-plugins is not installed")
    conf = {
        "cniVersion": "1.0.0",
        "name": "reference",
        "type": "ptp",
        "ipam": {
            "type": "host-local",
            "subnet": "10.78.0.0/24",
            "dataDir": str(node.folder / "host-local"),
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    environment = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "reference",
        "CNI_NETNS": f"/run/netns/{other}",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(REFERENCE),
        "PATH": os.environ["PATH"],
    }
    words = ["ip", "netns", "exec", node.name, str(REFERENCE / "ptp")]
    done = subprocess.run(
        words, env=environment, input=json.dumps(conf), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    theirs = json.loads(done.stdout)
    status, ours = node.cni("ADD", "c1", pod, "1.0.0")
    assert status == 0, ours
    assert ours.keys() == theirs.keys()
    assert [i.keys() for i in ours["interfaces"]] == [i.keys() for i in theirs["interfaces"]]
    assert ours["ips"][0].keys() == theirs["ips"][0].keys()
    assert ours["ips"][0]["interface"] == theirs["ips"][0]["interface"] == 1


BREAKS = {
    "address": ("ip addr flush dev eth0 scope global", "10.77.0."),
    "route": ("ip -6 route del default", "::/0"),
    "link": ("ip link del eth0", "missing"),
    "neighbour": ("ip neigh del 10.77.0.1 dev eth0", "neighbour 10.77.0.1"),
    "offload": ("ethtool -K eth0 tx on", "checksum"),
    "mtu": ("ip link set eth0 mtu 1400", "1400"),
    "down": ("ip link set eth0 down", "down"),
}


def configuration(pod: str) -> tuple:
    """What was configured in the pod, without what the kernel adds in its own time."""
    links = [
        (link["ifname"], link["mtu"], link["address"], "UP" in link["flags"])
        for link in pod_json(pod, "link")
    ]
    routes = [pod_json(pod, family, "route", "show", "proto", "static") for family in ("-4", "-6")]
    addresses = command("ip", "-n", pod, "-br", "addr", "show", "scope", "global").split()[2:]
    return links, routes, addresses, command("ip", "-n", pod, "neigh", "show", "nud", "permanent")


@pytest.mark.parametrize("broken", BREAKS)
def test_check_finds_what_is_broken_and_mends_nothing(node, broken):
    pod = node.namespaces.new("pod")
    _, result = node.cni("ADD", "c1", pod)
    words, named = BREAKS[broken]
    command("ip", "netns", "exec", pod, *words.split())
    before = configuration(pod)
    for _ in range(2):
        status, error = node.cni("CHECK", "c1", pod, prevResult=result)
        assert status == 1
        assert error["code"] == 103
        assert named in error["msg"] + error.get("details", "")
    assert configuration(pod) == before


def test_an_existing_interface_is_an_error_and_stays(node):
    pod = node.namespaces.new("pod")
    _, result = node.cni("ADD", "c1", pod)
    status, error = node.cni("ADD", "c1", pod)
    assert status == 1
    assert error["code"] == 100
    assert "eth0" in error["msg"]
    assert node.cni("CHECK", "c1", pod, prevResult=result) == (0, None)
    assert node.cni("ADD", "c2", pod)[1]["code"] == 100
    assert len(node.leases()) == 1


def test_an_attachment_whose_namespace_is_gone_is_made_again(node):
    first, second = node.namespaces.new("pod"), node.namespaces.new("pod")
    _, before = node.cni("ADD", "c1", first)
    command("ip", "netns", "del", first)
    status, after = node.cni("ADD", "c1", second)
    assert status == 0, after
    assert [ip["address"] for ip in after["ips"]] == [ip["address"] for ip in before["ips"]]
    assert len(node.endpoints()) == 1


def test_delete_succeeds_without_the_namespace(node):
    pod = node.namespaces.new("pod")
    node.cni("ADD", "c1", pod)
    command("ip", "netns", "del", pod)
    assert node.cni("DEL", "c1", pod) == (0, None)
    node.assert_clean()


@pytest.mark.parametrize(
    "path", ["/run/netns/none-such", "/etc/passwd", "/proc/self/ns/mnt", "NODE"]
)
def test_a_wrong_namespace_is_named_and_nothing_is_left(node, path):
    wanted = f"/run/netns/{node.name}" if path == "NODE" else path
    status, error = node.cni("ADD", "c1", os.path.relpath(wanted, "/run/netns"))
    assert status == 1
    assert error["code"] == 4
    assert "CNI_NETNS" in error["msg"]
    node.assert_clean()


def test_twenty_adds_at_once(node):
    pods = {f"c{number}": node.namespaces.new("pod") for number in range(20)}
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda item: node.cni("ADD", *item), pods.items()))
        assert [status for status, _ in answers] == [0] * 20, answers
        addresses = [ip["address"] for _, result in answers for ip in result["ips"]]
        assert len(set(addresses)) == 40
        numbers = [
            json.loads(path.read_text())["number"]
            for path in (node.folder / "endpoints").glob("*.json")
        ]
        assert sorted(numbers) == list(range(1, 21))
        removed = list(pool.map(lambda item: node.cni("DEL", *item), pods.items()))
    assert removed == [(0, None)] * 20
    node.assert_clean()


def test_an_exhausted_pool_is_named_and_a_failed_add_leaves_nothing(node):
    pod = node.namespaces.new("pod")
    ipam = Ipam.open(node.folder / "ipam.db", rest_s=0)
    held = [ipam.allocate("other", f"x{number}", "eth0").key for number in range(29)]
    status, error = node.cni("ADD", "c1", pod)
    assert status == 1
    assert error["code"] == 102
    assert "10.77.0.0/27" in error["msg"]
    for key in held:
        ipam.release(key)
    ipam.close()
    node.assert_clean()


def test_gc_removes_what_the_runtime_does_not_know(node):
    pods = {name: node.namespaces.new("pod") for name in ("c1", "c2", "c3")}
    for name, pod in pods.items():
        node.cni("ADD", name, pod)
    valid = [{"containerID": "c2", "ifname": "eth0"}]
    assert node.cni("GC", "", "", **{"cni.dev/valid-attachments": valid}) == (0, None)
    assert node.host_ends() == node.endpoints() == [host_name("c2", "eth0")]
    assert len(node.leases()) == 1


def test_a_node_that_is_not_ready_says_so(node):
    assert node.cni("STATUS", "", "") == (0, None)
    (node.folder / "unready").touch()
    assert node.cni("STATUS", "", "")[1]["code"] == 50
    status, error = node.cni("ADD", "c1", node.namespaces.new("pod"))
    assert status == 1
    assert error["code"] == 11
    node.assert_clean()


def test_without_an_agent_deletes_are_remembered(node):
    pod, other = node.namespaces.new("pod"), node.namespaces.new("pod")
    node.cni("ADD", "c1", pod)
    node.cni("ADD", "c2", other)
    node.kill()
    assert node.cni("ADD", "c3", other)[1]["code"] == 11
    assert node.cni("CHECK", "c1", pod, prevResult={"ips": []})[1]["code"] == 11
    status, error = node.cni("STATUS", "", "")
    assert status == 1
    assert error["code"] == 50
    assert "penstock run" in error["msg"]
    assert node.cni("VERSION", "", "")[0] == 0
    for _ in range(2):
        assert node.cni("DEL", "c1", pod) == (0, None)
    assert os.listdir(node.folder / "deletes") == ["c1@eth0"]
    assert len(node.host_ends()) == 2

    node.start()
    assert os.listdir(node.folder / "deletes") == []
    assert node.host_ends() == node.endpoints() == [host_name("c2", "eth0")]


def test_a_remembered_delete_comes_before_a_new_add(node):
    pod = node.namespaces.new("pod")
    node.cni("ADD", "c1", pod)
    node.kill()
    node.cni("DEL", "c1", pod)
    remembered = (node.folder / "deletes/c1@eth0").read_bytes()
    node.start()
    (node.folder / "deletes/c1@eth0").write_bytes(remembered)
    assert node.cni("ADD", "c1", pod)[0] == 0
    assert os.listdir(node.folder / "deletes") == []
    assert node.host_ends() == [host_name("c1", "eth0")]


def test_an_agent_killed_in_the_middle_of_an_add_leaves_nothing(node):
    pod, standing = node.namespaces.new("pod"), node.namespaces.new("pod")
    _, result = node.cni("ADD", "c1", standing)
    (node.folder / "hold").touch()
    running = node.shim("ADD", "c2", pod)
    wait_until(lambda: len(node.host_ends()) == 2)
    node.kill()
    out, _ = running.communicate(timeout=120)
    assert json.loads(out)["code"] == 11
    (node.folder / "endpoints" / f"{host_name('c2', 'eth0')}.json").unlink(missing_ok=True)
    (node.folder / "hold").unlink()

    node.start()
    assert node.host_ends() == node.endpoints() == [host_name("c1", "eth0")]
    assert len(node.leases()) == 1
    assert node.cni("CHECK", "c1", standing, prevResult=result) == (0, None)
    assert node.cni("ADD", "c2", pod)[0] == 0


def test_a_shim_that_dies_leaves_the_operation_to_its_delete(node):
    pod = node.namespaces.new("pod")
    (node.folder / "hold").touch()
    running = node.shim("ADD", "c1", pod)
    wait_until(lambda: node.endpoints())
    running.kill()
    running.communicate()
    (node.folder / "hold").unlink()
    assert node.cni("DEL", "c1", pod) == (0, None)
    node.assert_clean()


@pytest.mark.parametrize(
    ("text", "code"),
    [("", 6), ("{", 6), ('{"socket": "a', 6), ('{"socket": "\\u0041"}', 7), ('{"socket":""}', 7)],
)
def test_the_shim_refuses_a_configuration_it_cannot_read(text, code):
    done = subprocess.run(
        [SHIM],
        env={"CNI_COMMAND": "STATUS"},
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == code


def test_the_shim_reads_only_keys_of_the_outermost_object(node):
    nested = {"a": {"socket": "/no"}, "b": [{"socket": "/no"}, "socket", ":"], "c": "socket"}
    assert node.cni("STATUS", "", "", **nested) == (0, None)
