"""What was dropped lately of one sender's packets, from the rings of events.

Rule: reads only; works while no daemon runs.

Theory. Writers tell the first drop of a kind at once and gather the rest of a second, so the time
between a sender's first and last says whether it goes on. What is the same but for time is one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import numpy as np

from dataplane.tables import events
from dataplane.tables.connection_view import MASK64, PROTOCOLS
from dataplane.tables.shm import Shm
from xdp.abi import reason_text, value

Address = IPv4Address | IPv6Address
DROP = value("EVENT_DROP")
ETHERNET = 14  # bytes of the header that events count, too


@dataclass
class Drop:
    """Packets that were dropped, or answered in their target's place, for one reason.

    port: 80/tcp, or icmp; word: of the verdict that refused them; first_s, last_s: ago.
    """

    target: Address
    port: str
    reason: int
    word: int
    packets: int = 0
    size: int = 0
    first_s: float = 0.0
    last_s: float = float("inf")

    @property
    def mean(self) -> int:
        """Bytes of a packet, from its IP header on."""
        return max(0, self.size // max(1, self.packets) - ETHERNET)

    def plain(self, by: str) -> dict[str, Any]:
        """Return it as JSON types. by: the policy."""
        return {
            "target": str(self.target),
            "port": self.port,
            "reason": reason_text(self.reason),
            "by": by,
            "packets": self.packets,
            "mean_bytes": self.mean,
            "first_s": round(self.first_s, 1),
            "last_s": round(self.last_s, 1),
        }


def dropped(shm: Shm, source: Iterable[Address], now_ns: int, lately_ns: int) -> list[Drop]:
    """Return the drops of a sender's packets that the rings still hold, newest first.

    now_ns: CLOCK_MONOTONIC; lately_ns: those of so long before it.
    """
    rows = events.latest(shm, DROP, events.SIZE)
    rows = rows[rows["time_ns"].astype(np.int64) > now_ns - lately_ns]
    mine = np.zeros(len(rows), bool)
    for address in source:
        hi, lo = int(address) >> 64, int(address) & MASK64
        same = (rows["source_hi"] == hi) & (rows["source_lo"] == lo)
        mine |= same & (rows["family"] == address.version)
    found: dict[tuple, Drop] = {}
    for row in rows[mine]:
        hi, lo, protocol = int(row["target_hi"]), int(row["target_lo"]), int(row["protocol"])
        target = IPv4Address(lo) if row["family"] == 4 else IPv6Address(hi << 64 | lo)
        port = port_text(int(row["target_port"]), PROTOCOLS.get(protocol, str(protocol)))
        key = target, port, int(row["reason"]), int(row["egress_rule"])
        one = found.setdefault(key, Drop(*key))
        ago = (now_ns - int(row["time_ns"])) / 1e9
        one.packets += int(row["packets"])
        one.size += int(row["bytes"])
        one.first_s, one.last_s = max(one.first_s, ago), min(one.last_s, ago)
    return list(found.values())


def port_text(port: int, protocol: str) -> str:
    """Return a port as questions have it: 80/tcp, and icmp for both families' echo."""
    return "icmp" if protocol.startswith("icmp") else f"{port}/{protocol}"
