"""DNS as metrics: from counters of workers, with latency that can be trusted."""

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dataplane.metrics.facts import Owner
from dataplane.metrics.names import NamesCollector
from dataplane.tables.names_view import ENDS
from dataplane.tables.shm import Shm
from xdp.abi import CONST, value

WEB, POD = "default/web", (("source", "default/web"),)


@pytest.fixture
def collector(tmp_path):
    with Shm.create(tmp_path) as shm:
        for lane, queries in ((0, 3), (1, 4)):
            row = shm.dns_pods[lane, 5]
            row["used"], row["queries"], row["refused"] = 8, queries, 1
            row["types"][value("DNS_TYPE_A")] = queries
            row["rcodes"][3] = 2
            row["answers"] = 2
            row["latency"][10], row["latency_ns"] = 2, 2 * ENDS[10]
            server = shm.dns_servers[lane, 0]
            server["used"], server["lo"], server["answers"] = 1, 0x0A000035, 2
            server["latency"][10], server["latency_ns"] = 2, 2 * ENDS[10]
        shm.dns_notes[0]["learned"] = 6
        one = NamesCollector(shm)
        one.pods = {7: Owner("default", "web")}
        yield one


def samples(collector):
    """As Prometheus reads it."""
    registry = CollectorRegistry()
    registry.register(collector)
    return {
        (one.name, *sorted(one.labels.items())): one.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for one in family.samples
    }


def test_lanes_are_added_up(collector):
    found = samples(collector)
    assert found["penstock_dns_refused_total", *POD] == 2
    assert found["penstock_names_total", ("what", "learned")] == 6


def test_latency_is_a_histogram_by_server(collector):
    found = samples(collector)
    buckets = sorted(
        (float(dict(labels)["le"]), n)
        for (name, *labels), n in found.items()
        if name == "penstock_dns_latency_seconds_bucket"
    )
    counts = [n for _, n in buckets]
    assert counts == sorted(counts)
    assert buckets[-1] == (np.inf, 4)
    assert next(end for end, n in buckets if n == 4) >= ENDS[10] / 1e9
    server = ("server", "10.0.0.53")
    assert found["penstock_dns_latency_seconds_count", server] == 4
    assert found["penstock_dns_latency_seconds_sum", server] == pytest.approx(4 * ENDS[10] / 1e9)
    median = (("quantile", "0.50"), ("source", WEB))
    assert found["penstock_dns_pod_latency_seconds", *median] == pytest.approx(ENDS[10] / 1e9)


def test_a_pod_that_has_gone_has_no_series(collector):
    """Several would share one name, and a counter of pods that come and go is none."""
    collector.pods = {}
    assert not [key for key in samples(collector) if key[0] == "penstock_dns_refused_total"]
    assert not [key for key in samples(collector) if ("source", "") in key]
    assert not collector.flows()


def test_messages_are_flows_of_layer_7(collector):
    assert collector.flows() == {
        (WEB, "", "DNS", "L7", "DNS", "FORWARDED"): 7,
        (WEB, "", "DNS", "L7", "DNS", "DROPPED"): 2,
        ("", WEB, "DNS", "L7", "DNS", "FORWARDED"): 4,
    }


def test_servers_and_the_names_that_are_asked_for_most(collector, monkeypatch):
    shm = collector._reader.shm
    shm.dns_servers[0, 0]["queries"], shm.dns_servers[0, 0]["missing"] = 9, 3
    shm.dns_servers[0, 0]["rcodes"][2] = 5
    for row, (queries, refused) in enumerate([(30, 0), (5, 20), (9, 0), (40, 1)]):
        name = shm.names[row]
        text = bytes([1, ord("a") + row, 0])
        name["text"][: len(text)] = list(text)
        name["length"], name["queries"], name["refused"] = len(text), queries, refused
        shm.name_index[row] = row + 1
    found = samples(collector)
    server = ("server", "10.0.0.53")
    assert found["penstock_dns_server_missing_total", server] == 3
    failed = (("rcode", "Server Failure"), server)
    assert found["penstock_dns_server_responses_total", *failed] == 5
    asked = {
        dict(labels)["query"]: n
        for (name, *labels), n in found.items()
        if name == "penstock_dns_name_queries_total"
    }
    assert asked == {"d.": 40, "a.": 30, "b.": 5}, "c. was asked for too seldom"
    monkeypatch.setattr("dataplane.metrics.names.NAMES_SERIES", 1)
    asked = [key for key in samples(collector) if key[0] == "penstock_dns_name_refused_total"]
    assert asked == [("penstock_dns_name_refused_total", ("query", "d."))]


def test_messages_as_hubble_counts_them(collector):
    """Of two lanes; what found no row of its kind is told as other."""
    shm, (query, answer, refused) = (
        collector._reader.shm,
        map(value, ("DNS_EVENT_QUERY", "DNS_EVENT_ANSWER", "DNS_EVENT_REFUSED")),
    )
    other = CONST["DNS_KIND_OTHER"]
    rows = {
        0: [
            (1 | query << 24, 2), (28 | query << 24, 1), (other | query << 24, 7),
            (1 | answer << 24 | 2 << 32 | 1 << 40, 1), (28 | answer << 24 | 1 << 32 | 1 << 48, 1),
        ],
        1: [(1 | query << 24, 1), (1 | 5 << 16 | refused << 24, 1), (1 | 3 << 16 | answer << 24, 4),
            (other | answer << 24, 9)],
    }  # fmt: skip
    for lane, kinds in rows.items():
        for n, (key, count) in enumerate(kinds):
            shm.dns_kinds[lane, 5, n * 3] = key, count
    found = {
        (name.removeprefix("hubble_dns_"), *(word for _, word in labels)): n
        for (name, *labels), n in samples(collector).items()
        if name.startswith("hubble_dns_")
    }
    assert found == {  # destination, number of addresses, type, rcode or type of records, source
        ("queries_total", "", "0", "A", "", WEB): 3,
        ("queries_total", "", "0", "AAAA", "", WEB): 1,
        ("queries_total", "", "0", "other", "", WEB): 7,
        ("queries_total", "", "0", "A", "Policy denied", WEB): 1,
        ("responses_total", WEB, "2", "A", "No Error", ""): 1,
        ("responses_total", WEB, "1", "AAAA", "No Error", ""): 1,
        ("responses_total", WEB, "0", "A", "Non-Existent Domain", ""): 4,
        ("responses_total", WEB, "0", "other", "", ""): 9,
        ("response_types_total", WEB, "A", "", "A"): 2,
        ("response_types_total", WEB, "A", "", "CNAME"): 1,
        ("response_types_total", WEB, "AAAA", "", "AAAA"): 1,
    }
