"""What the node gives to a pod's attachment, and what an attachment is.

Rule: plain frozen values; nothing here touches the kernel or the disk.

Theory. Names and MACs follow from the attachment's key alone, so an ADD that was killed in its
middle is found again by the DEL that the runtime owes it, and a repeated ADD makes the same pair.
"""

import hashlib
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from xdp.abi import CONST

PREFIX = "pst"  # host ends: this and eight hexadecimal digits
MTU = CONST["MTU_MAX"]

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


@dataclass(frozen=True)
class NodeAddressing:
    """This node as its pods see it. A family that the node has not is None."""

    router4: IPv4Address | None
    router6: IPv6Address | None
    local_cidrs: tuple[Network, ...]  # pod prefixes of this node, reached with the large MTU
    path_mtu: int  # bytes of the largest IP packet that reaches any pod unfragmented
    gateway_mac: str  # "02:50:..", the MAC of the router addresses
    hook: str = "xdp"  # of new pods: where their packets are taken, "xdp" or "tc"

    def router(self, version: int) -> Address | None:
        """The router address of family 4 or 6."""
        return self.router4 if version == 4 else self.router6


@dataclass(frozen=True)
class PodRoute:
    """A route in the pod through its interface; no gateway: on link."""

    destination: Network
    gateway: Address | None
    mtu: int | None = None


@dataclass(frozen=True)
class Attachment:
    """A pod's interface as it should stand in the kernel."""

    netns: str  # path of the pod's network namespace
    ifname: str
    host_ifname: str
    mac: str
    host_mac: str
    addresses: tuple[Address, ...]
    routers: tuple[Address, ...]
    router_mac: str
    routes: tuple[PodRoute, ...]
    queue_count: int
    mtu: int = MTU
    hook: str = "xdp"

    @staticmethod
    def plan(
        container_id: str,
        ifname: str,
        netns: str,
        addresses: tuple[Address, ...],
        node: NodeAddressing,
        queue_count: int,
    ) -> "Attachment":
        """The attachment of a container on a node; addresses of families without router drop."""
        kept = tuple(a for a in addresses if node.router(a.version) is not None)
        mac, host_mac = macs(container_id, ifname)
        routers = tuple(node.router(a.version) for a in kept)
        return Attachment(
            netns=netns,
            ifname=ifname,
            host_ifname=host_name(container_id, ifname),
            mac=mac,
            host_mac=host_mac,
            addresses=kept,
            routers=routers,  # type: ignore[arg-type]
            router_mac=node.gateway_mac,
            routes=tuple(r for a in kept for r in pod_routes(node, a.version)),
            queue_count=queue_count,
            hook=node.hook,
        )


def pod_routes(node: NodeAddressing, version: int) -> list[PodRoute]:
    """A pod's routes in one family: router on link, everything through it, near pods with MTU."""
    router = node.router(version)
    if router is None:
        return []
    kind: type[IPv4Network] | type[IPv6Network] = IPv4Network if version == 4 else IPv6Network
    near = [PodRoute(c, router, MTU) for c in node.local_cidrs if c.version == version]
    return [
        PodRoute(kind((int(router), 32 if version == 4 else 128)), None),
        PodRoute(kind((0, 0)), router, node.path_mtu),
        *near,
    ]


def host_name(container_id: str, ifname: str) -> str:
    """The host end's name, `pst` and eight hexadecimal digits."""
    return PREFIX + _digest(container_id, ifname).hex()[:8]


def macs(container_id: str, ifname: str) -> tuple[str, str]:
    """Locally administered unicast MACs (IEEE 802 local bit) of the pod's and the host's end."""
    digest = _digest(container_id, ifname)
    return _mac(0x0A, digest[8:13]), _mac(0x0E, digest[16:21])


def _mac(first: int, rest: bytes) -> str:
    return bytes([first, *rest]).hex(":")


def _digest(container_id: str, ifname: str) -> bytes:
    return hashlib.sha256(f"{container_id}/{ifname}".encode()).digest()
