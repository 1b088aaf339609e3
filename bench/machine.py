"""What the numbers were taken on: processor, kernel, versions, and a yardstick.

Rule: facts are read where they stand; what cannot be read is left out.

Theory. A result means something on its machine only. The yardstick is a fixed piece of work
(SHA-256 over a megabyte), timed before each measurement: it differs when the clock or a neighbour
does, and so tells a slower program from a slower hour.
"""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import ovs
from bench.lab import ROOT, LabError

MODULES = ("numba", "llvmlite", "numpy", "cffi", "MLRsearch", "hdrhistogram")
PACKAGES = (
    "libbpf1", "nftables", "iproute2", "iperf3", "dpdk-dev", "librte-net-af-xdp23",
    "openvswitch-switch", "dnsperf", "dnsmasq-base",
)  # fmt: skip
WORK = bytes(1 << 20)
REPEATS = 5


def facts() -> dict[str, Any]:
    """Return what is known of the machine."""
    found: dict[str, Any] = {
        "cpu": _first(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo")) or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "kernel": os.uname().release,
        "virtual": "hypervisor" in (_first(r"flags\s*:\s*(.+)", Path("/proc/cpuinfo")) or ""),
    }
    for name, path in (
        ("clocksource", "/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        ("governor", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        ("cmdline", "/proc/cmdline"),
    ):
        if text := _read(Path(path)):
            found[name] = text
    return found


def versions() -> dict[str, str]:
    """Return versions of what took part, peers included."""
    found = {"python": platform.python_version(), "penstock": _commit()}
    for name in MODULES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if shutil.which("dpkg-query"):
        for line in _output("dpkg-query", "-W", *PACKAGES).splitlines():
            name, _, version = line.partition("\t")
            if version:
                found[name] = version
    with contextlib.suppress(LabError):
        found["ovs"] = _output(ovs.find("ovs-vswitchd"), "--version").split("\n")[0]
    return found


def yardstick() -> float:
    """Return microseconds of a fixed piece of work, the median of a few."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        hashlib.sha256(WORK).digest()
        times.append(time.perf_counter() - start)
    return round(sorted(times)[REPEATS // 2] * 1e6, 1)


def _commit() -> str:
    text = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return text.strip() or "unknown"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _first(pattern: str, path: Path) -> str:
    found = re.search(pattern, _read(path))
    return found[1].strip() if found else ""
