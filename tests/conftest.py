"""Tiers of tests: `root` tests skip and say why where they cannot run."""

import os
import signal
from pathlib import Path

import pytest

import bench  # noqa: F401 - before anybody imports gRPC

ROOT = Path(__file__).resolve().parents[1]
CAP_NET_ADMIN = 12
CAP_SYS_ADMIN = 21
CAP_BPF = 39


def _missing() -> str:
    if os.geteuid() != 0:
        return "needs root"
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("CapEff"))
    have = int(line.split()[1], 16)
    needed = {"CAP_NET_ADMIN": CAP_NET_ADMIN, "CAP_SYS_ADMIN": CAP_SYS_ADMIN, "CAP_BPF": CAP_BPF}
    lacking = [name for name, bit in needed.items() if not have >> bit & 1]
    if lacking:
        return "needs " + ", ".join(lacking)
    if not (ROOT / "build" / "bpf" / "penstock.bpf.o").exists():
        return "needs the BPF programs: run `make build`"
    return ""


def pytest_collection_modifyitems(items):
    reason = _missing()
    for item in items:
        if reason and item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """A shell that starts us in the background leaves SIGINT ignored; children would inherit it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
