"""What the kernel could not give to workers, or take from them: drops with reasons like any other.

Rule: the forwarder's turn alone counts here, in the last row of the counters, no worker's.

Theory. A socket's queue is full or has no buffer while its worker waits for a core: the kernel
drops the packet and counts it (XDP_STATISTICS, net/xdp/xsk.c). These counters live as long as the
socket, so a worker reads them a last time when it drops one. In copy mode rx_dropped counts each
packet that found the fill ring empty; rx_fill_ring_empty_descs counts looks at it, so it is left
out. A driver with zero-copy counts such packets itself (ethtool -S). What comes over the trunk and
finds penstock1's ring of 256 full, the kernel counts as penstock0's. What the programs drop stands
in a map that goes from forwarder to forwarder, with what has been counted of it, so that packets
which came between two of them have a reason, too; which pod sent these is not known, so the trunk
stands for it. Their bytes are not known.
"""

import socket
from pathlib import Path
from typing import Any

import numpy as np

from dataplane.engine.worker import Worker
from xdp.abi import CONST, value
from xdp.errors import KernelError

REASONS = {
    "rx_dropped": value("REASON_FILL_EMPTY"),
    "rx_ring_full": value("REASON_RECEIVE_FULL"),
    "tx_invalid_descs": value("REASON_TRANSMIT_INVALID"),
}
PORT_UPLINK, PORT_HOST = value("PORT_UPLINK"), value("PORT_HOST")
INGRESS, EGRESS = value("DIRECTION_INGRESS"), value("DIRECTION_EGRESS")
GONE, NOT_READY = value("REASON_PORT_GONE"), value("REASON_ENDPOINT_NOT_READY")
RECEIVE_FULL = value("REASON_RECEIVE_FULL")
PROGRAM_DROPS = {
    value("DROP_UPLINK_NO_DEVICE"): (INGRESS, GONE),
    value("DROP_POD_NO_DEVICE"): (EGRESS, GONE),
    value("DROP_POD_NO_SOCKET"): (EGRESS, NOT_READY),
}
DNS_COPY = value("LOST_DNS_COPY")
TOLD = CONST["PROGRAM_DROPS"]  # the second half of the map
DEVICES = Path("/proc/thread-self/net/dev")
TX_DROP = 11  # of its columns


class Losses:
    """Counts what sockets of all workers have lost."""

    def __init__(self, shm: Any, workers: list[Worker], drops: np.ndarray) -> None:
        """shm: reasons, port_counters, ports, dns_notes are used; drops: the map program_drops."""
        self._drops, self._rows = drops, shm.ports
        self._trunk: tuple[int, int] | None = None  # ifindex, and what was counted of it
        self._reasons, self._ports = shm.reasons[-1], shm.port_counters[-1]
        self._notes = shm.dns_notes[CONST["DNS_SWEEPER"]]
        self._kinds = shm.ports["kind"]
        self._workers = workers
        self._told: dict[int, dict[str, int]] = {}  # id of a socket -> what was counted of it

    def collect(self) -> None:
        """Count what was lost since the last time."""
        for worker in self._workers:
            for xsk, port in list(worker.sockets.values()):
                try:
                    self._count(port, xsk.statistics(), self._told.setdefault(id(xsk), {}))
                except KernelError:
                    continue  # closed a moment ago: it stands among the ended
            while worker.ended:
                xsk, port, last = worker.ended.popleft()
                self._count(port, last, self._told.pop(id(xsk), {}))
        self._count_programs()
        self._count_copies()
        self._count_trunk()

    def _first(self, kind: int) -> int:
        """Return the first port of a kind, -1: there is none."""
        return int(next(iter(np.flatnonzero(self._kinds == kind)), -1))

    def _count_programs(self) -> None:
        for kind, (way, reason) in PROGRAM_DROPS.items():
            count = int(self._drops[kind])
            port = self._first(PORT_UPLINK if way == INGRESS else PORT_HOST)
            if port >= 0 and count > self._drops[TOLD + kind]:
                self._add(port, way, reason, count - int(self._drops[TOLD + kind]))
                self._drops[TOLD + kind] = count

    def _count_copies(self) -> None:
        count = int(self._drops[DNS_COPY])
        self._notes["copies_lost"] += count - int(self._drops[TOLD + DNS_COPY])
        self._drops[TOLD + DNS_COPY] = count

    def _count_trunk(self) -> None:
        """Count what did not fit into the trunk."""
        port = self._first(PORT_HOST)
        ifindex = int(self._rows["peer_ifindex"][port]) if port >= 0 else 0
        count = _tx_dropped(ifindex) if ifindex else None
        if count is None:
            return
        if self._trunk is not None and self._trunk[0] == ifindex and count > self._trunk[1]:
            self._add(port, EGRESS, RECEIVE_FULL, count - self._trunk[1])
        self._trunk = ifindex, count

    def _count(self, port: int, now: dict[str, int], told: dict[str, int]) -> None:
        way = 0 if self._kinds[port] == PORT_UPLINK else 1
        for name, reason in REASONS.items():
            lost = now.get(name, 0) - told.get(name, 0)
            if lost <= 0:
                continue
            told[name] = now[name]
            self._add(port, way, reason, lost)

    def _add(self, port: int, way: int, reason: int, lost: int) -> None:
        self._reasons[way, reason]["packets"] += lost
        self._ports[port]["rx_packets"] += lost
        self._ports[port]["rx_drops"] += lost


def _tx_dropped(ifindex: int) -> int | None:
    """Return what a device of this namespace could not send; None: it is not there."""
    try:
        name = socket.if_indextoname(ifindex)
        lines = DEVICES.read_text().splitlines()
    except OSError:
        return None
    found = [line.split(":")[1].split() for line in lines if line.strip().startswith(f"{name}:")]
    return int(found[0][TX_DROP]) if found else None
