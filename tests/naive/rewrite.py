"""New addresses and ports for a packet, slowly: twin of kernels/translate.py.

Rule: every checksum is computed from nothing; only where a packet is not all there (fragments,
quoted packets) it moves by the difference, modulo 0xFFFF.

Theory. RFC 1071 sums; RFC 768 (no checksum stays none, a zero is sent as ones); RFC 4443 2.3 and
RFC 9260 appendix A (CRC32c). `packet` is an IP packet without Ethernet; `at` is where its transport
header starts.
"""

import struct

from tests.naive.headers import ones_sum

TCP, UDP, SCTP, ICMP, ICMP6 = 6, 17, 132, 1, 58
CHECKSUM = {TCP: 16, UDP: 6, ICMP: 2, ICMP6: 2}
QUERIES = {ICMP: (8, 13, 15, 17, 0, 14, 16, 18), ICMP6: (128, 129)}


def crc32c(data: bytes) -> int:
    """CRC32c, bit by bit."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def packed(kind: int, address: int) -> bytes:
    """An address as it stands in a packet."""
    return address.to_bytes(4 if kind == 4 else 16, "big")


def pseudo(packet: bytes, protocol: int, size: int) -> bytes:
    """What TCP, UDP and ICMPv6 sum beside themselves (RFC 793, RFC 8200 8.1)."""
    ends = packet[12:20] if packet[0] >> 4 == 4 else packet[8:40]
    return ends + struct.pack(">IHH", size, 0, protocol)


def completed(packet: bytes, at: int, protocol: int) -> bytes:
    """The packet with right checksums; a UDP checksum that is zero stays so."""
    fresh = bytearray(packet)
    if fresh[0] >> 4 == 4:
        header = (fresh[0] & 15) * 4
        fresh[10:12] = bytes(2)
        fresh[10:12] = struct.pack(">H", ~ones_sum(bytes(fresh[:header])) & 0xFFFF)
    segment = fresh[at:]
    if protocol == SCTP:
        segment[8:12] = bytes(4)
        fresh[at + 8 : at + 12] = struct.pack("<I", crc32c(bytes(segment)))
    elif protocol in CHECKSUM:
        place = CHECKSUM[protocol]
        if protocol == UDP and segment[place : place + 2] == bytes(2):
            return bytes(fresh)
        segment[place : place + 2] = bytes(2)
        beside = b"" if protocol == ICMP else pseudo(packet, protocol, len(segment))
        check = ~ones_sum(beside + bytes(segment)) & 0xFFFF
        if protocol == UDP and check == 0:
            check = 0xFFFF
        fresh[at + place : at + place + 2] = struct.pack(">H", check)
    return bytes(fresh)


def is_right(packet: bytes, at: int, protocol: int) -> bool:
    """Whether a whole packet's checksums are right."""
    return completed(packet, at, protocol) == packet


def renamed(packet: bytes, at: int, protocol: int, ends: tuple[int, int, int, int]) -> bytes:
    """The packet with other (source, target, source port, target port); checksums as they were.

    Of an ICMP query the port that is not 0 is the identifier.
    """
    source, target, source_port, target_port = ends
    kind, fresh = packet[0] >> 4, bytearray(packet)
    where = (12, 20) if kind == 4 else (8, 40)
    fresh[where[0] : where[1]] = packed(kind, source) + packed(kind, target)
    if len(packet) >= at + 8:
        if protocol in (TCP, UDP, SCTP):
            fresh[at : at + 4] = struct.pack(">HH", source_port, target_port)
        elif protocol in QUERIES and packet[at] in QUERIES[protocol]:
            fresh[at + 4 : at + 6] = struct.pack(">H", source_port or target_port)
    return bytes(fresh)


def rewritten(
    packet: bytes, at: int, protocol: int, ends: tuple[int, int, int, int], whole: bool = True
) -> bytes:
    """The packet as it leaves. whole: its transport is all there, else it is part of one."""
    fresh = renamed(packet, at, protocol, ends)
    return completed(fresh, at, protocol) if whole else moved(packet, fresh, at, protocol)


def moved(before: bytes, after: bytes, at: int, protocol: int) -> bytes:
    """A part of a packet whose transport checksum follows what changed of it (RFC 1624)."""
    fresh = bytearray(completed(after, len(after), 0))  # the IP header only
    place = CHECKSUM.get(protocol, 0)
    if not place or len(before) < at + place + 2:
        return bytes(fresh)
    old = struct.unpack(">H", before[at + place : at + place + 2])[0]
    if protocol == UDP and old == 0:
        return bytes(fresh)
    change = ones_sum(_covered(after, at, protocol)) - ones_sum(_covered(before, at, protocol))
    total = ((~old & 0xFFFF) + change) % 0xFFFF or 0xFFFF  # a sum is 0 only of nothing
    check = ~total & 0xFFFF
    if protocol == UDP and check == 0:
        check = 0xFFFF
    fresh[at + place : at + place + 2] = struct.pack(">H", check)
    return bytes(fresh)


def _covered(packet: bytes, at: int, protocol: int) -> bytes:
    """What a translation may change of the bytes that a transport checksum covers."""
    ends = packet[12:20] if packet[0] >> 4 == 4 else packet[8:40]
    if protocol == ICMP:
        return packet[at + 4 : at + 6]
    return ends + (packet[at + 4 : at + 6] if protocol == ICMP6 else packet[at : at + 4])
