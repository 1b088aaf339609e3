"""DNS messages as Hubble's flows of layer 7, read by a client of the public field numbers."""

import time

import grpc
import numpy as np
import pytest
from click.testing import CliRunner

from dataplane.cli.main import main
from dataplane.observe import dns, expressions
from dataplane.observe.filters import fqdn_pattern, node_pattern
from tests.hubble import Node, filters
from xdp.abi import CONST, value

WEB, SERVER = 0x0A010002, 0x0A010102
RULE = 5 << CONST["POLICY_RULE_SHIFT"] | CONST["POLICY_ALLOW"]
QUERY, ANSWER, REFUSED, MISSING = (
    value(f"DNS_EVENT_{kind}") for kind in ("QUERY", "ANSWER", "REFUSED", "MISSING")
)


def tell(node, *rows: dict, lane: int = 0) -> None:
    """Write events as a worker does, and let them be read."""
    for given in rows:
        number = int(node.shm.dns_notes["events"][lane])
        row = node.shm.dns_events[lane, number % CONST["DNS_EVENTS_MAX"]]
        more = dict(given)
        name = b"".join(bytes([len(part)]) + part.encode() for part in more.pop("name").split("."))
        row["text"][: len(name) + 1] = np.frombuffer(name + b"\0", np.uint8)
        fields = {"length": len(name) + 1, "family": 4, "client_lo": WEB, "client_port": 40000,
                  "server_lo": SERVER, "server_port": 53, "type": 1, "identity": 70001,
                  "verdict": RULE, "time_ns": time.monotonic_ns(), **more}  # fmt: skip
        for field, number_ in fields.items():
            row[field] = number_
        row["sequence"] = number + 1
        node.shm.dns_notes["events"][lane] = number + 1
    node.source.turn()


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    made = Node(tmp_path_factory.mktemp("run"))
    made.tell({"kind": value("EVENT_NEW"), "source_lo": WEB, "target_lo": SERVER, "protocol": 17})
    tell(
        made,
        {"kind": QUERY, "name": "a.example"},
        {"kind": ANSWER, "name": "a.example", "address_count": 2, "ttl": 30, "latency_ns": 5000,
         "lo": [0xC0000201, 0xC0000202, 0, 0]},
        {"kind": REFUSED, "name": "b.example", "rcode": 5, "type": 28},
        {"kind": ANSWER, "name": "c.example", "rcode": 3, "address_count": 0},
        {"kind": MISSING, "name": "d.example"},
    )  # fmt: skip
    yield made
    made.close()


def test_messages_as_the_protocol_has_them(node):
    _, query, answer, refused, failed = node.flows()
    assert (query.Type, query.event_type.type, query.verdict) == (2, 129, 1)
    assert (query.l7.type, query.l7.dns.query, list(query.l7.dns.qtypes)) == (
        1,
        "a.example.",
        ["A"],
    )
    assert query.l7.dns.observation_source == "proxy"
    assert (query.source.pod_name, query.destination.pod_name) == ("web", "db")
    assert (query.l4.UDP.source_port, query.l4.UDP.destination_port) == (40000, 53)
    assert query.traffic_direction == answer.traffic_direction == 2
    assert query.Summary == "DNS Query a.example. A"
    assert answer.is_reply.value
    assert (answer.l7.type, answer.l7.latency_ns, answer.l7.dns.ttl) == (2, 5000, 30)
    assert list(answer.l7.dns.ips) == ["192.0.2.1", "192.0.2.2"]
    assert list(answer.l7.dns.rrtypes) == ["A"]
    assert (answer.source.pod_name, answer.destination.pod_name) == ("db", "web")
    assert answer.Summary == 'DNS Answer "192.0.2.1,192.0.2.2" TTL: 30 (Proxy a.example. A)'
    assert (refused.verdict, refused.l7.type, refused.l7.dns.rcode) == (2, 1, 5)
    assert list(refused.l7.dns.qtypes) == ["AAAA"]
    assert [one.name for one in refused.egress_denied_by] == ["closed"]
    for flow in (query, answer, refused, failed):  # no other flow came with them
        assert abs(flow.time.seconds - time.time()) < 100
    assert failed.Summary == "DNS Answer RCode: Non-Existent Domain TTL: 0 (Proxy c.example. A)"


@pytest.mark.parametrize(
    ("members", "numbers"),
    [
        ({"protocol": ["dns"]}, [1, 2, 3, 4]),
        ({"protocol": ["udp"]}, [0, 1, 2, 3, 4]),
        ({"protocol": ["tcp"]}, []),
        ({"verdict": [2]}, [3]),
        ({"dns_query": ["^a"]}, [1, 2]),
        ({"dns_query": ["b", r"c\."]}, [3, 4]),
        ({"dns_query": [r"(([a-z]+)+)+\.$"]}, [1, 2, 3, 4]),
        ({"source_pod": ["shop/web"]}, [0, 1, 3]),
    ],
)
def test_filters(node, members, numbers):
    everything = [flow.uuid for flow in node.flows()]
    found = [everything.index(flow.uuid) for flow in node.flows(whitelist=filters(**members))]
    assert found == numbers


def test_the_command_line_says_it_in_hubbles_words(node, tmp_path):
    server = f"unix:{node.shm.folder.parent / 'hubble.sock'}"
    words = ["observe", "--server", server, "--type", "l7", "--protocol", "dns", "--last", "2",
             "--print-policy-names"]  # fmt: skip
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    first, second = done.output.splitlines()
    assert "-> shop/db:53" in first
    assert "dns-request proxy DROPPED (DNS Query b.example. AAAA; REFUSED)" in first
    assert "EGRESS DENIED BY NetworkPolicy shop/closed" in first
    assert "<- shop/db:53" in second
    assert "dns-response proxy FORWARDED (DNS Answer RCode: Non-Existent Domain" in second


def test_what_was_overwritten_is_counted_and_what_is_kept_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(dns, "KEPT", 4)
    node = Node(tmp_path)
    size = CONST["DNS_EVENTS_MAX"]
    row = {"kind": QUERY, "name": "a.example"}
    tell(node, *[row] * 3)
    node.shm.dns_notes["events"][0] += size + 7  # written without being read, and all torn
    node.source.turn()
    assert node.source.messages.lost == size + 7
    assert node.source.lost == size + 7
    node.shm.dns_notes["events"][0] = size * 3
    tell(node, *[row] * 6)
    flows = node.flows()
    assert len(flows) == 9
    assert [bool(flow.l7.dns.query) for flow in flows] == [False] * 5 + [True] * 4
    node.close()


BAD = {
    "(a": "missing )",
    r"(a)\1": r"\1",
    "(?=a)": "(?=",
    "a{1001}": "{1001}",
    r"\pL{900}": "too large",
}


@pytest.mark.parametrize(("pattern", "named"), BAD.items())
def test_a_pattern_that_is_none_is_an_error_with_its_text(node, pattern, named):
    with pytest.raises(grpc.RpcError) as raised:
        node.flows(whitelist=filters(dns_query=[pattern]))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "dns_query" in raised.value.details() and named in raised.value.details()


def test_too_many_expressions_are_refused(node):
    most = expressions.MOST
    assert len(list(node.flows(whitelist=filters(dns_query=[r"\.$"] * most)))) == 4
    with pytest.raises(grpc.RpcError, match=f"{most + 1} expressions, at most {most}"):
        node.flows(whitelist=filters(dns_query=["a"]), blacklist=filters(dns_query=["b"] * most))


def test_no_pattern_holds_a_thread():
    """Each of these would take Python's own expressions longer than the universe has lasted."""
    assert not expressions.compiled("dns_query", "^(([a-z]+)+)+$").search("a" * 250 + ".")
    assert not fqdn_pattern(["*a" * 60 + "*b"]).fullmatch("a" * 250)
    assert not node_pattern("*a" * 60 + "*b").fullmatch("default/" + "a" * 250)


def test_of_more_messages_than_the_rate_the_newest_and_all_refused_ones_are_flows(tmp_path):
    """What is left out is counted, and a client is told; the next second has room again."""
    clock = [100.0]
    node = Node(tmp_path)
    messages = dns.Messages(node.shm, lambda: clock[0], rate=10)
    tell(node, *({"kind": QUERY, "name": "before.example"} for _ in range(25)))
    assert messages.read(0).count == 25, "what was there at the beginning"
    clock[0] += 1
    tell(node, {"kind": REFUSED, "name": "bad.example", "rcode": 5},
         *({"kind": QUERY, "name": f"n{n}.example"} for n in range(40)))  # fmt: skip
    some = messages.read(0)
    names = [messages.get(int(position))["query"] for position in some.position]
    assert names == ["bad.example.", *(f"n{n}.example." for n in range(30, 40))]
    assert (messages.left_out, messages.lost) == (30, 0)
    clock[0] += 0.5
    tell(node, *({"kind": QUERY, "name": "later.example"} for _ in range(8)))
    assert messages.read(0).count == 5
    assert messages.left_out == 33
    node.close()


def test_the_rate_is_one_for_all_lanes(tmp_path):
    node, clock = Node(tmp_path), [100.0]
    messages = dns.Messages(node.shm, lambda: clock[0], rate=10)
    messages.read(0)
    clock[0] += 1
    for lane, count in ((0, 30), (1, 10), (CONST["DNS_READER"], 60)):
        tell(node, *({"kind": QUERY, "name": "n.example"} for _ in range(count)), lane=lane)
    assert messages.read(0).count == 10
    assert messages.left_out == 90
    node.close()


def test_a_ring_that_comes_round_is_read_in_order(tmp_path):
    node = Node(tmp_path)
    size = CONST["DNS_EVENTS_MAX"]
    node.shm.dns_notes["events"][0] = size - 3
    messages = dns.Messages(node.shm, lambda: 0.0)
    messages.read(0)
    tell(node, *({"kind": QUERY, "name": f"n{n}.example"} for n in range(7)))
    some = messages.read(0)
    names = [messages.get(int(position))["query"] for position in some.position]
    assert names == [f"n{n}.example." for n in range(7)]
    node.close()
