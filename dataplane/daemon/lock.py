"""One daemon a run directory.

Rule: the lock is the kernel's (flock): it goes with the process, however it ends.

Theory. The file stays and holds the owner's pid for the message to the second one.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class AlreadyRunning(Exception):
    """Another process holds the lock."""


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock for the body. Raises AlreadyRunning naming the owner's pid."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise AlreadyRunning(f"{path} is held by process {owner}: stop it first") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
