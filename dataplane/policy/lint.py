"""`penstock policy lint`: rules that do not do what their author may have meant.

Rule: a finding names policy and rule, says what is surprising, and what to do; nothing is a finding
only because it is unusual.

Theory. Everything is judged over one snapshot of objects: a rule that selects nothing today is told
as such, not refused. Pods are looked at by identity, so ten thousand replicas are one.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from dataplane.objects.core import ContainerPort, Pod
from dataplane.objects.policies import (
    EGRESS,
    INGRESS,
    NUMBERS,
    Block,
    Policy,
    Rule,
    ServiceRef,
    Spec,
)
from dataplane.objects.selectors import EXISTS, NAMESPACE, NAMESPACE_LABELS, RESERVED, Selector
from dataplane.policy.explain import Explainer, Party
from dataplane.policy.findings import Finding, finding
from dataplane.policy.labels import namespace_labels, pod_labels
from dataplane.policy.lint_shadows import shadows
from dataplane.policy.match import LabelIndex, holds
from dataplane.policy.prefixes import address_of, number_of
from dataplane.policy.why import port_text

SOURCES = ("k8s", "reserved")
DNS = (NUMBERS["UDP"], 53)


class _Identity:
    """Pods of the same labels and ports: one of them."""

    __slots__ = ("pod",)

    def __init__(self, pod: Pod) -> None:
        self.pod = pod


class Linter:
    """Finds what is surprising in the policies of an Explainer's objects."""

    def __init__(self, explainer: Explainer) -> None:
        """explainer: who knows objects and options."""
        self._explain, self._objects = explainer, explainer.objects
        self._index: LabelIndex[_Identity] = LabelIndex()
        self._selected: dict[Selector, list[_Identity]] = {}
        self._host_pods: list[tuple[Pod, dict[str, str]]] = []
        known: set[tuple[tuple[tuple[str, str], ...], tuple[ContainerPort, ...]]] = set()
        for pod in self._objects.pods.values():
            space = self._objects.namespaces.get(pod.namespace)
            labels = pod_labels(pod, namespace_labels(pod.namespace, space))
            kind = tuple(sorted(labels.items())), pod.ports
            if pod.host_network:
                self._host_pods.append((pod, labels))
            elif not pod.over and kind not in known:
                known.add(kind)
                self._index.add(labels, _Identity(pod))
        self._addresses = sorted(
            number_of(ip)
            for pod in self._objects.pods.values()
            if not (pod.host_network or pod.over)
            for ip in pod.ips
        )

    def findings(self) -> list[Finding]:
        """Return everything that is surprising, in order of policies."""
        found: list[Finding] = []
        for _, policy in sorted(self._objects.policies.items()):
            for spec in policy.specs:
                found += self._spec(policy, spec)
                for rule in spec.rules:
                    found += self._rule(policy, spec, rule)
        return [*found, *shadows(self._objects.policies)]

    # --- specs ------------------------------------------------------------------------------------

    def _pods(self, selector: Selector) -> list[_Identity]:
        found = self._selected.get(selector)
        if found is None:
            found = self._selected[selector] = self._index.find(selector)
        return found

    def _spec(self, policy: Policy, spec: Spec) -> Iterator[Finding]:
        subjects = self._pods(spec.subject)
        for pod, labels in self._host_pods:
            if holds(spec.subject, labels):
                yield finding(policy, "", "host-network", pod.namespace, pod.name)
                break
        if not subjects and not any(key.startswith(RESERVED) for key in _keys(spec.subject)):
            missing = policy.namespace and policy.namespace not in self._objects.namespaces
            more = f"; there is no namespace {policy.namespace}" if missing else ""
            yield finding(policy, "", "selects-no-pod", spec.subject, more)
            return
        if spec.isolates[EGRESS] and not policy.audit:
            yield from self._dns(policy, subjects)
        if policy.audit:
            yield from self._audit(policy, subjects)

    def _dns(self, policy: Policy, subjects: Iterable[_Identity]) -> Iterator[Finding]:
        """Egress default deny without a way to a name server."""
        for one in subjects:
            party = self._party(one)
            ports = [
                rule.ports
                for _, other, _ in self._explain.selecting(party)
                for rule in other.rules
                if rule.direction == EGRESS and not rule.deny and rule.peers != ()
            ]
            # A name may well be that of port 53.
            found = any(
                some is None or any(port.name or port.covers(*DNS) for port in some)
                for some in ports
            )
            if not found:
                yield finding(policy, "", "no-dns", party.name)
                return

    def _audit(self, policy: Policy, subjects: Iterable[_Identity]) -> Iterator[Finding]:
        for one in subjects:
            party = self._party(one)
            for other, spec, _ in self._explain.selecting(party):
                denies = any(spec.isolates) or any(rule.deny for rule in spec.rules)
                if denies and not other.audit:
                    yield finding(policy, "", "audit-beside-enforced", other, party.name)
                    return

    def _party(self, one: _Identity) -> Party:
        return self._explain.of_pod(one.pod)

    # --- rules ------------------------------------------------------------------------------------

    def _rule(self, policy: Policy, spec: Spec, rule: Rule) -> Iterator[Finding]:
        where = f"{rule.section}[{rule.index}]"
        if rule.ports == () or rule.peers == ():
            yield finding(policy, where, "fits-nothing", "ports" if rule.ports == () else "peers")
        yield from self._peers(policy, rule, where)
        yield from self._named(policy, spec, rule, where)
        if {port.protocol for port in rule.ports or ()} == {NUMBERS["SCTP"]} and not rule.deny:
            yield finding(policy, where, "sctp-only")
        if rule.deny and rule.direction == INGRESS and _means_host(rule):
            yield finding(policy, where, "denies-own-node")

    def _peers(self, policy: Policy, rule: Rule, where: str) -> Iterator[Finding]:
        peers = rule.peers or ()
        for one in peers:
            if isinstance(one, Selector):
                yield from self._selector(policy, one, where)
            elif isinstance(one, Block):
                yield from self._block(policy, one, where, rule.deny)
            elif isinstance(one, ServiceRef) and not self._explain.endpoints(one):
                yield finding(policy, where, "service-without-endpoints", one)
        labelled = [one for one in peers if isinstance(one, Selector)]
        spaces = [one for one in labelled if _only_namespaces(one)]
        pods = [one for one in labelled if _only_pods(one, policy.namespace)]
        if policy.kind == "NetworkPolicy" and spaces and pods:
            yield finding(policy, where, "or-not-and", spaces[0], pods[0])

    def _selector(self, policy: Policy, selector: Selector, where: str) -> Iterator[Finding]:
        keys = _keys(selector)
        if any(key.startswith(RESERVED) for key in keys):
            return
        for key in keys:
            if key.partition(":")[0] not in SOURCES:
                yield finding(policy, where, "unknown-source", key)
        if not self._pods(selector):
            yield finding(policy, where, "peer-selects-nothing", selector)

    def _block(self, policy: Policy, block: Block, where: str, deny: bool) -> Iterator[Finding]:
        mine = self._inside(block)
        if not mine:
            return
        plural = "es" if len(mine) > 1 else ""
        pods = f"{len(mine)} pod address{plural}, such as {address_of(*mine[0])}"
        if self._explain.options.cidr_match == "cilium":
            yield finding(policy, where, "block-misses-pods", block, pods)
        else:
            verb = "denies" if deny else "allows"
            yield finding(policy, where, "block-covers-pods", block, verb, pods)

    def _inside(self, block: Block) -> list[tuple[int, int]]:
        """Return the pod addresses that a block means."""
        family = block.cidr.version
        first = bisect_left(self._addresses, (family, int(block.cidr.network_address)))
        last = bisect_left(self._addresses, (family, int(block.cidr.broadcast_address) + 1))
        found = self._addresses[first:last]
        if not block.excepts:
            return found
        return [one for one in found if not any(address_of(*one) in part for part in block.excepts)]

    def _named(self, policy: Policy, spec: Spec, rule: Rule, where: str) -> Iterator[Finding]:
        named = [port for port in rule.ports or () if port.name]
        if not named:
            return
        if rule.direction == INGRESS:
            owners, who = self._pods(spec.subject), "selected pod"
        elif rule.peers is None:
            owners, who = self._pods(Selector()), "pod"
        else:
            asked = [one for one in rule.peers if isinstance(one, Selector)]
            owners, who = [pod for one in asked for pod in self._pods(one)], "peer"
        for port in named:
            has = (self._party(one).numbers(port.protocol, port.name) for one in owners)
            if owners and not any(has):
                yield finding(policy, where, "no-such-port", who, port_text(port))


def _keys(selector: Selector) -> list[str]:
    return sorted(selector.keys())


def _means_host(rule: Rule) -> bool:
    host = {f"{RESERVED}host": ""}
    return rule.peers is None or any(
        isinstance(one, Selector) and holds(one, host) for one in rule.peers
    )


def _only_namespaces(selector: Selector) -> bool:
    """Whether it is a namespaceSelector without podSelector."""
    keys = selector.keys() - {NAMESPACE}
    exists = any(r.key == NAMESPACE and r.operator == EXISTS for r in selector.requirements)
    return exists and bool(keys) and all(key.startswith(NAMESPACE_LABELS) for key in keys)


def _only_pods(selector: Selector, namespace: str) -> bool:
    """Whether it is a podSelector without namespaceSelector."""
    own = any(r.key == NAMESPACE and r.values == (namespace,) for r in selector.requirements)
    return own and len(selector.requirements) > 1
