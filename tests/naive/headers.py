"""Headers, slowly: a plain-Python twin of kernels/parse.py.

Rule: bytes in, a dict or a reason out; no numpy, no cleverness.

Theory. Written from the RFCs, read field by field with struct; hypothesis compares it with the
kernel on valid, mutated and random frames.
"""

import struct
from ipaddress import IPv4Address, IPv6Address, IPv6Network

EXTENSIONS = {0, 43, 60, 135}
INSIDE = [IPv6Network("::/128"), IPv6Network("::1/128"), IPv6Network("::ffff:0:0/96")]


class Refused(Exception):
    """The frame is dropped; the argument is the reason's name."""


def ones_sum(data: bytes) -> int:
    """Folded one's complement sum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def parse(frame: bytes) -> dict:
    """Return what the columns should hold. Raises Refused."""
    if len(frame) < 14:
        raise Refused("INVALID_PACKET")
    ether_type = struct.unpack(">H", frame[12:14])[0]
    body = frame[14:]
    if ether_type == 0x0800:
        return parse4(body)
    if ether_type == 0x86DD:
        return parse6(body)
    if ether_type == 0x0806:
        if len(body) < 28 or body[:6] != bytes.fromhex("000108000604"):
            raise Refused("INVALID_PACKET")
        return {"kind": "arp"}
    if ether_type in (0x8100, 0x88A8):
        raise Refused("VLAN")
    raise Refused("UNSUPPORTED_L2" if ether_type < 1536 else "UNSUPPORTED_L3")


def parse4(packet: bytes) -> dict:
    """An IPv4 packet, with padding behind it allowed."""
    if len(packet) < 20:
        raise Refused("INVALID_PACKET")
    header = (packet[0] & 15) * 4
    total, identification, word = struct.unpack(">HHH", packet[2:8])
    if packet[0] >> 4 != 4 or header < 20 or total < header or total > len(packet):
        raise Refused("INVALID_PACKET")
    if ones_sum(packet[:header]) != 0xFFFF:
        raise Refused("L3_CHECKSUM")
    source, target = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
    if int(source) >> 28 >= 14 or int(source) >> 24 in (0, 127):
        raise Refused("INVALID_SOURCE_IP")
    if int(target) >> 24 in (0, 127):
        raise Refused("UNKNOWN_TARGET")
    offset = (word & 0x1FFF) * 8
    fragment = bool(word & 0x3FFF)
    protocol = packet[9]
    if fragment and (offset + total - header > 65535 or (offset == 8 and protocol == 6)):
        raise Refused("INVALID_PACKET")
    found = {
        "kind": 4,
        "source": int(source),
        "target": int(target),
        "protocol": protocol,
        "ttl": packet[8],
        "tos": packet[1],
        "ip_length": total,
        "l4": 14 + header,
        "fragment": fragment,
        "later": offset > 0,
        "identification": identification if fragment else None,
        "ports": (0, 0),
    }
    if not offset:
        found["ports"] = ports(packet[header:total], protocol, fragment)
    return found


def parse6(packet: bytes) -> dict:
    """An IPv6 packet with its extension headers."""
    if len(packet) < 40:
        raise Refused("INVALID_PACKET")
    word, payload, protocol, hops = struct.unpack(">IHBB", packet[:8])
    if word >> 28 != 6 or 40 + payload > len(packet):
        raise Refused("INVALID_PACKET")
    source, target = IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
    if source.is_multicast or (int(source) and any(source in net for net in INSIDE)):
        raise Refused("INVALID_SOURCE_IP")
    if target.is_link_local or any(target in net for net in INSIDE):
        raise Refused("UNKNOWN_TARGET")
    found = {
        "kind": 6,
        "source": int(source),
        "target": int(target),
        "ttl": hops,
        "tos": word >> 20 & 0xFF,
        "ip_length": 40 + payload,
        "fragment": False,
        "later": False,
        "identification": None,
        "ports": (0, 0),
    }
    at, protocol = extensions(packet[: 40 + payload], protocol, found)
    found["protocol"], found["l4"] = protocol, 14 + at
    if not found["later"]:
        found["ports"] = ports(packet[at : 40 + payload], protocol, found["fragment"])
    return found


def extensions(packet: bytes, protocol: int, found: dict) -> tuple[int, int]:
    """Walk the chain; return (offset of the transport, its protocol)."""
    at = 40
    for _ in range(9):
        if protocol not in EXTENSIONS and protocol not in (44, 51):
            return at, protocol
        if at + 8 > len(packet) or (protocol == 43 and packet[at + 2] == 0):
            break
        size = (packet[at + 1] + 1) * 8
        if protocol == 51:
            size = (packet[at + 1] + 2) * 4
        if protocol == 44:
            size = 8
            word, identification = struct.unpack(">HI", packet[at + 2 : at + 8])
            if word & 0xFFF9:
                found["fragment"], found["identification"] = True, identification
            if word & 0xFFF8:
                found["later"] = True
                return at + 8, packet[at]
        if at + size > len(packet):
            break
        protocol = packet[at]
        at += size
    raise Refused("INVALID_EXTENSION")


def is_error(found: dict, packet: bytes) -> bool:
    """Whether a packet (from its IP header on) is an ICMP or ICMPv6 error (RFC 1122, RFC 4443)."""
    if found["later"] or found["protocol"] not in (1, 58):
        return False
    kind = packet[found["l4"] - 14]
    if found["protocol"] == 1:
        return kind in (3, 4, 5, 11, 12)
    return kind < 128 or kind == 137


def ports(segment: bytes, protocol: int, fragment: bool) -> tuple[int, int]:
    """Ports, or the echo identifier; lengths of the transport header are checked."""
    if protocol == 6:
        if len(segment) < 20 or not 20 <= (segment[12] >> 4) * 4 <= len(segment):
            raise Refused("INVALID_PACKET")
    elif protocol == 17:
        size = struct.unpack(">H", segment[4:6])[0] if len(segment) >= 8 else 0
        if size < 8 or (size > len(segment) and not fragment):
            raise Refused("INVALID_PACKET")
    elif protocol == 132:
        if len(segment) < 16:
            raise Refused("INVALID_PACKET")
    elif protocol in (1, 58):
        if len(segment) < 8:
            raise Refused("INVALID_PACKET")
        queries, replies = ((8, 13, 15, 17), (0, 14, 16, 18)) if protocol == 1 else ((128,), (129,))
        identifier = struct.unpack(">H", segment[4:6])[0]
        return (
            identifier if segment[0] in queries else 0,
            identifier if segment[0] in replies else 0,
        )
    else:
        return (0, 0)
    return struct.unpack(">HH", segment[:4])
