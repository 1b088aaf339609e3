"""The partition of all peers into groups, kept up to date change by change.

Rule: after regroup(), two kinds are in one group exactly when the same selectors in use fit them.

Theory. Selection and networks mark kinds as dirty; regroup() moves these and no others. Each kind
has two groups, one by the selectors that fit many peers and one by all others: a selector of all
pods would else be an entry for each group that narrower ones make of them. What was mapped to which
kind since `moves` was last taken stands there.
"""

from collections.abc import Hashable

from dataplane.policy.grouping import Grouping, Regrouped
from dataplane.policy.kinds import KEEP_SOURCE, Group, Holder, Kind, kind_key
from dataplane.policy.networks import Networks
from dataplane.policy.prefixes import CLUSTER, KEEP, Node
from dataplane.policy.selection import Selection

Member = tuple[int, int, int]  # family, address, length; of an identity: 0, number, 0


class Partition:
    """Peers and the groups that follow from the selectors in use."""

    def __init__(self, blocks_match_cluster: bool, wide_from: int) -> None:
        """blocks_match_cluster: whether blocks select pods and nodes too."""
        self._blocks_all = blocks_match_cluster
        self._dirty: set[Kind] = set()
        self._kinds: dict[Hashable, Kind] = {}
        self.members: dict[Member, Kind] = {}
        self.moves: dict[Member, Kind | None] = {}
        self.world: dict[int, Holder] = {}  # by family; what prefixes of the world are
        self.unmanaged: Holder | None = None  # and those of the cluster
        self.networks = Networks(self._assign, self._dirty)
        self.selection = Selection(self.networks, self._dirty, wide_from)
        by_id, wide_ids = self.networks.by_id, self.selection.wide_ids
        self._groupings = [Grouping(wide, by_id, wide_ids) for wide in (False, True)]

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
            blocks = self._blocks_all or not holder.cluster
            kind = self._kinds[place] = Kind(holder, node, flags, blocks)
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
            if kind.groups[0] is None:
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
        """Return all groups of both widths but the empty ones."""
        return [group for grouping in self._groupings for group in grouping.groups()]

    def regroup(self) -> Regrouped:
        """Bring the groups up to date."""
        done = Regrouped()
        living = []
        for kind in self._dirty:
            if kind.members:
                living.append((kind, kind.hash()))
                continue
            for grouping in self._groupings:
                grouping.leave(kind, done)
            self._drop(kind)
            done.dead.append(kind)
        self._dirty.clear()
        for grouping in self._groupings:
            grouping.regroup(living, done)
        return done
