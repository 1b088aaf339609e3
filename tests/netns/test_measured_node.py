"""A node under load: its counters balance to the packet, its profile says where the time goes.

The oracles stand outside: the generator counts what it has sent in the client, the sink what has
arrived in the server, and the harness compares them with the node's own counters.
"""

import json
import shutil
import xml.etree.ElementTree as ET

import pytest

from bench.balance import check, quiet
from bench.drivers import driver
from bench.lab import Lab
from bench.measure import How, measure, prepare
from bench.scenario import Case, Place
from bench.subjects.ours import Penstock
from bench.traffic import Traffic

pytestmark = [pytest.mark.root, pytest.mark.net]
PLACE = Place("same", 4, policy=1, frames=True)
RATE, SECONDS = 20_000, 0.5
FORWARDED = "Forwarded"


@pytest.fixture(scope="module")
def penstock():
    with Lab() as lab:
        subject = Penstock(lab, PLACE)
        prepare(subject)
        yield subject


def balance(subject, work):
    before = quiet(subject.snapshots, subject.has_flow_table)
    done = work()
    (found,) = check(before, quiet(subject.snapshots, subject.has_flow_table))
    return done, found


def case(flows: int, established: bool = True) -> Case:
    return Case("t", PLACE, "most", Traffic(64, flows), established=established)


def test_at_a_rate_that_loses_nothing_three_counts_are_one(penstock):
    """What was sent, what the node says, and what arrived: the same number."""
    with driver("frames").open_session(penstock, case(64), {}) as session:
        trial, found = balance(penstock, lambda: session.trial(RATE, SECONDS))
    assert found.exact, found
    assert trial.sent == trial.arrived
    others = found.received - trial.sent  # ARP, neighbour discovery of the pods' own kernels
    assert 0 <= others < 50, found
    assert found.reasons[FORWARDED] >= trial.sent


@pytest.mark.parametrize("flows", [1, 1024])
def test_at_full_rate_with_the_flow_table_on(penstock, flows):
    """What the node has taken in it has forwarded or dropped for a reason, however it got there."""
    assert penstock.has_flow_table
    how = How(seconds=0.3)
    found, balanced = balance(penstock, lambda: measure(penstock, case(flows), how, {}))
    assert balanced.exact, balanced
    assert balanced.sent >= found.frames[1] > 0


def test_what_policy_drops_is_counted_too(penstock):
    """Ports that no rule allows: every packet has its reason."""
    denied = Case("t", PLACE, "most", Traffic(64, 4), established=False)
    path = type(penstock).path
    penstock.path = lambda: path(penstock).__class__(
        **{**vars(path(penstock)), "target_port": 19_999}
    )
    try:
        with driver("frames").open_session(penstock, denied, {}) as session:
            trial, found = balance(penstock, lambda: session.trial(RATE, SECONDS))
    finally:
        del penstock.path
    assert found.exact, found
    assert trial.arrived == 0
    assert found.reasons["Policy denied"] == trial.sent


def test_a_profile_of_a_busy_node(penstock, tmp_path):
    """Stages, system calls and rings of the window; the flame graph has the kernel's part."""
    graph = tmp_path / "profile.svg"
    words = ["profile", "--seconds", "1.5", "-o", "json", "--flame", str(graph)]
    with driver("frames").open_session(penstock, case(64), {}) as session:
        session._generator.begin(RATE)
        try:
            found = json.loads(penstock.cluster.nodes[0].command(*words))
        finally:
            session._generator.end()
    (row,) = found["workers"]
    assert row["cpu"] <= 1.05
    assert found["flow_table"]["packets"] + row["packets"] > 1000, "some of 30 000, however busy"
    if row["packets"] > 1000:
        assert row["ns_per_packet"] > 0
        assert row["system_calls"]["kicks"] > 0
    assert found["hardware"]["note"] or found["hardware"]["counts"]["cycles"]
    names = {title.text.split(":")[0] for title in ET.parse(graph).iter() if title.text}
    assert "all" in names
    if row["packets"] > RATE / 2:  # else the flow table had them, and the worker no width
        assert "worker 0" in names
    if shutil.which("perf"):
        assert not found["flame"]["note"], found["flame"]
        assert found["flame"]["samples"] > 100
