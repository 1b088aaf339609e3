"""The node's state as values: what the kernel has, what should stand.

Rule: frozen and comparable; no handle, no clock.

Theory. `Actual` is a snapshot of the kernel; `Desired` is computed from configuration, objects,
endpoints and the snapshot; `plan` compares them. Interfaces of the node's own stack are `penstock0`
(the node's end, with the router addresses) and `penstock1` (our end, a port of the forwarder).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any

from dataplane.tables.model import Adjacency, Port
from xdp.abi import CONST

Address = IPv4Address | IPv6Address
Cidr = IPv4Network | IPv6Network

HOST = "penstock0"
HOST_PEER = "penstock1"
HOST_MTU = CONST["MTU_MAX"]
NEXT_HOPS: dict[int, Address] = {4: ip_address("169.254.1.1"), 6: ip_address("fe80::1")}
"""Next hop of the node's routes to pods: nobody has it, a permanent neighbour stands for it."""

RESERVED_PORTS = "reserved-ports"
"""File in RUN_DIR: the ports that we added to the kernel's reserved ones."""

PROTOCOL = 80  # our routes, in rtm_protocol: nobody else's number (iproute2's rt_protos)

NUD_STALE = 0x04
NUD_PERMANENT = 0x80
NUD_USABLE = 0x02 | NUD_STALE | 0x08 | 0x10 | 0x40 | NUD_PERMANENT  # REACHABLE..PROBE, NOARP


@dataclass(frozen=True)
class Link:
    """A network device."""

    index: int
    name: str
    mac: bytes
    mtu: int
    up: bool
    queues: int
    kind: str = ""


@dataclass(frozen=True)
class Route:
    """A unicast route of the main table."""

    network: Cidr
    gateway: Address | None
    device: int
    metric: int = 0
    mtu: int = 0
    protocol: int = 0
    source: Address | None = None


@dataclass(frozen=True)
class Neighbour:
    """An entry of the neighbour table; state: NUD_* bits."""

    device: int
    address: Address
    mac: bytes
    state: int

    @property
    def usable(self) -> bool:
        """Whether unicast packets may be sent to its MAC."""
        return bool(self.state & NUD_USABLE) and any(self.mac) and not self.mac[0] & 1


Ranges = tuple[tuple[int, int], ...]
"""Ports as (first, last), in order and apart from each other."""


@dataclass(frozen=True)
class Reservation:
    """Ports that no socket of the node shall get by chance. record: keeps what we added."""

    ports: Ranges
    record: Path


@dataclass(frozen=True)
class Actual:
    """A snapshot of the kernel."""

    links: Mapping[str, Link] = field(default_factory=dict)
    addresses: Mapping[int, frozenset[tuple[Address, int]]] = field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    neighbours: Mapping[tuple[int, Address], Neighbour] = field(default_factory=dict)
    reserved_ports: Ranges | None = None  # None: the kernel has no such list

    def link(self, index: int) -> Link | None:
        """Return the device of an index."""
        return next((link for link in self.links.values() if link.index == index), None)


@dataclass(frozen=True)
class EndpointView:
    """A pod's attachment as the control plane needs it."""

    number: int
    host_ifname: str
    ifindex: int
    mac: bytes
    peer_mac: bytes
    mtu: int
    queue_count: int
    address4: IPv4Address | None
    address6: IPv6Address | None
    hook: int = 0  # enum port_hook


@dataclass(frozen=True)
class HostRoute:
    """A route of the node's own stack that we own."""

    network: Cidr
    gateway: Address
    device: str
    mtu: int
    source: Address | None = None


@dataclass(frozen=True)
class Tables:
    """What should stand in shared memory. `node`: members of struct node."""

    node: Mapping[str, Any] = field(default_factory=dict)
    ports: Mapping[int, Port] = field(default_factory=dict)
    routes: Mapping[Cidr, Adjacency] = field(default_factory=dict)
    tunnel_port: int = 0
    locals: tuple[Address, ...] = ()
    prefixes: tuple[Cidr, ...] = ()
    nat: tuple[Address, ...] = ()  # addresses that connections are masqueraded with


@dataclass(frozen=True)
class Desired:
    """What should stand in all."""

    queues: int
    gateway_mac: bytes
    host_addresses: frozenset[tuple[Address, int]]
    host_routes: tuple[HostRoute, ...]
    host_neighbours: Mapping[Address, bytes]
    provoke: frozenset[tuple[int, Address]]
    tables: Tables
    view: Mapping[str, Any]
    own: frozenset[Address] = frozenset()  # all addresses of this node
    reachable: frozenset[Address] = frozenset()  # of these, what others reach it by
    problems: tuple[str, ...] = ()
    reserved: Reservation | None = None
