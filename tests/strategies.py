"""Frames for hypothesis: valid ones of every kind, and what goes wrong with them.

Rule: built with struct, not scapy: a thousand examples must not take a minute.

Theory. A valid frame has right checksums and lengths, addresses of the small world (own, other pod,
node, far, outside, unknown) and any transport. Mutation flips bytes, truncates, pads, and lies in
length fields, without repairing checksums unless asked.
"""

import struct
from ipaddress import ip_address

from hypothesis import strategies as st

from tests import worlds as w
from tests.naive.headers import ones_sum

OTHER4 = [
    "10.1.1.99",
    "10.1.2.9",
    "198.51.100.7",
    "203.0.113.1",
    "10.99.0.1",
    "224.0.0.251",
    "255.255.255.255",
    "127.0.0.1",
    "0.0.0.0",
]
OTHER6 = ["fd00:1:1::99", "fd00:1:2::9", "2001:db8:f::1", "fd99::1", "ff02::1", "fe80::9", "::1"]
FORGED6 = ["fe80::1", "::", "::1", "::ffff:10.1.1.2", "ff02::1"]
SOURCES4 = [w.POD4[w.POD_A], w.POD4[w.POD_B], ip_address("127.0.0.1"), ip_address("0.0.0.0")]
SOURCES6 = [w.POD6[w.POD_A], w.POD6[w.POD_B], *map(ip_address, FORGED6)]
TARGETS4 = [w.POD4[w.POD_B], w.ROUTER4, w.NODE4, *map(ip_address, OTHER4)]
TARGETS6 = [w.POD6[w.POD_B], w.ROUTER6, w.NODE6, *map(ip_address, OTHER6)]
PORTS = st.sampled_from([0, 53, 80, 8472, 65535]) | st.integers(0, 65535)
mostly_own4 = st.sampled_from([SOURCES4[0]] * 5 + SOURCES4)
mostly_own6 = st.sampled_from([SOURCES6[0]] * 6 + SOURCES6)


@st.composite
def transports(draw) -> tuple[int, bytes]:
    """(protocol, segment)."""
    protocol = draw(st.sampled_from([6, 17, 17, 132, 1, 58, 47, 253]))
    data = draw(st.binary(max_size=40)) * draw(st.sampled_from([1, 1, 1, 40]))
    source, target = draw(PORTS), draw(PORTS)
    if protocol == 6:
        words = draw(st.sampled_from([5, 5, 5, 4, 8, 15]))
        return 6, struct.pack(">HHIIBBHHH", source, target, 1, 2, words << 4, 2, 9, 0, 0) + data
    if protocol == 17:
        lie = draw(st.sampled_from([0, 0, 0, 0, 1, -9, 500]))
        return 17, struct.pack(">HHHH", source, target, max(0, 8 + len(data) + lie), 0) + data
    if protocol == 132:
        return 132, struct.pack(">HHII", source, target, 3, 4)[: draw(st.integers(8, 12))] + data
    if protocol in (1, 58):
        kind = draw(st.sampled_from([0, 3, 8, 11, 128, 129, 1, 2]))
        return protocol, struct.pack(">BBHHH", kind, 0, 0, source, 1) + data
    return protocol, data


@st.composite
def frames4(draw) -> bytes:
    """An Ethernet frame with IPv4."""
    protocol, segment = draw(transports())
    words = draw(st.sampled_from([5, 5, 5, 5, 6, 15]))
    flags = draw(st.sampled_from([0, 0, 0x4000, 0x4000, 0x2000, 0x2005, 5, 1, 0x1FFF]))
    ttl = draw(st.sampled_from([64, 64, 64, 2, 1, 0]))
    total = words * 4 + len(segment) + draw(st.sampled_from([0] * 8 + [1, -1, -20, 1000]))
    header = bytearray(
        struct.pack(
            ">BBHHHBBH",
            0x40 | words,
            draw(st.integers(0, 255)),
            max(0, min(total, 65535)),
            7,
            flags,
            ttl,
            protocol,
            0,
        )
        + draw(mostly_own4).packed
        + draw(st.sampled_from(TARGETS4)).packed
        + bytes(words * 4 - 20)
    )
    header[10:12] = struct.pack(">H", ~ones_sum(bytes(header)) & 0xFFFF)
    return bytes(12) + b"\x08\x00" + bytes(header) + segment


@st.composite
def frames6(draw) -> bytes:
    """An Ethernet frame with IPv6 and some extension headers."""
    protocol, body = draw(transports())
    longest = draw(st.sampled_from([0, 0, 2, 10]))
    for kind in draw(st.lists(st.sampled_from([0, 43, 44, 51, 60]), max_size=longest)):
        if kind == 44:
            word = draw(st.sampled_from([0, 1, 0xFFF8, 0x20]))
            extension = struct.pack(">BBHI", protocol, 0, word, 9)
        elif kind == 51:
            extension = struct.pack(">BBHI", protocol, draw(st.sampled_from([0, 4])), 0, 9)
            extension += bytes((extension[1] + 2) * 4 - 8)
        else:
            size = draw(st.sampled_from([0, 0, 1, 30]))
            extension = struct.pack(">BBBB", protocol, size, draw(st.integers(0, 4)), 0)
            extension += bytes(draw(st.sampled_from([0, 0, -1])) + (size + 1) * 8 - 4)
        protocol, body = kind, extension + body
    payload = max(0, len(body) + draw(st.sampled_from([0] * 8 + [1, -1, -9])))
    hops = draw(st.sampled_from([64, 64, 255, 1, 0]))
    header = struct.pack(
        ">IHBB", 6 << 28 | draw(st.integers(0, 255)) << 20, payload, protocol, hops
    )
    addresses = draw(mostly_own6).packed + draw(st.sampled_from(TARGETS6)).packed
    return bytes(12) + b"\x86\xdd" + header + addresses + body


@st.composite
def mutated(draw, base) -> bytes:
    """A frame of `base` with bytes changed, cut or added."""
    frame = bytearray(draw(base))
    for _ in range(draw(st.integers(0, 3))):
        frame[draw(st.integers(0, len(frame) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.sampled_from([None, None, None, 0, 1, 13, 20, 33, 34, 42, 60]))
    if cut is not None:
        del frame[cut:]
    return bytes(frame) + bytes(draw(st.sampled_from([0, 0, 0, 6, 46])))


valid = frames4() | frames6()
frames = valid | mutated(valid) | st.binary(max_size=120)
