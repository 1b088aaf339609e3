"""Why may one talk to another, or why not: policies read rule by rule.

Rule: the answer follows from objects alone, so it is the same offline and for pods of any node.

Theory. This does not look at tables: it judges each policy that selects one of the two ends as its
author would, and keeps what it found on the way: which rules fit, and which nearly did, since
what would have to change is a rule that fits but for the port, or but for the peer. Deny beats
allow, and a direction that no policy isolates is open (docs/policy.md). Of a pod whose object is
not there only the namespace is known.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from typing import Any

from dataplane.objects.collect import Objects
from dataplane.objects.core import Pod
from dataplane.objects.manifest import Address
from dataplane.objects.names import NamePattern, regexp
from dataplane.objects.policies import (
    DIRECTIONS,
    INGRESS,
    NUMBERS,
    Block,
    Policy,
    PortMatch,
    Rule,
    ServiceRef,
    Spec,
)
from dataplane.objects.selectors import NAMESPACE, Selector
from dataplane.policy.backends import Backends
from dataplane.policy.labels import (
    Labels,
    namespace_labels,
    pod_labels,
    reserved,
    unknown_labels,
)
from dataplane.policy.match import certain, holds, possible
from dataplane.policy.options import LocalView, PolicyOptions
from dataplane.policy.prefixes import number_of
from dataplane.tables.names_view import NameReader

PROTOCOLS = {**{name.lower(): n for name, n in NUMBERS.items()}, "icmp": 1, "icmpv6": 58}
NAMES = {number: name for name, number in PROTOCOLS.items()}


class Unknown(ValueError):
    """Something that was asked about is not there; the message says what is."""


@dataclass(frozen=True)
class Party:
    """One end: a pod, a node, or an address of something else."""

    name: str
    addresses: tuple[Address, ...]
    labels: Labels
    pod: Pod | None = None
    cluster: bool = False  # a pod or a node
    selected: bool = False  # policies may select it
    unknown: bool = False  # its labels are not known
    names: tuple[str, ...] = ()  # DNS names that lead to it, as this node has seen them
    node: str = ""  # the node that it is, or that it runs on

    def address(self, family: int) -> Address | None:
        """Return its address of a family."""
        return next((one for one in self.addresses if one.version == family), None)

    def numbers(self, protocol: int, name: str) -> set[int]:
        """Return the numbers that a named port has with it."""
        ports = self.pod.ports if self.pod else ()
        return {
            port.number
            for port in ports
            if (NUMBERS[port.protocol], port.name.lower()) == (protocol, name)
        }


@dataclass
class Direction:
    """What policies say in one direction. near: rules that fit but for peer or port."""

    name: str
    isolating: list[Policy] = field(default_factory=list)
    allowing: list[tuple[Policy, Spec, Rule]] = field(default_factory=list)
    denying: list[tuple[Policy, Spec, Rule]] = field(default_factory=list)
    near_port: list[tuple[Policy, Spec, Rule]] = field(default_factory=list)
    near_peer: list[tuple[Policy, Spec, Rule]] = field(default_factory=list)
    open_why: str = ""

    @property
    def allowed(self) -> bool:
        """The verdict."""
        if self.denying:
            return False
        return bool(self.allowing) or not self.isolating or bool(self.open_why)


class Explainer:
    """Answers over one snapshot of objects."""

    def __init__(
        self,
        objects: Objects,
        options: PolicyOptions,
        local: LocalView,
        names: NameReader | None = None,
    ) -> None:
        """local: the node that is looked from, "": unknown; names: where DNS names lead there."""
        self.objects, self.options, self._local = objects, options, local
        self._names = names
        self._backends = Backends()
        self._backends.update(objects, True)
        self._pods: dict[Address, Pod] = {}
        for _, pod in sorted(objects.pods.items(), reverse=True):
            if not (pod.host_network or pod.over):
                self._pods.update(dict.fromkeys(pod.ips, pod))
        self._servers = {
            endpoint.address
            for one in objects.slices.values()
            if (one.namespace, one.service) == ("default", "kubernetes")
            for endpoint in one.endpoints
        }

    # --- who is who -------------------------------------------------------------------------------

    def party(self, text: str) -> Party:
        """Return a pod ("namespace/name") or whoever has an address. Raises Unknown."""
        if "/" in text:
            namespace, _, name = text.partition("/")
            pod = self.objects.pods.get((namespace, name))
            if pod is None:
                raise Unknown(
                    f"no pod {text} among {len(self.objects.pods)}; ask for NAMESPACE/POD, "
                    "NAMESPACE/SERVICE or an address"
                )
            return self.of_pod(pod)
        try:
            return self.of_address(ip_address(text))
        except ValueError:
            return self._of_name(text)

    def _of_name(self, text: str) -> Party:
        """Return whoever a DNS name leads to."""
        found = self._names.addresses_of(text) if self._names else []
        if not found:
            raise Unknown(
                f"{text!r} is neither NAMESPACE/POD nor an address, and no pod of this node with "
                "rules.dns has been told where it leads as a DNS name: see `penstock fqdn why`"
            )
        return replace(self.of_address(found[0]), name=text, addresses=tuple(found))

    def of_pod(self, pod: Pod) -> Party:
        """Return a pod as an end; one of the host network is its node."""
        name = f"{pod.namespace}/{pod.name}"
        if pod.host_network:
            mine = pod.node == self._local.node
            labels = reserved("host" if mine else "remote-node")
            return Party(f"{name} (host network)", pod.ips, labels, cluster=True, node=pod.node)
        given = namespace_labels(pod.namespace, self.objects.namespaces.get(pod.namespace))
        here = self._attached(pod.namespace, pod.name)
        ips, node = pod.ips or here, self._local.node if here else pod.node
        labels = pod_labels(pod, given)
        return Party(name, ips, labels, pod, cluster=True, selected=True, node=node)

    def _attached(self, namespace: str, name: str) -> tuple[Address, ...]:
        """Return the addresses of a pod of this node."""
        for end in self._local.endpoints:
            if (end.namespace, end.pod) == (namespace, name):
                return end.addresses
        return ()

    def of_address(self, address: Address) -> Party:
        """Return whoever has an address."""
        node = self._node(address)
        server = ("kube-apiserver",) if address in self._servers else ()
        if node:
            name = "host" if node == self._local.node else "remote-node"
            labels = reserved(name, *server)
            return Party(f"node {node}", (address,), labels, cluster=True, node=node)
        for end in self._local.endpoints:
            if address in end.addresses:
                return self._endpoint(end.namespace, end.pod, address)
        pod = self._pods.get(address)
        if pod is not None:
            return replace(self.of_pod(pod), addresses=(address,))
        if server:
            return Party(f"{address}", (address,), reserved("kube-apiserver", "world"))
        networks = [*self._local.clusters]
        networks += [cidr for one in self.objects.nodes.values() for cidr in one.pod_cidrs]
        if any(cidr.version == address.version and address in cidr for cidr in networks):
            return Party(f"{address} (unmanaged)", (address,), reserved("unmanaged"))
        both = {cidr.version for cidr in self._local.clusters} == {4, 6}
        name = f"world-ipv{address.version}" if both else "world"
        names = tuple(self._names.names_of(address)) if self._names else ()
        return Party(f"{address}", (address,), reserved(name), names=names)

    def _endpoint(self, namespace: str, name: str, address: Address) -> Party:
        pod = self.objects.pods.get((namespace, name)) if name else None
        if pod is not None and not pod.host_network:
            return replace(self.of_pod(pod), addresses=(address,))
        here = Party("", (address,), {}, None, True, True, node=self._local.node)
        if not name:
            return replace(here, name=f"container at {address}", labels=reserved("init"))
        given = namespace_labels(namespace, self.objects.namespaces.get(namespace))
        return replace(here, name=f"{namespace}/{name}", labels=unknown_labels(given), unknown=True)

    def _node(self, address: Address) -> str:
        if address in self._local.addresses:
            return self._local.node
        for name, node in self.objects.nodes.items():
            routers = [cidr.network_address + 1 for cidr in node.pod_cidrs]
            if address in node.internal_ips or address in routers:
                return name
        return ""

    def endpoints(self, service: ServiceRef) -> set[tuple[int, int]]:
        """Return the addresses (family, value) behind a service."""
        return self._backends.addresses(service)

    # --- judging ----------------------------------------------------------------------------------

    def selecting(self, party: Party) -> Iterator[tuple[Policy, Spec, bool]]:
        """Yield the specs that select a party, and whether that is certain."""
        if not party.selected or self.options.enforcement == "never":
            return
        namespace = party.labels.get(NAMESPACE)
        for _, policy in sorted(self.objects.policies.items()):
            if policy.namespace and policy.namespace != namespace:
                continue
            for spec in policy.specs:
                if party.unknown:
                    if possible(spec.subject, party.labels):
                        yield policy, spec, certain(spec.subject, party.labels)
                elif holds(spec.subject, party.labels):
                    yield policy, spec, True

    def fits(self, rule: Rule, peer: Party, address: Address) -> bool:
        """Return whether a rule means a peer."""
        return rule.peers is None or any(
            self.means(one, peer, address, rule.deny) for one in rule.peers
        )

    def means(self, one: Any, peer: Party, address: Address, deny: bool) -> bool:
        """Return whether an element of a rule's peers means a peer."""
        if isinstance(one, Selector):
            if peer.unknown:
                return (possible if deny else certain)(one, peer.labels)
            return holds(one, peer.labels)
        if isinstance(one, Block):
            if peer.cluster and self.options.cidr_match == "cilium":
                return False
            return _in(address, one)
        if isinstance(one, NamePattern):
            return any(re.fullmatch(regexp(one), name) for name in peer.names)
        return number_of(address) in self._backends.addresses(one)

    def covers(
        self, ports: Iterable[PortMatch] | None, named: Party, protocol: int, port: int
    ) -> bool:
        """Return whether ports of a rule mean a port; named: whose named ports count."""
        return ports is None or any(
            port in named.numbers(protocol, one.name)
            if one.name and one.protocol == protocol
            else one.covers(protocol, port)
            for one in ports
        )

    def judge(
        self,
        direction: int,
        subject: Party,
        peer: Party,
        address: Address,
        protocol: int,
        port: int,
    ) -> Direction:
        """Judge one direction. address: the peer's, of the family in question."""
        peer = _seen(subject, peer)
        found = Direction(DIRECTIONS[direction])
        specs = list(self.selecting(subject))
        enforced = [s for p, s, _ in specs if not p.audit and (any(s.isolates) or _denies(s))]
        for policy, spec, sure in specs:
            silent = policy.audit and bool(enforced)
            if spec.isolates[direction] and not silent:
                found.isolating.append(policy)
            for rule in spec.rules:
                if rule.direction != direction or (rule.deny and silent):
                    continue
                if not rule.deny and not sure:
                    continue
                self._sort(found, (policy, spec, rule), subject, peer, address, protocol, port)
        always = self.options.enforcement == "always" and subject.selected
        if always and not found.isolating:
            found.isolating.append(Policy("the option policy.enforcement", "", "always", ()))
        if direction == INGRESS and found.isolating and "reserved:host" in peer.labels:
            found.open_why = "a pod's own node is always let in"
        return found

    def _sort(
        self,
        found: Direction,
        one: tuple[Policy, Spec, Rule],
        subject: Party,
        peer: Party,
        address: Address,
        protocol: int,
        port: int,
    ) -> None:
        """Put a rule where it belongs."""
        rule = one[2]
        fits = self.fits(rule, peer, address)
        named = subject if rule.direction == INGRESS else peer
        covers = self.covers(rule.ports, named, protocol, port)
        if fits and covers:
            (found.denying if rule.deny else found.allowing).append(one)
        elif not rule.deny and fits:
            found.near_port.append(one)
        elif not rule.deny and covers:
            found.near_peer.append(one)


def _seen(subject: Party, peer: Party) -> Party:
    """Return a peer as a pod sees it: a node is the host to its own pods, wherever one asks."""
    if peer.selected or not peer.node or not subject.node:
        return peer
    name = "host" if peer.node == subject.node else "remote-node"
    server = ("kube-apiserver",) if "reserved:kube-apiserver" in peer.labels else ()
    return replace(peer, labels=reserved(name, *server))


def _denies(spec: Spec) -> bool:
    return any(rule.deny for rule in spec.rules)


def _in(address: Address, block: Block) -> bool:
    inside = [
        cidr.version == address.version and address in ip_network(cidr)
        for cidr in (block.cidr, *block.excepts)
    ]
    return inside[0] and not any(inside[1:])
