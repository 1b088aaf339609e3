"""Questions and answers between our processes: one JSON object a line, over a unix socket.

Rule: a request is {"op": ..., "args": {...}}; an answer is {"result": ...} or {"error": {"code",
"message"}}; a client never hangs: each call has a time limit.

Theory. The sockets are local and owned by root (mode 0600); JSON lines can be typed by hand with
socat. One connection may carry many requests, answered in order.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

LINE_MOST = 64 << 20  # bytes: a table of every pod and route of a large node
Handler = Callable[[str, dict[str, Any]], Awaitable[Any]]


class RemoteError(Exception):
    """The other side answered with an error; `code` is its name."""

    def __init__(self, code: str, message: str) -> None:
        """code: class name of the error there."""
        self.code = code
        super().__init__(message)


class Unreachable(Exception):
    """Nobody listens, or no answer came in time."""


async def serve(path: Path, handler: Handler) -> asyncio.AbstractServer:
    """Listen on a unix socket; an older socket file is replaced."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ValueError):
            while line := await reader.readline():
                writer.write(json.dumps(await _answer(handler, line), default=str).encode() + b"\n")
                await writer.drain()
        writer.close()

    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    server = await asyncio.start_unix_server(connection, path, limit=LINE_MOST)
    os.chmod(path, 0o600)
    return server


async def _answer(handler: Handler, line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
        return {"result": await handler(request["op"], request.get("args") or {})}
    except (KeyError, TypeError, AttributeError) as error:
        return _error("BadRequest", f"not a request: {error!r}")
    except Exception as error:  # the client gets it; the server goes on
        return _error(type(error).__name__, str(error))


def _error(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


def _result(line: bytes, path: Path) -> Any:
    if not line:
        raise Unreachable(f"{path}: closed without an answer")
    answer = json.loads(line)
    if "error" in answer:
        raise RemoteError(answer["error"]["code"], answer["error"]["message"])
    return answer["result"]


def call(path: Path, op: str, timeout: float = 10.0, **args: Any) -> Any:
    """Ask and wait (for the command line). Raises Unreachable or RemoteError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            connection.sendall(json.dumps({"op": op, "args": args}).encode() + b"\n")
            with connection.makefile("rb") as stream:
                return _result(stream.readline(), path)
    except (OSError, TimeoutError) as error:
        raise Unreachable(f"{path}: {error}") from error


async def acall(path: Path, op: str, timeout: float = 10.0, **args: Any) -> Any:
    """Ask from a coroutine. Raises Unreachable or RemoteError."""
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_unix_connection(path, limit=LINE_MOST)
            try:
                writer.write(json.dumps({"op": op, "args": args}).encode() + b"\n")
                await writer.drain()
                return _result(await reader.readline(), path)
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise Unreachable(f"{path}: {error or 'no answer'}") from error
