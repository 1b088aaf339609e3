"""The table of connections as the forwarder owns it: taken up at the start, swept while it runs.

Rule: connections outlive the forwarder; what a new one finds, it goes on with.

Theory. The records are in shared memory. A forwarder that starts indexes them anew (the index may
have been left half written, and its size follows the configuration) and counts the NAT ports again.
While it runs, `sweep` goes over the used part once a second or, when that is large, SLICE records a
second, beside the workers and without their help, so ageing costs a packet nothing. Its gauges are
what `penstock ct` and metrics show: connections that live, and how much of the table that is.
"""

import time
from typing import Any

import numpy as np

from dataplane.kernels.ageing import forget, restore, sweep
from dataplane.kernels.connections import (
    FIRST,
    HAND,
    LIMIT,
    LIMIT_LEAST,
    MASK,
    MOST,
    NOTICED,
    make_tracker,
)
from dataplane.kernels.events import NOW, OFF, make_ring
from dataplane.kernels.flows import Flows, make_flows, places_of
from dataplane.kernels.rows import Rows
from dataplane.tables.connection_view import Select, numbers
from xdp.abi import CONST, DTYPE

SLICE = 1 << 19  # records a call of `sweep` looks at, about 3 ms
WARN_PERCENT = 80
FOLLOWED = ("generation", "judgement", "ports_generation")  # NOTICED: as track.follow_tables
NAT_PORTS = CONST["NAT_PROTOCOLS"] << 16
DEFAULT = 1 << 17  # records, where the agent has not said


class Conntrack:
    """Trackers of all workers over one table, and its sweeper."""

    def __init__(
        self, shm: Any, nat_ports: np.ndarray, workers: int, flows: Flows | None = None
    ) -> None:
        """Take up what stands; the workers do not run yet.

        nat_ports: uint32[NAT_PORTS], zeroed; flows: the flow table, none: it is off.
        """
        self._shm = shm
        self.flows = flows or make_flows()
        self._places = places_of(nat_ports, self.flows)
        arrays = (shm.connections, shm.connection_index, self._places)
        self._tables = tuple(map(Rows, arrays))
        self.records = self.size(shm)
        shm.track_counters[:] = np.zeros((), DTYPE["track_counter"])
        self.trackers = [
            make_tracker(
                shm.track_counters[n : n + 1],
                shm.exhausted[n],
                nat_ports,
                self._places,
                self.records,
                n,
                workers,
                make_ring(shm.event_rings[n : n + 1], shm.flow_records[n]),
            )
            for n in range(workers)
        ]
        self.ring = make_ring(shm.event_rings[-1:], shm.flow_records[-1])
        self._counters = shm.track_counters[-1]
        self._position = (0, 0)  # worker, record within its part
        self._passing = [0, 0]  # live and established so far in this pass
        self.live = self.established = 0
        self._restore()

    @staticmethod
    def size(shm: Any) -> int:
        """Return how many records there are to be."""
        wanted = int(shm.node[0]["connections"]) or DEFAULT
        return max(CONST["CONNECTIONS_LEAST"], min(wanted, CONST["CONNECTIONS_MOST"]))

    @property
    def pressure_percent(self) -> float:
        """Live connections, in percent of the table."""
        return 100.0 * self.live / self.records

    def _restore(self) -> None:
        """Index every record that a predecessor left."""
        shm = self._shm
        shm.clear("connection_index")
        mask = int(self.trackers[0].words[MASK])
        highest = 0
        for first, end in shm.extents("connections"):
            usable = min(end, self.records)
            if first < usable:
                live, last = restore(*self._tables, mask, first, usable)
                self.live += live
                highest = max(highest, last)
        control = shm.control[0]
        for tracker in self.trackers:
            words = tracker.words
            words[NOTICED : NOTICED + 3] = [control[name] for name in FOLLOWED]
            used = min(max(highest - int(words[FIRST]), LIMIT_LEAST), int(words[MOST]))
            while int(words[LIMIT]) < used:
                words[LIMIT] = min(int(words[LIMIT]) * 2, int(words[MOST]))
            words[HAND] = 0
            tracker.counters[0]["limit"] = words[LIMIT]

    def sweep(self) -> bool:
        """Look at the next SLICE records; True when a pass over all has come to its end."""
        worker, position = self._position
        left = SLICE
        tick = self._begin()
        while left > 0 and worker < len(self.trackers):
            words = self.trackers[worker].words
            end = min(int(words[LIMIT]), position + left)
            first = int(words[FIRST])
            live, established, removed = sweep(
                *self._tables,
                self.ring,
                Rows(self._shm.node[0]["timeout_s"]),
                int(words[MASK]),
                first + position,
                first + end,
                tick,
            )
            self._passing[0] += live
            self._passing[1] += established
            self._counters["expired"] += np.uint64(removed)
            left -= end - position
            worker, position = (worker + 1, 0) if end >= int(words[LIMIT]) else (worker, end)
        self._position = (worker, position)
        if worker < len(self.trackers):
            return False
        self.live, self.established = self._passing
        self._passing, self._position = [0, 0], (0, 0)
        return True

    def flush(self, select: Select) -> int:
        """Forget the connections that fit; return their number."""
        gone = 0
        for part in numbers(self._shm, select):
            mask = int(self.trackers[0].words[MASK])
            tick = self._begin()
            gone += forget(*self._tables, self.ring, mask, Rows(part), len(part), tick)
        return gone

    def compile(self) -> None:
        """Compile what a forwarder calls later (engine/warm.py)."""
        forget(*self._tables, self.ring, 0, Rows(np.zeros(1, np.int64)), 0, 0)
        restore(*self._tables, 0, 0, 0)

    def _begin(self) -> int:
        """Set the ring's clock; return the tick."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        self.ring[NOW], self.ring[OFF] = now, int(self._shm.node[0]["events_off"])
        return now >> CONST["TICK_SHIFT"]

    def view(self) -> dict[str, Any]:
        """Return the gauges as plain data."""
        return {
            "connections": self.live,
            "established": self.established,
            "limit": self.records,
            "pressure_percent": round(self.pressure_percent, 1),
        }
