"""Events as Hubble's metrics: a slow count in Python says the same, and losses are exact."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.metrics.facts import Owner
from dataplane.metrics.flows import FIELDS, PORTS_KEPT, FlowCollector, _fields, reason_name
from dataplane.policy.rulebook import Rulebook
from dataplane.tables.shm import Shm
from dataplane.tables.verdicts import RULE_SHIFT
from xdp.abi import CONST, DTYPE, REASON_TEXT, value

ROOT = Path(__file__).resolve().parents[2]
NEW, DROP = value("EVENT_NEW"), value("EVENT_DROP")
CHANGE, END = value("EVENT_CHANGE"), value("EVENT_END")
DENIED = value("REASON_POLICY_DENIED")
HERE, THERE = 0x0A000001, 0x0B000001


@pytest.fixture
def shm(tmp_path):
    with Shm.create(tmp_path) as shm:
        for index, name, kind, address in (
            (1, b"pnsk1", "POD", HERE), (2, b"eth0", "UPLINK", 0),
        ):  # fmt: skip
            row = shm.ports[index]
            row["name"], row["kind"], row["address4"] = name, value(f"PORT_{kind}"), address
            row["state"] = value("PORT_ACTIVE")
        shm.node[0]["tunnel_kind"] = value("TUNNEL_VXLAN")
        yield shm


def tell(shm, *events, ring=0):
    head = int(shm.event_rings[ring]["head"])
    for event in events:
        row = np.zeros((), DTYPE["flow_record"])
        row["family"], row["protocol"] = 4, 6
        for name, number in event.items():
            row[name] = number
        shm.flow_records[ring, head % CONST["EVENTS_MAX"]] = row
        head += 1
    shm.event_rings[ring]["head"] = head


def counted(collector):
    collector.take()
    return {
        (one.name.removeprefix("hubble_"), *one.labels.values()): one.value
        for family in collector.collect()
        for one in family.samples
    }


def collector(shm):
    one = FlowCollector(shm)
    one.owners = {"pnsk1": Owner("default", "web")}
    return one


def test_a_connection_out_and_one_in(shm):
    one = collector(shm)
    out = {"kind": NEW, "port": 1, "target_lo": THERE, "tcp": 2, "target_port": 443}
    tell(shm, out, {**out, "egress_rule": 257}, {**out, "flags": CONST["CONNECTION_FLAG_AUDITED"]})
    tell(
        shm, {"kind": NEW, "port": 2, "target_lo": HERE, "protocol": 17, "target_port": 53}, ring=1
    )
    found = counted(one)
    pod = ("default/web", "")
    assert found["flows_processed_total", *pod, "TCP", "Trace", "to-overlay", "FORWARDED"] == 1
    assert found["flows_processed_total", *pod, "TCP", "PolicyVerdict", "", "FORWARDED"] == 1
    assert found["flows_processed_total", *pod, "TCP", "Trace", "to-overlay", "AUDIT"] == 1
    incoming = ("", "default/web", "UDP", "Trace", "to-endpoint", "FORWARDED")
    assert found["flows_processed_total", *incoming] == 1
    assert found["tcp_flags_total", *pod, "IPv4", "SYN"] == 2, "of what is forwarded"
    assert found["port_distribution_total", "TCP", "443"] == 3
    assert found["port_distribution_total", "UDP", "53"] == 1


def test_without_a_tunnel_packets_go_to_the_network(shm):
    shm.node[0]["tunnel_kind"] = value("TUNNEL_NONE")
    one = collector(shm)
    out = {"kind": NEW, "port": 1, "target_lo": THERE}
    tell(shm, out, {**out, "target_identity": value("IDENTITY_HOST")})
    found = counted(one)
    pod = ("default/web", "", "TCP", "Trace")
    assert found["flows_processed_total", *pod, "to-network", "FORWARDED"] == 1
    assert found["flows_processed_total", *pod, "to-stack", "FORWARDED"] == 1


def test_drops_count_packets_and_have_the_names_of_the_proto(shm):
    one = collector(shm)
    drop = {"kind": DROP, "port": 1, "reason": DENIED, "packets": 40, "target_identity": 2}
    tell(shm, drop, {**drop, "packets": 2, "protocol": 1, "target_port": 8 << 8})
    found = counted(one)
    assert found["drop_total", "default/web", "", "TCP", "POLICY_DENIED"] == 40
    assert found["drop_total", "default/web", "", "ICMPv4", "POLICY_DENIED"] == 2
    assert found["flows_to_world_total", "default/web", "", "TCP", "DROPPED"] == 40
    other = {**drop, "reason": value("REASON_MULTICAST"), "tcp": 2}
    tell(shm, other)
    found = counted(one)
    assert found["drop_total", "default/web", "", "TCP", "MULTICAST_HANDLED"] == 40
    assert found["flows_to_world_total", "default/web", "", "TCP", "DROPPED"] == 40, "as Hubble"
    assert not [key for key in found if key[0] == "tcp_flags_total"], "of dropped packets: none"
    assert reason_name(value("REASON_CT_INVALID")) == "CT_TRUNCATED_OR_INVALID_HEADER"
    assert reason_name(value("REASON_POLICY_DENIED_BY_RULE")) == "POLICY_DENY"


def test_a_reply_comes_from_the_other_end(shm):
    one = collector(shm)
    reply = {"kind": CHANGE, "tcp": 18, "flags": CONST["EVENT_REPLY"], "target_identity": 2}
    tell(shm, {**reply, "port": 1, "target_lo": THERE}, {**reply, "port": 2, "target_lo": HERE})
    found = counted(one)
    assert found["tcp_flags_total", "", "default/web", "IPv4", "SYN-ACK"] == 1
    assert found["tcp_flags_total", "default/web", "", "IPv4", "SYN-ACK"] == 1
    arrived = ("", "default/web", "TCP", "Trace", "to-endpoint", "FORWARDED")
    assert found["flows_processed_total", *arrived] == 1


def test_verdicts_of_policies(shm, tmp_path):
    """By direction, by what the rule matches, by what it decides; never about the node's own."""
    book = Rulebook(tmp_path / "rules.db")
    allow = book.number("a", json.dumps({"kind": "x", "direction": "egress", "match": 2}))
    rest = book.number("b", json.dumps({"kind": "x", "direction": "ingress", "policies": []}))
    book.flush()
    one = collector(shm)
    one.verdicts.rules = tmp_path / "rules.db"
    passed, refused = allow << RULE_SHIFT | 1, rest << RULE_SHIFT
    new = {"kind": NEW, "port": 1, "target_lo": THERE, "ingress_rule": 1, "egress_rule": passed}
    drop = {"kind": DROP, "port": 2, "target_lo": HERE, "reason": DENIED, "egress_rule": refused,
            "packets": 3}  # fmt: skip
    audited = {**new, "flags": CONST["CONNECTION_FLAG_AUDITED"], "ingress_rule": refused | 2}
    tell(shm, new, new, drop, audited, {**drop, "reason": value("REASON_MULTICAST")})
    tell(shm, {**drop, "source_identity": value("IDENTITY_HOST")}, {**new, "egress_rule": 1})
    found = counted(one)
    verdicts = {key[1:]: n for key, n in found.items() if key[0] == "policy_verdicts_total"}
    assert verdicts == {
        ("default/web", "", "egress", "l3-l4", "forwarded"): 3,
        ("default/web", "", "ingress", "none", "audit"): 1,
        ("", "default/web", "ingress", "none", "dropped"): 3,
    }
    book.close()


def test_pings_and_their_answers_are_counted_when_both_are_known(shm):
    one = collector(shm)
    echo = {"protocol": 1, "target_port": 8 << 8, "port": 1, "target_lo": THERE}
    tell(shm, {**echo, "kind": NEW}, {**echo, "kind": END, "packets": 5, "reply_packets": 4})
    six = {**echo, "protocol": 58, "target_port": 128 << 8, "family": 6}
    tell(shm, {**six, "kind": END, "packets": 2, "reply_packets": 2})
    found = counted(one)
    assert {key[1:]: n for key, n in found.items() if key[0] == "icmp_total"} == {
        ("IPv4", "EchoRequest"): 5,
        ("IPv4", "EchoReply"): 4,
        ("IPv6", "EchoRequest"): 2,
        ("IPv6", "EchoReply"): 2,
    }


def test_what_is_overrun_is_lost_and_counted(shm):
    one = collector(shm)
    shm.event_rings[0]["head"] = CONST["EVENTS_MAX"] + 1000
    found = counted(one)
    lost = found["lost_events_total", "perf_event_ring_buffer"]
    seen = sum(n for (name, *_), n in found.items() if name == "flows_processed_total")
    assert lost >= 1000
    assert lost + seen == CONST["EVENTS_MAX"] + 1000


def test_ports_are_bounded(shm):
    one = collector(shm)
    tell(shm, *({"kind": NEW, "port": 1, "target_port": port} for port in range(PORTS_KEPT + 50)))
    found = counted(one)
    ports = {key[2]: n for key, n in found.items() if key[0] == "port_distribution_total"}
    assert ports["other"] == 50
    assert len(ports) == PORTS_KEPT + 1


EVENTS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from([NEW, DROP, CHANGE, END]),
        "port": st.sampled_from([1, 2, CONST["PORTS_MAX"]]),
        "protocol": st.sampled_from([1, 6, 17, 99]),
        "target_lo": st.sampled_from([HERE, THERE]),
        "packets": st.integers(0, 5),
        "reason": st.sampled_from([DENIED, 134]),
        "tcp": st.integers(0, 31),
        "flags": st.sampled_from([0, CONST["EVENT_REPLY"]]),
    }
)
NAMES = {1: "ICMPv4", 6: "TCP", 17: "UDP"}


@settings(max_examples=60, deadline=None)
@given(events=st.lists(EVENTS, max_size=60))
def test_it_counts_as_a_slow_one_does(events, tmp_path_factory):
    shm = slow_shm(tmp_path_factory)
    one = collector(shm)
    tell(shm, *events)
    wanted = Counter()
    for event in events:
        ends = [event["port"] == 1, event["target_lo"] == HERE]
        if event["kind"] == CHANGE and event["flags"]:
            ends.reverse()
        arrives = ends[1]
        ends = (("default/web" if ends[0] else ""), ("default/web" if ends == [0, 1] else ""))
        protocol = NAMES.get(event["protocol"], "Unknown")
        if event["kind"] == DROP:
            wanted[(*ends, protocol, "Drop", "", "DROPPED")] += event["packets"]
        else:
            point = "to-endpoint" if arrives else "to-overlay"
            wanted[(*ends, protocol, "Trace", point, "FORWARDED")] += 1
    found = counted(one)
    flows = {key[1:]: n for key, n in found.items() if key[0] == "flows_processed_total"}
    assert +Counter(flows) == +wanted


_made = []


def slow_shm(factory):
    """One for all examples: making one takes long."""
    if not _made:
        shm = Shm.create(factory.mktemp("flows"))
        shm.ports[1]["name"], shm.ports[1]["kind"] = b"pnsk1", value("PORT_POD")
        shm.ports[1]["address4"], shm.ports[1]["state"] = HERE, value("PORT_ACTIVE")
        shm.node[0]["tunnel_kind"] = value("TUNNEL_VXLAN")
        _made.append(shm)
    return _made[0]


def test_reasons_have_the_names_of_flow_proto():
    text = (ROOT / "dataplane" / "observe" / "api" / "flow" / "flow.proto").read_text()
    members = re.search(r"enum DropReason \{(.*?)\n\}", text, re.DOTALL).group(1)
    names = {int(number): name for name, number in re.findall(r"(\w+)\s*=\s*(\d+);", members)}
    ours = {n for n in REASON_TEXT if 130 <= n < 240}  # from 240 on Cilium has no number
    assert {n: reason_name(n) for n in ours} == {n: names[n] for n in ours}


def test_a_key_keeps_every_field():
    assert sum(bits for _, bits in FIELDS) < 63
    assert _fields((1 << 62) - 1)["source"] == (1 << 11) - 1
