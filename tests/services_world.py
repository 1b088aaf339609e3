"""Services, slices and an engine over tables of its own, in few words."""

from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

from dataplane.objects.collect import Objects
from dataplane.objects.core import Node, Pod
from dataplane.objects.services import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Service,
    ServicePort,
)
from dataplane.services.engine import ServiceEngine
from dataplane.services.model import HostPort, ServiceOptions
from dataplane.tables.adjacencies import REST_S
from dataplane.tables.service_view import decoded
from dataplane.tables.services import ServiceWriter
from dataplane.tables.shm import Shm
from tests.naive.services import reach

HERE, THERE = "node1", "node2"
NODE4, NODE6 = "192.0.2.1", "2001:db8::1"
VIP4, VIP6 = "10.96.0.10", "fd00:96::a"
LB4, LB6 = "203.0.113.7", "2001:db8:7::7"
HTTP = ServicePort("http", "TCP", 80, "web", 30080)


class Clock:
    """Time that tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def rest(self, seconds: float = REST_S) -> None:
        self.now += seconds


def node(name: str = HERE, number: int = 1, **more) -> Node:
    addresses = (ip_address(f"192.0.2.{number}"), ip_address(f"2001:db8::{number}"))
    return Node(name, addresses, **more)


def service(name: str = "web", vips=(VIP4,), ports=(HTTP,), **more) -> Service:
    """A Service of namespace shop."""
    for field in ("external_ips", "load_balancer_ips"):
        more[field] = tuple(ip_address(text) for text in more.get(field, ()))
    ranges = tuple(ip_network(text) for text in more.pop("source_ranges", ()))
    made = Service("shop", name, cluster_ips=tuple(map(ip_address, vips)), ports=tuple(ports))
    return replace(made, source_ranges=ranges, **more)


def end(address: str, where: str = HERE, **more) -> Endpoint:
    """An endpoint; `serving` is `ready` unless it is given, as with the API."""
    more.setdefault("serving", more.get("ready", True))
    return Endpoint(ip_address(address), node=where, **more)


def leaving(address: str, where: str = HERE, **more) -> Endpoint:
    """An endpoint that terminates and still serves."""
    return end(address, where, ready=False, serving=True, terminating=True, **more)


def part(*ends: Endpoint, of: str = "web", name: str = "", port: int = 8080, **more):
    """A slice of a service with one port, http."""
    family = ends[0].address.version if ends else 4
    ports = more.pop("ports", (EndpointPort("http", "TCP", port),))
    return EndpointSlice("shop", name or f"{of}-v{family}", of, family, ends, ports, **more)


def objects(*things) -> Objects:
    """Objects of services, slices, nodes and pods; node1 is there anyway."""
    found: dict[type, dict] = {Service: {}, EndpointSlice: {}, Pod: {}, Node: {HERE: node()}}
    for thing in things:
        key = thing.name if isinstance(thing, Node) else (thing.namespace, thing.name)
        found[type(thing)][key] = thing
    return Objects(
        nodes=found[Node],
        pods=found[Pod],
        services=found[Service],
        slices=found[EndpointSlice],
    )


class Services:
    """Tables, and the engine of an agent that can be restarted."""

    def __init__(self, folder: Path, **options) -> None:
        self.folder = folder
        self.options = ServiceOptions(**options)
        self.clock = Clock()
        self.shm = Shm.create(folder)
        self.restart()

    def restart(self) -> None:
        """Start anew over what stands."""
        self.writer = ServiceWriter(self.shm, self.clock)
        names = self.shm.folder / "services.json"
        self.engine = ServiceEngine(self.writer, self.options, names, self.clock)

    def update(self, *things, addresses=(), host_ports: tuple[HostPort, ...] = ()) -> list[str]:
        """Bring things (or one Objects) in force; return the problems."""
        given = things[0] if things and isinstance(things[0], Objects) else objects(*things)
        every = [ip_address(text) for text in addresses]
        return self.engine.update(given, HERE, every, host_ports)

    def stands(self) -> dict:
        """What a packet to each frontend meets."""
        return decoded(self.shm)

    def reach(self, address: str, port: int = 80, protocol: str = "tcp", **more) -> set[str]:
        """Every backend that some flow gets."""
        hashes = [n << 32 for n in range(64)]
        return {reach(self.shm, address, port, protocol, flow_hash=h, **more) for h in hashes}

    def close(self) -> None:
        self.shm.close()
