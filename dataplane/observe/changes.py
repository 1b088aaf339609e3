"""Which flows would change: two judgements of the same flows, by who talks to whom.

Rule: a flow counts once, and only where both judgements are about the pods that had it.

Theory. Flows are grouped by their ends, protocol and port, in numpy; names are looked up for
groups. What was recorded is compared, too: where the policies of now say something else than the
record, these have changed since, and the reader should know.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataplane.observe.columns import DROP, NEW, NOBODY, Columns
from dataplane.observe.directory import Directory
from dataplane.observe.message import address
from dataplane.observe.views import POLICY_REASONS
from dataplane.tables.connection_view import NUMBERS, PROTOCOLS

ICMP = (NUMBERS["icmp"], NUMBERS["icmp6"])
GONE = -2  # no address is that pod's
DENIED, ALLOWED = "denied", "allowed"


def judged_flows(flows: Columns) -> np.ndarray:
    """Return the indexes of flows about which policies were asked: new ones, and those refused."""
    refused = (flows.kind == DROP) & np.isin(flows.reason, POLICY_REASONS)
    return np.flatnonzero((flows.kind == NEW) | refused)


def still_there(flows: Columns, who: Directory, now: Directory) -> np.ndarray:
    """Return which flows have ends that are still who they were: bool[n].

    who: of the flows; now: pods of this node by the addresses that they have now.
    """
    numbers = {(end.namespace, end.name): n for n, end in enumerate(now.ends) if end}
    wanted = np.full(len(who.ends) + 1, NOBODY, np.int32)  # [-1] is NOBODY's
    for number, end in enumerate(who.ends):
        if end is not None and end.here:
            wanted[number] = numbers.get((end.namespace, end.name), GONE)
    good = np.ones(flows.count, bool)
    for side in ("source", "target"):
        hi, lo = (getattr(flows, f"{side}_{half}") for half in ("hi", "lo"))
        good &= now.find(flows.family, hi, lo) == wanted[getattr(flows, f"{side}_end")]
    return good


@dataclass
class Group:
    """Flows of one kind that change."""

    row: dict[str, Any]
    flows: int = 0
    last_ns: int = 0


@dataclass
class Changes:
    """What a trial found."""

    judged: int = 0
    gone: int = 0  # flows whose pods are not there any more, or have other addresses
    otherwise: int = 0  # flows that were recorded with another verdict than they have now
    changed: int = 0
    groups: dict[tuple, Group] = field(default_factory=dict)

    def add(
        self,
        flows: Columns,
        who: Directory,
        before: tuple[np.ndarray, np.ndarray],
        after: tuple[np.ndarray, np.ndarray],
        names: tuple[Callable[[int], str], Callable[[int], str]],
    ) -> None:
        """Add flows. before, after: reasons and verdict words; names: of words before, after."""
        was, will = before[0] == 0, after[0] == 0
        self.judged += flows.count
        self.otherwise += int(((flows.kind == NEW) != was).sum())
        some = np.flatnonzero(was != will)
        self.changed += len(some)
        if not len(some):
            return
        changed = flows.take(some)
        ports = np.where(np.isin(changed.protocol, ICMP), 0, changed.target_port)
        words = np.where(was[some], after[1][some], before[1][some])
        keys = np.stack(
            [changed.source_end, changed.target_end, changed.family, changed.protocol, ports,
             was[some], words,
             *(np.where(changed.arrays[f"{side}_end"] == NOBODY, changed.arrays[f"{side}_{half}"]
                        .view(np.int64), 0)
               for side in ("source", "target") for half in ("hi", "lo"))],
            axis=1,
        )  # fmt: skip
        found, first, which, counts = np.unique(
            keys, axis=0, return_index=True, return_inverse=True, return_counts=True
        )
        last = np.zeros(len(found), np.int64)
        np.maximum.at(last, which.reshape(-1), changed.wall_ns)
        one_each = changed.take(first)
        for row, count, when, key in zip(
            one_each.rows(), counts.tolist(), last.tolist(), found.tolist(), strict=True
        ):
            passed = bool(key[5])
            plain = _plain(row, who, passed, names[1 if passed else 0](key[6]))
            group = self.groups.setdefault(tuple(plain.values()), Group(plain))
            group.flows += count
            group.last_ns = max(group.last_ns, when)

    def rows(self) -> list[dict[str, Any]]:
        """Return the groups, those with most flows first."""
        groups = sorted(self.groups.values(), key=lambda one: -one.flows)
        return [{**one.row, "flows": one.flows, "last_ns": one.last_ns} for one in groups]


def _plain(row: dict[str, int], who: Directory, passed: bool, by: str) -> dict[str, Any]:
    protocol = row["protocol"]
    return {
        "was": ALLOWED if passed else DENIED,
        "becomes": DENIED if passed else ALLOWED,
        "source": _name(row, who, "source"),
        "destination": _name(row, who, "target"),
        "protocol": PROTOCOLS.get(protocol, str(protocol)),
        "port": "" if protocol in ICMP else str(row["target_port"]),
        "by": by,  # what denies it: then, or until now
    }


def _name(row: dict[str, int], who: Directory, side: str) -> str:
    end = who.end(row[f"{side}_end"])
    if end is not None:
        return f"{end.namespace}/{end.name}"
    return address(row["family"], row[f"{side}_hi"], row[f"{side}_lo"])
