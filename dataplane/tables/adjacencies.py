"""Rows of next hops, interned by content.

Rule: a row that a route may point to is never changed; a freed row rests before it is used again.

Theory. A worker reads a route and then its row, a moment apart. When a neighbour's MAC changes, a
new row is made and the routes move to it; the old row rests REST_S, thousands of vectors, before it
may hold something else. On start the rows in shared memory are read back, so a restarted agent
finds its rows where the routes point. Row 0 is "no route". An adjacency serves one address family
only, because its template names the EtherType.
"""

import time
from collections.abc import Callable

import numpy as np

from dataplane.tables.errors import TableFull
from dataplane.tables.model import Adjacency
from dataplane.tables.rewrite import template
from xdp.abi import CONST

REST_S = 2.0
MASK64 = (1 << 64) - 1


class Adjacencies:
    """Interning writer of the adjacency and rewrite tables."""

    def __init__(
        self, rows: np.ndarray, rewrites: np.ndarray, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """rows: adjacency[ADJACENCIES_MAX]; rewrites: uint8[ADJACENCIES_MAX, HEADER_MAX]."""
        self._rows, self._rewrites, self._clock = rows, rewrites, clock
        self._by_content: dict[bytes, int] = {}
        self._contents: dict[int, bytes] = {}
        self._resting: list[tuple[float, int]] = []
        kinds = rows["kind"]
        for index in np.flatnonzero(kinds).tolist():
            content = rows[index].tobytes() + rewrites[index].tobytes()
            self._by_content.setdefault(content, index)
            self._contents[index] = content
        self._free = [index for index in range(len(rows) - 1, 0, -1) if not kinds[index]]

    def __len__(self) -> int:
        return len(self._contents)

    def intern(self, adjacency: Adjacency, family: int) -> int:
        """Return the row that holds this adjacency for packets of a family (4 or 6)."""
        row, header = self._encode(adjacency, family)
        content = row.tobytes() + header.tobytes()
        found = self._by_content.get(content)
        if found is not None:
            return found
        index = self._take()
        self._rewrites[index] = header
        self._rows[index] = row
        self._by_content[content] = index
        self._contents[index] = content
        return index

    def keep(self, used: set[int]) -> None:
        """Free every row but those in use."""
        now = self._clock()
        for index in [index for index in self._contents if index not in used]:
            content = self._contents.pop(index)
            if self._by_content.get(content) == index:
                del self._by_content[content]
            self._resting.append((now, index))

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if self._resting and self._clock() - self._resting[0][0] >= REST_S:
            return self._resting.pop(0)[1]
        raise TableFull(
            f"the adjacency table is full: {len(self._contents)} in use, {len(self._resting)} "
            f"resting, limit {len(self._rows) - 1} (ADJACENCIES_MAX): fewer nodes or pods a node"
        )

    def _encode(self, adjacency: Adjacency, family: int) -> tuple[np.ndarray, np.ndarray]:
        raw, total = template(adjacency, family)
        header = np.zeros(CONST["HEADER_MAX"], np.uint8)
        header[: len(raw)] = np.frombuffer(raw, np.uint8)
        row = np.zeros((), self._rows.dtype)
        row["kind"], row["port"], row["mtu"] = adjacency.kind, adjacency.port, adjacency.mtu
        row["header_length"], row["outer_sum"] = len(raw), total
        if adjacency.tunnel:
            remote = int(adjacency.tunnel.remote)
            row["tunnel_family"] = adjacency.tunnel.remote.version
            row["remote_hi"], row["remote_lo"] = remote >> 64, remote & MASK64
        return row, header
