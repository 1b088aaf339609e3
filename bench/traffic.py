"""What is sent: sizes, flows and their order, as the generator's templates. Nothing here does I/O.

Rule: sizes count the frame check sequence, as RFC 2544 does: 64 is 60 bytes of memory.

Theory. A flow's number decides its ports: the lower 15 bits the source port, the others the target
port, so a million flows go from one pod to one address, as source validation wants it, and a policy
or a service names a range of ports. (Masqueraded, 13 bits: a NAT has fewer ports a destination.)
Uniform flows come in a permuted order; other orders, and numbers of flows that are no power of two,
are sequences of flow numbers. IMIX is the mix of the field: 7:4:1 of 64, 570 and 1518 bytes; over
IPv6 the least frame is 78 bytes (CSIT). IPv4 frames have no UDP checksum unless asked for; IPv6
ones must (RFC 8200 8.1), so the generator completes it.
"""

import struct
from dataclasses import dataclass
from ipaddress import ip_address

import numpy as np

from bench.lab import LabError
from bench.layout import LAYOUT, LIMITS

FCS = 4
SOURCE_PORT, SOURCE_BITS, NAT_BITS = 1024, 15, 13
TARGET_PORT = 9000
PORTS_MOST = 32  # target ports: a million flows
FLOWS_MOST = PORTS_MOST << SOURCE_BITS
LEAST = {4: 64, 6: 78}
IMIX = ((0, 7), (570, 4), (1518, 1))  # 0: the least
JUMBO = 9018
FRAME_MOST = LIMITS["FRAME_MAX"] + FCS
MARK = struct.pack(">HBB", LIMITS["MARK_BE"], 0, 0)
UDP = 17
HEADERS = {4: 14 + 20 + 8, 6: 14 + 40 + 8}


@dataclass(frozen=True)
class Path:
    """Between whom frames go. MACs "0a:.."; addresses of one family."""

    source_mac: str
    target_mac: str
    source: str
    target: str
    target_port: int = TARGET_PORT

    @property
    def family(self) -> int:
        """4 or 6."""
        return ip_address(self.target).version


@dataclass(frozen=True)
class Traffic:
    """What frames are like. size: "imix", "jumbo", or bytes with FCS; 0: the family's least."""

    size: int | str = 64
    flows: int = 1
    order: str = "uniform"
    skew: float = 1.0  # of Zipf's distribution
    checksum: bool = False  # also in IPv4
    source_bits: int = SOURCE_BITS  # of a flow's number, in the source port

    @property
    def ports(self) -> int:
        """How many target ports so many flows have."""
        return max(1, -(-self.flows >> self.source_bits))


def sizes(size: int | str, family: int) -> list[int]:
    """Return a round of frame sizes, largest mixed among the others."""
    if size == "jumbo":
        return [JUMBO]
    if size == "imix":
        return mixed([(count or LEAST[family], weight) for count, weight in IMIX])
    return [max(int(size), LEAST[family])]


def mixed(weights: list[tuple[int, int]]) -> list[int]:
    """Return a round in which each size stands as often as its weight says, evenly spread."""
    places = [
        ((n + 0.5) / weight, rank, size)
        for rank, (size, weight) in enumerate(weights)
        for n in range(weight)
    ]
    return [size for _, _, size in sorted(places)]


def mean_size(size: int | str, family: int) -> float:
    """Return the mean of a round."""
    found = sizes(size, family)
    return sum(found) / len(found)


def frame(path: Path, size: int, checksum: bool = False) -> bytes:
    """Return flow 0's frame of a size: Ethernet, IP, UDP (RFC 768), the mark."""
    family = path.family
    payload = size - FCS - HEADERS[family]
    if payload < LIMITS["STAMP_BYTES"]:
        least = HEADERS[family] + FCS + LIMITS["STAMP_BYTES"]
        raise LabError(f"frame size {size}: at least {least} over IPv{family}")
    macs = bytes.fromhex((path.target_mac + path.source_mac).replace(":", ""))
    source, target = ip_address(path.source).packed, ip_address(path.target).packed
    udp = struct.pack(">HHHH", SOURCE_PORT, path.target_port, 8 + payload, 0)
    body = MARK + bytes(payload - len(MARK))
    if checksum or family == 6:
        pseudo = source + target + struct.pack(">II", 8 + payload, UDP)
        udp = udp[:6] + struct.pack(">H", (0xFFFF - total(pseudo + udp + body)) or 0xFFFF)
    if family == 6:
        ip = struct.pack(">IHBB", 6 << 28, 8 + payload, UDP, 64) + source + target
        return macs + b"\x86\xdd" + ip + udp + body
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 28 + payload, 0, 0x4000, 64, UDP, 0) + source + target
    ip = ip[:10] + struct.pack(">H", 0xFFFF - total(ip)) + ip[12:]
    return macs + b"\x08\x00" + ip + udp + body


def total(data: bytes) -> int:
    """Return the one's complement sum of 16-bit words (RFC 1071)."""
    data += b"\0" * (len(data) & 1)
    found = sum(struct.unpack(f">{len(data) // 2}H", data))
    while found >> 16:
        found = (found & 0xFFFF) + (found >> 16)
    return found


def template(path: Path, size: int, number: int, traffic: Traffic) -> np.ndarray:
    """Return one generator_template of a frame size."""
    family = path.family
    whole = bytearray(frame(path, size))
    at = HEADERS[family]
    whole[at + 2] = number
    row = np.zeros((), LAYOUT["generator_template"])
    bits = traffic.source_bits
    fields = [(at - 8, SOURCE_PORT, 0, (1 << bits) - 1)]
    if traffic.ports > 1:
        fields.append((at - 6, path.target_port, bits, PORTS_MOST - 1))
    for n, (offset, first, shift, mask) in enumerate(fields):
        row["fields"][n] = (offset, 2, shift, first, mask, 0)
    row["field_count"], row["length"] = len(fields), len(whole)
    row["stamp"], row["stamped"] = at, 1
    if family == 6 or traffic.checksum:
        row["udp_check"] = at - 2
        row["udp_sum"] = _fixed_sum(path, bytes(whole), at, len(fields))
    head = bytes(whole[: LIMITS["HEADERS_MAX"]])
    row["headers"][: len(head)] = np.frombuffer(head, np.uint8)
    # The mark's time is 0 in unstamped frames; recycled pages keep what lies behind the headers.
    return row


def _fixed_sum(path: Path, whole: bytes, at: int, fields: int) -> int:
    """Sum, in memory order, of what a UDP checksum covers but fields and time."""
    pseudo = ip_address(path.source).packed + ip_address(path.target).packed
    udp = bytearray(whole[at - 8 :])
    pseudo += struct.pack(">II", len(udp), UDP)
    udp[0:2] = b"\0\0"
    if fields > 1:
        udp[2:4] = b"\0\0"
    udp[6:8] = b"\0\0"
    return int.from_bytes(total(pseudo + bytes(udp)).to_bytes(2, "big"), "little")


@dataclass(frozen=True)
class Plan:
    """All that the generator is told."""

    templates: np.ndarray  # generator_template[n]
    schedule: np.ndarray  # template numbers of a round
    flow_mask: int
    sequence: np.ndarray  # uint32, empty: a permutation of flow_mask + 1 flows
    longest: int  # bytes of memory

    @property
    def mean(self) -> float:
        """Mean frame size, with FCS."""
        return float(self.templates["length"][self.schedule].mean()) + FCS


def plan(path: Path, traffic: Traffic) -> Plan:
    """Return the plan for a path; LabError for what the generator cannot make."""
    if traffic.flows < 1 or traffic.ports > PORTS_MOST:
        raise LabError(f"{traffic.flows} flows: 1..{PORTS_MOST << traffic.source_bits}")
    found = sizes(traffic.size, path.family)
    if max(found) > FRAME_MOST:
        raise LabError(
            f"{max(found)}-byte frames: live frames are at most {FRAME_MOST} (a page); "
            "the drivers pcap and iperf3 can"
        )
    kinds = sorted(set(found))
    rows = [template(path, size, n, traffic) for n, size in enumerate(kinds)]
    return Plan(
        np.array(rows, LAYOUT["generator_template"]),
        np.array([kinds.index(size) for size in found], np.uint64),
        traffic.flows - 1,
        sequence(traffic),
        max(kinds) - FCS,
    )


def sequence(traffic: Traffic) -> np.ndarray:
    """Return the flow numbers that are walked through, a power of two of them; empty: none."""
    flows, most = traffic.flows, LIMITS["SEQUENCE_MAX"]
    random = np.random.default_rng(flows)
    if traffic.order == "zipf":
        return zipf(flows, traffic.skew, most, random)
    if flows & (flows - 1) == 0:
        return np.zeros(0, np.uint32)
    length = min(most, 1 << (flows * 16 - 1).bit_length())
    rounds = [random.permutation(flows) for _ in range(-(-length // flows))]
    return np.concatenate(rounds)[:length].astype(np.uint32)


def zipf(flows: int, skew: float, length: int, random: np.random.Generator) -> np.ndarray:
    """Return uint32[length]: flow numbers whose frequency is that of Zipf over their rank."""
    weights = np.arange(1, flows + 1, dtype=np.float64) ** -skew
    edges = np.cumsum(weights)
    ranks = np.searchsorted(edges, random.random(length) * edges[-1], side="right")
    names = random.permutation(flows).astype(np.uint32)  # rank says nothing about ports
    return names[np.minimum(ranks, flows - 1)]
