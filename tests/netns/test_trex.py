"""An unmodified TRex script against our server; frames are looked at where they arrive.

Scapy, which we did not write, says whether checksums are right; the expected fields come from a
few lines of Python beside each assertion.
"""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from bench.lab import Lab, eventually

pytestmark = [pytest.mark.root, pytest.mark.net]
SCRIPT = Path(__file__).with_name("trex_script.py")
SYNC, ASYNC = "24501", "24500"
SO_RCVBUFFORCE = 33


@pytest.fixture(scope="module")
def seen():
    """(what the client saw, frames at the far end)."""
    pytest.importorskip("lbr_trex_client")
    with Lab() as lab:
        near, right, far = (lab.namespace(name) for name in ("near", "right", "far"))
        lab.wire(near, right, ("p0", "p1"))
        lab.wire(near, far, ("q0", "q1"))
        far.run("ethtool", "-K", "q1", "gro", "on")
        ports = [f"p0@{near.name}", f"p1@{right.name}", f"q0@{near.name}=02:00:00:00:00:02"]
        words = [sys.executable, "-m", "bench", "trex", *ports]
        server = lab.process([*words, "--sync-port", SYNC, "--async-port", ASYNC], "trex")
        eventually(lambda: "ports " in server.output() or not server.alive, "the server")
        assert server.alive, server.output()
        with far.inside():
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            tap.bind(("q1", 0x0800))
        with tap:
            tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 23)
            tap.settimeout(0.2)
            done = subprocess.run(
                [sys.executable, str(SCRIPT), SYNC, ASYNC],
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr + server.output()
            frames = list(iter(lambda: _frame(tap), b""))
        found = next(line for line in done.stdout.splitlines() if line.startswith("SEEN "))
        yield json.loads(found.removeprefix("SEEN ")), frames
        assert server.stop() == 0, server.output()


def _frame(tap: socket.socket) -> bytes:
    try:
        return tap.recv(4096)
    except TimeoutError:
        return b""


def test_the_client_finds_a_stateless_server_with_three_ports(seen):
    assert seen[0]["version"] == "STL"
    assert seen[0]["ports"] == [0, 1, 2]


def test_every_frame_is_what_the_field_engine_says(seen):
    """20 of the first stream, then 4 bursts of 3 of the one that follows it."""
    counted, frames = seen[0]["fields"], seen[1]
    assert counted == len(frames) == 32
    for n, data in enumerate(frames[:20]):
        frame, turn = Ether(data), n % 7  # the tuple begins again after 7 flows
        assert (frame.src, frame.dst) == ("02:00:00:00:00:01", "02:00:00:00:00:02")
        assert frame[IP].src == f"16.0.0.{1 + turn % 3}"
        assert frame[UDP].sport == 1025 + turn // 3
        assert len(data) == 99
    down, low = (14, 12, 10), (0, 1, 2, 3)
    firsts = [Ether(data) for data in frames[:7]]
    assert [frame[UDP].dport for frame in firsts] == [down[n % 3] for n in range(7)]
    assert [frame[IP].tos for frame in firsts] == [low[n % 4] << 2 for n in range(7)]
    for data in frames[20:]:
        assert len(data) == 1514
        assert bytes(Ether(data)[UDP].payload) == b"x" * (1514 - 42)


def test_scapy_agrees_with_the_checksums(seen):
    for data in seen[1]:
        again = Ether(data)
        del again[IP].chksum
        del again[UDP].chksum
        assert bytes(Ether(bytes(again))) == data


def test_what_port_0_sends_port_1_counts_by_group(seen):
    rates = seen[0]["rates"]
    groups = rates["groups"]["flow_stats"]
    sent = {name: groups[name]["tx_pkts"]["0"] for name in ("5", "7")}
    for name, least in (("5", 100), ("7", 25)):
        assert groups[name]["rx_pkts"]["1"] == sent[name] >= least
        assert groups[name]["rx_bytes"]["1"] == groups[name]["tx_bytes"]["0"] == 64 * sent[name]
        assert groups[name]["rx_pkts"]["0"] == groups[name]["tx_pkts"]["1"] == 0
    assert sent["5"] <= 0.4 * 4000 + 1, "never more than the rate says"
    assert rates["stats"]["0"]["opackets"] == sum(sent.values())


def test_latency_of_every_timed_packet(seen):
    latency = seen[0]["rates"]["groups"]["latency"]["7"]
    count = seen[0]["rates"]["groups"]["flow_stats"]["7"]["rx_pkts"]["1"]
    assert sum(latency["latency"]["histogram"].values()) == count
    assert not any(latency["err_cntrs"].values()), latency["err_cntrs"]
    numbers = latency["latency"]
    assert 0 < numbers["total_min"] <= numbers["average"] <= numbers["total_max"]


def test_pause_resume_and_another_rate(seen):
    one, two = seen[0]["rates"]["paused"]
    assert one == two > 0
    assert seen[0]["rates"]["after"] > two


def test_what_is_not_supported_is_said(seen):
    large, vxlan = seen[0]["refusals"]
    assert "8996 bytes" in large
    assert "14..3400" in large
    assert "vxlan" in vxlan


def test_the_driver_measures_a_wire(tmp_path):
    """The harness drives our server by TRex's client. (In a process of its own: scapy is here.)"""
    pytest.importorskip("lbr_trex_client")
    scenario, results = tmp_path / "wire.yaml", tmp_path / "results.json"
    scenario.write_text(
        "title: a wire\ntopology: same\nmeasure: [most, latency]\n"
        "traffic: {size: imix, flows: 100}\n"
    )
    words = [sys.executable, "-m", "bench", str(scenario), "--driver", "trex", "--no-html"]
    words += ["--runs", "1", "--seconds", "0.3", "--subject", "xdp redirect", "-o", str(results)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads(results.read_text())
    found = {row["quantity"]: row["median"] for row in whole["rows"]}
    assert found["pps"] > 0, whole["skipped"]
    assert 0 < found["p50_10_us"] <= found["p99_10_us"]
