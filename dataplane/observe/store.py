"""The flows that are kept in memory, newest last.

Rule: a flow has an absolute number; who asks for one that is gone is told how many are gone.

Theory. Chunks of columns: a full one is never changed, the oldest one goes when there are more than
the capacity asks for. So a question may look at chunks while flows come in, memory is bounded and
known beforehand, and nothing is moved. Questions go chunk by chunk from the newest, and end when
they have enough.
"""

from collections import deque
from collections.abc import Iterator

from dataplane.observe.columns import FIELDS, Columns, empty

CHUNK = 32768  # flows


class Store:
    """At least `capacity` flows, once so many have come."""

    def __init__(self, capacity: int) -> None:
        """capacity: flows, rounded up to chunks."""
        self._most = -(-capacity // CHUNK) + 1  # the newest chunk is not full
        self.capacity = (self._most - 1) * CHUNK
        self._chunks: deque[Columns] = deque([empty(CHUNK)])
        self.head = 0  # flows ever appended

    @property
    def tail(self) -> int:
        """Absolute number of the oldest flow."""
        return self._chunks[0].first

    def __len__(self) -> int:
        return self.head - self.tail

    def append(self, flows: Columns) -> None:
        """Add flows behind the newest."""
        done = 0
        while done < flows.count:
            chunk = self._chunks[-1]
            if chunk.count == CHUNK:
                chunk = self._next()
            room = min(CHUNK - chunk.count, flows.count - done)
            at = chunk.count
            for name in FIELDS:
                chunk.arrays[name][at : at + room] = flows.arrays[name][done : done + room]
            chunk.count += room
            self.head += room
            done += room

    def _next(self) -> Columns:
        if len(self._chunks) == self._most:
            self._chunks.popleft()  # its memory lives as long as somebody still looks at it
        self._chunks.append(empty(CHUNK, self.head))
        return self._chunks[-1]

    def newest(self, end: int | None = None) -> Iterator[Columns]:
        """Yield parts from the newest to the oldest; end: absolute number to stop before."""
        for chunk in reversed(list(self._chunks)):
            count = chunk.count if end is None else min(chunk.count, end - chunk.first)
            if count > 0:
                yield chunk.part(0, count)

    def oldest(self, start: int = 0) -> Iterator[Columns]:
        """Yield parts from absolute number `start` (or the oldest) to the newest."""
        for chunk in list(self._chunks):
            skipped = max(0, start - chunk.first)
            if skipped < chunk.count:
                yield chunk.part(skipped, chunk.count)
