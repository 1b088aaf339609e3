"""From drafts and groups to shared memory.

Rule: at every moment a packet meets the old policy, the new one, or a stricter one.

Theory. The order of a turn: entries (denies, then allows), rows of peers and their groups,
addresses (longer prefixes first, so that an exception is there before its block), what policy rows
say of the rest, subjects; then what nobody points to any more goes: addresses (shorter prefixes
first), entries, rows. Who joins a row that is changed in place comes when its old entries have
gone. Each kind of peer has a row; its group changes in place by one word, so that a group of ten
thousand pods moves with one store. What did not fit is told and tried again in the next turn.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dataplane.policy.chains import ACTION, DENY
from dataplane.policy.distil import Turn
from dataplane.policy.kinds import Kind
from dataplane.policy.names import FIRST
from dataplane.policy.partition import Member, Partition, Regrouped
from dataplane.policy.rows import Draft, Row
from dataplane.policy.rulebook import Rulebook
from dataplane.policy.subjects import Subjects
from dataplane.tables.entries import Batch, Plan
from dataplane.tables.errors import TableFull
from dataplane.tables.policies import CLOSED, OPEN, Numbers, PolicyWriter

if TYPE_CHECKING:
    from dataplane.policy.adopt import Heritage
    from dataplane.policy.chains import Chain

_CODE_PORT = 0xFFFF


@dataclass
class Prepared:
    """A turn that fits: entries that come and go. wanted: also those that stand already."""

    plan: Plan
    wanted: Batch
    gone: list[tuple[int, int]] = field(default_factory=list)  # key, match


class Publisher:
    """Writes turns by a PolicyWriter."""

    def __init__(self, writer: PolicyWriter, partition: Partition, book: Rulebook) -> None:
        """book: where the labels of identities are kept for people."""
        self._writer, self._partition, self._book = writer, partition, book
        self._groups = _group_numbers(set(), writer)
        self._unplaced: dict[Member, str] = {}  # what found no room -> why

    @property
    def room(self) -> int:
        """Entries that the table may take more."""
        return self._writer.entries.most - self._writer.entries.count

    def problems(self) -> list[str]:
        """Return what found no room."""
        whys = sorted(set(self._unplaced.values()))
        count = len(self._unplaced)
        return [f"{count} addresses without their identity: {why}" for why in whys[:1]]

    def number(self, regrouped: Regrouped, heritage: "Heritage | None" = None) -> None:
        """Give new groups their numbers."""
        if heritage is not None:
            self._groups = _group_numbers(heritage.used_groups, self._writer)
        for group in regrouped.fresh:
            known = heritage.groups.get(group) if heritage else None
            group.number = known or self._groups.take()

    # --- entries ----------------------------------------------------------------------------------

    def prepare(self, turn: Turn, heritage: "Heritage | None" = None) -> Prepared:
        """Find a place for everything. Raises TableFull, with the row in `row`; nothing changed."""
        for row in turn.drafts:
            if not row.number:
                known = heritage.policies.get(row) if heritage else None
                try:
                    row.number = known or self._writer.policies.take()
                except TableFull as error:
                    raise NoRow(str(error), row) from error
        keys: list[int] = []
        matches: list[int] = []
        verdicts: list[int] = []
        gone: list[tuple[int, int]] = []
        for row, draft in turn.drafts.items():
            for place, made in draft.changes.items():
                _, group = place
                base = row.number << 48 | (group.number if group else 0) << 16
                before = row.chains.get(place)
                if before is None:
                    if made is not None:
                        keys += [base | code & _CODE_PORT for code in made.codes]
                        matches += [code >> 16 for code in made.codes]
                        verdicts += made.verdicts
                    continue
                stands = dict(zip(before.codes, before.verdicts, strict=True))
                for code, verdict in _items(made):
                    if stands.pop(code, None) != verdict:
                        keys.append(base | code & _CODE_PORT)
                        matches.append(code >> 16)
                        verdicts.append(verdict)
                gone += [(base | code & _CODE_PORT, code >> 16) for code in stands]
        wanted = Batch.of(keys, matches, verdicts)
        return Prepared(self._writer.entries.plan(wanted), wanted, gone)

    def give_up(self, row: Row) -> None:
        """Take the number of a new row back that will not be written."""
        if row.number:
            self._writer.policies.give(row.number)
            row.number = 0

    # --- the turn ---------------------------------------------------------------------------------

    def publish(
        self, turn: Turn, prepared: Prepared, regrouped: Regrouped, heritage: "Heritage | None"
    ) -> bool:
        """Write a turn up to the addresses; return whether something changed."""
        writer = self._writer
        for row, draft in turn.drafts.items():
            writer.widen(row.number, draft.bits())
        writer.entries.write(prepared.plan)
        changed = bool(prepared.plan.steps)
        for row, draft in turn.drafts.items():
            changed |= self._begin_words(row.number, draft)
        changed |= self.publish_peers(regrouped, heritage)
        for row, draft in turn.drafts.items():
            words = draft.bits(), draft.otherwise(), draft.flags
            changed |= writer.set_policy(row.number, *words)
        return changed

    def _begin_words(self, number: int, draft: Draft) -> bool:
        """Write what is said of the rest as far as it may be true before the peers have moved.

        A row that nobody has yet can say it all. In a row that stands, what is allowed stays so
        until the peers have the groups for which the new rules hold; but not where deny rules go
        at the same time, which would leave a gap: then it is stricter for a moment.
        """
        old = self._writer.otherwise(number)
        new = draft.otherwise()
        if not any(old):
            return self._writer.set_policy(number, draft.bits(), new, draft.flags)
        first = tuple(
            new[d] if new[d] & ACTION == DENY and draft.loses_denies(d) else old[d] for d in (0, 1)
        )
        flags = self._writer.flags(number)
        return self._writer.set_policy(number, draft.bits(), (first[0], first[1]), flags)

    def publish_subjects(
        self, after: dict[int, Row | None], subjects: Subjects, ports: Iterable[int]
    ) -> bool:
        """Write what ports are; those that are not in `after` are closed."""
        changed = False
        for port in ports:
            holder = subjects.holder(port)
            row = after.get(port)
            policy = CLOSED if port not in after else OPEN if row is None else row.number
            changed |= self._writer.set_subject(port, holder.number if holder else 0, policy)
        return changed

    def narrow(self, prepared: Prepared) -> bool:
        """Take away what rows that were changed in place have no more."""
        if prepared.gone:
            columns = np.array(prepared.gone, np.uint64)
            self._writer.entries.delete(columns[:, 0].copy(), columns[:, 1].copy())
        return bool(prepared.gone)

    def remove(self, turn: Turn, emptied: Iterable[Row]) -> bool:
        """Take away the rows that nobody has any more."""
        writer = self._writer
        gone: list[tuple[int, int]] = []
        for row in emptied:
            for (_, group), made in row.chains.items():
                base = row.number << 48 | (group.number if group else 0) << 16
                gone += [(base | code & _CODE_PORT, code >> 16) for code in made.codes]
        if gone:
            columns = np.array(gone, np.uint64)
            writer.entries.delete(columns[:, 0].copy(), columns[:, 1].copy())
        for row in emptied:
            if row.number:
                writer.clear_policy(row.number)
        for row in turn.drafts:
            if row.ports:
                writer.set_policy(row.number, row.bits(), row.otherwise, row.flags)
        return bool(gone)

    # --- peers ------------------------------------------------------------------------------------

    def publish_peers(self, regrouped: Regrouped, heritage: "Heritage | None" = None) -> bool:
        """Write kinds, their groups, and which addresses have them; return whether any changed."""
        writer = self._writer
        known = heritage.kinds if heritage else {}
        rows: list[int] = []
        groups: list[tuple[int, int]] = []
        for kind in regrouped.moved:
            if not kind.row and kind in known:
                kind.row = known[kind]
                self._book.identity(kind.number, kind.labels)
            if kind.row:
                rows.append(kind.row)
                groups.append(kind.numbers)
            else:
                self._make_row(kind)
        if rows:
            writer.set_groups(rows, groups)
        moves, self._partition.moves = self._partition.moves, {}
        for member in self._unplaced:
            moves.setdefault(member, self._partition.members.get(member))
        self._unplaced = {}
        changed = bool(regrouped.moved)
        come = [(member, kind) for member, kind in moves.items() if kind is not None]
        for member, kind in sorted(come, key=lambda item: -item[0][2]):
            changed |= self._map(member, kind)
        gone = [member for member, kind in moves.items() if kind is None]
        for member in sorted(gone, key=lambda member: member[2]):
            changed |= self._unmap(member)
        for kind in regrouped.dead:
            if kind.row:
                writer.peers.give(kind.row)
                kind.row = 0
        for group in regrouped.gone:
            self._groups.give(group.number)
        return changed

    def _make_row(self, kind: Kind) -> None:
        try:
            kind.row = self._writer.peers.take()
        except TableFull:
            return  # _map() says so
        self._writer.set_peer(kind.row, kind.number, kind.numbers, kind.flags)
        self._book.identity(kind.number, kind.labels)

    def _map(self, member: Member, kind: Kind) -> bool:
        family, address, length = member
        try:
            if not kind.row:
                self._make_row(kind)
            if not kind.row:
                kind.row = self._writer.peers.take()  # raises again
            if not family:
                return self._writer.map_identity(address, kind.row)
            return self._writer.map(family, address, length, kind.row)
        except TableFull as error:
            self._unplaced[member] = str(error)
            return self._unmap(member)

    def _unmap(self, member: Member) -> bool:
        family, address, length = member
        if not family:
            return self._writer.map_identity(address, 0)
        return self._writer.unmap(family, address, length)


def _group_numbers(used: set[int], writer: PolicyWriter) -> Numbers:
    fix = "restart the agent: so many peers cannot be told apart"
    return Numbers("number for a group of peers", fix, used, range(1, FIRST), writer.clock)


class NoRow(TableFull):
    """No policy row is left for a row."""

    def __init__(self, message: str, row: Row) -> None:
        """row: the one that wanted it."""
        super().__init__(message)
        self.row = row


def _items(made: "Chain | None") -> Iterable[tuple[int, int]]:
    return zip(made.codes, made.verdicts, strict=True) if made is not None else ()
