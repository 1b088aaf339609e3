"""What numbers in flows stand for: labels of identities, services, policies, devices, DNS names.

Rule: a number that nobody knows is shown as a number, never as an error.

Theory. The agent keeps these names beside the tables (policy/rulebook.py, services/names.py), so
they are there when it is away. They are read when a flow is shown, not when it comes: few of many
flows are ever shown, and a number keeps its meaning long after the rule is gone. `names` is who
knows DNS (names.py).
"""

import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from dataplane.policy import rulebook
from dataplane.services import names as services
from dataplane.tables.shm import Shm
from dataplane.tables.verdicts import RESERVED, RULE_SHIFT

KEPT = 4096  # rules and identities remembered


class Book(Protocol):
    """Meanings of numbers."""

    def labels(self, identity: int) -> list[str]:
        """Return the labels of an identity, as source:key=value; [] when it is not known."""

    def service(self, row: int) -> tuple[str, str]:
        """Return namespace and name of a service; empty when it is not known."""

    def rule(self, word: int) -> dict[str, Any] | None:
        """Return what made a verdict word (policy/parts.py says how that looks)."""

    def device(self, port: int) -> tuple[int, str]:
        """Return ifindex and name of a port; (0, "") when there is none."""

    def dns(self, family: int, hi: int, lo: int) -> list[str]:
        """Return names by which an address was asked for lately."""

    def message(self, position: int) -> dict[str, Any] | None:
        """Return a DNS message (observe/dns.py), None: it is not kept any more."""


class LiveBook:
    """The book of a node that runs, or ran. A Book."""

    def __init__(self, shm: Shm, rules: Path, service_names: Path) -> None:
        """rules, service_names: the agent's files; they may not be there yet."""
        self._shm, self._rules_file, self._services_file = shm, rules, service_names
        self._database: sqlite3.Connection | None = None
        self._labels: dict[int, list[str]] = {}
        self._rules: dict[int, dict[str, Any] | None] = {}
        self._services: dict[int, str] = {}
        self._services_mark = 0
        self._version, self._inode = -1, 0
        self._lock = threading.Lock()
        self.names: Callable[[int, int, int], Iterable[str]] = lambda family, hi, lo: ()
        self.messages: Callable[[int], dict[str, Any] | None] = lambda position: None

    def refresh(self) -> None:
        """Look for news; a rule's number may have another meaning by and by."""
        with self._lock:
            with contextlib.suppress(sqlite3.Error):
                self._look()
            mark = self._services_file.stat().st_mtime_ns if self._services_file.exists() else 0
            if mark != self._services_mark:
                self._services, self._services_mark = services.read(self._services_file), mark

    def _look(self) -> None:
        """Open the rules anew when the agent has made another file; forget what has changed."""
        inode = self._rules_file.stat().st_ino if self._rules_file.exists() else 0
        if inode != self._inode:
            self._inode, self._version = inode, -1
            self._database = rulebook.read(self._rules_file)
        if self._database is not None:
            version = self._database.execute("pragma data_version").fetchone()[0]
            if version != self._version:
                self._version = version
                self._labels.clear()
                self._rules.clear()

    def labels(self, identity: int) -> list[str]:
        """As Book."""
        if identity in RESERVED:
            return [RESERVED[identity]]
        found = self._labels.get(identity)
        if found is None:
            found = plain_labels(self._read_labels(identity))
            if len(self._labels) < KEPT:
                self._labels[identity] = found
        return found

    def _read_labels(self, identity: int) -> dict[str, str]:
        if self._database is None:
            return {}
        asked = "select labels from identities where number = ?"
        row = None
        with self._lock, contextlib.suppress(sqlite3.Error):
            row = self._database.execute(asked, (identity,)).fetchone()
        return json.loads(row[0]) if row else {}

    def service(self, row: int) -> tuple[str, str]:
        """As Book."""
        return service_name(self._services.get(row, ""))

    def rule(self, word: int) -> dict[str, Any] | None:
        """As Book."""
        number = word >> RULE_SHIFT
        if not number:
            return None
        if number not in self._rules:
            if len(self._rules) >= KEPT:
                self._rules.clear()
            found = None
            with self._lock, contextlib.suppress(sqlite3.Error):
                found = rulebook.attributions(self._database, [number]).get(number)
            self._rules[number] = found
            return found
        return self._rules.get(number)

    def device(self, port: int) -> tuple[int, str]:
        """As Book."""
        row = self._shm.ports[port]
        return (int(row["ifindex"]), row["name"].decode()) if row["state"] else (0, "")

    def dns(self, family: int, hi: int, lo: int) -> list[str]:
        """As Book."""
        return list(self.names(family, hi, lo))

    def message(self, position: int) -> dict[str, Any] | None:
        """As Book."""
        return self.messages(position)


def plain_labels(known: dict[str, str]) -> list[str]:
    """Return labels as Hubble writes them."""
    return [f"{key}={value}" if value else key for key, value in sorted(known.items())]


def service_name(text: str) -> tuple[str, str]:
    """Return namespace and name from a service row's name ("shop/web:http/v4/cluster/...")."""
    called, _ = services.split(text)
    namespace, _, rest = called.partition("/")
    return (namespace, rest.partition(":")[0]) if rest else ("", "")
