"""What an engine takes over from the one before it: numbers that keep their meaning.

Rule: a number is taken over only where everything that points to it now shall point to it then.

Theory. After a restart the tables are full of numbers of groups, kinds and policy rows that the new
engine did not give. It works out everything anew and then asks which of the old numbers it may go
on using: an old group whose addresses all belong to one new group, an old policy row whose ports
all have one new row. What is left of the difference is written in the usual order, so where nothing
changed meanwhile nothing is written, and where something did no packet meets a mixture.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from dataplane.policy.distil import Turn
from dataplane.policy.kinds import Group, Kind
from dataplane.policy.names import FIRST
from dataplane.policy.partition import Member, Partition
from dataplane.policy.rows import Row
from dataplane.tables.entries import Batch
from dataplane.tables.policies import CLOSED, GROUP_MASK, OPEN, WIDE_SHIFT, PolicyWriter

T = TypeVar("T", bound=Hashable)
M = TypeVar("M", bound=Hashable)


@dataclass
class Heritage:
    """Numbers to go on with."""

    used_groups: set[int] = field(default_factory=set)
    groups: dict[Group, int] = field(default_factory=dict)
    kinds: dict[Kind, int] = field(default_factory=dict)
    policies: dict[Row, int] = field(default_factory=dict)


def heirs(old: Mapping[M, int], new: Mapping[M, T]) -> dict[T, int]:
    """Return who may go on with an old number: whoever has all of its members.

    Of several numbers the one with the most members is taken.
    """
    owners: dict[int, T | None] = {}
    sizes: dict[int, int] = {}
    for member, number in old.items():
        owner = new.get(member)
        sizes[number] = sizes.get(number, 0) + 1
        if owners.setdefault(number, owner) != owner:
            owners[number] = None
    found: dict[T, int] = {}
    for number, owner in owners.items():
        if owner is not None and sizes[number] > sizes.get(found.get(owner, 0), 0):
            found[owner] = number
    return found


def standing(writer: PolicyWriter) -> dict[Member, int]:
    """Return which row of `peers` each prefix and identity has."""
    found: dict[Member, int] = {}
    for family, fib in writer.ipcache.items():
        for (address, length), row in fib.routes.items():
            found[family, address, length] = row
    for number in np.flatnonzero(writer.shm.identity_peers).tolist():
        found[0, number, 0] = int(writer.shm.identity_peers[number])
    return found


def peers(writer: PolicyWriter, partition: Partition) -> Heritage:
    """Find the groups and kinds that go on."""
    rows = standing(writer)
    table = writer.shm.peers
    members = partition.members
    heritage = Heritage()
    kinds = heirs(rows, members)
    heritage.kinds = {
        kind: row
        for kind, row in kinds.items()
        if (int(table["identity"][row]), int(table["flags"][row])) == (kind.number, kind.flags)
    }
    numbers = {member: int(table["groups"][row]) for member, row in rows.items()}
    used: set[int] = set()
    for wide, shift in enumerate((0, WIDE_SHIFT)):
        old = {member: word >> shift & GROUP_MASK for member, word in numbers.items()}
        now = {member: group for member, kind in members.items() if (group := kind.groups[wide])}
        found = heirs({member: number for member, number in old.items() if number}, now)
        heritage.groups |= {group: number for group, number in found.items() if group.selected}
        used.update(old.values())
    keys = writer.entries.all().keys
    asked = np.unique((keys >> np.uint64(16)) & np.uint64(0xFFFFFFFF))
    asked = asked[asked < FIRST]  # names have their numbers from elsewhere
    heritage.used_groups = {*asked.tolist(), *used} - {0}
    return heritage


def policies(heritage: Heritage, writer: PolicyWriter, turn: Turn) -> None:
    """Find the policy rows that go on."""
    subjects = writer.shm.subjects["policy"]
    old = {int(port): int(subjects[port]) for port in np.flatnonzero(subjects > OPEN)}
    new = {port: row for port, row in turn.assign.items() if row is not None}
    heritage.policies = heirs(old, new)


def tidy(
    writer: PolicyWriter, partition: Partition, wanted: Batch, rows: set[int], ports: set[int]
) -> bool:
    """Take away what stands and is nobody's; return whether there was something.

    wanted: all entries; rows: policy rows in use; ports: those that are something.
    """
    changed = False
    subjects = writer.shm.subjects
    for port in np.flatnonzero(subjects["policy"] | subjects["identity"]).tolist():
        if port not in ports:
            changed |= writer.set_subject(port, 0, CLOSED)
    strays = [member for member in standing(writer) if member not in partition.members]
    for family, address, length in sorted(strays, key=lambda member: member[2]):
        changed = True
        if family:
            writer.unmap(family, address, length)
        else:
            writer.map_identity(address, 0)
    changed |= bool(writer.entries.keep(wanted))
    for row in writer.policies.used - rows:
        writer.clear_policy(row)
    mine = {kind.row for kind in partition.members.values()}
    for row in writer.peers.used - mine:
        writer.peers.give(row)
    return changed
