"""The engine alone, from memory: ns a packet and stage. `make engine`.

Rule: no device, no ring, no system call: the kernels that a worker runs, on frames in memory.

Theory. Packets of a pod (64-byte UDP) go through all stages into a tunnel, or to a pod of the
same node. A measurement is one compiled call that loads vectors of 256 in turn and decides about
them, so that Python's part is nothing; a second call only loads, and its time is taken off.
Frames are restored by the load (the headers of the last turn lie in the headroom), as a NIC would
write them. Stages are timed by calls that stop after each stage, and differences are taken. The
least of many repeats is the machine's own speed, the median is what one gets beside its
neighbours.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dataplane.engine.account import account, make_counters
from dataplane.engine.worker import make_tables
from dataplane.kernels.admit import admit
from dataplane.kernels.answer import answer
from dataplane.kernels.batch import VERDICT_SEND, make_batch
from dataplane.kernels.forward import forward
from dataplane.kernels.house import copy32, inline, kernel, prefetch
from dataplane.kernels.judge import judge
from dataplane.kernels.parse import parse
from dataplane.kernels.route import route
from dataplane.tables.model import Adjacency, Port, Tunnel
from dataplane.tables.shm import Shm
from dataplane.tables.writer import TableWriter
from xdp.abi import CONST, value

VECTOR = CONST["VECTOR_MAX"]
STRIDE, HEADROOM = CONST["FRAME_STRIDE"], CONST["FRAME_HEADROOM"]
STAGES = ("load", "parse", "admit", "route", "judge", "answer", "forward", "account")
FRAME = 64
POD, UPLINK = 1, 2
GATEWAY = bytes.fromhex("025000000001")
MAC = bytes.fromhex("0a0000000001")


@inline
def _load(b, area, images, first, frames):
    """Put VECTOR packets of the image table into their frames, as received."""
    b.count[0] = VECTOR
    for i in range(VECTOR):
        n = (first + i) % frames
        at = area + n * STRIDE + HEADROOM
        if i + 8 < VECTOR:
            prefetch(area + ((first + i + 8) % frames) * STRIDE + HEADROOM)
        copy32(at, images + n * FRAME)
        copy32(at + 32, images + n * FRAME + 32)
        b.address[i] = at
        b.frame[i] = n * STRIDE
        b.length[i] = FRAME
        b.total[i] = FRAME
        b.segments[i] = 0
        b.ingress[i] = POD
        b.egress[i] = -1
        b.verdict[i] = 0
        b.reason[i] = 0
        b.kind[i] = 0
        b.flags[i] = 0
        b.adjacency[i] = 0


@kernel
def _run(b, t, c, area, images, frames, vectors, last):
    """Send `vectors` vectors through the stages up to number `last` of STAGES."""
    first = 0
    for _ in range(vectors):
        _load(b, area, images, first, frames)
        first = (first + VECTOR) % frames
        if last >= 1:
            parse(b)
        if last >= 2:
            admit(b, t)
        if last >= 3:
            route(b, t)
        if last >= 4:
            judge(b, t)
        if last >= 5:
            answer(b, t)
        if last >= 6:
            forward(b, t)
        if last >= 7:
            account(b, t, c)


class Bench:
    """Tables, frames and the compiled loop."""

    def __init__(self, folder: Path, flows: int, tunnel: bool) -> None:
        """flows: distinct addresses and ports, a frame each (at most 64 Ki frames are kept)."""
        self.shm = Shm.create(folder)
        writer = TableWriter(self.shm)
        self._tables(writer, tunnel)
        self.frames = -(-min(flows, 1 << 16) // VECTOR) * VECTOR
        self.images = np.zeros((self.frames, FRAME), np.uint8)
        for n in range(self.frames):
            self.images[n] = np.frombuffer(_image(n % flows), np.uint8)
        self.area = np.zeros(self.frames * STRIDE + 4096, np.uint8)
        self.batch = make_batch()
        self.tables = make_tables(self.shm)
        self.counters = make_counters(
            self.shm.reasons[0],
            self.shm.port_counters[0],
            self.shm.worker_stats[0:1],
            self.shm.flows[0],
        )

    def _tables(self, writer: TableWriter, tunnel: bool) -> None:
        from ipaddress import ip_address, ip_network

        kind = value("TUNNEL_VXLAN")
        writer.set_node(gateway_mac=GATEWAY, tunnel_kind=kind, tunnel_port=8472, vni=1, workers=1)
        mine = ip_address("10.1.1.2")
        pod = Port(value("PORT_POD"), "pod", 11, 65000, 1, GATEWAY, MAC, mine, None, 1)  # type: ignore
        writer.set_port(POD, pod)
        writer.set_port(UPLINK, Port(value("PORT_UPLINK"), "eth0", 12, 1500, 1, GATEWAY))
        local, remote = ip_address("192.0.2.1"), ip_address("192.0.2.2")
        outer = Tunnel(kind, local, remote, 8472, 1, GATEWAY, MAC)
        far = Adjacency(value("ADJACENCY_TUNNEL"), UPLINK, 1450, GATEWAY, MAC, outer)
        near = Adjacency(value("ADJACENCY_POD"), POD, 65000, GATEWAY, MAC)
        writer.replace_routes({ip_network("10.2.0.0/16"): far if tunnel else near})
        writer.publish()

    def time(self, last: int, vectors: int) -> float:
        """Return ns a packet of the stages up to `last`."""
        start = time.perf_counter_ns()
        _run(
            self.batch,
            self.tables,
            self.counters,
            self.area.ctypes.data,
            self.images.ctypes.data,
            self.frames,
            vectors,
            last,
        )
        return (time.perf_counter_ns() - start) / (vectors * VECTOR)

    def measure(self, repeats: int, vectors: int) -> dict[str, Any]:
        """Return for each stage and the sum: least and median ns a packet."""
        self.time(len(STAGES) - 1, 64)
        assert (self.batch.verdict == VERDICT_SEND).all(), "the frames of the benchmark must pass"
        rows = [[self.time(last, vectors) for last in range(len(STAGES))] for _ in range(repeats)]
        found = {}
        for number, name in enumerate(STAGES[1:], 1):
            found[name] = _between(rows, number - 1, number)
        found["parse..forward"] = _between(rows, 0, STAGES.index("forward"))
        return found

    def close(self) -> None:
        """Unmap."""
        del self.tables, self.counters
        self.shm.close()


def _between(rows: list[list[float]], before: int, after: int) -> dict[str, float]:
    """Least and median of what stands between two cumulative columns."""
    first, last = ([row[column] for row in rows] for column in (before, after))
    return {
        "least": round(min(last) - min(first), 1),
        "median": round(statistics.median(last) - statistics.median(first), 1),
    }


def _image(flow: int) -> bytes:
    """A 64-byte frame of UDP to a far pod; flows differ in address and source port."""
    import struct

    target = 0x0A020000 | (flow & 0xFFFF)
    header = struct.pack(">BBHHHBBH", 0x45, 0, 50, 0, 0, 64, 17, 0)
    header += struct.pack(">II", 0x0A010102, target)
    total = sum(struct.unpack(">10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    header = header[:10] + struct.pack(">H", ~total & 0xFFFF) + header[12:]
    udp = struct.pack(">HHHH", 1024 + flow % 60000, 9, 30, 0)
    return GATEWAY + MAC + b"\x08\x00" + header + udp + bytes(22)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; --json FILE keeps the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, 1 k flows only")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    flows = [1000] if options.quick else [1, 1000, 10_000, 65_536]
    repeats, vectors = (9, 400) if options.quick else (25, 800)
    results = []
    for tunnel in (False, True):
        for count in flows:
            with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="penstock-engine-") as folder:
                bench = Bench(Path(folder), count, tunnel)
                stages = bench.measure(repeats, vectors)
                bench.close()
            results.append({"flows": count, "vxlan": tunnel, "ns": stages})
    _print(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


def _print(results: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="ns a packet: median (least)", title_justify="left")
    names = [*STAGES[1:], "parse..forward"]
    for name in ("flows", "way", *names):
        table.add_column(name, justify="right")
    for row in results:
        cells = [f"{row['ns'][name]['median']} ({row['ns'][name]['least']})" for name in names]
        table.add_row(f"{row['flows']:,}", "vxlan" if row["vxlan"] else "pod", *cells)
    Console(width=None if sys.stdout.isatty() else 170).print(table)


if __name__ == "__main__":
    sys.exit(main())
