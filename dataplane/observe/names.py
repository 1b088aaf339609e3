"""DNS names by address, as this node's pods have asked for them.

Rule: a name that led to an address stays known here for a while after its time is over, because
flows of that time are still shown.

Theory. Workers learn names into shared memory (kernels/dns_learned.py). That is read only when
their counters say that something was learned, at most once in LOOK_NS, by a thread that is not in
anybody's way. The KEPT addresses that were seen last are remembered.
"""

import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

from dataplane.tables.names_view import NameReader
from dataplane.tables.shm import Shm

LOOK_NS = 2_000_000_000
KEPT = 65536
Address = IPv4Address | IPv6Address


class KnownNames:
    """Names by address. One thread calls turn(), any may ask."""

    def __init__(self, shm: Shm, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """Know nothing yet. clock: CLOCK_MONOTONIC in nanoseconds."""
        self._shm, self._reader, self._clock = shm, NameReader(shm, clock), clock
        self._mark = -1
        self._looked_ns = -LOOK_NS
        self._names: dict[tuple[int, int], tuple[str, ...]] = {}  # family, address

    def turn(self) -> None:
        """Look, if it is time and something was learned."""
        now = self._clock()
        if now - self._looked_ns < LOOK_NS:
            return
        self._looked_ns = now
        notes = self._shm.dns_notes
        mark = int(notes["learned"].sum()) + int(notes["renewed"].sum())
        if mark != self._mark:
            self._mark = mark
            self._read()

    def _read(self) -> None:
        found: dict[tuple[int, int], set[str]] = {}
        for one in self._reader.mappings():
            found.setdefault((one.address.version, int(one.address)), set()).add(
                one.name.rstrip(".")
            )
        for key, names in found.items():
            known = self._names.pop(key, ())  # what is seen again is the newest
            self._names[key] = tuple(sorted(names.union(known)))
        while len(self._names) > KEPT:
            del self._names[next(iter(self._names))]

    def of(self, family: int, hi: int, lo: int) -> tuple[str, ...]:
        """Return the names of an address, as Hubble writes them: without a dot at the end."""
        return self._names.get((family, hi << 64 | lo), ())
