"""Flows as columns: one array a member, a flow is an index.

Rule: in columns a flow stands as it is shown: source is who sent the packet, also of a reply.

Theory. A record of a ring (struct flow_record) is spread over arrays, because a question looks at
two or three members of very many flows. Times become wall-clock time, since clients ask by it.
`source_end` and `target_end` are numbers of pods in a directory (names.py), given when the flow is
read: addresses are used again, names of the moment stay true. `ring` and `position` together are a
flow's name for ever, within an epoch.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from xdp.abi import CONST, DTYPE, value

REPLY = CONST["EVENT_REPLY"]
AUDITED = CONST["CONNECTION_FLAG_AUDITED"]
DENIED = CONST["CONNECTION_FLAG_DENIED"]
NEW, DROP = value("EVENT_NEW"), value("EVENT_DROP")
CHANGE, END, SAMPLE = value("EVENT_CHANGE"), value("EVENT_END"), value("EVENT_SAMPLE")
NOBODY = -1  # as an end: no pod that is known

FIELDS: dict[str, np.dtype] = {
    **{
        name: DTYPE["flow_record"][name]
        for name in DTYPE["flow_record"].names or ()
        if name != "time_ns"
    },
    "wall_ns": np.dtype("<i8"),  # since the epoch of the clock
    "position": np.dtype("<u8"),
    "ring": np.dtype("u1"),
    "source_end": np.dtype("<i4"),
    "target_end": np.dtype("<i4"),
}
"""Name and dtype of every column."""

ADDRESSES = ("source", "target", "new_source")
_SWAPPED = (
    ("source_hi", "target_hi"),
    ("source_lo", "target_lo"),
    ("source_port", "target_port"),
    ("source_identity", "target_identity"),
)
ROW_BYTES = sum(dtype.itemsize for dtype in FIELDS.values())


@dataclass
class Columns:
    """`count` flows, in the order in which they were read. first: absolute number of the first."""

    arrays: dict[str, np.ndarray]
    count: int
    first: int = 0

    def __getattr__(self, name: str) -> np.ndarray:
        """Return a column, of `count` entries."""
        try:
            return self.arrays[name][: self.count]
        except KeyError:
            raise AttributeError(name) from None

    def part(self, start: int, end: int) -> "Columns":
        """Return flows start..end-1 without a copy."""
        arrays = {name: array[start:end] for name, array in self.arrays.items()}
        return Columns(arrays, end - start, self.first + start)

    def take(self, indexes: np.ndarray) -> "Columns":
        """Return some flows, copied."""
        arrays = {name: array[: self.count][indexes] for name, array in self.arrays.items()}
        return Columns(arrays, len(indexes), self.first)

    def rows(self) -> Iterator[dict[str, int]]:
        """Yield each flow as numbers."""
        names = tuple(self.arrays)
        columns = (self.arrays[name][: self.count].tolist() for name in names)
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))


def empty(size: int, first: int = 0) -> Columns:
    """Return room for `size` flows."""
    arrays = {name: np.zeros(size, dtype) for name, dtype in FIELDS.items()}
    return Columns(arrays, 0, first)


def spread(records: np.ndarray, ring: int, position: int, wall_minus_monotonic_ns: int) -> Columns:
    """Return records of a ring (flow_record[n]) as columns; ends are not known yet."""
    count = len(records)
    arrays = {name: records[name].copy() for name in FIELDS if name in (records.dtype.names or ())}
    arrays["wall_ns"] = records["time_ns"].astype(np.int64) + wall_minus_monotonic_ns
    arrays["position"] = np.arange(position, position + count, dtype=np.uint64)
    arrays["ring"] = np.full(count, ring, np.uint8)
    for name in ("source_end", "target_end"):
        arrays[name] = np.full(count, NOBODY, np.int32)
    _turn_replies(arrays)
    return Columns(arrays, count)


def _turn_replies(arrays: dict[str, np.ndarray]) -> None:
    """Swap the ends of replies where the record has the connection's direction."""
    turned = np.flatnonzero((arrays["flags"] & REPLY != 0) & (arrays["kind"] == CHANGE))
    if not len(turned):
        return
    for one, other in _SWAPPED:
        kept = arrays[one][turned]
        arrays[one][turned] = arrays[other][turned]
        arrays[other][turned] = kept
    for half in ("hi", "lo"):  # what was masqueraded is their target now
        arrays[f"new_source_{half}"][turned] = arrays[f"source_{half}"][turned]
    arrays["new_source_port"][turned] = arrays["source_port"][turned]


def joined(parts: Iterable[Columns]) -> Columns:
    """Return the flows of several parts, by time."""
    some = list(parts)
    if len(some) == 1:
        return some[0]
    if not some:
        return empty(0)
    arrays = {name: np.concatenate([getattr(one, name) for one in some]) for name in FIELDS}
    order = np.argsort(arrays["wall_ns"], kind="stable")
    return Columns({name: array[order] for name, array in arrays.items()}, len(order))


def clock_offset_ns() -> int:
    """Return what to add to CLOCK_MONOTONIC to have the wall clock."""
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    wall = time.time_ns()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    return wall - (before + after) // 2
