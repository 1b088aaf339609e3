"""The one writer of services: frontends, service rows, backends, their lists and Maglev tables.

Rule: readers never wait and never meet a half: first what is pointed at is written, then the one
word that points; what is no longer pointed at goes last, in `commit`, and rests before reuse.

Theory. A service is known by a name that the caller chooses, and keeps its row for as long.
Backends are interned by (address, port, protocol): a pod behind ten services is one row with one
state. The caller says the whole row (ServiceRow), the writer takes hold of what is new, stores the
words, lets go of what is old. On start all that stands is read back without names; a name takes
over the row to which its frontends lead, so that numbers which connections and affinities remember
stay right, and `settle` takes away what nobody claimed. All of that also when the predecessor died
at any point.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from dataplane.tables.errors import TableFull
from dataplane.tables.flow_generation import FlowGeneration
from dataplane.tables.frontends import Frontends, Key
from dataplane.tables.parts import Parts, Rows
from dataplane.tables.shm import Shm
from xdp.abi import value

EMPTY = value("BACKEND_EMPTY")
ACTIVE = value("BACKEND_ACTIVE")
TERMINATING = value("BACKEND_TERMINATING")
WORDS = ("sources", "inside", "outside", "inside_table", "outside_table")

Range = tuple[int, int, int, int]
"""A source range: address and mask, high and low halves."""


@dataclass(frozen=True)
class Table:
    """A Maglev table over backends, known by what it is made from.

    fill: returns it as positions of `targets`, uint32[size]; called only when it is written.
    """

    targets: tuple[Key, ...]
    weights: tuple[int, ...]
    fill: Callable[[], np.ndarray] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """What one row says. Lists may name a backend several times, for its weight.

    active and draining: every backend that the row or its connections know, each once.
    """

    flags: int = 0
    affinity_s: int = 0
    inside: tuple[Key, ...] = ()
    outside: tuple[Key, ...] = ()
    inside_table: Table | None = None
    outside_table: Table | None = None
    sources: tuple[Range, ...] = ()
    active: tuple[Key, ...] = ()
    draining: tuple[Key, ...] = ()


@dataclass(slots=True)
class _Standing:
    """A service as it stands. says: None where only its row is known, from before the start."""

    row: int
    words: dict[str, int]
    says: ServiceRow | None = None


@dataclass(slots=True)
class _Backend:
    """A backend and how many services count on it."""

    row: int
    active: int = 0
    draining: int = 0


class ServiceWriter:
    """Writer of all tables of services in a writable Shm."""

    def __init__(self, shm: Shm, clock: Callable[[], float] = time.monotonic) -> None:
        """Read back what stands."""
        self._shm = shm
        self._flows = FlowGeneration(shm)
        self._rows = shm.services
        self._states = shm.backends["state"]
        self._frontends = Frontends(shm.frontends, clock, shm.extents("frontends"))
        led = set(self._frontends.services.values()) - {0}
        self._orphans = {
            row: _Standing(row, {name: int(self._rows[row][name]) for name in WORDS}) for row in led
        }
        self._unclaimed = set(self._frontends.services)
        self._read_parts(clock)
        touched = _filled(shm, "services", ("inside", "outside", "flags"))
        self._service_rows = Rows(len(self._rows), "services", led, touched, clock)
        self._read_backends(clock)
        self._filled: tuple[Table, np.ndarray] | None = None
        self._services: dict[str, _Standing] = {}
        self._dropped: dict[Key, int] = {}
        self._removed: list[_Standing] = []
        # A predecessor may have died between its last change and commit().
        self._changed = self._frontends_changed = True

    def _read_parts(self, clock: Callable[[], float]) -> None:
        shm, stand = self._shm, self._orphans.values()

        def used(*names: str) -> list[int]:
            return [one.words[name] for one in stand for name in names if one.words[name]]

        lists = used("inside", "outside")
        tables = used("inside_table", "outside_table")
        few = "fewer endpoints, or smaller weights"
        self._lists = Parts(shm.backend_lists, "backend lists (BACKEND_LISTS)", few, lists, clock)
        small = "set services.maglev_size lower, or fewer services with Maglev"
        self._tables = Parts(shm.maglev, "Maglev tables (MAGLEV_WORDS)", small, tables, clock)
        short = "shorter lists in loadBalancerSourceRanges"
        self._sources = Parts(
            shm.source_ranges, "source ranges (SOURCE_RANGES_MAX)", short, used("sources"), clock
        )
        self._parts = {
            "sources": self._sources,
            "inside": self._lists,
            "outside": self._lists,
            "inside_table": self._tables,
            "outside_table": self._tables,
        }

    def _read_backends(self, clock: Callable[[], float]) -> None:
        shm = self._shm
        rows = shm.backends
        self._hi, self._lo = rows["hi"], rows["lo"]
        self._port, self._protocol = rows["port"], rows["protocol"]
        self._backends: dict[Key, _Backend] = {}
        self._idle: set[Key] = set()
        self._gone: dict[Key, int] = {}  # rows at rest, by what they were
        touched = _filled(shm, "backends", ("state", "hi", "lo"))
        for row in touched:
            key = self._key(row)
            if self._states[row] == EMPTY:
                self._gone[key] = row
            elif key in self._backends:
                self._states[row] = EMPTY  # cannot be, and must not stay
            else:
                self._backends[key] = _Backend(row)
        used = [backend.row for backend in self._backends.values()]
        self._backend_rows = Rows(len(rows), "backends", used, touched, clock)

    # --- services ---------------------------------------------------------------------------------

    def set_service(self, name: str, says: ServiceRow, likely: Iterable[Key] = ()) -> bool:
        """Make a service what it should be; return whether something changed.

        likely: frontends that will be its own, by which it finds the row that it had before a
        restart. Raises TableFull; then the service is what it was.
        """
        stands = self._services.get(name) or self._adopt(likely)
        if stands is not None and stands.says == says:
            return False
        held: list[tuple[Key, bool]] = []
        words: dict[str, int] = {}
        try:
            for keys, active in ((says.active, True), (says.draining, False)):
                for key in keys:
                    self._hold(key, active)
                    held.append((key, active))
            self._put(says, words)
            if stands is None:
                stands = _Standing(self._service_rows.take(), {})
        except TableFull:
            self._let_go(held, words)
            if stands is not None and name not in self._services:
                self._orphans[stands.row] = stands
            raise
        before = stands.says
        changed = self._store(stands, says, words)
        self._services[name] = stands
        if before is not None:
            self._release(before)
        self._follow(says, before)
        self._changed |= changed or before != says
        return changed or before != says

    def _adopt(self, likely: Iterable[Key]) -> _Standing | None:
        if not self._orphans:
            return None
        for key in likely:
            if key in self._unclaimed:
                found = self._orphans.pop(self._frontends.services[key], None)
                if found is not None:
                    return found
        return None

    def _put(self, says: ServiceRow, words: dict[str, int]) -> None:
        """Write lists, tables and ranges as new parts; `words` gets what is held."""
        words["sources"] = self._sources.put(_ranges(says.sources, self._shm.source_ranges.dtype))
        for name, keys in (("inside", says.inside), ("outside", says.outside)):
            words[name] = self._lists.put(self._numbers(keys))
        for name, table in (
            ("inside_table", says.inside_table),
            ("outside_table", says.outside_table),
        ):
            words[name] = 0 if table is None else self._tables.put(self._content(table))

    def _content(self, table: Table) -> np.ndarray:
        """Rows of backends as a Maglev table; the last one is kept, since rows come in pairs."""
        if self._filled is None or self._filled[0] != table:
            self._filled = (table, table.fill())
        return self._numbers(table.targets)[self._filled[1]]

    def _numbers(self, keys: tuple[Key, ...]) -> np.ndarray:
        """Rows of backends that are held, uint32[len(keys)]."""
        known = self._backends
        return np.fromiter((known[key].row for key in keys), np.uint32, len(keys))

    def _let_go(self, held: list[tuple[Key, bool]], words: dict[str, int]) -> None:
        for key, active in held:
            self._unhold(key, active)
        for name, word in words.items():
            self._parts[name].drop(word)

    def _store(self, stands: _Standing, says: ServiceRow, words: dict[str, int]) -> bool:
        """Write the row and let go of its old parts; return whether something changed."""
        row = self._rows[stands.row]
        changed = False
        if row["flags"] != says.flags:  # which also decide what uplinks steer
            row["flags"] = says.flags
            self._frontends_changed = changed = True
        row["affinity_s"] = says.affinity_s
        for name in WORDS:
            if row[name] != words[name]:
                row[name] = words[name]
                changed = True
        for name, word in stands.words.items():
            self._parts[name].drop(word)
        stands.words, stands.says = words, says
        return changed

    def remove_service(self, name: str) -> bool:
        """Take a service away with the next commit; False when there is none."""
        stands = self._services.pop(name, None)
        if stands is None:
            return False
        self._removed.append(stands)
        self._changed = True
        return True

    def row_of(self, name: str) -> int:
        """Row of a service; 0: there is none."""
        stands = self._services.get(name)
        return stands.row if stands else 0

    def names(self) -> dict[str, int]:
        """Return every service's row, by name."""
        return {name: stands.row for name, stands in self._services.items()}

    # --- frontends --------------------------------------------------------------------------------

    def set_frontend(self, key: Key, name: str) -> bool:
        """Lead a frontend to a service; return whether something changed. Raises TableFull."""
        self._unclaimed.discard(key)
        self._dropped.pop(key, None)
        row = self._services[name].row
        if self._frontends.services.get(key) == row:
            return False
        self._frontends.set(key, row)
        self._changed = self._frontends_changed = True
        return True

    def drop_frontend(self, key: Key) -> None:
        """Take a frontend away with the next commit, unless it is set again before."""
        if key in self._frontends.services:
            self._dropped[key] = self._frontends.services[key]

    # --- backends ---------------------------------------------------------------------------------

    def _hold(self, key: Key, active: bool) -> None:
        found = self._backends.get(key)
        if found is None:
            found = self._backends[key] = _Backend(self._take_row(key))
            self._states[found.row] = ACTIVE if active else TERMINATING
        if active:
            found.active += 1
        else:
            found.draining += 1

    def _take_row(self, key: Key) -> int:
        """Return the row that a backend had not long ago, or another. Raises TableFull."""
        row = self._gone.pop(key, 0)
        if row and self._backend_rows.take_up(row):
            return row
        row = self._backend_rows.take()
        before = self._key(row)
        if self._gone.get(before) == row:
            del self._gone[before]
        self._hi[row], self._lo[row], self._port[row], self._protocol[row] = key
        return row

    def _key(self, row: int) -> Key:
        address = (self._hi.item(row), self._lo.item(row))
        return (*address, self._port.item(row), self._protocol.item(row))

    def _unhold(self, key: Key, active: bool) -> None:
        found = self._backends[key]
        if active:
            found.active -= 1
        else:
            found.draining -= 1
        if not found.active and not found.draining:
            self._idle.add(key)

    def _release(self, says: ServiceRow) -> None:
        for key in says.active:
            self._unhold(key, True)
        for key in says.draining:
            self._unhold(key, False)

    def _follow(self, *rows: ServiceRow | None) -> None:
        """Bring the states of these rows' backends in line with who counts on them."""
        for says in rows:
            if says is None:
                continue
            for keys in (says.active, says.draining):
                for key in keys:
                    backend = self._backends[key]
                    if not backend.active and not backend.draining:
                        continue  # goes with commit()
                    state = ACTIVE if backend.active else TERMINATING
                    if self._states[backend.row] != state:
                        self._states[backend.row] = state
                        self._changed = True

    # --- the end of a change ----------------------------------------------------------------------

    def settle(self) -> None:
        """Take away, with the next commit, what stood at the start and nobody has claimed."""
        for key in self._unclaimed:
            self.drop_frontend(key)
        self._unclaimed.clear()
        self._removed += self._orphans.values()
        self._orphans = {}
        self._idle |= {
            key for key, one in self._backends.items() if not one.active and not one.draining
        }
        self._changed |= bool(self._removed or self._idle)

    def commit(self) -> bool:
        """Do the deletions and tell readers; return whether something changed."""
        for key, row in self._dropped.items():
            if self._frontends.services.get(key) == row:
                self._frontends.delete(key)
                self._changed = self._frontends_changed = True
        self._dropped.clear()
        for stands in self._removed:
            for name, word in stands.words.items():
                self._parts[name].drop(word)
            self._service_rows.give(stands.row)
            if stands.says is not None:
                self._release(stands.says)
                self._follow(stands.says)
        self._removed.clear()
        for key in self._idle:
            backend = self._backends[key]
            if not backend.active and not backend.draining:
                self._states[backend.row] = EMPTY
                self._backend_rows.give(backend.row)
                self._gone[key] = backend.row
                del self._backends[key]
        self._idle.clear()
        control = self._shm.control[0]
        if self._frontends_changed:
            control["frontends_generation"] += 1
        changed = self._changed
        if changed:
            control["judgement"] += 1
            self._flows.advance()
        self._changed = self._frontends_changed = False
        return changed

    def usage(self) -> dict[str, tuple[int, int]]:
        """Return (in use, limit) of each table."""
        shm = self._shm
        return {
            "frontends": (len(self._frontends.services), len(shm.frontends)),
            "services": (self._service_rows.used, len(self._rows) - 1),
            "backends": (self._backend_rows.used, len(shm.backends) - 1),
            "backend_lists": (self._lists.used, len(shm.backend_lists)),
            "maglev": (self._tables.used, len(shm.maglev)),
            "source_ranges": (self._sources.used, len(shm.source_ranges)),
        }


def _ranges(sources: tuple[Range, ...], dtype: np.dtype) -> np.ndarray:
    content = np.zeros(len(sources), dtype)
    for n, (hi, lo, mask_hi, mask_lo) in enumerate(sources):
        row = content[n]
        row["hi"], row["lo"], row["mask_hi"], row["mask_lo"] = hi, lo, mask_hi, mask_lo
    return content


def _filled(shm: Shm, name: str, columns: tuple[str, ...]) -> list[int]:
    """Rows of a table in which something stands or has stood."""
    rows = getattr(shm, name)
    found: list[int] = []
    for first, end in shm.extents(name):
        part = rows[first:end]
        some = np.zeros(len(part), bool)
        for column in columns:
            some |= part[column] != 0
        found += (first + np.flatnonzero(some)).tolist()
    return found
