"""Answers a question about flows: which ones, in which order, from when to when.

Rule: a question sees a flow at most once, oldest first, and is told what was lost meanwhile.

Theory. The last N that fit are looked for from the newest chunk backwards, the first N from the
oldest on, so a question costs what it shows rather than what is kept. Who follows gets the flows
that come behind that, each part as it comes. Meanings are those of Hubble's GetFlowsRequest.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataplane.observe.collector import Collector, Loss
from dataplane.observe.columns import Columns
from dataplane.observe.filters import Filter, FilterError
from dataplane.observe.protocol import message
from dataplane.observe.store import Store

WAIT_S = 0.5  # a question that follows looks so often whether its client is still there
ALL_NS = (0, (1 << 63) - 1)


@dataclass(frozen=True)
class Question:
    """number 0: no limit; first: the first ones instead of the last; times in wall-clock ns."""

    number: int = 0
    first: bool = False
    since_ns: int = ALL_NS[0]
    until_ns: int = ALL_NS[1]
    follow: bool = False


def question(request: Any) -> Question:
    """Return what a GetFlowsRequest asks for. Raises FilterError."""
    since, until = (
        _nanoseconds(request, name) if request.HasField(name) else otherwise
        for name, otherwise in zip(("since", "until"), ALL_NS, strict=True)
    )
    if since > until:
        raise FilterError(f"since ({since} ns) is behind until ({until} ns)")
    if request.first and request.follow:
        raise FilterError("first and follow exclude each other")
    return Question(request.number, request.first, since, until, request.follow)


def _nanoseconds(request: Any, name: str) -> int:
    try:
        return int(getattr(request, name).ToNanoseconds())
    except ValueError as error:
        raise FilterError(f"{name}: {error}") from error


def field_mask(request: Any) -> Any:
    """Return the request's mask, None: everything. Raises FilterError."""
    if not request.HasField("field_mask") or not request.field_mask.paths:
        return None
    mask = request.field_mask
    if not mask.IsValidForDescriptor(message("flow.Flow").DESCRIPTOR):
        raise FilterError(f"invalid field mask: {', '.join(mask.paths)}")
    return mask


@dataclass(frozen=True)
class Found:
    """Flows of a part that fit: indexes (rising) and the view of each (views.py)."""

    flows: Columns
    indexes: np.ndarray
    views: np.ndarray

    def last(self, count: int) -> "Found":
        """Return the last so many."""
        return Found(self.flows, self.indexes[-count:], self.views[-count:])

    def first(self, count: int) -> "Found":
        """Return the first so many."""
        return Found(self.flows, self.indexes[:count], self.views[:count])


def search(store: Store, wanted: Question, fits: Filter, end: int) -> Iterator[Found]:
    """Yield what fits among the flows before absolute number `end`, oldest first."""
    if wanted.number and not wanted.first:
        yield from _last(store, wanted, fits, end)
        return
    left = wanted.number or 1 << 62
    for part in store.oldest():
        if part.first >= end or left <= 0:
            break
        found = match(part.part(0, min(part.count, end - part.first)), wanted, fits)
        if len(found.indexes):
            found = found.first(left)
            left -= len(found.indexes)
            yield found


def _last(store: Store, wanted: Question, fits: Filter, end: int) -> Iterator[Found]:
    parts, left = [], wanted.number
    for part in store.newest(end):
        found = match(part, wanted, fits).last(left)
        if len(found.indexes):
            parts.append(found)
            left -= len(found.indexes)
        if left <= 0 or int(part.wall_ns.max()) < wanted.since_ns:
            break
    yield from reversed(parts)


def match(part: Columns, wanted: Question, fits: Filter) -> Found:
    """Return what fits of a part."""
    in_time = np.flatnonzero((part.wall_ns >= wanted.since_ns) & (part.wall_ns <= wanted.until_ns))
    if len(in_time) == part.count:
        shown = fits.choose(part)
        indexes = np.flatnonzero(shown >= 0)
        return Found(part, indexes, shown[indexes])
    if not len(in_time):
        return Found(part, in_time, in_time)
    flows = part.take(in_time)
    shown = fits.choose(flows)
    indexes = np.flatnonzero(shown >= 0)
    return Found(flows, indexes, shown[indexes])


def ask(
    source: Collector, wanted: Question, fits: Filter, alive: Callable[[], bool]
) -> Iterator[Found | Loss]:
    """Yield what a question finds, what was lost since the first of it, and what comes.

    That only with `follow`, until not alive().
    """
    store = source.store
    end = store.head
    told = source.lost
    if wanted.number or not wanted.follow or wanted.since_ns:
        first_ns = ALL_NS[1]
        for found in search(store, wanted, fits, end):
            first_ns = min(first_ns, int(found.flows.wall_ns[found.indexes[0]]))
            yield found
        for loss in list(source.losses):
            if first_ns <= loss.wall_ns <= wanted.until_ns and loss.at <= end:
                yield loss
    while wanted.follow and alive() and not source.stopped:
        with source.changed:
            if store.head == end and not source.stopped:
                source.changed.wait(WAIT_S)
        head = store.head
        if source.lost != told:
            yield from [loss for loss in list(source.losses) if loss.at >= end]
            told = source.lost
        if store.tail > end:
            yield Loss(-1, store.tail - end, store.tail, 0)
        for part in store.oldest(end):
            if part.first >= head:
                break
            found = match(part.part(0, min(part.count, head - part.first)), wanted, fits)
            if len(found.indexes):
                yield found
        end = head
