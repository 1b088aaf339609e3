"""DNS events of all lanes, read beside their writers.

Rule: an event is handed out once and whole; what nobody could read any more is counted.

Theory. A lane is a ring of its worker. An event is valid while its `sequence` is its number + 1
(kernels/dns_count.py), so each is copied between two looks at that word.
"""

import numpy as np

from dataplane.tables.shm import Shm
from xdp.abi import CONST, DTYPE

LANES, SIZE = CONST["DNS_LANES"], CONST["DNS_EVENTS_MAX"]
NONE = np.zeros(0, DTYPE["dns_event"])
_ONE = np.uint64(1)


class DnsEvents:
    """A place in every lane."""

    def __init__(self, shm: Shm, behind: int = SIZE) -> None:
        """Begin with the last `behind` events of each lane that are still there."""
        self._shm = shm
        self._next = [max(0, int(end) - behind) for end in shm.dns_notes["events"]]
        self.lost = 0

    def read(self) -> np.ndarray:
        """Return what is new, by time: dns_event[n]."""
        heads = self._shm.dns_notes["events"]
        found = [self._lane(n) for n in range(LANES) if int(heads[n]) != self._next[n]]
        if len(found) == 1:  # of one worker: in order, and not copied once more
            return found[0]
        rows = np.concatenate(found) if found else NONE
        return rows[np.argsort(rows["time_ns"], kind="stable")]

    def _lane(self, lane: int) -> np.ndarray:
        end = int(self._shm.dns_notes["events"][lane])
        start = self._next[lane] if self._next[lane] <= end else 0  # another's tables
        first = max(start, end - SIZE)
        numbers = np.arange(first, end)
        ring = self._shm.dns_events[lane]
        rows = ring[numbers % SIZE]  # a copy
        wanted = numbers.astype(np.uint64) + _ONE
        whole = (rows["sequence"] == wanted) & (ring["sequence"][numbers % SIZE] == wanted)
        self.lost += first - start + int((~whole).sum())
        self._next[lane] = end
        return rows if whole.all() else rows[whole]
