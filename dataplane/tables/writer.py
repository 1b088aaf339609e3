"""The one writer of the tables.

Rule: whatever is written is a difference to what stands; writing the same again writes nothing.

Theory. The control plane says what should stand (`set_node`, `set_port`, `replace_routes`); the
writer knows what does, also after a restart, because rows and routes are read back from shared
memory. `publish` increments the generations that the forwarder watches. While routes change, a file
`changing` stands beside them: a writer that finds it at its start repairs what its predecessor,
killed halfway, left. Over read-only memory a writer only reads.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import numpy as np

from dataplane.tables.adjacencies import MASK64, Adjacencies
from dataplane.tables.errors import TableError, TableFull
from dataplane.tables.fib4 import Fib4
from dataplane.tables.fib6 import Fib6
from dataplane.tables.flow_generation import FlowGeneration
from dataplane.tables.model import Adjacency, Port
from dataplane.tables.shm import Shm
from xdp.abi import CONST, value

Network = IPv4Network | IPv6Network
PORT_ACTIVE = value("PORT_ACTIVE")
PORT_EMPTY = value("PORT_EMPTY")


class TableWriter:
    """Writer of node, ports and routes in a writable Shm."""

    def __init__(self, shm: Shm, clock: Callable[[], float] = time.monotonic) -> None:
        """Read back what stands."""
        self.shm = shm
        self._flows = FlowGeneration(shm)
        self._adjacencies = Adjacencies(shm.adjacencies, shm.rewrites, clock)
        self._fib4 = Fib4(shm.fib4_wide, shm.fib4_deep, clock, shm.extents("fib4_wide"))
        self._fib6 = Fib6(shm.fib6, shm.fib6_lengths, clock, shm.extents("fib6"))
        self._marker = shm.folder / "changing"
        if shm.writable and self._marker.exists():
            self._fib4.repair()
            self._marker.unlink()
        # A predecessor may have died between its last change and publish().
        self._changed = self._ports_changed = True

    # --- the node row and the ports -------------------------------------------------------------

    def set_node(self, **fields: Any) -> bool:
        """Set members of struct node; bytes for MACs. Return whether something changed.

        Raises TableError, with nothing changed, for a member that is none or does not fit.
        """
        row = self.shm.node[0]
        fresh = row.copy()
        for name, given in fields.items():
            try:
                fresh[name] = np.frombuffer(given, np.uint8) if isinstance(given, bytes) else given
            except (ValueError, OverflowError, TypeError) as error:
                raise TableError(f"node.{name} cannot be {given!r}: {error}") from None
        changed = fresh.tobytes() != row.tobytes()
        for name in fields:
            row[name] = fresh[name]
        self._changed |= changed
        return changed

    def ports(self) -> dict[int, Port]:
        """Return the ports that stand, by index."""
        rows = self.shm.ports
        return {int(i): _port(rows[i]) for i in np.flatnonzero(rows["state"] == PORT_ACTIVE)}

    def set_port(self, index: int, port: Port) -> bool:
        """Write row `index`; return whether something changed."""
        if not 0 <= index < CONST["PORTS_MAX"]:
            raise TableFull(
                f"port index {index}: limit {CONST['PORTS_MAX']} ports a node (PORTS_MAX)"
            )
        row = self.shm.ports[index]
        fresh = _row(port, row.dtype)
        if fresh.tobytes() == row.tobytes():
            return False
        row["state"] = PORT_EMPTY
        for name in row.dtype.names:
            if name != "state":
                row[name] = fresh[name]
        row["state"] = PORT_ACTIVE
        self._changed = self._ports_changed = True
        return True

    def clear_port(self, index: int) -> bool:
        """Empty row `index`; return whether something changed."""
        row = self.shm.ports[index]
        if row["state"] == PORT_EMPTY:
            return False
        row["state"] = PORT_EMPTY
        self._changed = self._ports_changed = True
        return True

    # --- routes -----------------------------------------------------------------------------------

    def routes(self) -> dict[Network, int]:
        """Return every route that stands -> row of its adjacency."""
        found: dict[Network, int] = {}
        for key, index in self._fib4.routes.items():
            found[IPv4Network(key)] = index
        for key, index in self._fib6.routes.items():
            found[IPv6Network(key)] = index
        return found

    def adjacency(self, index: int) -> np.void:
        """Return row `index` of the adjacency table."""
        return self.shm.adjacencies[index]

    def set_route(self, network: Network, adjacency: Adjacency) -> bool:
        """Add or replace one route. Raises TableFull. Return whether something changed."""
        index = self._adjacencies.intern(adjacency, network.version)
        fib, key = self._place(network)
        if fib.routes.get(key) == index:
            return False
        with self._changing():
            fib.set(*key, index)
        return True

    def delete_route(self, network: Network) -> bool:
        """Delete one route; return whether there was one."""
        fib, key = self._place(network)
        if key not in fib.routes:
            return False
        with self._changing():
            return fib.delete(*key)

    def _place(self, network: Network) -> tuple[Fib4 | Fib6, tuple[int, int]]:
        fib = self._fib4 if network.version == 4 else self._fib6
        return fib, (int(network.network_address), network.prefixlen)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        self._marker.touch()
        self._changed = True
        try:
            yield
        except TableFull:
            self._marker.unlink()
            raise
        self._marker.unlink()

    def replace_routes(self, wanted: Mapping[Network, Adjacency]) -> list[str]:
        """Make the routes these and no others; return what changed, printable.

        New routes and changes come first, short prefixes before long ones, then deletions. Raises
        TableFull when one does not fit; then the routes are those from before.
        """
        try:
            return self._replace(*self._difference(wanted))
        finally:
            used = set(self._fib4.routes.values()) | set(self._fib6.routes.values())
            self._adjacencies.keep(used)

    def _replace(self, fresh: list[tuple[Network, int]], kept: tuple[set, set]) -> list[str]:
        fibs: tuple[Fib4 | Fib6, ...] = (self._fib4, self._fib6)
        gone = [[key for key in fib.routes if key not in kept[n]] for n, fib in enumerate(fibs)]
        changes = [f"route {network}" for network, _ in fresh]
        if fresh or any(gone):
            with self._changing():
                self._set_all(fresh)
                for fib, make, keys in zip(fibs, (IPv4Network, IPv6Network), gone, strict=True):
                    for key in keys:
                        fib.delete(*key)
                        changes.append(f"no route {make(key)}")
        return changes

    def _difference(
        self, wanted: Mapping[Network, Adjacency]
    ) -> tuple[list[tuple[Network, int]], tuple[set, set]]:
        """Return the routes that are new or change, with their rows; and the keys of all."""
        rows: dict[tuple[int, int], int] = {}  # (identity, family): interning 1 M times is slow
        kept: tuple[set, set] = (set(), set())
        fresh = []
        for network, adjacency in wanted.items():
            version = network.version
            index = rows.get((id(adjacency), version))
            if index is None:
                index = rows[id(adjacency), version] = self._adjacencies.intern(adjacency, version)
            fib, key = self._place(network)
            kept[version == 6].add(key)
            if fib.routes.get(key) != index:
                fresh.append((network, index))
        fresh.sort(key=lambda item: (item[0].version, item[0].prefixlen))
        return fresh, kept

    def _set_all(self, fresh: list[tuple[Network, int]]) -> None:
        """Set routes, all or none. Raises TableFull."""
        before: list[tuple[Fib4 | Fib6, tuple[int, int], int | None]] = []
        try:
            for network, index in fresh:
                fib, key = self._place(network)
                known = fib.routes.get(key)
                fib.set(*key, index)
                before.append((fib, key, known))
        except TableFull:
            for fib, key, known in reversed(before):
                if known is None:
                    fib.delete(*key)
                else:
                    fib.set(*key, known)
            raise

    def usage(self) -> dict[str, tuple[int, int]]:
        """Return (in use, limit) of each table."""
        shm = self.shm
        return {
            "ports": (int((shm.ports["state"] != PORT_EMPTY).sum()), len(shm.ports)),
            "adjacencies": (len(self._adjacencies), len(shm.adjacencies) - 1),
            "routes6": (len(self._fib6.routes), len(shm.fib6) // 2),
        }

    def publish(self) -> bool:
        """Tell readers that something changed, if it did; return whether it did."""
        control = self.shm.control[0]
        changed = self._changed or control["generation"] == 0
        if self._ports_changed or control["ports_generation"] == 0:
            control["ports_generation"] += 1
        if changed:
            control["generation"] += 1
        if changed or self._ports_changed:
            self._flows.advance()
        self._changed = self._ports_changed = False
        return bool(changed)


def _row(port: Port, dtype: np.dtype) -> np.ndarray:
    row = np.zeros((), dtype)
    row["state"], row["kind"], row["queue_count"] = PORT_ACTIVE, port.kind, port.queue_count
    row["ifindex"], row["mtu"], row["endpoint"] = port.ifindex, port.mtu, port.endpoint
    row["mac"] = np.frombuffer(port.mac, np.uint8)
    row["peer_mac"] = np.frombuffer(port.peer_mac, np.uint8)
    row["address4"] = int(port.address4) if port.address4 else 0
    six = int(port.address6) if port.address6 else 0
    row["address6_hi"], row["address6_lo"] = six >> 64, six & MASK64
    row["name"] = port.name.encode()
    row["hook"], row["peer_ifindex"] = port.hook, port.peer_ifindex
    return row


def _port(row: np.void) -> Port:
    six = int(row["address6_hi"]) << 64 | int(row["address6_lo"])
    return Port(
        kind=int(row["kind"]),
        name=row["name"].decode(),
        ifindex=int(row["ifindex"]),
        mtu=int(row["mtu"]),
        queue_count=int(row["queue_count"]),
        mac=row["mac"].tobytes(),
        peer_mac=row["peer_mac"].tobytes(),
        address4=IPv4Address(int(row["address4"])) if row["address4"] else None,
        address6=IPv6Address(six) if six else None,
        endpoint=int(row["endpoint"]),
        hook=int(row["hook"]),
        peer_ifindex=int(row["peer_ifindex"]),
    )
