"""What people call the rows of the service table, in a file beside the tables.

Rule: the file is whole or not there; who reads it does not need the agent.

Theory. Names change only when services come or go, not with their endpoints, so writing them all is
rare; and not oftener than once in WRITE_S, because a file of 10 000 services takes tens of
milliseconds. Readers take a missing name as "unknown", never as an error.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

FILE = "services.json"
WRITE_S = 1.0


class NamesFile:
    """Writer of the file."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Write nothing yet."""
        self._path, self._clock = path, clock
        self._last = -WRITE_S
        self.dirty = False

    def write(self, names: Callable[[], Mapping[str, int]], now: bool = False) -> bool:
        """Write what has changed, if it is time or `now`; return whether it was written.

        names: returns the row of each name. Raises OSError.
        """
        if not self.dirty or not (now or self._clock() - self._last >= WRITE_S):
            return False
        text = json.dumps({str(row): name for name, row in names().items()})
        fresh = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        fresh.write_text(text)
        fresh.rename(self._path)
        self._last = self._clock()
        self.dirty = False
        return True


def read(path: Path) -> dict[int, str]:
    """Return the name of each row; empty when the file is not there or not whole."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return {int(row): str(name) for row, name in json.loads(path.read_text()).items()}
    return {}


def split(name: str) -> tuple[str, str]:
    """Return (service and port, kind) of a row's name: ("shop/web:http", "cluster").

    Kinds are cluster, external, balancer, host, and address for rows that have no service.
    """
    parts = name.split("/")
    for at, part in enumerate(parts):
        if part in ("v4", "v6") and 0 < at < len(parts) - 1:
            return "/".join(parts[: at - 1]), parts[at + 1]
    return "", "address" if name else ""
