"""kill -9 of every process while traffic flows; and the machine after the end."""

import os
import re
import signal

import pytest

from bench import checks
from bench.lab import Lab, LabError, eventually
from bench.penstock import Cluster, Settings
from xdp.abi import value

pytestmark = [pytest.mark.root, pytest.mark.net]
NOT_READY = value("REASON_ENDPOINT_NOT_READY")


@pytest.fixture(scope="module")
def cluster():
    with Lab() as lab:
        cluster = Cluster(lab).start()
        for node in cluster.nodes:
            for letter in "ab":
                node.pod(f"{node.name}{letter}")
        yield cluster


def _answered(source, address: str) -> bool:
    try:
        return bool(checks.ping(source, address, count=1, wait=1))
    except LabError:
        return False


def _traffic_resumes(cluster) -> None:
    one, two = cluster.nodes
    source = one.pods[0].namespace
    for target in (one.pods[1], two.pods[0]):
        for address in target.addresses.values():
            eventually(lambda a=address: _answered(source, a), f"an answer from {address}", 60)


def _steady(source, address: str):
    """A ping that goes on; its end is the number of requests and of answers."""
    return source.spawn("ping", "-n", "-i", "0.02", "-c", "100000", address)


def _end(ping) -> tuple[int, int]:
    ping.stop(signal.SIGINT)
    counts = re.search(r"(\d+) packets transmitted, (\d+) received", ping.output())
    assert counts, ping.output()
    return int(counts[1]), int(counts[2])


def _working(node) -> int:
    """Pid of the forwarder that answers, 0 when none does."""
    return node.ask("status").get("forwarder", {}).get("pid", 0)


def _without_forwarder(node) -> int:
    rows = node.ask("counters")["reasons"]
    return sum(row["packets"] for row in rows if row["reason"] == NOT_READY)


def _addresses(node) -> dict[str, tuple[str, str]]:
    return {row["pod"]: (row["ipv4"], row["ipv6"]) for row in node.ask("endpoint")}


def test_traffic_goes_on_while_the_agent_is_killed(cluster):
    node = cluster.nodes[0]
    pings = [
        _steady(node.pods[0].namespace, address)
        for pod in (node.pods[1], cluster.nodes[1].pods[0])
        for address in pod.addresses.values()
    ]
    killed = node.kill_agent()
    assert killed
    eventually(lambda: node.pid("agent") not in (0, killed), "a new agent")
    node.wait()
    for ping in pings:
        sent, received = _end(ping)
        assert sent > 0
        assert sent - received <= 1, ping.output()[-500:]  # the last may have been on its way


def test_counters_and_deletes_work_without_an_agent(cluster):
    node = cluster.nodes[0]
    pod = node.pod("short-lived")
    supervisor = node.process.pid
    os.kill(supervisor, signal.SIGSTOP)  # so that no new agent comes
    try:
        node.kill_agent()
        eventually(lambda: not node.pid("agent"), "the agent's end")
        assert node.ask("counters")["reasons"]
        pod.delete()
    finally:
        os.kill(supervisor, signal.SIGCONT)
    node.wait()
    eventually(
        lambda: "default/short-lived" not in _addresses(node), "the remembered DEL is carried out"
    )


def test_traffic_resumes_after_the_forwarder_is_killed(cluster):
    """What came in between has a reason, which the next forwarder counts."""
    node = cluster.nodes[0]
    before, dropped = _addresses(node), _without_forwarder(node)
    ping = _steady(node.pods[0].namespace, node.pods[1].addresses[4])
    killed = node.kill_forwarder()
    eventually(lambda: node.pid("forwarder") not in (0, killed), "a new forwarder")
    _traffic_resumes(cluster)
    assert _addresses(node) == before
    sent, answered = _end(ping)
    assert sent > answered
    eventually(
        lambda: _without_forwarder(node) - dropped >= (sent - answered) // 2,
        f"a reason for the {sent - answered} lost",
    )


def test_a_standby_takes_over_from_a_killed_forwarder():
    """The process that was prepared is the next one, and gets a standby of its own."""
    with Lab() as lab:
        cluster = Cluster(lab, Settings(forwarder={"standby": True})).start(1)
        (node,) = cluster.nodes
        here, there = node.pod("here"), node.pod("there")
        for turn in (1, 2):
            eventually(
                lambda n=turn: node.process.output().count("one stands by") == n, "a standby", 60
            )
            working = _working(node)
            standby = set(node.pids("forwarder")) - {working}
            ping = _steady(here.namespace, there.addresses[4])
            eventually(lambda p=ping: "bytes from" in p.output(), "an answer")
            os.kill(working, signal.SIGKILL)
            eventually(
                lambda n=turn: node.process.output().count("the standby takes over") == n,
                "the next",
            )
            eventually(lambda old=working: _working(node) not in (0, old), "an answer of the next")
            assert {_working(node)} == standby
            for address in there.addresses.values():
                eventually(lambda a=address: _answered(here.namespace, a), "an answer", 60)
            sent, answered = _end(ping)
            assert answered > 0, sent
        eventually(lambda: node.process.output().count("one stands by") == 3, "a standby", 60)
        before = set(node.pids("forwarder"))
        os.kill(node.process.pid, signal.SIGHUP)  # who stands by is of the old program: it goes
        eventually(
            lambda: node.process.output().count("one stands by") == 4,
            "a standby of the new one",
            90,
        )
        eventually(lambda: not before & set(node.pids("forwarder")), "the end of both old ones")
        assert len(node.pids("forwarder")) == 2


def test_pods_keep_their_addresses_when_everything_is_killed(cluster):
    node = cluster.nodes[0]
    before = _addresses(node)
    node.kill("run", "agent", "forwarder")
    eventually(lambda: not node.pid("agent") and not node.pid("forwarder"), "the end of all")
    # The uplink's program went with its process: the node's own traffic never needed us.
    eventually(lambda: "xdp" not in node.namespace.link("eth0"), "the uplink without a program")
    checks.ping(node.namespace, cluster.nodes[1].addresses[4])
    node.start()
    node.wait()
    _traffic_resumes(cluster)
    assert _addresses(node) == before
    fresh = node.pod("fresh")
    assert not set(fresh.addresses.values()) & {one for pair in before.values() for one in pair}
    fresh.delete()


def test_a_device_that_vanishes_under_traffic_harms_nobody(cluster):
    node = cluster.nodes[0]
    victim = node.pod("victim")
    ping = _steady(victim.namespace, node.pods[0].addresses[4])
    host_end = next(
        row["host_ifname"] for row in node.ask("endpoint") if row["pod"] == "default/victim"
    )
    node.namespace.ip(f"link del {host_end}")
    _traffic_resumes(cluster)
    ping.stop(signal.SIGKILL)
    victim.delete()
    _traffic_resumes(cluster)


def test_the_machine_is_as_it_was_after_stop_and_cleanup(cluster):
    node = cluster.nodes[1]
    for pod in list(node.pods):
        pod.delete()
    assert node.stop() == 0
    assert not node.namespace.pids()
    node.command("cleanup", "--state")
    assert {row["ifname"] for row in node.namespace.show("link")} == {"lo", "eth0"}
    assert "xdp" not in node.namespace.link("eth0")
    for family in ("-4", "-6"):
        routes = node.namespace.show(family, "route")
        assert {row["dev"] for row in routes} <= {"lo", "eth0"}, routes
        assert not [row for row in routes if "10.244" in row["dst"] or "fd00:244" in row["dst"]]
    assert not node.run_dir.exists()
    assert not list(node.conf_dir.iterdir())
