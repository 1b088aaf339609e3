"""From a Service and its EndpointSlices to rows and claims.

Rule: pure: the same objects and the same node give the same rows, in whatever order they came.

Theory. A port of a service has up to three rows a family. `cluster` serves its ClusterIP: clients
inside only, by internalTrafficPolicy. `external` serves NodePorts, external and load balancer
addresses: inside the cluster all endpoints, from outside by externalTrafficPolicy. `balancer`
takes the place of `external` for load balancer addresses that only some sources may use. Lists are
sorted by address, so that all nodes have the same; a weight repeats a backend in them. Families
are those of the ClusterIPs, as with kube-proxy. Annotations that nobody can follow are problems,
not errors.
"""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from math import gcd

import numpy as np

from dataplane.objects.services import (
    WEIGHT_MOST,
    EndpointSlice,
    Service,
    ServicePort,
    is_plain,
)
from dataplane.services import maglev
from dataplane.services.endpoints import Choices, Known, choices, drains, known
from dataplane.services.model import (
    ALGORITHMS,
    CLUSTER_ADDRESSES,
    FAMILIES,
    OUTSIDE_ADDRESSES,
    PROTOCOLS,
    RANK_CLUSTER_IP,
    RANK_EXTERNAL_IP,
    RANK_HOST_PORT,
    RANK_LOAD_BALANCER,
    RANK_NODE_PORT,
    Address,
    Claim,
    Compiled,
    HealthCheck,
    Here,
    HostPort,
    family_of,
    halves,
    source_range,
)
from dataplane.tables.frontends import Key
from dataplane.tables.services import Range, ServiceRow, Table
from xdp.abi import CONST

CLUSTER_IP, KEEP_SOURCE = CONST["SERVICE_CLUSTER_IP"], CONST["SERVICE_KEEP_SOURCE"]
HOST_PORT = CONST["SERVICE_HOST_PORT"]
ALGORITHM_ANNOTATIONS = ("penstock.io/lb-algorithm", "service.cilium.io/lb-algorithm")
WEIGHTS_ANNOTATION = "penstock.io/backend-weights"
PROXY_LABEL = "service.kubernetes.io/service-proxy-name"  # another proxy's
HEADLESS_LABEL = "service.kubernetes.io/headless"
LIST_MOST = 4096  # entries of a list in which weights repeat backends
NOBODY: Range = (0, 1, 0, 0)  # a source range that no address is in


def compile_service(service: Service, slices: Iterable[EndpointSlice], here: Here) -> Compiled:
    """Return what a service should be on this node."""
    if service.type == "ExternalName" or service.headless or service.labels.get(PROXY_LABEL):
        return Compiled()
    usable = sorted((one for one in slices if not _is_foreign(one)), key=lambda one: one.name)
    return _Compiler(service, usable, here).compile()


def _is_foreign(one: EndpointSlice) -> bool:
    return HEADLESS_LABEL in one.labels or bool(one.labels.get(PROXY_LABEL))


class _Compiler:
    """One service on its way to a Compiled."""

    def __init__(self, service: Service, slices: Sequence[EndpointSlice], here: Here) -> None:
        self.service, self.slices, self.here = service, slices, here
        self.rows: dict[str, ServiceRow] = {}
        self.claims: list[Claim] = []
        self.problems: list[str] = []
        self.local: dict[int, set[tuple[int, int]]] = {family: set() for family in FAMILIES}
        self.called = f"Service {service.namespace}/{service.name}"
        self.everywhere = False  # Maglev also for clients inside
        self.external = self._plain(service.external_ips)
        is_balanced = service.type == "LoadBalancer"
        self.balancers = self._plain(service.load_balancer_ips) if is_balanced else []
        self.algorithm = self._algorithm()
        self.weights = self._weights()

    def compile(self) -> Compiled:
        service = self.service
        families: set[int] = {address.version for address in service.cluster_ips}
        if not families:
            families = {one.family for one in self.slices if one.family}
            if service.type == "ClusterIP" and not service.external_ips:
                self.problems.append(
                    f"{self.called} has no clusterIP: without an API server, set spec.clusterIP"
                )
        for family in sorted(families):
            for port in service.ports:
                self._port(port, family)
            self._addresses(family)
        self._unserved(families)
        return Compiled(self.rows, tuple(self.claims), tuple(self.problems), self._health())

    def _unserved(self, families: set[int]) -> None:
        for address in (*self.external, *self.balancers):
            if address.version not in families:
                self.problems.append(
                    f"{self.called}: {address} is not served, the service has no IPv"
                    f"{address.version}: set spec.ipFamilies"
                )

    def _plain(self, addresses: Iterable[Address]) -> list[Address]:
        found = []
        for address in addresses:
            if is_plain(address):
                found.append(address)
            else:
                self.problems.append(
                    f"{self.called}: {address} is not served: others cannot reach it"
                )
        return found

    # --- annotations ------------------------------------------------------------------------------

    def _algorithm(self) -> str:
        for name in ALGORITHM_ANNOTATIONS:
            value = self.service.annotations.get(name)
            if value in ALGORITHMS:
                self.everywhere = value == "maglev"
                return str(value)
            if value is not None:
                self.problems.append(
                    f"{self.called}: {name}: {value!r} is neither random nor maglev"
                )
        return self.here.options.algorithm

    def _weights(self) -> dict[str, int]:
        value = self.service.annotations.get(WEIGHTS_ANNOTATION)
        if value is None:
            return {}
        try:
            found = json.loads(value)
            if not isinstance(found, dict):
                raise ValueError("must be an object of address or pod name: weight")
            for name, weight in found.items():
                if isinstance(weight, bool) or not isinstance(weight, int):
                    raise ValueError(f"weight of {name} is {weight!r}, not a number")
                if not 0 <= weight <= WEIGHT_MOST:
                    raise ValueError(f"weight of {name} is {weight}, it must be 0..{WEIGHT_MOST}")
        except (ValueError, RecursionError) as error:
            self.problems.append(f"{self.called}: {WEIGHTS_ANNOTATION}: {error}")
            return {}
        return found

    def _weigh(self, found: dict[Key, Known]) -> None:
        for end in found.values():
            weight = self.weights.get(end.pod) if end.pod else None
            if weight is None:
                weight = self.weights.get(str(_address(end.key)))
            if weight is not None:
                end.weight = weight

    # --- ports ------------------------------------------------------------------------------------

    def _port(self, port: ServicePort, family: int) -> None:
        service = self.service
        slices = [one for one in self.slices if one.family == family]
        found = known(slices, port.name, port.protocol, self.here, service.publish_not_ready)
        if self.weights:
            self._weigh(found)
        chosen = choices(found, self.here)
        if service.health_check_port:
            self.local[family] |= {end.key[:2] for end in chosen.local if end.ready}
        stem = f"{service.namespace}/{service.name}:{port.name or port.port}"
        stem += f"/{port.protocol.lower()}/v{family}"
        number = PROTOCOLS[port.protocol]
        clusters = [at for at in service.cluster_ips if at.version == family]
        if clusters:
            inside = chosen.local if service.internal_local else chosen.cluster
            self.rows[f"{stem}/cluster"] = self._row(CLUSTER_IP, inside, [], chosen)
            self._claim(f"{stem}/cluster", RANK_CLUSTER_IP, clusters, port.port, number)
        self._external(stem, port, family, chosen)

    def _external(self, stem: str, port: ServicePort, family: int, chosen: Choices) -> None:
        service, number = self.service, PROTOCOLS[port.protocol]
        row = f"{stem}/external"
        claims = len(self.claims)
        if port.node_port and service.type in ("NodePort", "LoadBalancer"):
            for hi, lo in self.here.node_ports_at[FAMILIES.index(family)]:
                key = (hi, lo, port.node_port, number)
                self.claims.append(Claim(key, RANK_NODE_PORT, row))
        external = [at for at in self.external if at.version == family]
        self._claim(row, RANK_EXTERNAL_IP, external, port.port, number)
        balancers = [at for at in self.balancers if at.version == family]
        sources = self._sources(family)
        guarded = f"{stem}/balancer" if sources else row
        if not sources:
            self._claim(row, RANK_LOAD_BALANCER, balancers, port.port, number)
        flags = KEEP_SOURCE if service.external_local else 0
        outside = chosen.local if service.external_local else chosen.cluster
        if len(self.claims) > claims:
            self.rows[row] = self._row(flags, chosen.cluster, outside, chosen)
        if sources and balancers:
            self.rows[guarded] = self._row(flags, chosen.cluster, outside, chosen, sources)
            self._claim(guarded, RANK_LOAD_BALANCER, balancers, port.port, number)

    def _claim(
        self, row: str, rank: int, addresses: Sequence[Address], port: int, protocol: int
    ) -> None:
        for address in addresses:
            self.claims.append(Claim((*halves(address), port, protocol), rank, row))

    def _addresses(self, family: int) -> None:
        """Claim the addresses themselves, with all their other ports."""
        service = self.service
        for rank, row, addresses in (
            (RANK_CLUSTER_IP, CLUSTER_ADDRESSES, service.cluster_ips),
            (RANK_LOAD_BALANCER, OUTSIDE_ADDRESSES, self.balancers),
            (RANK_EXTERNAL_IP, OUTSIDE_ADDRESSES, self.external),
        ):
            mine = [at for at in addresses if at.version == family]
            self._claim(row, rank, mine if service.ports else [], 0, 0)

    def _sources(self, family: int) -> tuple[Range, ...]:
        """Ranges of a family; where only the other family has some, nobody may come."""
        ranges = self.service.source_ranges
        mine = [cidr for cidr in ranges if cidr.version == family]
        if not ranges or any(cidr.prefixlen == 0 for cidr in mine):
            return ()
        return tuple(sorted({source_range(cidr) for cidr in mine})) or (NOBODY,)

    def _row(
        self,
        flags: int,
        inside: Sequence[Known],
        outside: Sequence[Known],
        chosen: Choices,
        sources: tuple[Range, ...] = (),
    ) -> ServiceRow:
        listed = {end.key for end in (*inside, *outside)}
        active, draining = [], []
        for end in chosen.known:  # also those that a policy or hint leaves to other nodes
            if end.ready and end.weight:
                active.append(end.key)
            elif end.key in listed or drains(end):
                draining.append(end.key)
        use_maglev = self.algorithm == "maglev"
        return ServiceRow(
            flags,
            self.service.affinity_s,
            _weighted(inside),
            _weighted(outside),
            self._table(inside) if use_maglev and self.everywhere else None,
            self._table(outside) if use_maglev else None,
            sources,
            tuple(active),
            tuple(draining),
        )

    def _table(self, ends: Sequence[Known]) -> Table | None:
        """A table where there is something to choose."""
        if len(ends) < 2:
            return None
        keys = tuple(end.key for end in ends)
        weights = tuple(end.weight for end in ends)
        if len(set(weights)) == 1:
            weights = ()
        return Table(keys, weights, partial(_fill, keys, weights, self.here))

    def _health(self) -> tuple[int, HealthCheck] | None:
        service = self.service
        if not (service.health_check_port and service.type == "LoadBalancer"):
            return None
        if not service.external_local:
            return None
        count = max(map(len, self.local.values()))
        return service.health_check_port, HealthCheck(service.namespace, service.name, count)


def _address(key: Key) -> Address:
    hi, lo = key[:2]
    return IPv4Address(lo) if family_of(hi, lo) == 4 else IPv6Address(hi << 64 | lo)


def _fill(keys: tuple[Key, ...], weights: tuple[int, ...], here: Here) -> np.ndarray:
    names = [f"{_address(key)} {key[2]} {key[3]}".encode() for key in keys]
    seed = maglev.seed_bytes(here.options.maglev_seed)
    return maglev.table(names, here.options.maglev_size, seed, weights)


def _weighted(ends: Sequence[Known]) -> tuple[Key, ...]:
    """A list in which each backend stands as often as its weight says, LIST_MOST entries or so."""
    weights = [end.weight for end in ends]
    if len(set(weights)) < 2:
        return tuple(end.key for end in ends)
    common = gcd(*weights)
    total = sum(weights) // common
    scale = max(1.0, total / LIST_MOST)
    return tuple(end.key for end in ends for _ in range(max(1, round(end.weight / common / scale))))


def compile_host_port(wanted: HostPort, here: Here) -> Compiled:
    """Return what a host port should be: a service with one backend, the pod."""
    rows: dict[str, ServiceRow] = {}
    claims: list[Claim] = []
    protocol = PROTOCOLS[wanted.protocol]
    for family, everywhere in zip(FAMILIES, here.host_ports_at, strict=True):
        target = next((at for at in wanted.targets if at.version == family), None)
        addresses = everywhere
        if wanted.address is not None:
            addresses = (halves(wanted.address),) if wanted.address.version == family else ()
        if target is None or not addresses:
            continue
        backend: Key = (*halves(target), wanted.target_port, protocol)
        name = f"{wanted.owner}:{wanted.port}/{wanted.protocol.lower()}/v{family}/host"
        name += f"/{wanted.address}" if wanted.address is not None else ""
        rows[name] = ServiceRow(
            HOST_PORT | KEEP_SOURCE, 0, (backend,), (backend,), active=(backend,)
        )
        claims += [Claim((*at, wanted.port, protocol), RANK_HOST_PORT, name) for at in addresses]
    return Compiled(rows, tuple(claims))
