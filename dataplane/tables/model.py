"""What tables hold, as plain values.

Rule: frozen and comparable: a plan is a comparison of these.

Theory. The control plane speaks of ports and adjacencies by these classes; rewrite.py and writer.py
know the bytes.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

Address = IPv4Address | IPv6Address
NO_MAC = bytes(6)


@dataclass(frozen=True, slots=True)
class Port:
    """A device that the forwarder opens. kind: enum port_kind."""

    kind: int
    name: str
    ifindex: int
    mtu: int
    queue_count: int
    mac: bytes
    peer_mac: bytes = NO_MAC
    address4: IPv4Address | None = None
    address6: IPv6Address | None = None
    endpoint: int = 0


@dataclass(frozen=True, slots=True)
class Tunnel:
    """The outer header's constants. kind: enum tunnel_kind; port: UDP, host order."""

    kind: int
    local: Address
    remote: Address
    port: int
    vni: int
    inner_source_mac: bytes
    inner_destination_mac: bytes


@dataclass(frozen=True, slots=True)
class Adjacency:
    """A next hop. kind: enum adjacency_kind; port: index of the egress port; mtu: IP bytes."""

    kind: int
    port: int = 0
    mtu: int = 0
    source_mac: bytes = NO_MAC
    destination_mac: bytes = NO_MAC
    tunnel: Tunnel | None = None
