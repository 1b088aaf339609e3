"""What a tap has taken, read out of its rings.

Rule: one reader a tap; it gives room back as it reads, and says what found no room.

Theory. Each worker writes into a ring of its own (kernels/taps.py). A turn reads all rings and
orders by time; records of one vector have the same time and stay in their order. The reader says
with each turn that it is still there, because a tap without one is closed by the forwarder.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dataplane.tables.shm import Shm
from xdp.abi import CONST, DTYPE

RING_BYTES = CONST["TAP_RING_BYTES"]
TAP_IN = CONST["TAP_IN"]
RECORD, STEP = DTYPE["tap_record"], DTYPE["tap_step"]
LEASE_S = 5.0  # a reader that is silent for longer has gone


class TapGone(Exception):
    """The forwarder has closed the tap, or was replaced."""


@dataclass(frozen=True)
class Seen:
    """A packet at one point."""

    record: np.void  # tap_record
    steps: np.ndarray  # tap_step[n]: what each stage made of it; none where nobody asked
    data: bytes

    @property
    def inbound(self) -> bool:
        """As it came; False: as it left."""
        return int(self.record["point"]) == TAP_IN


def clock_offset_ns() -> int:
    """Nanoseconds to add to CLOCK_MONOTONIC for the time since 1970."""
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class TapReader:
    """The rings of an open tap."""

    def __init__(self, shm: Shm, tap: int, serial: int) -> None:
        """shm: writable. tap, serial: as the forwarder has said."""
        self._row = shm.taps[tap]
        self._rings = shm.tap_rings[:, tap]
        self._space = [ring.view(np.uint8) for ring in shm.tap_space[:, tap]]
        self._serial = serial

    @property
    def lost(self) -> int:
        """Packets for which there was no room."""
        return int(self._rings["lost"].sum())

    def read(self) -> list[Seen]:
        """Return what is new. Raises TapGone when nothing will come any more."""
        if int(self._row["serial"]) != self._serial:
            raise TapGone("the forwarder has closed the capture: it was restarted, or we were late")
        self._row["lease_ns"] = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        return self.drain()

    def drain(self) -> list[Seen]:
        """Return what is new, also of a tap that is closed."""
        found = [seen for n in range(len(self._rings)) for seen in self._ring(n)]
        return sorted(found, key=lambda seen: int(seen.record["time_ns"]))

    def _ring(self, number: int) -> Iterator[Seen]:
        ring, space = self._rings[number], self._space[number]
        head, tail = int(ring["head"]), int(ring["tail"])
        while tail < head:
            at = tail % RING_BYTES
            record = space[at : at + RECORD.itemsize].view(RECORD)[0].copy()
            if not record["size"]:
                break  # the forwarder has taken the memory back
            if record["point"]:
                yield _seen(record, space, at + RECORD.itemsize)
            tail += int(record["size"])
        ring["tail"] = tail


def _seen(record: np.void, space: np.ndarray, at: int) -> Seen:
    end = at + int(record["steps"]) * STEP.itemsize
    steps = space[at:end].view(STEP).copy()
    return Seen(record, steps, space[end : end + int(record["captured"])].tobytes())
