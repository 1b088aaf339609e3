"""Identities and policies of shared memory, decoded.

Rule: reads only, and as the kernels do; works while no daemon runs.

Theory. The command line and the agent's answers show what is in force, not what was wanted: this is
the lookup of dataplane/kernels/policy.py over the same arrays, in Python. A verdict word comes
apart into action, answer, log bit and the number of the rule that made it.
"""

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address

import numpy as np

from dataplane.tables.entries import Entries
from dataplane.tables.fib4 import Fib4, lookup4
from dataplane.tables.fib6 import Fib6, lookup6
from dataplane.tables.policies import GROUP_MASK, WIDE_SHIFT
from dataplane.tables.shm import Shm
from xdp.abi import CONST, ENUM, value

ALLOW, DENY = CONST["POLICY_ALLOW"], CONST["POLICY_DENY"]
ACTION, LOG = CONST["POLICY_ACTION_MASK"], CONST["POLICY_LOG"]
ANSWER_SHIFT, RULE_SHIFT = CONST["POLICY_ANSWER_SHIFT"], CONST["POLICY_RULE_SHIFT"]
ANY_PROTOCOL, ANY_DEPTH = CONST["POLICY_ANY_PROTOCOL"], CONST["POLICY_DEPTH_ANY"]
AUDIT = CONST["POLICY_AUDIT"]
DIRECTIONS = ("ingress", "egress")
ANSWERS = {n: name.removeprefix("REFUSAL_").lower() for name, n in ENUM["refusal"].items()}
FLAGS = {
    "host": CONST["PEER_HOST"],
    "remote-node": CONST["PEER_REMOTE_NODE"],
    "pod": CONST["PEER_POD"],
    "keep-source": CONST["PEER_KEEP_SOURCE"],
}
RESERVED = {
    n: "reserved:" + name.removeprefix("IDENTITY_").lower().replace("_", "-")
    for name, n in ENUM["identity"].items()
    if n < value("IDENTITY_CLUSTER_FIRST")
}
_EXACT = 16
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verdict word. rule 0: none."""

    word: int
    found: bool = True  # an entry said it; False: it is what is said of the rest

    @property
    def allowed(self) -> bool:
        """Whether a connection passes; a word of zeros does not."""
        return self.word & ACTION == ALLOW

    @property
    def answer(self) -> str:
        """How a denied packet is answered: drop, icmp, reset."""
        return ANSWERS[self.word >> ANSWER_SHIFT & 3]

    @property
    def log(self) -> bool:
        """Whether the rule asks for a log line."""
        return bool(self.word & LOG)

    @property
    def rule(self) -> int:
        """The number of the rule."""
        return self.word >> RULE_SHIFT


@dataclass(frozen=True, slots=True)
class Peer:
    """A row of `peers`. row 0: nothing is known."""

    row: int
    identity: int
    group: int
    wide: int  # number of its wide group
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A policy entry. group 0: any peer; protocol 255: any; ports first..last.

    selector: number of the name pattern that may be asked for there; 0: it is about connections.
    """

    direction: str
    group: int
    protocol: int
    first: int
    last: int
    verdict: Verdict
    selector: int = 0


def identity_of(shm: Shm, family: int, hi: int, lo: int) -> int:
    """Return the identity of an address, without reading back what a Reader does."""
    if family == 4:
        row = lookup4(shm.ipcache4_wide, shm.ipcache4_deep, lo)
    else:
        row = lookup6(shm.ipcache6, shm.ipcache6_lengths, hi << 64 | lo)
    return int(shm.peers[row]["identity"])


class Reader:
    """Identities and policies of a Shm."""

    def __init__(self, shm: Shm) -> None:
        """Read back the prefixes and where entries stand."""
        self.shm = shm
        self._fib4 = Fib4(
            shm.ipcache4_wide, shm.ipcache4_deep, extents=shm.extents("ipcache4_wide")
        )
        self._fib6 = Fib6(shm.ipcache6, shm.ipcache6_lengths, extents=shm.extents("ipcache6"))
        self._entries = Entries(shm.policy_entries, extents=lambda: shm.extents("policy_entries"))

    # --- identities -------------------------------------------------------------------------------

    def prefixes(self) -> list[tuple[Network, Peer]]:
        """Return every prefix with what it is, in order."""
        found: list[tuple[Network, Peer]] = []
        found += [
            (IPv4Network(at), self.peer(row)) for at, row in sorted(self._fib4.routes.items())
        ]
        found += [
            (IPv6Network(at), self.peer(row)) for at, row in sorted(self._fib6.routes.items())
        ]
        return found

    def peer(self, row: int) -> Peer:
        """Return a row of `peers`."""
        one = self.shm.peers[row]
        flags = tuple(name for name, bit in FLAGS.items() if int(one["flags"]) & bit)
        groups = int(one["groups"])
        identity = int(one["identity"])
        return Peer(row, identity, groups & GROUP_MASK, groups >> WIDE_SHIFT, flags)

    def find(self, address: str) -> tuple[Network | None, Peer]:
        """Return the longest prefix of an address, and what it is."""
        target = ip_address(address)
        fib: Fib4 | Fib6 = self._fib4 if target.version == 4 else self._fib6
        bits = target.max_prefixlen
        for length in range(bits, -1, -1):
            value = int(target) >> (bits - length) << (bits - length)
            row = fib.routes.get((value, length))
            if row is not None:
                network = IPv4Network if target.version == 4 else IPv6Network
                return network((value, length)), self.peer(row)
        return None, self.peer(0)

    def identities(self) -> dict[int, int]:
        """Return the cluster-wide identities that are known without address -> row of peers."""
        table = self.shm.identity_peers
        return {int(n): int(table[n]) for n in np.flatnonzero(table)}

    # --- policies ---------------------------------------------------------------------------------

    def subjects(self) -> dict[int, tuple[int, int]]:
        """Return the ports that are something -> identity and policy row."""
        rows = self.shm.subjects
        used = np.flatnonzero(rows["identity"] | rows["policy"])
        return {int(n): (int(rows[n]["identity"]), int(rows[n]["policy"])) for n in used}

    def otherwise(self, row: int) -> tuple[Verdict, Verdict]:
        """Return what a policy says of the rest, by direction."""
        one = self.shm.policies[row]
        words = (int(one["ingress_otherwise"]), int(one["egress_otherwise"]))
        return Verdict(words[0], False), Verdict(words[1], False)

    def audited(self, row: int) -> bool:
        """Return whether what a policy denies passes."""
        return bool(int(self.shm.policies[row]["flags"]) & AUDIT)

    def entries(self, row: int) -> list[Entry]:
        """Return the entries of a policy row, in order."""
        batch = self._entries.all()
        batch = batch.part(batch.keys >> np.uint64(48) == row)
        columns = (batch.keys.tolist(), batch.matches.tolist(), batch.verdicts.tolist())
        found = [_entry(key, match, word) for key, match, word in zip(*columns, strict=True)]
        return sorted(
            found,
            key=lambda one: (one.direction, one.group, one.protocol, one.first, one.selector),
        )

    def verdict(self, row: int, peer: Peer, direction: int, protocol: int, port: int) -> Verdict:
        """Return what a policy says of a peer, protocol and port (ICMP: type)."""
        chains = dict.fromkeys((peer.group, peer.wide, 0))
        words = [self._chain(row, one, direction, protocol, port) for one in chains]
        for action in (DENY, ALLOW):
            for word in words:
                if word and word & ACTION == action:
                    return Verdict(word)
        return self.otherwise(row)[direction]

    def _chain(self, row: int, group: int, direction: int, protocol: int, port: int) -> int:
        base = row << 48 | group << 16
        turn = direction << 7
        keys = [base | port >> shift << shift for shift in range(_EXACT + 1)]
        matches = [protocol << 8 | turn | depth + 1 for depth in range(_EXACT, -1, -1)]
        keys.append(base)
        matches.append(ANY_PROTOCOL << 8 | turn | 1)
        at = self._entries.find(np.array(keys, np.uint64), np.array(matches, np.uint64))
        hits = at[at >= 0]
        return int(self._entries.at(hits[:1]).verdicts[0]) if len(hits) else 0


def _entry(key: int, match: int, word: int) -> Entry:
    depth = (match & 0x7F) - 1
    first = key & 0xFFFF
    last = first + (1 << (_EXACT - depth)) - 1
    group = key >> 16 & 0xFFFFFFFF
    direction, protocol = DIRECTIONS[match >> 7 & 1], match >> 8 & 0xFF
    return Entry(direction, group, protocol, first, last, Verdict(word), match >> 16)
