"""Flows at scale: a million new ones a second, a million kept. `python -m bench.scale_flows`.

Rule: what is timed are the product's own parts, one after the other: the writer's kernel, the
observer's turn, a server that is asked over gRPC, the kernel that judges.

Theory. Events are written by the kernel that workers call, about connection records that do not fit
the caches. First alone, then with a collector that reads beside it at a given rate: whatever the
observer cannot take must be counted, to the last one. Then a million flows of ten thousand pods are
kept, and questions asked through the socket. Last, recorded flows are judged by a hundred policies.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from dataplane.engine.trial import COLUMNS, Trial
from dataplane.kernels.events import NOW, begin, make_ring
from dataplane.kernels.house import kernel
from dataplane.objects.collect import collect
from dataplane.observe.book import LiveBook
from dataplane.observe.collector import Collector
from dataplane.observe.protocol import OBSERVER, message, stub
from dataplane.observe.service import Observer, Peer, Server
from dataplane.policy.options import LocalEndpoint, LocalView, PolicyOptions
from dataplane.tables.shm import Shm
from xdp.abi import DTYPE, value

RECORDS, SIZE = 1 << 16, DTYPE["connection"].itemsize
BURST = 1000  # events between two looks at the clock
PODS = 10_000


@kernel
def _write(ring, records, used, first, count):
    """Tell `count` new connections, of `used` records in turn. records: a memory address."""
    for n in range(count):
        begin(ring.address, records + ((first + n) & (used - 1)) * SIZE)


def _records() -> np.ndarray:
    """Connections of random pods, as aligned as they are in shared memory."""
    rows = np.zeros(RECORDS, DTYPE["connection"])
    rng = np.random.default_rng(1)
    for name in ("source_lo", "target_lo"):
        rows[name] = 0x0A010002 + rng.integers(0, PODS, RECORDS)
    rows["reply_source_lo"], rows["reply_target_lo"] = rows["target_lo"], rows["source_lo"]
    ports = rng.integers(1024, 65535, RECORDS).astype(np.uint64)
    rows["word"] = ports << np.uint64(48) | np.uint64(80 << 32 | 6 << 8 | 4)
    rows["reply_word"] = np.uint64(80 << 48) | ports << np.uint64(32) | np.uint64(6 << 8 | 4)
    return rows


def _write_at(ring: Any, records: np.ndarray, used: int, rate: float, seconds: float) -> float:
    """Write at a rate, 0: as fast as it goes; return CPU seconds in the kernel per event.

    used: how many of the records are told of, in turn; a power of two.
    """
    spent, done, start = 0.0, 0, time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        if rate and done > (now - start) * rate:
            time.sleep(0.0002)
            continue
        ring[NOW] = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        before = time.thread_time()
        _write(ring, records.ctypes.data, used, done, BURST)
        spent += time.thread_time() - before
        done += BURST
    return spent / done


def rings(folder: Path, seconds: float) -> dict[str, float]:
    """Measure the writer alone, and beside an observer."""
    shm, records, found = Shm.create(folder), _records(), {}
    ring = make_ring(shm.event_rings[0:1], shm.flow_records[0])
    _write(ring, records.ctypes.data, RECORDS, 0, 0)
    found["write, ns an event"] = _write_at(ring, records, RECORDS, 0, seconds) * 1e9
    found["write, the record at hand, ns an event"] = _write_at(ring, records, 64, 0, seconds) * 1e9
    for rate in (100_000, 500_000, 1_000_000):
        collector = Collector(shm, 1 << 20)
        while collector.turn():
            pass
        first = int(shm.event_rings["head"][0]) - collector.store.head - collector.lost
        collector.start()
        cost = _write_at(ring, records, RECORDS, rate, seconds)
        time.sleep(0.5)
        collector.close()
        while collector.turn():
            pass
        written = int(shm.event_rings["head"][0]) - first
        assert written == collector.store.head + collector.lost, "an event is neither read nor lost"
        name = f"{rate:,} a second beside an observer"
        found[f"{name}, ns an event"] = cost * 1e9
        found[f"{name}, lost of 1000"] = 1000 * collector.lost / max(1, written)
    shm.close()
    return found


def questions(folder: Path, flows: int) -> dict[str, float]:
    """Measure answers of a server that keeps so many flows."""
    shm, records = Shm.create(folder), _records()
    rows: list[dict[str, Any]] | None = [
        {"namespace": "shop", "name": f"web-{n}", "number": n + 1 if n < 200 else 0, "node": "n1",
         "addresses": [f"10.1.{(n + 2) >> 8}.{(n + 2) & 255}"]}
        for n in range(PODS)
    ]  # fmt: skip
    news = [rows]
    collector = Collector(shm, flows, lambda: news.pop() if news else None)
    ring = make_ring(shm.event_rings[0:1], shm.flow_records[0])
    while len(collector.store) < flows:
        ring[NOW] = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        _write(ring, records.ctypes.data, RECORDS, random.randrange(RECORDS), 65536)
        while collector.turn():
            pass
    book = LiveBook(shm, folder / "rules.db", folder / "services.json")
    server = Server(Observer(collector, book, "n1"), Peer(dict, lambda: True))
    server.listen_unix(folder / "hubble.sock")
    server.start()
    channel = grpc.insecure_channel(f"unix:{folder / 'hubble.sock'}")
    ask = stub(channel, OBSERVER, "GetFlows")

    def of_pod(name: str, number: int) -> Any:
        request = message("observer.GetFlowsRequest")(number=number)
        for side in ("source_pod", "destination_pod"):
            getattr(request.whitelist.add(), side).append(f"shop/{name}")
        return request

    found = {
        "the last 20 of one pod, ms": _best(lambda: list(ask(of_pod("web-77", 20)))) * 1e3,
        "all of one pod, ms": _best(lambda: list(ask(of_pod("web-9999", 1 << 40)))) * 1e3,
        "of a pod that has none, ms": _best(lambda: list(ask(of_pod("nobody", 20)))) * 1e3,
    }
    found["of one pod, flows"] = len(list(ask(of_pod("web-9999", 1 << 40))))
    channel.close()
    server.stop()
    shm.close()
    return found


def _best(
    function: Callable[[], object], clock: Callable[[], float] = time.perf_counter, times: int = 5
) -> float:
    def once() -> float:
        start = clock()
        function()
        return clock() - start

    return min(once() for _ in range(times))


def _policies(count: int) -> list[dict[str, Any]]:
    def one(n: int) -> dict[str, Any]:
        chosen = {"matchLabels": {"app": f"a{n}"}}
        peer = {"podSelector": {"matchLabels": {"app": f"a{n + 1}"}} if n % 2 else {}}
        rule = {"from": [peer], "ports": [{"port": 80 + n % 3, "endPort": 81 + n % 3}]}
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"p{n}", "namespace": "shop"},
            "spec": {"podSelector": chosen, "policyTypes": ["Ingress"], "ingress": [rule]},
        }

    return [one(n) for n in range(count)]


def judging(folder: Path, flows: int, pods: int = 200, policies: int = 100) -> dict[str, float]:
    """Measure how many recorded flows a second are judged, of pods that policies select."""
    manifests: list[dict[str, Any]] = [
        {"kind": "Node", "metadata": {"name": "n1"}, "spec": {"podCIDRs": ["10.1.0.0/16"]},
         "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}},
        {"kind": "Namespace", "metadata": {"name": "shop"}},
    ]  # fmt: skip
    ends = []
    for n in range(PODS):
        address = f"10.1.{(n + 2) >> 8}.{(n + 2) & 255}"
        manifests.append(
            {"kind": "Pod", "status": {"podIPs": [{"ip": address}]}, "spec": {"nodeName": "n1"},
             "metadata": {"name": f"web-{n}", "namespace": "shop",
                          "labels": {"app": f"a{n % policies}"}}}
        )  # fmt: skip
        if n < pods:
            ends.append((n + 1, f"web-{n}", address))
    local = LocalView(
        "n1",
        endpoints=tuple(
            LocalEndpoint(port, "shop", name, (ip_address(address),))
            for port, name, address in ends
        ),
    )
    objects = collect([*manifests, *_policies(policies)])
    trial = Trial(folder, objects, local, PolicyOptions(), 0)
    rng = np.random.default_rng(2)
    columns: dict[str, np.ndarray] = {}
    for name, dtype in COLUMNS.items():
        columns[name] = np.zeros(flows, dtype)
    columns["family"][:], columns["protocol"][:] = 4, 6
    columns["target_port"][:] = rng.integers(79, 84, flows)
    columns["source_lo"][:] = 0x0A010002 + rng.integers(0, PODS, flows)
    columns["target_lo"][:] = 0x0A010002 + rng.integers(0, pods, flows)
    seconds = _best(lambda: trial.judge(columns), time.thread_time)
    denied = float((trial.judge(columns).reasons == value("REASON_POLICY_DENIED")).mean())
    trial.close()
    return {"judged, M flows a second of one core": flows / seconds / 1e6, "denied, of all": denied}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; --json FILE keeps the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flows", type=int, default=1 << 20, help="that are kept, and judged")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each rate")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="penstock-flows-") as name:
        folder = Path(name)
        found |= rings(folder / "rings", options.seconds)
        found |= questions(folder / "questions", options.flows)
        found |= judging(folder / "judging", options.flows)
    for what, number in found.items():
        print(f"{what:<50} {number:>14,.3f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
