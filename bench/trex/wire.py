"""Messages: JSON-RPC 2.0, alone or several at a time, compressed or not.

Rule: whatever arrives is answered; a message that cannot be read is an error of JSON-RPC's.

Theory. TRex's framing of a compressed message is eight bytes, a magic number and the length of the
text, before zlib's stream. A client that compresses can read compressed answers.
"""

import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

MAGIC = 0xABE85CEA
HEADER = struct.Struct(">II")
MOST = 1 << 26
PARSE, INVALID, UNKNOWN, REFUSED = -32700, -32600, -32601, -32000

Handler = Callable[[str, dict[str, Any]], Any]


class RpcError(Exception):
    """A call that is refused; the message is for the user."""

    def __init__(self, message: str, code: int = REFUSED) -> None:
        """code: of JSON-RPC."""
        super().__init__(message)
        self.code = code


def unpack(data: bytes) -> tuple[Any, bool]:
    """Return (what was said, whether it was compressed). Raises RpcError."""
    packed = len(data) >= HEADER.size and HEADER.unpack_from(data)[0] == MAGIC
    try:
        if packed:
            size = HEADER.unpack_from(data)[1]
            if size > MOST:
                raise RpcError(f"{size} bytes: at most {MOST}", PARSE)
            data = zlib.decompressobj().decompress(data[HEADER.size :], size)
        return json.loads(data), packed
    except (ValueError, zlib.error) as error:
        raise RpcError(f"not JSON: {error}", PARSE) from error


def pack(value: Any, compressed: bool) -> bytes:
    """Return an answer's bytes."""
    text = json.dumps(value).encode()
    return HEADER.pack(MAGIC, len(text)) + zlib.compress(text, 1) if compressed else text


def answer(data: bytes, handle: Handler) -> bytes:
    """Carry out what a message says; return the answer."""
    packed = False
    try:
        said, packed = unpack(data)
    except RpcError as error:
        return pack(_error(None, error), packed)
    if isinstance(said, list):
        return pack([_one(one, handle) for one in said], packed)
    return pack(_one(said, handle), packed)


def _one(said: Any, handle: Handler) -> dict[str, Any]:
    number = said.get("id") if isinstance(said, dict) else None
    try:
        if not isinstance(said, dict) or not isinstance(said.get("method"), str):
            raise RpcError("a request has a method", INVALID)
        given = said.get("params", {})
        if not isinstance(given, dict):
            raise RpcError("params: must be an object", INVALID)
        return {"jsonrpc": "2.0", "id": number, "result": handle(said["method"], given)}
    except RpcError as error:
        return _error(number, error)


def _error(number: Any, error: RpcError) -> dict[str, Any]:
    text = str(error)
    return {
        "jsonrpc": "2.0",
        "id": number,
        "error": {"code": error.code, "message": text, "specific_err": text},
    }
