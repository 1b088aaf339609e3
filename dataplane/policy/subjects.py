"""Which policies select which pods of this node, and what follows for each of them.

Rule: the key of a pod's policy row says everything that the row depends on; None is "no policy".

Theory. Policies select identities, not pods, so replicas are looked at once. A new policy meets the
local identities of its namespace, a new identity meets the policies by the index of their
selectors. A pod whose labels are not known yet is isolated by each policy that may select it, and
gets none of their allowances. Audit is a matter of the whole pod (struct policy): a policy under
audit that stands beside an enforced one gives its allowances and denies nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dataplane.objects.collect import Objects, PolicyKey
from dataplane.objects.policies import EGRESS, INGRESS, Policy
from dataplane.objects.selectors import NAMESPACE
from dataplane.policy.kinds import Holder, Identity
from dataplane.policy.match import SelectorIndex, certain, holds, possible
from dataplane.policy.options import PolicyOptions
from dataplane.policy.parts import ALLOW_ONLY, DENY_ONLY, WHOLE, Hold, Numbers, Unit
from dataplane.policy.rows import Key


class _Subject:
    """A local identity: its ports, the units that select it and those that may."""

    __slots__ = ("certain", "ports", "possible")

    def __init__(self) -> None:
        self.ports: set[int] = set()
        self.certain: set[Unit] = set()
        self.possible: set[Unit] = set()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a pod's row shall be. rest: by direction, the units that isolate; None: not isolated."""

    key: Key
    rest: tuple[tuple[Unit, ...] | None, tuple[Unit, ...] | None]
    audit: bool


class Subjects:
    """Policies and the pods of this node."""

    def __init__(self, options: PolicyOptions) -> None:
        """No policies, no pods."""
        self._options = options
        self._objects = Objects()
        self._units: dict[PolicyKey, tuple[Unit, ...]] = {}
        self._index: SelectorIndex[Unit] = SelectorIndex()
        self._subjects: dict[Identity, _Subject] = {}
        self._by_namespace: dict[str, set[Identity]] = {}
        self._holders: dict[int, Holder] = {}

    def set_endpoint(self, port: int, holder: Holder | None) -> None:
        """Say what stands at a port; None: nothing."""
        had = self._holders.pop(port, None)
        if had is not None and (holder is None or had.identity is not holder.identity):
            subject = self._subjects[had.identity]
            subject.ports.discard(port)
            if not subject.ports:
                self._forget(had.identity)
        if holder is None:
            return
        self._holders[port] = holder
        found = self._subjects.get(holder.identity)
        if found is None:
            found = self._meet(holder.identity)
        found.ports.add(port)

    def _meet(self, identity: Identity) -> _Subject:
        """Find the policies of a new identity."""
        subject = self._subjects[identity] = _Subject()
        self._by_namespace.setdefault(identity.labels.get(NAMESPACE, ""), set()).add(identity)
        if identity.unknown:
            some = self._index.candidates_of_unknown(identity.labels)
        else:
            some = self._index.candidates(identity.labels)
        for unit in some:
            self._select(unit, identity, subject)
        return subject

    def _forget(self, identity: Identity) -> None:
        subject = self._subjects.pop(identity)
        self._by_namespace[identity.labels.get(NAMESPACE, "")].discard(identity)
        for unit in subject.certain | subject.possible:
            unit.subjects.discard(identity)

    def _select(self, unit: Unit, identity: Identity, subject: _Subject) -> bool:
        """Judge whether a unit selects an identity; return whether it does or may."""
        selector = unit.spec.subject
        if not identity.unknown:
            if not holds(selector, identity.labels):
                return False
            subject.certain.add(unit)
        elif certain(selector, identity.labels):
            subject.certain.add(unit)
        elif possible(selector, identity.labels):
            subject.possible.add(unit)
        else:
            return False
        unit.subjects.add(identity)
        return True

    def set_policies(self, objects: Objects) -> set[int]:
        """Take the policies; return the ports of pods that other ones select now."""
        affected: set[int] = set()
        for key in objects.changed(self._objects, "policies"):
            for unit in self._units.pop(key, ()):
                self._index.remove(unit)
                for identity in unit.subjects:
                    subject = self._subjects[identity]
                    subject.certain.discard(unit)
                    subject.possible.discard(unit)
                    affected |= subject.ports
            policy = objects.policies.get(key)
            if policy is None:
                continue
            units = self._units[key] = tuple(Unit(policy, spec) for spec in policy.specs)
            for unit in units:
                self._index.add(unit.spec.subject, unit)
                for identity in list(self._nearby(policy)):
                    if self._select(unit, identity, self._subjects[identity]):
                        affected |= self._subjects[identity].ports
        self._objects = objects
        return affected

    def _nearby(self, policy: Policy) -> Iterable[Identity]:
        return self._by_namespace.get(policy.namespace, ()) if policy.namespace else self._subjects

    def holder(self, port: int) -> Holder | None:
        """Return what stands at a port."""
        return self._holders.get(port)

    def wanted(self, port: int) -> Wanted | None:
        """Return what the row of a port's pod shall be; None: no policy concerns it."""
        holder, options = self._holders[port], self._options
        subject = self._subjects[holder.identity]
        always = options.enforcement == "always"
        if options.enforcement == "never" or not (subject.certain or subject.possible or always):
            return None
        units = subject.certain | subject.possible
        audited = any(unit.audit for unit in units)
        enforced = always or any(unit.denies and not unit.audit for unit in units)
        audit = options.audit or (audited and not enforced)
        held = []
        for unit in units:
            mode = DENY_ONLY if unit in subject.possible else WHOLE
            if unit.audit and not audit:
                if mode == DENY_ONLY:
                    continue
                mode = ALLOW_ONLY
            held.append(unit.hold(mode, _numbers(unit, holder) if unit.names else ()))
        rest = (_isolating(held, INGRESS, always), _isolating(held, EGRESS, always))
        return Wanted(frozenset(held), rest, audit)


def _isolating(held: list[Hold], direction: int, always: bool) -> tuple[Unit, ...] | None:
    found = tuple(
        hold.unit for hold in held if hold.unit.isolates[direction] and hold.mode != ALLOW_ONLY
    )
    return found if found or always else None


def _numbers(unit: Unit, holder: Holder) -> Numbers:
    """Return the named ports of a subject that a unit's rules ask for."""
    found: dict[tuple[int, str], list[int]] = {}
    for port, number in sorted(holder.ports.numbers):
        if port in unit.names:
            found.setdefault(port, []).append(number)
    return tuple((port, tuple(numbers)) for port, numbers in found.items())
