"""DNS events of all lanes, read beside their writers.

Rule: an event is handed out once and whole; what nobody could read any more is counted, and so is
what a reader leaves out because more came than it wants.

Theory. A lane is a ring of its worker. An event is valid while its `sequence` is its number + 1
(kernels/dns_count.py), so each is copied between two looks at that word. numpy copies a structure
member by member, which takes twenty times as long as its bytes do: so bytes are copied.
"""

import numpy as np

from dataplane.tables.shm import Shm
from xdp.abi import CONST, DTYPE

LANES, SIZE = CONST["DNS_LANES"], CONST["DNS_EVENTS_MAX"]
NONE = np.zeros(0, DTYPE["dns_event"])
RAW = np.dtype(f"V{DTYPE['dns_event'].itemsize}")
_ONE = np.uint64(1)
ALL = 1 << 62


def span(ring: np.ndarray, first: int, end: int) -> list[np.ndarray]:
    """Return what is numbered first..end-1 in a ring, as one view or two."""
    size, count = len(ring), end - first
    at = first % size
    if at + count <= size:
        return [ring[at : at + count]]
    return [ring[at:], ring[: at + count - size]]


class DnsEvents:
    """A place in every lane."""

    def __init__(self, shm: Shm) -> None:
        """Begin with the oldest event of each lane that is still there."""
        self._shm = shm
        self._next = [max(0, int(end) - SIZE) for end in shm.dns_notes["events"]]
        self.lost = self.left_out = 0

    def read(self, most: int = ALL, always: int = -1) -> np.ndarray:
        """Return what is new, by time: dns_event[n].

        most: the newest so many of all lanes; of what is older only those of kind `always`.
        """
        heads = self._shm.dns_notes["events"].tolist()
        fresh = {n: min(abs(heads[n] - self._next[n]), SIZE) for n in range(LANES)}
        total = sum(fresh.values())
        found = [
            self._lane(n, count if total <= most else most * count // total, always)
            for n, count in fresh.items()
            if count
        ]
        if len(found) == 1:  # of one worker: in order, and not copied once more
            return found[0]
        if not found:
            return NONE
        rows = np.concatenate([one.view(RAW) for one in found])
        order = np.argsort(rows.view(NONE.dtype)["time_ns"], kind="stable")
        return rows[order].view(NONE.dtype)

    def _lane(self, lane: int, most: int, always: int) -> np.ndarray:
        end = int(self._shm.dns_notes["events"][lane])
        start = self._next[lane] if self._next[lane] <= end else 0  # another's tables
        first = max(start, end - SIZE)
        ring, raw = self._shm.dns_events[lane], self._shm.dns_events[lane].view(RAW)
        full = max(first, end - most)
        old = first + np.flatnonzero(_together(span(ring["kind"], first, full)) == always)
        rows = _together([raw[old % SIZE], *span(raw, full, end)]).view(NONE.dtype)
        numbers = np.concatenate((old, np.arange(full, end)))
        wanted = numbers.astype(np.uint64) + _ONE
        still = _together([ring["sequence"][old % SIZE], *span(ring["sequence"], full, end)])
        whole = (rows["sequence"] == wanted) & (still == wanted)
        self.lost += first - start + int((~whole).sum())
        self.left_out += full - first - len(old)
        self._next[lane] = end
        return rows if whole.all() else rows[whole]


def _together(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
