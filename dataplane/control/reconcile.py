"""The loop that makes the node what it should be.

Rule: every turn computes the whole desired state and applies the difference; nothing is
remembered that the kernel or the tables do not hold.

Theory. A turn is triggered by objects, endpoints, or the kernel's own messages (kernel/events.py,
only a doorbell), gathered for DEBOUNCE_S. A turn repeats until the plan has no kernel actions,
since a new device is only seen in the next snapshot. What the kernel refuses is kept for `status`
and retried with backoff, and does not keep the rest from being done. Between turns only neighbours
that do not answer are asked again. All of netlink runs on one thread.
"""

import asyncio
import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog

from dataplane.control.config import Config
from dataplane.control.desired import desired
from dataplane.control.here import NotReady
from dataplane.control.kernel.events import Doorbell, Key
from dataplane.control.kernel.netlink import Kernel, KernelRefused
from dataplane.control.model import HOST, Actual, Desired, EndpointView, Tables
from dataplane.control.plan import Action, plan
from dataplane.objects.collect import Objects
from dataplane.objects.manifest import ManifestError
from dataplane.tables.errors import TableError
from dataplane.tables.writer import TableWriter

DEBOUNCE_S = 0.02
RETRY_S = (0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.5, 0.5, 0.5, 1, 2, 5)  # a forwarder starts in 2 s
QUIET_S = 20.0  # a turn at least so often: stale neighbours are asked again
NUDGE_S = 5.0  # neighbours that do not answer are asked again so often
TURNS_MOST = 4
HISTORY = 32  # actions that `status` remembers

log = structlog.get_logger(subsys="reconcile")


class Reconciler:
    """Keeps kernel and tables in line with configuration, objects and endpoints."""

    def __init__(
        self,
        config: Config,
        objects: Callable[[], Objects],
        endpoints: Callable[[], Sequence[EndpointView]],
        writer: TableWriter,
        forwarder_sync: Callable[[], Awaitable[None]],
        engines: Callable[[Objects, Desired], Awaitable[list[str]]],
    ) -> None:
        """Wire it.

        forwarder_sync: makes the forwarder follow the ports; raises when it does not answer.
        engines: brings policies and services in force and returns what is wrong with them.
        """
        self._config, self._objects, self._endpoints = config, objects, endpoints
        self._writer, self._sync, self._engines = writer, forwarder_sync, engines
        self._thread = ThreadPoolExecutor(1, "netlink")
        self._kernel: Kernel | None = None
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()
        self._stands: Tables | None = None
        self._synced = (-1, -1)
        self._failures = 0
        self._doorbell: Doorbell | None = None
        self._silent: frozenset[Key] = frozenset()  # neighbours that do not answer
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._state: dict[str, Any] = {"ready": False, "error": "starting", "problems": []}
        self.desired: Desired | None = None
        self.turns = 0
        self._turned = asyncio.Event()

    # --- what others call ---------------------------------------------------------------------

    def trigger(self, why: str) -> None:
        """Ask for a turn soon."""
        log.debug("trigger", why=why)
        self._wake.set()

    def status(self) -> dict[str, Any]:
        """Return what `penstock status` shows: the node's view, ready, error, problems, actions."""
        view = dict(self.desired.view) if self.desired else {}
        return {**view, **self._state, "actions": list(self._history)}

    def usage(self) -> dict[str, tuple[int, int]]:
        """Return (in use, limit) of ports and routes."""
        return self._writer.usage()

    async def plan_only(self) -> list[Action]:
        """Return what a turn would do now, without doing it."""
        async with self._turn:
            wanted, actual = await self._look()
            return plan(wanted, actual, self._stands)

    async def settled(self, number: int, timeout: float) -> None:
        """Wait until port and routes of an endpoint stand and the forwarder follows.

        Raises TimeoutError, which says why.
        """
        self.trigger(f"endpoint {number}")
        try:
            async with asyncio.timeout(timeout):
                turn = self.turns
                while not self._stands_for(number):
                    turn = await self.turned(turn)
        except TimeoutError:
            why = self._state["error"] or f"no device for it among {len(self._endpoints())} records"
            raise TimeoutError(
                f"endpoint {number} not in the tables in {timeout:g} s: {why}"
            ) from None

    async def turned(self, since: int) -> int:
        """Wait until more than `since` turns are over; return their number."""
        while self.turns == since:
            await self._turned.wait()
        return self.turns

    def _stands_for(self, number: int) -> bool:
        """Numbers are reused: the port must be that of the present endpoint."""
        ends = [end for end in self._endpoints() if end.number == number]
        ports = self._stands.ports.values() if self._stands else ()
        there = any(
            (port.endpoint, port.name, port.ifindex, port.address4, port.address6)
            == (number, end.host_ifname, end.ifindex, end.address4, end.address6)
            for end in ends
            for port in ports
        )
        control = self._writer.shm.control[0]
        generation = int(control["ports_generation"]), int(control["frontends_generation"])
        return there and self._synced == generation

    # --- the loop -----------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Turn until stop is set."""
        loop = asyncio.get_running_loop()
        doorbell = self._doorbell = Doorbell(self._wake.set)
        loop.add_reader(doorbell.fileno(), doorbell.read)
        stopping = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                self._wake.clear()
                await self.once()
                await self._rest(stopping)
        finally:
            loop.remove_reader(doorbell.fileno())
            doorbell.close()
            self._doorbell = None
            stopping.cancel()
            self.close()

    async def _rest(self, stopping: asyncio.Task) -> None:
        """Wait for a trigger, the next retry or the quiet turn."""
        clock = asyncio.get_running_loop().time
        retry = RETRY_S[min(self._failures, len(RETRY_S)) - 1]
        end = clock() + (retry if self._failures else QUIET_S)
        while not stopping.done() and (left := end - clock()) > 0:
            waking = asyncio.create_task(self._wake.wait())
            limit = min(left, NUDGE_S) if self._silent else left
            await asyncio.wait(
                {waking, stopping}, timeout=limit, return_when=asyncio.FIRST_COMPLETED
            )
            waking.cancel()
            if self._wake.is_set():
                await asyncio.sleep(DEBOUNCE_S)
                return
            await self._provoke(self._silent)

    def close(self) -> None:
        """Close netlink."""
        self._drop_kernel()
        self._thread.shutdown()

    def _drop_kernel(self) -> None:
        kernel, self._kernel = self._kernel, None
        if kernel is not None:
            self._thread.submit(kernel.close)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _look(self) -> tuple[Desired, Actual]:
        if self._kernel is None:
            self._kernel = await self._in_thread(Kernel)
        try:
            actual = await self._in_thread(self._kernel.snapshot)
        except Exception:
            self._drop_kernel()  # a socket in an unknown state: the next turn opens another
            raise
        if self._doorbell is not None:
            self._doorbell.known = actual.neighbours
        current = self._writer.ports()
        return desired(self._config, self._objects(), self._endpoints(), actual, current), actual

    async def once(self) -> list[Action]:
        """One turn; errors are kept in status, never raised. Return the actions done."""
        async with self._turn:
            done: list[Action] = []
            try:
                refused, problems = await self._apply(done)
                self._failures = self._failures + 1 if refused else 0
                problems = [*refused, *problems]
                self._state = {"ready": True, "error": "", "problems": problems}
            except (NotReady, ManifestError, KernelRefused, TableError, OSError) as error:
                self._failed(str(error))
            except Exception as error:  # whatever it is, the agent stays and says so
                log.exception("turn failed")
                self._failed(f"{type(error).__name__}: {error}")
            for action in done:
                log.info("done", action=str(action))
                self._history.append({"time": time.time(), "action": str(action)})
            self.turns += 1
            self._turned.set()
            self._turned = asyncio.Event()
            return done

    def _failed(self, message: str) -> None:
        if message != self._state["error"]:
            log.warning("not ready", error=message)
        self._failures += 1
        self._state = {"ready": False, "error": message, "problems": []}

    async def _apply(self, done: list[Action]) -> tuple[list[str], list[str]]:
        """Do what is to be done; return what the kernel refused, and the problems."""
        refused: dict[Action, str] = {}
        for _ in range(TURNS_MOST):
            wanted, actual = await self._look()
            actions = plan(wanted, actual, self._stands)
            fresh = [action for action in actions if action.method and action not in refused]
            for action in fresh:
                try:
                    await self._in_thread(getattr(self._kernel, action.method), *action.arguments)
                    done.append(action)
                except (KernelRefused, OSError) as error:
                    refused[action] = str(error)
            if not fresh:
                break
        if HOST not in actual.links:
            raise NotReady("; ".join(refused.values()) or f"{HOST} is not there")
        self.desired = wanted
        problems = await self._engines(self._objects(), wanted)  # policies before their pods' ports
        writes = [action for action in actions if not action.method]
        if writes:
            self._write(wanted.tables)
            done.extend(writes)
        neighbours = actual.neighbours
        self._silent = frozenset(
            key for key in wanted.provoke if key not in neighbours or not neighbours[key].usable
        )
        await self._provoke(wanted.provoke)
        await self._follow()
        return list(refused.values()), [*wanted.problems, *problems]

    async def _provoke(self, keys: frozenset[Key]) -> None:
        """Ask for neighbours. A refusal is no news: their device has just gone."""
        for device, address in keys:
            if self._kernel is not None:
                with contextlib.suppress(KernelRefused):
                    await self._in_thread(self._kernel.provoke, device, address)

    def _write(self, tables: Tables) -> None:
        """Bring the tables to what they should be; ports before the routes that use them."""
        writer = self._writer
        self._stands = None  # until all is written
        try:
            writer.set_node(**tables.node)
            for index, port in tables.ports.items():
                writer.set_port(index, port)
            writer.replace_routes(tables.routes)
            for index in writer.ports().keys() - tables.ports.keys():
                writer.clear_port(index)
            _steer(writer.shm.folder / "steering.json", tables)
        finally:
            writer.publish()  # what fits a full table is in use already
        self._stands = tables

    async def _follow(self) -> None:
        control = self._writer.shm.control[0]
        generation = int(control["ports_generation"]), int(control["frontends_generation"])
        if generation != self._synced:
            await self._sync()
            self._synced = generation


def _steer(path: Path, tables: Tables) -> None:
    text = json.dumps(
        {
            "tunnel_port": tables.tunnel_port,
            "locals": [str(address) for address in tables.locals],
            "prefixes": [str(cidr) for cidr in tables.prefixes],
            "nat": [str(address) for address in tables.nat],
        }
    )
    with contextlib.suppress(FileNotFoundError):
        if path.read_text() == text:
            return
    fresh = path.with_name(f".steering.{os.getpid()}.{time.monotonic_ns()}")
    fresh.write_text(text)
    fresh.rename(path)
