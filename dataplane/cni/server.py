"""The unix socket where the shim asks.

Rule: every request gets exactly one answer; nothing that a request holds can end the server.

Theory. A connection carries one request to its end of stream and one framed answer (protocol.py).
Requests of one container wait for each other, those of different containers do not; GC waits for
all and holds all back. A client that goes away does not stop its operation: the runtime owes a DEL,
which waits its turn. The socket is root's alone, as it changes the node's network.
"""

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog

from dataplane.cni.backend import Backend
from dataplane.cni.errors import CniError, Code
from dataplane.cni.protocol import (
    REQUEST_MAX,
    VERSIONS,
    Request,
    error_body,
    frame,
    parse,
    version_of,
)
from ipam.errors import IpamError

RECEIVE_S = 30.0
REPLAY_S = 5.0  # a shim may write its DEL just after the agent looked

log = structlog.get_logger("cni")


class CniServer:
    """Serves a Backend on a unix socket, and replays remembered DELs."""

    def __init__(self, path: Path, backend: Backend) -> None:
        """Serve nothing yet; see start()."""
        self.path = Path(path)
        self.backend = backend
        self._locks = _Locks()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task] = set()

    async def start(self) -> None:
        """Recover, replay, listen. Raises OSError when the socket cannot be made."""
        for name, reason in self.backend.endpoints.broken.items():
            log.error("a pod's record cannot be read; delete the pod", name=name, error=reason)
        for name in await self.backend.recover():
            log.warning("removed what an interrupted operation left", name=name)
        await self._replay_once()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._connected, self.path)
        finally:
            os.umask(mask)
        self._track(asyncio.create_task(self._replay()))

    async def stop(self) -> None:
        """Stop listening; operations in progress are undone or finished."""
        if self._server is not None:
            self._server.close()
            self.path.unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def answer(self, data: bytes) -> bytes:
        """The framed answer to a framed request; never raises but CancelledError."""
        try:
            request = parse(data)
        except CniError as error:
            return frame(1, error_body(version_of(data), error))
        try:
            if request.command == "VERSION":
                supported = list(VERSIONS)
                return frame(0, {"cniVersion": request.version, "supportedVersions": supported})
            async with self._locks.of(request):
                body = await self.backend.handle(request)
        except CniError as error:
            failure = error
        except Exception as error:
            log.exception("operation failed", command=request.command, key=request.key)
            message = f"{request.command} failed: {type(error).__name__}: {error}"
            failure = CniError(Code.INTERNAL, message)
        else:
            log.info("done", command=request.command, key=request.key)
            return frame(0, body)
        log.warning("refused", command=request.command, key=request.key, error=str(failure))
        return frame(1, error_body(request.version, failure))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._track(task)
        # The runtime may be gone, or the shim past its deadline: there is nobody to tell.
        with suppress(ConnectionError, TimeoutError):
            try:
                async with asyncio.timeout(RECEIVE_S):
                    data = await _receive(reader)
                writer.write(await self.answer(data))
                await writer.drain()
            finally:
                writer.close()

    async def _replay(self) -> None:
        while True:
            await asyncio.sleep(REPLAY_S)
            await self._replay_once()

    async def _replay_once(self) -> None:
        try:
            async with self._locks.alone():
                count = await self.backend.replay()
        except (CniError, IpamError, OSError) as error:
            log.warning("a remembered DEL failed and is kept", error=str(error))
        else:
            if count:
                log.info("did remembered DELs", count=count)
            for name, reason in self.backend.take_unreadable().items():
                log.warning("threw a remembered DEL away", name=name, error=reason)

    def _track(self, task: asyncio.Task) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _receive(reader: asyncio.StreamReader) -> bytes:
    data = bytearray()
    while len(data) <= REQUEST_MAX and (part := await reader.read(65536)):
        data += part
    return bytes(data)  # parse() refuses what is cut off here


class _Locks:
    """One operation at a time for each container; one alone for GC and replay."""

    def __init__(self) -> None:
        self._gate = asyncio.Lock()  # held while one waits to be alone, and while it is
        self._idle = asyncio.Event()
        self._idle.set()
        self._running = 0
        self._by_container: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._waiting: dict[str, int] = defaultdict(int)

    @asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[None]:
        """Hold what the request needs."""
        if request.command == "GC":
            async with self.alone():
                yield
            return
        async with self._gate:
            self._running += 1
            self._idle.clear()
        container = request.container_id
        self._waiting[container] += 1
        try:
            async with self._by_container[container]:
                yield
        finally:
            self._waiting[container] -= 1
            if not self._waiting[container]:
                del self._waiting[container], self._by_container[container]
            self._running -= 1
            if not self._running:
                self._idle.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Wait for all that runs, and hold back what comes."""
        async with self._gate:
            await self._idle.wait()
            yield
