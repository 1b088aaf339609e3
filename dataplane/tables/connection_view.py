"""Connections of shared memory as plain data: what `penstock ct`, `nat` and `flows` show.

Rule: reads only; works while no daemon runs. A connection that changes while it is read may show
half of a change, never another connection's.

Theory. Records lie where the workers' hands have left them; holes of the file are skipped.
Selection is by numpy over whole parts of the table, decoding one by one only for what is shown.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import numpy as np

from dataplane.tables.shm import Shm
from xdp.abi import CONST, ENUM, reason_text, value

Address = IPv4Address | IPv6Address
LIVE = value("RECORD_LIVE")
PART = 1 << 18  # records that are looked at together
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp6", 132: "sctp"}
NUMBERS = {name: number for number, name in PROTOCOLS.items()}
STATES = {
    number: name.removeprefix("CONNECTION_").lower()
    for name, number in ENUM["connection_state"].items()
}
FLAGS = {
    number: name.removeprefix("CONNECTION_FLAG_").lower().replace("_", " ")
    for name, number in CONST.items()
    if name.startswith("CONNECTION_FLAG_")
}
NAT = CONST["CONNECTION_FLAG_NAT_SOURCE"] | CONST["CONNECTION_FLAG_NAT_TARGET"]
DENIED = CONST["CONNECTION_FLAG_DENIED"]
TICK_NS = 1 << CONST["TICK_SHIFT"]
MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Select:
    """Which connections; None: any. address, port: of either end, on either side of NAT."""

    address: Address | None = None
    port: int | None = None
    protocol: int | None = None
    nat: bool = False


def numbers(shm: Shm, select: Select) -> Iterator[np.ndarray]:
    """Yield the numbers of live records that fit, part by part: int64[n]."""
    most = int(shm.node[0]["connections"]) or CONST["CONNECTIONS_MOST"]
    for first, end in shm.extents("connections"):
        for at in range(first, min(end, most), PART):
            rows = shm.connections[at : min(at + PART, end, most)]
            yield at + np.flatnonzero(_fits(rows, select))


def _fits(rows: np.ndarray, select: Select) -> np.ndarray:
    good = rows["owner"] == LIVE
    if select.nat:
        good &= (rows["flags"] & NAT) != 0
    if select.protocol is not None:
        good &= ((rows["word"] >> np.uint64(8)) & np.uint64(0xFF)) == select.protocol
    if select.port is not None:
        port = np.uint64(select.port)
        mine = np.zeros(len(rows), bool)
        for word in ("word", "reply_word"):
            for shift in (48, 32):
                mine |= ((rows[word] >> np.uint64(shift)) & np.uint64(0xFFFF)) == port
        good &= mine
    if select.address is not None:
        hi, lo = int(select.address) >> 64, int(select.address) & MASK64
        mine = np.zeros(len(rows), bool)
        for name in ("source", "target", "reply_source", "reply_target"):
            mine |= (rows[f"{name}_hi"] == hi) & (rows[f"{name}_lo"] == lo)
        family = (rows["word"] & np.uint64(0xFF)) == select.address.version
        good &= mine & family
    return good


def connections(shm: Shm, select: Select, limit: int) -> list[dict[str, Any]]:
    """Return the connections that were active last, newest first."""
    found = [part for part in numbers(shm, select) if len(part)]
    if not found:
        return []
    every = np.concatenate(found)
    latest = np.maximum(
        shm.connections["last_original"][every], shm.connections["last_reply"][every]
    )
    chosen = every[np.argsort(latest)[::-1][:limit]]
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    return [_plain(int(number), shm.connections[number].copy(), now) for number in chosen]


def _address(family: int, hi: np.integer, lo: np.integer) -> str:
    return str(IPv4Address(int(lo)) if family == 4 else IPv6Address(int(hi) << 64 | int(lo)))


def _plain(number: int, row: np.void, now: int) -> dict[str, Any]:
    word, reply = int(row["word"]), int(row["reply_word"])
    family, protocol = word & 0xFF, word >> 8 & 0xFF
    latest = max(int(row["last_original"]), int(row["last_reply"]))
    flags = int(row["flags"])
    return {
        "record": number,
        "protocol": PROTOCOLS.get(protocol, str(protocol)),
        "state": STATES.get(int(row["state"]), str(row["state"])),
        "source": _address(family, row["source_hi"], row["source_lo"]),
        "source_port": word >> 48,
        "destination": _address(family, row["target_hi"], row["target_lo"]),
        "destination_port": word >> 32 & 0xFFFF,
        "reply_source": _address(family, row["reply_source_hi"], row["reply_source_lo"]),
        "reply_source_port": reply >> 48,
        "reply_destination": _address(family, row["reply_target_hi"], row["reply_target_lo"]),
        "reply_destination_port": reply >> 32 & 0xFFFF,
        "packets": int(row["packets_original"]),
        "bytes": int(row["bytes_original"]),
        "reply_packets": int(row["packets_reply"]),
        "reply_bytes": int(row["bytes_reply"]),
        "age_s": round((now - int(row["created"]) * TICK_NS) / 1e9, 1),
        "idle_s": round(max(0, now - latest * TICK_NS) / 1e9, 1),
        "source_identity": int(row["source_identity"]),
        "destination_identity": int(row["target_identity"]),
        "egress_verdict": int(row["egress_rule"]),
        "ingress_verdict": int(row["ingress_rule"]),
        "service": int(row["service"]),
        "backend": int(row["backend"]),
        "reason": reason_text(int(row["reason"])) if flags & DENIED else "Forwarded",
        "refusal": int(row["refusal"]),
        "flags": [text for bit, text in FLAGS.items() if flags & bit],
    }


def exhausted(shm: Shm) -> list[dict[str, Any]]:
    """Return the destinations for which there was no source port, largest count first."""
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    found: dict[tuple, dict[str, Any]] = {}
    for row in shm.exhausted[shm.exhausted["count"] > 0]:
        hi, lo = int(row["hi"]), int(row["lo"])
        family = 4 if hi == 0 and lo < 1 << 32 else 6
        key = (_address(family, row["hi"], row["lo"]), int(row["port"]), int(row["protocol"]))
        one = found.setdefault(
            key,
            {
                "destination": key[0],
                "port": key[1],
                "protocol": PROTOCOLS.get(key[2], str(key[2])),
                "refused": 0,
                "last_s": float("inf"),
            },
        )
        one["refused"] += int(row["count"])
        one["last_s"] = min(one["last_s"], round((now - int(row["last_ns"])) / 1e9, 1))
    return sorted(found.values(), key=lambda one: -one["refused"])


def totals(shm: Shm) -> dict[str, int]:
    """Return what all workers and the sweeper have done about connections."""
    names = [name for name in shm.track_counters.dtype.names or () if name != "reserved"]
    found = {name: int(shm.track_counters[name].sum()) for name in names}
    found["capacity"] = int(shm.node[0]["connections"])
    return found
