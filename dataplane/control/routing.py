"""The kernel's routes and neighbours as next hops of the dataplane.

Rule: the dataplane sends where the kernel would send; it never invents a next hop.

Theory. The longest prefix of the main table, then the least metric, gives device and gateway; the
neighbour table gives the MAC. A neighbour that the kernel does not know is provoked, and until it
answers the next hop is UNRESOLVED: counted drops. STALE is good enough, since packets that bypass
the kernel do not confirm its entries; `provoke` is asked for those too, so that a changed MAC is
seen.
"""

from dataclasses import dataclass, field

from dataplane.control.model import NUD_PERMANENT, NUD_USABLE, Actual, Address, Cidr, Link, Route
from dataplane.tables.model import Adjacency
from xdp.abi import value

NEXTHOP = value("ADJACENCY_NEXTHOP")
UNRESOLVED = value("ADJACENCY_UNRESOLVED")
NUD_STALE = 0x04


@dataclass
class Underlay:
    """Next hops through the uplinks; collects what has to be resolved."""

    actual: Actual
    uplinks: dict[int, Link]  # by ifindex
    ports: dict[int, int]  # ifindex -> port index
    provoke: set[tuple[int, Address]] = field(default_factory=set)

    def find(self, target: Address) -> tuple[Link, Address] | None:
        """Return (uplink, next hop) of an address, None when no uplink leads there."""
        best: Route | None = None
        for route in self.actual.routes:
            if route.device not in self.uplinks or route.network.version != target.version:
                continue
            if target not in route.network:
                continue
            rank = (route.network.prefixlen, -route.metric)
            if best is None or rank > (best.network.prefixlen, -best.metric):
                best = route
        if best is None:
            return None
        return self.uplinks[best.device], best.gateway or target

    def mac(self, device: int, address: Address) -> bytes | None:
        """Return the MAC of a neighbour; one that is missing or stale is to be provoked."""
        found = self.actual.neighbours.get((device, address))
        known = found is not None and found.state & NUD_USABLE and found.mac != bytes(6)
        if not known or (found is not None and found.state & NUD_STALE):
            self.provoke.add((device, address))
        return found.mac if found is not None and known else None

    def adjacency(self, link: Link, hop: Address, mtu: int) -> Adjacency:
        """Return the plain next hop through an uplink, or UNRESOLVED."""
        mac = self.mac(link.index, hop)
        port = self.ports[link.index]
        if mac is None:
            return Adjacency(UNRESOLVED, port=port, mtu=mtu)
        return Adjacency(NEXTHOP, port=port, mtu=mtu, source_mac=link.mac, destination_mac=mac)

    def routes(self) -> dict[Cidr, Adjacency]:
        """Return the kernel's routes on the uplinks, and its neighbours on connected networks."""
        found: dict[Cidr, Adjacency] = {}
        best: dict[Cidr, Route] = {}
        for route in self.actual.routes:
            if route.device not in self.uplinks or _is_local(route.network):
                continue
            present = best.get(route.network)
            if present is None or route.metric < present.metric:
                best[route.network] = route
        for network, route in best.items():
            link = self.uplinks[route.device]
            mtu = route.mtu or link.mtu
            if route.gateway is not None:
                found[network] = self.adjacency(link, route.gateway, mtu)
                continue
            found[network] = Adjacency(UNRESOLVED, port=self.ports[link.index], mtu=mtu)
            for (device, address), entry in self.actual.neighbours.items():
                usable = entry.state & NUD_USABLE and entry.state != NUD_PERMANENT
                if device == link.index and usable and address in network:
                    host = type(network)((address, address.max_prefixlen))
                    found[host] = self.adjacency(link, address, mtu)
        return found


def _is_local(network: Cidr) -> bool:
    return network.is_multicast or network.is_link_local
