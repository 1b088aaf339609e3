"""Parts of an array, and single rows, that are taken, given back, and rest in between.

Rule: what a reader may still be reading is not written: it rests REST_S first.

Theory. A service row names a part of a list by one word, offset << 32 | count, so replacing a list
is writing it elsewhere and then storing that word. Equal contents share a part. Free space is kept
as runs that melt together when they touch, in buckets by the power of two below their length, so
taking and giving back cost the same however many there are. A part that is wanted again while it
rests is taken up where it is: a flapping endpoint alternates between two parts.

Rows are names that others remember: the affinity table and live connections hold numbers of
services and backends. So a row is used again only after ROW_REST_S, the longest session affinity,
unless there is no other.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from dataplane.tables.adjacencies import REST_S
from dataplane.tables.errors import TableFull

ROW_REST_S = 86400.0
BRIEF = 64  # bytes: a longer content is known by its digest
TRIES = 8  # runs of the fitting bucket that are looked at before a longer one is cut
COUNT_MASK = (1 << 32) - 1


class Parts:
    """Shared parts of a one-dimensional array, by content, with references."""

    def __init__(
        self,
        words: np.ndarray,
        what: str,
        fix: str,
        used: Iterable[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """used: words of the parts that stand, one for each reference. what, fix: for TableFull."""
        self._words, self._what, self._fix, self._clock = words, what, fix, clock
        self._references: dict[int, int] = {}
        self._keys: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}
        self._since: dict[int, float] = {}  # of parts at rest
        self._resting: deque[tuple[float, int]] = deque()
        self._lengths: dict[int, int] = {}  # free runs: first -> length
        self._firsts: dict[int, int] = {}  # and end -> first
        self._buckets: list[set[int]] = [set() for _ in range(len(words).bit_length() + 1)]
        self.used = 0  # elements of parts in use or at rest
        self._read_back(used)

    def _read_back(self, used: Iterable[int]) -> None:
        for word in used:
            self._references[word] = self._references.get(word, 0) + 1
        end = 0
        for word in sorted(self._references):
            first, count = word >> 32, word & COUNT_MASK
            if first < end or first + count > len(self._words):
                del self._references[word]  # damaged: nobody may use it
                continue
            if first > end:
                self._add_run(end, first - end)
            end = first + count
            self.used += count
            key = _key(self._words[first:end])
            self._keys[word] = key
            self._by_key.setdefault(key, word)
        if end < len(self._words):
            self._add_run(end, len(self._words) - end)

    def put(self, content: np.ndarray) -> int:
        """Return the word of a part with this content, and hold it; 0 for an empty one.

        Raises TableFull, with nothing changed.
        """
        if not len(content):
            return 0
        key = _key(content)
        word = self._by_key.get(key)
        if word is not None:
            self._references[word] += 1
            self._since.pop(word, None)
            return word
        self._wake()
        first = self._take(len(content))
        self._words[first : first + len(content)] = content
        word = first << 32 | len(content)
        self._references[word], self._keys[word], self._by_key[key] = 1, key, word
        self.used += len(content)
        return word

    def drop(self, word: int) -> None:
        """Let go of a part; the last one to do so sends it to rest. Nothing happens for 0."""
        if word == 0 or word not in self._references:
            return
        self._references[word] -= 1
        if self._references[word] == 0:
            now = self._clock()
            self._since[word] = now
            self._resting.append((now, word))

    def _wake(self) -> None:
        latest = self._clock() - REST_S
        while self._resting and self._resting[0][0] <= latest:
            since, word = self._resting.popleft()
            if self._since.get(word) != since:
                continue  # taken up again meanwhile
            del self._since[word], self._references[word]
            key = self._keys.pop(word)
            if self._by_key.get(key) == word:
                del self._by_key[key]
            first, count = word >> 32, word & COUNT_MASK
            self.used -= count
            self._give(first, count)

    # --- free runs --------------------------------------------------------------------------------

    def _add_run(self, first: int, length: int) -> None:
        self._lengths[first] = length
        self._firsts[first + length] = first
        self._buckets[length.bit_length()].add(first)

    def _remove_run(self, first: int) -> int:
        length = self._lengths.pop(first)
        del self._firsts[first + length]
        self._buckets[length.bit_length()].discard(first)
        return length

    def _take(self, count: int) -> int:
        first = self._find(count)
        length = self._remove_run(first)
        if length > count:
            self._add_run(first + count, length - count)
        return first

    def _find(self, count: int) -> int:
        near = min(count.bit_length(), len(self._buckets) - 1)
        for tries, first in enumerate(self._buckets[near]):
            if self._lengths[first] >= count:
                return first
            if tries == TRIES:
                break
        for bucket in self._buckets[near + 1 :]:
            if bucket:
                return next(iter(bucket))
        for first in self._buckets[near]:  # the last resort: all of them
            if self._lengths[first] >= count:
                return first
        raise TableFull(
            f"{self._what}: no room for {count} more together: {self.used} of {len(self._words)} "
            f"in use or at rest: {self._fix}"
        )

    def _give(self, first: int, count: int) -> None:
        before = self._firsts.get(first)
        if before is not None:
            count += self._remove_run(before)
            first = before
        if first + count in self._lengths:
            count += self._remove_run(first + count)
        self._add_run(first, count)


def _key(content: np.ndarray) -> bytes:
    raw = content.tobytes()
    if len(raw) <= BRIEF:
        return raw
    return b"#" + hashlib.blake2b(raw, digest_size=24).digest()


class Rows:
    """Numbers of rows, from 1."""

    def __init__(
        self,
        count: int,
        what: str,
        used: Iterable[int] = (),
        touched: Iterable[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """used: rows in use; touched: others that have been, and rest from now."""
        self._what, self._clock, self._count = what, clock, count
        now = clock()
        taken = set(used)
        rested = sorted(set(touched) - taken - {0})
        self._since = dict.fromkeys(rested, now)  # of rows at rest
        self._resting: deque[tuple[float, int]] = deque((now, row) for row in rested)
        first = max(taken | set(rested), default=0) + 1
        gaps = set(range(1, first)) - taken - set(rested)
        self._fresh: deque[int] = deque(sorted(gaps))
        self._next = first
        self.used = len(taken)

    def take(self) -> int:
        """Return a row: one that has rested for long, a fresh one, or one that has rested."""
        waited = self._waited()
        if waited >= ROW_REST_S:
            row = self._wake()
        elif self._fresh:
            row = self._fresh.popleft()
        elif self._next < self._count:
            row = self._next
            self._next += 1
        elif waited >= REST_S:
            row = self._wake()
        else:
            raise TableFull(
                f"the table of {self._what} is full: {self.used} in use, {len(self._since)} at "
                f"rest, limit {self._count - 1}: fewer services or endpoints"
            )
        self.used += 1
        return row

    def _waited(self) -> float:
        """How long the row has rested that rests longest; negative: none does."""
        while self._resting:
            since, row = self._resting[0]
            if self._since.get(row) == since:
                return self._clock() - since
            self._resting.popleft()  # it was taken up again
        return -1.0

    def _wake(self) -> int:
        row = self._resting.popleft()[1]
        del self._since[row]
        return row

    def take_up(self, row: int) -> bool:
        """Take a row that rests, for what it was before; False when it does not rest."""
        if self._since.pop(row, None) is None:
            return False
        self.used += 1
        return True

    def give(self, row: int) -> None:
        """Give a row back."""
        now = self._clock()
        self._since[row] = now
        self._resting.append((now, row))
        self.used -= 1
