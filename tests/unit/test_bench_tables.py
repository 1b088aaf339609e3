"""The comparison of tables with DPDK's programs: what both sides get, and how it is shown."""

from random import Random

import pytest

from bench import tables


def test_routes_are_as_many_as_asked_and_of_the_lengths_that_are_named():
    found = tables._routes(10_000, Random(1))
    assert len(found) == 10_000
    assert {length for _, length in found} <= set(tables.LENGTHS)
    assert all(prefix & ((1 << (32 - length)) - 1) == 0 for prefix, length in found)


@pytest.mark.parametrize("count", [10, 1000])
def test_both_sides_get_the_same_rules_and_packets(tmp_path, count):
    made = tables.Rules(count)
    listed, trace = made.files(tmp_path)
    lines = listed.read_text().splitlines()
    policies = [one for one in made.manifests() if one["kind"] == "NetworkPolicy"]
    assert len(lines) == count == sum(len(one["spec"]["ingress"]) for one in policies)
    block = policies[0]["spec"]["ingress"][0]["from"][0]["ipBlock"]["cidr"]
    assert any(line.startswith(f"@{block}\t") for line in lines)
    source, target, _, port, protocol = map(int, trace.read_text().splitlines()[1].split())
    packet = int(made.sources[1]), int(made.targets[1]), int(made.ports[1]), 6
    assert (source, target, port, protocol) == packet
    rule = {(at >> 8, made.pod(pod), port) for at, pod, port in made.rules}
    assert (source >> 8, target, port) in rule, "every second packet is allowed"


def test_a_comparison_says_how_many_times_we_are_ahead_if_there_is_a_peer():
    rows = [tables.Row("a", "1", 10.0, 25.0, "dpdk"), tables.Row("b", "2", 10.0, None, "dpdk", "n")]
    text = tables.table(rows)
    assert "| a | 1 | 10.0 | 25.0 | 2.5 | dpdk |" in text
    assert "| b | 2 | 10.0 | - |  | dpdk, n |" in text
