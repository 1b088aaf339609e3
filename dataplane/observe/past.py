"""Answers questions about flows that are on disk.

Rule: a question about files means what it means to a server.

Theory. Each file has names of its own, so filters are made for each. The last N that fit are looked
for from the newest file backwards; files whose name says that they end before `since` are not read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataplane.observe.filters import Filter
from dataplane.observe.history import Past, files, overlapping
from dataplane.observe.message import Flows
from dataplane.observe.query import Found, Question, field_mask, match, question


def answers(path: Path, request: Any) -> Iterator[Any]:
    """Yield GetFlowsResponses, oldest first. Raises HistoryError or FilterError."""
    wanted, mask = question(request), field_mask(request)
    for past, found in _search(overlapping(files(path), wanted.since_ns), wanted, request):
        flows = Flows(past.directory, past.book, past.node, past.epoch)
        yield from flows.make(found.flows.take(found.indexes), found.views, mask)


def _search(paths: list[Path], wanted: Question, request: Any) -> Iterator[tuple[Past, Found]]:
    left = wanted.number or 1 << 62
    last = bool(wanted.number) and not wanted.first
    kept: list[tuple[Path, int]] = []
    for path in reversed(paths) if last else paths:
        past, found = _find(path, wanted, request)
        found = found.last(left) if last else found.first(left)
        left -= len(found.indexes)
        if last:  # oldest first: what is found is looked for again rather than kept in memory
            kept.append((path, len(found.indexes)))
        else:
            yield past, found
        if left <= 0:
            break
    for path, count in reversed(kept):
        if count:
            past, found = _find(path, wanted, request)
            yield past, found.last(count)


def _find(path: Path, wanted: Question, request: Any) -> tuple[Past, Found]:
    past = Past(path)
    fits = Filter(request.whitelist, request.blacklist, past.directory, past.book, past.node)
    return past, match(past.flows, wanted, fits)
