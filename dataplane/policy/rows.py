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

from dataplane.objects.policies import EGRESS, INGRESS
from dataplane.policy.chains import ACTION, ALLOW, DENY, Chain, chain
from dataplane.policy.kinds import Group, NamedPort
from dataplane.policy.parts import Hold, Part, resolved
from dataplane.tables.policies import Depths
from xdp.abi import CONST

AUDIT, BY_NAMES = CONST["POLICY_AUDIT"], CONST["POLICY_FQDN"]
CHAINS_KEPT = 1 << 16
Place = tuple[int, Group | None]  # direction, group; None: any peer
Key = frozenset[Hold]
Asked = dict[int, tuple[Part, ...]]  # selector -> parts


class Index:
    """Parts by the selectors that they ask for; copied before it is changed."""

    __slots__ = ("by_names", "by_selected", "named", "naming", "parts", "wild")

    def __init__(self) -> None:
        self.parts: set[Part] = set()
        self.by_selected: tuple[Asked, Asked] = ({}, {})  # by direction
        self.wild: set[Part] = set()  # of any peer
        self.named: set[Part] = set()  # of any peer, with named ports: of wide groups that have it
        self.naming = 0  # parts with named ports in all; these are of egress
        self.by_names = 0  # parts whose peers are DNS names

    def copy(self) -> "Index":
        """Return another with the same parts."""
        made = Index()
        made.parts, made.wild, made.named = set(self.parts), set(self.wild), set(self.named)
        made.naming, made.by_names = self.naming, self.by_names
        made.by_selected = dict(self.by_selected[0]), dict(self.by_selected[1])
        return made

    def add(self, part: Part) -> None:
        """Take a part in."""
        self.parts.add(part)
        self.naming += bool(part.named)
        self.by_names += part.by_names
        asked = self.by_selected[part.direction]
        for selected in part.peers or ():
            asked[selected.id] = (*asked.get(selected.id, ()), part)
        if part.peers is None:
            if part.codes:
                self.wild.add(part)
            if part.named:
                self.named.add(part)

    def remove(self, part: Part) -> None:
        """Take a part out."""
        self.parts.discard(part)
        self.naming -= bool(part.named)
        self.by_names -= part.by_names
        asked = self.by_selected[part.direction]
        for selected in part.peers or ():
            left = tuple(one for one in asked[selected.id] if one is not part)
            if left:
                asked[selected.id] = left
            else:
                del asked[selected.id]
        self.wild.discard(part)
        self.named.discard(part)

    def asks(self, selected: int) -> bool:
        """Return whether a part asks for a selector."""
        return selected in self.by_selected[0] or selected in self.by_selected[1]

    def asks_any(self, direction: int, selected: frozenset[int]) -> bool:
        """Return whether a part of a direction may ask for one of some selectors."""
        if direction == EGRESS and self.naming:
            return True
        return not self.by_selected[direction].keys().isdisjoint(selected)

    def fitting(self, direction: int, group: Group) -> list[Part]:
        """Return the parts of a direction that ask for some selector that fits a group."""
        asked, selected = self.by_selected[direction], group.selected
        if len(asked) < len(selected):
            found = [part for number in asked if number in selected for part in asked[number]]
        else:
            found = [part for number in selected if number in asked for part in asked[number]]
        return found if len(found) < 2 else list(dict.fromkeys(found))


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
        self.depths: list[dict[int, int]] = [{} for _ in range(6)]  # as Depths
        self.otherwise = (ALLOW, ALLOW)
        self.flags = 0

    def bits(self) -> Depths:
        """Return the depths in use, as struct policy has them."""
        a, b, c, d, e, f = (sum(1 << bit for bit in used) for used in self.depths)
        return a, b, c, d, e, f


class Chains:
    """Makes chains; those of the same parts are the same."""

    def __init__(self) -> None:
        self._made: dict[Any, Chain | None] = {}

    def of_group(self, index: Index, direction: int, group: Group) -> Chain | None:
        """Return the chain of a group."""
        parts = index.fitting(direction, group)
        if direction == INGRESS or not index.named or not group.wide:
            return self._chain(parts, (), group)
        alone = [part for part in index.named if any(group.numbers(name) for name in part.named)]
        return self._chain(parts, alone, group)

    def of_any(self, index: Index) -> tuple[Chain | None, Chain | None]:
        """Return the chains of any peer, by direction."""
        ingress = [part for part in index.wild if part.direction == INGRESS]
        egress = [part for part in index.wild if part.direction != INGRESS]
        return self._chain(ingress, (), None), self._chain(egress, (), None)

    def _chain(self, parts: list[Part], alone: Iterable[Part], group: Group | None) -> Chain | None:
        """Make one. alone: parts of which only the named ports count here."""
        if not alone and len(parts) < 2:
            if not parts:
                return None
            if not parts[0].named:
                return parts[0].chain
        names: set[NamedPort] = set()
        if group is not None:
            for part in (*parts, *alone):
                names |= part.named
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
        self.key, self.rest = key, rest
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
        self.flags = AUDIT * audit | BY_NAMES * bool(self.index.by_names)

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

    def loses_denies(self, direction: int) -> bool:
        """Return whether deny rules of a direction go, or may: nothing is known of the row."""
        if not self.row.stands:
            return True
        gone = (part for part in self.removed if part.direction == direction)
        return any(part.verdict & ACTION == DENY for part in gone)

    def bits(self) -> Depths:
        """Return depths that are in use before or after."""
        bits = list(self.row.bits())
        for place, made in self.changes.items():
            if made is not None:
                bits[_width(place)] |= made.depths
        a, b, c, d, e, f = bits
        return a, b, c, d, e, f

    def commit(self) -> None:
        """Make it true of the row."""
        row = self.row
        for place, made in self.changes.items():
            group = place[1]
            before = row.chains.pop(place, None)
            if before is not None:
                _count(row.depths[_width(place)], before.depths, -1)
            if made is not None:
                row.chains[place] = made
                _count(row.depths[_width(place)], made.depths, 1)
            if group is None:
                continue
            if (0, group) in row.chains or (1, group) in row.chains:
                group.rows.add(row)
            else:
                group.rows.discard(row)
        row.key, row.index, row.rest, row.flags = self.key, self.index, self.rest, self.flags
        row.count, row.otherwise, row.stands = self.count, self.otherwise(), True


def _width(place: Place) -> int:
    """Return which of Depths a chain counts in."""
    direction, group = place
    return direction + 2 * (2 if group is None else group.wide)


def _count(used: dict[int, int], bits: int, step: int) -> None:
    while bits:
        bit = (bits & -bits).bit_length() - 1
        bits &= bits - 1
        used[bit] = used.get(bit, 0) + step
        if not used[bit]:
            del used[bit]
