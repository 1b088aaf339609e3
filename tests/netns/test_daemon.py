"""The daemon on one node, as an operator meets it: start, look, break, stop, clean."""

import json
import os
import signal
import socket
import sys

import pytest
import yaml

from bench.lab import ROOT, Lab, LabError, eventually
from bench.penstock import START_S, Cluster, Node, cache_dir

COLD_S = 240.0  # a busy machine compiles kernels for long
pytestmark = [pytest.mark.root, pytest.mark.net]


@pytest.fixture(scope="module")
def cluster():
    """One node whose Node object is not there yet, and its daemon not started."""
    with Lab() as lab:
        cluster = Cluster(lab)
        space = lab.namespace("node1")
        lab.connect(space)
        cluster.nodes.append(Node(cluster, space, 1))
        yield cluster


@pytest.fixture(scope="module")
def systemd(cluster):
    """What systemd hears at NOTIFY_SOCKET, as a function of no arguments."""
    path = cluster.lab.folder / "notify"
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    channel.bind(str(path))
    channel.setblocking(False)
    heard: list[str] = []

    def listen() -> list[str]:
        while True:
            try:
                heard.extend(channel.recv(65536).decode().split("\n"))
            except BlockingIOError:
                return heard

    listen.path = path
    yield listen
    channel.close()


@pytest.fixture(scope="module")
def node(cluster, systemd):
    """The node with its daemon running and ready; it was started without its Node object."""
    node = cluster.nodes[0]
    node.process = node.namespace.spawn(
        sys.executable, "-m", "dataplane.cli.main", "run", "--config", str(node.config),
        env={
            "PYTHONPATH": str(ROOT),
            "PENSTOCK_CACHE_DIR": cache_dir(),
            "NOTIFY_SOCKET": str(systemd.path),
        },
        log="daemon",
    )  # fmt: skip
    eventually(lambda: "READY=1" in systemd(), "READY=1", START_S)
    state = look(node)
    assert state["ready"] is False
    assert any("node1" in error for error in state["errors"]), state
    assert not list(node.conf_dir.glob("*"))
    cluster.announce("node1", 1)
    node.wait(COLD_S)
    return node


def look(node, *words) -> dict:
    """`penstock status`, also of a degraded node."""
    try:
        return node.ask("status", *words)
    except LabError as error:
        assert "exit 3" in str(error), error
        return json.loads(str(error).split("exit 3: ", 1)[1])


def fails(node, *words) -> str:
    """The one line of a command that must fail with status 1."""
    with pytest.raises(LabError, match="exit 1: ") as caught:
        node.command(*words)
    said = str(caught.value).split("exit 1: ", 1)[1]
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1, said
    return said


def test_a_ready_node_says_so(node, systemd):
    text = node.command("status")
    for words in ("Agent:        Ok", "Forwarder:    Ok", "10.244.1.0/24", "vxlan"):
        assert words in text
    eventually(lambda: "WATCHDOG=1" in systemd(), "WATCHDOG=1")
    assert len(list(node.conf_dir.glob("*.conflist"))) == 1


def test_every_listing_is_json(node):
    pod = node.pod("seen")
    four = pod.addresses[4]
    assert [row["ipv4"] for row in node.ask("endpoint", "list")] == [four]
    for name in ("default/seen", four, pod.addresses[6], pod.container[:8]):
        assert node.ask("endpoint", "get", name)[0]["pod"] == "default/seen"
    wanted = {"host", "uplink", "pod", "proxy"}
    eventually(lambda: {row["kind"] for row in node.ask("port")} == wanted, "all ports")
    assert node.ask("route", "get", four)[0]["kind"] == "pod"
    assert node.ask("route", "get", "10.244.1.1")[0]["kind"] == "gateway"
    assert node.ask("ipam", "list")[0]["owner"] == "default/seen"
    assert {row["cidr"] for row in node.ask("ipam", "pools")} == {
        "10.244.1.0/24",
        "fd00:244:0:1::/64",
    }
    assert node.ask("ipam", "history")[0]["event"] == "allocate"
    eventually(lambda: node.ask("plan") == [], "nothing left to do")
    assert node.ask("counters")["workers"][0]["worker"] == 0
    assert isinstance(node.ask("flows"), list)
    assert "no endpoint nobody" in fails(node, "endpoint", "get", "nobody")
    pod.delete()
    assert node.ask("endpoint") == []


def test_there_is_one_daemon_a_run_directory(node):
    assert str(node.process.pid) in fails(node, "run")
    assert "is held by process" in fails(node, "agent")
    assert "is held by process" in fails(node, "forwarder")
    assert "is held by process" in fails(node, "cleanup")
    node.wait()


def test_a_broken_manifest_is_shown_and_changes_nothing(node):
    path = node.cluster.manifests / "broken.yaml"
    path.write_text("kind: Node\nmetadata: {name: [")
    eventually(lambda: "broken.yaml:2" in str(look(node)["errors"]), "the error in status")
    assert look(node)["ready"]
    path.unlink()
    eventually(lambda: not look(node)["errors"], "no error")


def test_a_pool_that_leaves_out_a_lease_is_refused_and_said(node):
    pod = node.pod("early")
    path = node.cluster.manifests / "node-node1.yaml"
    good = path.read_text()
    path.write_text(good.replace("10.244.1.0/24", "10.244.7.0/24"))
    eventually(lambda: "10.244.7.0/24" in str(look(node)["errors"]), "the refusal in status")
    assert not look(node)["ready"]
    with pytest.raises(LabError, match=r'"code": ?11'):
        node.pod("late")
    path.write_text(good)
    node.wait()
    pod.delete()
    node.cluster.lab.delete(node.cluster.lab.namespaces["late"])


def test_a_hanging_forwarder_is_replaced(node):
    hanging = node.pid("forwarder")
    os.kill(hanging, signal.SIGSTOP)
    eventually(lambda: node.pid("forwarder") not in (0, hanging), "a new forwarder", START_S)
    node.wait()
    assert "the forwarder hangs" in node.log()


def test_without_an_agent_status_is_degraded_and_still_shows_the_forwarder(node):
    os.kill(node.process.pid, signal.SIGSTOP)  # so that no new agent comes
    try:
        node.kill_agent()
        eventually(lambda: not node.pid("agent"), "the agent's end")
        state = look(node)
        assert state["ready"] is False
        assert state["agent"] is None
        assert state["forwarder"]["pid"] == node.pid("forwarder")
        assert "penstock run" in state["errors"][0]
        assert node.ask("route", "get", "10.244.1.1")[0]["kind"] == "gateway"
    finally:
        os.kill(node.process.pid, signal.SIGCONT)
    node.wait()


def test_a_new_run_takes_over_after_a_kill(node):
    addresses = node.pod("kept").addresses
    node.kill("run")
    eventually(lambda: not node.pid("agent") and not node.pid("forwarder"), "the children's end")
    node.start()
    node.wait()
    assert {4: node.ask("endpoint")[0]["ipv4"], 6: node.ask("endpoint")[0]["ipv6"]} == addresses


def test_a_configuration_error_ends_with_78(node, tmp_path):
    path = tmp_path / "config.yaml"
    raw = yaml.safe_load(node.config.read_text())
    raw["network"]["tunnel"] = "gre"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(LabError, match=r"(?s)exit 78: .*network\.tunnel.*gre"):
        node.namespace.run(
            sys.executable, "-m", "dataplane.cli.main", "run", "--config", str(path)
        )  # fmt: skip


def test_stop_and_cleanup_leave_nothing(node):
    assert node.stop() == 0
    assert node.namespace.pids() == []
    assert "xdp" not in node.namespace.link("eth0")
    removed = node.command("cleanup", "--state").splitlines()
    assert f"removed {node.run_dir}" in removed
    assert {row["ifname"] for row in node.namespace.show("link")} == {"lo", "eth0"}
    assert not node.run_dir.exists()
    assert not (node.folder / "state").exists()
    assert not list(node.conf_dir.iterdir())
    assert node.command("cleanup", "--state") == ""
