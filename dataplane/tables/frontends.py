"""The writer of the frontends: what packets are sent to -> row of the service.

Rule: a slot's state is stored last; a slot that no longer counts rests before it is used again.

Theory. Open addressing with linear probing, at most FRONTEND_PROBES_MAX slots a lookup, as
fib6.py; the mix is that of kernels/service.py, and a test compares them. Moving a frontend to
another service is one store of its row number, so a reader finds the old service or the new one.
An IPv4 address stands in the low half; port 0 with protocol 0 is the address itself.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from dataplane.tables.adjacencies import REST_S
from dataplane.tables.errors import TableFull
from xdp.abi import CONST, value

MASK64 = (1 << 64) - 1
SLOTS_MASK = CONST["FRONTEND_SLOTS"] - 1
PROBES = CONST["FRONTEND_PROBES_MAX"]
EMPTY, USED, DELETED = value("SLOT_EMPTY"), value("SLOT_USED"), value("SLOT_DELETED")

Key = tuple[int, int, int, int]
"""Address (high and low half), port and IP protocol number: of a frontend, or of a backend."""


def slot(key: Key) -> int:
    """Return the first slot of a frontend."""
    hi, lo, port, protocol = key
    mixed = (hi * 0x9E3779B97F4A7C15) ^ (lo * 0xC2B2AE3D27D4EB4F)
    mixed = (mixed ^ ((port << 8 | protocol) * 0xD6E8FEB86659FD93)) & MASK64
    mixed ^= mixed >> 32
    mixed = (mixed * 0x9E3779B97F4A7C15) & MASK64
    mixed ^= mixed >> 29
    return mixed & SLOTS_MASK


class Frontends:
    """Frontends in `rows`, frontend[FRONTEND_SLOTS]."""

    def __init__(
        self,
        rows: np.ndarray,
        clock: Callable[[], float] = time.monotonic,
        extents: Iterable[tuple[int, int]] | None = None,
    ) -> None:
        """Read back what the rows hold. extents: parts of `rows` that are not holes."""
        self._clock = clock
        self._hi, self._lo = rows["hi"], rows["lo"]
        self._port, self._protocol = rows["port"], rows["protocol"]
        self._state, self._service = rows["state"], rows["service"]
        self._resting: deque[tuple[float, int]] = deque()
        self._at_rest: set[int] = set()
        self._at: dict[Key, int] = {}
        self.services: dict[Key, int] = {}
        for first, end in ((0, len(rows)),) if extents is None else extents:
            self._read_back(first, end)

    def _read_back(self, first: int, end: int) -> None:
        for at in (first + np.flatnonzero(self._state[first:end])).tolist():
            if self._state[at] == DELETED:
                self._rest(at)
                continue
            address = (self._hi.item(at), self._lo.item(at))
            key = (*address, self._port.item(at), self._protocol.item(at))
            self._at[key] = at
            self.services[key] = self._service.item(at)

    def set(self, key: Key, service: int) -> bool:
        """Point a frontend at a service; return whether it is new. Raises TableFull."""
        at = self._at.get(key)
        if at is not None:
            self._service[at] = service
            self.services[key] = service
            return False
        self._wake()
        first = slot(key)
        for probe in range(PROBES):
            at = (first + probe) & SLOTS_MASK
            state = self._state.item(at)
            if state == EMPTY or (state == DELETED and at not in self._at_rest):
                break
        else:
            raise TableFull(
                f"the table of frontends has no slot within {PROBES} probes for another one: "
                f"{len(self._at)} in {SLOTS_MASK + 1} slots (FRONTEND_SLOTS): fewer services, or "
                "fewer addresses in services.node_port_addresses"
            )
        self._hi[at], self._lo[at], self._port[at], self._protocol[at] = key
        self._service[at] = service
        self._state[at] = USED
        self._at[key] = at
        self.services[key] = service
        return True

    def delete(self, key: Key) -> bool:
        """Take a frontend away; False when there is none."""
        at = self._at.pop(key, None)
        if at is None:
            return False
        del self.services[key]
        self._wake()
        self._state[at] = DELETED
        self._rest(at)
        return True

    def _rest(self, at: int) -> None:
        self._resting.append((self._clock(), at))
        self._at_rest.add(at)

    def _wake(self) -> None:
        """End the rest of slots whose time is over; those that end a run become empty."""
        latest = self._clock() - REST_S
        while self._resting and self._resting[0][0] <= latest:
            at = self._resting.popleft()[1]
            self._at_rest.discard(at)
            if self._state.item((at + 1) & SLOTS_MASK) != EMPTY:
                continue
            while self._state.item(at) == DELETED and at not in self._at_rest:
                self._state[at] = EMPTY
                at = (at - 1) & SLOTS_MASK
