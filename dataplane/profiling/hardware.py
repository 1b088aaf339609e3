"""Hardware counters of threads, by perf.

Rule: a counter that this machine has not is None, with the reason beside all of them.

Theory. A virtual machine often shows no performance monitoring unit; perf then says "not supported"
for each event. perf is asked rather than perf_event_open, since it knows the names of events on
every processor.
"""

import shutil
import subprocess
from collections.abc import Sequence

EVENTS = (
    "cycles", "instructions", "cache-misses", "dTLB-load-misses", "context-switches",
    "cpu-migrations",
)  # fmt: skip
SILENT = ("<not supported>", "<not counted>")
MISSING = "perf is not installed: apt install linux-perf"
NO_UNIT = "this machine shows no hardware counters (a virtual machine without a PMU)"


def start(tids: Sequence[int], seconds: float) -> "subprocess.Popen[str] | None":
    """Begin to count; None: perf is not installed."""
    if shutil.which("perf") is None or not tids:
        return None
    words = ["perf", "stat", "-x", ";", "-e", ",".join(EVENTS), "-t", ",".join(map(str, tids))]
    words += ["--", "sleep", str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str] | None") -> tuple[dict[str, int | None], str]:
    """Return (counts by event, what is to be said about them)."""
    if process is None:
        return dict.fromkeys(EVENTS), MISSING
    _, text = process.communicate()
    found = parse(text)
    if process.returncode and not any(found.values()):
        return found, " ".join(text.split())[-200:]
    return found, "" if found["cycles"] is not None else NO_UNIT


def parse(text: str) -> dict[str, int | None]:
    """Return counts by event from `perf stat -x ;`; None: not counted here."""
    found: dict[str, int | None] = dict.fromkeys(EVENTS)
    for line in text.splitlines():
        parts = line.split(";")
        name = parts[2].split(":")[0] if len(parts) > 2 else ""
        if name in found and parts[0] not in SILENT:
            try:
                found[name] = int(float(parts[0]))
            except ValueError:
                continue
    return found
