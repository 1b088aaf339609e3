"""A folder of manifests as the source of objects: the embedded default, no cluster needed.

Rule: a broken file changes nothing: its last good state stays, and `errors` says file, line and
why.

Theory. Every *.yaml, *.yml and *.json of the folder (multi-document, Lists too) is read when
inotify says that something changed. Files are small and few, so all are read again; each keeps
its last good manifests. A file that goes takes its objects with it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from watchfiles import awatch

from dataplane.objects.collect import Objects, collect
from dataplane.objects.manifest import ManifestError

SUFFIXES = (".yaml", ".yml", ".json")
STEP_MS = 200  # inotify's batch: an editor writes a file in several steps
QUIET_MS = 5000  # without an event the folder is looked at so often
ABSENT_S = 1.0  # and a folder that is not there yet


class FolderSource:
    """Objects from YAML files."""

    def __init__(self, folder: Path) -> None:
        """The folder may appear later; until then there are no objects."""
        self.folder = folder
        self.errors: dict[str, str] = {}
        self._good: dict[Path, list[Mapping[str, Any]]] = {}

    def read(self) -> Objects:
        """Read all files; a broken one keeps its last good state."""
        paths = sorted(p for p in self.folder.glob("*") if p.suffix in SUFFIXES and p.is_file())
        self.errors = {}
        if not self.folder.is_dir():
            self.errors[str(self.folder)] = "no such folder: create it or set source.folder"
        for gone in self._good.keys() - set(paths):
            del self._good[gone]
        for path in paths:
            try:
                manifests = _manifests(path)
                collect(manifests)
                self._good[path] = manifests
            except (ManifestError, OSError) as error:
                self.errors[str(path)] = str(error)
            except yaml.YAMLError as error:
                mark = getattr(error, "problem_mark", None)
                line = f":{mark.line + 1}" if mark else ""
                problem = getattr(error, "problem", None) or str(error)
                self.errors[f"{path}{line}"] = f"not YAML: {problem}"
            except (ValueError, RecursionError) as error:  # no UTF-8, no such date, too deep
                self.errors[str(path)] = f"not YAML: {error}"
        return collect([manifest for path in sorted(self._good) for manifest in self._good[path]])

    async def changes(self) -> AsyncIterator[Objects]:
        """Yield the objects now and after every change; ends never."""
        seen = None
        while True:
            if (now := self._fingerprint()) != seen:
                seen = now
                yield self.read()
            if not self.folder.is_dir():
                await asyncio.sleep(ABSENT_S)
                continue
            # A change between the reading and the watch's beginning is found by the time-out.
            watch = awatch(
                self.folder,
                step=STEP_MS,
                rust_timeout=QUIET_MS,
                yield_on_timeout=True,
                recursive=False,
            )
            with contextlib.suppress(FileNotFoundError):
                async for _ in watch:
                    if (now := self._fingerprint()) != seen:
                        seen = now
                        yield self.read()
                    if not self.folder.is_dir():
                        break

    def _fingerprint(self) -> list[tuple[str, int, int]]:
        """What tells that a file changed: name, time, size."""
        found = []
        for path in self.folder.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((path.name, status.st_mtime_ns, status.st_size))
        return sorted(found)


def _manifests(path: Path) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for document in yaml.safe_load_all(path.read_text()):
        if document is None:
            continue
        kind = document.get("kind") if isinstance(document, Mapping) else None
        if isinstance(kind, str) and kind.endswith("List"):
            items = document.get("items") or []
            if not isinstance(items, list):
                raise ManifestError(f"{kind}: items must be a list, is {type(items).__name__}")
            found.extend(items)
        else:
            found.append(document)
    return found
