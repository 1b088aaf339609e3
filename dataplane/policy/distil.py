"""From subjects and groups to drafts of policy rows, within the limits.

Rule: a turn is complete or refused row by row: pods of a row that does not fit keep their last good
policy, or are closed if that does not fit either.

Theory. A turn begins with pods whose row is to be another. If all pods of a row go to the same new
key, the row is changed in place, so that only what differs is written; else a row is made as a
copy of the one that most of them come from. New selectors are in use before the peers are grouped
again, old ones until everything is written. Then each row's chains are made for the groups that
changed for it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from dataplane.policy.kinds import Group, NamedPort, Numbered, Selected
from dataplane.policy.partition import Partition, Regrouped
from dataplane.policy.parts import Hold, Part, Parts
from dataplane.policy.rows import Chains, Draft, Key, Row
from dataplane.policy.subjects import Subjects, Wanted

Concerned = dict[Row, set[Group]]  # rows -> groups whose chains may be others now
FIX = "write fewer rules or ports, or select peers more alike"


@dataclass
class Turn:
    """Drafts to be written, and what ports shall have then.

    assign: None: no policy concerns the port; closed: ports that nothing passes.
    """

    drafts: dict[Row, Draft] = field(default_factory=dict)
    assign: dict[int, Row | None] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)
    concerned: tuple[Concerned, Concerned] = field(default_factory=lambda: ({}, {}))
    gone: set[Group] = field(default_factory=set)

    def now(self, of_port: dict[int, Row | None]) -> dict[int, Row | None]:
        """Return what each port has after the turn; closed ones are not in it."""
        kept = {port: row for port, row in of_port.items() if port not in self.closed}
        return kept | self.assign


class Distiller:
    """The rows of this node and their drafts."""

    def __init__(
        self, partition: Partition, parts: Parts, subjects: Subjects, entries_max: int
    ) -> None:
        """entries_max: entries of one row."""
        self._partition, self._parts, self._subjects = partition, parts, subjects
        self._entries_max = entries_max
        self._chains = Chains()
        self.rows: dict[Key, Row] = {}
        self.of_port: dict[int, Row | None] = {}  # ports that are not in it are closed
        self.refused: dict[int, str] = {}  # port -> why
        self._named: dict[NamedPort, set[Row]] = {}  # rows that ask for a named port

    # --- drafts -----------------------------------------------------------------------------------

    def begin(self, ports: Iterable[int]) -> Turn:
        """Make drafts for pods whose policy may be another; their selectors are in use then."""
        turn = Turn()
        fresh: dict[Key, tuple[Wanted, set[int]]] = {}
        for port in ports:
            self.refused.pop(port, None)
            if self._subjects.holder(port) is None:
                turn.closed.add(port)
                continue
            wanted = self._subjects.wanted(port)
            row = None if wanted is None else self.rows.get(wanted.key)
            if wanted is None or row is not None:
                turn.assign[port] = row
            else:
                fresh.setdefault(wanted.key, (wanted, set()))[1].add(port)
        kept = set(turn.assign.values())
        for wanted, mine in fresh.values():
            turn.assign.update(dict.fromkeys(mine, self._draft(turn, wanted, mine, kept)))
        return turn

    def _draft(self, turn: Turn, wanted: Wanted, ports: set[int], kept: set[Row | None]) -> Row:
        """Change a row in place, or make one. kept: rows that others want as they are."""
        come_from: dict[Row, int] = {}
        for port in ports:
            if (old := self.of_port.get(port)) is not None:
                come_from[old] = come_from.get(old, 0) + 1
        whole = [row for row in come_from if row.ports <= ports and row not in kept]
        if whole:
            row = max(whole, key=lambda one: one.count)
            draft = Draft(row)
        else:
            base = max(come_from, key=lambda one: come_from[one], default=None)
            row = Row(wanted.key)
            draft = Draft(row, base)
        turn.drafts[row] = draft
        self._change(draft, wanted)
        return row

    def _change(self, draft: Draft, wanted: Wanted) -> None:
        source = draft.base or draft.row
        before = source.key if source.stands else frozenset[Hold]()
        added = [part for hold in wanted.key - before for part in self._parts.of(hold)]
        removed = [part for hold in before - wanted.key for part in self._parts.of(hold)]
        rest = tuple(
            None if units is None else self._parts.rest(direction, units)
            for direction, units in enumerate(wanted.rest)
        )
        if rest[0] is not None:
            added.append(self._parts.host())
        elif source.rest[0] is not None:
            removed.append(self._parts.host())
        draft.change(wanted.key, added, removed, (rest[0], rest[1]), wanted.audit)
        for part in draft.added if draft.base is None else draft.index.parts:
            for selected in part.peers or ():
                selected.rows.add(draft.row)
            for port in part.named:
                self._named.setdefault(port, set()).add(draft.row)

    def _unregister(self, row: Row, parts: Iterable[Part]) -> None:
        """Have groups that change find a row no more by parts that it has not."""
        names: set[NamedPort] = set()
        for part in parts:
            for selected in part.peers or ():
                if not row.index.asks(selected.id):
                    selected.rows.discard(row)
            names |= part.named
        if names:
            names -= {port for part in row.index.parts for port in part.named}
        for port in names:
            self._named[port].discard(row)

    # --- chains -----------------------------------------------------------------------------------

    def distil(self, turn: Turn, regrouped: Regrouped) -> None:
        """Make the chains of everything that changed. Groups have their numbers by now."""
        turn.gone = set(regrouped.gone)
        for group in regrouped.fresh:
            self._concern(turn, (group,), group.selected)
        alike: dict[frozenset[int], list[Group]] = {}
        for group, added, removed in regrouped.changed:
            alike.setdefault(added | removed, []).append(group)
        for selected, groups in alike.items():
            self._concern(turn, groups, selected)
        for group in regrouped.gone:
            for concerned in turn.concerned:
                for row in group.rows:
                    concerned.setdefault(row, set()).add(group)
        for row, draft in turn.drafts.items():
            changed = (*draft.added, *draft.removed)
            for direction, concerned in enumerate(turn.concerned):
                mine = self._groups_of(part for part in changed if part.direction == direction)
                mine |= concerned.get(row, set())
                if draft.base is not None:
                    mine |= concerned.get(draft.base, set())
                self._make(turn, draft, direction, mine)
            if any(part.peers is None for part in changed):
                for direction, made in enumerate(self._chains.of_any(draft.index)):
                    draft.set((direction, None), made)
        for row in turn.concerned[0].keys() | turn.concerned[1].keys():
            if row not in turn.drafts and row.stands:  # else its draft was given up
                turn.drafts[row] = self._follow(turn, row)

    def _follow(self, turn: Turn, row: Row) -> Draft:
        """Make the draft of a row whose parts stay, for the groups of now."""
        draft = Draft(row)
        for direction, concerned in enumerate(turn.concerned):
            self._make(turn, draft, direction, concerned.get(row, ()))
        return draft

    def _concern(self, turn: Turn, groups: Iterable[Group], selected: frozenset[int]) -> None:
        """Note which rows have something to say of groups by these selectors.

        New rows have not: their parts are all new to them, or come from a row that stands.
        """
        for row in self._asking(selected):
            if not row.stands:
                continue
            indexes = [row.index]
            if row in turn.drafts:
                indexes.append(turn.drafts[row].index)
            for direction, concerned in enumerate(turn.concerned):
                if any(index.asks_any(direction, selected) for index in indexes):
                    concerned.setdefault(row, set()).update(groups)

    def _asking(self, selected: Iterable[int]) -> set[Row]:
        """Return the rows that ask for some of these selectors."""
        found: set[Row] = set()
        by_id = self._partition.networks.by_id
        for number in selected:
            one = by_id.get(number)
            if one is None:
                continue
            if isinstance(one.what, Numbered):
                found |= self._named.get(one.what.port, set())
            else:
                found |= one.rows
        return found

    def _groups_of(self, parts: Iterable[Part]) -> set[Group]:
        """Return the groups that parts say something of."""
        found: set[Group] = set()
        numbered = self._partition.selection.numbered
        for part in parts:
            asked: Iterable[Selected] = part.peers or ()
            if part.peers is None:
                asked = [one for port in part.named for one in numbered.get(port, ())]
            for selected in asked:
                found |= selected.groups
        return found

    def _make(self, turn: Turn, draft: Draft, direction: int, groups: Iterable[Group]) -> None:
        index, make, gone = draft.index, self._chains.of_group, turn.gone
        for group in groups:
            made = None if group in gone else make(index, direction, group)
            draft.set((direction, group), made)

    # --- limits -----------------------------------------------------------------------------------

    def fit(self, turn: Turn, room: int) -> None:
        """Give up drafts that are beyond a limit. room: entries that the table may take more."""
        for row, draft in list(turn.drafts.items()):
            if draft.count > self._entries_max:
                limit = f"limit {self._entries_max} (policy.entries_max)"
                self.refuse(turn, row, f"needs {draft.count} table entries, {limit}")
        while (more := sum(draft.growth for draft in turn.drafts.values())) > room:
            row = max(turn.drafts, key=lambda one: turn.drafts[one].growth)
            count = turn.drafts[row].count
            self.refuse(turn, row, f"needs {count} table entries; {room} are left, {more} wanted")

    def refuse(self, turn: Turn, row: Row, why: str) -> None:
        """Give up a draft: its pods keep what they have, or are closed."""
        draft = turn.drafts.pop(row)
        ports = {port for port, wanted in turn.assign.items() if wanted is row}
        for port in ports:
            del turn.assign[port]
        parts = draft.added if row.stands else draft.index.parts
        self._unregister(row, parts)
        if not row.stands:
            turn.closed |= ports - self.of_port.keys()
        elif draft.key != row.key:  # go on as before, with the groups of now
            again = turn.drafts[row] = self._follow(turn, row)
            if again.count > self._entries_max:
                del turn.drafts[row]
                turn.closed |= row.ports
        else:
            turn.closed |= row.ports
        ports |= row.ports & turn.closed
        for port in ports:
            holder = self._subjects.holder(port)
            name = holder.name if holder else f"at port {port}"
            kept = "it is closed" if port in turn.closed else "its last good policy stays"
            self.refused[port] = f"policy of pod {name} {why}: {kept}: {FIX}"

    # --- the end of a turn ------------------------------------------------------------------------

    def joining(self, turn: Turn, after: dict[int, Row | None]) -> set[int]:
        """Return the ports that shall have a row that others have, and that is changed in place."""
        return {
            port
            for port, row in after.items()
            if row in turn.drafts and row.stands and self.of_port.get(port) is not row
        }

    def finish(self, turn: Turn) -> list[Row]:
        """Make a turn that was written true; return the rows that no pod has any more."""
        touched = set()
        for row, draft in turn.drafts.items():
            self._account(row, draft)
            touched.add(row)
        after = turn.now(self.of_port)
        for port in self.of_port.keys() | after.keys():
            old, new = self.of_port.get(port), after.get(port)
            if old is new:
                continue
            if old is not None:
                old.ports.discard(port)
                touched.add(old)
            if new is not None:
                new.ports.add(port)
        self.of_port = after
        emptied = [row for row in touched if not row.ports]
        for row in emptied:
            if self.rows.get(row.key) is row:
                del self.rows[row.key]
            for part in (*row.index.parts, *filter(None, row.rest)):
                self._parts.drop(part)
            gone, row.index = row.index.parts, type(row.index)()
            self._unregister(row, gone)
            for _, group in row.chains:
                if group is not None:
                    group.rows.discard(row)
        return emptied

    def _account(self, row: Row, draft: Draft) -> None:
        """Commit a draft; count who has which part."""
        fresh = draft.index.parts if draft.base is not None else draft.added
        for part in (*fresh, *filter(None, draft.rest)):
            self._parts.keep(part)
        for part in filter(None, row.rest):
            self._parts.drop(part)
        if self.rows.get(row.key) is row:
            del self.rows[row.key]
        draft.commit()
        self.rows[row.key] = row
        if draft.base is None:
            for part in draft.removed:
                self._parts.drop(part)
            self._unregister(row, draft.removed)
