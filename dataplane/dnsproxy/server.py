"""DNS over TCP between pods and their servers (RFC 7766).

Rule: every message of both sides is judged before it goes on; what cannot be judged ends the
connection.

Theory. A pod's connection is accepted at its server's address; the proxy then opens one of its own
from the pod's address to that server, so each side sees the other. Queries may be pipelined and
are answered in any order (RFC 7766 6.2.1); a refusal is answered at once, from here. A connection
lives while something moves, IDLE_S at most without (6.2.3). Limits hold for all pods and for each:
beyond them a connection is ended at once, and counted, so one pod cannot take the others' places.
"""

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Awaitable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Protocol

import structlog

IDLE_S = 10.0
CONNECT_S = 5.0
CONNECTIONS_MOST, OF_A_POD = 4096, 256
PORT = 53
IPV6_TRANSPARENT = 75

log = structlog.get_logger(subsys="dnsproxy")
Address = IPv4Address | IPv6Address


class Judging(Protocol):
    """Who judges messages."""

    def connection(self, pod: Address, pod_port: int, server: Address, port: int) -> int:
        """Return the record of a connection, -1: there is none."""

    def query(self, record: int, message: bytes) -> bytes | None:
        """Return None: it may go on; else what to answer, empty: end the connection."""

    def answer(self, record: int, message: bytes) -> bool:
        """Return whether it may pass."""


def transparent(family: int) -> socket.socket:
    """Return a TCP socket that may have any address."""
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    else:
        made.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
    return made


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """Return the next message, two bytes of length before it. Raises IncompleteReadError."""
    size = int.from_bytes(await reader.readexactly(2), "big")
    return await reader.readexactly(size)


def write_message(writer: asyncio.StreamWriter, message: bytes) -> None:
    """Write a message with its length."""
    writer.write(len(message).to_bytes(2, "big") + message)


class Server:
    """The listening proxy."""

    def __init__(self, judge: Judging) -> None:
        """judge: who decides."""
        self._judge = judge
        self._pods: Counter[Address] = Counter()
        self._servers: list[asyncio.Server] = []
        self.counts: Counter[str] = Counter()  # connections, crowded, stray, unreachable

    async def start(self) -> None:
        """Listen at every address of both families."""
        for family, anywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            listening = transparent(family)
            listening.bind((anywhere, PORT))
            listening.listen(1024)
            self._servers.append(await asyncio.start_server(self._accept, sock=listening))

    async def stop(self) -> None:
        """Listen no more."""
        for server in self._servers:
            server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (pod, pod_port), (server, port) = (
            (ip_address(name[0]), name[1])
            for name in (writer.get_extra_info("peername"), writer.get_extra_info("sockname"))
        )
        self.counts["connections"] += 1
        if self._pods.total() >= CONNECTIONS_MOST or self._pods[pod] >= OF_A_POD:
            self.counts["crowded"] += 1
            writer.transport.abort()
            return
        self._pods[pod] += 1
        try:
            record = self._judge.connection(pod, pod_port, server, port)
            if record < 0:
                self.counts["stray"] += 1
                writer.transport.abort()
                return
            await self._serve(record, pod, server, port, reader, writer)
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            pass  # one side has gone, or is silent: so goes the other
        finally:
            self._pods[pod] -= 1
            if not self._pods[pod]:
                del self._pods[pod]
            writer.close()

    async def _serve(
        self,
        record: int,
        pod: Address,
        server: Address,
        port: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Carry messages until a side ends. The server is called when a query may go to it."""
        upstream: asyncio.StreamWriter | None = None
        answers: asyncio.Task[None] | None = None
        try:
            while True:
                message = await _while(read_message(reader), answers)
                said = self._judge.query(record, message)
                if said == b"":
                    return
                if said is not None:
                    write_message(writer, said)
                    await writer.drain()
                    continue
                if upstream is None:
                    back, upstream = await self._connect(pod, server, port)
                    answers = asyncio.create_task(self._answers(record, back, writer))
                write_message(upstream, message)
                await upstream.drain()
        finally:
            if answers is not None:
                answers.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await answers
            if upstream is not None:
                upstream.close()

    async def _connect(
        self, pod: Address, server: Address, port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection from a pod's address to its server. Raises OSError, TimeoutError."""
        family = socket.AF_INET if pod.version == 4 else socket.AF_INET6
        made = transparent(family)
        try:
            made.bind((str(pod), 0))
            async with asyncio.timeout(CONNECT_S):
                loop = asyncio.get_running_loop()
                await loop.sock_connect(made, (str(server), port))
                return await asyncio.open_connection(sock=made)
        except BaseException:
            self.counts["unreachable"] += 1
            made.close()
            raise

    async def _answers(
        self, record: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Carry the server's answers to the pod, those that fit a query."""
        while True:
            message = await read_message(reader)
            if self._judge.answer(record, message):
                write_message(writer, message)
                await writer.drain()


async def _while(reading: Awaitable[bytes], other: "asyncio.Task[None] | None") -> bytes:
    """Wait for a message for IDLE_S, or until another task ends. Raises what ended it."""
    task = asyncio.ensure_future(reading)
    waiting = {task} if other is None else {task, other}
    done, _ = await asyncio.wait(
        waiting, timeout=IDLE_S, return_when=asyncio.FIRST_COMPLETED
    )  # fmt: skip
    if task in done:
        return task.result()
    task.cancel()
    if other is not None and other in done:
        other.result()
    raise TimeoutError
