"""The way in from an uplink, slowly: twin of kernels/admit.py and kernels/decap.py.

Rule: a frame in, the inner frame out, or Refused with the reason's name.

Theory. The outer headers are read by tests/naive/headers.py, the shims from RFC 7348 and RFC 8926;
the ECN field follows the table of RFC 6040 4.2, written out. Inner checksums are summed anew.
"""

import struct
from collections.abc import Callable

from tests.naive.headers import Refused, ones_sum, parse

NOT, ECT1, ECT0, CE = 0, 1, 2, 3
# RFC 6040 figure 4: (inner, outer) -> inner that goes on. Absent: dropped.
ECN = {
    (NOT, NOT): NOT, (NOT, ECT0): NOT, (NOT, ECT1): NOT,
    (ECT0, NOT): ECT0, (ECT0, ECT0): ECT0, (ECT0, ECT1): ECT1, (ECT0, CE): CE,
    (ECT1, NOT): ECT1, (ECT1, ECT0): ECT1, (ECT1, ECT1): ECT1, (ECT1, CE): CE,
    (CE, NOT): CE, (CE, ECT0): CE, (CE, ECT1): CE, (CE, CE): CE,
}  # fmt: skip


def vxlan(payload: bytes, vni: int) -> bytes:
    """Return the inner frame of a VXLAN payload."""
    if not payload[0] & 0x08:
        raise Refused("INVALID_TUNNEL")
    if int.from_bytes(payload[4:7], "big") != vni:
        raise Refused("WRONG_VNI")
    return payload[8:]


def geneve(payload: bytes, vni: int) -> bytes:
    """Return the inner frame of a Geneve payload."""
    size = 8 + (payload[0] & 0x3F) * 4
    control, critical = payload[1] & 0x80, payload[1] & 0x40
    if payload[0] >> 6 or size > len(payload) or payload[2:4] != b"\x65\x58" or control:
        raise Refused("INVALID_TUNNEL")
    if critical:
        raise Refused("CRITICAL_OPTION")
    if int.from_bytes(payload[4:7], "big") != vni:
        raise Refused("WRONG_VNI")
    at = 8
    while at < size:
        if payload[at + 2] & 0x80:
            raise Refused("CRITICAL_OPTION")
        at += 4 + (payload[at + 3] & 0x1F) * 4
    if at != size:
        raise Refused("INVALID_TUNNEL")
    return payload[size:]


def from_uplink(
    frame: bytes, port: int, vni: int, shim: Callable, remotes: Callable, ours: Callable
) -> tuple[bytes, dict]:
    """Return (frame that goes on, its headers): a tunnel packet's inner one. Raises Refused.

    shim: `vxlan` or `geneve`; remotes: inner source address -> the node it must come from, or None;
    ours: whether an address is one of this node's, of its pods', or behind the tunnel.
    """
    outer = parse(frame)
    if outer["kind"] == "arp":
        raise Refused("UNKNOWN_SENDER")
    if outer["protocol"] != 17 or outer["ports"][1] != port:
        if ours(outer["kind"], outer["source"]):
            raise Refused("INVALID_SOURCE_IP")
        _no_multicast(outer)
        return frame, outer | {"outside": True}
    end = 14 + outer["ip_length"]
    segment = frame[outer["l4"] : end]
    size = struct.unpack(">H", segment[4:6])[0]
    if outer["fragment"] or size != len(segment) or size < 16:
        raise Refused("INVALID_TUNNEL")
    inner = shim(segment[8:], vni)
    found = parse(inner)
    if found["kind"] == "arp":
        raise Refused("UNSUPPORTED_L3")
    mark = ECN.get((found["tos"] & 3, outer["tos"] & 3))
    if mark is None:
        raise Refused("INVALID_TUNNEL")
    if remotes(found["kind"], found["source"]) != outer["source"]:
        raise Refused("INVALID_SOURCE_IP")
    _no_multicast(found)
    found["tos"] = found["tos"] & 0xFC | mark
    return _marked(inner, found), found | {"outside": False}


def _no_multicast(found: dict) -> None:
    four = found["kind"] == 4
    if found["target"] >> 28 >= 14 if four else found["target"] >> 120 == 255:
        raise Refused("MULTICAST")


def _marked(frame: bytes, found: dict) -> bytes:
    """The frame with the TOS or traffic class that was found, and a right IPv4 checksum."""
    packet = bytearray(frame)
    if found["kind"] == 4:
        packet[15] = found["tos"]
        packet[24:26] = bytes(2)
        header = bytes(packet[14 : found["l4"]])
        packet[24:26] = struct.pack(">H", ~ones_sum(header) & 0xFFFF)
    else:
        packet[14] = packet[14] & 0xF0 | found["tos"] >> 4
        packet[15] = packet[15] & 0x0F | (found["tos"] & 15) << 4
    return bytes(packet)
