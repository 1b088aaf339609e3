"""The state on disk: SQLite in WAL mode.

Rule: every change is one BEGIN IMMEDIATE transaction, so parallel requests queue and a kill -9 at
any moment leaves the state before or after it.

Theory. `address` holds what is leased or resting, keyed by (family, address): SQLite itself
refuses to give one twice. `journal` remembers what happened. Addresses are stored as 16-byte
blobs, which sort like numbers. A file that is not ours or is damaged is an error, never an empty
beginning: a new file is made whole under another name and then linked to its place.
"""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from ipam.errors import StateDamaged, StateUnavailable

VERSION = 1
BUSY_MS = 30_000
JOURNAL_MOST = 10_000

SCHEMA = """
CREATE TABLE lease (
  id INTEGER PRIMARY KEY, network TEXT NOT NULL, container TEXT NOT NULL, ifname TEXT NOT NULL,
  owner TEXT NOT NULL, created REAL NOT NULL, suspect REAL,
  UNIQUE (network, container, ifname)
);
CREATE TABLE address (
  family INTEGER NOT NULL, address BLOB NOT NULL, lease INTEGER REFERENCES lease (id),
  released REAL, PRIMARY KEY (family, address)
);
CREATE INDEX address_lease ON address (lease);
CREATE INDEX address_released ON address (family, released);
CREATE TABLE pool (family INTEGER PRIMARY KEY, cidr TEXT NOT NULL, next BLOB);
CREATE TABLE reserved (family INTEGER NOT NULL, address BLOB NOT NULL,
  PRIMARY KEY (family, address));
CREATE TABLE node_cidr (node TEXT NOT NULL, family INTEGER NOT NULL, cidr TEXT NOT NULL UNIQUE,
  PRIMARY KEY (node, family));
CREATE TABLE journal (id INTEGER PRIMARY KEY, time REAL NOT NULL, event TEXT NOT NULL,
  network TEXT, container TEXT, ifname TEXT, addresses TEXT);
"""


class Store:
    """A connection to the state file; one a thread."""

    def __init__(self, path: Path) -> None:
        """Open or make the file. Raises StateDamaged, StateUnavailable."""
        self.path = path
        log = path.with_name(f"{path.name}-wal")
        with self._translated():
            if not path.exists():
                if log.exists():
                    raise sqlite3.DatabaseError(f"its log {log} is there, it is not")
                self._make()
            self._db = _connect(path)
            try:
                self._check()
            except BaseException:
                self._db.close()
                raise

    def _make(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            beside.unlink(missing_ok=True)
            with contextlib.closing(_connect(beside)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(beside, self.path)
        finally:
            for suffix in ("", "-wal", "-shm"):
                beside.with_name(f"{beside.name}{suffix}").unlink(missing_ok=True)

    def _check(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            raise sqlite3.DatabaseError("it is empty, or not a state file of Penstock")
        if version != VERSION:
            raise StateUnavailable(
                f"{self.path} has version {version}, this Penstock knows {VERSION}: run the "
                "Penstock that wrote it"
            )
        verdict = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise StateUnavailable(
                f"{self.path} cannot be used: {error}; look at the free space and the rights of "
                f"{self.path.parent}, and at who holds the file (fuser {self.path})"
            ) from error
        except sqlite3.IntegrityError:
            raise  # ours, not the file's
        except sqlite3.DatabaseError as error:
            why = " ".join(str(error).split())
            raise StateDamaged(
                f"{self.path} is no usable state file ({why}). It says which addresses are in "
                "use, so it is not started anew by itself: restore it, or drain this node, move "
                "it and its -wal file away, and restart Penstock"
            ) from error

    @contextlib.contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """One transaction; rolled back when the body raises."""
        with self._translated():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def read(self, query: str, *values: object) -> list[tuple]:
        """Return all rows of a query."""
        with self._translated():
            return self._db.execute(query, values).fetchall()

    def problems(self) -> list[str]:
        """Return what is inconsistent, in words; empty when all is well."""
        found = [row[0] for row in self.read("PRAGMA integrity_check") if row[0] != "ok"]
        found += [f"dangling row in {row[0]}" for row in self.read("PRAGMA foreign_key_check")]
        neither = "SELECT hex(address) FROM address WHERE (lease IS NULL) = (released IS NULL)"
        found += [f"address {row[0]} is neither leased nor released" for row in self.read(neither)]
        held = "SELECT lease FROM address WHERE lease IS NOT NULL"
        empty = f"SELECT container FROM lease WHERE id NOT IN ({held})"
        found += [f"lease of {row[0]} has no address" for row in self.read(empty)]
        return found

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(
        path, isolation_level=None, timeout=BUSY_MS / 1000, check_same_thread=False
    )
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA foreign_keys = ON")
    return db
