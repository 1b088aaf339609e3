"""Verdicts of policies, as `hubble_policy_verdicts_total` counts them.

Rule: a verdict is counted where a policy has a say: a new connection once for each direction that
a rule has judged, a packet that policy drops once.

Theory. What a verdict word's rule is called, which direction it has and how it matches stands in
the book of rules (policy/rulebook.py). It is looked up when the event comes, because a number may
be another rule's later; what was found is remembered until the next scrape. Verdicts about what
the node itself sends are left out, as Hubble does.
"""

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dataplane.policy import rulebook
from dataplane.tables.shm import Shm
from dataplane.tables.verdicts import RULE_SHIFT
from xdp.abi import CONST, value

NEW, DROP = value("EVENT_NEW"), value("EVENT_DROP")
REFUSED = (value("REASON_POLICY_DENIED"), value("REASON_POLICY_DENIED_BY_RULE"))
AUDITED = CONST["CONNECTION_FLAG_AUDITED"]
ACTION, ALLOW = CONST["POLICY_ACTION_MASK"], CONST["POLICY_ALLOW"]
HOST = value("IDENTITY_HOST")
MATCHES = {0: "none", 1: "l3-only", 2: "l3-l4", 3: "l4-only", 4: "all", 5: "l3-proto",
           6: "proto-only"}  # fmt: skip
"""Cilium's numbers and words of policy_match_type (pkg/monitor/api)."""
NONE, ALL = 0, 4
ACTIONS = ("forwarded", "audit", "dropped")
BITS = (11, 11, 24, 2, 1)  # of a key: source, target, rule, action, direction


class VerdictCounter:
    """Counts by (source, destination, direction, match, action)."""

    def __init__(self, shm: Shm) -> None:
        """shm: read only; `rules`, the agent's book, is given later."""
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.rules: Path | None = None
        self._known: dict[int, dict[str, Any]] = {}

    def take(
        self,
        rows: np.ndarray,
        source: np.ndarray,
        target: np.ndarray,
        owner: Callable[[int], str],
    ) -> None:
        """Count records. rows: flow_record[n]; source, target: their pods' ports, int64[n]."""
        judged = rows["source_identity"] != HOST
        new = judged & (rows["kind"] == NEW)
        drop = judged & (rows["kind"] == DROP) & np.isin(rows["reason"], REFUSED)
        once = np.ones(len(rows), np.int64)
        parts = []
        for way, word in enumerate((rows["egress_rule"], rows["ingress_rule"])):
            some = new & (word >> RULE_SHIFT != 0)
            audited = (rows["flags"] & AUDITED != 0) & (word & ACTION != ALLOW)
            parts.append((some, word, audited, way, once))
        parts.append((drop, rows["egress_rule"], np.full(len(rows), 2), 0, rows["packets"]))
        for some, word, action, way, packets in parts:
            if not some.any():
                continue
            columns = (source, target, word >> RULE_SHIFT, action, np.full(len(rows), way))
            keys, shift = np.zeros(int(some.sum()), np.int64), 0
            for column, bits in zip(columns, BITS, strict=True):
                keys |= column[some].astype(np.int64) << shift
                shift += bits
            distinct, inverse = np.unique(keys, return_inverse=True)
            sums = np.bincount(inverse, packets[some], len(distinct))
            for key, count in zip(distinct.tolist(), sums.tolist(), strict=True):
                self._add(key, int(count), owner)

    def _add(self, key: int, count: int, owner: Callable[[int], str]) -> None:
        fields = []
        for bits in BITS:
            fields.append(key & (1 << bits) - 1)
            key >>= bits
        source, target, rule, action, way = fields
        about = self._about(rule)
        direction = ("egress", "ingress")[way]
        if ACTIONS[action] == "dropped":  # the word of either direction
            direction = about.get("direction", direction)
        match = MATCHES.get(about.get("match", NONE if "policies" in about else ALL), "none")
        if not about:
            match = "none"
        self.counts[owner(source), owner(target), direction, match, ACTIONS[action]] += count

    def _about(self, rule: int) -> dict[str, Any]:
        if rule not in self._known and self.rules is not None and rule:
            with contextlib.suppress(sqlite3.Error):
                database = rulebook.read(self.rules)
                if database is not None:
                    with contextlib.closing(database):
                        self._known |= rulebook.attributions(database, [rule])
        return self._known.get(rule, {})

    def forget(self) -> None:
        """Look rules up anew: numbers may have other meanings by and by."""
        self._known.clear()
