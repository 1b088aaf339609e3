"""The kernel's routes and neighbours as next hops of the dataplane.

Rule: the dataplane sends where the kernel would send; it never invents a next hop.

Theory. The longest prefix of the main table, then the least metric, gives device and gateway; the
neighbour table gives the MAC. A gateway or node whose neighbour entry is missing or FAILED is
provoked, and until it answers the next hop is UNRESOLVED: counted drops. STALE is good enough,
since packets that bypass the kernel do not confirm its entries; it is provoked too, so that a
changed MAC is seen. Our own routes are left out: they follow from the Node objects.
"""

from dataclasses import dataclass, field

from dataplane.control.model import NUD_STALE, PROTOCOL, Actual, Address, Cidr, Link, Route
from dataplane.tables.model import Adjacency
from xdp.abi import value

NEXTHOP = value("ADJACENCY_NEXTHOP")
UNRESOLVED = value("ADJACENCY_UNRESOLVED")


@dataclass
class Underlay:
    """Next hops through the uplinks; collects what has to be resolved."""

    actual: Actual
    uplinks: dict[int, Link]  # by ifindex
    ports: dict[int, int]  # ifindex -> port index
    provoke: set[tuple[int, Address]] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Leave out what is not the kernel's own choice."""
        self._routes = [route for route in self.actual.routes if route.protocol != PROTOCOL]

    def find(self, target: Address) -> tuple[Link, Address] | None:
        """Return (uplink, next hop) of an address, None when no uplink leads there."""
        best: Route | None = None
        for route in self._routes:
            if route.network.version != target.version or target not in route.network:
                continue
            if best is None or _rank(route) > _rank(best):
                best = route
        if best is None or best.device not in self.uplinks:
            return None
        return self.uplinks[best.device], best.gateway or target

    def mac(self, device: int, address: Address) -> bytes | None:
        """Return the MAC of a neighbour; one that is missing or stale is to be provoked."""
        found = self.actual.neighbours.get((device, address))
        if found is None or not found.usable:
            self.provoke.add((device, address))
            return None
        if found.state & NUD_STALE:
            self.provoke.add((device, address))
        return found.mac

    def adjacency(self, link: Link, hop: Address, mtu: int) -> Adjacency:
        """Return the plain next hop through an uplink, or UNRESOLVED."""
        mac = self.mac(link.index, hop)
        if mac is None:
            return self.unresolved(link, mtu)
        return self._nexthop(link, mac, mtu)

    def unresolved(self, link: Link, mtu: int) -> Adjacency:
        """Return the next hop that only counts what it drops."""
        return Adjacency(UNRESOLVED, port=self.ports[link.index], mtu=mtu)

    def _nexthop(self, link: Link, mac: bytes, mtu: int) -> Adjacency:
        port = self.ports[link.index]
        return Adjacency(NEXTHOP, port=port, mtu=mtu, source_mac=link.mac, destination_mac=mac)

    def routes(self) -> dict[Cidr, Adjacency]:
        """Return the kernel's routes on the uplinks, and its neighbours on connected networks."""
        best: dict[Cidr, Route] = {}
        for route in self._routes:
            present = best.get(route.network)
            if present is None or route.metric < present.metric:
                best[route.network] = route
        found: dict[Cidr, Adjacency] = {}
        for network, route in best.items():
            if route.device not in self.uplinks or network.is_multicast or network.is_link_local:
                continue
            link = self.uplinks[route.device]
            mtu = route.mtu or link.mtu
            if route.gateway is not None:
                found[network] = self.adjacency(link, route.gateway, mtu)
            else:
                found[network] = self.unresolved(link, mtu)
                found.update(self._neighbours(network, link, mtu))
        return found

    def _neighbours(self, network: Cidr, link: Link, mtu: int) -> dict[Cidr, Adjacency]:
        return {
            type(network)((address, address.max_prefixlen)): self._nexthop(link, entry.mac, mtu)
            for (device, address), entry in self.actual.neighbours.items()
            if device == link.index and entry.usable and address in network
        }


def _rank(route: Route) -> tuple[int, int]:
    return route.network.prefixlen, -route.metric
