"""The forwarder process: workers, ports, and a small socket to be asked on.

Rule: it needs nothing but the tables in shared memory; an agent that is away changes nothing.

Theory. At its start it maps RUN_DIR/shm (waiting for the agent's very first run), reserves the
UMEM, starts the workers, opens the ports of the table and serves RUN_DIR/forwarder.sock. A
successor does what takes long (kernels, memory, programs) while its predecessor still works. The
agent's `sync` makes it follow the port table at once; without an agent it looks once a second, the
same turn in which it beats the heart of the steering map and sets dead devices aside.
"""

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np

from dataplane.control.config import Config
from dataplane.control.jsonl import serve
from dataplane.daemon.lock import hold
from dataplane.daemon.log import get_logger
from dataplane.engine import flowtable, warm
from dataplane.engine.conntrack import WARN_PERCENT, Conntrack
from dataplane.engine.copies import CopyReader
from dataplane.engine.frontends import SteeredFrontends
from dataplane.engine.losses import Losses
from dataplane.engine.names import Names
from dataplane.engine.ports import Ports
from dataplane.engine.steer import FILE, Steering
from dataplane.engine.taps import Taps
from dataplane.engine.worker import Worker, make_tables
from dataplane.tables.connection_view import NUMBERS, Select
from dataplane.tables.shm import Shm
from xdp import artifacts
from xdp.abi import CONST, DTYPE
from xdp.handover import Handover, Turn
from xdp.object import BpfObject, ObjectSpec
from xdp.umem import Umem

TURN_S = 1.0  # heartbeat and device check
COMPILE_S = 300.0
FRAMES = 16384  # where the agent has not said
STALL_S = 5.0  # a worker silent for longer is reported as hanging, and the heart stops

log = get_logger("forwarder")


class Ground:
    """What a forwarder stands on: memory for packets, and programs that the kernel has checked.

    It takes half a second, and a predecessor may work meanwhile.
    """

    def __init__(self, shm: Shm, kept: Mapping[str, int]) -> None:
        """kept: what that predecessor leaves. Raises XdpError."""
        node = shm.node[0]
        slots = int(node["flow_slots"])
        self.umem = Umem(int(node["frame_count"]) or FRAMES)
        self.taken = flowtable.taken(kept, slots)
        spec = ObjectSpec.load(artifacts.find("penstock.bpf.o"))
        self.bpf = BpfObject(spec, flowtable.sizes(slots), self.taken)
        self._maps = flowtable.identities(kept)
        self._node = (slots, int(node["frame_count"]))

    def holds(self, shm: Shm, kept: Mapping[str, int]) -> bool:
        """Return whether it is still the ground for these tables, and for what is left now."""
        node = shm.node[0]
        asked = (int(node["flow_slots"]), int(node["frame_count"]))
        return self._node == asked and self._maps == flowtable.identities(kept)


class Forwarder:
    """Workers, sockets and programs over the tables of one node."""

    def __init__(
        self,
        shm: Shm,
        run_dir: Path,
        state_dir: Path,
        handover: Handover,
        ground: Ground,
        nice: int = 0,
    ) -> None:
        """Start the workers on their ground. Raises XdpError.

        handover: what a predecessor has left, and where to leave it; nice: of the workers.
        """
        node = shm.node[0]
        count = max(1, int(node["workers"]))
        slots = int(node["flow_slots"])
        self.shm, self.handover = shm, handover
        self.umem, self.bpf, taken = ground.umem, ground.bpf, ground.taken
        row = self.bpf.maps["steering"].mmap(DTYPE["steering"])
        self.steering = Steering(row, run_dir / "shm" / FILE, int(node["watchdog_ms"]))
        shm.worker_stats[:] = 0
        self.table = flowtable.FlowTable(shm, self.bpf, row)
        if taken:
            self.table.take_up(Conntrack.size(shm))
        else:
            self.table.start(slots > 0)
        shm.control["steering_map"] = self.bpf.maps["steering"].id
        for name in flowtable.MAPS:
            handover.keep(name, self.bpf.maps[name].fd)
        nat_ports = self.bpf.maps["nat_ports"].mmap(np.dtype("<u8")).view("<u4")
        self.conntrack = Conntrack(shm, nat_ports, count, self.table.flows)
        bases = np.arange(self.umem.frame_count, dtype=np.int64) * CONST["FRAME_STRIDE"]
        self.workers = [
            Worker(
                number,
                shm,
                self.umem.address,
                part,
                int(node["spin_us"]),
                tracker,
                self.table.flows,
                nice,
            )
            for number, (part, tracker) in enumerate(
                zip(np.array_split(bases, count), self.conntrack.trackers, strict=True)
            )
        ]
        self.reader = CopyReader(shm, make_tables(shm), self.table)
        self.names = Names(shm, make_tables(shm), self.conntrack.trackers, state_dir)
        for worker in self.workers:
            worker.start()
        for worker in self.workers:  # the first answer of a cold start comes after compiling
            worker.call(lambda: None, COMPILE_S)
        self.reader.start()
        self.ports = Ports(shm.ports, self.umem, self.bpf, self.workers, self.table, handover)
        self.frontends = SteeredFrontends(self.bpf.maps["frontends"], row, shm)
        self.taps = Taps(shm, self.workers, self.table)
        self.losses = Losses(shm, self.workers, self.table.drops)
        self.generation = -1
        self._full = False
        self._told: set[str] = set()  # limits of names that were warned of
        self.started = time.time()

    def sync(self) -> list[dict[str, Any]]:
        """Follow the port table and the steering file; return the ports."""
        generation = int(self.shm.control[0]["ports_generation"])
        self.steering.sync()
        self.frontends.sync()
        self.ports.sync()
        self.generation = generation
        return self.ports.view()

    def turn(self) -> None:
        """Once a second: heartbeat, dead devices, changes without a call, ports that failed."""
        if self._alive():
            self.steering.beat()
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        self.table.collect(self.workers[0].tables, now)
        self.losses.collect()
        self._sweep()
        self.taps.turn()
        self._sweep_names()
        for name in self.ports.check():
            log.warning("device gone", device=name)
        self.frontends.sync()
        changed = int(self.shm.control[0]["ports_generation"]) != self.generation
        if changed or any(port["error"] for port in self.ports.view()):
            self.sync()

    def _sweep(self) -> None:
        """Forget connections whose time is over; warn once when the table fills up."""
        if not self.conntrack.sweep():
            return
        full = self.conntrack.pressure_percent >= WARN_PERCENT
        if full and not self._full:
            log.warning("the table of connections fills up", **self.conntrack.view())
        self._full = full

    def _sweep_names(self) -> None:
        """Forget addresses and queries of DNS whose time is over; warn of what became full."""
        for text in self.names.sweep():
            if text.partition("(")[0] not in self._told:
                self._told.add(text.partition("(")[0])
                log.warning("names", problem=text)

    def _alive(self) -> bool:
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        oldest = min(int(w.counters.stats[0]["heartbeat_ns"]) for w in self.workers)
        return oldest == 0 or now - oldest < STALL_S * 1e9

    def status(self) -> dict[str, Any]:
        """Return what `penstock status` shows of this process."""
        return {
            "pid": os.getpid(),
            "started": self.started,
            "workers": len(self.workers),
            "frames": self.umem.frame_count,
            "huge_pages": self.umem.huge,
            "ports": self.ports.view(),
            "conntrack": self.conntrack.view(),
            "flow_table": self.table.view(),
            "names": self.names.view(),
            "generation": self.generation,
            "steering_error": self.steering.error or self.frontends.error,
            "frontends": len(self.frontends),
            "captures": len(self.taps),
        }

    def close(self, keep_pods: bool) -> None:
        """Let go of the devices. With keep_pods their programs stay, and forward what is in the
        flow table; the uplinks' too, if a supervisor keeps them for the next forwarder."""
        if not self.handover.kept_by_another:
            self.steering.clear()
        self.ports.close(keep_pods)
        for worker in self.workers:
            worker.stop()
        self.reader.stop()
        self.names.save()
        self.bpf.close()


async def _serve(forwarder: Forwarder, config: Config) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    turn = asyncio.Lock()

    async def answer(op: str, args: dict[str, Any]) -> dict[str, Any]:
        async with turn:
            if op == "sync":
                return {"ports": await asyncio.to_thread(forwarder.sync)}
            if op == "ports":
                return {"ports": forwarder.ports.view()}
            if op == "status":
                return forwarder.status()
            if op == "flush":
                return {"forgotten": forwarder.conntrack.flush(_select(args))}
            if op == "tap":
                return forwarder.taps.open(args)
            if op == "untap":
                forwarder.taps.close(int(args["tap"]), int(args["serial"]))
                return {}
        raise ValueError(
            f"unknown operation {op!r}: the forwarder knows sync, ports, status, flush, tap, untap"
        )

    server = await serve(config.run_dir / "forwarder.sock", answer)
    log.info("forwarding", workers=len(forwarder.workers), frames=forwarder.umem.frame_count)
    while not stop.is_set():
        async with turn:
            forwarder.turn()
        try:
            await asyncio.wait_for(stop.wait(), TURN_S)
        except TimeoutError:
            continue
    server.close()


def _select(args: dict[str, Any]) -> Select:
    """What `penstock ct flush` asks for. Raises ValueError."""
    protocol = str(args.get("protocol") or "")
    number = NUMBERS.get(protocol, int(protocol) if protocol else None)
    address = ip_address(args["address"]) if args.get("address") else None
    return Select(address, args.get("port"), number)


async def _wait_for_tables(run_dir: Path) -> Shm:
    """Map the tables once the agent has published them for the first time."""
    while True:
        try:
            shm = Shm.open(run_dir, writable=True)
        except FileNotFoundError:
            shm = None
        if shm is not None and int(shm.control[0]["generation"]) > 0:
            return shm
        await asyncio.sleep(0.05)


def main(config: Config) -> int:
    """Run until SIGTERM; return the exit status. A successor waits for its predecessor's end."""
    handover, turn = Handover(), Turn()
    shm = asyncio.run(_wait_for_tables(config.run_dir))
    ground = None
    if turn.waits:
        warm.load()
        ground = Ground(shm, handover.kept)
        try:
            turn.wait(handover)
        except EOFError as error:
            log.info("not needed", why=str(error))
            return 0
    with hold(config.run_dir / "forwarder.lock"):
        if ground is None or not ground.holds(shm, handover.kept):
            ground = Ground(shm, handover.kept)
        nice = config.forwarder.nice
        forwarder = Forwarder(shm, config.run_dir, config.state_dir, handover, ground, nice)
        try:
            forwarder.sync()
            asyncio.run(_serve(forwarder, config))
        finally:
            forwarder.close(keep_pods=True)
    return 0
