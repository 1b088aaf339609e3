"""Distilled policies: which parts a row of the policy table has, and its chain for each group.

Rule: a Row says what stands in the tables; a Draft says what shall stand, and becomes true with
commit() after it was written.

Theory. Pods with the same set of selecting rules share a row. A change makes a draft, which costs
what changes: the parts added or removed lead to the groups that their selectors fit, and only the
chains of these are made again. A row whose pods part ways is copied chain by chain, not compiled. A
chain is made of parts, so it is cached by them, across rows.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from dataplane.objects.policies import INGRESS
from dataplane.policy.chains import ALLOW, Chain, chain
from dataplane.policy.kinds import Group, NamedPort
from dataplane.policy.parts import Hold, Part, resolved
from xdp.abi import CONST

AUDIT = CONST["POLICY_AUDIT"]
CHAINS_KEPT = 1 << 18
Place = tuple[int, Group | None]  # direction, group; None: any peer
Key = frozenset[Hold]


class Index:
    """Parts by the selectors that they ask for; copied before it is changed."""

    __slots__ = ("by_selected", "named", "parts", "wild")

    def __init__(self) -> None:
        self.parts: set[Part] = set()
        self.by_selected: dict[int, tuple[Part, ...]] = {}
        self.wild: set[Part] = set()  # of any peer
        self.named: set[Part] = set()  # of any peer, with named ports: of groups that have these

    def copy(self) -> "Index":
        """Return another with the same parts."""
        made = Index()
        made.parts, made.by_selected = set(self.parts), dict(self.by_selected)
        made.wild, made.named = set(self.wild), set(self.named)
        return made

    def add(self, part: Part) -> None:
        """Take a part in."""
        self.parts.add(part)
        for selected in part.peers or ():
            self.by_selected[selected.id] = (*self.by_selected.get(selected.id, ()), part)
        if part.peers is None:
            if part.codes:
                self.wild.add(part)
            if part.named:
                self.named.add(part)

    def remove(self, part: Part) -> None:
        """Take a part out."""
        self.parts.discard(part)
        for selected in part.peers or ():
            left = tuple(one for one in self.by_selected[selected.id] if one is not part)
            if left:
                self.by_selected[selected.id] = left
            else:
                del self.by_selected[selected.id]
        self.wild.discard(part)
        self.named.discard(part)

    def fitting(self, group: Group) -> set[Part]:
        """Return the parts that ask for some selector that fits a group."""
        mine = self.by_selected
        found: set[Part] = set()
        if len(mine) < len(group.selected):
            for number, parts in mine.items():
                if number in group.selected:
                    found.update(parts)
        else:
            for number in group.selected:
                if number in mine:
                    found.update(mine[number])
        return found


class Row:
    """A row of the policy table, as it stands, if it does. number 0: it has none yet."""

    __slots__ = (
        "chains", "count", "depths", "flags", "index", "key", "number", "otherwise", "ports",
        "rest", "stands",
    )  # fmt: skip

    def __init__(self, key: Key) -> None:
        self.key = key
        self.number, self.stands = 0, False
        self.ports: set[int] = set()
        self.index = Index()
        self.rest: tuple[Part | None, Part | None] = (None, None)  # by direction
        self.chains: dict[Place, Chain] = {}
        self.count = 0
        self.depths = ({}, {})  # type: tuple[dict[int, int], dict[int, int]]
        self.otherwise = (ALLOW, ALLOW)
        self.flags = 0

    def bits(self) -> tuple[int, int]:
        """Return the depths in use, as struct policy has them."""
        ingress, egress = (sum(1 << bit for bit in used) for used in self.depths)
        return ingress, egress


class Chains:
    """Makes chains; those of the same parts are the same."""

    def __init__(self) -> None:
        self._made: dict[Any, Chain | None] = {}

    def of_group(self, index: Index, group: Group) -> tuple[Chain | None, Chain | None]:
        """Return the chains of a group, by direction."""
        by_direction: tuple[list[Part], list[Part]] = ([], [])
        for part in index.fitting(group):
            by_direction[part.direction].append(part)
        alone = [part for part in index.named if any(group.numbers(name) for name in part.named)]
        ingress = self._chain(by_direction[0], (), group)
        return ingress, self._chain(by_direction[1], alone, group)

    def of_any(self, index: Index) -> tuple[Chain | None, Chain | None]:
        """Return the chains of any peer, by direction."""
        ingress = [part for part in index.wild if part.direction == INGRESS]
        egress = [part for part in index.wild if part.direction != INGRESS]
        return self._chain(ingress, (), None), self._chain(egress, (), None)

    def _chain(self, parts: list[Part], alone: Iterable[Part], group: Group | None) -> Chain | None:
        """Make one. alone: parts of which only the named ports count here."""
        names: set[NamedPort] = set()
        if group is not None:
            for part in (*parts, *alone):
                names |= part.named
        if not names and len(parts) == 1:
            return parts[0].chain
        if not parts and not names:
            return None
        numbers = {name: group.numbers(name) for name in names} if group else {}
        ids = tuple(sorted(part.id for part in parts))
        if numbers:
            said = tuple(sorted((name, tuple(some)) for name, some in numbers.items()))
            key: Any = ids, tuple(sorted(part.id for part in alone)), said
        else:
            key = ids
        if key in self._made:
            return self._made[key]
        said_by: list[tuple[Sequence[int], int]] = []
        for part in parts:
            said_by.append(((*part.codes, *resolved(part, numbers)), part.verdict))
        said_by += [(resolved(part, numbers), part.verdict) for part in alone]
        if len(self._made) >= CHAINS_KEPT:
            self._made.clear()
        made = self._made[key] = chain(said_by)
        return made


class Draft:
    """A row as it shall be."""

    def __init__(self, row: Row, base: Row | None = None) -> None:
        """base: what a new row begins as a copy of."""
        self.row, self.base = row, base
        source = base or row
        self.key = row.key
        self.index, self.rest, self.flags = source.index, source.rest, source.flags
        self.changes: dict[Place, Chain | None] = dict(base.chains) if base is not None else {}
        self.added: list[Part] = []
        self.removed: list[Part] = []
        self.count = source.count

    def change(
        self,
        key: Key,
        added: Iterable[Part],
        removed: Iterable[Part],
        rest: tuple[Part | None, Part | None],
        audit: bool,
    ) -> None:
        """Give it another key, and the parts that come with it."""
        self.key, self.rest, self.flags = key, rest, AUDIT if audit else 0
        source = self.base or self.row
        fresh, gone = set(added), set(removed)
        self.added = [part for part in fresh - gone if part not in source.index.parts]
        self.removed = [part for part in gone - fresh if part in source.index.parts]
        if self.added or self.removed:
            self.index = source.index.copy()
            for part in self.removed:
                self.index.remove(part)
            for part in self.added:
                self.index.add(part)

    def set(self, place: Place, made: Chain | None) -> None:
        """Say what a chain shall be."""
        before = self._now(place)
        if made is before:
            return
        self.count += (len(made) if made else 0) - (len(before) if before else 0)
        self.changes[place] = made

    def _now(self, place: Place) -> Chain | None:
        if place in self.changes:
            return self.changes[place]
        return self.row.chains.get(place)

    @property
    def growth(self) -> int:
        """Entries more than stand now."""
        return self.count - self.row.count

    def otherwise(self) -> tuple[int, int]:
        """Return the verdict words of what no rule fits."""
        ingress, egress = (ALLOW if part is None else part.verdict for part in self.rest)
        return ingress, egress

    def bits(self) -> tuple[int, int]:
        """Return depths that are in use before or after."""
        bits = list(self.row.bits())
        for (direction, _), made in self.changes.items():
            if made is not None:
                bits[direction] |= made.depths
        return bits[0], bits[1]

    def commit(self) -> None:
        """Make it true of the row."""
        row = self.row
        for place, made in self.changes.items():
            direction, group = place
            before = row.chains.pop(place, None)
            if before is not None:
                _count(row.depths[direction], before.depths, -1)
            if made is not None:
                row.chains[place] = made
                _count(row.depths[direction], made.depths, 1)
            if group is None:
                continue
            if (0, group) in row.chains or (1, group) in row.chains:
                group.rows.add(row)
            else:
                group.rows.discard(row)
        row.key, row.index, row.rest, row.flags = self.key, self.index, self.rest, self.flags
        row.count, row.otherwise, row.stands = self.count, self.otherwise(), True


def _count(used: dict[int, int], bits: int, step: int) -> None:
    while bits:
        bit = (bits & -bits).bit_length() - 1
        bits &= bits - 1
        used[bit] = used.get(bit, 0) + step
        if not used[bit]:
            del used[bit]
