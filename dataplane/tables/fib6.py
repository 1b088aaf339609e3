"""The writer of the IPv6 table: one hash table for all prefix lengths.

Rule: an entry's depth word is stored last; the bit of its length is set before that.

Theory. Key (prefix, length), linear probing, at most FIB6_PROBES_MAX slots a lookup; a deleted slot
(depth 255) does not end a run. A lookup reads the key and then the index, so a deleted slot rests
REST_S before it is used again, or is made empty when the run ends behind it. The mix is that of
kernels/route.py; a test compares them. A bit in `lengths` may stay set when the last route of that
length goes while an insertion runs: it costs a probe, never a wrong answer.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from dataplane.tables.adjacencies import REST_S
from dataplane.tables.errors import TableFull
from xdp.abi import CONST

MASK64 = (1 << 64) - 1
SLOTS_MASK = CONST["FIB6_SLOTS"] - 1
PROBES = CONST["FIB6_PROBES_MAX"]
EMPTY, DELETED = 0, 255


def slot(hi: int, lo: int, depth: int, mask: int | None = None) -> int:
    """Return the first slot of a prefix; depth: length + 1; mask: slots less 1, fib6's if None."""
    mixed = ((hi * 0x9E3779B97F4A7C15) ^ ((lo + depth) * 0xC2B2AE3D27D4EB4F)) & MASK64
    mixed ^= mixed >> 32
    mixed = (mixed * 0xD6E8FEB86659FD93) & MASK64
    mixed ^= mixed >> 29
    return mixed & (SLOTS_MASK if mask is None else mask)


def lookup6(entries: np.ndarray, lengths: np.ndarray, address: int) -> int:
    """Return the index of the longest prefix over an address, 0: none; as kernels/route.py does."""
    mask = len(entries) - 1
    for length in range(128, -1, -1):
        if not int(lengths[length // 64]) >> length % 64 & 1:
            continue
        prefix = address >> (128 - length) << (128 - length)
        hi, lo = prefix >> 64, prefix & MASK64
        first = slot(hi, lo, length + 1, mask)
        for probe in range(PROBES):
            row = entries[(first + probe) & mask]
            if row["depth"] == EMPTY:
                break
            if (row["depth"], row["hi"], row["lo"]) == (length + 1, hi, lo):
                return int(row["index"])
    return 0


class Fib6:
    """Prefixes of IPv6, in `entries` fib6_entry[a power of two] and `lengths` uint64[4]."""

    def __init__(
        self,
        entries: np.ndarray,
        lengths: np.ndarray,
        clock: Callable[[], float] = time.monotonic,
        extents: Iterable[tuple[int, int]] | None = None,
    ) -> None:
        """Read back what the entries hold. extents: parts of `entries` that are not holes."""
        self._lengths, self._clock, self._mask = lengths, clock, len(entries) - 1
        self._resting: deque[tuple[float, int]] = deque()
        self._at_rest: set[int] = set()
        self._hi, self._lo = entries["hi"], entries["lo"]
        self._index, self._depth = entries["index"], entries["depth"]
        self.routes: dict[tuple[int, int], int] = {}
        self._at: dict[tuple[int, int], int] = {}
        self._counts = [0] * 129
        for first, end in ((0, len(entries)),) if extents is None else extents:
            self._read_back(first, end)
        if lengths.flags.writeable:  # a reader leaves all as it is
            for length, count in enumerate(self._counts):
                self._mark(length, count > 0)

    def _read_back(self, first: int, end: int) -> None:
        for at in (first + np.flatnonzero(self._depth[first:end])).tolist():
            if self._depth[at] == DELETED:
                self._rest(at)
                continue
            length = int(self._depth[at]) - 1
            key = (int(self._hi[at]) << 64 | int(self._lo[at]), length)
            self.routes[key] = int(self._index[at])
            self._at[key] = at
            self._counts[length] += 1

    def _mark(self, length: int, used: bool) -> None:
        bit = 1 << (length % 64)
        word = int(self._lengths[length // 64])
        if bool(word & bit) != used:
            self._lengths[length // 64] = word ^ bit

    def _rest(self, at: int) -> None:
        self._resting.append((self._clock(), at))
        self._at_rest.add(at)

    def _wake(self) -> None:
        """End the rest of slots whose time is over; those that end a run become empty."""
        if not self._resting:
            return
        latest = self._clock() - REST_S
        while self._resting and self._resting[0][0] <= latest:
            at = self._resting.popleft()[1]
            self._at_rest.discard(at)
            if self._depth[(at + 1) & self._mask] != EMPTY:
                continue
            while self._depth[at] == DELETED and at not in self._at_rest:
                self._depth[at] = EMPTY
                at = (at - 1) & self._mask

    def set(self, address: int, length: int, index: int) -> None:
        """Add or replace a route. Raises TableFull, with nothing changed."""
        key = (address, length)
        at = self._at.get(key)
        if at is not None:
            self._index[at] = index
            self.routes[key] = index
            return
        self._wake()
        hi, lo = address >> 64, address & MASK64
        first = slot(hi, lo, length + 1, self._mask)
        for probe in range(PROBES):
            at = (first + probe) & self._mask
            depth = self._depth.item(at)
            if depth == EMPTY or (depth == DELETED and at not in self._at_rest):
                break
        else:
            raise TableFull(
                f"the IPv6 table has no slot within {PROBES} probes for another route: "
                f"{len(self.routes)} routes in {self._mask + 1} slots: aggregate routes"
            )
        self._mark(length, True)
        self._hi[at], self._lo[at], self._index[at] = hi, lo, index
        self._depth[at] = length + 1
        self.routes[key], self._at[key] = index, at
        self._counts[length] += 1

    def delete(self, address: int, length: int) -> bool:
        """Delete a route; False when there is none."""
        key = (address, length)
        if self.routes.pop(key, None) is None:
            return False
        self._wake()
        at = self._at.pop(key)
        self._depth[at] = DELETED
        self._rest(at)
        self._counts[length] -= 1
        if self._counts[length] == 0:
            self._mark(length, False)
        return True
