"""The measurements: packets a second, one TCP stream, one-byte round trips.

Rule: a measurement returns numbers by name, in the units of UNITS; what went wrong is a LabError.

Theory. Rates are read in the middle of a run, after a warm-up, at the far end. Processor time is
the machine's busy time (/proc/stat) in that window over the packets delivered, so softirqs count,
whoever pays for them; generator and sink are in it for everybody alike. The forwarder's own time
is that of its threads (schedstat), system calls included.
"""

import json
import os
import time
from pathlib import Path

from bench import checks
from bench.generator import Flow, start
from bench.lab import LabError
from bench.sink import sink
from bench.subjects import DEVICE, GENERATOR_CPU, Subject

WARM_S = 0.5
UNITS = {  # M packets/s; ns of all cores, and of the forwarder alone, for each packet delivered
    "pps": "Mpps",
    "busy_ns": "CPU ns/packet",
    "own_ns": "forwarder ns/packet",
    "gbits": "Gbit/s",
    "p50_us": "p50 us",
    "p99_us": "p99 us",
    "p999_us": "p99.9 us",
}
LESS_IS_BETTER = frozenset({"busy_ns", "own_ns", "p50_us", "p99_us", "p999_us"})


def packets(subject: Subject, flows: int, seconds: float) -> dict[str, float]:
    """Offer all that the generator can, 64-byte frames, and count what arrives."""
    client, server = subject.client, subject.server
    target = server.addresses[4]
    with subject.turn("packets"):
        hop = subject.next_hop()  # before the sink: the peer may have to answer
        flow = Flow(client.mac(), hop, client.addresses[4], target)
        with sink(server.namespace, DEVICE) as counter:
            process = start(client.namespace, DEVICE, flow, flows, GENERATOR_CPU)
            try:
                time.sleep(WARM_S)
                before = busy_ns(), subject.cpu_ns(), counter.packets(), time.perf_counter()
                time.sleep(seconds)
                after = busy_ns(), subject.cpu_ns(), counter.packets(), time.perf_counter()
                if not process.alive:
                    raise LabError(f"the generator has ended: {process.output()}")
            finally:
                process.stop()
    busy, own, arrived, passed = (b - a for a, b in zip(before, after, strict=True))
    if not arrived:
        raise LabError(f"{subject.name}: no packet arrived")
    found = {"pps": arrived / passed / 1e6, "busy_ns": busy / arrived}
    if own:
        found["own_ns"] = own / arrived
    return found


def stream(subject: Subject, seconds: int) -> dict[str, float]:
    """One iperf3 TCP stream, anywhere on the machine."""
    with subject.turn("stream"), served(subject, frozenset()):
        found = checks.iperf3(subject.client.namespace, subject.server.addresses[4], seconds)
    return {"gbits": found.gbits}


def latency(subject: Subject, seconds: float) -> dict[str, float]:
    """One byte there and back over TCP, both ends on the generator's core."""
    with subject.turn("latency"), served(subject, frozenset({GENERATOR_CPU})):
        found = checks.request_response(
            subject.client.namespace,
            subject.server.addresses[4],
            "tcp",
            seconds,
            cpu=GENERATOR_CPU,
        )
    return {name: found[name] for name in ("p50_us", "p99_us", "p999_us")}


class served:  # noqa: N801  (reads as a verb at its uses)
    """The servers of a subject's server pod, for the body."""

    def __init__(self, subject: Subject, cpus: frozenset[int]) -> None:
        """cpus: where they may run, empty: anywhere."""
        self.namespace = subject.server.namespace
        self.cpus = cpus

    def __enter__(self) -> None:
        self.servers = checks.serve(self.namespace)
        for process in self.servers.processes:
            if self.cpus:
                os.sched_setaffinity(process.pid, self.cpus)

    def __exit__(self, *_: object) -> None:
        for process in self.servers.processes:
            process.stop()


def busy_ns() -> int:
    """Time that all cores have worked since the boot; resolution of a clock tick a core."""
    words = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    idle = words[3] + words[4]
    return (sum(words[:8]) - idle) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


def machine() -> dict[str, str | int]:
    """What the numbers were taken on."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    release = os.uname().release
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "kernel": release}


def dump(path: Path, results: dict) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
