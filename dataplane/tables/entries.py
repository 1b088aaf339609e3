"""The hash table of policy entries, changed many at a time.

Rule: an entry's second word, match and verdict in one, is stored last; denies become visible before
allows.

Theory. Open addressing with linear probing, at most POLICY_PROBES_MAX slots a lookup; hash and
layout are those of xdp/abi.h and kernels/policy.py (a test compares them). The table itself is the
index: nothing is kept beside it, so that a million entries cost no memory of the agent. All steps
run on numpy columns; a change of ten entries takes 0.2 ms, of a million about 1 s. A change is
planned first, slot by slot, and written when all of it fits. Denies are planned first, so that none
of them lies behind a slot that is filled later. A deleted slot rests REST_S before it is used
again, unless for the same key, where a reader cannot be misled: a policy that comes and goes many
times a second takes no more slots. A rested slot is made empty when its run ends behind it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from dataplane.tables.adjacencies import REST_S
from dataplane.tables.errors import TableFull
from xdp.abi import CONST

PROBES = CONST["POLICY_PROBES_MAX"]
MOST = CONST["POLICY_ENTRIES_MOST"]
EMPTY, DELETED = 0, 127
DENY, ACTION = CONST["POLICY_DENY"], CONST["POLICY_ACTION_MASK"]

_MIX_A, _MIX_B = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_MIX_C = np.uint64(0xD6E8FEB86659FD93)
_32, _29 = np.uint64(32), np.uint64(29)
_LOW = np.uint64(0xFFFFFFFF)


def slots(keys: np.ndarray, matches: np.ndarray, mask: int) -> np.ndarray:
    """Return the first slot of each entry. keys, matches: uint64[n]; result: int64[n]."""
    mixed = (keys * _MIX_A) ^ (matches * _MIX_B)
    mixed ^= mixed >> _32
    mixed *= _MIX_C
    mixed ^= mixed >> _29
    return (mixed & np.uint64(mask)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Batch:
    """Entries as columns: key uint64[n], match uint64[n], verdict uint64[n]."""

    keys: np.ndarray
    matches: np.ndarray
    verdicts: np.ndarray

    @classmethod
    def of(cls, keys: Iterable[int], matches: Iterable[int], verdicts: Iterable[int]) -> "Batch":
        """Make one of numbers."""
        return cls(*(np.fromiter(column, np.uint64) for column in (keys, matches, verdicts)))

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, which: np.ndarray) -> "Batch":
        """Return the entries at some places, or where a mask is true."""
        return Batch(self.keys[which], self.matches[which], self.verdicts[which])


@dataclass(frozen=True, slots=True)
class Plan:
    """A change that fits: entries and where they go, in two steps."""

    steps: tuple[tuple[Batch, np.ndarray], ...]
    added: int


class Entries:
    """Policy entries in `rows` policy_entry[a power of two]."""

    def __init__(
        self,
        rows: np.ndarray,
        clock: Callable[[], float] = time.monotonic,
        extents: Callable[[], Iterable[tuple[int, int]]] | None = None,
        most: int = MOST,
    ) -> None:
        """Read back what stands. extents(): parts that are not holes; most: entries accepted."""
        words = rows.view(np.uint64).reshape(-1, 2)
        self._keys, self._seconds = words[:, 0], words[:, 1]
        self._mask, self._clock, self.most = len(rows) - 1, clock, most
        self._extents = extents or (lambda: ((0, len(rows)),))
        self._rests_until = np.zeros(len(rows))  # on our clock
        self._taken = np.zeros(len(rows), bool)  # slots of a plan that is being made
        self._resting: deque[tuple[float, np.ndarray]] = deque()
        self.count = 0
        for first, low in self._parts():
            deleted = first + np.flatnonzero(low == DELETED)
            self.count += int(np.count_nonzero(low)) - len(deleted)
            if len(deleted):
                self._rest(deleted)

    def _parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield first slot and match words of each part that is not a hole."""
        for first, end in self._extents():
            yield first, self._seconds[first:end] & _LOW

    def used(self) -> np.ndarray:
        """Return the slots of everything that stands."""
        found = [
            first + np.flatnonzero((low != EMPTY) & (low != DELETED))
            for first, low in self._parts()
        ]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def all(self) -> Batch:
        """Return everything that stands, in no order."""
        return self.at(self.used())

    def at(self, places: np.ndarray) -> Batch:
        """Return the entries of some slots."""
        seconds = self._seconds[places]
        return Batch(self._keys[places], seconds & _LOW, seconds >> _32)

    def find(self, keys: np.ndarray, matches: np.ndarray) -> np.ndarray:
        """Return the slot of each entry, -1 where there is none. int64[n]."""
        found = np.full(len(keys), -1, np.int64)
        first = slots(keys, matches, self._mask)
        pending = np.arange(len(keys))
        for probe in range(PROBES):
            at = (first[pending] + probe) & self._mask
            low = self._seconds[at] & _LOW
            hit = (low == matches[pending]) & (self._keys[at] == keys[pending])
            found[pending[hit]] = at[hit]
            pending = pending[~hit & (low != EMPTY)]
            if not len(pending):
                break
        return found

    def plan(self, wanted: Batch) -> Plan:
        """Find slots for entries that are to stand. Raises TableFull; nothing is changed."""
        now = self._wake()
        where = self.find(wanted.keys, wanted.matches)
        stands = where >= 0
        if stands.any():
            verdicts = np.zeros(len(where), np.uint64)
            verdicts[stands] = self._seconds[where[stands]] >> _32
            changed = ~stands | (verdicts != wanted.verdicts)
            if not changed.all():
                wanted, where = wanted.part(changed), where[changed]
        fresh = np.flatnonzero(where < 0)
        if self.count + len(fresh) > self.most:
            raise TableFull(
                f"{self.count} policy entries and {len(fresh)} more: limit {self.most} "
                "(POLICY_ENTRIES_MOST): fewer ports or peers in the policies of this node's pods"
            )
        deny = (wanted.verdicts & np.uint64(ACTION)) == DENY
        try:
            for which in (fresh[deny[fresh]], fresh[~deny[fresh]]):
                where[which] = self._place(wanted.part(which), now)
        finally:
            self._taken[where[fresh][where[fresh] >= 0]] = False
        steps = tuple((wanted.part(which), where[which]) for which in (deny, ~deny) if which.any())
        return Plan(steps, len(fresh))

    def _place(self, batch: Batch, now: float) -> np.ndarray:
        """Return a free slot for each entry, marked as taken. Raises TableFull."""
        result = np.full(len(batch), -1, np.int64)
        first = slots(batch.keys, batch.matches, self._mask)
        pending = np.arange(len(batch))
        for probe in range(PROBES):
            at = (first[pending] + probe) & self._mask
            low = self._seconds[at] & _LOW
            rested = (self._rests_until[at] <= now) | (self._keys[at] == batch.keys[pending])
            free = ((low == EMPTY) | ((low == DELETED) & rested)) & ~self._taken[at]
            candidates = np.flatnonzero(free)
            chosen, which = np.unique(at[candidates], return_index=True)
            winners = candidates[which]
            result[pending[winners]] = chosen
            self._taken[chosen] = True
            left = np.ones(len(pending), bool)
            left[winners] = False
            pending = pending[left]
            if not len(pending):
                return result
        self._taken[result[result >= 0]] = False
        raise TableFull(
            f"no slot within {PROBES} probes (POLICY_PROBES_MAX) for {len(pending)} policy entries "
            f"beside {self.count}: fewer ports or peers in the policies of this node's pods"
        )

    def write(self, plan: Plan) -> None:
        """Do what was planned; nothing else may have changed since."""
        for batch, where in plan.steps:
            self._keys[where] = batch.keys
            self._seconds[where] = batch.matches | (batch.verdicts << _32)
        self.count += plan.added

    def delete(self, keys: np.ndarray, matches: np.ndarray) -> int:
        """Delete entries, those of them that stand; return how many."""
        where = self.find(keys, matches)
        where = np.unique(where[where >= 0])
        self.free(where)
        return len(where)

    def free(self, where: np.ndarray) -> None:
        """Delete the entries of some slots."""
        if len(where):
            self._seconds[where] = DELETED
            self.count -= len(where)
            self._rest(where)

    def keep(self, wanted: Batch) -> int:
        """Delete everything that is not among these; return how much that was."""
        where = self.find(wanted.keys, wanted.matches)
        gone = np.setdiff1d(self.used(), where)
        self.free(gone)
        return len(gone)

    def _rest(self, where: np.ndarray) -> None:
        until = self._clock() + REST_S
        self._rests_until[where] = until
        self._resting.append((until, where))

    def _wake(self) -> float:
        """Make rested slots that end a run empty; return the time."""
        now = self._clock()
        while self._resting and self._resting[0][0] <= now:
            ends = self._resting.popleft()[1]
            ends = ends[(self._seconds[(ends + 1) & self._mask] & _LOW) == EMPTY]
            while len(ends):
                low = self._seconds[ends] & _LOW
                ends = ends[(low == DELETED) & (self._rests_until[ends] <= now)]
                self._seconds[ends] = EMPTY
                ends = (ends - 1) & self._mask
        return now
