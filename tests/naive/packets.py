"""A packet as connections see it, read by tests/naive/headers.py.

Rule: whole packets only; fragments have tests of their own.

Theory. A Tuple has an identifier in the place of a port for ICMP queries; `mark` is the byte that
states and policies look at: TCP's flags, the type of an ICMP message or of the first SCTP chunk.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from tests.naive import headers

MARKS = {6: 13, 132: 12, 1: 0, 58: 0}
Address = IPv4Address | IPv6Address


class Tuple(NamedTuple):
    """Both ends of a connection, one way."""

    source: Address
    source_port: int
    target: Address
    target_port: int
    protocol: int

    @property
    def word(self) -> int:
        """All but the addresses."""
        ports = self.source_port << 48 | self.target_port << 32
        return ports | self.protocol << 8 | self.source.version

    def back(self) -> "Tuple":
        """The other way."""
        return Tuple(self.target, self.target_port, self.source, self.source_port, self.protocol)


@dataclass(frozen=True)
class Packet:
    """data: from the IP header on; at: where its transport starts; quoted: of an ICMP error."""

    port: int
    data: bytes
    found: dict
    outside: bool
    tuple: Tuple
    at: int
    mark: int
    error: bool = False
    quoted: Tuple | None = None

    @property
    def asks(self) -> bool:
        """Whether it is an echo request."""
        return self.mark == {1: 8, 58: 128}.get(self.tuple.protocol)


def address(version: int, number: int) -> Address:
    """An address of a family."""
    return IPv4Address(number) if version == 4 else IPv6Address(number)


def read(port: int, inside: bytes, outside: bool = False) -> Packet:
    """Take an IP packet apart."""
    parse = headers.parse4 if inside[0] >> 4 == 4 else headers.parse6
    found = parse(inside)
    at, error = found["l4"] - 14, headers.is_error(found, inside)
    mark = MARKS.get(found["protocol"])
    return Packet(
        port, inside, found, outside, _tuple(found), at,
        0 if mark is None else inside[at + mark],
        error, quoted(inside[at + 8 :]) if error else None,
    )  # fmt: skip


def _tuple(found: dict) -> Tuple:
    source, target = (address(found["kind"], found[name]) for name in ("source", "target"))
    return Tuple(source, found["ports"][0], target, found["ports"][1], found["protocol"])


def quoted(part: bytes) -> Tuple | None:
    """The tuple of the beginning of a packet; None when its ports are not there."""
    four = part[:1] and part[0] >> 4 == 4
    size = (part[0] & 15) * 4 if four else 40
    if len(part) < size + 8:
        return None
    protocol = part[9] if four else part[6]
    ends = (part[12:16], part[16:20]) if four else (part[8:24], part[24:40])
    source, target = (address(4 if four else 6, int.from_bytes(end, "big")) for end in ends)
    ports = (
        int.from_bytes(part[size : size + 2], "big"),
        int.from_bytes(part[size + 2 : size + 4], "big"),
    )
    if protocol in (1, 58):
        queries, replies = ((8,), (0,)) if protocol == 1 else ((128,), (129,))
        identifier = int.from_bytes(part[size + 4 : size + 6], "big")
        kind = part[size]
        ports = (identifier if kind in queries else 0, identifier if kind in replies else 0)
    elif protocol not in (6, 17, 132):
        ports = (0, 0)
    return Tuple(source, ports[0], target, ports[1], protocol)
