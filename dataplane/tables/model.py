"""What stands in the tables, as values: a port, a next hop, a tunnel.

Rule: an object of this file that exists can be written to its row as it is.

Theory. Frozen dataclasses, so that equal next hops are one key and share one row of the adjacency
table. Bounds are checked when an object is made, far from the tables, with a message for people.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from dataplane.tables.errors import TableError
from xdp.abi import CONST, ENUM, value

Address = IPv4Address | IPv6Address

NO_MAC = bytes(6)
PROXY_DEVICE, PROXY_PEER = "penstock2", "penstock3"  # the DNS proxy's end of its veth, and ours
PROXY_MAC = bytes.fromhex("025053000001")
PROXY_ADDRESSES: Mapping[int, Address] = {
    4: IPv4Address("169.254.42.2"),
    6: IPv6Address("fd00:42::2"),
}
"""What routes call the DNS proxy; no packet has these addresses."""
NAME_MOST = 15  # IFNAMSIZ - 1
VNI_MOST = (1 << 24) - 1
_U32 = (1 << 32) - 1


def check_range(what: str, number: int, least: int, most: int) -> None:
    """Raise TableError unless least <= number <= most."""
    if not least <= number <= most:
        raise TableError(f"{what} is {number}, it must be {least}..{most}")


def _check_mac(what: str, mac: bytes) -> None:
    if not isinstance(mac, bytes) or len(mac) != 6:
        raise TableError(f"{what} is {mac!r}, it must be 6 bytes")


def _check_kind(what: str, kind: int, enum: str) -> None:
    if kind not in ENUM[enum].values():
        names = ", ".join(f"{number} {name}" for name, number in ENUM[enum].items())
        raise TableError(f"{what} is {kind!r}, it must be one of {names}")


@dataclass(frozen=True, slots=True)
class Port:
    """A device of the dataplane (struct port). MTU in bytes, MACs 6 bytes."""

    kind: int  # enum port_kind
    name: str
    ifindex: int
    mtu: int
    queue_count: int
    mac: bytes = NO_MAC
    peer_mac: bytes = NO_MAC
    address4: IPv4Address | None = None
    address6: IPv6Address | None = None
    endpoint: int = 0
    hook: int = 0  # enum port_hook
    peer_ifindex: int = 0  # host port: of penstock0

    def __post_init__(self) -> None:
        """Raise TableError for what the row cannot hold."""
        _check_kind("the port's kind", self.kind, "port_kind")
        _check_kind("the port's hook", self.hook, "port_hook")
        if not 0 < len(self.name.encode()) <= NAME_MOST:
            raise TableError(f"port name {self.name!r} must have 1..{NAME_MOST} bytes")
        check_range(f"ifindex of {self.name}", self.ifindex, 1, (1 << 31) - 1)
        check_range(f"mtu of {self.name}", self.mtu, 68, _U32)
        check_range(f"queue count of {self.name}", self.queue_count, 1, CONST["QUEUES_MAX"])
        check_range(f"endpoint of {self.name}", self.endpoint, 0, _U32)
        _check_mac(f"mac of {self.name}", self.mac)
        _check_mac(f"peer mac of {self.name}", self.peer_mac)


@dataclass(frozen=True, slots=True)
class Tunnel:
    """The outer headers towards another node. port: UDP, host order."""

    kind: int  # enum tunnel_kind, not TUNNEL_NONE
    local: Address
    remote: Address
    port: int
    vni: int
    inner_source_mac: bytes
    inner_destination_mac: bytes

    def __post_init__(self) -> None:
        """Raise TableError for what the headers cannot hold."""
        _check_kind("the tunnel's kind", self.kind, "tunnel_kind")
        if self.kind == value("TUNNEL_NONE"):
            raise TableError("a tunnel of kind TUNNEL_NONE is none: leave tunnel=None")
        if self.local.version != self.remote.version:
            raise TableError(
                f"tunnel from {self.local} to {self.remote}: both must be of one family, set "
                "network.underlay_family to one that both nodes have"
            )
        check_range("the tunnel's UDP port", self.port, 1, 65535)
        check_range("the tunnel's VNI", self.vni, 0, VNI_MOST)
        _check_mac("the inner source MAC", self.inner_source_mac)
        _check_mac("the inner destination MAC", self.inner_destination_mac)


@dataclass(frozen=True, slots=True)
class Adjacency:
    """A next hop (struct adjacency and rewrite). mtu: largest IP packet, not yet encapsulated."""

    kind: int  # enum adjacency_kind
    port: int = 0  # index of the egress port
    mtu: int = 0
    source_mac: bytes = NO_MAC
    destination_mac: bytes = NO_MAC
    tunnel: Tunnel | None = None

    def __post_init__(self) -> None:
        """Raise TableError for what the row cannot hold."""
        _check_kind("the adjacency's kind", self.kind, "adjacency_kind")
        if self.kind == value("ADJACENCY_NONE"):
            raise TableError("an adjacency of kind ADJACENCY_NONE is none: delete the route")
        check_range("the adjacency's port", self.port, 0, CONST["PORTS_MAX"] - 1)
        check_range("the adjacency's mtu", self.mtu, 0, _U32)
        _check_mac("the adjacency's source MAC", self.source_mac)
        _check_mac("the adjacency's destination MAC", self.destination_mac)
        if (self.tunnel is not None) != (self.kind == value("ADJACENCY_TUNNEL")):
            raise TableError(
                f"an adjacency of kind {self.kind} {'has' if self.tunnel else 'lacks'} a tunnel: "
                "ADJACENCY_TUNNEL has one, the other kinds have none"
            )
