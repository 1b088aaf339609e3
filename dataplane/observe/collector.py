"""Takes events out of the forwarder's rings into the store.

Rule: one thread writes directory and store; whoever asks only reads, and never holds it up.

Theory. Every POLL_S (IDLE_S when nothing comes but DNS) the rings are copied, spread over columns,
joined by time, and given the numbers of their pods. A pod's name may come later than its first
packets, so what came lately is named once more when the directory has changed. What an observer
finds in the rings when it starts is named by the pods that it is told of first: addresses rest
before they are another's. Questions that follow wait for a condition. What the rings have lost is
kept as numbers with the time at which that was seen.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import numpy as np

from dataplane.observe.columns import NOBODY, Columns, clock_offset_ns, joined, spread
from dataplane.observe.directory import Address, Directory, End
from dataplane.observe.dns import DNS, RING, Messages
from dataplane.observe.store import Store
from dataplane.tables.events import EventReader
from dataplane.tables.shm import Shm
from xdp.abi import value

POLL_S = 0.02
IDLE_S = 0.08  # and so often at least: a million flows a second fill a ring in 0.13 s
MOST = 32768  # records of a ring at once
LATE_NS = 5_000_000_000  # so long after a flow its pod may still be named
LOSSES_KEPT = 1024
TUNNEL_NONE = value("TUNNEL_NONE")
RATE_S = 60


@dataclass(frozen=True)
class Loss:
    """Events that nobody could read. at: absolute number of the flow that came next."""

    ring: int
    count: int
    at: int
    wall_ns: int


class Collector:
    """Store, directory, and the thread that fills them."""

    def __init__(
        self,
        shm: Shm,
        capacity: int,
        names: Callable[[], Any] = lambda: None,
        dns: bool = True,
        dns_rate: int = 0,
    ) -> None:
        """capacity: flows kept. names: returns rows of pods when these have changed, else None.

        dns: DNS messages are flows, too; dns_rate: so many a second, 0: all.

        A row: {"namespace", "name", "number", "node", "addresses"}; number: 0 on other nodes.
        """
        self._names, self._shm = names, shm
        self._reader = EventReader(shm)
        self.epoch = self._reader.epoch
        self.messages = Messages(shm, time.monotonic, dns_rate)
        self._dns = dns
        self.store = Store(capacity)
        self.directory = Directory()
        self.changed = threading.Condition()
        self.losses: deque[Loss] = deque(maxlen=LOSSES_KEPT)
        self.lost = self.told = 0  # told: flows that are no DNS messages
        self.started_ns = time.time_ns()
        self.sinks: list[Callable[[Columns], None]] = []  # get what comes, named
        self._held: dict[Address, End] = {}
        self._known = False
        self._seen: deque[tuple[float, int]] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with self.changed:
            self.changed.notify_all()

    @property
    def stopped(self) -> bool:
        """Whether no more flows will come."""
        return self._stop.is_set()

    def _run(self) -> None:
        pause = POLL_S
        while not self._stop.is_set():
            told = self.told
            if self.turn():
                continue
            pause = POLL_S if self.told != told else min(2 * pause, IDLE_S)
            self._stop.wait(pause)

    def turn(self) -> bool:
        """Take what is there; return whether there may be more. Not called beside the thread."""
        rows = self._names()
        if rows is not None:
            self._know(rows)
        self.directory.direct = int(self._shm.node[0]["tunnel_kind"]) == TUNNEL_NONE
        parts, more = [], False
        batches = self._reader.read(MOST)
        offset = clock_offset_ns()
        for batch in batches:
            more |= len(batch.records) + batch.lost >= MOST
            if batch.lost:
                self.lost += batch.lost
                loss = Loss(batch.ring, batch.lost, self.store.head, time.time_ns())
                self.losses.append(loss)
            if len(batch.records):
                parts.append(spread(batch.records, batch.ring, batch.first, offset))
                self.told += len(batch.records)
        if self._dns and (said := self._said(offset)) is not None:
            parts.append(said)
        if parts:
            self._add(joined(parts))
        return more

    def _said(self, offset: int) -> Columns | None:
        """Return the DNS messages that are new."""
        lost, left_out = self.messages.lost, self.messages.left_out
        said = self.messages.read(offset)
        lost, left_out = self.messages.lost - lost, self.messages.left_out - left_out
        if lost + left_out:
            self.lost += lost
            loss = Loss(RING, lost + left_out, self.store.head, time.time_ns())
            self.losses.append(loss)
        return said

    def _add(self, flows: Columns) -> None:
        self.directory.name(flows)
        self.store.append(flows)
        for sink in self.sinks:  # they have no place for names and addresses of DNS
            plain = flows.kind != DNS
            sink(flows if plain.all() else flows.take(np.flatnonzero(plain)))
        with self.changed:
            self.changed.notify_all()
        now = time.monotonic()
        self._seen.append((now, self.store.head))
        while len(self._seen) > 2 and self._seen[1][0] < now - RATE_S:
            self._seen.popleft()

    @property
    def rate(self) -> float:
        """Flows a second of the last minute."""
        since, before = self._seen[0] if self._seen else (time.monotonic(), self.store.head)
        return (self.store.head - before) / max(1.0, time.monotonic() - since)

    # --- names ------------------------------------------------------------------------------------

    def _know(self, rows: Iterable[dict[str, Any]]) -> None:
        """Bring the directory in line with all pods that there are."""
        fresh: dict[Address, End] = {}
        for row in rows:
            end = End(row["namespace"], row["name"], number=row["number"], node=row["node"])
            fresh |= {_key(text): end for text in row["addresses"]}
        now = time.time_ns()
        for address in self._held.keys() - fresh.keys():
            self.directory.hold(address, None, now)
        for address, end in fresh.items():
            if self._held.get(address) != end:
                self.directory.hold(address, end, now)
        self._held = fresh
        oldest = next(self.store.oldest(), None)
        self.directory.forget(int(oldest.wall_ns[0]) if oldest is not None else now)
        self._name_late(now - LATE_NS if self._known else 0)
        self._known = True

    def _name_late(self, since_ns: int) -> None:
        for part in self.store.newest():
            if int(part.wall_ns[-1]) < since_ns:
                break
            for side in ("source", "target"):
                ends = part.arrays[f"{side}_end"]
                some = np.flatnonzero((ends == NOBODY) & (part.wall_ns >= since_ns))
                where = (part.arrays[f"{side}_{half}"][some] for half in ("hi", "lo"))
                ends[some] = self.directory.find(part.family[some], *where)


def _key(text: str) -> Address:
    address = ip_address(text)
    return address.version, int(address) >> 64, int(address) & ((1 << 64) - 1)
