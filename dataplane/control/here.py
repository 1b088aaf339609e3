"""What this node is: its object, uplinks, MACs, router addresses, MTU, number of workers.

Rule: what everything else depends on is found here, or NotReady says what is missing and the fix.

Theory. Uplinks are the devices that carry the node's InternalIPs. One that has vanished keeps its
row of the port table until it is back or another takes its place: local pods go on, the forwarder
has set the device aside, and neither the number of workers nor the pair penstock0/1 changes.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dataplane.control import overlay
from dataplane.control.config import Config
from dataplane.control.model import Actual, Address, Cidr, Link
from dataplane.objects.collect import Objects
from dataplane.objects.core import Node
from dataplane.tables.model import Port
from xdp.abi import CONST, value

PORT_UPLINK = value("PORT_UPLINK")
IP4_LEAST, IP6_LEAST = 576, 1280  # RFC 791 3.1, RFC 8200 5
PACKET_LEAST = 68  # RFC 791 3.2: what any link must carry


class NotReady(Exception):
    """Something that the node cannot do without is missing; the message says what and the fix."""


@dataclass(frozen=True)
class Here:
    """This node, as far as everything else depends on it."""

    node: Node
    underlay: Address
    uplinks: tuple[Link, ...]
    mac: bytes
    routers: Mapping[int, Address]
    path_mtu: int
    workers: int
    problems: tuple[str, ...] = ()

    @property
    def pod_cidrs(self) -> tuple[Cidr, ...]:
        """The pod CIDR of each family."""
        return tuple(net for family in self.routers if (net := self.node.pod_cidr(family)))


def router(cidr: Cidr) -> Address:
    """Return the router address of a pod CIDR: its first usable address."""
    return cidr.network_address + 1


def here(config: Config, objects: Objects, actual: Actual, current: Mapping[int, Port]) -> Here:
    """Find out about this node; current: the ports of the table now. Raises NotReady."""
    name, network = config.node.name, config.network
    node = objects.nodes.get(name)
    if node is None:
        raise NotReady(
            f"there is no Node {name!r} among {len(objects.nodes)} nodes: add its manifest to "
            "source.folder, or set node.name"
        )
    family = network.underlay_family
    underlay = node.internal_ip(family)
    if underlay is None:
        raise NotReady(
            f"Node {name} has no InternalIP of family {family} in status.addresses: add it, or "
            "set network.underlay_family"
        )
    routers = _routers(node)
    uplinks, problems = _uplinks(config, node, actual, current)
    mtu = overlay.path_mtu(
        min(link.mtu for link in uplinks),
        family if network.mode == "overlay" else None,
        network.mtu,
    )
    problems += _small(mtu, routers)
    return Here(
        node,
        underlay,
        uplinks,
        overlay.vtep_mac(node, underlay),
        routers,
        mtu,
        _workers(config.forwarder.workers, uplinks),
        tuple(problems),
    )


def _routers(node: Node) -> dict[int, Address]:
    cidrs = [net for family in (4, 6) if (net := node.pod_cidr(family)) is not None]
    if not cidrs:
        raise NotReady(f"Node {node.name} has no spec.podCIDRs: set them, or network.pools")
    for cidr in cidrs:
        if cidr.num_addresses < 4:
            raise NotReady(
                f"Node {node.name}: pod CIDR {cidr} has {cidr.num_addresses} addresses, at least 4 "
                "are needed (network, router, one pod, broadcast): make it wider"
            )
    return {cidr.version: router(cidr) for cidr in cidrs}


def _uplinks(
    config: Config, node: Node, actual: Actual, current: Mapping[int, Port]
) -> tuple[tuple[Link, ...], list[str]]:
    lost = {port.name: port for port in current.values() if port.kind == PORT_UPLINK}
    names = config.network.uplinks
    if not names:
        mine = set(node.internal_ips)
        problems: list[str] = []
        names = [
            link.name
            for link in actual.links.values()
            if mine & {address for address, _ in actual.addresses.get(link.index, ())}
        ]
        if not names:
            wanted = ", ".join(map(str, node.internal_ips))
            problems = [f"no device has an InternalIP of Node {node.name} ({wanted}): add it"]
            names = list(lost)
    else:
        problems = [
            f"uplink {name} is not there: plug it in, or correct network.uplinks"
            for name in names
            if name not in actual.links
        ]
    if not names or any(name not in actual.links and name not in lost for name in names):
        raise NotReady(problems[0])
    return tuple(actual.links.get(name) or _lost(lost[name]) for name in names), problems


def _lost(port: Port) -> Link:
    return Link(port.ifindex, port.name, port.mac, port.mtu, False, port.queue_count)


def _small(mtu: int, routers: Mapping[int, Address]) -> list[str]:
    least = IP6_LEAST if 6 in routers else IP4_LEAST
    if mtu < PACKET_LEAST:
        raise NotReady(f"path MTU {mtu}: less than {PACKET_LEAST}; raise the uplink's MTU")
    if mtu < least:
        return [f"path MTU {mtu}: {least} is the least for these pods; raise the uplink's MTU"]
    return []


def _workers(configured: int, uplinks: tuple[Link, ...]) -> int:
    queues = min(link.queues for link in uplinks)
    if configured > queues:
        poorest = min(uplinks, key=lambda link: link.queues).name
        raise NotReady(
            f"forwarder.workers is {configured}, but uplink {poorest} has {queues} queues: set it "
            f"to {queues}, or raise the queues (ethtool -L {poorest} combined {configured})"
        )
    return configured or min(queues, os.cpu_count() or 1, CONST["WORKERS_MAX"], CONST["QUEUES_MAX"])
