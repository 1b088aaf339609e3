"""The writer of the IPv4 table (DIR-24-8).

Rule: readers never wait: every change is single words, and a group is complete before a word points
to it.

Theory. A word is ext << 31 | (length + 1) << 24 | index. Keeping the length of the prefix that owns
a word lets an insertion pass over words of longer prefixes, and a deletion find its own. Longer
prefixes than 24 live in groups of 256 words. The routes themselves are a dict of (address, length);
after a restart it is read back from the words, so the table stands while the agent is away. A route
that longer ones hide completely cannot be read back; it is added again with the first update.
"""

import time
from collections.abc import Callable, Iterable

import numpy as np

from dataplane.tables.adjacencies import REST_S
from dataplane.tables.errors import TableFull

EXT = 1 << 31
DEPTH_SHIFT = 24
DEPTH_MASK = 0x3F
INDEX_MASK = 0xFFFFFF
CHUNK = 1 << 20  # words read back at a time


def _mask(length: int) -> int:
    return (0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF if length else 0


def lookup4(wide: np.ndarray, deep: np.ndarray, address: int) -> int:
    """Return the index of the longest prefix over an address, 0: none; as kernels/route.py does."""
    word = int(wide[address >> 8])
    if word & EXT:
        word = int(deep[(word & INDEX_MASK) * 256 + (address & 255)])
    return word & INDEX_MASK


class Fib4:
    """Routes of IPv4, in `wide` uint32[2**24] and `deep` uint32[groups * 256]."""

    def __init__(
        self,
        wide: np.ndarray,
        deep: np.ndarray,
        clock: Callable[[], float] = time.monotonic,
        extents: Iterable[tuple[int, int]] | None = None,
    ) -> None:
        """Read back what the words hold. extents: parts of `wide` that are not holes."""
        self._wide, self._deep, self._clock = wide, deep, clock
        self.routes: dict[tuple[int, int], int] = {}
        self._groups: dict[int, int] = {}
        self._resting: list[tuple[float, int]] = []
        for first, end in ((0, len(wide)),) if extents is None else extents:
            for at in range(first, end, CHUNK):
                self._read_back(at, min(at + CHUNK, end))
        used = set(self._groups.values())
        self._next = max(used, default=-1) + 1
        self._free = [group for group in range(self._next) if group not in used]

    def _read_back(self, first: int, end: int) -> None:
        words = self._wide[first:end]
        for at in np.flatnonzero(words & np.uint32(EXT)).tolist():
            group = int(words[at]) & INDEX_MASK
            self._groups[first + at] = group
            base = (first + at) << 8
            self._collect(base + np.arange(256), self._deep[group * 256 : group * 256 + 256])
        plain = np.flatnonzero((words != 0) & (words < EXT))
        self._collect((first + plain.astype(np.int64)) << 8, words[plain])

    def repair(self) -> None:
        """Write every route again: a writer that was killed may have left one half done."""
        for (address, length), index in sorted(self.routes.items(), key=lambda item: item[0][1]):
            self.set(address, length, index)

    def _collect(self, addresses: np.ndarray, words: np.ndarray) -> None:
        depths = (words >> DEPTH_SHIFT) & DEPTH_MASK
        for depth in np.unique(depths[words != 0]):
            mine = depths == depth
            prefixes = addresses[mine] & _mask(int(depth) - 1)
            first = np.ones(len(prefixes), bool)
            first[1:] = prefixes[1:] != prefixes[:-1]
            indices = words[mine][first] & INDEX_MASK
            for prefix, index in zip(prefixes[first].tolist(), indices.tolist(), strict=True):
                self.routes[prefix, int(depth) - 1] = index

    def set(self, address: int, length: int, index: int) -> None:
        """Add or replace a route. Raises TableFull, with nothing changed."""
        word = ((length + 1) << DEPTH_SHIFT) | index
        if length <= 24:
            self._set_wide(address, length, word)
        else:
            self._set_deep(address, length, word)
        self.routes[address, length] = index

    def _set_wide(self, address: int, length: int, word: int) -> None:
        first = address >> 8
        last = first + (1 << (24 - length))
        most = (length + 2) << DEPTH_SHIFT  # words below are of no longer prefix, nor EXT
        if length == 24 and self._wide.item(first) < most:
            self._wide[first] = word
            return
        part = self._wide[first:last]
        if int(part.max()) < most:
            part.fill(word)
            return
        plain = part < EXT
        shorter = ((part >> DEPTH_SHIFT) & DEPTH_MASK) <= length + 1
        np.copyto(part, np.uint32(word), where=plain & shorter)
        for at in np.flatnonzero(~plain):
            self._overlay(int(part[at]) & INDEX_MASK, 0, 256, length, word)

    def _overlay(self, group: int, first: int, last: int, length: int, word: int) -> None:
        part = self._deep[group * 256 + first : group * 256 + last]
        np.copyto(part, np.uint32(word), where=(part >> DEPTH_SHIFT) <= length + 1)

    def _set_deep(self, address: int, length: int, word: int) -> None:
        at = address >> 8
        group = self._groups.get(at)
        first = address & 255
        last = first + (1 << (32 - length))
        if group is not None:
            self._overlay(group, first, last, length, word)
            return
        group = self._take()
        self._deep[group * 256 : group * 256 + 256] = self._wide[at]
        self._overlay(group, first, last, length, word)
        self._groups[at] = group
        self._wide[at] = EXT | group

    def _take(self) -> int:
        if self._resting and self._clock() - self._resting[0][0] >= REST_S:
            return self._resting.pop(0)[1]
        if self._free:
            return self._free.pop()
        if self._next * 256 < len(self._deep):
            self._next += 1
            return self._next - 1
        raise TableFull(
            f"the IPv4 table has no group left for prefixes longer than 24: limit "
            f"{len(self._deep) // 256} (FIB4_GROUPS): aggregate routes"
        )

    def delete(self, address: int, length: int) -> bool:
        """Delete a route; False when there is none."""
        if self.routes.pop((address, length), None) is None:
            return False
        word = self._covering(address, length)
        depth = length + 1
        if length <= 24:
            first = address >> 8
            part = self._wide[first : first + (1 << (24 - length))]
            plain = part < EXT
            mine = ((part >> DEPTH_SHIFT) & DEPTH_MASK) == depth
            np.copyto(part, np.uint32(word), where=plain & mine)
            for at in np.flatnonzero(~plain):
                self._uncover(int(part[at]) & INDEX_MASK, depth, word)
        else:
            self._uncover(self._groups[address >> 8], depth, word, address, length)
            self._collapse(address >> 8)
        return True

    def _uncover(
        self, group: int, depth: int, word: int, address: int = 0, length: int = 24
    ) -> None:
        first = group * 256 + (address & 255 if length > 24 else 0)
        part = self._deep[first : first + (1 << (32 - length))]
        np.copyto(part, np.uint32(word), where=(part >> DEPTH_SHIFT) == depth)

    def _collapse(self, at: int) -> None:
        group = self._groups[at]
        part = self._deep[group * 256 : group * 256 + 256]
        if ((part >> DEPTH_SHIFT) > 25).any():
            return
        self._wide[at] = part[0]
        del self._groups[at]
        self._resting.append((self._clock(), group))

    def _covering(self, address: int, length: int) -> int:
        for shorter in range(length - 1, -1, -1):
            index = self.routes.get((address & _mask(shorter), shorter))
            if index is not None:
                return ((shorter + 1) << DEPTH_SHIFT) | index
        return 0
