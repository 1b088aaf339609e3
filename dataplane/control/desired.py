"""What should stand: from configuration, objects, endpoints and the kernel's state.

Rule: a pure function of its arguments; the same arguments give the same answer.

Theory. One remote node with a bad manifest or no route must not stop the others: it becomes a
problem in the answer, shown by `penstock status`. Without this node's own object nothing can be
computed: NotReady says what is missing.
"""

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_network

from dataplane.control import overlay
from dataplane.control.config import Config
from dataplane.control.here import PORT_UPLINK, Here, NotReady, here
from dataplane.control.model import (
    HOST,
    HOST_MTU,
    HOST_PEER,
    NEXT_HOPS,
    RESERVED_PORTS,
    Actual,
    Address,
    Cidr,
    Desired,
    EndpointView,
    HostRoute,
    Link,
    Reservation,
    Tables,
)
from dataplane.control.noderow import node_row
from dataplane.control.ports import merged
from dataplane.control.routing import Underlay
from dataplane.objects.collect import Objects
from dataplane.objects.core import Node
from dataplane.objects.manifest import ManifestError
from dataplane.tables.errors import TableError
from dataplane.tables.model import (
    PROXY_ADDRESSES,
    PROXY_MAC,
    PROXY_PEER,
    Adjacency,
    Port,
    Tunnel,
)
from xdp.abi import CONST, value

POD, GATEWAY = value("ADJACENCY_POD"), value("ADJACENCY_GATEWAY")
TO_HOST, TO_TUNNEL = value("ADJACENCY_HOST"), value("ADJACENCY_TUNNEL")
BLACKHOLE = value("ADJACENCY_BLACKHOLE")
PORT_POD, PORT_HOST, PORT_PROXY = (value(f"PORT_{name}") for name in ("POD", "HOST", "PROXY"))

__all__ = ["NotReady", "desired"]


def _ports(
    me: Here, endpoints: Sequence[EndpointView], actual: Actual, problems: list[str]
) -> list[Port]:
    """Every port that should stand."""
    found: list[Port] = []
    host, peer = actual.links.get(HOST), actual.links.get(HOST_PEER)
    if host and peer:
        found.append(
            Port(
                PORT_HOST,
                peer.name,
                peer.index,
                peer.mtu,
                me.workers,
                peer.mac,
                host.mac,
                peer_ifindex=host.index,
            )
        )
    if proxy := actual.links.get(PROXY_PEER):
        queues = min(proxy.queues, CONST["QUEUES_MAX"])
        found.append(
            Port(PORT_PROXY, proxy.name, proxy.index, proxy.mtu, queues, proxy.mac, PROXY_MAC)
        )
    for link in me.uplinks:
        queues = min(link.queues, CONST["QUEUES_MAX"])
        found.append(Port(PORT_UPLINK, link.name, link.index, link.mtu, queues, link.mac))
    for end in endpoints:
        veth = actual.links.get(end.host_ifname)
        if veth is None or veth.index != end.ifindex:
            continue  # the pod's veth is gone: its runtime owes a DEL
        try:
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
                    hook=end.hook,
                )
            )
        except TableError as error:
            problems.append(f"endpoint {end.number}: {error}")
    return found


def _placed(ports: Sequence[Port], current: Mapping[int, Port]) -> dict[int, Port]:
    """Each port at the index its name already has; a new one where nothing stands now.

    So no index changes its device in one turn, as long as there is room: a worker in the middle
    of a vector would otherwise send a packet of the old port to the new one.
    """
    by_name = {port.name: index for index, port in current.items()}
    kept = {by_name[port.name] for port in ports if port.name in by_name}
    everything = range(CONST["PORTS_MAX"])
    fresh = [index for index in everything if index not in current]
    reused = [index for index in current if index not in kept]
    free = iter(fresh + reused)
    placed = {}
    for port in ports:
        index = by_name[port.name] if port.name in by_name else next(free, None)
        if index is None:
            raise NotReady(
                f"{len(ports)} ports, limit {len(everything)} a node (PORTS_MAX): fewer pods here"
            )
        placed[index] = port
    return placed


class _Routes:
    """Collects routes; a later step may override an earlier one."""

    def __init__(self, config: Config, me: Here, under: Underlay, host_port: int, host: bytes):
        self.config, self.me, self.under = config, me, under
        self.host_port, self.host_mac = host_port, host
        self.table: dict[Cidr, Adjacency] = {}
        self.host: dict[Cidr, HostRoute] = {}
        self.mine: set[Address] = {*me.node.internal_ips, *me.routers.values()}
        self.owner: dict[Cidr, str] = {}

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
            for address, _ in actual.addresses.get(link.index, ()):
                inner = link.name in (HOST, HOST_PEER, PROXY_PEER)
                if not (inner or address.is_link_local or address.is_loopback):
                    self.mine.add(address)
                    self.table[_host(address)] = self.to_node(TO_HOST)
        for cidr in self.me.pod_cidrs:
            self.table[cidr] = Adjacency(BLACKHOLE)
            at = self.me.routers[cidr.version]
            self.table[_host(at)] = self.to_node(GATEWAY)
            self._to_pods(cidr, HOST_MTU)

    def services(self, nodes: Iterable[Node]) -> list[str]:
        """The node's own routes to ClusterIPs, and back to itself through a service.

        Return what is wrong: a network that would take away the traffic between nodes.
        """
        problems = []
        for cidr in self.config.services.networks:
            owners = [node for node in nodes if any(at in cidr for at in node.internal_ips)]
            if owners:
                problems.append(
                    f"services.cidrs: {cidr} covers an InternalIP of Node {owners[0].name}, the "
                    "node does not reach its ClusterIPs: correct one"
                )
                continue
            self._to_pods(cidr, self.me.path_mtu)
        for family in self.me.routers:
            if address := self.config.services.loopback_of(family):
                self._to_pods(_host(address), self.me.path_mtu)
        return problems

    def _to_pods(self, cidr: Cidr, mtu: int) -> None:
        """The node's own route through penstock0 and the forwarder."""
        if source := self.me.routers.get(cidr.version):
            self.host[cidr] = HostRoute(cidr, NEXT_HOPS[cidr.version], HOST, mtu, source)

    def proxy(self, ports: Mapping[int, Port]) -> None:
        """The DNS proxy, if it stands."""
        for index, port in ports.items():
            if port.kind == PORT_PROXY:
                way = Adjacency(TO_HOST, index, port.mtu, self.me.mac, port.peer_mac)
                self.table.update({_host(at): way for at in PROXY_ADDRESSES.values()})

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
        """Another node's pod CIDRs and addresses. Raises ManifestError for one that is not."""
        self._check(node)
        if self.config.network.mode == "direct":
            self._remote_direct(node)
        else:
            self._remote_overlay(node)

    def _check(self, node: Node) -> None:
        """Refuse what would take away the traffic of this node or of another."""
        for address in node.internal_ips:
            if address in self.mine:
                raise ManifestError(
                    f"Node {node.name}: InternalIP {address} is this node's own: correct one"
                )
        for cidr in node.pod_cidrs:
            own = self.me.node.pod_cidr(cidr.version)
            if own and cidr.subnet_of(own):  # type: ignore[arg-type]
                raise ManifestError(f"Node {node.name}: pod CIDR {cidr} is part of this node's own")
            inside = [at for at in self.me.node.internal_ips if at in cidr]
            if inside:
                raise ManifestError(f"Node {node.name}: pod CIDR {cidr} covers our {inside[0]}")
            if cidr in self.owner:
                raise ManifestError(
                    f"Node {node.name}: pod CIDR {cidr} is Node {self.owner[cidr]}'s: correct one"
                )
        self.owner.update(dict.fromkeys(node.pod_cidrs, node.name))

    def _remote_overlay(self, node: Node) -> None:
        network = self.config.network
        remote = node.internal_ip(network.underlay_family)
        if remote is None:
            raise ManifestError(
                f"Node {node.name} has no InternalIP of family {network.underlay_family} "
                "(network.underlay_family): add it to status.addresses"
            )
        inner_mac = overlay.vtep_mac(node, remote)
        found = self.under.find(remote)
        adjacency = self._tunnel(remote, inner_mac, found)
        for cidr in node.pod_cidrs:
            self.table[cidr] = adjacency
            self._to_pods(cidr, self.me.path_mtu)
        for address in node.internal_ips:
            self.table[_host(address)] = adjacency
        if found is None:
            raise ManifestError(_nowhere(node, remote))

    def _tunnel(
        self, remote: Address, inner_mac: bytes, found: tuple[Link, Address] | None
    ) -> Adjacency:
        """The tunnel to a node; UNRESOLVED while the way is not known, never another way."""
        network = self.config.network
        link, hop = found or (self.me.uplinks[0], None)
        mac = self.under.mac(link.index, hop) if hop else None
        if mac is None:
            return self.under.unresolved(link, self.me.path_mtu)
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
                network.fixed_vni,
                self.me.mac,
                inner_mac,
            ),
        )

    def _remote_direct(self, node: Node) -> None:
        lost = []
        for cidr in node.pod_cidrs:
            address = node.internal_ip(cidr.version)
            found = self.under.find(address) if address else None
            if address is None or found is None:
                lost.append(_nowhere(node, address or f"an InternalIP of family {cidr.version}"))
                self.table[cidr] = self.under.unresolved(self.me.uplinks[0], self.me.path_mtu)
                continue
            link, hop = found
            self.table[cidr] = self.under.adjacency(link, hop, self.me.path_mtu)
            self.host[cidr] = HostRoute(cidr, hop, link.name, 0)
        for address in node.internal_ips:
            if found := self.under.find(address):
                self.table[_host(address)] = self.under.adjacency(*found, self.me.path_mtu)
        if lost:
            raise ManifestError(lost[0])


def _nowhere(node: Node, remote: object) -> str:
    return f"Node {node.name}: no uplink leads to {remote}: add a route, or its InternalIP"


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
    me = here(config, objects, actual, current)
    problems = list(me.problems)
    ports = _placed(_ports(me, endpoints, actual, problems), current)
    indices = {port.ifindex: index for index, port in ports.items()}
    under = Underlay(actual, {link.index: link for link in me.uplinks}, indices)
    host_port = next((i for i, port in ports.items() if port.kind == PORT_HOST), 0)
    host = actual.links.get(HOST)
    routes = _Routes(config, me, under, host_port, host.mac if host else bytes(6))
    routes.table.update(under.routes())
    routes.own(actual)
    problems += routes.services(objects.nodes.values())
    for _, node in sorted(objects.nodes.items()):
        if node.name == me.node.name:
            continue
        try:
            routes.remote(node)
        except (ManifestError, TableError) as error:
            problems.append(str(error))
    routes.proxy(ports)
    routes.pods(ports)
    return Desired(
        queues=me.workers,
        gateway_mac=me.mac,
        host_addresses=frozenset((at, at.max_prefixlen) for at in me.routers.values()),
        host_routes=tuple(routes.host.values()),
        host_neighbours={NEXT_HOPS[family]: me.mac for family in me.routers},
        provoke=frozenset(under.provoke),
        tables=_tables(config, me, ports, routes.table, host_port, actual),
        own=frozenset(routes.mine),
        reachable=frozenset(routes.mine) - frozenset(me.routers.values()),
        view=_view(me, objects, config),
        problems=tuple(problems),
        reserved=_reserved(config),
    )


def _reserved(config: Config) -> Reservation:
    """NodePorts and the ports of masquerading: no socket of the node may get one by chance."""
    ranges = merged([config.services.node_port_range, config.masquerade.port_range])
    return Reservation(ranges, config.run_dir / RESERVED_PORTS)


def _tables(
    config: Config,
    me: Here,
    ports: Mapping[int, Port],
    routes: Mapping[Cidr, Adjacency],
    host_port: int,
    actual: Actual,
) -> Tables:
    tunnelled = config.network.mode == "overlay"
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
        node=node_row(config, me, host_port),
        ports=ports,
        routes=routes,
        tunnel_port=config.network.tunnel_port if tunnelled else 0,
        locals=tuple(locals_) if tunnelled else (),
        prefixes=me.pod_cidrs,
        nat=_masquerading(config, me),
    )


def _masquerading(config: Config, me: Here) -> tuple[Address, ...]:
    """Addresses that connections are masqueraded with: replies to them are ours."""
    on = {4: config.masquerade.ipv4, 6: config.masquerade.ipv6}
    return tuple(at for family in (4, 6) if on[family] and (at := me.node.internal_ip(family)))


def _view(me: Here, objects: Objects, config: Config) -> dict[str, object]:
    return {
        "node": me.node.name,
        "mode": config.network.mode,
        "tunnel": config.network.tunnel if config.network.mode == "overlay" else None,
        "underlay": str(me.underlay),
        "uplinks": [link.name for link in me.uplinks],
        "pod_cidrs": [str(cidr) for cidr in me.pod_cidrs],
        "routers": {str(family): str(address) for family, address in me.routers.items()},
        "gateway_mac": me.mac.hex(":"),
        "path_mtu": me.path_mtu,
        "workers": me.workers,
        "remote_nodes": sorted(set(objects.nodes) - {me.node.name}),
    }
