"""The counters check: what came in is what went out and what was dropped by reason, to the packet.

Rule: the numbers are Penstock's own, out of shared memory; the generator and the sink stand beside.

Theory. Every packet ends with one reason (xdp/abi.h), every port counts what it received and sent.
Between two quiet moments the sums must agree exactly, whatever else went over the ports (ARP, ICMP,
TCP of the programs). What XDP forwards from the flow table is counted there and collected by the
forwarder once a second, so a moment is quiet when two looks a second apart agree. What the
generator sent more than the node has received was lost before it (a ring was full); what the node
sent more than the sink has seen was lost behind it. These two are not ours to count, so they are
shown.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dataplane.tables.shm import Shm
from dataplane.tables.view import DROPS, counters, ports

HARVEST_S = 1.1  # the flow table's counters are collected once a second
QUIET_S = 4.0


@dataclass(frozen=True)
class Snapshot:
    """What a node has counted so far."""

    received: int  # by ports
    sent: int
    not_sent: int
    reasons: dict[str, int]
    dropped: int  # of the reasons: drops

    def __sub__(self, earlier: "Snapshot") -> "Snapshot":
        reasons = {
            text: count - earlier.reasons.get(text, 0) for text, count in self.reasons.items()
        }
        return Snapshot(
            self.received - earlier.received,
            self.sent - earlier.sent,
            self.not_sent - earlier.not_sent,
            {text: count for text, count in reasons.items() if count},
            self.dropped - earlier.dropped,
        )


@dataclass(frozen=True)
class Balance:
    """The check over one measurement on one node."""

    received: int
    ended: int  # sum over all reasons
    sent: int
    not_sent: int
    reasons: dict[str, int]

    @property
    def exact(self) -> bool:
        """Whether everything that came in has an end, and went out or did not."""
        return self.received == self.ended == self.sent + self.not_sent

    def plain(self) -> dict:
        """For JSON."""
        return {**vars(self), "exact": self.exact}


def snapshot(run_dir: Path) -> Snapshot:
    """Read a node's counters."""
    shm = Shm.open(run_dir)
    try:
        rows, all_ports = counters(shm), ports(shm)
    finally:
        shm.close()
    reasons: dict[str, int] = {}
    for row in rows:
        reasons[row["text"]] = reasons.get(row["text"], 0) + row["packets"]
    return Snapshot(
        sum(row["rx_packets"] for row in all_ports),
        sum(row["tx_packets"] for row in all_ports),
        sum(row["rx_drops"] for row in all_ports),
        reasons,
        sum(row["packets"] for row in rows if row["reason"] >= DROPS),
    )


def quiet(read: Callable[[], list[Snapshot]], harvest: bool) -> list[Snapshot]:
    """Return the counters of all nodes once they stand still. harvest: the flow table may be on."""
    deadline = time.monotonic() + QUIET_S
    found = read()
    while True:
        time.sleep(HARVEST_S if harvest else 0.05)
        again = read()
        if again == found or time.monotonic() > deadline:
            return again
        found = again


def check(before: list[Snapshot], after: list[Snapshot]) -> list[Balance]:
    """Return each node's balance."""
    found = []
    for one, two in zip(before, after, strict=True):
        change = two - one
        ended = sum(change.reasons.values())
        found.append(Balance(change.received, ended, change.sent, change.not_sent, change.reasons))
    return found
