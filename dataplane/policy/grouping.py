"""The groups that selectors of one width make of the kinds of peers.

Rule: after regroup(), two of the kinds that it was given are in one group exactly when the same
selectors of this width fit them.

Theory. A group that changes as a whole keeps its number, so a new selector whose members were a
group already costs no address anything; a group that is split leaves its number to those that stay.
Sets of selectors are compared by their hash, of which each width has a half (kinds.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from dataplane.policy.kinds import HASH_BITS, Group, Kind, Named, Numbered, Selected

_HALF = (1 << HASH_BITS) - 1


@dataclass
class Regrouped:
    """What a regrouping did. changed: with selectors added and removed; moved, dead: kinds."""

    fresh: list[Group] = field(default_factory=list)
    changed: list[tuple[Group, frozenset[int], frozenset[int]]] = field(default_factory=list)
    gone: list[Group] = field(default_factory=list)
    moved: dict[Kind, None] = field(default_factory=dict)  # in order
    dead: list[Kind] = field(default_factory=list)


class Grouping:
    """All groups of one width."""

    def __init__(self, wide: bool, by_id: dict[int, Selected], wide_ids: set[int]) -> None:
        """by_id: selectors in use; wide_ids: those that are wide."""
        self._wide, self._by_id, self._wide_ids = wide, by_id, wide_ids
        self._shift = HASH_BITS * wide
        self._empty = Group(frozenset(), 0, {}, wide)
        self._groups: dict[int, Group] = {0: self._empty}

    def groups(self) -> list[Group]:
        """Return all groups but the empty one."""
        return [group for group in self._groups.values() if group is not self._empty]

    def regroup(self, kinds: Iterable[tuple[Kind, int]], done: Regrouped) -> None:
        """Move kinds to where they belong now, given with their hash."""
        leaving: dict[Group | None, dict[int, list[Kind]]] = {}
        for kind, both in kinds:
            mixed, group = both >> self._shift & _HALF, kind.groups[self._wide]
            if group is None or group.hash != mixed:
                leaving.setdefault(group, {}).setdefault(mixed, []).append(kind)
        whole = [group for group, parts in leaving.items() if _is_whole(group, parts)]
        for group in whole:  # their old hashes are free before anyone looks for a new one
            assert group is not None
            del self._groups[group.hash]
        for group in whole:
            ((mixed, some),) = leaving.pop(group).items()
            assert group is not None
            if mixed in self._groups:
                self._move(some, mixed, done)
                self._end(group, done)
            else:
                self._rename(group, mixed, some[0], done)
        for parts in leaving.values():
            for mixed, some in parts.items():
                self._move(some, mixed, done)

    def leave(self, kind: Kind, done: Regrouped) -> None:
        """Take a kind out of its group, which may end by that."""
        group = kind.groups[self._wide]
        if group is None:
            return
        group.kinds.discard(kind)
        kind.groups[self._wide] = None
        if not group.kinds and group is not self._empty and self._groups.get(group.hash) is group:
            del self._groups[group.hash]
            self._end(group, done)

    def _selected(self, kind: Kind) -> frozenset[int]:
        """Return the selectors in use that fit a kind."""
        found = kind.selected()
        return frozenset(found & self._wide_ids if self._wide else found - self._wide_ids)

    def _named(self, kind: Kind) -> Named:
        """Return what numbers the named ports have that rules ask for: wide groups know."""
        found: Named = {}
        for number in kind.ports.selected if self._wide else ():
            what = self._by_id[number].what
            assert isinstance(what, Numbered)
            found.setdefault(what.port, []).append(what.number)
        return {port: sorted(numbers) for port, numbers in found.items()}

    def _end(self, group: Group, done: Regrouped) -> None:
        for number in group.selected:
            if number in self._by_id:
                self._by_id[number].groups.discard(group)
        done.gone.append(group)

    def _rename(self, group: Group, mixed: int, kind: Kind, done: Regrouped) -> None:
        before, after = group.selected, self._selected(kind)
        group.hash, group.selected, group.named = mixed, after, self._named(kind)
        self._groups[mixed] = group
        for number in before - after:
            if number in self._by_id:
                self._by_id[number].groups.discard(group)
        for number in after - before:
            self._by_id[number].groups.add(group)
        done.changed.append((group, after - before, before - after))

    def _move(self, kinds: list[Kind], mixed: int, done: Regrouped) -> None:
        group = self._groups.get(mixed)
        if group is None:
            kind = kinds[0]
            group = Group(self._selected(kind), mixed, self._named(kind), self._wide)
            self._groups[mixed] = group
            for number in group.selected:
                self._by_id[number].groups.add(group)
            done.fresh.append(group)
        for kind in kinds:
            self.leave(kind, done)
            kind.groups[self._wide] = group
            group.kinds.add(kind)
            done.moved[kind] = None


def _is_whole(group: Group | None, parts: dict[int, list[Kind]]) -> bool:
    """Whether all of a group goes the same way, to where some selector still fits."""
    if group is None or not group.selected or len(parts) != 1:
        return False
    ((mixed, kinds),) = parts.items()
    return mixed != 0 and len(kinds) == len(group.kinds)
