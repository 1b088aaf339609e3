"""Network policies as values, and the reading of NetworkPolicy (networking.k8s.io/v1).

Rule: one model for all kinds of policies; a policy that says something we do not do is refused
whole.

Theory. A Policy has specs; each selects subjects and has rules. A rule holds for peers AND ports;
None stands for "any", an empty tuple for "none". Peers are label selectors, blocks of addresses,
services or DNS names. Kinds differ in how they are written (this file and cilium.py), not in what
they mean. Defaults and checks of NetworkPolicy are those of the API server (kubernetes, pkg/apis/
networking/validation, and the API reference). A field that nobody knows is refused: to ignore it
could mean to allow more than was asked for.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

from dataplane.objects.core import PORT_MOST, PROTOCOLS, namespace_of
from dataplane.objects.manifest import (
    Cidr,
    Place,
    brief,
    choice,
    integer,
    items,
    refuse,
    section,
    sections,
    text,
    texts,
)
from dataplane.objects.names import NamePattern
from dataplane.objects.selectors import (
    NAMESPACE,
    Requirement,
    Selector,
    equals,
    exists,
    known,
    namespace_key,
    pod_key,
    read,
    selector,
)
from xdp.abi import CONST, value

INGRESS, EGRESS = value("DIRECTION_INGRESS"), value("DIRECTION_EGRESS")
DIRECTIONS = {INGRESS: "ingress", EGRESS: "egress"}
ANY_PROTOCOL = CONST["POLICY_ANY_PROTOCOL"]
NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132}
RESPONSE = "penstock.io/deny-response"
AUDIT = "penstock.io/audit"
RESPONSES = ("drop", "icmp", "reset")

_NAME = re.compile(r"(?=.*[a-z])[a-z0-9](?!.*--)[-a-z0-9]{0,13}[a-z0-9]|[a-z]")  # RFC 6335 5.1


@dataclass(frozen=True, slots=True)
class Block:
    """Addresses of a network without some parts of it."""

    cidr: Cidr
    excepts: tuple[Cidr, ...] = ()

    def __str__(self) -> str:
        without = f" except {', '.join(map(str, self.excepts))}" if self.excepts else ""
        return f"{self.cidr}{without}"


@dataclass(frozen=True, slots=True)
class ServiceRef:
    """Endpoints of services: of the one that is named, or of those that a selector fits.

    namespace "": of any namespace. The selector's keys are those of the Service's labels.
    """

    namespace: str
    name: str = ""
    labels: Selector | None = None

    def __str__(self) -> str:
        where = self.namespace or "any namespace"
        return f"service {where}/{self.name}" if self.name else f"services {self.labels} of {where}"


Peer = Selector | Block | ServiceRef | NamePattern


@dataclass(frozen=True, slots=True)
class PortMatch:
    """Ports first..last of a protocol (ICMP: types); or those that a name stands for."""

    protocol: int  # IANA's number; ANY_PROTOCOL: any, then of any port
    first: int = 0
    last: int = PORT_MOST
    name: str = ""

    def covers(self, protocol: int, port: int) -> bool:
        """Return whether a protocol and port are meant; never so for a name."""
        if self.protocol == ANY_PROTOCOL:
            return True
        return not self.name and self.protocol == protocol and self.first <= port <= self.last


@dataclass(frozen=True, slots=True)
class Rule:
    """One element of a policy's lists. peers, ports None: any; empty: none.

    names: what may be asked for at these ports (rules.dns), empty: anything. An element whose
    toPorts differ in that is several rules.
    """

    direction: int  # enum direction
    section: str  # the list as the manifest calls it, such as ingressDeny
    index: int
    deny: bool
    peers: tuple[Peer, ...] | None
    ports: tuple[PortMatch, ...] | None
    names: tuple[NamePattern, ...] = ()


@dataclass(frozen=True, slots=True)
class Spec:
    """What a policy says of some subjects. isolates: by direction, whether the rest is denied."""

    number: int  # its place among the specs of the object
    subject: Selector
    rules: tuple[Rule, ...]
    isolates: tuple[bool, bool]
    description: str = ""
    log: str = ""  # text for flows that its rules decide


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy object of any kind. namespace "": of the whole cluster."""

    kind: str
    namespace: str
    name: str
    specs: tuple[Spec, ...]
    response: str = ""  # answer to what it denies; empty: the node's default
    audit: bool = False  # what it would deny passes and is counted

    def __str__(self) -> str:
        where = f"{self.namespace}/" if self.namespace else ""
        return f"{self.kind} {where}{self.name}"


def annotations(manifest: Mapping[str, Any]) -> tuple[str, bool]:
    """Read our annotations of any policy: answer to what is denied, audit."""
    place: Place = ("metadata", "annotations")
    found = texts(section(manifest.get("metadata"), ("metadata",)).get("annotations"), place)
    response = choice(found.get(RESPONSE, "drop"), (*place, RESPONSE), RESPONSES)
    audit = choice(found.get(AUDIT, "false"), (*place, AUDIT), ("true", "false"))
    return response if RESPONSE in found else "", audit == "true"


def network_policy(manifest: Mapping[str, Any], name: str) -> Policy:
    """Read a NetworkPolicy. Raises ManifestError."""
    namespace = namespace_of(manifest)
    spec = section(manifest.get("spec"), ("spec",))
    if "spec" not in manifest:
        raise refuse(("spec",), "is missing")
    known(spec, ("spec",), ("podSelector", "policyTypes", "ingress", "egress"))
    pods = read(spec.get("podSelector"), ("spec", "podSelector"), pod_key)
    types = _types(spec)
    rules: list[Rule] = []
    if "Ingress" in types:
        rules += _rules(spec, namespace, INGRESS, "from")
    if "Egress" in types:
        rules += _rules(spec, namespace, EGRESS, "to")
    isolates = ("Ingress" in types, "Egress" in types)
    subject = selector([equals(NAMESPACE, namespace), *pods])
    response, audit = annotations(manifest)
    specs = (Spec(0, subject, tuple(rules), isolates),)
    return Policy("NetworkPolicy", namespace, name, specs, response, audit)


def _types(spec: Mapping[str, Any]) -> Sequence[str]:
    place: Place = ("spec", "policyTypes")
    types = items(spec.get("policyTypes"), place)
    for one in types:
        choice(one, place, ("Ingress", "Egress"))
    if types:
        return types
    return ("Ingress", "Egress") if items(spec.get("egress"), ("spec", "egress")) else ("Ingress",)


def _rules(spec: Mapping[str, Any], namespace: str, direction: int, peers: str) -> list[Rule]:
    name = DIRECTIONS[direction]
    found = []
    for n, rule in enumerate(sections(spec.get(name), ("spec", name))):
        place: Place = ("spec", name, n)
        known(rule, place, ("ports", peers))
        elements = sections(rule.get(peers), (*place, peers))
        ports = sections(rule.get("ports"), (*place, "ports"))
        found.append(
            Rule(
                direction,
                name,
                n,
                False,
                tuple(_peer(e, (*place, peers, m), namespace) for m, e in enumerate(elements))
                or None,
                tuple(_port(p, (*place, "ports", m)) for m, p in enumerate(ports)) or None,
            )
        )
    return found


def _peer(element: Mapping[str, Any], place: Place, namespace: str) -> Peer:
    known(element, place, ("podSelector", "namespaceSelector", "ipBlock"))
    given = {name for name, one in element.items() if one is not None}
    if not given:
        raise refuse(place, "names no peer: podSelector, namespaceSelector or ipBlock is needed")
    if "ipBlock" in given:
        if len(given) > 1:
            raise refuse(place, "ipBlock cannot stand beside podSelector or namespaceSelector")
        return _block(section(element["ipBlock"], (*place, "ipBlock")), (*place, "ipBlock"))
    requirements: list[Requirement] = []
    if "namespaceSelector" in given:
        at = (*place, "namespaceSelector")
        requirements.append(exists(NAMESPACE))  # a pod, not the world, where labels may be missing
        requirements += read(element["namespaceSelector"], at, namespace_key)
    else:
        requirements.append(equals(NAMESPACE, namespace))
    requirements += read(element.get("podSelector"), (*place, "podSelector"), pod_key)
    return selector(requirements)


def _block(block: Mapping[str, Any], place: Place) -> Block:
    known(block, place, ("cidr", "except"))
    cidr = network(block.get("cidr"), (*place, "cidr"))
    excepts = []
    for n, one in enumerate(items(block.get("except"), (*place, "except"))):
        part = network(one, (*place, "except", n))
        if not inside(part, cidr) or part == cidr:
            raise refuse((*place, "except", n), f"{part} is not strictly inside {cidr}")
        excepts.append(part)
    return Block(cidr, tuple(excepts))


def network(given: object, place: Place) -> Cidr:
    """Return a network; bits beyond its mask are ignored, as the API server takes them."""
    one = text(given, place)
    if "/" not in one:
        raise refuse(place, f"{brief(given)} is not a network: write ADDRESS/LENGTH")
    try:
        return ip_network(one, strict=False)
    except ValueError as error:
        raise refuse(place, str(error)) from error


def inside(part: Cidr, whole: Cidr) -> bool:
    """Return whether a network is part of another, of the same family."""
    return part.version == whole.version and part.subnet_of(whole)  # type: ignore[arg-type]


def _port(port: Mapping[str, Any], place: Place) -> PortMatch:
    known(port, place, ("protocol", "port", "endPort"))
    protocol = NUMBERS[choice(port.get("protocol"), (*place, "protocol"), PROTOCOLS, "TCP")]
    first, end = port.get("port"), port.get("endPort")
    if isinstance(first, str):
        if end is not None:
            raise refuse((*place, "endPort"), "needs a numeric port beside it, not a name")
        return PortMatch(protocol, name=port_name(first, (*place, "port")))
    if first is None:
        if end is not None:
            raise refuse((*place, "endPort"), "needs a port beside it")
        return PortMatch(protocol)
    least = integer(first, (*place, "port"), 1, PORT_MOST)
    most = least if end is None else integer(end, (*place, "endPort"), 1, PORT_MOST)
    if most < least:
        raise refuse((*place, "endPort"), f"{most} is less than port {least}")
    return PortMatch(protocol, least, most)


def port_name(name: str, place: Place) -> str:
    """Return the name of a port (RFC 6335 5.1). Raises ManifestError."""
    if not _NAME.fullmatch(name):
        raise refuse(
            place, f"{brief(name)} is no port name: 1 to 15 of a-z, 0-9 and '-', with a letter"
        )
    return name
