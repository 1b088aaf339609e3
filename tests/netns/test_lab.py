"""The laboratory itself: it joins, it measures, and it leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.lab import HOME, PREFIX, Lab, LabError, eventually, sweep
from xdp.artifacts import find

pytestmark = [pytest.mark.root, pytest.mark.net]


def _leftovers(tag: str) -> list[Path]:
    return [*Path("/run/netns").glob(f"pst-{tag}-*"), *HOME.glob(f"{PREFIX}{tag}")]


@pytest.mark.parametrize("address", ["192.0.2.2", "2001:db8::2"])
def test_nodes_reach_each_other_over_either_underlay(address):
    with Lab() as lab:
        one, two = lab.namespace("one"), lab.namespace("two")
        lab.pair(one, two)
        one.run("ping", "-c", "1", "-W", "5", address)
    with Lab() as lab:
        for name in ("one", "two", "three"):
            lab.connect(lab.namespace(name))
        lab.namespaces["three"].run("ping", "-c", "1", "-W", "5", address)


def _fail_inside(seen: list):
    with Lab() as lab:
        node = lab.namespace("node")
        sleeper = node.spawn("sleep", "1000")
        seen += [lab.tag, sleeper]
        eventually(lambda: node.pids() == [sleeper.pid], "the process is in the namespace")
        node.run("false")


def test_nothing_is_left_after_a_failure():
    seen: list = []
    with pytest.raises(LabError, match="exit 1"):
        _fail_inside(seen)
    tag, sleeper = seen
    assert not _leftovers(tag)
    assert not sleeper.alive


def test_a_killed_lab_is_swept_by_the_next():
    code = (
        "import os, signal\n"
        "from bench.lab import Lab\n"
        "lab = Lab()\n"
        "lab.namespace('node').spawn('sleep', '1000')\n"
        "print(lab.tag, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    tag = done.stdout.strip()
    assert _leftovers(tag)
    sweep()
    assert not _leftovers(tag)


def test_inside_takes_only_this_thread_and_only_for_a_while():
    home = os.readlink("/proc/thread-self/ns/net")
    with Lab() as lab:
        node = lab.namespace("node")
        with node.inside():
            assert os.readlink("/proc/thread-self/ns/net") != home
        assert os.readlink("/proc/thread-self/ns/net") == home


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_request_response_counts_every_transaction(protocol, address):
    rr = str(find("penstock-rr"))
    with Lab() as lab:
        node = lab.namespace("node")
        server = node.spawn(rr, "server", "7777")
        eventually(lambda: node.run("ss", "-Hltun", "sport = 7777").count("\n") == 2, "listening")
        found = json.loads(node.run(rr, "client", protocol, address, "7777", "0.2"))
        assert server.alive
    assert found["transactions"] > 0
    assert found["lost"] == 0
    low = [found[key] for key in ("p50_us", "p90_us", "p99_us", "p999_us", "max_us")]
    assert low == sorted(low)
    assert low[0] > 0
    # One at a time: the transactions together take as long as the run.
    assert found["transactions"] * found["mean_us"] / 1e6 == pytest.approx(
        found["seconds"], rel=0.1
    )


def test_request_response_refuses_a_bad_address():
    done = subprocess.run(
        [str(find("penstock-rr")), "client", "tcp", "nowhere", "1", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "nowhere" in done.stderr
