"""Manifest files as they were when they were last read without an error.

Rule: a restart of the agent forgets no policy because its file has been broken meanwhile.

Theory. The texts are kept, not what was read from them: a newer agent may read more of them. SQLite
with a write-ahead log that is synchronised now and then makes a change cost no disk flush; after a
power failure the last changes may be missing, never half there. When the disk is full nothing is
kept and `error` says so: the files themselves are still read.
"""

import contextlib
import sqlite3
from pathlib import Path

_TABLE = "create table if not exists files (name text primary key, text text not null)"


class LastGood:
    """Name of a file -> its last good text. Without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        """Open or make the file of texts; one that is damaged is made anew."""
        self.error = ""
        self._database: sqlite3.Connection | None = None
        if path is None:
            return
        try:
            self._database = _open(path)
        except sqlite3.DatabaseError as error:
            self.error = f"{path} was damaged ({error}) and is made anew"
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._database = _open(path)

    def text(self, name: str) -> str | None:
        """Return what a file held when it was last good; None: not known."""
        if self._database is None:
            return None
        rows = self._database.execute("select text from files where name = ?", (name,))
        return next((text for (text,) in rows), None)

    def write(self, good: dict[str, str], gone: set[str]) -> None:
        """Keep new texts; forget files that are gone on purpose."""
        if self._database is None or not (good or gone):
            return
        try:
            with self._database as database:
                some = [(name,) for name in gone]
                database.executemany("delete from files where name = ?", some)
                database.executemany("insert or replace into files values (?, ?)", good.items())
            self.error = ""
        except sqlite3.Error as error:
            self.error = f"the last good state of manifests cannot be kept: {error}"

    def names(self) -> set[str]:
        """Return the files whose text is kept."""
        if self._database is None:
            return set()
        return {name for (name,) in self._database.execute("select name from files")}

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, check_same_thread=False)
    try:
        database.execute("pragma journal_mode = wal")
        database.execute("pragma synchronous = normal")
        database.execute(_TABLE)
        database.execute("select name, text from files limit 1").fetchall()
    except sqlite3.DatabaseError:
        with contextlib.suppress(sqlite3.Error):
            database.close()
        raise
    return database
