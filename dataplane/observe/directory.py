"""Who is who in flows: pods by number and by address.

Rule: a number means one pod as long as a flow may show it. One thread writes, others read.

Theory. A flow keeps the numbers of its two ends, so that a pod that is gone keeps its name in the
flows that it had. Addresses are looked up for a whole batch at once: a sorted array of keys and a
binary search; a key is a mix of both halves of an address, and what is found is compared with the
address itself. A pod that went gives its number back when the oldest flow that is kept is younger.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from dataplane.observe.columns import NOBODY, Columns

Address = tuple[int, int, int]  # family, upper and lower half
MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class End:
    """A pod. kind, workload: what runs it; number: of the endpoint, 0 on other nodes."""

    namespace: str
    name: str
    kind: str = ""
    workload: str = ""
    number: int = 0
    node: str = ""

    @property
    def here(self) -> bool:
        """Whether it is attached to this node."""
        return self.number != 0


class Directory:
    """Pods by number and address. version changes with every change."""

    def __init__(self) -> None:
        """Know nobody."""
        self.direct = False  # other nodes' pods are reached without a tunnel
        self.ends: list[End | None] = []
        self.version = 0
        self._numbers: dict[End, int] = {}
        self._at: dict[Address, int] = {}
        self._holders: dict[int, int] = {}  # number -> addresses
        self._gone: deque[tuple[int, int]] = deque()  # wall-clock ns, number
        self._free: list[int] = []
        self._arrays: tuple[np.ndarray, ...] | None = None
        self._here = (-1, np.zeros(1, bool))

    def number(self, end: End) -> int:
        """Return a pod's number, which it has from now on."""
        number = self._numbers.get(end)
        if number is None:
            if self._free:
                number = self._free.pop()
                self.ends[number] = end
            else:
                number = len(self.ends)
                self.ends.append(end)
            self._numbers[end] = number
            self.version += 1
        return number

    def hold(self, address: Address, end: End | None, now_ns: int) -> None:
        """Say who has an address from now on; None: nobody."""
        before = self._at.pop(address, None)
        if before is not None:
            self._holders[before] -= 1
            if not self._holders[before]:
                del self._holders[before]
                self._gone.append((now_ns, before))
        if end is not None:
            number = self.number(end)
            self._at[address] = number
            self._holders[number] = self._holders.get(number, 0) + 1
        self._arrays = None
        self.version += 1

    def forget(self, oldest_ns: int) -> None:
        """Take the numbers back of pods that went before the oldest flow that is kept."""
        while self._gone and self._gone[0][0] < oldest_ns:
            _, number = self._gone.popleft()
            end = self.ends[number]
            if number in self._holders or end is None:
                continue
            del self._numbers[end]
            self.ends[number] = None
            self._free.append(number)
            self.version += 1

    # --- questions --------------------------------------------------------------------------------

    def find(self, family: np.ndarray, hi: np.ndarray, lo: np.ndarray) -> np.ndarray:
        """Return the numbers of the pods that have these addresses now, NOBODY: none. int32[n]"""
        found = np.full(len(lo), NOBODY, np.int32)
        if not self._at:
            return found
        if self._arrays is None:
            self._arrays = self._sort()
        keys, families, his, los, numbers = self._arrays
        at = np.searchsorted(keys, _key(hi, lo))
        np.minimum(at, len(keys) - 1, out=at)
        same = (los[at] == lo) & (his[at] == hi) & (families[at] == family)
        found[same] = numbers[at[same]]
        return found

    def _sort(self) -> tuple[np.ndarray, ...]:
        rows = np.array([(*address, number) for address, number in self._at.items()], object)
        family, hi, lo = (rows[:, n].astype(np.uint64) for n in range(3))
        numbers = rows[:, 3].astype(np.int32)
        key = _key(hi, lo)
        order = np.argsort(key, kind="stable")
        return tuple(one[order] for one in (key, family.astype(np.uint8), hi, lo, numbers))

    def name(self, flows: Columns) -> None:
        """Give both ends of flows their numbers, where they have none yet."""
        for side in ("source", "target"):
            hi, lo = (flows.arrays[f"{side}_{half}"] for half in ("hi", "lo"))
            flows.arrays[f"{side}_end"][:] = self.find(flows.arrays["family"], hi, lo)

    def end(self, number: int) -> End | None:
        """Return a pod by its number."""
        return self.ends[number] if 0 <= number < len(self.ends) else None

    def who(self, fits: Callable[[End], bool]) -> np.ndarray:
        """Return for each number whether the pod fits, and False for NOBODY: bool[n + 1]."""
        ends = list(self.ends)  # more may come meanwhile
        found = np.zeros(len(ends) + 1, bool)  # [-1] is NOBODY's
        for number, end in enumerate(ends):
            found[number] = end is not None and fits(end)
        return found

    def here(self) -> np.ndarray:
        """Return for each number whether the pod is attached to this node: bool[n + 1]."""
        version, known = self._here
        if version != self.version:
            version, known = self.version, self.who(lambda end: end.here)
            self._here = version, known
        return known

    def namespaces(self) -> Iterable[str]:
        """Return the namespaces of all pods that are known."""
        return sorted({end.namespace for end in self.ends if end is not None})


def _key(hi: np.ndarray, lo: np.ndarray) -> np.ndarray:
    """Mix the halves of addresses; two addresses with one key are told apart by `find`'s check."""
    return lo ^ (hi * MIX)
