"""The one writer of identities and policies: peers, ipcache, subjects, policy rows and entries.

Rule: a reader finds the old or the new, never a hole between them: what is pointed to is complete
before the word that points to it, and rests before it is something else.

Theory. This writer knows rows, numbers and words, not their meaning (dataplane/policy has that).
An address leads to a row of `peers`, the row to a group; (policy row, group) leads to entries. A
change is made in the order: entries (denies, then allows), policy words, groups and addresses,
subjects, removals. Rows that are freed rest REST_S. After a restart everything is read back; a file
`judging` that stands means that a predecessor died in the middle of a change, and the ipcache is
repaired. Row 0 of `policies` is closed and row 1 open; row 0 of `peers` is "not known".
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from dataplane.tables.adjacencies import REST_S
from dataplane.tables.entries import Entries
from dataplane.tables.errors import TableFull
from dataplane.tables.fib4 import Fib4
from dataplane.tables.fib6 import Fib6
from dataplane.tables.flow_generation import FlowGeneration
from dataplane.tables.shm import Shm
from xdp.abi import CONST

CLOSED, OPEN = 0, 1
GROUP_MASK, WIDE_SHIFT = 0xFFFFFFFF, 32  # of struct peer's groups
ALLOW, DENY = CONST["POLICY_ALLOW"], CONST["POLICY_DENY"]
_POLICY_WORDS = (
    "ingress_depths", "egress_depths", "ingress_wide_depths", "egress_wide_depths",
    "ingress_any_depths", "egress_any_depths", "ingress_otherwise", "egress_otherwise", "flags",
)  # fmt: skip

Depths = tuple[int, int, int, int, int, int]  # of groups, of wide groups, of any; by direction
NO_DEPTHS: Depths = (0, 0, 0, 0, 0, 0)


def _word(groups: tuple[int, int]) -> int:
    return groups[0] | groups[1] << WIDE_SHIFT


class Numbers:
    """Numbers of rows: taken, given back, rested."""

    def __init__(
        self, what: str, fix: str, used: Iterable[int], span: range, clock: Callable[[], float]
    ) -> None:
        """used: of the span, those that are in use. what, fix: for the error."""
        self._what, self._fix, self._span, self._clock = what, fix, span, clock
        self.used = set(used)
        self._next = max(self.used, default=span.start - 1) + 1
        self._free = [n for n in range(self._next - 1, span.start - 1, -1) if n not in self.used]
        self._resting: deque[tuple[float, int]] = deque()

    def take(self) -> int:
        """Return a number that nobody uses. Raises TableFull."""
        if self._resting and self._clock() - self._resting[0][0] >= REST_S:
            number = self._resting.popleft()[1]
        elif self._free:
            number = self._free.pop()
        elif self._next < self._span.stop:
            number, self._next = self._next, self._next + 1
        else:
            raise TableFull(
                f"no {self._what} is left: {len(self.used)} in use, {len(self._resting)} resting, "
                f"limit {len(self._span)}: {self._fix}"
            )
        self.used.add(number)
        return number

    def give(self, number: int) -> None:
        """Give a number back."""
        self.used.discard(number)
        self._resting.append((self._clock(), number))


class PolicyWriter:
    """Writer of identities and policies in a writable Shm."""

    def __init__(self, shm: Shm, clock: Callable[[], float] = time.monotonic) -> None:
        """Read back what stands."""
        self.shm, self.clock = shm, clock
        self._flows = FlowGeneration(shm)
        self.entries = Entries(shm.policy_entries, clock, lambda: shm.extents("policy_entries"))
        self.ipcache: dict[int, Fib4 | Fib6] = {
            4: Fib4(shm.ipcache4_wide, shm.ipcache4_deep, clock, shm.extents("ipcache4_wide")),
            6: Fib6(shm.ipcache6, shm.ipcache6_lengths, clock, shm.extents("ipcache6")),
        }
        self._marker = shm.folder / "judging"
        if shm.writable and self._marker.exists():
            ipcache4 = self.ipcache[4]
            assert isinstance(ipcache4, Fib4)
            ipcache4.repair()
        peers = set(self.ipcache[4].routes.values()) | set(self.ipcache[6].routes.values())
        peers |= set(np.unique(shm.identity_peers).tolist())
        self.peers = Numbers(
            "row for a kind of peer",
            "fewer distinct identities and CIDRs in policies",
            peers - {0},
            range(1, CONST["PEERS_MAX"]),
            clock,
        )
        policies = set(np.flatnonzero(shm.policies["ingress_otherwise"]).tolist())
        policies |= set(shm.subjects["policy"].tolist())
        self.policies = Numbers(
            "policy row",
            "fewer pods with policies of their own; rows rest 2 s after a change",
            policies - {CLOSED, OPEN},
            range(2, CONST["POLICIES_MAX"]),
            clock,
        )
        if shm.writable:
            self.set_policy(OPEN, NO_DEPTHS, (ALLOW, ALLOW), 0)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Mark that a change is under way; it stays marked when it fails."""
        self._marker.touch()
        yield
        self._marker.unlink()

    # --- peers ------------------------------------------------------------------------------------

    def set_peer(self, row: int, identity: int, groups: tuple[int, int], flags: int) -> None:
        """Write what addresses of a kind are. groups: numbers of group and wide group."""
        self.shm.peers[row] = (_word(groups), identity, flags)

    def set_groups(self, rows: list[int], groups: list[tuple[int, int]]) -> None:
        """Move kinds of peers to other groups, each by one store; the rest of a row stays."""
        self.shm.peers["groups"][rows] = np.fromiter(map(_word, groups), np.uint64)

    def map(self, family: int, address: int, length: int, row: int) -> bool:
        """Map a prefix to a kind of peer; return whether it was another. Raises TableFull."""
        fib = self.ipcache[family]
        if fib.routes.get((address, length)) == row:
            return False
        try:
            fib.set(address, length, row)
        except TableFull as error:
            raise TableFull(f"identities of addresses: {error}") from error
        return True

    def unmap(self, family: int, address: int, length: int) -> bool:
        """Forget a prefix; return whether it was there."""
        return self.ipcache[family].delete(address, length)

    def map_identity(self, identity: int, row: int) -> bool:
        """Map a cluster-wide identity to a kind of peer, 0: none; return whether it was another."""
        if self.shm.identity_peers.item(identity) == row:
            return False
        self.shm.identity_peers[identity] = row
        return True

    # --- policies and their subjects --------------------------------------------------------------

    def set_policy(self, row: int, depths: Depths, otherwise: tuple[int, int], flags: int) -> bool:
        """Write the words of a policy row; return whether something changed.

        otherwise: verdict words, by direction.
        """
        wanted = (*depths, *otherwise, flags)
        names = _POLICY_WORDS
        place = self.shm.policies[row]
        if tuple(int(place[name]) for name in names) == wanted:
            return False
        for name, word in zip(names, wanted, strict=True):
            place[name] = word
        return True

    def otherwise(self, row: int) -> tuple[int, int]:
        """Return what a policy row says of the rest, by direction."""
        place = self.shm.policies[row]
        return int(place["ingress_otherwise"]), int(place["egress_otherwise"])

    def flags(self, row: int) -> int:
        """Return the flags of a policy row."""
        return int(self.shm.policies[row]["flags"])

    def widen(self, row: int, depths: Depths) -> None:
        """Have readers look for entries of these depths too; what is said of the rest stays."""
        place = self.shm.policies[row]
        for name, bits in zip(_POLICY_WORDS, depths, strict=False):
            place[name] |= bits

    def clear_policy(self, row: int) -> None:
        """Free a policy row that no subject has."""
        self.set_policy(row, NO_DEPTHS, (0, 0), 0)
        self.policies.give(row)

    def subject(self, port: int) -> tuple[int, int]:
        """Return identity and policy row of a port."""
        place = self.shm.subjects[port]
        return int(place["identity"]), int(place["policy"])

    def set_subject(self, port: int, identity: int, policy: int) -> bool:
        """Say what a port is; return whether it was something else."""
        if self.subject(port) == (identity, policy):
            return False
        place = self.shm.subjects[port]
        place["policy"] = policy
        place["identity"] = identity
        return True

    def rejudge(self) -> None:
        """Have live connections judged again."""
        self.shm.control["judgement"] += 1
        self._flows.advance()

    def usage(self) -> dict[str, tuple[int, int]]:
        """Return (in use, limit) of each table."""
        return {
            "policies": (len(self.policies.used), CONST["POLICIES_MAX"] - 2),
            "policy_entries": (self.entries.count, self.entries.most),
            "peers": (len(self.peers.used), CONST["PEERS_MAX"] - 1),
            "ipcache6": (len(self.ipcache[6].routes), CONST["IPCACHE6_SLOTS"] // 2),
        }
