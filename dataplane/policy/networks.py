"""The networks that policies and the configuration name, in both families.

Rule: a prefix is there while a policy refers to it or it has a role; whatever it gains or loses is
told to the partition (`moved` for mappings, `dirty` for kinds).

Theory. A selected block marks every prefix inside it that is not inside one of its exceptions;
since both are prefixes themselves, an address's longest prefix knows all blocks that it is in. A
set of addresses (endpoints of a service) marks just these. A prefix
that a policy refers to has an identity of its own, as in Cilium; one that only has a role (the
cluster's networks, destinations that are not masqueraded) has not.
"""

from collections.abc import Callable, Iterable

from dataplane.objects.policies import Block
from dataplane.policy.kinds import Kind, Selected
from dataplane.policy.prefixes import BITS, Family, Node, Numbers, key

Roles = dict[tuple[int, int, int], int]  # family, value, length -> KEEP, CLUSTER


class Networks:
    """Prefixes of both families, with what selects them."""

    def __init__(self, moved: Callable[[int, int, int], None], dirty: set[Kind]) -> None:
        """moved(family, value, length): what this is mapped to may be another now."""
        self.families = {family: Family(family) for family in BITS}
        self.by_id: dict[int, Selected] = {}  # selectors in use
        self._moved, self._dirty = moved, dirty
        self._numbers = Numbers()

    # --- what selects them ------------------------------------------------------------------------

    def reach(self, block: Block) -> int:
        """Return how many kinds of peers are in a block, its exceptions too."""
        family = self.families[block.cidr.version]
        return sum(len(node.kinds) for node in family.subtree(*key(block.cidr)))

    def select_block(self, selected: Selected, block: Block) -> None:
        """Mark the prefixes of a block."""
        family = self.families[block.cidr.version]
        for cidr in (block.cidr, *block.excepts):
            self._refer(family, *key(cidr))
        excepts = [key(cidr) for cidr in block.excepts]
        for node in family.subtree(*key(block.cidr)):
            if not any(_inside(family, node, part) for part in excepts):
                node.blocks.add(selected.id)
                node.block_hash ^= selected.weight
                selected.members.add(node)
                self._dirty |= node.kinds

    def forget_block(self, selected: Selected, block: Block) -> None:
        """Undo select_block()."""
        for node in selected.members:
            node.blocks.discard(selected.id)
            node.block_hash ^= selected.weight
            self._dirty |= node.kinds
        family = self.families[block.cidr.version]
        for cidr in (block.cidr, *block.excepts):
            self._unrefer(family.nodes[key(cidr)])

    def set_addresses(self, selected: Selected, addresses: Iterable[tuple[int, int]]) -> bool:
        """Say which addresses (family, value) a set has now; return whether that is news."""
        wanted = {self._refer(self.families[f], value, BITS[f]) for f, value in set(addresses)}
        for node in wanted - selected.members:
            self._mark(node, selected)
        for node in selected.members - wanted:
            self._mark(node, selected)
            self._unrefer(node)
        for node in wanted & selected.members:
            self._unrefer(node)  # it was counted before
        changed = wanted != selected.members
        selected.members = wanted
        return changed

    def _mark(self, node: Node, selected: Selected) -> None:
        node.sets ^= {selected.id}
        node.set_hash ^= selected.weight
        self._dirty |= node.kinds

    # --- their lives ------------------------------------------------------------------------------

    def _node(self, family: Family, value: int, length: int) -> Node:
        """Return the node of a prefix, made where it is missing."""
        node = family.nodes.get((value, length))
        if node is None:
            node = family.add(value, length)
            for number in node.blocks:
                self.by_id[number].members.add(node)
            self._moved(family.family, value, length)
            for address in family.inside(value, length):
                self._moved(family.family, address, family.bits)
        return node

    def _refer(self, family: Family, value: int, length: int) -> Node:
        node = self._node(family, value, length)
        node.refs += 1
        if node.refs == 1:
            node.number = self._numbers.take(node)
            self._moved(family.family, value, length)
        return node

    def _unrefer(self, node: Node) -> None:
        node.refs -= 1
        if not node.refs:
            self._numbers.give(node.number)
            node.number = 0
            self._tidy(node)

    def _tidy(self, node: Node) -> None:
        """Take a node away that nobody needs."""
        family = self.families[node.family]
        needed = node.refs or node.own_role or not node.length
        if not needed:
            family.remove(node)
            for number in node.blocks:
                self.by_id[number].members.discard(node)
        self._moved(node.family, node.value, node.length)
        if not needed:
            for address in family.inside(node.value, node.length):
                self._moved(node.family, address, family.bits)

    def set_roles(self, roles: Roles) -> bool:
        """Give prefixes their roles; others lose theirs. Return whether it is news."""
        news = False
        for number, family in self.families.items():
            wanted = {place[1:]: role for place, role in roles.items() if place[0] == number}
            had = {place: node for place, node in family.nodes.items() if node.own_role}
            if wanted == {place: node.own_role for place, node in had.items()}:
                continue
            news = True
            for place, role in wanted.items():
                self._node(family, *place).own_role = role
            for place, node in had.items():
                if place not in wanted:
                    node.own_role = 0
                    self._tidy(node)
            self._inherit(family)
        return news

    def _inherit(self, family: Family) -> None:
        """Work out all roles of a family again."""
        for node in list(family.subtree(0, 0)):
            node.role = node.own_role
            if node.length:
                node.role |= family.find(node.value, node.length).role
            self._moved(family.family, node.value, node.length)
        for address in list(family.holders):
            self._moved(family.family, address, family.bits)


def _inside(family: Family, node: Node, part: tuple[int, int]) -> bool:
    value, length = part
    return node.length >= length and node.value & family.masks[length] == value
