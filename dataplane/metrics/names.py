"""DNS as Prometheus metrics.

Rule: series grow with pods and servers, not with names: a pod may ask for any number of these.

Theory. Workers count by pod and by server (dataplane/tables/names_view.py), so a scrape only adds
lanes up; Hubble's metrics are made of the same in messages.py. Latency, which Hubble does not have,
is a histogram by server, one bucket an octave, and a few quantiles by pod. Of names, the
NAMES_SERIES that are asked for most have series, once they were asked for QUERIES_LEAST times:
names that a pod makes up are asked for once.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from dataplane.metrics.facts import Owner
from dataplane.metrics.messages import RCODES, families
from dataplane.tables.names_view import ENDS, NameReader
from dataplane.tables.shm import Shm

T = TypeVar("T")
NAMES_MOST = 20  # that the page shows
NAMES_SERIES, QUERIES_LEAST = 50, 10
OCTAVE = 4  # buckets of latency
BY_POD = {
    "retries": "Queries sent again while one waited",
    "missing": "Queries without an answer",
    "refused": "Queries that no rule allows, answered by the dataplane",
    "unasked": "Answers that fit no query: dropped from learning",
    "malformed": "Messages that are no DNS",
    "truncated": "Answers that were too long for UDP",
}
BY_SERVER = {
    "queries": "Queries that went to a server",
    "retries": "Of these sent again while one waited",
    "missing": "Queries that a server has left without an answer",
}
BY_NAME = {
    "queries": "Queries for a name that went to a server",
    "refused": "Queries for it that no rule allows",
    "failures": "Answers that were errors",
    "missing": "Queries without an answer",
}


class NamesCollector:
    """DNS of this node's pods."""

    def __init__(self, shm: Shm) -> None:
        """shm: the tables; read only."""
        self._reader = NameReader(shm)
        self.pods: Mapping[int, Owner] = {}  # by the number of their endpoint

    def collect(self) -> Iterator[Metric]:
        """Yield the families of one scrape."""
        pods = self._pods()
        for name, text in BY_POD.items():
            family = CounterMetricFamily(f"penstock_dns_{name}", text, labels=["source"])
            for pod, one in pods.items():
                family.add_metric([pod], one[name])
            yield family
        servers = self._reader.servers()
        yield from _by_server(servers)
        yield _latency(servers)
        summary = SummaryMetricFamily(
            "penstock_dns_pod_latency_seconds", "Until the answer", labels=["source"]
        )
        for pod, one in pods.items():
            for part in ("p50", "p99"):
                summary.add_sample(
                    summary.name,
                    {"source": pod, "quantile": f"0.{part[1:]}"},
                    one[f"{part}_ms"] / 1e3,
                )
        yield summary
        yield from self._by_name()
        yield from families(self._named(self._reader.kinds()))
        notes = CounterMetricFamily(
            "penstock_names", "What names taught, and what found no room", labels=["what"]
        )
        for name, count in self._reader.notes().items():
            notes.add_metric([name], count)
        yield notes

    def _pods(self) -> dict[str, dict[str, Any]]:
        found = self._reader.pods()
        if 0 in found and not found[0]["queries"] + found[0]["refused"]:
            del found[0]
        return self._named(found)

    def _named(self, found: Mapping[int, T]) -> dict[str, T]:
        """Return the counts of pods by name; pods that have gone have no series.

        Number 0 has those for whom there was no row.
        """
        named = {str(self.pods[n]): one for n, one in found.items() if n in self.pods}
        if 0 in found:
            named["other"] = found[0]
        return named

    def flows(self) -> dict[tuple[str, ...], int]:
        """Return DNS as flows of layer 7: hubble_flows_processed's labels and counts."""
        counts: Counter[tuple[str, ...]] = Counter()
        kind = ("DNS", "L7", "DNS")
        for pod, one in self._pods().items():
            counts[pod, "", *kind, "FORWARDED"] += one["queries"]
            counts[pod, "", *kind, "DROPPED"] += one["refused"]
            counts["", pod, *kind, "FORWARDED"] += one["answers"]
        return {key: count for key, count in counts.items() if count}

    def _by_name(self) -> Iterator[Metric]:
        rows = self._reader.names(NAMES_SERIES, QUERIES_LEAST)
        for name, text in BY_NAME.items():
            family = CounterMetricFamily(f"penstock_dns_name_{name}", text, labels=["query"])
            for row in rows:
                family.add_metric([row["name"]], row[name])
            yield family

    def top(self) -> list[dict[str, Any]]:
        """Return the names that were asked for most."""
        rows = self._reader.names(NAMES_MOST)
        return [
            {
                "name": row["name"],
                "queries": row["queries"] + row["refused"],
                "refused": row["refused"],
                "errors": row["failures"],
                "unanswered": row["missing"],
                "mean_ms": round(row["latency_ms"], 2),
            }
            for row in rows
        ]


def _by_server(servers: list[dict[str, Any]]) -> Iterator[Metric]:
    for name, text in BY_SERVER.items():
        family = CounterMetricFamily(f"penstock_dns_server_{name}", text, labels=["server"])
        for one in servers:
            family.add_metric([one["server"] or "other"], one[name])
        yield family
    family = CounterMetricFamily(
        "penstock_dns_server_responses", "Answers of a server", labels=["server", "rcode"]
    )
    for one in servers:
        for name, count in one["rcodes"].items():
            family.add_metric([one["server"] or "other", RCODES.get(name, name)], count)
    yield family


def _latency(servers: list[dict[str, Any]]) -> Metric:
    family = HistogramMetricFamily(
        "penstock_dns_latency_seconds", "From query to answer", labels=["server"]
    )
    for one in servers:
        buckets, passed = [], 0
        for n, count in enumerate(one["buckets"]):
            passed += count
            if n % OCTAVE == OCTAVE - 1:
                buckets.append((f"{ENDS[n] / 1e9:g}", passed))
        buckets.append(("+Inf", passed))
        total = one["latency_ms"] / 1e3 * one["answers"]
        family.add_metric([one["server"] or "other"], buckets, total)
    return family
