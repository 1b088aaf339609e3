"""Node CIDRs, carved out of the cluster's pools.

Rule: a node keeps its CIDRs until it is released; no two nodes overlap.

Theory. A pool is cut into blocks of `mask_size` bits. A node gets the block behind the one carved
last, of each family, so a block that a node gave back comes again as late as possible; the same
requests in the same order give the same CIDRs. CIDRs that somebody else chose (spec.podCIDRs of a
Node) are claimed, so that they are not carved again. State and journal are those of store.py, in a
file of its own.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from ipam.errors import AllocationExhausted, PoolRefused
from ipam.model import Cidr
from ipam.store import JOURNAL_MOST, Store


class ClusterPools:
    """The cluster's pools, {family: (CIDR, mask size of a node)}, and who has what."""

    def __init__(
        self, store: Store, pools: Mapping[int, tuple[Cidr, int]], clock: Callable[[], float]
    ) -> None:
        """Use `open`."""
        self._store, self._pools, self._clock = store, dict(pools), clock
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: Path,
        pools: Mapping[int, tuple[Cidr, int]],
        clock: Callable[[], float] = time.time,
    ) -> "ClusterPools":
        """Open the state file, making it when there is none.

        Raises PoolRefused when a mask size makes no sense or a node's CIDR is none of these pools,
        StateDamaged, StateUnavailable.
        """
        for family, (cidr, mask) in pools.items():
            if cidr.version != family or not cidr.prefixlen <= mask <= cidr.max_prefixlen - 2:
                raise PoolRefused(
                    f"cluster pool {cidr} with mask_size {mask} under family {family}: mask_size "
                    f"must be {cidr.prefixlen}..{cidr.max_prefixlen - 2}, the pool IPv{family}"
                )
        found = cls(Store(Path(path)), pools, clock)
        try:
            found._settle()
        except BaseException:
            found.close()
            raise
        return found

    def close(self) -> None:
        """Close the state file."""
        self._store.close()

    def _settle(self) -> None:
        strays = [
            f"{cidr} of {node}"
            for node, cidrs in self.nodes().items()
            for family, cidr in cidrs.items()
            if not self._holds(family, cidr)
        ]
        if strays:
            raise PoolRefused(
                f"the cluster pools leave out {len(strays)} node CIDRs: {', '.join(strays[:5])}"
                f"{' ...' if len(strays) > 5 else ''}; keep their pools and mask sizes, or remove "
                "those nodes first"
            )
        with self._lock, self._store.change() as db:
            for family, (cidr, _) in self._pools.items():
                known = db.execute("SELECT cidr FROM pool WHERE family = ?", (family,)).fetchone()
                if known != (str(cidr),):
                    row = (family, str(cidr))
                    db.execute("INSERT OR REPLACE INTO pool VALUES (?, ?, NULL)", row)
                    self._note(db, "pool", "", [cidr])

    def _holds(self, family: int, cidr: Cidr) -> bool:
        if family not in self._pools or cidr.version != family:
            return False
        pool, mask = self._pools[family]
        return cidr.prefixlen == mask and cidr.subnet_of(pool)  # type: ignore[arg-type]

    def carve(self, node: str) -> dict[int, Cidr]:
        """Return the node's CIDR of each family, carved when it has none yet.

        Raises AllocationExhausted, with nothing changed.
        """
        with self._lock, self._store.change() as db:
            held = _held(db, node)
            fresh = {family: self._next(db, family) for family in self._pools.keys() - held.keys()}
            for family, cidr in fresh.items():
                _insert(db, node, family, cidr)
                last = int(cidr.network_address).to_bytes(16, "big")
                db.execute("UPDATE pool SET next = ? WHERE family = ?", (last, family))
            if fresh:
                self._note(db, "carve", node, list(fresh.values()))
            return dict(sorted({**held, **fresh}.items()))

    def _next(self, db: sqlite3.Connection, family: int) -> Cidr:
        pool, mask = self._pools[family]
        rows = db.execute("SELECT cidr FROM node_cidr WHERE family = ?", (family,)).fetchall()
        taken = {int(ip_network(text).network_address) for (text,) in rows}
        last = db.execute("SELECT next FROM pool WHERE family = ?", (family,)).fetchone()[0]
        step = 1 << (pool.max_prefixlen - mask)
        first, count = int(pool.network_address), 1 << (mask - pool.prefixlen)
        if len(taken) >= count:
            raise AllocationExhausted(
                f"cluster pool {pool} is exhausted: all {count} node CIDRs of /{mask} are in use; "
                "a larger pool or mask_size, or removing nodes that are gone, would help"
            )
        start = (int.from_bytes(last, "big") - first) // step + 1 if last else 0
        for turn in range(len(taken) + 1):  # so many steps meet a free one
            address = first + (start + turn) % count * step
            if address not in taken:
                break
        return type(pool)((address, mask))  # type: ignore[return-value]

    def claim(self, node: str, cidrs: Mapping[int, Cidr]) -> None:
        """Note CIDRs that a node already has. Raises PoolRefused for an overlap or a stranger."""
        with self._lock, self._store.change() as db:
            held = _held(db, node)
            rows = db.execute("SELECT cidr, node FROM node_cidr").fetchall()
            owners = dict(rows)
            fresh = {family: cidr for family, cidr in cidrs.items() if held.get(family) != cidr}
            for family, cidr in fresh.items():
                if not self._holds(family, cidr):
                    pools = ", ".join(f"{pool} by /{mask}" for pool, mask in self._pools.values())
                    raise PoolRefused(f"{cidr} of node {node} is no block of {pools}")
                owner = owners.get(str(cidr), node)
                if owner != node or family in held:
                    has = f"{cidr} is node {owner}'s" if owner != node else f"it has {held[family]}"
                    raise PoolRefused(
                        f"node {node} cannot have {cidr}: {has}; give each node CIDRs of its own"
                    )
                _insert(db, node, family, cidr)
            if fresh:
                self._note(db, "claim", node, list(fresh.values()))

    def release(self, node: str) -> dict[int, Cidr]:
        """Take a node's CIDRs back; return them, empty when it had none."""
        with self._lock, self._store.change() as db:
            held = _held(db, node)
            if held:
                db.execute("DELETE FROM node_cidr WHERE node = ?", (node,))
                self._note(db, "release", node, list(held.values()))
            return held

    def nodes(self) -> dict[str, dict[int, Cidr]]:
        """Return each node's CIDRs by family, sorted by name."""
        with self._lock:
            rows = self._store.read(
                "SELECT node, family, cidr FROM node_cidr ORDER BY node, family"
            )
        found: dict[str, dict[int, Cidr]] = {}
        for node, family, text in rows:
            found.setdefault(node, {})[family] = ip_network(text)
        return found

    def usage(self) -> list[dict[str, Any]]:
        """Return for each pool: family, cidr, mask_size, size, used, free (in node CIDRs)."""
        used = [family for cidrs in self.nodes().values() for family in cidrs]
        return [
            {
                "family": family,
                "cidr": str(pool),
                "mask_size": mask,
                "size": 1 << (mask - pool.prefixlen),
                "used": used.count(family),
                "free": (1 << (mask - pool.prefixlen)) - used.count(family),
            }
            for family, (pool, mask) in sorted(self._pools.items())
        ]

    def history(self, limit: int = 100) -> list[dict[str, Any]]:
        """Return the latest events, newest first: time, event, node, cidrs."""
        with self._lock:
            rows = self._store.read(
                "SELECT time, event, container, addresses FROM journal ORDER BY id DESC LIMIT ?",
                limit,
            )
        return [dict(zip(("time", "event", "node", "cidrs"), row, strict=True)) for row in rows]

    def _note(self, db: sqlite3.Connection, event: str, node: str, cidrs: list[Cidr]) -> None:
        values = (self._clock(), event, node, " ".join(str(cidr) for cidr in cidrs))
        insert = "INSERT INTO journal (time, event, container, addresses) VALUES (?, ?, ?, ?)"
        number = db.execute(insert, values).lastrowid or 0
        db.execute("DELETE FROM journal WHERE id <= ?", (number - JOURNAL_MOST,))


def _held(db: sqlite3.Connection, node: str) -> dict[int, Cidr]:
    query = "SELECT family, cidr FROM node_cidr WHERE node = ? ORDER BY family"
    return {family: ip_network(text) for family, text in db.execute(query, (node,)).fetchall()}


def _insert(db: sqlite3.Connection, node: str, family: int, cidr: Cidr) -> None:
    db.execute("INSERT INTO node_cidr VALUES (?, ?, ?)", (node, family, str(cidr)))
