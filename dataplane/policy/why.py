"""`penstock policy why`: the answer as data and as words.

Rule: an answer names each policy and rule that decided, in both directions, and what would have to
change.

Theory. Egress of the source and ingress of the target must both allow. A pair of pods has two
families; they are judged both and told apart only where they differ. A service is its endpoints: it
is allowed when all of them are, and the first that is not is explained.
"""

from dataclasses import dataclass
from typing import Any

from dataplane.objects.collect import Objects
from dataplane.objects.core import PORT_MOST
from dataplane.objects.manifest import Address
from dataplane.objects.policies import (
    ANY_PROTOCOL,
    EGRESS,
    INGRESS,
    NUMBERS,
    Policy,
    PortMatch,
    Rule,
    Spec,
)
from dataplane.objects.selectors import NAMESPACE, NAMESPACE_LABELS, Selector
from dataplane.objects.services import Service
from dataplane.policy.explain import NAMES, PROTOCOLS, Direction, Explainer, Party, Unknown
from dataplane.policy.match import holds

ECHO = {4: (1, 8), 6: (58, 128)}  # family -> protocol and type of an echo request
HINTS_MOST = 4
Found = tuple[Policy, Spec, Rule]


@dataclass(frozen=True)
class Question:
    """What is asked for. port 0 and protocol 1 or 58: an echo request."""

    source: str
    target: str
    port: int
    protocol: int


def question(source: str, target: str, what: str) -> Question:
    """Read PORT/PROTOCOL, such as 80/tcp, 53/udp, icmp or 3/icmp. Raises Unknown."""
    number, slash, name = what.rpartition("/")
    protocol = PROTOCOLS.get(name.lower())
    if not slash and protocol not in (1, 58):
        number, protocol = what, 6
    if protocol is None or not (number or "0").isdecimal() or int(number or 0) > PORT_MOST:
        raise Unknown(f"{what!r} is not PORT/PROTOCOL; protocols are {', '.join(PROTOCOLS)}")
    if protocol not in (1, 58) and not number:
        raise Unknown(f"{what!r} has no port")
    echo = not number and protocol in (1, 58)
    return Question(source, target, -1 if echo else int(number), protocol)


class Why:
    """Answers questions over an Explainer."""

    def __init__(self, explainer: Explainer) -> None:
        """explainer: who knows objects and options."""
        self._explain = explainer
        self._objects: Objects = explainer.objects

    def answer(self, asked: Question) -> dict[str, Any]:
        """Return the verdict with its reasons, as JSON types. Raises Unknown."""
        source = self._explain.party(asked.source)
        service = self._service(asked.target)
        if service is not None:
            return self._of_service(asked, source, service)
        return self._between(source, self._explain.party(asked.target), asked)

    # --- two ends ---------------------------------------------------------------------------------

    def _between(self, source: Party, target: Party, asked: Question) -> dict[str, Any]:
        pairs = [
            (family, one, other)
            for family in (4, 6)
            if (one := source.address(family)) and (other := target.address(family))
        ]
        if not pairs:
            raise Unknown(f"{source.name} and {target.name} have no address family in common")
        answers = []
        for family, one, other in pairs:
            protocol, port = asked.protocol, asked.port
            if protocol in (1, 58):
                protocol, port = ECHO[family][0], ECHO[family][1] if port < 0 else port
            answers.append((family, self._judge(source, one, target, other, protocol, port)))
        plain = [{k: v for k, v in answer.items() if k != "addresses"} for _, answer in answers]
        if len(answers) == 1 or plain[0] == plain[1]:
            return answers[0][1]
        allowed = all(answer["allowed"] for _, answer in answers)
        return {
            "allowed": allowed,
            "source": source.name,
            "target": target.name,
            "port": answers[0][1]["port"],
            "families": {f"IPv{family}": answer for family, answer in answers},
        }

    def _judge(
        self, source: Party, one: Address, target: Party, other: Address, protocol: int, port: int
    ) -> dict[str, Any]:
        judge = self._explain.judge
        egress = judge(EGRESS, source, target, other, protocol, port)
        ingress = judge(INGRESS, target, source, one, protocol, port)
        itself = source.name == target.name and source.pod is not None
        answer: dict[str, Any] = {
            "allowed": (egress.allowed and ingress.allowed) or itself,
            "source": source.name,
            "target": target.name,
            "port": f"{port}/{NAMES.get(protocol, str(protocol))}",
            "addresses": [str(one), str(other)],
            "egress": _told(egress),
            "ingress": _told(ingress),
            "change": [],
        }
        if itself:
            answer["note"] = "a pod reaches itself inside itself: no policy is asked"
            return answer
        for direction, peer in ((egress, target), (ingress, source)):
            if not direction.allowed:
                answer["change"] += _hints(direction, peer, protocol, port)
        return answer

    # --- services ---------------------------------------------------------------------------------

    def _service(self, text: str) -> Service | None:
        namespace, _, name = text.partition("/")
        found = self._objects.services.get((namespace, name))
        if found is not None and (namespace, name) not in self._objects.pods:
            return found
        for service in self._objects.services.values():
            addresses = (*service.cluster_ips, *service.external_ips, *service.load_balancer_ips)
            if text in map(str, addresses):
                return service
        return None

    def _of_service(self, asked: Question, source: Party, service: Service) -> dict[str, Any]:
        name = f"{service.namespace}/{service.name}"
        protocol = {number: word for word, number in NUMBERS.items()}.get(asked.protocol, "")
        ports = [one for one in service.ports if (one.port, one.protocol) == (asked.port, protocol)]
        if not ports:
            known = ", ".join(f"{p.port}/{p.protocol.lower()}" for p in service.ports)
            raise Unknown(
                f"service {name} has no port {asked.port}/{protocol.lower()}, it has {known}"
            )
        answers = []
        for part in self._objects.slices.values():
            if (part.namespace, part.service) != (service.namespace, service.name):
                continue
            for port in part.ports:
                if (port.name, port.protocol) == (ports[0].name, ports[0].protocol):
                    for endpoint in part.endpoints:
                        target = self._explain.of_address(endpoint.address)
                        behind = Question(asked.source, "", port.number, asked.protocol)
                        if source.address(endpoint.address.version):
                            answers.append(self._between(source, target, behind))
        if not answers:
            raise Unknown(f"service {name} has no endpoint that {source.name} could reach")
        denied = [answer for answer in answers if not answer["allowed"]]
        shown = denied[0] if denied else answers[0]
        return {
            **shown,
            "allowed": not denied,
            "service": name,
            "endpoints": len(answers),
            "endpoints_denied": len(denied),
        }


# --- words ----------------------------------------------------------------------------------------


def rule_name(policy: Policy, spec: Spec, rule: Rule) -> str:
    """Return how people call a rule: NetworkPolicy shop/web ingress[0]."""
    where = f" spec {spec.number}" if spec.number else ""
    text = f" ({spec.description})" if spec.description else ""
    return f"{policy}{where} {rule.section}[{rule.index}]{text}"


def _told(direction: Direction) -> dict[str, Any]:
    isolating = sorted({str(policy) for policy in direction.isolating})
    if direction.denying:
        why = "a deny rule"
    elif direction.allowing:
        why = "a rule"
    elif not direction.isolating:
        why = "no policy isolates it in this direction"
    elif direction.open_why:
        why = direction.open_why
    else:
        why = "no rule of the policies that isolate it fits"
    return {
        "allowed": direction.allowed,
        "why": why,
        "rules": [rule_name(*one) for one in direction.denying or direction.allowing],
        "isolated_by": isolating,
    }


def _hints(direction: Direction, peer: Party, protocol: int, port: int) -> list[str]:
    """Return what would have to change, the smallest changes first."""
    what = f"{port}/{NAMES.get(protocol, str(protocol))}"
    if direction.denying:
        return [
            f"{direction.name}: {rule_name(*one)} denies it: narrow it; an allow rule cannot help"
            for one in direction.denying[:HINTS_MOST]
        ]
    found = [
        f"{direction.name}: {rule_name(*one)} means this peer, but not {what}: add the port "
        f"(it has {_ports(one[2].ports)})"
        for one in direction.near_port[:HINTS_MOST]
    ]
    for one in direction.near_peer[:HINTS_MOST]:
        lacks = _lacks(one[2], peer)
        found.append(
            f"{direction.name}: {rule_name(*one)} means {what}, but not this peer: {lacks}"
        )
    if not found:
        names = ", ".join(sorted({str(policy) for policy in direction.isolating})[:HINTS_MOST])
        found.append(f"{direction.name}: no rule of {names} means this peer or {what}: add one")
    found.append(f"{direction.name}: {_proposal(direction, peer, protocol, port)}")
    return found


def _ports(ports: tuple[PortMatch, ...] | None) -> str:
    return ", ".join(map(port_text, ports or ())) or "none"


def port_text(port: PortMatch) -> str:
    """Return ports of a rule as people write them."""
    if port.protocol == ANY_PROTOCOL:
        return "any protocol"
    protocol = NAMES.get(port.protocol, str(port.protocol))
    if port.name:
        return f"{port.name}/{protocol}"
    if (port.first, port.last) == (0, PORT_MOST):
        return f"any/{protocol}"
    last = f"-{port.last}" if port.last != port.first else ""
    return f"{port.first}{last}/{protocol}"


def _lacks(rule: Rule, peer: Party) -> str:
    """What a peer lacks to be meant by a rule: the fewest conditions of one of its elements."""
    best: list[str] | None = None
    for one in rule.peers or ():
        if not isinstance(one, Selector):
            missing = [f"it is not in {one}"]
        else:
            missing = [
                f"{condition} does not hold"
                for condition in one.requirements
                if not holds(Selector((condition,)), peer.labels)
            ]
        if best is None or len(missing) < len(best):
            best = missing
    return "; ".join(best or ["it means nobody"])


def _proposal(direction: Direction, peer: Party, protocol: int, port: int) -> str:
    """A rule of NetworkPolicy that would allow it."""
    way = "from" if direction.name == "ingress" else "to"
    element = f"{{ipBlock: {{cidr: {peer.addresses[0]}/{peer.addresses[0].max_prefixlen}}}}}"
    if peer.pod is not None:
        space = NAMESPACE_LABELS + "kubernetes.io/metadata.name"
        labels = {key: one for key, one in sorted(peer.pod.labels.items()) if "hash" not in key}
        some = ", ".join(f"{key}: {one}" for key, one in labels.items())
        name = peer.labels.get(space, peer.labels[NAMESPACE])
        element = (
            f"{{namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: {name}}}}}, "
            f"podSelector: {{matchLabels: {{{some}}}}}}}"
        )
    known = {number: word for word, number in NUMBERS.items()}
    ports = f", ports: [{{protocol: {known[protocol]}, port: {port}}}]" if protocol in known else ""
    return f"for example {direction.name}: [{{{way}: [{element}]{ports}}}]"
