"""Names as the forwarder keeps them while it runs: swept, watched, and remembered over a reboot.

Rule: what does not fit raises a warning that names the limit and the fix; nothing is lost silently.

Theory. Once a second addresses that have expired are forgotten and queries without an answer are
counted; every MARK_TURNS-th time live connections say which addresses they use. The tables lie on
tmpfs, so they outlive every process; a snapshot on disk lets them outlive the machine's reboot
too: a file of JSON lines, name and address with the time of day at which they expire, written
beside its place and renamed. It is read only where nothing has been learned yet.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np

from dataplane.engine.account import make_lane
from dataplane.kernels import dns_message as m
from dataplane.kernels.connections import FIRST, LIMIT
from dataplane.kernels.dns_sweep import expire, look_for_missing, mark, plant
from dataplane.kernels.rows import Rows
from dataplane.kernels.tables import Tables
from dataplane.tables.names import wire
from dataplane.tables.names_view import Mapping, NameReader
from xdp.abi import CONST

MARK_TURNS = 10
SAVE_TURNS = 30
FILE = "names.jsonl"
TICK_SHIFT = CONST["TICK_SHIFT"]
LIMITS = {
    "names_full": "no room for a name: NAMES_MAX",
    "addresses_full": "no room for an address: LEARNED_MAX",
    "address_names_full": "an address has more names than LEARNED_NAMES: the next to expire goes",
    "name_capped": "a name leads to more addresses than dns.addresses_max: raise it",
    "selectors_full": "a name fits more patterns than NAME_SELECTORS: some do not hold for it",
    "queries_displaced": "more queries wait than QUERIES_MAX: some answers will fit none",
    "copies_lost": "DNS messages passed uncounted: no core to read them in time (DNS_COPIES)",
}
"""Counter -> what is full."""


class Names:
    """Sweeper of names over the tables of one node."""

    def __init__(self, shm: Any, tables: Tables, trackers: list[Any], state_dir: Path) -> None:
        """tables: a view of our own, with a scratch; trackers: of the workers."""
        self._shm, self._tables, self._trackers = shm, tables, trackers
        self._lane = make_lane(shm, CONST["DNS_SWEEPER"])
        self._reader = NameReader(shm)
        self._file = state_dir / FILE
        self._turns = 0
        self._seen = self._reader.notes()
        self.restored = 0 if np.any(shm.learned_index) else self._restore()

    def sweep(self) -> list[str]:
        """Do what is due this second; return what has become full since the last time."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        tick = now >> TICK_SHIFT
        rows = np.flatnonzero(self._shm.learned_index)
        if len(rows) and self._turns % MARK_TURNS == 0:
            self._mark(tick)
        expire(self._tables.naming, self._lane.dns_notes, Rows(rows), len(rows), tick)
        look_for_missing(self._tables, self._lane, now)
        self._turns += 1
        if self._turns % SAVE_TURNS == 0:
            self.save()
        return self._warnings()

    def _mark(self, tick: int) -> None:
        for tracker in self._trackers:
            first = int(tracker.words[FIRST])
            end = first + int(tracker.words[LIMIT])
            mark(self._tables.naming, self._tables.connections, first, end, tick)

    def _warnings(self) -> list[str]:
        notes = self._reader.notes()
        found = []
        for name, text in LIMITS.items():
            more = notes[name] - self._seen[name]
            if more:
                which = self._capped() if name == "name_capped" else ""
                found.append(f"{text} ({more} times{which})")
        self._seen = notes
        return found

    def _capped(self) -> str:
        """Say which name has too many addresses."""
        found = [one["name"] for one in self._reader.names() if one["capped"]]
        more = f" and {len(found) - 1} more" if found[1:] else ""
        return f", {found[0]}{more}" if found else ""

    def view(self) -> dict[str, Any]:
        """Return gauges and counters as plain data."""
        return {
            "names": int(np.count_nonzero(self._shm.name_index)),
            "addresses": int(np.count_nonzero(self._shm.learned_index)),
            **self._reader.notes(),
        }

    # --- over a reboot ----------------------------------------------------------------------------

    def save(self) -> None:
        """Write what has been learned; an error is no reason to stop."""
        beside = self._file.with_suffix(".part")
        now = time.time()
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("w") as file:
                for one in self._reader.mappings():
                    file.write(json.dumps(_line(one, now)) + "\n")
                file.flush()
                os.fsync(file.fileno())
            beside.rename(self._file)

    def _restore(self) -> int:
        """Learn again what a snapshot says and is still true; return how many."""
        now, tick = time.time(), time.clock_gettime_ns(time.CLOCK_MONOTONIC) >> TICK_SHIFT
        count = 0
        for name, address, scope, until in _read(self._file):
            left = min(until - now, 7 * 86400.0)
            if left > 0 and self._plant(name, address, scope, tick, tick + _ticks(left)):
                count += 1
        return count

    def _plant(self, name: str, address: Any, scope: int, tick: int, expiry: int) -> bool:
        labels = [label for label in name.lower().rstrip(".").split(".") if label]
        text = wire(labels)
        if len(text) >= m.NAME_MOST or any(len(label) > m.LABEL_MOST for label in labels):
            return False
        scratch = self._tables.naming.scratch[0]
        scratch["name"][: len(text)] = np.frombuffer(text, np.uint8)
        scratch["name"][len(text)] = 0
        at = 0
        for n, label in enumerate(labels):
            scratch["offsets"][n] = at
            at += 1 + len(label)
        odd = int(re.fullmatch(r"[-_.a-z0-9]*", name.lower()) is None)
        whole = int(address)
        hi, lo = np.uint64(whole >> 64), np.uint64(whole & (1 << 64) - 1)
        return bool(
            plant(
                self._tables.naming, len(text) + 1, len(labels), odd, address.version, hi, lo,
                scope, tick, expiry,
            )
        )  # fmt: skip

    def compile(self) -> None:
        """Compile what a forwarder calls later (engine/warm.py)."""
        self.sweep()
        self._mark(0)
        self._plant("a", ip_address("192.0.2.1"), 0, 0, 1)


def _ticks(seconds: float) -> int:
    return int(seconds * 1e9) >> TICK_SHIFT


def _line(one: Mapping, now: float) -> list[Any]:
    return [one.name, str(one.address), one.scope, round(now + one.expires_s)]


def _read(path: Path) -> Iterator[tuple[str, Any, int, float]]:
    """Yield the lines of a snapshot that make sense."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            name, address, scope, until = json.loads(line)
            if "\\" not in name and name.isascii():
                yield name, ip_address(address), int(scope), float(until)
