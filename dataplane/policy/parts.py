"""Rules in the form that chains are made of: selectors in use, codes of ports, a verdict word.

Rule: a part lives as long as a policy row has it, and holds its selectors and its rule number for
as long.

Theory. A part is one rule of one policy, as it holds for subjects whose named ports have the same
numbers; rows of pods with overlapping policies share parts, and a policy that is written again
shares the parts of rules that did not change. A named port of egress rules stays a name here: which
number it is depends on the peer, so it becomes a code when a group is known. What is said of the
rest, "default deny by these policies", is a part without codes.
"""

import hashlib
import heapq
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from dataplane.objects.core import PORT_MOST
from dataplane.objects.names import NamePattern
from dataplane.objects.policies import (
    ANY_PROTOCOL,
    DIRECTIONS,
    EGRESS,
    INGRESS,
    Peer,
    Policy,
    Rule,
    Spec,
)
from dataplane.objects.selectors import Selector
from dataplane.policy.chains import (
    NAMES,
    NAMES_ONLY,
    RULE_SHIFT,
    Chain,
    chain,
    codes,
    everything,
    exact,
    naming,
    word,
)
from dataplane.policy.kinds import Identity, Labelled, NamedPort, Selected
from dataplane.policy.options import ANSWERS, PolicyOptions
from dataplane.policy.rulebook import Rulebook
from dataplane.policy.selection import HOST_SELECTOR, Selection

Numbers = tuple[tuple[NamedPort, tuple[int, ...]], ...]  # named ports of a subject
POLICIES_NAMED = 50  # in what is said about a default deny
# By what a rule fits, as Cilium numbers it (pkg/monitor/api: PolicyMatchType).
L3_ONLY, L3_L4, L4_ONLY, ALL, L3_PROTO, PROTO_ONLY = 1, 2, 3, 4, 5, 6


WHOLE = 0  # what of a unit holds for a subject: all of it
DENY_ONLY = 1  # it may not select the subject after all: its labels are not known
ALLOW_ONLY = 2  # it is audited, and others are enforced


def _named(policy: Policy) -> str:
    """Return a policy's name as a JSON object."""
    return json.dumps({"kind": policy.kind, "namespace": policy.namespace, "name": policy.name})


def _about(spec: Spec) -> str:
    """Return what all rules of a spec are about beside its policy: more members of the object."""
    places = (("spec", spec.number), ("description", spec.description), ("log", spec.log))
    return "".join(f', "{key}": {json.dumps(one)}' for key, one in places if one)


class Hold:
    """A unit as it holds for subjects. numbers: of the named ports that its rules ask for.

    Made by Unit.hold() alone, so equal ones are the same object.
    """

    __slots__ = ("mode", "numbers", "parts", "unit")

    def __init__(self, unit: "Unit", mode: int, numbers: Numbers) -> None:
        self.unit, self.mode, self.numbers = unit, mode, numbers
        self.parts: tuple[Part, ...] | None = None


class Unit:
    """A spec of a policy, with the identities of this node's pods that it selects."""

    __slots__ = (
        "_holds", "about", "audit", "denies", "isolates", "key", "mark", "named", "names", "policy",
        "spec", "subjects",
    )  # fmt: skip

    def __init__(self, policy: Policy, spec: Spec) -> None:
        self.policy, self.spec = policy, spec
        self.subjects: set[Identity] = set()
        self._holds: dict[tuple[int, Numbers], Hold] = {}
        self.isolates, self.audit = spec.isolates, policy.audit
        self.denies = any(spec.isolates) or any(rule.deny for rule in spec.rules)
        text = f"{policy.kind}\n{policy.namespace}\n{policy.name}"
        self.mark = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")
        self.key = f"{text}\n{spec.number}"
        self.named = _named(policy)
        self.about = self.named[1:-1] + _about(spec)
        self.names = frozenset(
            (port.protocol, port.name)
            for rule in spec.rules
            if rule.direction == INGRESS
            for port in rule.ports or ()
            if port.name
        )

    def hold(self, mode: int, numbers: Numbers) -> Hold:
        """Return how it holds for a subject."""
        made = self._holds.get((mode, numbers))
        if made is None:
            made = self._holds[mode, numbers] = Hold(self, mode, numbers)
        return made


class Part:
    """One rule. peers None: any; named: ports whose numbers the peers say.

    selectors: of the names that may be asked for at its ports (rules.dns).
    """

    __slots__ = (
        "alive", "by_names", "chain", "codes", "direction", "id", "key", "named", "origin", "peers",
        "refs", "selectors", "verdict",
    )  # fmt: skip

    def __init__(
        self,
        key: Hashable,
        number: int,
        direction: int,
        peers: tuple[Selected, ...] | None,
        some: tuple[int, ...],
        named: frozenset[NamedPort],
        verdict: int,
        selectors: tuple[int, ...] = (),
    ) -> None:
        self.key, self.id, self.direction, self.peers = key, number, direction, peers
        self.codes = (*some, *naming(some, selectors))
        self.named, self.verdict, self.selectors = named, verdict, selectors
        self.by_names = any(isinstance(one.what, NamePattern) for one in peers or ())
        self.refs, self.alive = 0, True
        self.origin: Rule | None = None
        self.chain: Chain | None = chain([(self.codes, verdict)]) if some else None

    @property
    def rule(self) -> int:
        """Its rule's number."""
        return self.verdict >> RULE_SHIFT


class Parts:
    """All parts that live, and the making of others."""

    def __init__(self, selection: Selection, book: Rulebook, options: PolicyOptions) -> None:
        """selection: where their selectors are in use; book: where their rules have numbers."""
        self._selection, self._book, self._options = selection, book, options
        self._living: dict[Hashable, Part] = {}
        self._rules: dict[int, int] = {}  # number -> parts that have it
        self._ids = 0
        self._unused: set[Part] = set()

    def __len__(self) -> int:
        return len(self._living)

    def of(self, hold: Hold) -> tuple[Part, ...]:
        """Return the parts of a unit that is held."""
        if hold.parts is None or not all(part.alive for part in hold.parts):
            unit, mode = hold.unit, hold.mode
            hold.parts = tuple(
                self._part(unit, rule, hold.numbers)
                for rule in unit.spec.rules
                if mode == WHOLE or rule.deny == (mode == DENY_ONLY)
                if rule.peers is None or rule.peers
            )
        return hold.parts

    def host(self) -> Part:
        """Return the part that lets a pod's own node in."""
        living = self._living.get("host")
        if living is not None:
            return living
        about = {"kind": "Node", "direction": "ingress", "description": "own node is let in",
                 "match": L3_ONLY}  # fmt: skip
        verdict = word(False, 0, False, self._book.number("own node", json.dumps(about)))
        peers = (self._selection.use(Labelled(HOST_SELECTOR)),)
        some = tuple(everything(INGRESS))
        return self._live(Part("host", self._id(), INGRESS, peers, some, frozenset(), verdict))

    def rest(self, direction: int, units: Sequence[Unit]) -> Part:
        """Return the part of what no rule fits, in a direction that units isolate."""
        answers = {unit.policy.response for unit in units} - {""}
        answer = max(map(ANSWERS.__getitem__, answers or [self._options.deny_response]))
        log = any(unit.spec.log for unit in units)
        mixed = 0
        for mark in {unit.mark for unit in units}:
            mixed ^= mark
        key = f"default deny\n{DIRECTIONS[direction]}\n{mixed:x}"
        living = self._living.get((key, answer, log))
        if living is not None:
            return living
        number = self._book.number(key, _about_rest(direction, units))
        verdict = word(True, answer, log, number)
        place = key, answer, log
        return self._live(Part(place, self._id(), direction, None, (), frozenset(), verdict))

    def _part(self, unit: Unit, rule: Rule, numbers: Numbers) -> Part:
        policy, log = unit.policy, bool(unit.spec.log)
        mine: Numbers = ()
        if numbers and rule.direction == INGRESS:
            names = {(port.protocol, port.name) for port in rule.ports or () if port.name}
            mine = tuple(one for one in numbers if one[0] in names)
        answer = ANSWERS[policy.response or self._options.deny_response]
        number = self._book.number(
            f"{unit.key}\n{rule.section}\n{rule.index}",
            f'{{{unit.about}, "direction": "{DIRECTIONS[rule.direction]}", '
            f'"section": "{rule.section}", "index": {rule.index}, "match": {match_type(rule)}}}',
        )
        which = (rule.ports, rule.names) if rule.names else None  # one element, several rules
        place = number, mine, answer, log, which
        living = self._living.get(place)
        if living is not None:
            if living.origin is rule or living.origin == rule:
                return living
            del self._living[place]  # the rule is another one now; rows that have it go on with it
        verdict = word(rule.deny, answer, log, number)
        if rule.names:
            verdict |= NAMES | NAMES_ONLY
        some, named = _ports(rule, dict(mine))
        peers = None
        if rule.peers is not None:  # which numbers a named port has only wide groups know
            used = dict.fromkeys(_what(peer, rule.deny) for peer in rule.peers)
            peers = tuple(self._selection.use(what, wide=bool(named)) for what in used)
        for port in named:
            self._selection.use_name(port)
        selectors = tuple(filter(None, map(self._selection.names.use, rule.names)))
        part = Part(place, self._id(), rule.direction, peers, some, named, verdict, selectors)
        part.origin = rule
        return self._live(part)

    def _id(self) -> int:
        self._ids += 1
        return self._ids

    def _live(self, part: Part) -> Part:
        self._living[part.key] = part
        self._rules[part.rule] = self._rules.get(part.rule, 0) + 1
        self._unused.add(part)
        return part

    def keep(self, part: Part) -> None:
        """Say that one row more has a part."""
        part.refs += 1

    def drop(self, part: Part) -> None:
        """Say that a row has it no more."""
        part.refs -= 1
        if not part.refs:
            self._unused.add(part)

    def purge(self) -> bool:
        """Let go of what no row has; return whether there was something."""
        gone = [part for part in self._unused if not part.refs]
        self._unused.clear()
        for part in gone:
            part.alive = False
            if self._living.get(part.key) is part:
                del self._living[part.key]
            for selected in part.peers or ():
                self._selection.unuse(selected)
            for port in part.named:
                self._selection.unuse_name(port)
            for pattern in part.origin.names if part.origin else ():
                self._selection.names.unuse(pattern)
            self._rules[part.rule] -= 1
            if not self._rules[part.rule]:
                del self._rules[part.rule]
                self._book.release(part.rule)
        return bool(gone)

    def rules(self) -> Iterable[int]:
        """Return the numbers of all rules that live."""
        return self._rules.keys()


def match_type(rule: Rule) -> int:
    """Return by what a rule fits: L3_ONLY and so on."""
    ports = rule.ports
    if ports is None or any(port.protocol == ANY_PROTOCOL for port in ports):
        return ALL if rule.peers is None else L3_ONLY
    if all(not port.name and (port.first, port.last) == (0, PORT_MOST) for port in ports):
        return PROTO_ONLY if rule.peers is None else L3_PROTO
    return L4_ONLY if rule.peers is None else L3_L4


def _what(peer: Peer, deny: bool) -> Any:
    return Labelled(peer, deny) if isinstance(peer, Selector) else peer


def _ports(
    rule: Rule, numbers: Mapping[NamedPort, tuple[int, ...]]
) -> tuple[tuple[int, ...], frozenset[NamedPort]]:
    """Return codes of a rule, and the names that its peers have to resolve."""
    direction = rule.direction
    if rule.ports is None:
        return tuple(everything(direction)), frozenset()
    found: dict[int, None] = {}
    named = set()
    for port in rule.ports:
        if not port.name:
            found.update(dict.fromkeys(codes(port, direction)))
        elif direction == EGRESS:
            named.add((port.protocol, port.name))
        else:
            for number in numbers.get((port.protocol, port.name), ()):
                found[exact(port.protocol, number, direction)] = None
    return tuple(found), frozenset(named)


def resolved(part: Part, numbers: Mapping[NamedPort, list[int]]) -> list[int]:
    """Return the codes of a part's named ports, where the peers have these numbers."""
    found = [
        exact(port[0], number, part.direction)
        for port in sorted(part.named)
        for number in numbers.get(port, ())
    ]
    return [*found, *naming(found, part.selectors)]


def _about_rest(direction: int, units: Sequence[Unit]) -> str:
    names = {unit.named for unit in units}
    shown = ", ".join(heapq.nsmallest(POLICIES_NAMED, names))
    about = f'"kind": "default deny", "direction": "{DIRECTIONS[direction]}", "policies": [{shown}]'
    if len(names) > POLICIES_NAMED:
        about += f', "more": {len(names) - POLICIES_NAMED}'
    if not names:
        about += ', "description": "policy.enforcement is always"'
    return f"{{{about}}}"
