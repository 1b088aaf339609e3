"""The DNS proxy's process: what it counts is what pods have sent, and its limits are told."""

from collections import Counter

from dataplane.daemon import dns_proxy
from dataplane.tables import shm


def test_a_limit_is_told_of_once_a_minute_with_its_numbers(monkeypatch):
    said = []
    monkeypatch.setattr(dns_proxy.log, "warning", lambda text, **more: said.append(more))
    counts, told = Counter(crowded=3, connections=9), Counter()
    dns_proxy.warn(counts, told)
    dns_proxy.warn(counts, told)
    counts["crowded"] += 2
    dns_proxy.warn(counts, told)
    assert [one["refused"] for one in said] == [3, 2]
    assert (said[0]["in_all_most"], said[0]["of_a_pod_most"]) == (4096, 256)


def test_kernels_are_compiled_over_tables_of_their_own(tmp_path, monkeypatch):
    dns_proxy._compile(tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    monkeypatch.setattr(shm, "FREE_LEAST", 1 << 62)
    dns_proxy._compile(tmp_path)
    assert list(tmp_path.iterdir()) == [], "no room is no error"
