"""Packets for tests of connections: any transport, right checksums, both families.

Rule: built with struct and tests/naive/rewrite.py, not scapy: a sequence of packets takes
microseconds; tests with scapy as the judge take these apart again.

Theory. An `Ends` is the four numbers of a tuple as the sender writes them; for ICMP the identifier
stands in both ports' place.
"""

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from tests.naive.rewrite import completed

Address = IPv4Address | IPv6Address
TCP, UDP, SCTP, ICMP, ICMP6, GRE = 6, 17, 132, 1, 58, 47
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
INIT, INIT_ACK, ABORT, SHUTDOWN, SHUTDOWN_ACK = 1, 2, 6, 7, 8
COOKIE_ECHO, COOKIE_ACK, SHUTDOWN_COMPLETE, DATA = 10, 11, 14, 0
ETHER = {4: b"\x08\x00", 6: b"\x86\xdd"}


class Ends(NamedTuple):
    """Who sends to whom."""

    source: Address
    source_port: int
    target: Address
    target_port: int

    def back(self) -> "Ends":
        """The other way round."""
        return Ends(self.target, self.target_port, self.source, self.source_port)


def ends(source: Address | str, source_port: int, target: Address | str, target_port: int) -> Ends:
    """Make Ends of addresses or texts."""
    return Ends(ip_address(source), source_port, ip_address(target), target_port)


def packet(e: Ends, protocol: int, segment: bytes, *, ttl: int = 64, sums: bool = True) -> bytes:
    """An IP packet around a transport segment; sums: with right checksums in the transport."""
    if e.source.version == 4:
        size = 20 + len(segment)
        head = struct.pack(">BBHHHBBH", 0x45, 0, size, 0, 0x4000, ttl, protocol, 0)
        whole = head + e.source.packed + e.target.packed + segment
        return completed(whole, 20, protocol if sums else 0)
    head = struct.pack(">IHBB", 6 << 28, len(segment), protocol, ttl)
    whole = head + e.source.packed + e.target.packed + segment
    return completed(whole, 40, protocol) if sums else whole


def ethernet(inside: bytes) -> bytes:
    """A frame around an IP packet; who it is for does not matter."""
    return bytes(12) + ETHER[inside[0] >> 4] + inside


def tcp(e: Ends, flags: int = SYN, data: bytes = b"", sequence: int = 7, seen: int = 9) -> bytes:
    """A frame with a TCP segment. sequence, seen: its sequence and acknowledgement numbers."""
    ports = struct.pack(">HHII", e.source_port, e.target_port, sequence, seen)
    return ethernet(packet(e, TCP, ports + struct.pack(">BBHHH", 0x50, flags, 999, 0, 0) + data))


def udp(e: Ends, data: bytes = b"data", check: bool = True) -> bytes:
    """A frame with a UDP datagram; check: with a checksum."""
    segment = struct.pack(">HHHH", e.source_port, e.target_port, 8 + len(data), int(check)) + data
    return ethernet(packet(e, UDP, segment))


def sctp(e: Ends, chunk: int = INIT, data: bytes = b"data") -> bytes:
    """A frame with an SCTP packet whose first chunk has this type."""
    head = struct.pack(">HHII", e.source_port, e.target_port, 1, 0)
    return ethernet(packet(e, SCTP, head + struct.pack(">BBH", chunk, 0, 4 + len(data)) + data))


def echo(e: Ends, reply: bool = False, data: bytes = b"ping") -> bytes:
    """A frame with an echo request, or a reply, whose identifier is the target's port."""
    protocol, kinds = (ICMP, (8, 0)) if e.source.version == 4 else (ICMP6, (128, 129))
    identifier = e.target_port if reply else e.source_port
    return ethernet(
        packet(e, protocol, struct.pack(">BBHHH", kinds[reply], 0, 0, identifier, 1) + data)
    )


def gre(e: Ends, data: bytes = b"inside") -> bytes:
    """A frame of a protocol without ports."""
    return ethernet(packet(e, GRE, b"\0\0\x08\0" + data))


def error(e: Ends, kind: int, code: int, quoted: bytes, rest: int = 0) -> bytes:
    """A frame with an ICMP or ICMPv6 error; quoted: an IP packet, or its beginning."""
    protocol = ICMP if e.source.version == 4 else ICMP6
    return ethernet(packet(e, protocol, struct.pack(">BBHI", kind, code, 0, rest) + quoted))


def vxlan(inside: bytes, source: Address, target: Address, vni: int, port: int = 8472) -> bytes:
    """A frame with a VXLAN packet around a frame."""
    body = struct.pack(">II", 0x08 << 24, vni << 8) + inside
    segment = struct.pack(">HHHH", 50000, port, 8 + len(body), 0) + body
    return ethernet(packet(Ends(source, 50000, target, port), UDP, segment))
