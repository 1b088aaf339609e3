"""Counters and tables of shared memory as Prometheus metrics.

Rule: names and labels that Cilium has mean what they mean there (Documentation/observability/
metrics.rst); what it has no name for is called penstock_*.

Theory. A collector makes families at each scrape from what workers have counted; nothing is counted
twice and nothing is kept. Direction is INGRESS for what came in on an uplink, EGRESS for what a pod
or the node sent. Counters of a forwarder that was replaced begin again at 0, which rate() knows.
"""

import platform
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dataplane.metrics.facts import Facts
from dataplane.tables import view
from dataplane.tables.connection_view import totals
from dataplane.tables.shm import Shm
from xdp.abi import CONST, value

ALLOW, ACTION = CONST["POLICY_ALLOW"], CONST["POLICY_ACTION_MASK"]
CLUSTER_FIRST, CIDR_FIRST = value("IDENTITY_CLUSTER_FIRST"), value("IDENTITY_CIDR_FIRST")
PORT_POD = value("PORT_POD")
PASSED = (value("REASON_FORWARDED"), value("REASON_AUDITED"))
WORKER_COUNTERS = {
    "packets": "Packets that a worker has taken",
    "steps": "Vectors that it has processed",
    "polls": "Times that it has slept",
    "kicks": "System calls for transmission",
    "kick_errors": "Of these refused, and tried again",
}
TRACK_COUNTERS = {
    "created": "Connections made",
    "expired": "Connections forgotten after their time-out",
    "evicted": "Connections forgotten to make room",
    "refused": "Packets dropped because the table of connections was full",
    "rejudged": "Live connections judged again after a change of policies",
    "cut": "Live connections denied by a change of policies",
    "nat_exhausted": "Packets dropped because their destination had no source port left",
    "fragments_held": "Fragments that waited for their first one",
    "fragments_lost": "Fragments whose first one did not come in time",
}


class DatapathCollector:
    """What the workers have counted, and how full the tables are."""

    def __init__(self, shm: Shm) -> None:
        """shm: the tables; read only."""
        self._shm = shm
        self.facts = Facts()

    def collect(self) -> Iterator[Metric]:
        """Yield the families of one scrape."""
        yield from _reasons(view.counters(self._shm))
        yield from _workers(view.workers(self._shm))
        yield from self._ports()
        yield from self._connections()
        yield from self._forwarder()
        yield from self._tables()
        yield from self._agent()

    def _ports(self) -> Iterator[Metric]:
        labels = ["port", "kind", "namespace", "pod"]
        families = {
            name: CounterMetricFamily(f"penstock_port_{name}", text, labels=labels)
            for name, text in (
                ("receive_packets", "Packets that came in on a device"),
                ("receive_bytes", "And their bytes"),
                ("transmit_packets", "Packets that left through it"),
                ("transmit_bytes", "And their bytes"),
                ("receive_drops", "Packets that came in on it and were dropped, any reason"),
                ("transmit_drops", "Packets for which its transmit ring had no room"),
            )
        }
        for row in view.ports(self._shm):
            owner = self.facts.owner(row["name"])
            values = [row["name"], row["kind"], owner.namespace, owner.pod]
            for name, family in families.items():
                way, what = name.split("_")
                family.add_metric(values, row[f"{way[0]}x_{what}"])
        yield from families.values()

    def _connections(self) -> Iterator[Metric]:
        found = totals(self._shm)
        for name, text in TRACK_COUNTERS.items():
            yield CounterMetricFamily(f"penstock_conntrack_{name}", text, value=found[name])

    def _forwarder(self) -> Iterator[Metric]:
        state = self.facts.forwarder
        yield _gauge("penstock_forwarder_up", "Whether the forwarder answers", state is not None)
        if state is None:
            return
        tracked, table = state["conntrack"], state["flow_table"]
        entries = GaugeMetricFamily(
            "penstock_conntrack_entries", "Connections that live", labels=["state"]
        )
        entries.add_metric(["established"], tracked["established"])
        entries.add_metric(["other"], tracked["connections"] - tracked["established"])
        yield entries
        yield _gauge("penstock_flow_table_entries", "Directions XDP forwards", table["entries"])
        yield _gauge("penstock_flow_table_on", "Whether XDP forwards anything", table["on"])
        yield CounterMetricFamily(
            "penstock_flow_table_packets", "Packets that XDP forwarded", value=table["packets"]
        )
        ready = [port for port in state["ports"] if port["ready"]]
        yield _gauge("penstock_ports", "Devices of the dataplane", len(state["ports"]))
        yield _gauge("penstock_ports_ready", "Devices that work", len(ready))
        frames = state["frames"]
        yield _gauge("penstock_frames", "Packet buffers of all workers", frames)

    def _tables(self) -> Iterator[Metric]:
        used = GaugeMetricFamily("penstock_table_entries", "Entries in use", labels=["table"])
        limit = GaugeMetricFamily("penstock_table_limit", "And how many fit", labels=["table"])
        pressure = GaugeMetricFamily(
            "cilium_bpf_map_pressure", "Entries in use, of those that fit", labels=["map_name"]
        )
        for name, (count, most) in self.pressure().items():
            used.add_metric([name], count)
            limit.add_metric([name], most)
            pressure.add_metric([name], count / max(1, most))
        yield from (used, limit, pressure)

    def pressure(self) -> dict[str, tuple[int, int]]:
        """Return (in use, limit) of every table."""
        found = dict(self.facts.tables)
        for name, index in (("names", "name_index"), ("name_addresses", "learned_index")):
            words = getattr(self._shm, index)
            found[name] = (int(np.count_nonzero(words)), len(words))
        if state := self.facts.forwarder:
            found["connections"] = (state["conntrack"]["connections"], state["conntrack"]["limit"])
            found["flow_table"] = (state["flow_table"]["entries"], state["flow_table"]["slots"])
        return found

    def _agent(self) -> Iterator[Metric]:
        facts, shm = self.facts, self._shm
        version = GaugeMetricFamily(
            "cilium_version",
            "What this is; dashboards list nodes by it",
            labels=["version", "arch"],
        )
        version.add_metric(["penstock", platform.machine()], 1)
        yield version
        yield _gauge("penstock_ready", "Whether the node takes pods", facts.ready)
        yield _gauge("penstock_problems", "What `penstock status` finds wrong", len(facts.problems))
        yield _gauge("cilium_policy", "Network policies loaded", facts.policies)
        yield _gauge("cilium_nodes_all_num", "Nodes of the cluster", facts.nodes)
        pods = np.flatnonzero((shm.ports["kind"] == PORT_POD) & (shm.ports["state"] != 0))
        yield _gauge("cilium_endpoint", "Pods attached to this node", len(facts.owners))
        state = GaugeMetricFamily(
            "cilium_endpoint_state", "Pods by state", labels=["endpoint_state"]
        )
        state.add_metric(["ready"], len(pods))
        state.add_metric(["waiting-for-identity"], max(0, len(facts.owners) - len(pods)))
        yield state
        yield from _enforcement(shm, pods)
        yield _identities(shm)
        taken = GaugeMetricFamily("cilium_ip_addresses", "Addresses of pods", labels=["family"])
        size = GaugeMetricFamily(
            "penstock_pool_addresses", "Addresses of the node's pools", labels=["family", "state"]
        )
        for pool in facts.pools:
            family = f"ipv{pool['family']}"
            taken.add_metric([family], pool["used"])
            for name in ("used", "resting", "free"):
                size.add_metric([family, name], pool[name])
        yield from (taken, size)


def _gauge(name: str, text: str, number: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(number))


def _reasons(rows: Iterable[dict[str, Any]]) -> Iterator[Metric]:
    """Forwards and drops; what was answered or held is neither."""
    told = CounterMetricFamily(
        "penstock_packets", "Packets by what became of them", labels=["reason", "direction"]
    )
    forwards = [
        CounterMetricFamily(f"cilium_forward_{what}", f"Forwarded {text}", labels=["direction"])
        for what, text in (("count", "packets"), ("bytes", "bytes"))
    ]
    drops = [
        CounterMetricFamily(
            f"cilium_drop_{what}", f"Dropped {text}", labels=["reason", "direction"]
        )
        for what, text in (("count", "packets"), ("bytes", "bytes"))
    ]
    passed = {"INGRESS": [0, 0], "EGRESS": [0, 0]}
    for row in rows:
        direction, counts = row["direction"].upper(), (row["packets"], row["bytes"])
        told.add_metric([row["text"], direction], row["packets"])
        if row["reason"] in PASSED:
            for n, count in enumerate(counts):
                passed[direction][n] += count
        elif row["drop"]:
            for family, count in zip(drops, counts, strict=True):
                family.add_metric([row["text"], direction], count)
    for direction, numbers in passed.items():
        for family, count in zip(forwards, numbers, strict=True):
            family.add_metric([direction], count)
    yield from (*forwards, *drops, told)


def _workers(rows: list[dict[str, Any]]) -> Iterator[Metric]:
    for name, text in WORKER_COUNTERS.items():
        family = CounterMetricFamily(f"penstock_worker_{name}", text, labels=["worker"])
        for row in rows:
            family.add_metric([str(row["worker"])], row[name])
        yield family
    free = GaugeMetricFamily("penstock_worker_free_frames", "Buffers at hand", labels=["worker"])
    silent = GaugeMetricFamily(
        "penstock_worker_heartbeat_age_seconds", "Since its last sign of life", labels=["worker"]
    )
    stages = GaugeMetricFamily(
        "penstock_stage_seconds", "Time a packet, by stage, sampled", labels=["worker", "stage"]
    )
    for row in rows:
        number = str(row["worker"])
        free.add_metric([number], row["free_frames"])
        silent.add_metric([number], row["heartbeat_ms"] / 1000)
        for stage, ns in row["stage_ns"].items():
            stages.add_metric([number, stage], ns / 1e9)
    yield from (free, silent, stages)


def _enforcement(shm: Shm, pods: np.ndarray) -> Iterator[Metric]:
    rows = shm.policies[shm.subjects["policy"][pods]]
    closed = [rows[f"{way}_otherwise"] & ACTION != ALLOW for way in ("ingress", "egress")]
    family = GaugeMetricFamily(
        "cilium_policy_endpoint_enforcement_status",
        "Pods by what policies restrict",
        labels=["enforcement"],
    )
    for name, wanted in (
        ("none", (False, False)),
        ("ingress", (True, False)),
        ("egress", (False, True)),
        ("both", (True, True)),
    ):
        fits = (closed[0] == wanted[0]) & (closed[1] == wanted[1])
        family.add_metric([name], int(fits.sum()))
    yield family


def _identities(shm: Shm) -> Metric:
    known = [shm.peers[first:end]["identity"] for first, end in shm.extents("peers")]
    numbers = np.unique(np.concatenate(known)) if known else np.zeros(0, np.uint32)
    numbers = numbers[numbers > 0]
    family = GaugeMetricFamily("cilium_identity", "Identities in use here", labels=["type"])
    family.add_metric(["reserved"], int((numbers < CLUSTER_FIRST).sum()))
    family.add_metric(["node_local"], int((numbers >= CIDR_FIRST).sum()))
    cluster = (numbers >= CLUSTER_FIRST) & (numbers < CIDR_FIRST)
    family.add_metric(["cluster_local"], int(cluster.sum()))
    return family
