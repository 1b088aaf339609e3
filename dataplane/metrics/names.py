"""DNS as Prometheus metrics.

Rule: series grow with pods and servers, never with names: a pod may ask for any number of these.

Theory. Workers count by pod and by server (dataplane/tables/names_view.py), so a scrape only adds
lanes up. Queries and answers have Hubble's names, with the contexts that flows have: a query's
source is the pod, an answer's destination. Latency, which Hubble does not have, is a histogram by
server, one bucket an octave, and a few quantiles by pod. Names themselves are what `penstock dns
top` and the page show.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from dataplane.metrics.facts import Owner
from dataplane.tables.names_view import ENDS, NameReader
from dataplane.tables.shm import Shm

NAMES_MOST = 20  # that the page shows
OCTAVE = 4  # buckets of latency
BY_POD = {
    "retries": "Queries sent again while one waited",
    "missing": "Queries without an answer",
    "refused": "Queries that no rule allows, answered by the dataplane",
    "unasked": "Answers that fit no query: dropped from learning",
    "malformed": "Messages that are no DNS",
    "truncated": "Answers that were too long for UDP",
}


class NamesCollector:
    """DNS of this node's pods."""

    def __init__(self, shm: Shm) -> None:
        """shm: the tables; read only."""
        self._reader = NameReader(shm)
        self.pods: Mapping[int, Owner] = {}  # by the number of their endpoint

    def collect(self) -> Iterator[Metric]:
        """Yield the families of one scrape."""
        pods = {str(self._owner(n)): one for n, one in self._reader.pods().items()}
        yield from _hubble(pods)
        for name, text in BY_POD.items():
            family = CounterMetricFamily(f"penstock_dns_{name}", text, labels=["source"])
            for pod, one in pods.items():
                family.add_metric([pod], one[name])
            yield family
        yield _by_server(self._reader.servers())
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
        notes = CounterMetricFamily(
            "penstock_names", "What names taught, and what found no room", labels=["what"]
        )
        for name, count in self._reader.notes().items():
            notes.add_metric([name], count)
        yield notes

    def _owner(self, endpoint: int) -> Owner:
        return self.pods.get(endpoint, Owner())

    def top(self) -> list[dict[str, Any]]:
        """Return the names that were asked for most."""
        rows = sorted(self._reader.names(), key=lambda row: -row["queries"])[:NAMES_MOST]
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


def _hubble(pods: Mapping[str, dict[str, Any]]) -> Iterator[Metric]:
    queries = CounterMetricFamily(
        "hubble_dns_queries", "DNS queries", labels=["source", "destination", "qtypes"]
    )
    answers = CounterMetricFamily(
        "hubble_dns_responses", "DNS answers", labels=["source", "destination", "rcode"]
    )
    for pod, one in pods.items():
        for name, count in one["types"].items():
            queries.add_metric([pod, "", name], count)
        for name, count in one["rcodes"].items():
            answers.add_metric(["", pod, name], count)
    yield from (queries, answers)


def _by_server(servers: list[dict[str, Any]]) -> Metric:
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
