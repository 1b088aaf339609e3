"""`penstock run`: starts agent, forwarder, observer and DNS proxy, and starts them again.

Rule: the processes never depend on this one; killed together with it, they are taken up by the next
run.

Theory. A child that dies is restarted after a pause that grows from 0.1 s to 10 s; one that ran for
a while starts afresh. Exit status 78 (EX_CONFIG) is not restarted: the message stands, the
supervisor ends with it. The forwarder's heartbeat is in shared memory: a forwarder that is silent
for too long hangs and is killed (the uplink has passed to the kernel meanwhile: steering.py). Only
beats of the process that runs now count: one that still compiles its kernels has not hung. SIGHUP
starts the children anew, one after the other: an upgrade in place. What a forwarder leaves to the
next one is kept here (xdp/handover.py), so established flows do not notice; all else waits for a
quarter of a second, since the next one is prepared before the old one ends. One that cannot start
leaves the old one at work. With forwarder.standby the next one is always prepared, so that a death
costs no more than an upgrade. Children get SIGKILL when the supervisor dies (PR_SET_PDEATHSIG), so
no forwarder runs without its supervisor.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path

import structlog

from dataplane.control.config import Config
from dataplane.control.jsonl import RemoteError, Unreachable, acall
from dataplane.daemon.lock import hold
from dataplane.daemon.notify import EX_CONFIG, notify
from dataplane.tables.shm import Shm
from xdp.handover import Gate, Store

PAUSES_S = (0.1, 0.2, 0.5, 1, 2, 5, 10)
STEADY_S = 10.0  # a child that lived so long has not failed at its start
STOP_S = 8.0
LOOK_S = 1.0
HANG_S = 6.0  # least silence that means hanging: a worker says something each second

log = structlog.get_logger(subsys="run")
PR_SET_PDEATHSIG = 1
RENEWED_S = 60.0  # a child that does not answer by then does not hold up the others
PREPARED_S = 600.0  # the next one may compile its kernels first
SOCKETS = {"agent": "api.sock", "forwarder": "forwarder.sock"}


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


Prepared = tuple[asyncio.subprocess.Process, Gate]


class Child:
    """One process that is kept alive."""

    def __init__(
        self,
        name: str,
        config: Path | None,
        store: Store | None = None,
        serves: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """name: the subcommand, such as `agent`; store: what it leaves to the next.

        serves: returns when it does its work, from when on a next one stands by; none: none does.
        """
        self._store = store
        self._serves = serves
        self._ready: Prepared | None = None
        self.name = name
        self._command = [sys.executable, "-m", "dataplane.cli.main", name]
        if config is not None:
            self._command += ["--config", str(config)]
        self.process: asyncio.subprocess.Process | None = None
        self._next: asyncio.subprocess.Process | None = None
        self.started = 0.0
        self.status = 0

    async def keep(self, stop: asyncio.Event) -> None:
        """Run until stop is set, or the child says that a restart does not help."""
        failures = 0
        while not stop.is_set():
            self.started = time.monotonic()
            self.process, self._next = self._next or await self._spawn(), None
            if stop.is_set():  # it came between the question and the start
                await self.end()
            standby = asyncio.create_task(self._stand_by())
            self.status = await self.process.wait()
            standby.cancel()
            if stop.is_set():
                self._dismiss()
                return
            if self._next is None:
                self._take_over()
            else:
                self._dismiss()  # who stands by is of the program before the upgrade
            if self._next is not None:
                continue
            if self.status == EX_CONFIG:
                log.error("not restarted: the configuration must change", process=self.name)
                stop.set()
                return
            steady = time.monotonic() - self.started > STEADY_S
            failures = 0 if steady else failures + 1
            pause = PAUSES_S[min(failures, len(PAUSES_S) - 1)]
            log.warning("restarting", process=self.name, status=self.status, pause_s=pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)

    async def _spawn(self, gate: Gate | None = None) -> asyncio.subprocess.Process:
        more, fds = self._store.inheritance() if self._store else ({}, [])
        if gate is not None:
            waits, channel = gate.inheritance()
            more, fds = more | waits, fds + channel
        return await asyncio.create_subprocess_exec(
            *self._command, preexec_fn=_die_with_parent, env=os.environ | more, pass_fds=fds
        )

    async def _prepare(self) -> "Prepared | None":
        """Start a next process beside this one; None: it does not get so far."""
        gate = Gate()
        successor = await self._spawn(gate)
        try:
            if await asyncio.wait_for(gate.prepared(), PREPARED_S):
                return successor, gate
        except TimeoutError:
            await _end(successor, self.name)
        except asyncio.CancelledError:
            gate.close()
            raise
        gate.close()
        return None

    async def _stand_by(self) -> None:
        """Have a next process prepared once this one does its work."""
        if self._serves is not None and self._ready is None:
            await self._serves()
            self._ready = await self._prepare()
            if self._ready is not None:
                log.info("one stands by", process=self.name)

    def _take_over(self) -> None:
        """After a death that nobody has asked for, let who stands by begin."""
        if self._ready is not None and self._store is not None:
            log.warning("the standby takes over", process=self.name, status=self.status)
            (self._next, gate), self._ready = self._ready, None
            gate.open(self._store)
            gate.close()

    def _dismiss(self) -> None:
        """End who stands by: it waits for a turn that does not come."""
        if self._ready is not None:
            self._ready[1].close()
            self._ready = None

    async def renew(self) -> None:
        """Put the next process in the place of this one, prepared beside it where it leaves much.

        One that does not get so far leaves this one at work.
        """
        if self._store is None:
            await self.end()
            return
        fresh = await self._prepare()
        if fresh is None:
            log.error("the next one does not start: this one goes on", process=self.name)
            return
        self._next, gate = fresh
        await self.end()
        gate.open(self._store)
        gate.close()

    async def end(self) -> None:
        """SIGTERM, and SIGKILL when that is not enough."""
        if self.process is not None:
            await _end(self.process, self.name)


async def _end(process: asyncio.subprocess.Process, name: str) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_S)
    except TimeoutError:
        log.warning("killing", process=name)
        process.kill()
        await process.wait()


def silent_for(shm: Shm, since: float) -> float:
    """Return the seconds since the most silent worker's heartbeat; 0: no worker has beaten yet.

    since: start of the process, CLOCK_MONOTONIC seconds; older beats are another's.
    """
    workers = int(shm.node[0]["workers"])
    beats = [int(beat) / 1e9 for beat in shm.worker_stats["heartbeat_ns"][:workers]]
    mine = [beat for beat in beats if beat > since]
    return time.monotonic() - min(mine) if mine else 0.0


async def _watch(config: Config, forwarder: Child, stop: asyncio.Event) -> None:
    hang_s = max(HANG_S, 2 * config.forwarder.watchdog_ms / 1000)
    shm: Shm | None = None
    ready = False
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), LOOK_S)
        notify("WATCHDOG=1")
        ready = ready or await _announce(config)
        if shm is None:
            with contextlib.suppress(OSError):
                shm = Shm.open(config.run_dir)
            continue
        process = forwarder.process
        if process is None or process.returncode is not None:
            continue
        silence = silent_for(shm, forwarder.started)
        if silence > hang_s:
            log.error("the forwarder hangs: killing it", silent_s=round(silence, 1))
            process.kill()


async def _announce(config: Config) -> bool:
    """Say READY once the agent answers; what it still waits for is its status' business."""
    try:
        state = await acall(config.run_dir / "api.sock", "status", LOOK_S)
    except (Unreachable, RemoteError):
        return False
    waits = "" if state["ready"] else f": {'; '.join(state['errors'])}"
    notify("READY=1", f"STATUS={'ready for pods' if state['ready'] else 'waiting'}{waits}")
    return True


async def _upgrade(config: Config, asked: asyncio.Event, children: Iterable[Child]) -> None:
    """At each SIGHUP start every child anew, of the program as it is installed now.

    One after the other, each when its predecessor in the row answers: what one does not do
    meanwhile, the others' work does not need.
    """
    while True:
        await asked.wait()
        asked.clear()
        for child in children:
            log.info("starting anew", process=child.name)
            await child.renew()
            if child.name in SOCKETS:
                with contextlib.suppress(TimeoutError):
                    answers = _answers(config.run_dir / SOCKETS[child.name])
                    await asyncio.wait_for(answers, RENEWED_S)


async def _answers(path: Path) -> None:
    """Return when a child says that it is ready; the agent has written its tables by then."""
    while True:
        with contextlib.suppress(Unreachable, RemoteError):
            if (await acall(path, "status", LOOK_S)).get("ready", True):
                return
        await asyncio.sleep(PAUSES_S[0])


async def _run(config: Config, path: Path | None) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    store = Store()
    store.listen()
    serves = partial(_answers, config.run_dir / SOCKETS["forwarder"])
    standby = serves if config.forwarder.standby else None
    agent, forwarder = Child("agent", path), Child("forwarder", path, store, standby)
    others = [Child("observer", path)] if config.observe.enabled else []
    others += [Child("dnsproxy", path)] if config.dns.tcp else []
    children = (agent, forwarder, *others)
    keepers = [asyncio.create_task(child.keep(stop)) for child in children]
    watcher = asyncio.create_task(_watch(config, forwarder, stop))
    upgrade = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, upgrade.set)
    upgrader = asyncio.create_task(_upgrade(config, upgrade, children))
    await stop.wait()
    upgrader.cancel()
    notify("STOPPING=1")
    await asyncio.gather(agent.end(), *(child.end() for child in others))
    await forwarder.end()
    await asyncio.gather(*keepers, watcher)
    return EX_CONFIG if EX_CONFIG in [child.status for child in children] else 0


def main(config: Config, path: Path | None) -> int:
    """Run until SIGTERM; return the exit status. path: the configuration's file."""
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    os.environ["PENSTOCK_RUN_DIR"] = str(config.run_dir)  # --run-dir reaches the children
    with hold(config.run_dir / "run.lock"):
        return asyncio.run(_run(config, path))
