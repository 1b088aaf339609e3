"""pcapng, as far as a capture needs it.

Rule: what is written is a whole block at a time, so that a reader that is behind never sees half.

Theory. The IETF's draft-ietf-opsawg-pcapng: a section header, one interface description a device,
an enhanced packet block a packet, with its comment and whether it came in or left, and at the end
interface statistics with what was lost. Times are in nanoseconds. Wireshark, tshark and tcpdump
read it; interfaces may be described later, when a device appears during a capture.
"""

import struct
from typing import BinaryIO

SECTION, INTERFACE, STATISTICS, PACKET = 0x0A0D0D0A, 1, 5, 6
MAGIC = 0x1A2B3C4D
ETHERNET = 1
COMMENT = 1
USER_APPLICATION = 4
IF_NAME, IF_DESCRIPTION, IF_RESOLUTION = 2, 3, 9
PACKET_FLAGS = 2
DROPPED, RECEIVED = 5, 4  # of the statistics
INBOUND, OUTBOUND = 1, 2
NANOSECONDS = 9
TEXT_MOST = 65000  # bytes: an option's length has 16 bits


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def _text(code: int, text: str) -> bytes:
    return _option(code, text.encode()[:TEXT_MOST]) if text else b""


def _block(kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    size = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + size + body + size


def _ended(options: bytes) -> bytes:
    return options + bytes(4) if options else b""


class Writer:
    """Writes one section to a binary file."""

    def __init__(self, file: BinaryIO, application: str, snap: int) -> None:
        """Write the section's header. snap: bytes of a packet at most."""
        self._file, self._snap = file, snap
        self._interfaces: dict[str, int] = {}
        body = struct.pack("<IHHq", MAGIC, 1, 0, -1)
        self._put(SECTION, body + _ended(_text(USER_APPLICATION, application)))
        self._counts: list[int] = []

    def interface(self, name: str, description: str) -> int:
        """Return the number of a device, described when it is new."""
        number = self._interfaces.get(name)
        if number is None:
            number = self._interfaces[name] = len(self._interfaces)
            options = _text(IF_NAME, name) + _text(IF_DESCRIPTION, description)
            options += _option(IF_RESOLUTION, bytes([NANOSECONDS]))
            body = struct.pack("<HHI", ETHERNET, 0, self._snap)
            self._put(INTERFACE, body + _ended(options))
            self._counts.append(0)
        return number

    def packet(
        self, interface: int, time_ns: int, data: bytes, length: int, inbound: bool, comment: str
    ) -> None:
        """Write a packet. time_ns: since 1970; length: on the wire."""
        high, low = time_ns >> 32, time_ns & 0xFFFFFFFF
        body = struct.pack("<IIIII", interface, high, low, len(data), length)
        body += data + bytes(-len(data) % 4)
        way = struct.pack("<I", INBOUND if inbound else OUTBOUND)
        body += _ended(_text(COMMENT, comment) + _option(PACKET_FLAGS, way))
        self._counts[interface] += 1
        self._put(PACKET, body)

    def end(self, time_ns: int, lost: int) -> None:
        """Write statistics: packets by interface, and what was lost (with the first interface)."""
        for number, count in enumerate(self._counts):
            body = struct.pack("<III", number, time_ns >> 32, time_ns & 0xFFFFFFFF)
            options = _option(RECEIVED, struct.pack("<Q", count + (0 if number else lost)))
            options += _option(DROPPED, struct.pack("<Q", 0 if number else lost))
            self._put(STATISTICS, body + _ended(options))
        self._file.flush()

    def flush(self) -> None:
        """Hand what is written to the reader."""
        self._file.flush()

    def _put(self, kind: int, body: bytes) -> None:
        self._file.write(_block(kind, body))
