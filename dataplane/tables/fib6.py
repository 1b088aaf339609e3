"""The writer of the IPv6 table: one hash table for all prefix lengths.

Rule: an entry's depth word is stored last; the bit of its length is set before that.

Theory. Key (prefix, length), linear probing, at most FIB6_PROBES_MAX slots a lookup; a deleted slot
(depth 255) does not end a run and is used again. The mix is that of kernels/route.py; a test
compares them. A bit in `lengths` may stay set when the last route of that length goes while an
insertion runs: it costs a probe, never a wrong answer.
"""

import numpy as np

from dataplane.tables.adjacencies import TableFull
from xdp.abi import CONST

MASK64 = (1 << 64) - 1
SLOTS_MASK = CONST["FIB6_SLOTS"] - 1
PROBES = CONST["FIB6_PROBES_MAX"]
EMPTY, DELETED = 0, 255


def slot(hi: int, lo: int, depth: int) -> int:
    """Return the first slot of a prefix; depth: length + 1."""
    mixed = ((hi * 0x9E3779B97F4A7C15) ^ ((lo + depth) * 0xC2B2AE3D27D4EB4F)) & MASK64
    mixed ^= mixed >> 32
    mixed = (mixed * 0xD6E8FEB86659FD93) & MASK64
    mixed ^= mixed >> 29
    return mixed & SLOTS_MASK


class Fib6:
    """Routes of IPv6, in `entries` fib6_entry[FIB6_SLOTS] and `lengths` uint64[4]."""

    def __init__(self, entries: np.ndarray, lengths: np.ndarray) -> None:
        """Read back what the entries hold."""
        self._lengths = lengths
        self._hi, self._lo = entries["hi"], entries["lo"]
        self._index, self._depth = entries["index"], entries["depth"]
        self.routes: dict[tuple[int, int], int] = {}
        self._at: dict[tuple[int, int], int] = {}
        self._counts = [0] * 129
        live = np.flatnonzero((self._depth != EMPTY) & (self._depth != DELETED))
        for at in live.tolist():
            length = int(self._depth[at]) - 1
            key = (int(self._hi[at]) << 64 | int(self._lo[at]), length)
            self.routes[key] = int(self._index[at])
            self._at[key] = at
            self._counts[length] += 1
        for length, count in enumerate(self._counts):
            if count == 0 and lengths.flags.writeable:  # a reader leaves all as it is
                self._mark(length, False)

    def _mark(self, length: int, used: bool) -> None:
        bit = 1 << (length % 64)
        word = int(self._lengths[length // 64])
        self._lengths[length // 64] = word | bit if used else word & ~bit

    def set(self, address: int, length: int, index: int) -> None:
        """Add or replace a route. Raises TableFull, with nothing changed."""
        key = (address, length)
        at = self._at.get(key)
        if at is not None:
            self._index[at] = index
            self.routes[key] = index
            return
        hi, lo = address >> 64, address & MASK64
        first = slot(hi, lo, length + 1)
        for probe in range(PROBES):
            at = (first + probe) & SLOTS_MASK
            if int(self._depth[at]) in (EMPTY, DELETED):
                break
        else:
            raise TableFull(
                f"the IPv6 table has no slot within {PROBES} probes for another route: "
                f"{len(self.routes)} routes in {SLOTS_MASK + 1} slots: aggregate routes"
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
        self._depth[self._at.pop(key)] = DELETED
        self._counts[length] -= 1
        if self._counts[length] == 0:
            self._mark(length, False)
        return True
