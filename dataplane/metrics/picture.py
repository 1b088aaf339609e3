"""The node as the web page shows it: who talks to whom, what is dropped and why, what fills up.

Rule: bounded, whatever the node has: EDGES_MOST pairs, the busiest; the page says that more exist.

Theory. The connections that were active last, and the drops of late, are added up by pair of names:
a pod's own name, a node, a service's address, or the address where nothing is known. This is what
`penstock flows` shows, seen from further away.
"""

from collections import Counter
from typing import Any

from dataplane.metrics.facts import Facts
from dataplane.policy.view import rule_names
from dataplane.tables import view
from dataplane.tables.shm import Shm

FLOWS_MOST = 2000  # connections that are looked at
EDGES_MOST = 60
DROPS_MOST = 30


def picture(
    shm: Shm, facts: Facts, tables: dict[str, tuple[int, int]], names: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return plain data. tables: (in use, limit) by name; names: as NamesCollector.top."""
    flows = view.flows(shm, FLOWS_MOST)
    edges = _edges(flows, facts)
    fullness = [
        {
            "table": name,
            "used": used,
            "limit": limit,
            "percent": round(100 * used / max(1, limit), 1),
        }
        for name, (used, limit) in tables.items()
    ]
    return {
        "node": facts.node,
        "ready": facts.ready,
        "problems": list(facts.problems),
        "pods": sorted(str(owner) for owner in facts.owners.values()),
        "reasons": view.counters(shm),
        "edges": edges[:EDGES_MOST],
        "edges_more": max(0, len(edges) - EDGES_MOST),
        "drops": _drops(flows, facts),
        "tables": sorted(fullness, key=lambda row: -row["percent"]),
        "workers": view.workers(shm),
        "dns": names,
    }


def _name(address: str, facts: Facts) -> str:
    return facts.addresses.get(address, address)


def _edges(flows: list[dict[str, Any]], facts: Facts) -> list[dict[str, Any]]:
    """Pairs that talk or try to, the busiest first."""
    found: dict[tuple[str, str, str], Counter] = {}
    for flow in flows:
        pair = (
            _name(flow["source"], facts), _name(flow["destination"], facts), flow["verdict"]
        )  # fmt: skip
        total = found.setdefault(pair, Counter())
        total["flows"] += 1
        total["packets"] += flow["packets"]
        total["bytes"] += flow["bytes"]
    rows = [
        {"source": source, "target": target, "verdict": verdict, **total}
        for (source, target, verdict), total in found.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def _drops(flows: list[dict[str, Any]], facts: Facts) -> list[dict[str, Any]]:
    dropped = [flow for flow in flows if flow["verdict"] == "DROPPED"][:DROPS_MOST]
    rules = rule_names(facts.rules, {flow["refusal"] for flow in dropped}) if facts.rules else {}
    return [
        {
            "source": _name(flow["source"], facts),
            "target": _name(flow["destination"], facts),
            "port": flow["destination_port"],
            "protocol": flow["protocol"],
            "reason": flow["reason"],
            "policy": rules.get(flow["refusal"], ""),
            "packets": flow["packets"],
            "age_s": round(flow["age_ms"] / 1000, 1),
        }
        for flow in dropped
    ]
