"""Stacks of workers and softirqs: the kernel's part by perf, the stages' by the workers' clocks.

Rule: a sample is counted once, under what caused it.

Theory. A compiled loop has one function, in which perf sees no stages; but what the loop has timed
says how its user time divides, and where it entered the kernel says in which stage: sendto is
`transmit`, epoll_wait sleeps, sched_yield waits. What remains of user time is the loop that looks
for packets. XDP programs and their softirq run in whoever sends, so network receive in other tasks
is shown beside the workers, under the task that paid for it.
"""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dataplane.profiling.hardware import MISSING

HERTZ = 997  # a prime: not in step with anything periodic
KERNEL = 1 << 63
ENTRIES = {
    "sendto": "transmit",
    "epoll_wait": "sleep",
    "sched_yield": "yield",
    "recvfrom": "receive",
}
NETWORK = re.compile(r"^(net_rx_action|__napi_poll|veth_\w+|bpf_prog_\w+|xsk_\w+|xdp_\w+)$")
FRAME = re.compile(r"^\s+([0-9a-f]+)\s+(.*)$")
HEAD = re.compile(r"^(.*?)\s+(\d+)\s*$")
Stack = tuple[str, ...]


class Sample(NamedTuple):
    """One look at one processor."""

    comm: str
    tid: int
    frames: list[tuple[int, str]]  # (address, symbol), the outermost first


class Recording:
    """perf, on all processors, for a while."""

    def __init__(self, seconds: float) -> None:
        """Begin; `why` says why not, when it cannot."""
        self._folder = tempfile.TemporaryDirectory(prefix="penstock-perf-")
        self._data = Path(self._folder.name) / "perf.data"
        self.why = "" if shutil.which("perf") else MISSING
        self._process: subprocess.Popen[str] | None = None
        if not self.why:
            words = ["perf", "record", "-q", "-a", "-g", "-e", "cpu-clock", "-F", str(HERTZ)]
            words += ["-o", str(self._data), "--", "sleep", str(seconds)]
            self._process = subprocess.Popen(
                words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )

    def samples(self) -> list[Sample]:
        """Wait for the end; return what was seen, nothing if `why` says something."""
        if self._process is not None:
            _, text = self._process.communicate()
            if self._process.returncode:
                self.why = " ".join(text.split())[-200:]
        found: list[Sample] = []
        if not self.why:
            words = ["perf", "script", "-i", str(self._data), "-F", "comm,tid,ip,sym"]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            found = list(parse(done.stdout.splitlines()))
        self._folder.cleanup()
        return found


def parse(lines: Iterable[str]) -> Iterator[Sample]:
    """Read `perf script -F comm,tid,ip,sym`."""
    sample: Sample | None = None
    for line in lines:
        if frame := FRAME.match(line):
            if sample is not None:
                name = frame[2].split("+0x")[0].strip() or "[unknown]"
                sample.frames.insert(0, (int(frame[1], 16), name))
        elif not line.strip():
            if sample is not None:
                yield sample
            sample = None
        elif head := HEAD.match(line):
            sample = Sample(head[1].strip(), int(head[2]), [])
    if sample is not None:
        yield sample


def folded(samples: Iterable[Sample], window: Mapping[str, Any]) -> dict[Stack, float]:
    """Return seconds by stack. window: what `window.between` returned."""
    workers = {row["tid"]: row for row in window["workers"]}
    found: Counter[Stack] = Counter()
    user: Counter[int] = Counter()
    for sample in samples:
        kernel = [name for address, name in sample.frames if address >= KERNEL]
        if sample.tid not in workers:
            if (at := _network(kernel)) is not None:
                found["network receive in other tasks", sample.comm, *kernel[at:]] += 1
        elif kernel:
            entry = _entry(kernel)
            found[_root(workers[sample.tid]), entry, *kernel] += 1
        else:
            user[sample.tid] += 1
    seconds = {stack: count / HERTZ for stack, count in found.items()}
    for tid, row in workers.items():
        _stages(seconds, row, user[tid] / HERTZ)
    return {stack: weight for stack, weight in seconds.items() if weight > 0}


def _root(row: Mapping[str, Any]) -> str:
    return f"worker {row['worker']}"


def _entry(kernel: list[str]) -> str:
    for name in kernel:
        for call, stage in ENTRIES.items():
            if name.endswith(f"sys_{call}"):
                return stage
    return "interrupts"


def _network(kernel: list[str]) -> int | None:
    return next((n for n, name in enumerate(kernel) if NETWORK.match(name)), None)


def _stages(seconds: dict[Stack, float], row: Mapping[str, Any], user: float) -> None:
    """Divide a worker's user time among its stages, as it has timed them."""
    root = _root(row)
    inside = sum(weight for stack, weight in seconds.items() if stack[:2] == (root, "transmit"))
    for stage, ns in row["stages"].items():
        weight = ns * row["packets"] / 1e9
        if stage == "transmit":
            weight = max(0.0, weight - inside)
        weight = min(weight, user) if user else weight
        seconds[root, stage] = seconds.get((root, stage), 0.0) + weight
        user = max(0.0, user - weight)
    seconds[root, "looking for packets"] = user
