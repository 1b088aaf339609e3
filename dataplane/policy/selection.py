"""The selectors in use, and the identities and named ports that they fit.

Rule: what an identity's set of selectors says is true at every moment; selectors that nobody uses
any more go when purge() is called, not before.

Theory. A new selector finds its members by the index of labels, the tree of prefixes, or the views
of named ports; a new identity finds its selectors by theirs. Both mark kinds as dirty for
partition.py. A pod of unknown labels is a member of a selector of deny rules where it may be one,
of a selector of allow rules where it must be one. A selector that fits `wide_from` peers or more
when a rule begins to use it is wide, for that rule and those that come; rules from before keep a
narrow one. Numbers of named ports are wide, and so is what is used with them. ALWAYS_WIDE are
always in use: rules about everybody are common and finding all takes long; and every policy lets
the host in, which would else be a second probe about each group.
"""

import random
from collections.abc import Callable, Iterable
from ipaddress import ip_network

from dataplane.objects.cilium_words import CLUSTER_NAME
from dataplane.objects.names import NamePattern
from dataplane.objects.policies import Block, ServiceRef
from dataplane.objects.selectors import CLUSTER, NAMESPACE, RESERVED, equals, exists, selector
from dataplane.policy.kinds import (
    HASH_BITS,
    Group,
    Identity,
    Kind,
    Labelled,
    NamedPort,
    Numbered,
    Ports,
    Selected,
    What,
)
from dataplane.policy.labels import Labels
from dataplane.policy.match import LabelIndex, SelectorIndex, certain, holds, possible
from dataplane.policy.names import FIRST, Names
from dataplane.policy.networks import Networks

HOST_SELECTOR = selector([exists(f"{RESERVED}host")])
ALWAYS_WIDE: tuple[What, ...] = (
    Labelled(HOST_SELECTOR),
    *(Labelled(selector([exists(NAMESPACE)]), of_deny) for of_deny in (False, True)),
    *(Labelled(selector([equals(CLUSTER, CLUSTER_NAME)]), of_deny) for of_deny in (False, True)),
    *(Block(ip_network(cidr)) for cidr in ("0.0.0.0/0", "::/0")),
)
IdentityKey = tuple[bool, tuple[tuple[str, str], ...]]


class Selection:
    """Selectors, identities, views of named ports."""

    def __init__(self, networks: Networks, dirty: set[Kind], wide_from: int) -> None:
        """networks: what blocks and sets of addresses select; wide_from: peers of a wide one."""
        self._networks, self._dirty, self._wide_from = networks, dirty, wide_from
        self.names = Names()
        self._random = random.Random(1)
        self._ids = 0
        self._identities: dict[IdentityKey, Identity] = {}
        self._labels: LabelIndex[Identity] = LabelIndex()
        self._unknown: set[Identity] = set()
        self._ports: dict[frozenset[tuple[NamedPort, int]], Ports] = {}
        self._by_port: dict[NamedPort, set[Ports]] = {}
        self._names: dict[NamedPort, int] = {}  # named ports in use -> how often
        self.numbered: dict[NamedPort, set[Selected]] = {}  # and what tells peers apart by them
        self.selected: dict[What, Selected] = {}
        self.wide: dict[What, Selected] = {}
        self.wide_ids: set[int] = set()
        self.by_id = networks.by_id
        self._by_labels: SelectorIndex[Selected] = SelectorIndex()
        self.services: set[Selected] = set()  # sets of addresses of services
        self.resolve: Callable[[ServiceRef], Iterable[tuple[int, int]]] = lambda _: ()
        self._idle: set[Selected] = set()
        self._unheld: set[Identity | Ports] = set()
        for what in ALWAYS_WIDE:
            self._make(what, wide=True).refs += 1

    # --- identities and named ports ---------------------------------------------------------------

    def identity(self, labels: Labels, number: int = 0, unknown: bool = False) -> Identity:
        """Return the identity of these labels, held once more. number: of a new one."""
        place: IdentityKey = unknown, tuple(sorted(labels.items()))
        known = self._identities.get(place)
        if known is not None:
            known.refs += 1
            return known
        made = self._identities[place] = Identity(labels, number, unknown)
        made.refs = 1
        if unknown:
            self._unknown.add(made)
            some = self._by_labels.candidates_of_unknown(labels)
        else:
            self._labels.add(labels, made)
            some = self._by_labels.candidates(labels)
        for selected in some:
            if _fits(selected, made):
                self._join(made, selected)
        return made

    @property
    def count(self) -> int:
        """How many identities there are."""
        return len(self._identities)

    def ports(self, numbers: frozenset[tuple[NamedPort, int]]) -> Ports:
        """Return a view of named ports, held once more."""
        made = self._ports.get(numbers)
        if made is None:
            made = self._ports[numbers] = Ports(numbers)
            for port, number in numbers:
                self._by_port.setdefault(port, set()).add(made)
                if port in self._names:
                    self._join(made, self._select(Numbered(port, number), wide=True))
        made.refs += 1
        return made

    def release(self, one: Identity | Ports) -> None:
        """Undo an identity() or ports()."""
        one.refs -= 1
        if not one.refs:
            self._unheld.add(one)

    def use_name(self, port: NamedPort) -> None:
        """Tell peers apart by the number of this named port."""
        self._names[port] = self._names.get(port, 0) + 1
        if self._names[port] == 1:
            for ports in self._by_port.get(port, ()):
                for number in _numbers(ports, port):
                    self._join(ports, self._select(Numbered(port, number), wide=True))

    def unuse_name(self, port: NamedPort) -> None:
        """Undo a use_name()."""
        self._names[port] -= 1
        if not self._names[port]:
            del self._names[port]
            for ports in self._by_port.get(port, ()):
                for number in _numbers(ports, port):
                    self._idle.add(self.wide[Numbered(port, number)])

    def _join(self, one: Identity | Ports, selected: Selected) -> None:
        if selected.id not in one.selected:
            one.selected.add(selected.id)
            one.hash ^= selected.weight
            selected.members.add(one)
            self._dirty |= one.kinds

    # --- selectors --------------------------------------------------------------------------------

    def use(self, what: What, wide: bool = False) -> Selected:
        """Return a selector, in use once more. wide: it must be a wide one, if it is no name."""
        wide = wide and not isinstance(what, NamePattern)
        if what in self.wide or wide or self._reach(what) >= self._wide_from:
            selected = self._select(what, wide=True)
        else:
            selected = self._select(what)
        selected.refs += 1
        return selected

    def unuse(self, selected: Selected) -> None:
        """Undo a use()."""
        selected.refs -= 1
        if not selected.refs:
            self._idle.add(selected)

    def _reach(self, what: What) -> int:
        """Return how many peers a selector fits, about: identities, or kinds in a block."""
        if isinstance(what, Labelled):
            known = self.selected.get(what)
            return len(known.members if known else self._labels.find(what.selector))
        return self._networks.reach(what) if isinstance(what, Block) else 0

    def _select(self, what: What, wide: bool = False) -> Selected:
        return (self.wide if wide else self.selected).get(what) or self._make(what, wide)

    def _make(self, what: What, wide: bool = False) -> Selected:
        self._ids += 1
        made = Selected(what, self._ids, self._random.getrandbits(HASH_BITS), wide)
        self.by_id[made.id] = made
        if wide:
            self.wide[what] = made
            self.wide_ids.add(made.id)
        else:
            self.selected[what] = made
        if isinstance(what, Numbered):
            self.numbered.setdefault(what.port, set()).add(made)
        elif isinstance(what, Labelled):
            self._by_labels.add(what.selector, made)
            for identity in self._labels.find(what.selector):
                self._join(identity, made)
            for identity in self._unknown:
                if _fits(made, identity):
                    self._join(identity, made)
        elif isinstance(what, Block):
            self._networks.select_block(made, what)
        elif isinstance(what, NamePattern):
            if number := self.names.use(what):
                group = Group(frozenset((made.id,)), made.weight, {})
                group.number = FIRST + number
                made.groups.add(group)
        else:
            self.services.add(made)
            self._networks.set_addresses(made, self.resolve(what))
        return made

    def purge(self) -> None:
        """Take away what nobody uses or holds."""
        for selected in self._idle:
            what = selected.what
            if not selected.refs and not (isinstance(what, Numbered) and what.port in self._names):
                self._forget(selected)
        self._idle.clear()
        for one in self._unheld:
            if not one.refs and not one.kinds:
                self._drop(one)
        self._unheld = {one for one in self._unheld if not one.refs and one.kinds}

    def _forget(self, selected: Selected) -> None:
        what = selected.what
        if isinstance(what, ServiceRef):
            self.services.discard(selected)
            self._networks.set_addresses(selected, ())
        elif isinstance(what, Block):
            self._networks.forget_block(selected, what)
        elif isinstance(what, NamePattern):
            self.names.unuse(what)
        else:
            for one in selected.members:
                one.selected.discard(selected.id)
                one.hash ^= selected.weight
                self._dirty |= one.kinds
            if isinstance(what, Labelled):
                self._by_labels.remove(selected)
            else:
                self.numbered[what.port].discard(selected)
        del (self.wide if selected.wide else self.selected)[what], self.by_id[selected.id]
        self.wide_ids.discard(selected.id)

    def _drop(self, one: Identity | Ports) -> None:
        for number in one.selected:
            self.by_id[number].members.discard(one)
        if isinstance(one, Ports):
            del self._ports[one.numbers]
            for port, _ in one.numbers:
                self._by_port[port].discard(one)
            return
        del self._identities[one.unknown, tuple(sorted(one.labels.items()))]
        if one.unknown:
            self._unknown.discard(one)
        else:
            self._labels.remove(one)


def _numbers(ports: Ports, port: NamedPort) -> list[int]:
    return [number for one, number in ports.numbers if one == port]


def _fits(selected: Selected, identity: Identity) -> bool:
    what = selected.what
    assert isinstance(what, Labelled)
    if not identity.unknown:
        return holds(what.selector, identity.labels)
    return (possible if what.of_deny else certain)(what.selector, identity.labels)
