"""Judges recorded flows by policies that are not in force: tables of their own, the same kernels.

Rule: the policy engine writes the tables and judge_both reads them, as on a node; nothing of the
node that runs is touched.

Theory. A trial's tables lie in a scratch folder on tmpfs. Routes are to the pods of this node only,
since that is all that judging asks of them. DNS names lead where they do on the node now,
whatever it was when a flow was recorded. One loop over the columns of the flows; a judgement is
four look-ups and the policies of both ends.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

import numpy as np

from dataplane.engine.worker import make_tables
from dataplane.kernels.house import kernel
from dataplane.kernels.rows import Rows
from dataplane.kernels.verdict import judge_both
from dataplane.objects.collect import Objects
from dataplane.policy.engine import PolicyEngine
from dataplane.policy.options import LocalView, PolicyOptions
from dataplane.policy.view import rule_names
from dataplane.tables.model import Adjacency
from dataplane.tables.names_view import copy_names
from dataplane.tables.policies import PolicyWriter
from dataplane.tables.shm import Shm
from dataplane.tables.writer import TableWriter
from xdp.abi import CONST, value

POD = value("ADJACENCY_POD")
WIDE, NUMBER = np.uint64, np.int64
COLUMNS: Mapping[str, type] = {
    "family": np.uint8, "source_hi": WIDE, "source_lo": WIDE, "target_hi": WIDE,
    "target_lo": WIDE, "protocol": np.uint8, "target_port": np.uint16,
    "source_identity": np.uint32,
}  # fmt: skip
"""What is asked of flows; target_port: as the flow has it, of ICMP type << 8 | code."""


@kernel
def judge_flows(
    t, family, source_hi, source_lo, target_hi, target_lo, protocol, target_port, identity,
    reasons, words, count, tick,
):  # fmt: skip
    """Judge `count` flows. All but t (Tables) and numbers: Rows, of COLUMNS; reasons: uint8[n].

    words: uint32[n]: what denies, or what allows: the sender's policy's before the receiver's.
    """
    for n in range(count):
        kind = np.int64(protocol[n])
        port = np.int64(target_port[n])
        if kind == 1 or kind == 58:
            port = port >> 8
        verdict = judge_both(
            t, np.int64(family[n]), source_hi[n], source_lo[n], target_hi[n], target_lo[n],
            kind, port, np.int64(identity[n]), tick,
        )  # fmt: skip
        reasons[n] = verdict.reason
        word = verdict.word
        if word == 0:
            word = verdict.ingress if verdict.ingress else verdict.egress
        words[n] = word


@dataclass(frozen=True)
class Judged:
    """reasons: enum reason, 0: may pass, uint8[n]; words: verdict words, uint32[n]."""

    reasons: np.ndarray
    words: np.ndarray


class Trial:
    """Policies in tables of their own."""

    def __init__(
        self,
        folder: Path,
        objects: Objects,
        local: LocalView,
        options: PolicyOptions,
        flags: int,
        node: Shm | None = None,
    ) -> None:
        """folder: for the tables; flags: NODE_*, of the node row; node: whose names lead where."""
        self._shm = Shm.create(folder)
        if node is not None:
            copy_names(node, self._shm)  # before the engine, which hashes patterns by their seed
        self._rules = folder / "rules.db"
        writer = TableWriter(self._shm)
        writer.replace_routes(
            {
                ip_network(address): Adjacency(POD, end.port)
                for end in local.endpoints
                for address in end.addresses
            }
        )
        self._shm.node[0]["flags"] = flags
        writer.publish()
        self._engine = PolicyEngine(PolicyWriter(self._shm), options, self._rules)
        self.problems = self._engine.update(objects, local)
        self._tables = make_tables(self._shm)

    def judge(self, columns: Mapping[str, np.ndarray]) -> Judged:
        """Return what these policies say of flows. columns: COLUMNS, all of one length."""
        rows: list[np.ndarray] = [
            np.ascontiguousarray(columns[name], dtype) for name, dtype in COLUMNS.items()
        ]
        count = len(rows[0])
        judged = Judged(np.zeros(count, np.uint8), np.zeros(count, np.uint32))
        if count:
            out = (Rows(judged.reasons), Rows(judged.words))
            tick = time.monotonic_ns() >> CONST["TICK_SHIFT"]
            judge_flows(self._tables, *map(Rows, rows), *out, count, tick)
        return judged

    def names(self, words: np.ndarray) -> dict[int, str]:
        """Return who made verdict words, as people say it."""
        return rule_names(self._rules, np.unique(words).tolist())

    def close(self) -> None:
        """Let go of the tables; the folder is the caller's."""
        del self._tables
        self._engine.close()
        self._shm.close()
