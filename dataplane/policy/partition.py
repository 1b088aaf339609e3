"""The partition of all peers into groups, kept up to date change by change.

Rule: after regroup(), two kinds are in one group exactly when the same selectors in use fit them.

Theory. Selection and networks mark kinds as dirty; regroup() moves these and no others. A group
that changes as a whole keeps its number, so a new selector whose members were a group already costs
no address anything; a group that is split leaves its number to those that stay. What was mapped to
which kind since `moves` was last taken stands there.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

from dataplane.policy.kinds import KEEP_SOURCE, Group, Holder, Kind, Named, Numbered, kind_key
from dataplane.policy.networks import Networks
from dataplane.policy.prefixes import CLUSTER, KEEP, Node
from dataplane.policy.selection import Selection

Member = tuple[int, int, int]  # family, address, length; of an identity: 0, number, 0


@dataclass
class Regrouped:
    """What regroup() did. changed: with selectors added and removed; moved, dead: kinds."""

    fresh: list[Group] = field(default_factory=list)
    changed: list[tuple[Group, frozenset[int], frozenset[int]]] = field(default_factory=list)
    gone: list[Group] = field(default_factory=list)
    moved: list[Kind] = field(default_factory=list)
    dead: list[Kind] = field(default_factory=list)


class Partition:
    """Peers and the groups that follow from the selectors in use."""

    def __init__(self, blocks_match_cluster: bool) -> None:
        """blocks_match_cluster: whether blocks select pods and nodes too."""
        self._blocks_all = blocks_match_cluster
        self._dirty: set[Kind] = set()
        self._kinds: dict[Hashable, Kind] = {}
        self.members: dict[Member, Kind] = {}
        self.moves: dict[Member, Kind | None] = {}
        self.empty = Group(frozenset(), 0, {})
        self._groups: dict[int, Group] = {0: self.empty}
        self.world: dict[int, Holder] = {}  # by family; what prefixes of the world are
        self.unmanaged: Holder | None = None  # and those of the cluster
        self.networks = Networks(self._assign, self._dirty)
        self.selection = Selection(self.networks, self._dirty)

    # --- holders and kinds ------------------------------------------------------------------------

    def start(self, world: dict[int, Holder], unmanaged: Holder) -> None:
        """Say what addresses are that nobody holds; again when that changes."""
        self.world, self.unmanaged = world, unmanaged
        for number, family in self.networks.families.items():
            for value, length in list(family.nodes):
                self._assign(number, value, length)

    def hold(self, family: int, address: int, holder: Holder | None) -> None:
        """Say who holds an address; None: nobody."""
        place = self.networks.families[family]
        if holder is not None:
            place.hold(address, holder)
        elif address in place.holders:
            place.unhold(address)
        self._assign(family, address, place.bits)

    def hold_identity(self, number: int, holder: Holder | None) -> None:
        """Say what a cluster-wide identity is where the address is not known; None: nothing."""
        self._map((0, number, 0), None if holder is None else self._kind(holder, None))

    def _assign(self, family: int, value: int, length: int) -> None:
        """Map an address or prefix to its kind."""
        place = self.networks.families[family]
        node = place.nodes.get((value, length))
        holder = place.holders.get(value) if length == place.bits else None
        if holder is not None:
            node = node or place.find(value)
        elif node is not None and self.unmanaged is not None:
            holder = self._surroundings(node)
        self._map((family, value, length), self._kind(holder, node) if holder else None)

    def _surroundings(self, node: Node) -> Holder:
        """What addresses of a prefix are that nobody holds."""
        assert self.unmanaged is not None
        base = self.unmanaged if node.role & CLUSTER else self.world[node.family]
        number = node.number if node.number and node.length else base.number  # /0 is the world
        return Holder(base.identity, base.ports, base.flags, number, base.cluster, str(node))

    def _kind(self, holder: Holder, node: Node | None) -> Kind:
        flags = holder.flags | (KEEP_SOURCE if node is not None and node.role & KEEP else 0)
        place = kind_key(holder, node, flags)
        kind = self._kinds.get(place)
        if kind is None:
            kind = self._kinds[place] = Kind(holder, node, flags)
            for part in (kind.identity, kind.ports, node):
                if part is not None:
                    part.kinds.add(kind)
        return kind

    def _map(self, member: Member, kind: Kind | None) -> None:
        old = self.members.get(member)
        if old is kind:
            return
        if kind is None:
            del self.members[member]
        else:
            self.members[member] = kind
            kind.members += 1
            if kind.group is None:
                self._dirty.add(kind)
        if old is not None:
            old.members -= 1
            if not old.members:
                self._dirty.add(old)
        self.moves[member] = kind

    def _drop(self, kind: Kind) -> None:
        del self._kinds[kind_key(kind, kind.node, kind.flags)]
        for part in (kind.identity, kind.ports, kind.node):
            if part is not None:
                part.kinds.discard(kind)

    # --- groups -----------------------------------------------------------------------------------

    def groups(self) -> list[Group]:
        """Return all groups but the empty one."""
        return [group for group in self._groups.values() if group is not self.empty]

    def _hash(self, kind: Kind) -> int:
        mixed = kind.identity.hash ^ kind.ports.hash
        if kind.node is not None:
            mixed ^= kind.node.set_hash
            if self._blocks_all or not kind.cluster:
                mixed ^= kind.node.block_hash
        return mixed

    def _selected(self, kind: Kind) -> frozenset[int]:
        """Return the selectors in use that fit a kind."""
        found = kind.identity.selected | kind.ports.selected
        if kind.node is not None:
            found |= kind.node.sets
            if self._blocks_all or not kind.cluster:
                found |= kind.node.blocks
        return frozenset(found)

    def _named(self, kind: Kind) -> Named:
        """Return what numbers the named ports have that rules ask for."""
        found: Named = {}
        for number in kind.ports.selected:
            what = self.networks.by_id[number].what
            assert isinstance(what, Numbered)
            found.setdefault(what.port, []).append(what.number)
        return {port: sorted(numbers) for port, numbers in found.items()}

    def regroup(self) -> Regrouped:
        """Bring the groups up to date."""
        done = Regrouped()
        leaving: dict[Group | None, dict[int, list[Kind]]] = {}
        for kind in self._dirty:
            if not kind.members:
                self._leave(kind, done)
                self._drop(kind)
                done.dead.append(kind)
                continue
            mixed = self._hash(kind)
            if kind.group is None or kind.group.hash != mixed:
                leaving.setdefault(kind.group, {}).setdefault(mixed, []).append(kind)
        self._dirty.clear()
        whole = [group for group, parts in leaving.items() if _is_whole(group, parts)]
        for group in whole:  # their old hashes are free before anyone looks for a new one
            assert group is not None
            del self._groups[group.hash]
        for group in whole:
            ((mixed, kinds),) = leaving.pop(group).items()
            assert group is not None
            if mixed in self._groups:
                self._move(kinds, mixed, done)
                self._end(group, done)
            else:
                self._rename(group, mixed, kinds[0], done)
        for parts in leaving.values():
            for mixed, kinds in parts.items():
                self._move(kinds, mixed, done)
        return done

    def _leave(self, kind: Kind, done: Regrouped) -> None:
        """Take a kind out of its group, which may end by that."""
        group = kind.group
        if group is None:
            return
        group.kinds.discard(kind)
        kind.group = None
        if not group.kinds and group is not self.empty and self._groups.get(group.hash) is group:
            del self._groups[group.hash]
            self._end(group, done)

    def _end(self, group: Group, done: Regrouped) -> None:
        for number in group.selected:
            if number in self.networks.by_id:
                self.networks.by_id[number].groups.discard(group)
        done.gone.append(group)

    def _rename(self, group: Group, mixed: int, kind: Kind, done: Regrouped) -> None:
        before, after = group.selected, self._selected(kind)
        group.hash, group.selected, group.named = mixed, after, self._named(kind)
        self._groups[mixed] = group
        by_id = self.networks.by_id
        for number in before - after:
            if number in by_id:
                by_id[number].groups.discard(group)
        for number in after - before:
            by_id[number].groups.add(group)
        done.changed.append((group, after - before, before - after))

    def _move(self, kinds: list[Kind], mixed: int, done: Regrouped) -> None:
        group = self._groups.get(mixed)
        if group is None:
            kind = kinds[0]
            group = Group(self._selected(kind), mixed, self._named(kind))
            self._groups[mixed] = group
            for number in group.selected:
                self.networks.by_id[number].groups.add(group)
            done.fresh.append(group)
        for kind in kinds:
            self._leave(kind, done)
            kind.group = group
            group.kinds.add(kind)
            done.moved.append(kind)


def _is_whole(group: Group | None, parts: dict[int, list[Kind]]) -> bool:
    """Whether all of a group goes the same way, to where some selector still fits."""
    if group is None or not group.selected or len(parts) != 1:
        return False
    ((mixed, kinds),) = parts.items()
    return mixed != 0 and len(kinds) == len(group.kinds)
