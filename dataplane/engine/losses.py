"""What the kernel could not give to workers, or take from them: drops with reasons like any other.

Rule: the forwarder's turn alone counts here, in the last row of the counters, no worker's.

Theory. A socket's queue is full or has no buffer while its worker waits for a core: the kernel
drops the packet and counts it (XDP_STATISTICS, net/xdp/xsk.c). These counters live as long as the
socket, so a worker reads them a last time when it drops one. In copy mode rx_dropped counts each
packet that found the fill ring empty; rx_fill_ring_empty_descs counts looks at it, so it is left
out. A driver with zero-copy counts such packets itself (ethtool -S). Their bytes are not known.
"""

from typing import Any

from dataplane.engine.worker import Worker
from xdp.abi import value
from xdp.errors import KernelError

REASONS = {
    "rx_dropped": value("REASON_FILL_EMPTY"),
    "rx_ring_full": value("REASON_RECEIVE_FULL"),
    "tx_invalid_descs": value("REASON_TRANSMIT_INVALID"),
}
PORT_UPLINK = value("PORT_UPLINK")


class Losses:
    """Counts what sockets of all workers have lost."""

    def __init__(self, shm: Any, workers: list[Worker]) -> None:
        """shm: reasons, port_counters and ports of it are used."""
        self._reasons, self._ports = shm.reasons[-1], shm.port_counters[-1]
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

    def _count(self, port: int, now: dict[str, int], told: dict[str, int]) -> None:
        way = 0 if self._kinds[port] == PORT_UPLINK else 1
        for name, reason in REASONS.items():
            lost = now.get(name, 0) - told.get(name, 0)
            if lost <= 0:
                continue
            told[name] = now[name]
            self._reasons[way, reason]["packets"] += lost
            self._ports[port]["rx_packets"] += lost
            self._ports[port]["rx_drops"] += lost
