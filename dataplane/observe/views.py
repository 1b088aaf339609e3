"""What a flow is called: as which of Hubble's events it is shown, and in which direction.

Rule: one event of the forwarder is one flow, shown once; a question that asks for another of its
sides gets that side.

Theory. Cilium reports a new connection several times: the verdict at the sender, the verdict at the
receiver, the packet's arrival. Here that is one record, and its *views* are these events. The first
view is how it is shown if nobody asks otherwise; with a filter for event types or directions the
first view that fits is shown. So `-t policy-verdict`, `-t drop`, `-t trace` and
`--traffic-direction` find what they find there, and nothing is counted twice. An end that no policy
isolates gives no verdict.
"""

from dataclasses import dataclass

import numpy as np

from dataplane.observe.columns import DROP, NEW, REPLY, Columns
from dataplane.observe.dns import DNS
from dataplane.tables.verdicts import RULE_SHIFT
from xdp.abi import value

TYPE_DROP, TYPE_TRACE, TYPE_VERDICT, TYPE_L7 = 1, 4, 5, 129
"""Cilium's numbers of event types (pkg/monitor/api/types.go)."""
INGRESS, EGRESS = 1, 2  # flow.TrafficDirection
TO_ENDPOINT, TO_STACK, TO_OVERLAY, TO_NETWORK = 0, 3, 4, 11
"""Where a packet goes: the datapath's trace points; the API's TO_ENDPOINT is 101, not 0."""
POLICY_REASONS = (value("REASON_POLICY_DENIED"), value("REASON_POLICY_DENIED_BY_RULE"))
HOST, REMOTE_NODE = value("IDENTITY_HOST"), value("IDENTITY_REMOTE_NODE")
WORLD = (
    value("IDENTITY_WORLD"), value("IDENTITY_WORLD_IPV4"), value("IDENTITY_WORLD_IPV6"),
)  # fmt: skip
CIDR_FIRST = value("IDENTITY_CIDR_FIRST")


@dataclass
class Views:
    """Views of `n` flows. Arrays of n: valid, type, direction; first view first."""

    views: list[tuple[np.ndarray, np.ndarray, np.ndarray]]

    def first(self, fits: list[np.ndarray]) -> np.ndarray:
        """Return for each flow the number of the first view that fits, -1: none. fits: bool[n]s."""
        found = np.full(len(fits[0]), -1, np.int64)
        for number in reversed(range(len(fits))):
            found[fits[number] & self.views[number][0]] = number
        return found


def views_of(flows: Columns, here: np.ndarray) -> Views:
    """Return the views of flows. here: bool[ends + 1], whether a pod is attached to this node."""
    count = flows.count
    from_here, to_here = here[flows.source_end], here[flows.target_end]
    new, drop = flows.kind == NEW, flows.kind == DROP
    asked_out = new & (flows.egress_rule >> RULE_SHIFT != 0)
    asked_in = new & (flows.ingress_rule >> RULE_SHIFT != 0)
    refused = drop & np.isin(flows.reason, POLICY_REASONS)
    leaves = np.where(from_here, EGRESS, np.where(to_here, INGRESS, 0))
    arrives = np.where(to_here, INGRESS, np.where(from_here, EGRESS, 0))
    # A verdict at the sender; or at the receiver alone; or a drop; else where the packet went.
    kind = np.full(count, TYPE_TRACE)
    kind[asked_out | asked_in] = TYPE_VERDICT
    kind[drop] = TYPE_DROP
    way = np.where(drop, leaves, arrives)
    way[asked_in] = INGRESS
    way[asked_out] = EGRESS
    said = flows.kind == DNS
    kind[said], way[said] = TYPE_L7, EGRESS  # answers, too: they are seen where the pod asks
    always = np.ones(count, bool)
    both = np.full(count, INGRESS)
    return Views(
        [
            (always, kind, way),
            (asked_out & asked_in, np.full(count, TYPE_VERDICT), both),
            (refused, np.full(count, TYPE_VERDICT), leaves),
            (asked_out | asked_in, np.full(count, TYPE_TRACE), arrives),
        ]
    )


def points(flows: Columns, here: np.ndarray, direct: bool) -> np.ndarray:
    """Return where packets of flows go: numbers of trace points. here: as views_of.

    direct: other nodes' pods are reached without a tunnel.
    """
    identity = flows.target_identity
    found = np.full(flows.count, TO_NETWORK if direct else TO_OVERLAY)
    found[np.isin(identity, WORLD) | (identity >= CIDR_FIRST)] = TO_NETWORK
    found[identity == REMOTE_NODE] = TO_NETWORK
    found[identity == HOST] = TO_STACK
    found[here[flows.target_end]] = TO_ENDPOINT
    return found


def is_reply(flows: Columns) -> np.ndarray:
    """Return 1: against its connection; 0: along it; -1: not known. int8[n]"""
    found = (flows.flags & REPLY != 0).astype(np.int8)
    found[flows.kind == DROP] = -1
    return found
