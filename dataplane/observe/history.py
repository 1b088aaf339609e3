"""Flows on disk: Parquet files, whole or not there, with rotation by size and age.

Rule: a file says all that is needed to read it elsewhere, years later: its columns are the flows,
its metadata is what their numbers stood for.

Theory. Columns are those in memory; the numbers of pods become names (dictionary encoded). A file
is written beside its name and renamed, after FLUSH_S or when FLUSH_FLOWS wait: a crash costs the
last minute. What labels, rules, services and devices of a file meant is JSON under one key of the
schema's metadata. The oldest files go when all are too large or too old. An observer that starts
reads all that the rings hold: each file says how far they have been written, so nothing is twice.
"""

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataplane.observe.book import Book
from dataplane.observe.columns import FIELDS, NOBODY, Columns, joined
from dataplane.observe.directory import Directory, End
from dataplane.tables.verdicts import RULE_SHIFT

FLUSH_S, FLUSH_FLOWS = 60.0, 1 << 18
WAIT_MOST = 1 << 22  # flows that wait for a disk that is slow or full
FOLDER = "flows"  # in STATE_DIR
MEANINGS = b"penstock"
PATTERN = "flows-*.parquet"
RINGS = 256  # of a column's ring
_ENDS = ("source_end", "target_end")
_PLAIN = [name for name in FIELDS if name not in _ENDS]


class HistoryError(ValueError):
    """A file that cannot be read; the message names it."""


@dataclass(frozen=True)
class Origin:
    """Where flows come from. epoch: of the rings (tables/events.py)."""

    who: Directory
    book: Book
    node: str
    epoch: int


class History:
    """Writer of a folder. One thread adds, another one writes."""

    def __init__(self, folder: Path, most_bytes: int, most_s: float, origin: Origin) -> None:
        """Make the folder. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder, self._most_bytes, self._most_s = folder, most_bytes, most_s
        self._origin = origin
        self._lock = threading.Lock()
        self._waiting: deque[Columns] = deque()
        self._count = 0
        self._since = time.monotonic()
        self._first = written(folder, origin.epoch)  # by ring: the first that is not on disk yet
        self._next = self._first.copy()
        self._unheard = set(np.flatnonzero(self._first).tolist())
        self.dropped = 0  # flows that were not written
        self.problem = ""
        for path in folder.glob(".*"):
            path.unlink()  # what a crash left

    def add(self, flows: Columns) -> None:
        """Take flows to be written; they are not changed afterwards."""
        fresh = flows.position >= self._first[flows.ring]
        if not fresh.all():
            flows = flows.take(np.flatnonzero(fresh))
        if not flows.count:
            return
        self._look_for_gaps(flows)
        with self._lock:
            self._waiting.append(flows)
            self._count += flows.count
            while self._count > WAIT_MOST:
                gone = self._waiting.popleft().count
                self._count -= gone
                self.dropped += gone

    def _look_for_gaps(self, flows: Columns) -> None:
        """Count what was overwritten while nobody read: between what is on disk and what comes."""
        for ring in self._unheard & set(np.unique(flows.ring).tolist()):
            self._unheard.discard(ring)
            first = int(flows.position[flows.ring == ring].min())
            self.dropped += first - int(self._first[ring])

    def turn(self) -> None:
        """Write, if it is time."""
        waited = time.monotonic() - self._since
        if self._count and (waited >= FLUSH_S or self._count >= FLUSH_FLOWS):
            self.flush()

    def flush(self) -> None:
        """Write what waits. An error stands in `problem`, and the flows wait on."""
        self._since = time.monotonic()
        with self._lock:
            some, self._waiting = self._waiting, deque()
            self._count = 0
        if not some:
            return
        flows = joined(some)
        try:
            self._write(flows)
            self._rotate()
            self.problem = ""
        except OSError as error:
            self.problem = f"flows are not written to {self._folder}: {error}"
            with self._lock:
                self._waiting.appendleft(flows)
                self._count += flows.count

    def _write(self, flows: Columns) -> None:
        after = self._next.copy()
        np.maximum.at(after, flows.ring, flows.position + np.uint64(1))
        table = to_table(flows, self._origin, after)
        first = int(flows.wall_ns[0])
        path = self._folder / f"flows-{first:020}-{flows.count}.parquet"
        fresh = path.with_name(f".{path.name}")
        try:
            pq.write_table(table, fresh, compression="zstd")
            fresh.rename(path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        self._next = after

    def _rotate(self) -> None:
        now = time.time()
        size = 0
        for path in sorted(self._folder.glob(PATTERN), reverse=True):
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                size += state.st_size
                if size > self._most_bytes or now - state.st_mtime > self._most_s:
                    path.unlink()


def written(folder: Path, epoch: int) -> np.ndarray:
    """Return for each ring the number of its first flow that no file of an epoch has: uint64[]."""
    found = np.zeros(RINGS, np.uint64)
    newest = sorted(folder.glob(PATTERN), key=lambda path: path.stat().st_mtime_ns)[-1:]
    for path in newest:  # each file knows what the others have
        with contextlib.suppress(KeyError, ValueError, OSError, pa.ArrowException):
            said = json.loads((pq.read_schema(path).metadata or {})[MEANINGS])
            for ring, number in said["written"].items() if said["epoch"] == epoch else ():
                found[int(ring)] = number
    return found


def to_table(flows: Columns, origin: Origin, after: np.ndarray) -> pa.Table:
    """Return flows as an Arrow table with what their numbers mean. after: as written()."""
    arrays = {name: pa.array(getattr(flows, name)) for name in _PLAIN}
    ends: dict[str, dict[str, Any]] = {}
    for name in _ENDS:
        numbers, where = np.unique(getattr(flows, name), return_inverse=True)
        texts = []
        for number in numbers.tolist():
            end = origin.who.end(number)
            texts.append(f"{end.namespace}/{end.name}" if end else "")
            if end is not None:
                ends[texts[-1]] = {"number": end.number, "node": end.node}
        codes = pa.array(where.reshape(-1).astype(np.int32))
        arrays[name] = pa.DictionaryArray.from_arrays(codes, pa.array(texts, pa.string()))
    meanings = {"epoch": origin.epoch, "node": origin.node, "ends": ends}
    meanings["direct"] = origin.who.direct
    meanings["written"] = {str(ring): int(after[ring]) for ring in np.flatnonzero(after).tolist()}
    meanings |= _meanings(flows, origin.book)
    return pa.table(arrays).replace_schema_metadata({MEANINGS: json.dumps(meanings)})


def _meanings(flows: Columns, book: Book) -> dict[str, Any]:
    def distinct(*names: str) -> list[int]:
        return np.unique(np.concatenate([getattr(flows, name) for name in names])).tolist()

    words = distinct("egress_rule", "ingress_rule")
    rules = {word >> RULE_SHIFT: book.rule(word) for word in words if word >> RULE_SHIFT}
    return {
        "labels": {n: book.labels(n) for n in distinct("source_identity", "target_identity")},
        "rules": {number: about for number, about in rules.items() if about},
        "services": {row: book.service(row) for row in distinct("service") if row},
        "devices": {port: book.device(port) for port in distinct("port")},
    }


class PastBook:
    """What numbers meant when a file was written. A Book."""

    def __init__(self, said: dict[str, Any]) -> None:
        """said: as _meanings made it, through JSON."""
        self._labels = {int(n): labels for n, labels in said["labels"].items()}
        self._rules = {int(n): about for n, about in said["rules"].items()}
        self._services = {int(n): tuple(name) for n, name in said["services"].items()}
        self._devices = {int(n): tuple(device) for n, device in said["devices"].items()}

    def labels(self, identity: int) -> list[str]:
        """As Book."""
        return self._labels.get(identity, [])

    def service(self, row: int) -> tuple[str, str]:
        """As Book."""
        return self._services.get(row, ("", ""))

    def rule(self, word: int) -> dict[str, Any] | None:
        """As Book."""
        return self._rules.get(word >> RULE_SHIFT)

    def device(self, port: int) -> tuple[int, str]:
        """As Book."""
        return self._devices.get(port, (0, ""))

    def dns(self, family: int, hi: int, lo: int) -> list[str]:
        """As Book; names are not kept."""
        return []

    def message(self, position: int) -> dict[str, Any] | None:
        """As Book; messages are not kept."""
        return None


class Past:
    """A file that was read."""

    def __init__(self, path: Path) -> None:
        """Read it whole. Raises HistoryError."""
        try:
            table = pq.read_table(path)
            said = json.loads((table.schema.metadata or {})[MEANINGS])
            self.directory, self.book = Directory(), PastBook(said)
            self.directory.direct = bool(said.get("direct", False))
            arrays = {name: table[name].to_numpy() for name in _PLAIN}
            for name in _ENDS:
                arrays[name] = self._ends(table[name], said["ends"])
        except (KeyError, ValueError, OSError, pa.ArrowException) as error:
            raise HistoryError(f"{path}: not a file of flows: {error}") from error
        self.epoch, self.node = int(said["epoch"]), str(said["node"])
        self.flows = Columns(arrays, table.num_rows)

    def _ends(self, column: pa.ChunkedArray, known: dict[str, Any]) -> np.ndarray:
        some = column.combine_chunks()
        texts = some.dictionary.to_pylist()
        numbers = np.full(len(texts), NOBODY, np.int32)
        for at, text in enumerate(texts):
            if text:
                namespace, _, name = text.partition("/")
                more = known[text]
                end = End(namespace, name, number=more["number"], node=more["node"])
                numbers[at] = self.directory.number(end)
        return numbers[some.indices.to_numpy()]


def files(path: Path) -> list[Path]:
    """Return a file, or the files of a folder, oldest first. Raises HistoryError."""
    if path.is_dir():
        found = sorted(path.glob(PATTERN))
        if not found:
            raise HistoryError(f"{path}: no {PATTERN} in this folder")
        return found
    if not path.exists():
        raise HistoryError(f"{path}: no such file or folder")
    return [path]


def overlapping(paths: Iterable[Path], since_ns: int) -> list[Path]:
    """Return those files that may have flows from a time on: their names say when they begin."""
    some = list(paths)
    starts = [_start(path) for path in some]
    first = max((n for n, start in enumerate(starts) if start <= since_ns), default=0)
    return some[first:]


def _start(path: Path) -> int:
    digits = path.name.removeprefix("flows-").partition("-")[0]
    return int(digits) if digits.isdecimal() else 0
