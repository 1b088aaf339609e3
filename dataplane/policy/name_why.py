"""`penstock fqdn why NAME`: what this node knows of a DNS name, and what stands in a pod's way.

Rule: shared memory decides, as it does for packets; what is said is what a person can act on.

Theory. A connection by name needs four things in turn: the pod may ask for the name (rules.dns), a
server answers, the answer's addresses are known and not stale, a rule toFQDNs allows the port. Each
is looked at, and the first that is missing is the reason. What comes after the name (services, the
other side's policy, the way there) is looked at in reach.py. Works without the agent.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataplane.objects.names import pattern, regexp
from dataplane.policy.names import FIRST
from dataplane.policy.view import View, ports_text, protocol_name
from dataplane.tables.names_view import NameReader
from dataplane.tables.shm import Shm
from dataplane.tables.verdicts import Entry
from xdp.abi import CONST

NAMES_ONLY = CONST["POLICY_NAMES_ONLY"]
NAMES = CONST["POLICY_NAMES"]


@dataclass(frozen=True)
class Reason:
    """Why not, in a word (refused, unanswered, stale, policy, backend, mtu, ...) and in a line."""

    code: str
    text: str


def why(shm: Shm, rules_file: Path, name: str, port: int | None = None) -> dict[str, Any]:
    """Return what is known of a name; port: index of a pod's port, to be told what it may do.

    `events` are the pod's, all that the rings hold; `reasons` are Reasons, the first one first.
    """
    reader, view = NameReader(shm), View(shm, rules_file)
    spelled = name.lower().rstrip(".") + "."
    fits = {
        number: text
        for number, text in reader.patterns().items()
        if re.fullmatch(regexp(pattern(text)), spelled)
    }
    addresses = [
        {
            "address": str(one.address),
            "expires_s": round(one.expires_s),
            "kept": one.kept,
            "identity": one.scope,
        }
        for one in reader.mappings()
        if one.name == spelled
    ]
    events = [one for one in reader.events()[0] if one["name"] == spelled]
    if port is not None:
        events = [one for one in events if one["port"] == port]
    found: dict[str, Any] = {
        "name": spelled,
        "patterns": sorted(fits.values()),
        "addresses": addresses,
        "counted": reader.name(spelled) or {},
        "events": events,
    }
    reasons = _of_node(found)
    if port is not None:
        found["pod"] = _of_pod(view, fits, port)
        reasons = _refusals(found["pod"], spelled[:-1]) + reasons
    found["reasons"] = reasons
    return found


def _of_node(found: dict[str, Any]) -> list[Reason]:
    """Say why the name leads nowhere on this node."""
    if found["addresses"]:
        return []
    counted, last = found["counted"], (found["events"] or [None])[-1]
    if not counted.get("queries"):
        text = "no pod of this node has asked for it lately: nothing is known of where it leads"
        return [Reason("unasked", text)]
    if last is not None and last["kind"] == "missing":
        text = f"{last['server']} does not answer: look at that server and the way to it"
        return [Reason("unanswered", text)]
    if last is not None and last["kind"] == "answer" and last["rcode"] != "NOERROR":
        return [Reason("answer", f"{last['server']} says {last['rcode']}")]
    if not counted["answers"]:
        return [Reason("unanswered", "no server has answered a query for it")]
    if last is not None and last["kind"] == "answer" and not last["address_count"]:
        text = f"{last['server']} knows the name, but no address of type {last['type']}"
        return [Reason("answer", text)]
    return [
        Reason(
            "stale",
            "its addresses are stale (TTL and dns.grace_s are over, no connection uses them), or "
            "were asked for by pods without rules.dns, which teach nothing: ask again",
        )
    ]


def _of_pod(view: View, fits: dict[int, str], port: int) -> dict[str, Any]:
    """Return what the policy of a pod says of a name of these patterns."""
    identity, row = view.reader.subjects().get(port, (0, 0))
    entries = [one for one in view.reader.entries(row) if one.direction == "egress"]
    said = view.policy(row)
    return {
        "port": port,
        "identity": identity,
        "isolated": said["otherwise"]["egress"]["action"] == "deny",
        "otherwise": said["otherwise"]["egress"]["by"],
        "restricted": any(one.verdict.word & NAMES_ONLY for one in entries if not one.selector),
        "taught": any(one.verdict.word & NAMES for one in entries if not one.selector),
        "may_ask": any(one.selector in fits for one in entries if one.selector),
        "ports": sorted({_ports(one) for one in entries if one.group - FIRST in fits}),
    }


def _ports(one: Entry) -> str:
    return f"{ports_text(one.protocol, one.first, one.last)}/{protocol_name(one.protocol)}"


def _refusals(pod: dict[str, Any], name: str) -> list[Reason]:
    """Say why a pod's policy stands in the way before any server is asked."""
    if not pod["isolated"]:
        return []
    if pod["restricted"] and not pod["may_ask"]:
        text = f"the pod may not ask for {name}: no rules.dns of its policies fits: add it there"
        return [Reason("refused", text)]
    if pod["ports"] and not pod["taught"]:
        return [
            Reason(
                "untaught",
                "no rule of the pod lets it ask a server with rules.dns, so its answers teach "
                "nothing: add toPorts with rules.dns to the rule for kube-dns",
            )
        ]
    return []
