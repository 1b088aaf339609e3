"""Identities and policies that are in force, as plain data for people.

Rule: what stands in shared memory decides; the book of rules only gives names to numbers.

Theory. The command line shows these without the agent. A group is shown by the identities of its
peers, because that is what a rule meant; a verdict by the rule that made it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dataplane.objects.policies import ANY_PROTOCOL
from dataplane.policy.explain import NAMES
from dataplane.policy.names import FIRST
from dataplane.policy.rulebook import attributions, labels, read
from dataplane.tables.names_view import NameReader
from dataplane.tables.policies import CLOSED, GROUP_MASK, OPEN, WIDE_SHIFT
from dataplane.tables.shm import Shm
from dataplane.tables.verdicts import RESERVED, RULE_SHIFT, Peer, Reader, Verdict

IDENTITIES_SHOWN = 4  # of a group


class View:
    """What stands, with names. A context of one question: it reads everything once."""

    def __init__(self, shm: Shm, rules_file: Path) -> None:
        """rules_file: the book, which may be missing."""
        self.reader = Reader(shm)
        self._book = read(rules_file)
        self._groups: dict[int, list[int]] | None = None
        self._patterns: dict[int, str] | None = None

    # --- identities -------------------------------------------------------------------------------

    def addresses(self) -> list[dict[str, Any]]:
        """Return every prefix with what it is."""
        prefixes = self.reader.prefixes()
        known = labels(self._book, {peer.identity for _, peer in prefixes})
        return [self._address(str(network), peer, known) for network, peer in prefixes]

    def address(self, address: str) -> dict[str, Any]:
        """Return what an address is. Raises ValueError when it is none."""
        network, peer = self.reader.find(address)
        known = labels(self._book, {peer.identity})
        return self._address(str(network or "none"), peer, known)

    def _address(self, prefix: str, peer: Peer, known: dict[int, Any]) -> dict[str, Any]:
        return {
            "prefix": prefix,
            "identity": peer.identity,
            "labels": _labels(peer.identity, known),
            "group": peer.group,
            "wide_group": peer.wide,
            "flags": list(peer.flags),
            "peer": peer.row,
        }

    def identities(self) -> list[dict[str, Any]]:
        """Return every identity that an address has, or that the cluster allotted."""
        found: dict[int, dict[str, Any]] = {}
        for network, peer in self.reader.prefixes():
            one = found.setdefault(peer.identity, {"prefixes": 0, "example": str(network)})
            one["prefixes"] += 1
            one.setdefault("groups", set()).update(_groups(peer))
        for number, row in self.reader.identities().items():
            one = found.setdefault(number, {"prefixes": 0, "example": ""})
            one.setdefault("groups", set()).update(_groups(self.reader.peer(row)))
        known = labels(self._book, found)
        return [
            {
                "identity": number,
                "labels": _labels(number, known),
                "prefixes": one["prefixes"],
                "example": one["example"],
                "groups": sorted(one["groups"]),
            }
            for number, one in sorted(found.items())
        ]

    # --- policies ---------------------------------------------------------------------------------

    def policy(self, row: int) -> dict[str, Any]:
        """Return a policy row: what it says of the rest, and its entries."""
        entries = self.reader.entries(row)
        rest = self.reader.otherwise(row)
        rules = {one.verdict.rule for one in entries} | {one.rule for one in rest}
        abouts = attributions(self._book, rules)
        groups = {one.group for one in entries}
        return {
            "row": row,
            "state": {CLOSED: "closed", OPEN: "open"}.get(row, "policy"),
            "audit": self.reader.audited(row),
            "otherwise": {
                name: _verdict(verdict, abouts)
                for name, verdict in zip(("ingress", "egress"), rest, strict=True)
            },
            "entries": [
                {
                    "direction": one.direction,
                    "group": one.group,
                    "peers": self._peers(one.group, groups),
                    "protocol": protocol_name(one.protocol),
                    "ports": ports_text(one.protocol, one.first, one.last),
                    "name": self._pattern(one.selector) if one.selector else "",
                    **_verdict(one.verdict, abouts),
                }
                for one in entries
            ],
        }

    def _peers(self, group: int, groups: Iterable[int]) -> str:
        """Say who is in a group."""
        if not group:
            return "any peer"
        if group >= FIRST:
            return f"the name {self._pattern(group - FIRST)}"
        if self._groups is None:
            self._groups = self._members(groups)
        numbers = self._groups.get(group, [])
        known = labels(self._book, numbers[:IDENTITIES_SHOWN])
        shown = [_brief(number, known) for number in numbers[:IDENTITIES_SHOWN]]
        more = len(numbers) - IDENTITIES_SHOWN
        return "; ".join(shown) + (f"; {more} more" if more > 0 else "") or "nobody now"

    def _pattern(self, number: int) -> str:
        if self._patterns is None:
            self._patterns = NameReader(self.reader.shm).patterns()
        return self._patterns.get(number, f"pattern {number}")

    def _members(self, groups: Iterable[int]) -> dict[int, list[int]]:
        """Return the identities of groups."""
        peers = self.reader.shm.peers
        wanted = np.fromiter(groups, np.uint32)
        rows = {peer.row for _, peer in self.reader.prefixes()}
        rows |= set(self.reader.identities().values())
        used = np.fromiter(rows, np.int64, len(rows))
        found: dict[int, set[int]] = {}
        for shift in (0, WIDE_SHIFT):
            numbers = peers["groups"][used] >> np.uint64(shift) & np.uint64(GROUP_MASK)
            which = np.flatnonzero(np.isin(numbers, wanted))
            for group, row in zip(numbers[which].tolist(), used[which].tolist(), strict=True):
                found.setdefault(group, set()).add(int(peers["identity"][row]))
        return {group: sorted(numbers) for group, numbers in found.items()}

    def verdict(self, port: int, address: str, direction: int, protocol: int, number: int) -> Any:
        """Return what is in force for a port of this node and a peer's address."""
        row = self.reader.subjects().get(port, (0, CLOSED))[1]
        peer = self.reader.find(address)[1]
        said = self.reader.verdict(row, peer, direction, protocol, number)
        return _verdict(said, attributions(self._book, [said.rule]))


def rule_names(rules_file: Path, words: Iterable[int]) -> dict[int, str]:
    """Return who made verdict words, as far as that is known."""
    numbers = {word: word >> RULE_SHIFT for word in words}
    abouts = attributions(read(rules_file), numbers.values())
    return {
        word: attribution(abouts[number]) for word, number in numbers.items() if number in abouts
    }


def _groups(peer: Peer) -> set[int]:
    return {peer.group, peer.wide} if peer.wide else {peer.group}


def _labels(number: int, known: dict[int, Any]) -> list[str]:
    if number in RESERVED:
        return [RESERVED[number]]
    found = known.get(number) or {}
    return [f"{key}={one}" if one else key for key, one in sorted(found.items())]


def _brief(number: int, known: dict[int, Any]) -> str:
    """Return an identity in few words."""
    found = _labels(number, known)
    cidr = [one for one in found if one.startswith("cidr:")]
    plain = [one for one in found if "io.cilium" not in one and "io.kubernetes" not in one]
    space = [one.partition("=")[2] for one in found if one.startswith("k8s:io.kubernetes.pod.na")]
    return " ".join([*space, *(cidr or plain)]) or str(number)


def _verdict(verdict: Verdict, abouts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    about = abouts.get(verdict.rule)
    return {
        "action": "allow" if verdict.allowed else "deny",
        "answer": "" if verdict.allowed else verdict.answer,
        "log": verdict.log,
        "rule": verdict.rule,
        "by": attribution(about) if about else "",
    }


def attribution(about: dict[str, Any]) -> str:
    """Return what a rule's number stands for, as people say it."""
    if about.get("policies"):
        names = [_name(one) for one in about["policies"]]
        more = f" and {about['more']} more" if about.get("more") else ""
        return f"{about['kind']}: {', '.join(names)}{more}"
    if about.get("section"):
        return f"{_name(about)} {about['section']}[{about['index']}]"
    return f"{about['kind']}: {about.get('description', '')}"


def _name(about: dict[str, Any]) -> str:
    where = f"{about['namespace']}/" if about.get("namespace") else ""
    spec = f" spec {about['spec']}" if about.get("spec") else ""
    return f"{about['kind']} {where}{about['name']}{spec}"


def protocol_name(number: int) -> str:
    """Return a protocol's name."""
    return "any" if number == ANY_PROTOCOL else NAMES.get(number, str(number))


def ports_text(protocol: int, first: int, last: int) -> str:
    """Return ports as people write them."""
    if protocol == ANY_PROTOCOL or (first, last) == (0, 65535):
        return "any"
    return str(first) if first == last else f"{first}-{last}"
