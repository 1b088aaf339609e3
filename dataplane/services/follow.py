"""What changed between two updates: services, and host ports of this node's pods.

Rule: a change is found by comparing references first, so what is the same object costs nothing.

Theory. Sources give new mappings of mostly the same objects. An EndpointSlice changes the service
that its label names; a change of the node itself (its addresses, its zone) changes all. Host ports
come from two sides: from Pod objects, and from the CNI's portMappings, by which kubelet and podman
ask for the same; of two that are the same one is kept.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from dataplane.objects.collect import Key as Name
from dataplane.objects.collect import Objects
from dataplane.objects.core import Pod
from dataplane.objects.services import EndpointSlice, Service
from dataplane.services.model import (
    FAMILIES,
    Address,
    Here,
    HostPort,
    ServiceOptions,
    halves,
    host_ports_of,
)

ZONE_LABEL = "topology.kubernetes.io/zone"

Subject = Name | HostPort
Dirty = dict[Subject, Service | HostPort | None]
"""What is to be compiled anew; None: it is gone."""


class Follower:
    """Remembers the objects of the last update."""

    def __init__(self, options: ServiceOptions) -> None:
        """Nothing has been seen yet."""
        self._options = options
        self._services: Mapping[Name, Service] = {}
        self._slices: Mapping[Name, EndpointSlice] = {}
        self._of_service: dict[Name, dict[Name, EndpointSlice]] = {}
        self._pods: Mapping[Name, Pod] | None = None
        self._pod_ports: list[HostPort] = []
        self._host_ports: set[HostPort] = set()
        self.here = Here(options=options)

    def follow(
        self,
        objects: Objects,
        node: str,
        addresses: Collection[Address],
        host_ports: Iterable[HostPort],
    ) -> Dirty:
        """Take the objects of now and return what changed since the last call."""
        before, self.here = self.here, self._find_here(objects, node, addresses)
        dirty: Dirty = {}
        touched = set(_differences(self._services, objects.services))
        for key in _differences(self._slices, objects.slices):
            one = objects.slices.get(key)
            touched |= self._place(key, one)
        self._services, self._slices = objects.services, objects.slices
        if before != self.here:
            touched |= objects.services.keys()
        for name in sorted(touched):  # so that what does not fit is the same everywhere
            dirty[name] = objects.services.get(name)
        self._follow_host_ports(objects, host_ports, before, dirty)
        return dirty

    def slices_of(self, service: Service) -> Collection[EndpointSlice]:
        """Return the slices that belong to a service."""
        return self._of_service.get((service.namespace, service.name), {}).values()

    def _find_here(self, objects: Objects, name: str, addresses: Collection[Address]) -> Here:
        node = objects.nodes.get(name)
        internal = node.internal_ips if node else ()
        every = {*addresses, *internal}
        networks = self._options.node_port_addresses
        serving: Iterable[Address] = internal
        if networks:
            serving = [at for at in every if any(at in network for network in networks)]
        zone = node.labels.get(ZONE_LABEL, "") if node else ""
        return Here(name, zone, self._options, _by_family(serving), _by_family(every))

    def _place(self, key: Name, one: EndpointSlice | None) -> set[Name]:
        """Keep a slice with the service that it belongs to; return the services it touches."""
        touched = set()
        before = self._slices.get(key)
        if before is not None and before.service:
            name = (before.namespace, before.service)
            touched.add(name)
            slices = self._of_service[name]
            del slices[key]
            if not slices:
                del self._of_service[name]
        if one is not None and one.service:
            name = (one.namespace, one.service)
            touched.add(name)
            self._of_service.setdefault(name, {})[key] = one
        return touched

    def _follow_host_ports(
        self, objects: Objects, given: Iterable[HostPort], before: Here, dirty: Dirty
    ) -> None:
        node = self.here.node
        if objects.pods is not self._pods or before.node != node:
            self._pods = objects.pods
            self._pod_ports = [
                port
                for pod in objects.pods.values()
                if pod.ports and pod.node == node
                for port in host_ports_of(pod)
            ]
        wanted = _merged([*given, *self._pod_ports])
        for one in self._host_ports - wanted:
            dirty[one] = None
        moved = before.host_ports_at != self.here.host_ports_at
        for one in wanted if moved else wanted - self._host_ports:
            dirty[one] = one
        self._host_ports = wanted


def _differences(old: Mapping[Name, Any], new: Mapping[Name, Any]) -> Iterator[Name]:
    """Yield the keys whose values differ."""
    if old is new:
        return
    kept = 0
    for key, value in new.items():
        before = old.get(key)
        kept += before is not None
        if before is not value and before != value:
            yield key
    if kept < len(old):
        yield from (key for key in old if key not in new)


def _by_family(addresses: Iterable[Address]) -> tuple[tuple[tuple[int, int], ...], ...]:
    found = sorted({(at.version, *halves(at)) for at in addresses if not at.is_loopback})
    return tuple(
        tuple((hi, lo) for version, hi, lo in found if version == family) for family in FAMILIES
    )


def _merged(ports: Iterable[HostPort]) -> set[HostPort]:
    """One of each port of an owner: the first."""
    found: dict[tuple, HostPort] = {}
    for one in ports:
        found.setdefault((one.owner, one.port, one.protocol, one.address), one)
    return set(found.values())
