"""The loop that makes the node what it should be.

Rule: every turn computes the whole desired state and applies the difference; nothing is
remembered that the kernel or the tables do not hold.

Theory. A turn is triggered by objects, endpoints, or the kernel's own messages (a raw netlink
socket that is only a doorbell; messages lost to a full buffer ring it too), gathered for
DEBOUNCE_S. A turn repeats until the plan has no kernel actions, since a new device is only seen
in the next snapshot. An error is kept for `status` and retried with backoff. All of netlink runs
on one thread.
"""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog

from dataplane.control.config import Config
from dataplane.control.desired import NotReady, desired
from dataplane.control.kernel.netlink import Kernel, KernelRefused
from dataplane.control.model import Actual, Desired, EndpointView, Tables
from dataplane.control.objects import ManifestError, Objects
from dataplane.control.plan import Action, plan
from dataplane.tables.errors import TableError
from dataplane.tables.writer import TableWriter

DEBOUNCE_S = 0.02
RETRY_S = (0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.5, 0.5, 0.5, 1, 2, 5)  # a forwarder starts in 2 s
QUIET_S = 20.0  # a turn at least so often: stale neighbours are asked again
TURNS_MOST = 4
GROUPS = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP: link, neigh, ip4/6 address and route

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
    ) -> None:
        """forwarder_sync: makes the forwarder follow the ports; raises when it does not answer."""
        self._config, self._objects, self._endpoints = config, objects, endpoints
        self._writer, self._sync = writer, forwarder_sync
        self._thread = ThreadPoolExecutor(1, "netlink")
        self._kernel: Kernel | None = None
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()
        self._stands: Tables | None = None
        self._synced = -1
        self._failures = 0
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
        """Return what `penstock status` shows."""
        view = dict(self.desired.view) if self.desired else {}
        return {**view, **self._state}

    async def plan_only(self) -> list[Action]:
        """Return what a turn would do now, without doing it."""
        async with self._turn:
            wanted, actual = await self._look()
            return plan(wanted, actual, self._stands)

    async def settled(self, number: int, timeout: float) -> None:
        """Wait until the port of an endpoint stands and the forwarder follows. TimeoutError."""
        self.trigger(f"endpoint {number}")
        async with asyncio.timeout(timeout):
            turn = self.turns
            while not self._stands_for(number):
                turn = await self.turned(turn)

    async def turned(self, since: int) -> int:
        """Wait until more than `since` turns are over; return their number."""
        while self.turns == since:
            await self._turned.wait()
        return self.turns

    def _stands_for(self, number: int) -> bool:
        ports = self._stands.ports if self._stands else {}
        there = any(port.endpoint == number for port in ports.values())
        generation = int(self._writer.shm.control[0]["ports_generation"])
        return there and self._synced == generation

    # --- the loop -----------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Turn until stop is set."""
        loop = asyncio.get_running_loop()
        doorbell = _doorbell()
        loop.add_reader(doorbell, self._ring, doorbell)
        stopping = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                self._wake.clear()
                await self.once()
                wait = QUIET_S
                if not self._state["ready"]:
                    wait = RETRY_S[min(self._failures, len(RETRY_S) - 1)]
                waking = asyncio.create_task(self._wake.wait())
                await asyncio.wait(
                    {waking, stopping}, timeout=wait, return_when=asyncio.FIRST_COMPLETED
                )
                waking.cancel()
                await asyncio.sleep(DEBOUNCE_S)
        finally:
            loop.remove_reader(doorbell)
            doorbell.close()
            stopping.cancel()
            self.close()

    def close(self) -> None:
        """Close netlink."""
        if self._kernel is not None:
            self._thread.submit(self._kernel.close).result()
            self._kernel = None
        self._thread.shutdown()

    def _ring(self, doorbell: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while doorbell.recv(65536):
                pass
        self._wake.set()

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _look(self) -> tuple[Desired, Actual]:
        if self._kernel is None:
            self._kernel = await self._in_thread(Kernel)
        actual = await self._in_thread(self._kernel.snapshot)
        current = self._writer.ports()
        return desired(self._config, self._objects(), self._endpoints(), actual, current), actual

    async def once(self) -> list[Action]:
        """One turn; errors are kept in status, never raised. Return the actions done."""
        async with self._turn:
            done: list[Action] = []
            try:
                problems = await self._apply(done)
                self._failures = 0
                self._state = {"ready": True, "error": "", "problems": problems}
            except (NotReady, ManifestError, KernelRefused, TableError, OSError) as error:
                self._failed(str(error))
            except Exception as error:  # whatever it is, the agent stays and says so
                log.exception("turn failed")
                self._failed(f"{type(error).__name__}: {error}")
            for action in done:
                log.info("done", action=str(action))
            self.turns += 1
            self._turned.set()
            self._turned = asyncio.Event()
            return done

    def _failed(self, message: str) -> None:
        if message != self._state["error"]:
            log.warning("not ready", error=message)
        self._failures += 1
        self._state = {"ready": False, "error": message, "problems": []}

    async def _apply(self, done: list[Action]) -> list[str]:
        for _ in range(TURNS_MOST):
            wanted, actual = await self._look()
            actions = plan(wanted, actual, self._stands)
            kernel = [action for action in actions if action.method]
            for action in kernel:
                await self._in_thread(getattr(self._kernel, action.method), *action.arguments)
                done.append(action)
            if not kernel:
                break
        self.desired = wanted
        if actions:
            self._write(wanted.tables)
            done.extend(actions)
        await self._follow()
        assert self._kernel is not None
        for device, address in wanted.provoke:
            await self._in_thread(self._kernel.provoke, device, address)
        return list(wanted.problems)

    def _write(self, tables: Tables) -> None:
        """Bring the tables to what they should be; ports before the routes that use them."""
        writer = self._writer
        writer.set_node(**tables.node)
        for index, port in tables.ports.items():
            writer.set_port(index, port)
        writer.replace_routes(tables.routes)
        for index in writer.ports().keys() - tables.ports.keys():
            writer.clear_port(index)
        _steer(writer.shm.folder / "steering.json", tables)
        writer.publish()
        self._stands = tables

    async def _follow(self) -> None:
        generation = int(self._writer.shm.control[0]["ports_generation"])
        if generation != self._synced:
            await self._sync()
            self._synced = generation

    def forget_sync(self) -> None:
        """The forwarder was restarted: ask it again."""
        self._synced = -1
        self.trigger("forwarder")


def _steer(path: Path, tables: Tables) -> None:
    text = json.dumps(
        {
            "tunnel_port": tables.tunnel_port,
            "locals": [str(address) for address in tables.locals],
            "prefixes": [str(cidr) for cidr in tables.prefixes],
        }
    )
    with contextlib.suppress(FileNotFoundError):
        if path.read_text() == text:
            return
    fresh = path.with_name(f".steering.{os.getpid()}.{time.monotonic_ns()}")
    fresh.write_text(text)
    fresh.rename(path)


def _doorbell() -> socket.socket:
    """A netlink socket that becomes readable when links, addresses, routes, neighbours change."""
    doorbell = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    doorbell.bind((0, GROUPS))
    doorbell.setblocking(False)
    return doorbell
