"""Services (core/v1) and EndpointSlices (discovery.k8s.io/v1), as far as the dataplane needs them.

Rule: frozen values made from manifests; a manifest that lies is refused with the field's name.

Theory. Defaults are those of the API server, because a folder of manifests has none: a missing
port protocol is TCP, a missing traffic policy Cluster, an affinity lasts 10800 s, conditions that
nobody set mean "ready" (Kubernetes API reference, Service v1 and EndpointSlice v1). Addresses of a
load balancer count only with ipMode VIP; behind mode Proxy its packets come to the node ports. What
a Service wants is kept as it says it; what that means for a node is dataplane/services' business.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from ipaddress import ip_address, ip_network
from typing import Any

from dataplane.objects.core import PORT_MOST, PROTOCOLS, namespace_of
from dataplane.objects.manifest import (
    Address,
    Cidr,
    Place,
    brief,
    choice,
    flag,
    integer,
    parsed,
    refuse,
    section,
    sections,
    text,
    texts,
)

TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
POLICIES = ("Cluster", "Local")
FAMILIES = {"IPv4": 4, "IPv6": 6, "FQDN": 0}
AFFINITY_S = 10800
AFFINITY_S_MOST = 86400
SERVICE_LABEL = "kubernetes.io/service-name"
WEIGHT = "service.cilium.io/weight"  # annotation of an EndpointSlice
WEIGHT_MOST = 65535
ENDPOINTS_MOST = 1000  # of one slice, as the API server has it


@dataclass(frozen=True, slots=True)
class ServicePort:
    """A port of a Service. node_port 0: none. target_port is a number or a port's name."""

    name: str
    protocol: str  # TCP, UDP, SCTP
    port: int
    target_port: int | str = 0
    node_port: int = 0


@dataclass(frozen=True)
class Service:
    """core/v1 Service. affinity_s 0: none; health_check_port 0: none."""

    namespace: str
    name: str
    type: str = "ClusterIP"
    cluster_ips: tuple[Address, ...] = ()
    headless: bool = False
    ports: tuple[ServicePort, ...] = ()
    external_ips: tuple[Address, ...] = ()
    load_balancer_ips: tuple[Address, ...] = ()
    source_ranges: tuple[Cidr, ...] = ()
    affinity_s: int = 0
    external_local: bool = False
    internal_local: bool = False
    health_check_port: int = 0
    publish_not_ready: bool = False
    traffic_distribution: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    created: str = ""  # RFC 3339, in UTC: sorts by time


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint of a slice: the first of its addresses, which are interchangeable."""

    address: Address
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node: str = ""
    pod: str = ""  # name of the Pod that it is, if it is one
    zones: tuple[str, ...] = ()  # hints: clients of which zones shall use it
    nodes: tuple[str, ...] = ()  # and of which nodes


@dataclass(frozen=True, slots=True)
class EndpointPort:
    """A port of all endpoints of a slice. number 0: not given."""

    name: str
    protocol: str
    number: int


@dataclass(frozen=True)
class EndpointSlice:
    """discovery.k8s.io/v1 EndpointSlice. family 0: names, which have no place in a dataplane."""

    namespace: str
    name: str
    service: str  # empty: of none
    family: int
    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[EndpointPort, ...] = ()
    weight: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)


def is_plain(address: Address) -> bool:
    """Whether an address can be a service's or an endpoint's.

    Not: unspecified, loopback, link-local, multicast, and IPv6's first /64, in which the embedded
    IPv4 addresses stand (RFC 4291 2.5.2, 2.5.3, 2.5.5; RFC 1122 3.2.1.3).
    """
    number = int(address)
    if address.version == 6:
        hi = number >> 64
        return hi != 0 and hi >> 56 != 0xFF and hi >> 54 != 0x3FA
    return number >> 24 not in (0, 127) and number >> 28 < 0xE and number >> 16 != 0xA9FE


def service(manifest: Mapping[str, Any], name: str) -> Service:
    """Read a Service. Raises ManifestError."""
    metadata = section(manifest.get("metadata"), ("metadata",))
    spec = section(manifest.get("spec"), ("spec",))
    headless, cluster_ips = _cluster_ips(spec)
    return Service(
        namespace_of(manifest),
        name,
        choice(spec.get("type"), ("spec", "type"), TYPES, "ClusterIP"),
        cluster_ips,
        headless,
        _service_ports(spec),
        _addresses(spec, "externalIPs"),
        _load_balancer_ips(manifest),
        _source_ranges(spec),
        _affinity(spec),
        _policy(spec, "externalTrafficPolicy"),
        _policy(spec, "internalTrafficPolicy"),
        _port_number(spec, ("spec",), "healthCheckNodePort"),
        flag(spec.get("publishNotReadyAddresses"), ("spec", "publishNotReadyAddresses"), False),
        text(spec.get("trafficDistribution"), ("spec", "trafficDistribution")),
        texts(metadata.get("annotations"), ("metadata", "annotations")),
        texts(metadata.get("labels"), ("metadata", "labels")),
        _created(metadata),
    )


def _created(metadata: Mapping[str, Any]) -> str:
    """YAML makes a date of an unquoted time stamp."""
    value = metadata.get("creationTimestamp")
    if isinstance(value, date):
        return value.isoformat()
    return text(value, ("metadata", "creationTimestamp"))


def _cluster_ips(spec: Mapping[str, Any]) -> tuple[bool, tuple[Address, ...]]:
    """Whether it is headless, and its addresses; "" is one that is not allocated yet."""
    place: Place = ("spec", "clusterIPs")
    values = spec.get("clusterIPs")
    if not values and spec.get("clusterIP") is not None:
        place, values = ("spec", "clusterIP"), [spec["clusterIP"]]
    if values is not None and not isinstance(values, list):
        raise refuse(place, f"must be a list, is {brief(values)}")
    values = values or []
    if "None" in values:
        if len(values) > 1:
            raise refuse(place, f"{brief(values)}: None stands alone")
        return True, ()
    found = parsed(ip_address, [value for value in values if value != ""], place)
    _one_each(found, place)
    _refuse_special(found, place)
    return False, found


def _refuse_special(addresses: tuple[Address, ...], place: Place) -> None:
    for address in addresses:
        if not is_plain(address):
            raise refuse(place, f"{address} is no address that others could reach")


def _one_each(addresses: tuple[Address, ...], place: Place) -> None:
    if len({address.version for address in addresses}) < len(addresses):
        shown = ", ".join(map(str, addresses))
        raise refuse(place, f"{shown}: at most one address a family")


def _addresses(spec: Mapping[str, Any], name: str) -> tuple[Address, ...]:
    values = spec.get(name)
    if values is not None and not isinstance(values, list):
        raise refuse(("spec", name), f"must be a list, is {brief(values)}")
    return tuple(dict.fromkeys(parsed(ip_address, values or [], ("spec", name))))


def _load_balancer_ips(manifest: Mapping[str, Any]) -> tuple[Address, ...]:
    status = section(manifest.get("status"), ("status",))
    place: Place = ("status", "loadBalancer")
    balancer = section(status.get("loadBalancer"), place)
    found: list[Address] = []
    for n, ingress in enumerate(sections(balancer.get("ingress"), (*place, "ingress"))):
        at: Place = (*place, "ingress", n)
        mode = choice(ingress.get("ipMode"), (*at, "ipMode"), ("VIP", "Proxy"), "VIP")
        if ingress.get("ip") and mode == "VIP":
            found += parsed(ip_address, [ingress["ip"]], (*at, "ip"))
    return tuple(dict.fromkeys(found))


def _source_ranges(spec: Mapping[str, Any]) -> tuple[Cidr, ...]:
    place: Place = ("spec", "loadBalancerSourceRanges")
    values = spec.get("loadBalancerSourceRanges")
    if values is not None and not isinstance(values, list):
        raise refuse(place, f"must be a list, is {brief(values)}")
    trimmed = [value.strip() if isinstance(value, str) else value for value in values or []]
    return parsed(lambda cidr: ip_network(cidr, strict=False), trimmed, place)


def _affinity(spec: Mapping[str, Any]) -> int:
    kind = choice(
        spec.get("sessionAffinity"), ("spec", "sessionAffinity"), ("None", "ClientIP"), "None"
    )
    if kind == "None":
        return 0
    place: Place = ("spec", "sessionAffinityConfig")
    config = section(spec.get("sessionAffinityConfig"), place)
    client = section(config.get("clientIP"), (*place, "clientIP"))
    seconds = client.get("timeoutSeconds", AFFINITY_S)
    return integer(seconds, (*place, "clientIP", "timeoutSeconds"), 1, AFFINITY_S_MOST)


def _policy(spec: Mapping[str, Any], name: str) -> bool:
    return choice(spec.get(name) or None, ("spec", name), POLICIES, "Cluster") == "Local"


def _port_number(entry: Mapping[str, Any], place: Place, name: str) -> int:
    """A port that may be missing or 0: none."""
    return integer(entry.get(name) or 0, (*place, name), 0, PORT_MOST)


def _service_ports(spec: Mapping[str, Any]) -> tuple[ServicePort, ...]:
    found: dict[tuple[str, int], ServicePort] = {}
    names: set[str] = set()
    entries = sections(spec.get("ports"), ("spec", "ports"))
    for n, entry in enumerate(entries):
        place: Place = ("spec", "ports", n)
        port = ServicePort(
            text(entry.get("name"), (*place, "name")),
            choice(entry.get("protocol"), (*place, "protocol"), PROTOCOLS, "TCP"),
            integer(entry.get("port"), (*place, "port"), 1, PORT_MOST),
            _target_port(entry.get("targetPort"), (*place, "targetPort")),
            _port_number(entry, place, "nodePort"),
        )
        if port.name in names or (len(entries) > 1 and not port.name):
            what = f"{port.name!r} is another port's name" if port.name else "is missing"
            raise refuse((*place, "name"), f"{what}: of several ports each has its own")
        names.add(port.name)
        if (port.protocol, port.port) in found:
            raise refuse((*place, "port"), f"{port.port}/{port.protocol} is there already")
        found[port.protocol, port.port] = port
    return tuple(found.values())


def _target_port(value: object, place: Place) -> int | str:
    if isinstance(value, str):
        return value
    return integer(value or 0, place, 0, PORT_MOST)


def endpoint_slice(manifest: Mapping[str, Any], name: str) -> EndpointSlice:
    """Read an EndpointSlice. Raises ManifestError."""
    metadata = section(manifest.get("metadata"), ("metadata",))
    labels = texts(metadata.get("labels"), ("metadata", "labels"))
    annotations = texts(metadata.get("annotations"), ("metadata", "annotations"))
    family = FAMILIES[choice(manifest.get("addressType"), ("addressType",), tuple(FAMILIES))]
    entries = sections(manifest.get("endpoints"), ("endpoints",))
    if len(entries) > ENDPOINTS_MOST:
        raise refuse(("endpoints",), f"{len(entries)} endpoints, limit {ENDPOINTS_MOST} a slice")
    endpoints = (
        tuple(_endpoint(entry, ("endpoints", n), family) for n, entry in enumerate(entries))
        if family
        else ()
    )
    return EndpointSlice(
        namespace_of(manifest),
        name,
        labels.get(SERVICE_LABEL, ""),
        family,
        endpoints,
        _endpoint_ports(manifest),
        _weight(annotations),
        labels,
    )


def _weight(annotations: Mapping[str, str]) -> int:
    if WEIGHT not in annotations:
        return 1
    place: Place = ("metadata", "annotations", WEIGHT)
    if not annotations[WEIGHT].isdecimal():
        raise refuse(place, f"{brief(annotations[WEIGHT])} is not a number")
    return integer(int(annotations[WEIGHT]), place, 0, WEIGHT_MOST)


def _endpoint(entry: Mapping[str, Any], place: Place, family: int) -> Endpoint:
    values = entry.get("addresses")
    at: Place = (*place, "addresses")
    if not isinstance(values, list) or not values:
        raise refuse(at, f"must be a list of addresses, is {brief(values)}")
    address = parsed(ip_address, values[:1], at)[0]
    if address.version != family:
        raise refuse(at, f"{address} is not IPv{family}, which addressType says")
    _refuse_special((address,), at)
    conditions = section(entry.get("conditions"), (*place, "conditions"))
    ready = flag(conditions.get("ready"), (*place, "conditions", "ready"), True)
    target = section(entry.get("targetRef"), (*place, "targetRef"))
    is_pod = target.get("kind") == "Pod"
    hints = section(entry.get("hints"), (*place, "hints"))
    return Endpoint(
        address,
        ready,
        flag(conditions.get("serving"), (*place, "conditions", "serving"), ready),
        flag(conditions.get("terminating"), (*place, "conditions", "terminating"), False),
        text(entry.get("nodeName"), (*place, "nodeName")),
        text(target.get("name"), (*place, "targetRef", "name")) if is_pod else "",
        _hints(hints, (*place, "hints"), "forZones"),
        _hints(hints, (*place, "hints"), "forNodes"),
    )


def _hints(hints: Mapping[str, Any], place: Place, name: str) -> tuple[str, ...]:
    if not hints:
        return ()
    found = sections(hints.get(name), (*place, name))
    return tuple(text(hint.get("name"), (*place, name)) for hint in found)


def _endpoint_ports(manifest: Mapping[str, Any]) -> tuple[EndpointPort, ...]:
    found = []
    for n, entry in enumerate(sections(manifest.get("ports"), ("ports",))):
        place: Place = ("ports", n)
        found.append(
            EndpointPort(
                text(entry.get("name"), (*place, "name")),
                choice(entry.get("protocol"), (*place, "protocol"), PROTOCOLS, "TCP"),
                _port_number(entry, place, "port"),
            )
        )
    return tuple(found)
