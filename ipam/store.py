"""The state on disk: SQLite in WAL mode.

Rule: every change is one BEGIN IMMEDIATE transaction, so parallel requests queue and a kill -9 at
any moment leaves the state before or after it.

Theory. `address` holds what is leased or resting, keyed by (family, address): SQLite itself
refuses to give one twice. `journal` remembers what happened. Addresses are stored as 16-byte
blobs, which sort like numbers. A file that is not ours or is damaged is an error, never an empty
beginning.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from ipam.errors import StateDamaged

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
CREATE TABLE reserved (family INTEGER NOT NULL, address BLOB NOT NULL, PRIMARY KEY (family, address));
CREATE TABLE node_cidr (node TEXT NOT NULL, family INTEGER NOT NULL, cidr TEXT NOT NULL UNIQUE,
  PRIMARY KEY (node, family));
CREATE TABLE journal (id INTEGER PRIMARY KEY, time REAL NOT NULL, event TEXT NOT NULL,
  network TEXT, container TEXT, ifname TEXT, addresses TEXT);
"""


class Store:
    """A connection to the state file; one a thread."""

    def __init__(self, path: Path) -> None:
        """Open or make the file. Raises StateDamaged."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(
                path, isolation_level=None, timeout=BUSY_MS / 1000, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._prepare()
        except sqlite3.DatabaseError as error:
            raise StateDamaged(
                f"{path} is no usable state file ({error}): restore it, or move it away and let "
                f"the pods of this node be made anew"
            ) from error

    def _prepare(self) -> None:
        with self.change() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in SCHEMA.split(";"):
                    if statement.strip():
                        db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise StateDamaged(
                    f"{self.path} has version {version}, this Penstock knows {VERSION}: upgrade it"
                )
        check = self._db.execute("PRAGMA quick_check").fetchone()[0]
        if check != "ok":
            raise sqlite3.DatabaseError(check)

    @contextlib.contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """One transaction; rolled back when the body raises."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def read(self, query: str, *values: object) -> list[tuple]:
        """Return all rows of a query."""
        return self._db.execute(query, values).fetchall()

    def close(self) -> None:
        """Close the file."""
        self._db.close()
