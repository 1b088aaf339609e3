"""Numbers of rules, and what each number stands for; and labels of identities.

Rule: a number is in the book before a verdict word with it is in a table; it keeps its meaning
while anything may still show it.

Theory. A verdict word has 24 bits for the rule that made it. The book is an SQLite file beside the
tables: a change costs its own lines only, at 100 k rules too; the command line finds a number while
the agent is down; and a rule keeps its number over a restart of the agent, so that the words of
live connections stay true. The file lies on tmpfs and is never waited for (synchronous off): it
must survive the process, not the machine. Numbers of rules that are gone stay readable, the last
KEPT of them, because flows still name them; older ones are given out again.
"""

import json
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

KEPT = 65536
LABELS_LEAST = 20_000  # identities that are kept without asking which are gone
NUMBER_MOST = (1 << 24) - 1
_TABLES = (
    """create table if not exists rules (
      number integer primary key,
      key text not null unique,
      about text not null,
      gone integer not null default 0
    )""",
    "create table if not exists identities (number integer primary key, labels text not null)",
)
_WRITE = """insert into rules (number, key, about) values (?, ?, ?)
  on conflict (number) do update set key = excluded.key, about = excluded.about"""


class Rulebook:
    """Rule -> number -> attribution. Keys are any text."""

    def __init__(self, path: Path, kept: int = KEPT) -> None:
        """Open or make the file; one that is damaged is made anew."""
        self._kept = kept
        try:
            self._database = _open(path)
            rows = self._database.execute(
                "select number, key, about, gone from rules order by gone"
            ).fetchall()
        except sqlite3.DatabaseError:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._database, rows = _open(path), []
        self._numbers = {key: number for number, key, _, _ in rows}
        self._keys = {number: key for number, key, _, _ in rows}
        self._abouts = {number: hash(about) for number, _, about, _ in rows}
        self._gone = dict.fromkeys(number for number, _, _, gone in rows if gone)  # oldest first
        self._order = rows[-1][3] if rows else 0
        self._next = max(self._keys, default=0) + 1
        self._free: deque[int] = deque()
        # What flush() has to write: texts, when a number went (0: it is back), deleted numbers.
        self._texts: dict[int, str] = {}
        self._orders: dict[int, int] = {}
        self._deleted: dict[int, None] = {}
        known = self._database.execute("select number, labels from identities")
        self._labels = {number: hash(labels) for number, labels in known}
        self._labels_most = LABELS_LEAST
        self._named: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._numbers) - len(self._gone)

    def number(self, key: str, about: str) -> int:
        """Return the number of a rule; about: JSON. Raises OverflowError beyond 16 M of them."""
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = self._take()
            self._keys[number] = key
        elif number in self._gone:
            del self._gone[number]
            self._orders[number] = 0
        if self._abouts.get(number) != hash(about):
            self._abouts[number] = hash(about)
            self._texts[number] = about
        return number

    def _take(self) -> int:
        if self._free:
            return self._free.popleft()
        if self._next > NUMBER_MOST:
            raise OverflowError(f"{NUMBER_MOST} rules have numbers: limit of the verdict word")
        self._next += 1
        return self._next - 1

    def release(self, number: int) -> None:
        """Say that no table holds a number any more."""
        self._order += 1
        self._gone[number] = None
        self._orders[number] = self._order
        while len(self._gone) > self._kept:
            self._forget(next(iter(self._gone)))

    def _forget(self, number: int) -> None:
        del self._gone[number], self._numbers[self._keys.pop(number)], self._abouts[number]
        self._texts.pop(number, None)
        self._orders.pop(number, None)
        self._deleted[number] = None
        self._free.append(number)

    def identity(self, number: int, labels: Mapping[str, str]) -> None:
        """Keep what an identity's number stands for."""
        text = json.dumps(labels, sort_keys=True)
        if self._labels.get(number) != hash(text):
            self._labels[number] = hash(text)
            self._named[number] = text

    def forget_identities(self, used: Callable[[], set[int]]) -> None:
        """Forget most identities that are gone, when these have become the most; used(): others."""
        if len(self._labels) < self._labels_most:
            return
        numbers = used()
        gone = self._labels.keys() - numbers
        for number in gone:
            del self._labels[number]
            self._named.pop(number, None)
        with self._database as database:
            some = [(number,) for number in gone]
            database.executemany("delete from identities where number = ?", some)
        self._labels_most = 2 * len(numbers) + LABELS_LEAST

    def release_all_but(self, used: Iterable[int]) -> None:
        """Release every number that is not among these."""
        for number in self._keys.keys() - set(used) - self._gone.keys():
            self.release(number)

    def flush(self) -> None:
        """Write what changed."""
        if not (self._texts or self._orders or self._deleted or self._named):
            return
        with self._database as database:
            gone = [(number,) for number in self._deleted]
            database.executemany("delete from rules where number = ?", gone)
            texts = [(number, self._keys[number], text) for number, text in self._texts.items()]
            database.executemany(_WRITE, texts)
            orders = [(order, number) for number, order in self._orders.items()]
            database.executemany("update rules set gone = ? where number = ?", orders)
            named = self._named.items()
            database.executemany("insert or replace into identities values (?, ?)", named)
        self._texts, self._orders, self._deleted, self._named = {}, {}, {}, {}

    def about(self, number: int) -> dict[str, Any] | None:
        """Return what a number stands for, also one that is gone lately."""
        self.flush()
        return attributions(self._database, [number]).get(number)

    def close(self) -> None:
        """Close the file."""
        self.flush()
        self._database.close()


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, check_same_thread=False)
    database.execute("pragma journal_mode = wal")
    database.execute("pragma synchronous = off")
    for table in _TABLES:
        database.execute(table)
    return database


def read(path: Path) -> sqlite3.Connection | None:
    """Open the book for reading only; None when there is none."""
    if not path.exists():
        return None
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True, check_same_thread=False)


def attributions(
    database: sqlite3.Connection | None, numbers: Iterable[int]
) -> dict[int, dict[str, Any]]:
    """Return what numbers stand for, those of them that are known."""
    found: dict[int, dict[str, Any]] = {}
    if database is None:
        return found
    for number in set(numbers):
        row = database.execute("select about from rules where number = ?", (number,)).fetchone()
        if row:
            found[number] = json.loads(row[0])
    return found


def labels(database: sqlite3.Connection | None, numbers: Iterable[int]) -> dict[int, Any]:
    """Return the labels of identities, those of them that are known."""
    found: dict[int, Any] = {}
    if database is None:
        return found
    wanted = set(numbers)
    for number, text in database.execute("select number, labels from identities"):
        if number in wanted:
            found[number] = json.loads(text)
    return found
