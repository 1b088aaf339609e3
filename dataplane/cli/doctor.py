"""penstock doctor: what this machine can and cannot do, and the fix.

Rule: each line is a fact that was tried, what it means, and what to do about it.

Theory. Features of the kernel are probed (xdp/features.py), not guessed from its version. The
rest is what goes wrong on real nodes: shared memory on a disk, too few queues, no huge pages, a
plugin that is not installed. Exit status 1 when something that Penstock needs is missing, 3 when
something is merely slower than it could be.
"""

import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import DEGRADED, config_option, output_option, show

HUGE_SIZE = 2 << 20
HUGE_FREE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
NEEDED = ("XDP programs", "XDP links", "mmapped maps", "XSKMAP", "AF_XDP")  # nothing works without


@dataclass(frozen=True)
class Finding:
    """One line. state: ok, slow, missing or unknown."""

    what: str
    state: str
    detail: str
    fix: str = ""


def _features() -> Iterator[Finding]:
    from xdp.features import probe_all

    for feature in probe_all():
        if feature.name == "huge pages":
            continue  # `_memory` says how many would be needed
        lacking = "missing" if feature.name in NEEDED else "slow"
        state = {"yes": "ok", "no": lacking, "unknown": "unknown"}[feature.state]
        detail = f"{feature.detail} (since Linux {feature.since})".strip()
        yield Finding(feature.name, state, detail, "" if state == "ok" else feature.fix)


def _privilege() -> Iterator[Finding]:
    import os

    if os.geteuid() == 0:
        yield Finding("privilege", "ok", "root")
    else:
        yield Finding("privilege", "missing", f"user {os.geteuid()}", "run as root")


def _memory(config: Any) -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft in (resource.RLIM_INFINITY,) or soft > 1 << 30:
        yield Finding("memory lock limit", "ok", "enough")
    else:
        text = f"{soft >> 10} KiB; does not count for root with CAP_IPC_LOCK"
        yield Finding("memory lock limit", "ok", text)
    frames = config.forwarder.frames
    needed = -(-frames * 4160 // HUGE_SIZE)
    free = int(HUGE_FREE.read_text()) if HUGE_FREE.exists() else 0
    fix = f"sysctl vm.nr_hugepages={needed}: fewer TLB misses, and zero-copy devices need them"
    state = "ok" if free >= needed else "slow"
    detail = f"{free} of 2 MiB free, {needed} would hold {frames} frames"
    yield Finding("huge pages", state, detail, "" if state == "ok" else fix)


def _folders(config: Any) -> Iterator[Finding]:
    import subprocess

    place = next(p for p in [config.run_dir, *config.run_dir.parents] if p.exists())
    command = ["stat", "-f", "-c", "%T", str(place)]
    kind = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if kind in ("tmpfs", "ramfs"):
        yield Finding("shared memory", "ok", f"{config.run_dir} on {kind}")
    else:
        fix = "set node.run_dir to a tmpfs such as /run: a disk costs about 70 ns a packet"
        yield Finding("shared memory", "slow", f"{config.run_dir} on {kind}", fix)
    plugin = config.node.cni.bin_dir / "penstock-cni"
    if plugin.exists():
        yield Finding("CNI plugin", "ok", str(plugin))
    else:
        yield Finding("CNI plugin", "missing", f"no {plugin}", "penstock cni install")
    if not config.source.folder.is_dir():
        fix = "make the folder, or set source.folder"
        yield Finding("manifests", "missing", f"no folder {config.source.folder}", fix)
    else:
        yield Finding("manifests", "ok", str(config.source.folder))


def _uplinks(config: Any) -> Iterator[Finding]:
    from xdp.device import channels, driver

    cards = (path.parent.name for path in Path("/sys/class/net").glob("*/device"))
    for name in config.network.uplinks or sorted(cards):
        if not Path("/sys/class/net", name).exists():
            yield Finding(f"uplink {name}", "missing", "no such device", "network.uplinks")
            continue
        try:
            kind = driver(name)
        except OSError as error:
            kind = f"driver unknown ({error})"
        yield Finding(f"uplink {name}", "ok", f"{kind}, {channels(name)} queues")


def _artifacts() -> Iterator[Finding]:
    from xdp.artifacts import find

    for name in ("penstock.bpf.o", "penstock-cni"):
        try:
            yield Finding(name, "ok", str(find(name)))
        except FileNotFoundError as error:
            yield Finding(name, "missing", str(error), "make build")


@click.command()
@config_option
@output_option
def doctor(config: Any, path: Path | None, output: str) -> None:
    """What this machine can and cannot do, and the fix."""
    findings = [
        *_privilege(),
        *_features(),
        *_memory(config),
        *_folders(config),
        *_uplinks(config),
        *_artifacts(),
    ]
    show([asdict(one) for one in findings], output, ("what", "state", "detail", "fix"))
    states = {one.state for one in findings}
    sys.exit(1 if "missing" in states else DEGRADED if "slow" in states else 0)
