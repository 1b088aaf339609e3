"""Metrics and the page's data, over tables of our own; promtool and the parser are not ours."""

import asyncio
import json
import re
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dataplane.control.config import ConfigError, load
from dataplane.metrics.facts import Facts, Owner
from dataplane.metrics.server import Sight
from dataplane.tables.shm import Shm
from xdp.abi import value

ROOT = Path(__file__).resolve().parents[2]
FORWARDER = {
    "conntrack": {"connections": 9, "established": 4, "limit": 100},
    "flow_table": {"entries": 3, "slots": 256, "on": True, "packets": 70, "faults": 0},
    "ports": [{"ready": True}, {"ready": False}],
    "frames": 1024,
}
FACTS = Facts(
    node="n1",
    ready=True,
    forwarder=FORWARDER,
    owners={"pnsk1": Owner("default", "web")},
    addresses={"10.0.0.1": "default/web"},
    tables={"policies": (5, 10)},
    pools=({"family": 4, "used": 2, "resting": 1, "free": 3},),
    policies=7,
    nodes=2,
)


@pytest.fixture(scope="module")
def shm(tmp_path_factory):
    with Shm.create(tmp_path_factory.mktemp("metrics")) as shm:
        shm.node["workers"] = 1
        shm.ports[3]["name"], shm.ports[3]["kind"] = b"pnsk1", value("PORT_POD")
        shm.ports[3]["state"] = value("PORT_ACTIVE")
        shm.port_counters[0, 3]["rx_packets"] = 11
        shm.port_counters[0, 3]["tx_drops"] = 2
        for worker in (0, 1):
            shm.reasons[worker, 1, value("REASON_POLICY_DENIED")] = (2, 200)
            shm.reasons[worker, 0, value("REASON_FORWARDED")] = (10, 1000)
        shm.reasons[0, 0, value("REASON_AUDITED")] = (1, 50)
        shm.reasons[0, 1, value("REASON_ANSWERED_ARP")] = (6, 60)
        shm.worker_stats[0]["sampled_packets"] = 100
        shm.worker_stats[0]["stage_ns"][value("STAGE_PARSE")] = 500
        yield shm


async def _answers(shm, facts, *paths):
    async def now():
        return facts

    sight = Sight(shm, now)
    await sight.open("127.0.0.1", _free_port())
    assert sight.problem == ""
    found = []
    async with aiohttp.ClientSession() as session:
        for path in paths:
            port = sight._runner.addresses[0][1]
            async with session.get(f"http://127.0.0.1:{port}{path}") as answer:
                found.append((answer.status, answer.content_type, await answer.text()))
    await sight.close()
    return found


def _free_port():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def samples(shm, facts=FACTS):
    [(status, kind, text)] = asyncio.run(_answers(shm, facts, "/metrics"))
    assert (status, kind) == (200, "text/plain")
    return {
        (one.name, *sorted(one.labels.items())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_names_and_labels_are_those_of_cilium(shm):
    found = samples(shm)
    denied = (("direction", "EGRESS"), ("reason", "Policy denied"))
    assert found["cilium_drop_count_total", *denied] == 4
    assert found["cilium_drop_bytes_total", *denied] == 400
    assert found["cilium_forward_count_total", ("direction", "INGRESS")] == 21  # audited ones pass
    assert found["cilium_forward_bytes_total", ("direction", "INGRESS")] == 2050
    assert found["cilium_forward_count_total", ("direction", "EGRESS")] == 0  # answered is neither
    assert found["cilium_bpf_map_pressure", ("map_name", "policies")] == 0.5
    assert found["cilium_bpf_map_pressure", ("map_name", "connections")] == 0.09
    assert found["cilium_policy",] == 7
    assert found["cilium_endpoint_state", ("endpoint_state", "ready")] == 1
    assert found["cilium_ip_addresses", ("family", "ipv4")] == 2
    # A pod whose policy row is all zeros is closed both ways.
    assert found["cilium_policy_endpoint_enforcement_status", ("enforcement", "both")] == 1


def test_our_own(shm):
    found = samples(shm)
    pod = (("kind", "pod"), ("namespace", "default"), ("pod", "web"), ("port", "pnsk1"))
    assert found["penstock_port_receive_packets_total", *pod] == 11
    assert found["penstock_port_transmit_drops_total", *pod] == 2
    stage = (("stage", "parse"), ("worker", "0"))
    assert found["penstock_stage_seconds", *stage] == pytest.approx(5e-9)
    assert found["penstock_forwarder_up",] == 1
    assert found["penstock_conntrack_entries", ("state", "other")] == 5
    arp = (("direction", "EGRESS"), ("reason", "ARP request answered"))
    assert found["penstock_packets_total", *arp] == 6


def test_a_forwarder_that_is_away_leaves_the_counters(shm):
    found = samples(shm, Facts(node="n1"))
    assert found["penstock_forwarder_up",] == 0
    assert found["cilium_forward_count_total", ("direction", "INGRESS")] == 21
    assert ("penstock_flow_table_on",) not in found


def test_the_page_and_what_it_shows(shm):
    row = shm.flow_records[0, 0]
    row["source_lo"], row["target_lo"] = 0x0A000001, 0x0A000002
    row["family"], row["packets"], row["reason"] = 4, 3, value("REASON_POLICY_DENIED")
    row["kind"] = value("EVENT_DROP")
    shm.event_rings[0]["head"] = 1
    page, view = asyncio.run(_answers(shm, FACTS, "/", "/view.json"))
    assert page[:2] == (200, "text/html")
    assert "http" not in page[2].replace('"http://www.w3.org/2000/svg"', "")  # nothing from afar
    seen = json.loads(view[2])
    assert seen["node"] == "n1"
    assert seen["edges"] == [
        {
            "source": "default/web",
            "target": "10.0.0.2",
            "verdict": "DROPPED",
            "flows": 1,
            "packets": 3,
            "bytes": 0,
        }
    ]
    assert seen["drops"][0]["reason"] == "Policy denied"
    assert seen["tables"][0] == {"table": "policies", "used": 5, "limit": 10, "percent": 50.0}


def test_a_port_that_is_taken_is_a_problem_not_an_end(shm):
    async def twice():
        async def now():
            return FACTS

        port = _free_port()
        first, second = Sight(shm, now), Sight(shm, now)
        await first.open("127.0.0.1", port)
        await second.open("127.0.0.1", port)
        await first.close()
        await second.close()
        return second.problem

    problem = asyncio.run(twice())
    assert "metrics.listen" in problem
    assert "another port" in problem


@pytest.mark.parametrize("text", ["metrics: {listen: everywhere}", "metrics: {port: 70000}"])
def test_configuration_is_checked(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="metrics"):
        load(path)


def test_every_metric_is_documented_and_every_documented_one_exists(shm):
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    documented = set(re.findall(r"`((?:cilium|hubble|penstock)_[a-z_]+)`", "".join(rows)))
    sight = Sight(shm, None)
    sight.datapath.facts = FACTS
    exported = {
        f"{one.name}_total" if one.type == "counter" else one.name
        for collector in (sight.datapath, sight.flows, sight.names)
        for one in collector.collect()
    }
    assert documented == exported
