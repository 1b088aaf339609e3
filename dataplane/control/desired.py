"""What should stand: from configuration, objects, endpoints and the kernel's state.

Rule: a pure function of its arguments; the same arguments give the same answer.

Theory. One remote node with a bad manifest or no route must not stop the others: it becomes a
problem in the answer, shown by `penstock status`. Without this node's own object nothing can be
computed: NotReady says what is missing.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network

from dataplane.control import overlay
from dataplane.control.config import Config
from dataplane.control.model import (
    HOST,
    HOST_MTU,
    HOST_PEER,
    NEXT_HOPS,
    Actual,
    Address,
    Cidr,
    Desired,
    EndpointView,
    HostRoute,
    Link,
    Tables,
)
from dataplane.control.objects import ManifestError, Node, Objects
from dataplane.control.routing import UNRESOLVED, Underlay
from dataplane.tables.model import Adjacency, Port, Tunnel
from xdp.abi import CONST, value

POD, GATEWAY = value("ADJACENCY_POD"), value("ADJACENCY_GATEWAY")
TO_HOST, TO_TUNNEL = value("ADJACENCY_HOST"), value("ADJACENCY_TUNNEL")
BLACKHOLE = value("ADJACENCY_BLACKHOLE")
PORT_POD, PORT_HOST, PORT_UPLINK = value("PORT_POD"), value("PORT_HOST"), value("PORT_UPLINK")
FAMILIES = (4, 6)


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


def router(cidr: Cidr) -> Address:
    """Return the router address of a pod CIDR: its first usable address."""
    return cidr.network_address + 1


def here(config: Config, objects: Objects, actual: Actual) -> Here:
    """Find out about this node. Raises NotReady."""
    name, network = config.node.name, config.network
    node = objects.nodes.get(name)
    if node is None:
        raise NotReady(f"there is no Node {name!r} among {len(objects.nodes)}: add its manifest")
    if not node.pod_cidrs:
        raise NotReady(f"Node {name} has no spec.podCIDRs: set them, or network.pools")
    family = network.underlay_family
    underlay = node.internal_ip(family)
    if underlay is None:
        raise NotReady(f"Node {name} has no InternalIP of family {family}: network.underlay_family")
    uplinks = _uplinks(config, node, actual)
    encapsulated = family if network.mode == "overlay" else None
    mtu = overlay.path_mtu(min(link.mtu for link in uplinks), encapsulated, network.mtu)
    queues = min(link.queues for link in uplinks)
    limit = min(queues, os.cpu_count() or 1, CONST["WORKERS_MAX"], CONST["QUEUES_MAX"])
    if config.forwarder.workers > queues:
        raise NotReady(
            f"forwarder.workers {config.forwarder.workers}, but an uplink has {queues} queues: "
            f"set it to {queues} or raise the queues (ethtool -L)"
        )
    return Here(
        node,
        underlay,
        uplinks,
        overlay.vtep_mac(node, underlay),
        {cidr.version: router(cidr) for cidr in node.pod_cidrs},
        mtu,
        config.forwarder.workers or limit,
    )


def _uplinks(config: Config, node: Node, actual: Actual) -> tuple[Link, ...]:
    names = config.network.uplinks
    if not names:
        mine = set(node.internal_ips)
        names = [
            link.name
            for link in actual.links.values()
            if mine & {address for address, _ in actual.addresses.get(link.index, ())}
        ]
    if not names:
        wanted = ", ".join(map(str, node.internal_ips)) or "none"
        raise NotReady(f"no device has an InternalIP of Node {node.name} ({wanted}): add it")
    missing = [name for name in names if name not in actual.links]
    if missing:
        raise NotReady(f"uplink {missing[0]} is not there: it is gone, or network.uplinks is wrong")
    return tuple(actual.links[name] for name in names)


def _ports(
    me: Here, endpoints: Sequence[EndpointView], actual: Actual, current: Mapping[int, Port]
) -> dict[int, Port]:
    """Every port, at the index that its name already has."""
    found: list[Port] = []
    host, peer = actual.links.get(HOST), actual.links.get(HOST_PEER)
    if host and peer:
        found.append(
            Port(PORT_HOST, peer.name, peer.index, peer.mtu, me.workers, peer.mac, host.mac)
        )
    for link in me.uplinks:
        queues = min(link.queues, CONST["QUEUES_MAX"])
        found.append(Port(PORT_UPLINK, link.name, link.index, link.mtu, queues, link.mac))
    for end in endpoints:
        veth = actual.links.get(end.host_ifname)
        if veth is None or veth.index != end.ifindex:
            continue  # the pod's veth is gone: its runtime owes a DEL
        found.append(
            Port(
                kind=PORT_POD,
                name=end.host_ifname,
                ifindex=end.ifindex,
                mtu=end.mtu,
                queue_count=end.queue_count,
                mac=end.mac,
                peer_mac=end.peer_mac,
                address4=end.address4,
                address6=end.address6,
                endpoint=end.number,
            )
        )
    by_name = {port.name: index for index, port in current.items()}
    taken = {by_name[port.name] for port in found if port.name in by_name}
    free = iter(index for index in range(CONST["PORTS_MAX"]) if index not in taken)
    placed = {by_name[p.name] if p.name in by_name else next(free, -1): p for p in found}
    if -1 in placed:
        raise NotReady(f"more than {CONST['PORTS_MAX']} ports on this node (PORTS_MAX)")
    return placed


class _Routes:
    """Collects routes; a later step may override an earlier one."""

    def __init__(self, config: Config, me: Here, under: Underlay, host_port: int, host: bytes):
        self.config, self.me, self.under = config, me, under
        self.host_port, self.host_mac = host_port, host
        self.table: dict[Cidr, Adjacency] = {}
        self.host: list[HostRoute] = []
        self.problems: list[str] = []

    def to_node(self, kind: int) -> Adjacency:
        return Adjacency(
            kind,
            port=self.host_port,
            mtu=HOST_MTU,
            source_mac=self.me.mac,
            destination_mac=self.host_mac,
        )

    def own(self, actual: Actual) -> None:
        """This node's addresses and pod CIDRs."""
        for link in actual.links.values():
            if link.name in ("lo", HOST, HOST_PEER):
                continue
            for address, _ in actual.addresses.get(link.index, ()):
                if not address.is_link_local:
                    self.table[_host(address)] = self.to_node(TO_HOST)
        for cidr in self.me.node.pod_cidrs:
            self.table[cidr] = Adjacency(BLACKHOLE)
            at = self.me.routers[cidr.version]
            self.table[_host(at)] = self.to_node(GATEWAY)
            self.host.append(HostRoute(cidr, NEXT_HOPS[cidr.version], HOST, HOST_MTU, at))

    def pods(self, ports: Mapping[int, Port]) -> None:
        """Pods of this node."""
        for index, port in ports.items():
            for address in (port.address4, port.address6):
                if port.kind == PORT_POD and address is not None:
                    self.table[_host(address)] = Adjacency(
                        POD,
                        port=index,
                        mtu=port.mtu,
                        source_mac=self.me.mac,
                        destination_mac=port.peer_mac,
                    )

    def remote(self, node: Node) -> None:
        """Another node's pod CIDRs and addresses. Raises ManifestError."""
        if self.config.network.mode == "direct":
            self._remote_direct(node)
        else:
            self._remote_overlay(node)

    def _remote_overlay(self, node: Node) -> None:
        network = self.config.network
        remote = node.internal_ip(network.underlay_family)
        if remote is None:
            raise ManifestError(f"Node {node.name} has no InternalIP of the underlay's family")
        adjacency = self._tunnel(node, remote)
        for cidr in node.pod_cidrs:
            self.table[cidr] = adjacency
            if self.me.routers.get(cidr.version):
                hop, source = NEXT_HOPS[cidr.version], self.me.routers[cidr.version]
                self.host.append(HostRoute(cidr, hop, HOST, self.me.path_mtu, source))
        for address in node.internal_ips:
            self.table[_host(address)] = adjacency

    def _tunnel(self, node: Node, remote: Address) -> Adjacency:
        found = self.under.find(remote)
        if found is None:
            raise ManifestError(f"Node {node.name}: no uplink leads to {remote}: add a route")
        link, hop = found
        mac = self.under.mac(link.index, hop)
        if mac is None:
            return Adjacency(UNRESOLVED, port=self.under.ports[link.index])
        network = self.config.network
        return Adjacency(
            TO_TUNNEL,
            port=self.under.ports[link.index],
            mtu=self.me.path_mtu,
            source_mac=link.mac,
            destination_mac=mac,
            tunnel=Tunnel(
                overlay.TUNNELS[network.tunnel],
                self.me.underlay,
                remote,
                network.tunnel_port,
                network.vni,
                self.me.mac,
                overlay.vtep_mac(node, remote),
            ),
        )

    def _remote_direct(self, node: Node) -> None:
        for cidr in node.pod_cidrs:
            address = node.internal_ip(cidr.version)
            found = self.under.find(address) if address else None
            if address is None or found is None:
                self.problems.append(f"Node {node.name}: no way to {cidr} through an InternalIP")
                continue
            link, hop = found
            self.table[cidr] = self.under.adjacency(link, hop, self.me.path_mtu)
            self.host.append(HostRoute(cidr, address, link.name, 0))
        for address in node.internal_ips:
            found = self.under.find(address)
            if found:
                self.table[_host(address)] = self.under.adjacency(*found, self.me.path_mtu)


def _host(address: Address) -> Cidr:
    return ip_network((address, address.max_prefixlen))


def desired(
    config: Config,
    objects: Objects,
    endpoints: Sequence[EndpointView],
    actual: Actual,
    current: Mapping[int, Port],
) -> Desired:
    """Compute what should stand; current: the ports of the table now. Raises NotReady."""
    me = here(config, objects, actual)
    ports = _ports(me, endpoints, actual, current)
    indices = {port.ifindex: index for index, port in ports.items()}
    under = Underlay(actual, {link.index: link for link in me.uplinks}, indices)
    host_port = next((i for i, port in ports.items() if port.kind == PORT_HOST), 0)
    host = actual.links.get(HOST)
    routes = _Routes(config, me, under, host_port, host.mac if host else bytes(6))
    routes.table.update(under.routes())
    routes.own(actual)
    for node in objects.nodes.values():
        if node.name == me.node.name:
            continue
        try:
            routes.remote(node)
        except ManifestError as error:
            routes.problems.append(str(error))
    routes.pods(ports)
    return Desired(
        queues=me.workers,
        gateway_mac=me.mac,
        host_addresses=frozenset((at, at.max_prefixlen) for at in me.routers.values()),
        host_routes=tuple(routes.host),
        host_neighbours={NEXT_HOPS[family]: me.mac for family in me.routers},
        provoke=frozenset(under.provoke),
        tables=_tables(config, me, ports, routes.table, host_port, actual),
        view=_view(me, objects, config),
        problems=tuple(routes.problems),
    )


def _tables(
    config: Config,
    me: Here,
    ports: Mapping[int, Port],
    routes: Mapping[Cidr, Adjacency],
    host_port: int,
    actual: Actual,
) -> Tables:
    tunnelled = config.network.mode == "overlay"
    six = int(me.routers[6]) if 6 in me.routers else 0
    options = config.forwarder
    node = {
        "gateway_mac": me.mac,
        "tunnel_kind": overlay.TUNNELS[config.network.tunnel] if tunnelled else 0,
        "tunnel_port": config.network.tunnel_port if tunnelled else 0,
        "host_port": host_port,
        "vni": config.network.vni,
        "error_rate": options.error_rate,
        "error_burst": options.error_burst,
        "router4": int(me.routers[4]) if 4 in me.routers else 0,
        "router6_hi": six >> 64,
        "router6_lo": six & ((1 << 64) - 1),
        "workers": me.workers,
        "frame_count": options.frames,
        "spin_us": options.spin_us,
        "watchdog_ms": options.watchdog_ms,
    }
    locals_ = sorted(
        (
            address
            for link in me.uplinks
            for address, _ in actual.addresses.get(link.index, ())
            if address.version == config.network.underlay_family
        ),
        key=int,
    )
    return Tables(
        node=node,
        ports=ports,
        routes=routes,
        tunnel_port=config.network.tunnel_port if tunnelled else 0,
        locals=tuple(locals_) if tunnelled else (),
        prefixes=() if tunnelled else me.node.pod_cidrs,
    )


def _view(me: Here, objects: Objects, config: Config) -> dict[str, object]:
    return {
        "node": me.node.name,
        "mode": config.network.mode,
        "tunnel": config.network.tunnel if config.network.mode == "overlay" else None,
        "underlay": str(me.underlay),
        "uplinks": [link.name for link in me.uplinks],
        "pod_cidrs": [str(cidr) for cidr in me.node.pod_cidrs],
        "routers": {str(family): str(address) for family, address in me.routers.items()},
        "gateway_mac": me.mac.hex(":"),
        "path_mtu": me.path_mtu,
        "workers": me.workers,
        "remote_nodes": sorted(set(objects.nodes) - {me.node.name}),
    }
