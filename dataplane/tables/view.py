"""Counters, flows, ports and workers of shared memory as plain data.

Rule: reads only; works while no daemon runs.

Theory. The command line uses this, so that counters can be seen while the agent is down.
"""

import time
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import numpy as np

from dataplane.tables import events
from dataplane.tables.connection_view import PROTOCOLS, Select, connections
from dataplane.tables.shm import Shm
from xdp.abi import CONST, ENUM, reason_text, value

DROPS = 130  # reasons from here on are drops
DROP = value("EVENT_DROP")
ICMP = (1, 58)  # protocols whose type stands in the place of a port
DROPS_READ = 16384  # of each ring
_DROP_KEY = (
    "source_hi", "source_lo", "target_hi", "target_lo", "source_port", "target_port", "protocol",
    "family", "reason", "egress_rule", "port",
)  # fmt: skip
"""What is the same in drops that are shown as one."""
SHARED = (
    "source", "source_port", "destination", "destination_port", "protocol", "reason", "refusal",
    "source_identity", "destination_identity",
)  # fmt: skip
"""What a connection and a flow call by the same name."""
DIRECTIONS = {
    value("DIRECTION_INGRESS"): "ingress",
    value("DIRECTION_EGRESS"): "egress",
}
KINDS = {number: name.removeprefix("PORT_").lower() for name, number in ENUM["port_kind"].items()}


def counters(shm: Shm) -> list[dict[str, Any]]:
    """Return packets and bytes by direction and reason, largest first."""
    packets = shm.reasons["packets"].sum(axis=0)
    size = shm.reasons["bytes"].sum(axis=0)
    rows = [
        {
            "direction": DIRECTIONS[int(direction)],
            "reason": int(reason),
            "text": reason_text(int(reason)),
            "drop": bool(reason >= DROPS),
            "packets": int(packets[direction, reason]),
            "bytes": int(size[direction, reason]),
        }
        for direction, reason in zip(*np.nonzero(packets), strict=True)
    ]
    return sorted(rows, key=lambda row: -row["packets"])


def ports(shm: Shm) -> list[dict[str, Any]]:
    """Return the port table with its counters."""
    totals = {
        name: shm.port_counters[name].sum(axis=0)
        for name in ("rx_packets", "rx_bytes", "tx_packets", "tx_bytes", "rx_drops", "tx_drops")
    }
    found = []
    for index in np.flatnonzero(shm.ports["state"]):
        row = shm.ports[index]
        six = int(row["address6_hi"]) << 64 | int(row["address6_lo"])
        found.append(
            {
                "index": int(index),
                "name": row["name"].decode(),
                "kind": KINDS[int(row["kind"])],
                "ifindex": int(row["ifindex"]),
                "mtu": int(row["mtu"]),
                "queues": int(row["queue_count"]),
                "endpoint": int(row["endpoint"]),
                "ipv4": str(IPv4Address(int(row["address4"]))) if row["address4"] else "",
                "ipv6": str(IPv6Address(six)) if six else "",
                **{name: int(total[index]) for name, total in totals.items()},
            }
        )
    return found


def workers(shm: Shm) -> list[dict[str, Any]]:
    """Return each worker's activity, with ns a packet by stage from the sampled steps."""
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    stages = {number: name.removeprefix("STAGE_").lower() for name, number in ENUM["stage"].items()}
    found = []
    for number in range(min(int(shm.node[0]["workers"]), CONST["WORKERS_MAX"])):
        row = shm.worker_stats[number]
        packets = max(1, int(row["sampled_packets"]))
        found.append(
            {
                "worker": number,
                "tid": int(row["tid"]),
                "steps": int(row["steps"]),
                "packets": int(row["packets"]),
                "polls": int(row["polls"]),
                "kicks": int(row["kicks"]),
                "kick_errors": int(row["kick_errors"]),
                "free_frames": int(row["free_frames"]),
                "heartbeat_ms": (now - int(row["heartbeat_ns"])) // 1_000_000,
                "stage_ns": {
                    name: round(int(row["stage_ns"][stage]) / packets, 1)
                    for stage, name in stages.items()
                },
            }
        )
    return found


def flows(shm: Shm, limit: int = 50) -> list[dict[str, Any]]:
    """Return the latest flows, newest first: connections, and what was dropped (ICMP: its type)."""
    names = [row["name"].decode() for row in shm.ports]
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    found = [_dropped(row, names, now) for row in _drops(shm, limit)]
    found += [_passed(row) for row in connections(shm, Select(), limit)]
    return sorted(found, key=lambda flow: flow["age_ms"])[:limit]


def _drops(shm: Shm, limit: int) -> list[np.void]:
    """Return the latest distinct drops; each counts all that the rings hold of it."""
    found: dict[bytes, np.void] = {}
    for row in events.latest(shm, DROP, DROPS_READ):
        key = b"".join(row[name].tobytes() for name in _DROP_KEY)
        known = found.get(key)
        if known is not None:
            known["packets"] += row["packets"]
            known["bytes"] += row["bytes"]
        elif len(found) < limit:
            found[key] = row
    return list(found.values())


def _dropped(row: np.void, names: list[str], now: int) -> dict[str, Any]:
    protocol = int(row["protocol"])
    source, target = (
        _address(int(row["family"]), int(row[f"{end}_hi"]), int(row[f"{end}_lo"]))
        for end in ("source", "target")
    )
    return {
        "source": source,
        "source_port": int(row["source_port"]),
        "destination": target,
        "destination_port": int(row["target_port"]) >> (8 if row["protocol"] in ICMP else 0),
        "protocol": PROTOCOLS.get(protocol, str(protocol)) if row["family"] else "",
        "verdict": "DROPPED",
        "reason": reason_text(int(row["reason"])),
        "refusal": int(row["egress_rule"]),
        "source_identity": int(row["source_identity"]),
        "destination_identity": int(row["target_identity"]),
        "ingress": names[int(row["port"])],
        "packets": int(row["packets"]),
        "bytes": int(row["bytes"]),
        "age_ms": (now - int(row["time_ns"])) // 1_000_000,
    }


def _address(family: int, hi: int, lo: int) -> str:
    """Return an address as text; empty for what is no IP packet."""
    if family == 4:
        return str(IPv4Address(lo))
    return str(IPv6Address(hi << 64 | lo)) if family else ""


def _passed(row: dict[str, Any]) -> dict[str, Any]:
    """A connection as a flow: both directions together."""
    return {
        **{name: row[name] for name in SHARED},
        "verdict": "DROPPED" if "denied" in row["flags"] else "FORWARDED",
        "ingress": "",
        "packets": row["packets"] + row["reply_packets"],
        "bytes": row["bytes"] + row["reply_bytes"],
        "age_ms": int(row["idle_s"] * 1000),
    }
