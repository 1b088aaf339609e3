"""Our tables beside DPDK's programs, each on its own work: routes, policy rules, connections.

Rule: both sides get the same routes, rules and packets, written to files for DPDK; one run holds
both, taking turns.

Theory. `python -m bench.tables`. Ours are timed from numba over the very tables and kernels of a
forwarder; dpdk-test-fib, dpdk-test-acl and dpdk-test print clocks of the time stamp counter, which
/proc/cpuinfo's frequency turns into nanoseconds. DPDK's rule sets match addresses and ports of one
list; ours are policies of 250 pods, and a verdict means two route lookups, two identities and the
policies of both ends. Addresses and packets are drawn anew for each size, so the large ones miss
the cache on both sides. The least of the turns is shown: neighbours only add.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from random import Random
from time import perf_counter_ns, process_time
from typing import Any

import numpy as np

from bench import engine
from bench.engine_world import POD_CASE, STAGES, Case
from bench.engine_world import World as EngineWorld
from bench.table_kernels import route_all, verdict_all
from dataplane.engine.worker import make_tables
from dataplane.objects.collect import collect
from dataplane.policy.engine import PolicyEngine
from dataplane.policy.options import LocalEndpoint, LocalView, PolicyOptions
from dataplane.tables.model import Adjacency
from dataplane.tables.policies import PolicyWriter
from dataplane.tables.shm import Shm
from dataplane.tables.writer import TableWriter
from xdp.abi import value

# Shares of prefix lengths in per cent, about those of the Internet's table, and a few longer ones.
LENGTHS = {24: 60, 23: 10, 22: 12, 21: 5, 20: 4, 19: 3, 18: 2, 16: 2, 25: 0.8, 28: 0.4, 32: 0.8}
ADDRESSES, PACKETS = 1_000_000, 65_536
PODS = 250
CALLS = 30
MAC = bytes.fromhex("0a0000000001")
EAL = ("--no-huge", "--no-pci", "--no-telemetry", "--force-max-simd-bitwidth=512")
QUIET = ("--log-level=error", "-l", "0")


@dataclass
class Row:
    """One comparison: nanoseconds each. peer: None where its program is not there."""

    what: str
    size: str
    ours: float
    peer: float | None
    program: str
    note: str = ""


def _clocks_ns(clocks: float) -> float:
    mhz = re.search(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())
    return clocks * 1000 / float(mhz[1]) if mhz else float("nan")


def _dpdk(program: str, memory: int, *words: str) -> str:
    """Run one of DPDK's programs; "" when it is not installed."""
    if shutil.which(program) is None:
        return ""
    command = (program, "-m", str(memory), *EAL, *QUIET, "--", *words)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return done.stdout + done.stderr


def _least(act: Callable[[], Any], count: int, calls: int = CALLS) -> float:
    """Nanoseconds each of a call about `count` things: the least of short calls."""
    least = float("inf")
    for _ in range(calls):
        start = perf_counter_ns()
        act()
        least = min(least, perf_counter_ns() - start)
    return least / count


def _turns(
    turns: int, ours: Callable[[], float], theirs: Callable[[], float | None]
) -> tuple[float, float | None]:
    """Take turns; return the least of each side."""
    pairs = [(ours(), theirs()) for _ in range(turns)]
    peers = [peer for _, peer in pairs if peer is not None]
    return min(one for one, _ in pairs), min(peers, default=None)


# --- routes -------------------------------------------------------------------------------------


def _routes(count: int, random: Random) -> dict[tuple[int, int], int]:
    found: dict[tuple[int, int], int] = {}
    whole = sum(LENGTHS.values())
    for length, share in LENGTHS.items():
        end = min(len(found) + int(count * share / whole), count)
        while len(found) < end:
            prefix = random.getrandbits(length) << (32 - length)
            found.setdefault((prefix, length), random.randrange(1, 64))
    return found


def routes(folder: Path, count: int, turns: int) -> Row:
    """Longest prefix match of random addresses."""
    random = Random(count)
    wanted = _routes(count, random)
    addresses = np.random.default_rng(count).integers(0, 1 << 32, ADDRESSES, np.uint64)
    listed, asked = folder / "routes", folder / "addresses"
    listed.write_text(
        "".join(f"{IPv4Address(at)}/{length} {hop}\n" for (at, length), hop in wanted.items())
    )
    asked.write_text("".join(f"{IPv4Address(int(at))}\n" for at in addresses))
    shm = Shm.create(folder / "fib")
    hops = [Adjacency(value("ADJACENCY_NEXTHOP"), 2, 1500, MAC, bytes(4) + bytes([0, n]))
            for n in range(64)]  # fmt: skip
    networks = {IPv4Network(key): hops[hop] for key, hop in wanted.items()}
    writer = TableWriter(shm)
    start = process_time()
    writer.replace_routes(networks)  # type: ignore[arg-type]
    built = process_time() - start
    tables = make_tables(shm)
    route_all(tables, addresses)

    def theirs() -> float | None:
        words = ("-f", str(listed), "-t", str(asked), "-g", "60000", "-v", "v")
        found = re.search(r"AVG FIB lookup ([\d.]+)", _dpdk("dpdk-test-fib", 3000, *words))
        return _clocks_ns(float(found[1])) if found else None

    least, peer = _turns(
        turns, partial(_least, partial(route_all, tables, addresses), ADDRESSES), theirs
    )
    shm.close()
    note = f"built in {built:.1f} s of our time"
    return Row("route, IPv4, random addresses", f"{count:,}", least, peer, "dpdk-test-fib", note)


# --- rules --------------------------------------------------------------------------------------


class Rules:
    """Rules (block, pod, port): TCP from the block to the pod's port is allowed."""

    def __init__(self, count: int) -> None:
        """count: spread over up to PODS pods."""
        random = Random(count)
        self.pods = min(PODS, max(1, count // 10))
        self.rules = [
            (random.getrandbits(24) << 8, n % self.pods, random.randrange(1, 30000))
            for n in range(count)
        ]
        picked = [random.choice(self.rules) for _ in range(PACKETS)]
        self.sources = np.array([at | random.randrange(256) for at, _, _ in picked], np.uint64)
        self.targets = np.array([self.pod(n) for _, n, _ in picked], np.uint64)
        ports = [port for _, _, port in picked]
        ports[::2] = [random.randrange(1, 30000) for _ in ports[::2]]
        self.ports = np.array(ports, np.int64)

    @staticmethod
    def pod(number: int) -> int:
        """Address of a pod."""
        return 0xC6120000 + 2 + number  # 198.18.0.0/15: no rule's block

    def manifests(self) -> list[dict[str, Any]]:
        """The rules as policies."""
        by_pod: dict[int, list[tuple[int, int]]] = {}
        for at, pod, port in self.rules:
            by_pod.setdefault(pod, []).append((at, port))
        found: list[dict[str, Any]] = [
            {"kind": "Node", "metadata": {"name": "here"}, "spec": {}, "status": {}},
            {"kind": "Namespace", "metadata": {"name": "default"}},
        ]
        for pod, rules in by_pod.items():
            labels = {"pod": str(pod)}
            found.append({
                "kind": "Pod",
                "metadata": {"name": f"p{pod}", "namespace": "default", "labels": labels},
                "spec": {"nodeName": "here"},
                "status": {"podIPs": [{"ip": str(IPv4Address(self.pod(pod)))}]},
            })  # fmt: skip
            found.append({
                "apiVersion": "networking.k8s.io/v1",
                "kind": "NetworkPolicy",
                "metadata": {"name": f"p{pod}", "namespace": "default"},
                "spec": {"podSelector": {"matchLabels": labels}, "ingress": [
                    {"from": [{"ipBlock": {"cidr": f"{IPv4Address(at)}/24"}}],
                     "ports": [{"port": port}]} for at, port in rules
                ]},
            })  # fmt: skip
        return found

    def files(self, folder: Path) -> tuple[Path, Path]:
        """The rules and packets as dpdk-test-acl reads them."""
        listed, trace = folder / "rules", folder / "trace"
        lines = (
            f"@{IPv4Address(at)}/24\t{IPv4Address(self.pod(pod))}/32\t0 : 65535\t"
            f"{port} : {port}\t0x06/0xFF\n"
            for at, pod, port in self.rules
        )
        listed.write_text("".join(lines))
        packets = zip(
            self.sources.tolist(), self.targets.tolist(), self.ports.tolist(), strict=True
        )
        trace.write_text("".join(f"{a}\t{b}\t1024\t{port}\t6\n" for a, b, port in packets))
        return listed, trace


def rules(folder: Path, count: int, turns: int) -> Row:
    """Verdicts about packets of which half are allowed."""
    made = Rules(count)
    shm = Shm.create(folder / "policies")
    writer = TableWriter(shm)
    ends = []
    near: dict[Any, Adjacency] = {}
    for n in range(made.pods):
        address = IPv4Address(made.pod(n))
        ends.append(LocalEndpoint(10 + n, "default", f"p{n}", (address,)))
        near[IPv4Network(address)] = Adjacency(value("ADJACENCY_POD"), 10 + n, 1500, MAC, MAC)
    writer.replace_routes(near)
    policies = PolicyEngine(PolicyWriter(shm), PolicyOptions(), folder / "policies" / "rules.db")
    view = LocalView("here", endpoints=tuple(ends))
    if problems := policies.update(collect(made.manifests()), view):
        raise SystemExit(f"the engine refuses its own benchmark: {problems}")
    tables = make_tables(shm)
    packets = (made.sources, made.targets, made.ports)
    allowed = verdict_all(tables, *packets)
    assert PACKETS // 2 <= allowed < PACKETS * 0.52, allowed
    listed, trace = made.files(folder)

    def theirs() -> float | None:
        files = (f"--rulesf={listed}", f"--tracef={trace}", f"--rulenum={count + 10}")
        run = (
            f"--tracenum={PACKETS}",
            "--iter=5",
            "--tracestep=256",
            "--alg=avx512x32",
            "--verbose=0",
        )
        text = _dpdk("dpdk-test-acl", 6000, *files, *run)
        found = re.search(r"per packet: ([\d.]+)|([\d.]+) cycles/pkt", text)
        return _clocks_ns(float(found[1] or found[2])) if found else None

    ours = partial(_least, partial(verdict_all, tables, *packets), PACKETS)
    least, peer = _turns(turns, ours, theirs)
    policies.close()
    shm.close()
    return Row("verdict, policy rules", f"{count:,}", least, peer, "dpdk-test-acl")


# --- connections --------------------------------------------------------------------------------


def connections(folder: Path, count: int, turns: int) -> Row:
    """What finding and counting established connections costs: the stage `track`."""
    world = EngineWorld(folder / "connections", Case(POD_CASE, count))
    number = STAGES.index("track")
    found = engine.stages(world, turns, 4096)[STAGES[number]]["least"]
    world.close()
    peer = _hash_ns() if count <= 1_000_000 else None
    note = "ours: both directions, state and counters; DPDK: 40-byte keys in bulk"
    return Row("connection, established", f"{count:,}", found, peer, "dpdk-test hash_perf", note)


def _hash_ns() -> float | None:
    """Bulk lookup of rte_hash with 40-byte keys and 8-byte data; its test goes on for minutes."""
    if shutil.which("dpdk-test") is None:
        return None
    words = ("dpdk-test", "-m", "3000", *EAL, *QUIET)
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("hash_perf_autotest\n")
        process.stdin.flush()
        with_data = False
        for line in process.stdout:
            with_data = with_data or "8-byte data" in line
            cells = line.split()
            if with_data and cells and cells[0] == "40":
                process.kill()
                return _clocks_ns(float(cells[3]))
    return None


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| what | size | ours, ns | DPDK, ns | x | by, note |", "|---|---|---|---|---|---|"]
    for row in rows:
        times = f"{row.peer / row.ours:.1f}" if row.peer else ""
        peer = f"{row.peer:.1f}" if row.peer else "-"
        by = ", ".join(text for text in (row.program, row.note) if text)
        lines.append(f"| {row.what} | {row.size} | {row.ours:.1f} | {peer} | {times} | {by} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="bench.tables", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--routes", type=int, nargs="*", default=[1_000_000])
    parser.add_argument("--rules", type=int, nargs="*", default=[10, 1000, 10_000, 100_000])
    parser.add_argument("--connections", type=int, nargs="*", default=[1_000_000, 8_000_000])
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    rows: list[Row] = []
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for measure, sizes in (
        (routes, options.routes),
        (rules, options.rules),
        (connections, options.connections),
    ):
        for size in sizes:
            with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="penstock-tables-") as folder:
                rows.append(measure(Path(folder), size, options.turns))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
