"""A kernel in memory for the control plane: applies actions, shows what stands.

Rule: it does what the netlink methods say and no more; no namespace, no root.

Theory. `plan` is pure, so a kernel that is a few dicts is enough to prove that applying a plan
leads to an empty one, for any sequence of changes.
"""

from dataclasses import replace
from ipaddress import ip_address, ip_network

from dataplane.control.config import Config
from dataplane.control.kernel.netlink import PROTOCOL
from dataplane.control.model import (
    HOST,
    HOST_MTU,
    HOST_PEER,
    NUD_PERMANENT,
    Actual,
    Desired,
    EndpointView,
    Link,
    Neighbour,
    Ranges,
    Route,
)
from dataplane.control.ports import merged
from dataplane.objects.collect import Objects
from dataplane.objects.core import Node

UPLINK_MAC = bytes.fromhex("0c0000000001")
NEIGHBOUR_MAC = bytes.fromhex("0c0000000002")
REACHABLE = 0x02


async def no_engines(objects: Objects, wanted: Desired) -> list[str]:
    """What a reconciler asks for policies and services, where a test has none."""
    return []


class FakeKernel:
    """Links, addresses, routes and neighbours in dicts."""

    def __init__(self, queues: int = 1, mtu: int = 1500) -> None:
        self.links = {"eth0": Link(2, "eth0", UPLINK_MAC, mtu, True, queues)}
        self.addresses = {2: {(ip_address("192.0.2.1"), 24), (ip_address("2001:db8::1"), 64)}}
        self.routes = [
            Route(ip_network("192.0.2.0/24"), None, 2),
            Route(ip_network("2001:db8::/64"), None, 2),
            Route(ip_network("0.0.0.0/0"), ip_address("192.0.2.254"), 2),
        ]
        self.neighbours: dict = {}
        self.known("192.0.2.2")
        self.known("2001:db8::2")
        self.provoked: list = []
        self.reserved: Ranges = ((53, 53),)
        self.next = 10

    def known(self, text: str, mac: bytes = NEIGHBOUR_MAC, state: int = REACHABLE) -> None:
        """Add a neighbour on the uplink."""
        address = ip_address(text)
        self.neighbours[2, address] = Neighbour(2, address, mac, state)

    def pod(self, number: int) -> EndpointView:
        """Add a pod's veth."""
        name = f"pst{number:08x}"
        self.next += 1
        self.links[name] = Link(self.next, name, b"\x0a" + bytes(5), HOST_MTU, True, 1, "veth")
        return EndpointView(
            number, name, self.next, b"\x0a" + bytes(5), b"\x0b" + bytes(5), HOST_MTU, 1,
            ip_address("10.244.1.10") + number, ip_address("fd00:244:0:1::10") + number,
        )  # fmt: skip

    def snapshot(self) -> Actual:
        frozen = {index: frozenset(found) for index, found in self.addresses.items()}
        return Actual(
            dict(self.links), frozen, tuple(self.routes), dict(self.neighbours), self.reserved
        )

    # --- what actions call ----------------------------------------------------------------------

    def make_host_pair(self, queues: int, mac: bytes) -> None:
        for number, name in enumerate((HOST, HOST_PEER)):
            self.next += 1
            own = mac if number == 0 else bytes(6)
            self.links[name] = Link(self.next, name, own, HOST_MTU, True, queues, "veth")

    def set_up(self, name: str) -> None:
        self.links[name] = replace(self.links[name], up=True)

    def add_address(self, name, address, length) -> None:
        self.addresses.setdefault(self.links[name].index, set()).add((address, length))

    def remove_address(self, name, address, length) -> None:
        self.addresses[self.links[name].index].discard((address, length))

    def set_neighbour(self, name, address, mac) -> None:
        index = self.links[name].index
        self.neighbours[index, address] = Neighbour(index, address, mac, NUD_PERMANENT)

    def replace_route(self, route) -> None:
        ours = [r for r in self.routes if r.network == route.network and r.protocol == PROTOCOL]
        for found in ours:
            self.routes.remove(found)
        device = self.links[route.device].index
        made = Route(
            route.network, route.gateway, device, mtu=route.mtu, protocol=PROTOCOL,
            source=route.source,
        )  # fmt: skip
        self.routes.append(made)

    def remove_route(self, route) -> None:
        self.routes.remove(route)

    def reserve_ports(self, wanted) -> None:
        self.reserved = merged([*self.reserved, *wanted.ports])

    def provoke(self, device, address) -> None:
        self.provoked.append((device, address))

    def close(self) -> None:
        """Nothing to close."""


def config(**network) -> Config:
    """A node called node1."""
    return Config.model_validate({"node": {"name": "node1"}, "network": network})


def node(number: int, **changes) -> Node:
    """Node `number` with addresses and CIDRs in both families."""
    made = Node(
        f"node{number}",
        (ip_address(f"192.0.2.{number}"), ip_address(f"2001:db8::{number}")),
        (ip_network(f"10.244.{number}.0/24"), ip_network(f"fd00:244:0:{number}::/64")),
    )
    return replace(made, **changes)


def objects(*nodes: Node) -> Objects:
    """Objects with these nodes; node1 and node2 when none is given."""
    return Objects({one.name: one for one in nodes or (node(1), node(2))})
