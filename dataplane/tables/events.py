"""Rings of events: what the forwarder says about connections and drops, read beside its writers.

Rule: a reader never holds a writer up, and what it misses it counts: what was handed out and what
was lost are together all that was written.

Theory. Each worker, and the sweeper, writes records into a ring of its own and then increments the
ring's head (kernels/events.py). A reader copies and looks at the head again: all that is older than
head - EVENTS_MAX may have been overwritten meanwhile, and so may the record that is being written
now, which takes the place of the oldest. Positions count from the ring's beginning and go on when a
forwarder is replaced; new tables begin at 0 again, under another epoch.
"""

import os
from dataclasses import dataclass

import numpy as np

from dataplane.tables.shm import Shm
from xdp.abi import CONST, DTYPE

SIZE = CONST["EVENTS_MAX"]
RINGS = CONST["WORKERS_MAX"] + 1
RECORD = DTYPE["flow_record"]
PART = 8192  # records that are looked at together


@dataclass(frozen=True)
class Batch:
    """Records of one ring, oldest first. lost: how many before them nobody can read any more."""

    ring: int
    first: int  # position of records[0]
    records: np.ndarray  # flow_record[n]: a copy
    lost: int


class EventReader:
    """A place in every ring."""

    def __init__(self, shm: Shm, behind: int = SIZE) -> None:
        """Begin with the last `behind` records of each ring that are still there."""
        self._records, self._heads = shm.flow_records, shm.event_rings["head"]
        self.epoch = epoch(shm)
        heads = [int(head) for head in self._heads]
        self.positions = [max(0, head - min(behind, SIZE - 1)) for head in heads]
        self.lost = [0] * RINGS

    @property
    def waiting(self) -> int:
        """Records that have been written since."""
        return sum(int(head) - at for head, at in zip(self._heads, self.positions, strict=True))

    def read(self, most: int) -> list[Batch]:
        """Return what is new, at most so many records of each ring."""
        heads = [int(head) for head in self._heads]
        found = []
        for ring, head in enumerate(heads):
            if head != self.positions[ring]:
                found.append(self._read(ring, head, most))
        return found

    def _read(self, ring: int, head: int, most: int) -> Batch:
        at = self.positions[ring]
        if head < at:  # another's tables: not these
            at = head
        first = max(at, head - SIZE)
        end = min(head, first + most)
        copied = self._copy(ring, first, end)
        safe = int(self._heads[ring]) - SIZE + 1
        over = min(max(0, safe - first), end - first)
        lost = first - at + over
        self.positions[ring] = end
        self.lost[ring] += lost
        return Batch(ring, first + over, copied[over:], lost)

    def _copy(self, ring: int, first: int, end: int) -> np.ndarray:
        start, count = first % SIZE, end - first
        before = self._records[ring, start : min(SIZE, start + count)]
        if len(before) == count:
            return before.copy()
        return np.concatenate((before, self._records[ring, : count - len(before)]))


def epoch(shm: Shm) -> int:
    """Return a number of the tables that these are: others have others, with some certainty."""
    seen = os.stat(shm.folder / "event_rings")
    return (seen.st_ino * 0x9E3779B1 ^ seen.st_ctime_ns) & 0xFFFFFFFF


def latest(shm: Shm, kind: int, most: int) -> np.ndarray:
    """Return the records of a kind that the rings still hold, newest first: flow_record[n].

    most: of each ring. What else is in the rings is not copied.
    """
    found = [np.zeros(0, RECORD)]
    for ring, row in enumerate(shm.flow_records):
        head = int(shm.event_rings["head"][ring])
        positions = np.arange(max(0, head - SIZE + 1), head)
        chosen = positions[row["kind"][positions % SIZE] == kind][-most:]
        records = row[chosen % SIZE]
        found.append(records[chosen > int(shm.event_rings["head"][ring]) - SIZE])
    together = np.concatenate(found)
    return together[np.argsort(together["time_ns"], kind="stable")[::-1]]
