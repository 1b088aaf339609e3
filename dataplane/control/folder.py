"""A folder of manifests as the source of objects: the embedded default, no cluster needed.

Rule: a broken file changes nothing: its last good state stays, and `errors` says file, line and
why.

Theory. Every *.yaml, *.yml and *.json of the folder (multi-document, Lists too) is an own piece:
when inotify says that something changed, only files whose time, size or inode is another are read
again, and a snapshot says how it differs from the one before. A file of which an object is broken
keeps its last good state as a whole; one that never had any gives the objects that are good. A file
that goes takes its objects with it. An editor may write a file in several steps, so a file that has
*lost* objects is believed once it has been quiet for SETTLE_S: what is added or changed is in force
at once, and no policy is lifted because its file was half written. A folder that goes changes
nothing either. Last good states outlive the agent (dataplane/control/lastgood.py).
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from stat import S_ISREG
from typing import Any
from weakref import ref

from asyncinotify import Inotify, Mask

from dataplane.control.lastgood import LastGood
from dataplane.control.manifests import Found, Refused, objects
from dataplane.objects.collect import Objects, Since

SUFFIXES = (".yaml", ".yml", ".json")
STEP_S = 0.005  # events that come together are looked at together
GATHER_S = 0.02  # but no event waits longer than that
QUIET_S = 5.0  # without an event the folder is looked at so often
ABSENT_S = 1.0  # and a folder that is not there yet
SETTLE_S = 0.1

WATCHED = (
    Mask.CREATE | Mask.MODIFY | Mask.CLOSE_WRITE | Mask.ATTRIB | Mask.MOVE | Mask.DELETE
    | Mask.DELETE_SELF | Mask.MOVE_SELF
)  # fmt: skip

Mark = tuple[int, int, int]  # time, size, inode: what tells that a file changed
NO_MARK = (0, 0, 0)
Place = tuple[str, Any]  # field of Objects, key


@dataclass
class _File:
    """What is known of a file."""

    mark: Mark
    objects: dict[Place, Any] = field(default_factory=dict)
    others: tuple[Any, ...] = ()
    good: bool = False  # it has been read without an error


class FolderSource:
    """Objects from YAML and JSON files."""

    def __init__(self, folder: Path, kept: Path | None = None) -> None:
        """The folder may appear later; until then there are no objects.

        kept: where last good states are kept over restarts.
        """
        self.folder = folder
        self._kept = LastGood(kept)
        self._good: dict[str, str] = {}  # texts that are still to be kept, by file
        self._gone: set[str] = self._kept.names()  # files that are still to be forgotten
        self.errors: dict[str, str] = {}
        self._files: dict[Path, _File] = {}
        self._owners: dict[Place, tuple[Path, ...]] = {}  # of each object; the last one wins
        self._objects = Objects()
        self._broken: dict[Path, dict[str, str]] = {}  # errors of files
        self._unsettled: dict[Path, tuple[Mark | None, float]] = {}  # files that lost objects

    def read(self) -> Objects:
        """Read what changed; a broken file keeps its last good state."""
        return self._read(None, settled=True)

    def _read(self, paths: Iterable[Path] | None, settled: bool = False) -> Objects:
        """paths: those that may have changed, None: all; settled: who lost objects is believed."""
        self._say()
        if not self.folder.is_dir():
            return self._objects  # it may be on its way to another place: all stays
        marks = _marks(self.folder.glob("*") if paths is None else paths)
        if paths is None:
            marks |= dict.fromkeys(self._files.keys() - marks.keys())
        changed: set[Place] = set()
        others = False
        for path, mark in sorted(marks.items()):
            known = self._files.get(path)
            if mark is None:
                if known is not None and self._may_lose(path, mark, settled):
                    self._broken.pop(path, None)
                    self._gone.add(path.name)
                    others |= self._replace(path, None, changed)
            elif known is None or known.mark != mark:
                others |= self._take(path, mark, changed, settled)
        self._keep()
        self._say()
        if changed or others:
            self._objects = self._snapshot(changed, others)
        return self._objects

    def _keep(self) -> None:
        """Write down what is good now, for the next agent."""
        self._kept.write(self._good, self._gone - {path.name for path in self._files})
        self._good, self._gone = {}, set()

    def _take(self, path: Path, mark: Mark, changed: set[Place], settled: bool) -> bool:
        """Read a file that changed; return whether `others` did."""
        text, found, errors = _parse(path)
        others = path not in self._files and self._restore(path, text, changed)
        known = self._files.get(path)
        self._gone.discard(path.name)
        self._broken.pop(path, None)
        for one in errors:
            where = f"{path}:{one.line}" if one.line else str(path)
            self._broken.setdefault(path, {}).setdefault(where, str(one))
        if errors and known is not None and (known.good or not found):
            known.mark = mark
            return others
        fresh = _file(mark, found, errors)
        loses = known is not None and bool(known.objects.keys() - fresh.objects.keys())
        if loses and not self._may_lose(path, mark, settled):
            return others  # it is read again when it has settled
        self._unsettled.pop(path, None)
        if fresh.good and text is not None:
            self._good[path.name] = text
        return self._replace(path, fresh, changed) or others

    def _restore(self, path: Path, text: str | None, changed: set[Place]) -> bool:
        """Begin with what an earlier agent knew of a file; return whether `others` changed."""
        before = self._kept.text(path.name)
        if before is None or before == text:
            return False
        return self._replace(path, _file(NO_MARK, *_read_text(before, path.suffix)), changed)

    def _may_lose(self, path: Path, mark: Mark | None, settled: bool) -> bool:
        """Return whether a file that lost objects is believed; else it is looked at again."""
        now = time.monotonic()
        before = self._unsettled.get(path)
        if before is None or before[0] != mark:
            before = self._unsettled[path] = mark, now
        if not settled and now - before[1] < SETTLE_S:
            return False
        del self._unsettled[path]
        return True

    def _replace(self, path: Path, fresh: _File | None, changed: set[Place]) -> bool:
        """Put a file in the place of what was known of it; return whether `others` changed."""
        known = self._files.pop(path, None)
        before = known.objects if known else {}
        after = fresh.objects if fresh else {}
        if fresh is not None:
            for place, one in after.items():
                if before.get(place) == one:  # who compares by identity sees no change
                    after[place] = before[place]
            self._files[path] = fresh
        for place in before.keys() - after.keys():
            left = tuple(one for one in self._owners[place] if one != path)
            if left:
                self._owners[place] = left
            else:
                del self._owners[place]
            changed.add(place)
        for place, one in after.items():
            if place not in before:
                self._owners[place] = tuple(sorted((*self._owners.get(place, ()), path)))
            if before.get(place) is not one:
                changed.add(place)
        return (known.others if known else ()) != (fresh.others if fresh else ())

    def _snapshot(self, changed: set[Place], others: bool) -> Objects:
        """Return objects that differ from the last ones in these places."""
        keys: dict[str, set[Any]] = {}
        for name, key in changed:
            keys.setdefault(name, set()).add(key)
        fields: dict[str, Any] = {}
        for name, some in keys.items():
            mapping = fields[name] = dict(getattr(self._objects, name))
            for key in some:
                owners = self._owners.get((name, key))
                if owners:
                    mapping[key] = self._files[owners[-1]].objects[name, key]
                else:
                    mapping.pop(key, None)
        if others:
            files = sorted(self._files.items())
            fields["others"] = tuple(one for _, file in files for one in file.others)
        said = {name: frozenset(some) for name, some in keys.items()}
        fields["since"] = Since(ref(self._objects), said)
        return replace(self._objects, **fields)

    def _say(self) -> None:
        self.errors = {}
        if not self.folder.is_dir():
            self.errors[str(self.folder)] = "no such folder: create it or set source.folder"
        for _, errors in sorted(self._broken.items()):
            self.errors.update(errors)
        if self._kept.error:
            self.errors[str(self.folder)] = self._kept.error

    async def changes(self) -> AsyncIterator[Objects]:
        """Yield the objects now and after every change; ends never."""
        yield (seen := self.read())
        while True:
            if not self.folder.is_dir():
                await asyncio.sleep(ABSENT_S)
            elif self._read(None) is not seen:
                yield (seen := self._objects)
            # A change between the reading and the watch's beginning is found by the time-out.
            async for paths in self._events():
                errors = self.errors
                if self._read(paths) is not seen or self.errors != errors:
                    yield (seen := self._objects)

    async def _events(self) -> AsyncIterator[set[Path] | None]:
        """Yield which files may have changed, None: all; ends when the folder has gone."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), Inotify() as notes:
            notes.sync_timeout = 0
            notes.add_watch(self.folder, WATCHED)
            while self.folder.is_dir():
                yield await self._gather(notes)
                while self._unsettled:
                    await asyncio.sleep(SETTLE_S / 4)
                    yield set(self._unsettled)

    async def _gather(self, notes: Inotify) -> set[Path] | None:
        """Wait for events; return their files, or None: it may be any."""
        try:
            events = [await asyncio.wait_for(notes.get(), QUIET_S)]
        except TimeoutError:
            return None
        until = time.monotonic() + GATHER_S
        while time.monotonic() < until:
            await asyncio.sleep(STEP_S)
            fresh = list(notes)
            events += fresh
            if not fresh:
                break
        if any(event.name is None for event in events):  # the folder itself, or too many events
            return None
        return {self.folder / event.name.name for event in events if event.name is not None}


def _parse(path: Path) -> tuple[str | None, list[Found], list[Refused]]:
    """Return a file's text (None: it has none), its objects, and what is wrong with it."""
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:  # ValueError: no UTF-8
        return None, [], [Refused(f"cannot be read: {error}")]
    return text, *_read_text(text, path.suffix)


def _read_text(text: str, suffix: str) -> tuple[list[Found], list[Refused]]:
    try:
        return objects(text, suffix)
    except Refused as refused:
        return [], [refused]


def _file(mark: Mark, found: list[Found], errors: list[Refused]) -> _File:
    return _File(
        mark,
        {(name, key): one for name, key, one in found if key is not None},
        tuple(one for _, key, one in found if key is None),
        not errors,
    )


def _marks(paths: Iterable[Path]) -> dict[Path, Mark | None]:
    """Return what tells whether files changed; None: it is not there."""
    found: dict[Path, Mark | None] = {}
    for path in paths:
        if path.suffix in SUFFIXES:
            try:
                status = path.stat()
            except OSError:
                found[path] = None
                continue
            if S_ISREG(status.st_mode):
                found[path] = (status.st_mtime_ns, status.st_size, status.st_ino)
    return found
