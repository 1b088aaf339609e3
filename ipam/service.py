"""Addresses for pods.

Rule: an address belongs to one attachment at a time, and asking again for the same attachment
gives the same addresses.

Theory. A lease takes one address of each family that the node has, in one transaction. A released
address rests REST_S seconds; fresh ones come first, then the one released longest ago (in a pool
without an end, IPv6, as soon as REUSE_FROM of them have rested). A lease
whose pod is gone without a DEL is a leak: `sweep` returns it when the caller has said so twice,
at least SUSPECT_S apart, so that a pod which is just being attached is never taken for gone.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any

from ipam.errors import AllocationExhausted, PoolRefused
from ipam.model import Address, Cidr, Key, Lease
from ipam.pool import bounds, check, following, router_address, size
from ipam.store import JOURNAL_MOST, Store

REST_S = 60.0
SUSPECT_S = 30.0
REUSE_FROM = 4096  # rested addresses from which on they come before fresh ones


def _blob(address: Address) -> bytes:
    return int(address).to_bytes(16, "big")


def _address(family: int, blob: bytes) -> Address:
    number = int.from_bytes(blob, "big")
    return IPv4Address(number) if family == 4 else IPv6Address(number)


class Ipam:
    """Leases of one node."""

    def __init__(self, store: Store, clock: Callable[[], float], rest_s: float) -> None:
        """Use `open`."""
        self._store, self._clock, self._rest = store, clock, rest_s
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, path: Path, clock: Callable[[], float] = time.time, rest_s: float = REST_S
    ) -> "Ipam":
        """Open the state file, making it when there is none. Raises StateDamaged."""
        return cls(Store(Path(path)), clock, rest_s)

    def close(self) -> None:
        """Close the state file."""
        self._store.close()

    # --- pools ------------------------------------------------------------------------------------

    def set_node_pools(self, pools: Mapping[int, Cidr], reserved: Iterable[Address] = ()) -> None:
        """Set the node's CIDR of each family; its router address is reserved in any case.

        Raises PoolRefused when a pool has no room or leases would be stranded.
        """
        kept = {*reserved, *(router_address(cidr) for cidr in pools.values())}
        for family, cidr in pools.items():
            check(cidr, family, kept)
        with self._lock, self._store.change() as db:
            self._refuse_strays(db, pools, kept)
            db.execute("DELETE FROM reserved")
            for address in kept:
                row = (address.version, _blob(address))
                db.execute("INSERT OR IGNORE INTO reserved VALUES (?, ?)", row)
            known = dict(db.execute("SELECT family, cidr FROM pool").fetchall())
            for family in known.keys() - pools.keys():
                db.execute("DELETE FROM pool WHERE family = ?", (family,))
            for family, cidr in pools.items():
                if known.get(family) != str(cidr):
                    db.execute(
                        "INSERT OR REPLACE INTO pool VALUES (?, ?, NULL)", (family, str(cidr))
                    )
                    self._note(db, f"pool {cidr}")

    def _refuse_strays(
        self, db: sqlite3.Connection, pools: Mapping[int, Cidr], kept: set[Address]
    ) -> None:
        rows = db.execute("SELECT family, address FROM address WHERE lease IS NOT NULL").fetchall()
        strays = [
            str(address)
            for family, address in ((f, _address(f, blob)) for f, blob in rows)
            if family not in pools or address not in pools[family] or address in kept
        ]
        if strays:
            shown = ", ".join(strays[:5]) + (" ..." if len(strays) > 5 else "")
            wanted = ", ".join(str(cidr) for cidr in pools.values())
            raise PoolRefused(
                f"pools {wanted} leave out {len(strays)} leased addresses ({shown}): "
                f"grow the pools to contain them, or delete those pods first"
            )

    # --- leases -----------------------------------------------------------------------------------

    def allocate(
        self, network: str, container_id: str, ifname: str, owner: Mapping[str, Any] | None = None
    ) -> Lease:
        """Lease an address of each family. Raises AllocationExhausted, with nothing changed."""
        key = (network, container_id, ifname)
        self._settle_clock()
        with self._lock, self._store.change() as db:
            if found := self._find(db, key):
                return found
            pools = db.execute("SELECT family, cidr, next FROM pool ORDER BY family").fetchall()
            if not pools:
                raise AllocationExhausted("this node has no pool yet: it needs spec.podCIDRs")
            now = self._clock()
            values = (*key, json.dumps(dict(owner or {})), now)
            cursor = db.execute(
                "INSERT INTO lease (network, container, ifname, owner, created) "
                "VALUES (?, ?, ?, ?, ?)",
                values,
            )
            addresses = {
                family: self._take(db, family, ip_network(cidr), last, cursor.lastrowid, now)
                for family, cidr, last in pools
            }
            self._note(db, "allocate", key, addresses)
            return Lease(key, addresses, now, dict(owner or {}))

    def _settle_clock(self) -> None:
        """Keep a clock that was set back from prolonging the rest; stands whatever follows."""
        with self._lock, self._store.change() as db:
            now = self._clock()
            db.execute("UPDATE address SET released = ? WHERE released > ?", (now, now))

    def _take(
        self,
        db: sqlite3.Connection,
        family: int,
        cidr: Cidr,
        last: bytes | None,
        lease: int | None,
        now: float,
    ) -> Address:
        """Lease the next fresh address of a family, or the one that has rested longest."""
        first, end = (number.to_bytes(16, "big") for number in bounds(cidr))
        rested = db.execute(
            "SELECT count(*) FROM address WHERE family = ? AND released <= ? "
            "AND address BETWEEN ? AND ?",
            (family, now - self._rest, first, end),
        ).fetchone()[0]
        fresh = self._fresh(db, family, cidr, last) if rested <= REUSE_FROM else None
        if fresh is not None:
            row = (family, _blob(fresh), lease)
            db.execute("INSERT INTO address VALUES (?, ?, ?, NULL)", row)
            db.execute("UPDATE pool SET next = ? WHERE family = ?", (_blob(fresh), family))
            return fresh
        found = db.execute(
            "SELECT address, released FROM address WHERE family = ? AND lease IS NULL "
            "AND address BETWEEN ? AND ? ORDER BY released, address LIMIT 1",
            (family, first, end),
        ).fetchone()
        if found is None or now - found[1] < self._rest:
            raise self._exhausted(db, family, cidr, found[1] if found else None, now)
        db.execute(
            "UPDATE address SET lease = ?, released = NULL WHERE family = ? AND address = ?",
            (lease, family, found[0]),
        )
        return _address(family, found[0])

    def _fresh(
        self, db: sqlite3.Connection, family: int, cidr: Cidr, last: bytes | None
    ) -> Address | None:
        """The first address behind `last` that is neither reserved nor leased nor released."""
        query = "SELECT address FROM {} WHERE family = ? AND address > ?"
        rows = []
        for table in ("reserved", "address"):
            rows += db.execute(query.format(table), (family, last or b"")).fetchall()
        taken = {int.from_bytes(blob, "big") for (blob,) in rows}
        return following(cidr, int.from_bytes(last, "big") if last else None, taken)

    def _exhausted(
        self, db: sqlite3.Connection, family: int, cidr: Cidr, oldest: float | None, now: float
    ) -> AllocationExhausted:
        count = "SELECT count(*) FROM address WHERE family = ? AND lease IS {} NULL"
        used = db.execute(count.format("NOT"), (family,)).fetchone()[0]
        resting = db.execute(count.format(""), (family,)).fetchone()[0]
        kept = db.execute("SELECT address FROM reserved WHERE family = ?", (family,)).fetchall()
        total = size(cidr, [_address(family, blob) for (blob,) in kept])
        wait = "" if oldest is None else f"; one is free in {self._rest - (now - oldest):.0f} s"
        return AllocationExhausted(
            f"pool {cidr} is exhausted: {used} of {total} addresses in use, {resting} resting"
            f"{wait}; a larger node CIDR or fewer pods on this node would help"
        )

    def release(self, key: Key) -> Lease | None:
        """Return an attachment's addresses to the pool; None when it has none."""
        with self._lock, self._store.change() as db:
            found = self._find(db, key)
            if found is not None:
                self._release(db, found, "release")
            return found

    def _release(self, db: sqlite3.Connection, lease: Lease, event: str) -> None:
        row = db.execute(
            "SELECT id FROM lease WHERE network = ? AND container = ? AND ifname = ?", lease.key
        ).fetchone()
        db.execute(
            "UPDATE address SET lease = NULL, released = ? WHERE lease = ?", (self._clock(), row[0])
        )
        db.execute("DELETE FROM lease WHERE id = ?", row)
        self._note(db, event, lease.key, lease.addresses)

    def _find(self, db: sqlite3.Connection, key: Key) -> Lease | None:
        row = db.execute(
            "SELECT id, owner, created FROM lease "
            "WHERE network = ? AND container = ? AND ifname = ?",
            key,
        ).fetchone()
        if row is None:
            return None
        found = db.execute("SELECT family, address FROM address WHERE lease = ?", row[:1])
        addresses = {family: _address(family, blob) for family, blob in found.fetchall()}
        return Lease(key, addresses, row[2], json.loads(row[1]))

    def leases(self) -> list[Lease]:
        """Return all leases, oldest first."""
        with self._lock:
            rows = self._store.read(
                "SELECT l.network, l.container, l.ifname, l.owner, l.created, a.family, a.address "
                "FROM lease l LEFT JOIN address a ON a.lease = l.id ORDER BY l.id, a.family"
            )
        found: dict[Key, Lease] = {}
        for network, container, ifname, owner, created, family, blob in rows:
            key = (network, container, ifname)
            lease = found.setdefault(key, Lease(key, {}, created, json.loads(owner)))
            if family is not None:
                dict.__setitem__(lease.addresses, family, _address(family, blob))  # type: ignore
        return list(found.values())

    # --- leaks, numbers, history ------------------------------------------------------------------

    def sweep(self, is_alive: Callable[[Lease], bool]) -> list[Lease]:
        """Release the leases that is_alive has denied twice, SUSPECT_S apart; return them."""
        now, gone = self._clock(), []
        verdicts = [(lease, is_alive(lease)) for lease in self.leases()]
        with self._lock, self._store.change() as db:
            for lease, alive in verdicts:
                row = db.execute(
                    "SELECT suspect, created FROM lease "
                    "WHERE network = ? AND container = ? AND ifname = ?",
                    lease.key,
                ).fetchone()
                if row is None or row[1] != lease.created:
                    continue  # released or given anew meanwhile
                suspect = row[0]
                if not alive and suspect is not None and now - suspect >= SUSPECT_S:
                    self._release(db, lease, "leak returned")
                    gone.append(lease)
                elif alive != (suspect is None):
                    db.execute(
                        "UPDATE lease SET suspect = ? "
                        "WHERE network = ? AND container = ? AND ifname = ?",
                        (None if alive else now, *lease.key),
                    )
        return gone

    def usage(self) -> list[dict[str, Any]]:
        """Return for each pool: cidr, family, size, used, resting, free."""
        with self._lock:
            pools = self._store.read("SELECT family, cidr FROM pool ORDER BY family")
            rows = self._store.read(
                "SELECT family, count(lease), count(*) - count(lease) FROM address GROUP BY family"
            )
            kept = self._store.read("SELECT family, address FROM reserved")
        counts = {family: (used, resting) for family, used, resting in rows}
        reserved = [_address(family, blob) for family, blob in kept]
        found = []
        for family, text in pools:
            total = size(ip_network(text), reserved)
            used, resting = counts.get(family, (0, 0))
            found.append(
                {
                    "family": family,
                    "cidr": text,
                    "size": total,
                    "used": used,
                    "resting": resting,
                    "free": max(0, total - used - resting),
                }
            )
        return found

    def history(self, limit: int = 100) -> list[dict[str, Any]]:
        """Return the latest events, newest first."""
        with self._lock:
            rows = self._store.read(
                "SELECT time, event, network, container, ifname, addresses FROM journal "
                "ORDER BY id DESC LIMIT ?",
                limit,
            )
        names = ("time", "event", "network", "container", "ifname", "addresses")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _note(
        self,
        db: sqlite3.Connection,
        event: str,
        key: Key | None = None,
        addresses: Mapping[int, Address] | None = None,
    ) -> None:
        text = " ".join(str(address) for _, address in sorted((addresses or {}).items()))
        values = (self._clock(), event, *(key or (None, None, None)), text)
        cursor = db.execute(
            "INSERT INTO journal (time, event, network, container, ifname, addresses) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            values,
        )
        db.execute("DELETE FROM journal WHERE id <= ?", ((cursor.lastrowid or 0) - JOURNAL_MOST,))
