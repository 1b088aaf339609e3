"""DELs that the shim remembered while the agent was away.

Rule: a file goes only when its DEL has been done, or can never be.

Theory. The shim writes the framed request under "CONTAINER@IFNAME" (shim.c, queue_delete), complete
or not at all; names with a leading dot are writes in progress or interrupted ones. A DEL is
idempotent, so doing it twice after a crash is harmless. An ADD of the same attachment must come
after the remembered DEL: the backend asks for it by name first.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from dataplane.cni.errors import CniError
from dataplane.cni.protocol import Request, parse

INTERRUPTED_S = 600.0  # a temporary file this old has no writer: the shim lives 60 s


class Deletes:
    """The folder of remembered DELs."""

    def __init__(self, folder: Path) -> None:
        """Use the folder, which the shim makes when it first needs it."""
        self.folder = Path(folder)
        self.unreadable: dict[str, str] = {}  # file -> why it was thrown away

    def pending(self) -> Iterator[tuple[Path, Request]]:
        """All remembered DELs, oldest first; drops what is not one."""
        if not self.folder.is_dir():
            return
        files = [(_changed(path), path) for path in self.folder.iterdir()]
        for changed, path in sorted(files):
            if path.name.startswith("."):
                if time.time() - changed > INTERRUPTED_S:
                    path.unlink(missing_ok=True)
                continue
            request = self._read(path)
            if request is not None:
                yield path, request

    def of(self, container_id: str, ifname: str) -> tuple[Path, Request] | None:
        """The remembered DEL of one attachment."""
        path = self.folder / f"{container_id}@{ifname}"
        request = self._read(path) if path.is_file() else None
        return None if request is None else (path, request)

    def _read(self, path: Path) -> Request | None:
        try:
            request = parse(path.read_bytes())
            if request.command == "DEL":
                return request
            reason = f"a {request.command}, not a DEL"
        except FileNotFoundError:
            return None
        except (CniError, OSError) as error:
            reason = str(error)
        self.unreadable[path.name] = reason
        path.unlink(missing_ok=True)
        return None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
