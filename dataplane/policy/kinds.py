"""What peers are made of: identities, named ports, kinds, groups, and the selectors that tell them
apart.

Rule: data with its links; dataplane/policy/partition.py alone changes them.

Theory. A *kind* of peer is a row of the table `peers`: addresses of the same labels, named ports
and surroundings (the longest prefix that a policy names). Which selectors fit a kind follows from
these three, each of which keeps its own set, so a pod more costs nothing here. Kinds that the same
selectors fit are one *group*, and that is all that policy entries know of a peer; selectors that
fit many peers make *wide groups*, apart from the others. Sets of selectors are compared by a hash:
the XOR of a random 128-bit weight of each, for wide ones in a second half. A DNS name is a group of
its own that no kind has: which addresses it leads to is known where packets pass
(kernels/dns_learned.py).
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from dataplane.objects.names import NamePattern
from dataplane.objects.policies import Block, ServiceRef
from dataplane.objects.selectors import Selector
from dataplane.policy.labels import Labels
from dataplane.policy.prefixes import Node
from xdp.abi import CONST

HOST, REMOTE_NODE = CONST["PEER_HOST"], CONST["PEER_REMOTE_NODE"]
POD, KEEP_SOURCE = CONST["PEER_POD"], CONST["PEER_KEEP_SOURCE"]
HASH_BITS = 128  # of one width

NamedPort = tuple[int, str]  # protocol, name
Named = dict[NamedPort, list[int]]  # named ports that rules ask for -> numbers


@dataclass(frozen=True, slots=True)
class Labelled:
    """What a rule selects by labels. of_deny: pods of unknown labels are taken for members."""

    selector: Selector
    of_deny: bool = False


@dataclass(frozen=True, slots=True)
class Numbered:
    """Peers whose port of this name has this number."""

    port: NamedPort
    number: int


What = Labelled | Block | ServiceRef | Numbered | NamePattern


class Selected:
    """A selector in use. rows: policies that ask for it; groups: those that it fits."""

    __slots__ = ("groups", "id", "members", "refs", "rows", "weight", "what", "wide")

    def __init__(self, what: What, number: int, weight: int, wide: bool = False) -> None:
        """weight: of HASH_BITS."""
        self.what, self.id, self.wide = what, number, wide
        self.weight = weight << HASH_BITS * wide
        self.refs = 0
        self.rows: set[Any] = set()
        self.groups: set[Group] = set()
        self.members: set[Any] = set()  # identities, nodes or views of ports


class Identity:
    """A set of labels. unknown: of a pod whose object is not there yet."""

    __slots__ = ("hash", "kinds", "labels", "number", "refs", "selected", "unknown")

    def __init__(self, labels: Labels, number: int, unknown: bool) -> None:
        self.labels, self.number, self.unknown = labels, number, unknown
        self.refs = 0
        self.selected: set[int] = set()
        self.hash = 0
        self.kinds: set[Kind] = set()


class Ports:
    """The named ports of a pod: (protocol, name) -> numbers."""

    __slots__ = ("hash", "kinds", "numbers", "refs", "selected")

    def __init__(self, numbers: frozenset[tuple[NamedPort, int]]) -> None:
        self.numbers = numbers
        self.refs = 0
        self.selected: set[int] = set()
        self.hash = 0
        self.kinds: set[Kind] = set()


@dataclass(frozen=True, slots=True, eq=False)
class Holder:
    """Who holds addresses: a pod or a node. number: its identity; name: for people."""

    identity: Identity
    ports: Ports
    flags: int
    number: int
    cluster: bool  # a pod or a node: what blocks match only as Kubernetes has it
    name: str


class Kind:
    """Peers that are alike: a row of `peers`. node None: an identity without address."""

    __slots__ = (
        "_blocks", "cluster", "flags", "groups", "identity", "members", "node", "number", "ports",
        "row",
    )  # fmt: skip

    def __init__(self, holder: Holder, node: Node | None, flags: int, blocks: bool) -> None:
        """blocks: whether blocks select it."""
        self.identity, self.ports, self.node = holder.identity, holder.ports, node
        self.flags, self.number, self.cluster = flags, holder.number, holder.cluster
        self._blocks = blocks
        self.members = 0
        self.groups: list[Group | None] = [None, None]  # its group, its wide group
        self.row = 0  # 0: it has none yet

    def hash(self) -> int:
        """Return the hash of the selectors in use that fit it, of both widths."""
        mixed = self.identity.hash ^ self.ports.hash
        if self.node is not None:
            mixed ^= self.node.set_hash
            if self._blocks:
                mixed ^= self.node.block_hash
        return mixed

    def selected(self) -> set[int]:
        """Return the selectors in use that fit it."""
        found = self.identity.selected | self.ports.selected
        if self.node is not None:
            found |= self.node.sets
            if self._blocks:
                found |= self.node.blocks
        return found

    @property
    def numbers(self) -> tuple[int, int]:
        """The numbers of its group and its wide group."""
        group, wide = self.groups
        assert group is not None
        assert wide is not None
        return group.number, wide.number

    @property
    def labels(self) -> Labels:
        """What its identity's number stands for."""
        if self.node is None or self.number != self.node.number:
            return self.identity.labels
        return {f"cidr:{self.node}": "", **self.identity.labels}


class Group:
    """Kinds that no selector in use tells apart. number 0: no selector fits them."""

    __slots__ = ("hash", "kinds", "named", "number", "rows", "selected", "wide")

    def __init__(
        self, selected: frozenset[int], mixed: int, named: Named, wide: bool = False
    ) -> None:
        self.selected, self.hash, self.named, self.wide = selected, mixed, named, wide
        self.number = 0
        self.kinds: set[Kind] = set()
        self.rows: set[Any] = set()  # policies that have a chain for it

    def numbers(self, port: NamedPort) -> list[int]:
        """Return the numbers that a named port has with these peers; none of one not in use."""
        return self.named.get(port, [])


def kind_key(one: Holder | Kind, node: Node | None, flags: int) -> Hashable:
    """Return what kinds are told apart by."""
    return one.identity, one.ports, node, flags, one.number, one.cluster
