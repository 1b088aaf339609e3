"""CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy and CiliumIdentity (cilium.io/v2).

Rule: what is read means what Cilium means by it; what is not supported is refused by name, with the
whole object.

Theory. Semantics follow Cilium's documentation (Documentation/security/policy) and its checks
(pkg/policy/api, pkg/k8s/apis/cilium.io/utils): a selector of a namespaced policy stays in its
namespace unless it asks for another or for namespace labels; peers of a clusterwide policy are
pods; a rule without peers needs ports to mean "any peer"; an empty list of peers means none;
protocol ANY is TCP, UDP and SCTP; port 0 is every port; a direction with rules is default deny
unless enableDefaultDeny says otherwise; toFQDNs stands alone in its element and only allows. Fields
of layer 7 other than rules.dns (cilium_ports.py) and of authentication are known and refused;
UNSUPPORTED (cilium_words.py) is the one list of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

from dataplane.objects.cilium_ports import check, ports_of
from dataplane.objects.cilium_words import ENTITIES
from dataplane.objects.core import namespace_of
from dataplane.objects.manifest import (
    Cidr,
    Place,
    brief,
    choice,
    flag,
    items,
    refuse,
    section,
    sections,
    text,
    texts,
)
from dataplane.objects.names import name_pattern
from dataplane.objects.policies import (
    DIRECTIONS,
    EGRESS,
    INGRESS,
    Block,
    Peer,
    Policy,
    Rule,
    ServiceRef,
    Spec,
    annotations,
    inside,
    network,
)
from dataplane.objects.selectors import (
    EXISTS,
    NAMESPACE,
    NAMESPACE_LABELS,
    RESERVED,
    Requirement,
    Selector,
    cilium_key,
    equals,
    exists,
    known,
    pod_key,
    read,
    selector,
)
from xdp.abi import value

LOG_MOST = 32
IDENTITY_FIRST, IDENTITY_LAST = value("IDENTITY_CLUSTER_FIRST"), value("IDENTITY_HASHED_FIRST") - 1


@dataclass(frozen=True)
class CiliumIdentity:
    """A number that the cluster allotted to a set of labels (with sources)."""

    number: int
    labels: Mapping[str, str]


def identity(manifest: Mapping[str, Any], name: str) -> CiliumIdentity:
    """Read a CiliumIdentity. Raises ManifestError."""
    if not name.isdecimal() or not IDENTITY_FIRST <= int(name) <= IDENTITY_LAST:
        raise refuse(
            ("metadata", "name"),
            f"{brief(name)} is not the number of an identity, {IDENTITY_FIRST} to {IDENTITY_LAST}",
        )
    place: Place = ("security-labels",)
    return CiliumIdentity(int(name), texts(manifest.get("security-labels"), place))


def cilium_policy(manifest: Mapping[str, Any], name: str) -> Policy:
    """Read a CiliumNetworkPolicy. Raises ManifestError."""
    return _policy(manifest, name, "CiliumNetworkPolicy", namespace_of(manifest))


def clusterwide_policy(manifest: Mapping[str, Any], name: str) -> Policy:
    """Read a CiliumClusterwideNetworkPolicy. Raises ManifestError."""
    return _policy(manifest, name, "CiliumClusterwideNetworkPolicy", "")


def _policy(manifest: Mapping[str, Any], name: str, kind: str, namespace: str) -> Policy:
    places: list[Place] = [("spec",)] if manifest.get("spec") is not None else []
    places += [("specs", n) for n in range(len(items(manifest.get("specs"), ("specs",))))]
    if not places:
        raise refuse(("spec",), "is missing, and so is specs")
    specs = []
    for number, place in enumerate(places):
        given = manifest["spec"] if place == ("spec",) else manifest["specs"][place[1]]
        specs.append(_Reader(namespace).spec(section(given, place), place, number))
    return Policy(kind, namespace, name, tuple(specs), *annotations(manifest))


class _Reader:
    """Reads the specs of a policy of a namespace ("": clusterwide)."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._init = False  # the subject may be a pod whose labels are not known yet

    def spec(self, spec: Mapping[str, Any], place: Place, number: int) -> Spec:
        lists = [f"{name}{deny}" for name in DIRECTIONS.values() for deny in ("", "Deny")]
        fields = ("endpointSelector", "enableDefaultDeny", "description", "labels", "log")
        check(spec, place, (*fields, *lists))
        if spec.get("endpointSelector") is None:
            raise refuse((*place, "endpointSelector"), "is missing")
        subject = self._subject(spec["endpointSelector"], (*place, "endpointSelector"))
        rules: list[Rule] = []
        for direction in DIRECTIONS:
            rules += self._rules(spec, place, direction, "")
            rules += self._rules(spec, place, direction, "Deny")
        if not rules and not any(isinstance(spec.get(name), list) for name in lists):
            raise refuse(place, f"has none of {', '.join(lists)}: it would do nothing")
        log = section(spec.get("log"), (*place, "log"))
        known(log, (*place, "log"), ("value",))
        value = text(log.get("value"), (*place, "log", "value"))
        if len(value) > LOG_MOST:
            raise refuse((*place, "log", "value"), f"has {len(value)} characters, limit {LOG_MOST}")
        return Spec(
            number,
            subject,
            tuple(rules),
            self._isolates(spec, place, rules),
            text(spec.get("description"), (*place, "description")),
            value,
        )

    def _subject(self, given: object, place: Place) -> Selector:
        requirements = read(given, place, cilium_key)
        self._init = any(one.key == f"{RESERVED}init" for one in requirements)
        if not self._namespace:
            return selector(requirements)
        for one in requirements:
            own = one == equals(NAMESPACE, self._namespace) or one.operator == EXISTS
            if one.key == NAMESPACE and not own:
                raise refuse(place, f"asks for another namespace than its own: {one}")
        return selector([*requirements, equals(NAMESPACE, self._namespace)])

    def _isolates(
        self, spec: Mapping[str, Any], place: Place, rules: list[Rule]
    ) -> tuple[bool, bool]:
        at: Place = (*place, "enableDefaultDeny")
        wanted = section(spec.get("enableDefaultDeny"), at)
        known(wanted, at, tuple(DIRECTIONS.values()))
        has = {rule.direction for rule in rules}
        ingress, egress = (
            flag(wanted.get(name), (*at, name), direction in has)
            for direction, name in sorted(DIRECTIONS.items())
        )
        return ingress, egress

    def _rules(
        self, spec: Mapping[str, Any], place: Place, direction: int, deny: str
    ) -> list[Rule]:
        name = f"{DIRECTIONS[direction]}{deny}"
        found = []
        for n, rule in enumerate(sections(spec.get(name), (*place, name))):
            at: Place = (*place, name, n)
            peers = self._peers(rule, at, "from" if direction == INGRESS else "to", bool(deny))
            for ports, names in ports_of(rule, at, direction == EGRESS and not deny):
                if peers is None and ports is None and not _names_peers(rule):
                    peers = ()  # an empty element selects nothing: it isolates only
                found.append(Rule(direction, name, n, bool(deny), peers, ports, names))
        return found

    def _peers(
        self, rule: Mapping[str, Any], place: Place, way: str, deny: bool
    ) -> tuple[Peer, ...] | None:
        readers: dict[str, Callable[[object, Place], list[Peer] | None]] = {
            f"{way}Endpoints": self._endpoints,
            f"{way}CIDR": self._cidrs,
            f"{way}CIDRSet": self._cidr_sets,
            f"{way}Entities": self._entities,
        }
        if way == "to":
            readers["toServices"] = self._services
            if not deny:
                readers["toFQDNs"] = self._names
        check(rule, place, (*readers, "toPorts", "icmps"))
        given = [name for name in readers if rule.get(name) is not None]
        full = [name for name in given if rule[name]]
        if len(full) > 1:
            raise refuse(place, f"{full[0]} and {full[1]} cannot stand in one element: use two")
        if not given:
            return None
        found: list[Peer] = []
        for name in given:
            some = readers[name](rule[name], (*place, name))
            if some is None:
                return None
            found += some
        return tuple(found)

    def _endpoints(self, given: object, place: Place) -> list[Peer] | None:
        found: list[Peer] = []
        for n, one in enumerate(sections(given, place)):
            requirements = read(one, (*place, n), cilium_key)
            found.append(selector([*requirements, *self._scope(requirements)]))
        return found

    def _scope(self, requirements: list[Requirement]) -> list[Requirement]:
        """What a peer selector asks for beside what it says."""
        keys = {one.key for one in requirements}
        if NAMESPACE in keys or any(key.startswith(RESERVED) for key in keys):
            return []
        if not self._namespace:
            return [] if self._init else [exists(NAMESPACE)]
        if any(key.startswith(NAMESPACE_LABELS) for key in keys):
            return []
        return [equals(NAMESPACE, self._namespace)]

    def _cidrs(self, given: object, place: Place) -> list[Peer] | None:
        return [Block(_cidr(one, (*place, n))) for n, one in enumerate(items(given, place))]

    def _cidr_sets(self, given: object, place: Place) -> list[Peer] | None:
        found: list[Peer] = []
        for n, one in enumerate(sections(given, place)):
            at: Place = (*place, n)
            check(one, at, ("cidr", "except"))
            cidr = network(one.get("cidr"), (*at, "cidr"))
            excepts = []
            for m, part in enumerate(items(one.get("except"), (*at, "except"))):
                excepts.append(network(part, (*at, "except", m)))
                if not inside(excepts[-1], cidr):
                    raise refuse((*at, "except", m), f"{excepts[-1]} is not inside {cidr}")
            found.append(Block(cidr, tuple(excepts)))
        return found

    def _entities(self, given: object, place: Place) -> list[Peer] | None:
        found: list[Peer] = []
        everything = False
        for n, one in enumerate(items(given, place)):
            members = ENTITIES[choice(one, (*place, n), tuple(ENTITIES))]
            everything |= members is None
            found += members or ()
        return None if everything else found

    def _names(self, given: object, place: Place) -> list[Peer] | None:
        return [name_pattern(one, (*place, n)) for n, one in enumerate(sections(given, place))]

    def _services(self, given: object, place: Place) -> list[Peer] | None:
        found: list[Peer] = []
        for n, one in enumerate(sections(given, place)):
            at: Place = (*place, n)
            known(one, at, ("k8sService", "k8sServiceSelector"))
            names = [name for name in one if one[name] is not None]
            if len(names) != 1:
                raise refuse(at, "needs one of k8sService and k8sServiceSelector")
            found.append(self._service(names[0], section(one[names[0]], (*at, names[0])), at))
        return found

    def _service(self, kind: str, one: Mapping[str, Any], place: Place) -> ServiceRef:
        at: Place = (*place, kind)
        namespace = text(one.get("namespace"), (*at, "namespace"))
        if kind == "k8sService":
            known(one, at, ("serviceName", "namespace"))
            name = text(one.get("serviceName"), (*at, "serviceName"))
            namespace = namespace or self._namespace
            if not name or not namespace:
                raise refuse(at, "needs serviceName and, in a clusterwide policy, namespace")
            return ServiceRef(namespace, name)
        known(one, at, ("selector", "namespace"))
        if one.get("selector") is None:
            raise refuse((*at, "selector"), "is missing")
        labels = selector(read(one["selector"], (*at, "selector"), pod_key))
        return ServiceRef(namespace or self._namespace, labels=labels)


def _names_peers(rule: Mapping[str, Any]) -> bool:
    return any(one is not None for name, one in rule.items() if name not in ("toPorts", "icmps"))


def _cidr(given: object, place: Place) -> Cidr:
    one = text(given, place)
    try:
        return ip_network(one, strict=False) if "/" in one else ip_network(ip_address(one))
    except ValueError as error:
        raise refuse(place, str(error)) from error
