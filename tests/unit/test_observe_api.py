"""Hubble's API, asked by a client that knows the public field numbers alone (tests/hubble.py)."""

import socket
import subprocess
import time

import grpc
import numpy as np
import pytest
from click.testing import CliRunner

from dataplane.cli.main import main
from dataplane.observe.service import Observer, Peer, Server, credentials
from tests.hubble import PODS, C, Node, filters
from xdp.abi import CONST, DTYPE, value

DENY = 5 << CONST["POLICY_RULE_SHIFT"] | CONST["POLICY_DENY"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    node = Node(tmp_path_factory.mktemp("run"))
    yield node
    node.close()


WEB, DB, PROBE = 0x0A010002, 0x0A010102, 0x0A010003
NEW, DROP, CHANGE, END = (value(f"EVENT_{name}") for name in ("NEW", "DROP", "CHANGE", "END"))
SYN, ACK = 2, 16
ALLOW = 5 << CONST["POLICY_RULE_SHIFT"] | CONST["POLICY_ALLOW"]
ALLOWED = {"egress_rule": ALLOW, "ingress_rule": CONST["POLICY_ALLOW"]}
TO_DB = {"source_lo": WEB, "target_lo": DB, "source_port": 40000, "target_port": 5432,
         "source_identity": 70001, "target_identity": 70002}  # fmt: skip


@pytest.fixture(scope="module")
def node(made):
    made.tell(
        {**TO_DB, "kind": NEW, "tcp": SYN, **ALLOWED},
        {**TO_DB, "kind": CHANGE, "tcp": SYN | ACK, "flags": CONST["EVENT_REPLY"]},
        {**TO_DB, "kind": DROP, "tcp": SYN, "target_port": 22, "egress_rule": DENY, "packets": 3,
         "reason": value("REASON_POLICY_DENIED")},
        {"kind": NEW, "source_lo": PROBE, "target_lo": WEB, "protocol": 17, "target_port": 53},
        {**TO_DB, "kind": END, "tcp": SYN, "reply_packets": 5, "bytes": 99, "lasted": 1000},
    )  # fmt: skip
    return made


def test_a_flow_as_the_protocol_has_it(node):
    first, reply, drop, udp, end = node.flows()
    assert (first.source.namespace, first.source.pod_name, first.source.ID) == ("shop", "web", 7)
    assert (first.destination.pod_name, first.destination.ID) == ("db", 0)
    assert list(first.source.labels) == ["k8s:app=web"]
    assert (first.IP.source, first.IP.destination, first.IP.ipVersion) == (
        "10.1.0.2", "10.1.1.2", 1,
    )  # fmt: skip
    assert (first.l4.TCP.source_port, first.l4.TCP.destination_port) == (40000, 5432)
    assert first.l4.TCP.flags.SYN
    assert not first.l4.TCP.flags.ACK
    assert (first.verdict, first.Type, first.node_name) == (1, 1, "n1")
    assert first.event_type.type == 5
    assert first.HasField("is_reply")
    assert not first.is_reply.value
    assert abs(first.time.seconds - time.time()) < 100
    assert reply.is_reply.value
    assert reply.source.pod_name == "db"
    assert reply.l4.TCP.source_port == 5432
    assert (drop.verdict, drop.drop_reason_desc, drop.event_type.type) == (2, 133, 1)
    assert drop.event_type.sub_type == 133
    assert not drop.HasField("is_reply")
    assert [(one.kind, one.namespace, one.name) for one in drop.egress_denied_by] == [
        ("NetworkPolicy", "shop", "closed")
    ]
    assert drop.traffic_direction == 2
    assert "3 packets" in drop.Summary
    assert udp.l4.UDP.destination_port == 53
    assert not udp.is_reply.value
    assert "99 bytes there, 5 packets" in end.Summary
    assert len({flow.uuid for flow in (first, reply, drop, udp, end)}) == 5


@pytest.mark.parametrize(
    ("members", "numbers"),
    [
        ({"source_pod": ["shop/web"]}, [0, 2, 4]),
        ({"source_pod": ["shop/"]}, [0, 1, 2, 4]),
        ({"source_pod": ["web"]}, []),  # of namespace default
        ({"destination_pod": ["shop/we"]}, [1, 3]),
        ({"verdict": [2]}, [2]),
        ({"verdict": [1], "protocol": ["udp"]}, [3]),
        ({"protocol": ["tcp"], "destination_port": ["22", "53"]}, [2]),
        ({"source_ip": ["10.1.0.0/24"]}, [0, 2, 3, 4]),
        ({"destination_ip": ["10.1.0.2"]}, [1, 3]),
        ({"source_identity": [70001]}, [0, 2, 4]),
        ({"source_label": ["app=web"]}, [0, 2, 4]),
        ({"source_label": ["app in (x, web),!other"]}, [0, 2, 4]),
        ({"ip_version": [2]}, []),
        ({"http_method": ["GET"]}, []),
    ],
)
def test_filters(node, members, numbers):
    everything = [flow.uuid for flow in node.flows()]
    found = [everything.index(flow.uuid) for flow in node.flows(whitelist=filters(**members))]
    assert found == numbers
    rest = [everything.index(flow.uuid) for flow in node.flows(blacklist=filters(**members))]
    assert rest == [n for n in range(5) if n not in numbers]


def test_members_are_anded_values_and_filters_are_ored(node):
    either = filters(verdict=[2]) + filters(protocol=["udp"])
    assert len(node.flows(whitelist=either)) == 2
    assert not node.flows(whitelist=either, blacklist=either)
    by_id = filters(uuid=[node.flows()[3].uuid])
    assert node.flows(whitelist=by_id)[0].l4.UDP.destination_port == 53


def test_event_types_and_sub_types(node):
    def asked(kind: int, **more) -> int:
        made = C["Filter"]()
        made.event_type.add(type=kind, **more)
        return len(node.flows(whitelist=[made]))

    assert asked(1) == 1
    assert asked(4) == 4, "a new connection is found as a packet, too"
    assert asked(5) == 2, "and a drop by policy as its verdict"


def test_numbers_first_last_since_until(node):
    everything = node.flows()
    assert [flow.uuid for flow in node.flows(number=2)] == [flow.uuid for flow in everything[-2:]]
    first = node.flows(number=2, first=True)
    assert [flow.uuid for flow in first] == [flow.uuid for flow in everything[:2]]
    middle = everything[2].time
    assert len(node.flows(since=middle)) == 3
    assert len(node.flows(until=middle)) == 3
    assert len(node.flows(since=middle, until=middle)) == 1
    assert len(node.flows(number=0)) == 5


def test_a_field_mask_leaves_out_the_rest(node):
    mask = C["Mask"](paths=["source.pod_name", "verdict"])
    flow = node.flows(number=1, field_mask=mask)[0]
    assert (flow.source.pod_name, flow.verdict) == ("web", 1)
    assert not flow.source.namespace
    assert not flow.HasField("destination")
    assert not flow.Summary


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"field_mask": C["Mask"](paths=["nothing"])}, "nothing"),
        ({"whitelist": filters(source_label=["a b"])}, "a b"),
        ({"whitelist": filters(destination_port=["70000"])}, "70000"),
        ({"whitelist": filters(protocol=["quic"])}, "quic"),
        ({"whitelist": filters(source_ip=["10.1"])}, "10.1"),
        ({"whitelist": [C["Filter"](cel=C["Cel"](cel=["true"]))]}, "experimental"),
        ({"first": True, "follow": True}, "first and follow"),
        ({"since": C["Stamp"](seconds=9), "until": C["Stamp"](seconds=8)}, "behind"),
        ({"since": C["Stamp"](seconds=10**12)}, "since: Timestamp is not valid"),
        ({"until": C["Stamp"](nanos=-5)}, "until: Timestamp is not valid"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(node, asked, words):
    with pytest.raises(grpc.RpcError) as caught:
        node.flows(**asked)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in caught.value.details()


def test_who_follows_gets_what_comes_and_what_was_lost(node):
    request = C["GetFlows"](follow=True, whitelist=filters(protocol=["udp"]))
    call = node.call("/observer.Observer/GetFlows", request)
    time.sleep(0.3)  # it follows from when it is served
    udp = {"kind": NEW, "source_lo": PROBE, "target_lo": WEB, "protocol": 17, "target_port": 99}
    node.tell(udp, {**TO_DB, "kind": NEW})
    assert next(call).flow.l4.UDP.destination_port == 99
    rings = node.shm.event_rings
    rings["head"][1] += CONST["EVENTS_MAX"] + 41
    node.source.turn()
    while node.source.turn():
        pass
    lost = next(one for one in call if one.HasField("lost_events")).lost_events
    assert (lost.source, lost.num_events_lost) == (1, 42)  # the place of the oldest is in use
    call.cancel()
    again = list(node.call("/observer.Observer/GetFlows", C["GetFlows"](number=1)))
    assert [one.lost_events.num_events_lost for one in again if one.HasField("lost_events")] == [42]


def test_an_observer_that_starts_names_what_the_rings_hold_when_it_is_told(tmp_path):
    node = Node(tmp_path)
    hour = {"time_ns": time.clock_gettime_ns(time.CLOCK_MONOTONIC) - 3_600_000_000_000}
    node.news = [PODS, None]  # the agent answers after the first look
    node.tell({"kind": DROP, "source_lo": WEB, "target_lo": DB, **hour})
    assert node.flows()[0].source.pod_name == ""
    node.source.turn()
    assert node.flows()[0].source.pod_name == "web"
    node.close()


def test_names_that_come_late(node):
    node.tell({"kind": NEW, "source_lo": 0x0A01FF01, "target_lo": WEB, "target_port": 8})
    asked = filters(destination_port=["8"])
    assert node.flows(whitelist=asked)[0].source.pod_name == ""
    late = {"namespace": "shop", "name": "late", "number": 9, "node": "n1",
            "addresses": ["10.1.255.1"]}  # fmt: skip
    node.news.append([*PODS, late])
    node.source.turn()
    assert node.flows(whitelist=asked)[0].source.pod_name == "late"
    node.news.append(PODS)
    node.source.turn()
    assert node.flows(whitelist=asked)[0].source.pod_name == "late", "what was seen stays named"


def test_the_other_calls(node):
    status = node.call("/observer.Observer/ServerStatus")
    assert status.seen_flows >= status.num_flows >= 5
    assert status.max_flows == 1 << 16
    assert status.version
    nodes = node.call("/observer.Observer/GetNodes").nodes
    assert [(one.name, one.state) for one in nodes] == [("default/n1", 1)]
    spaces = node.call("/observer.Observer/GetNamespaces").namespaces
    assert [one.namespace for one in spaces] == ["ops", "shop"]
    for method in ("GetAgentEvents", "GetDebugEvents"):
        assert list(node.call(f"/observer.Observer/{method}")) == []
    peers = node.call("/peer.Peer/Notify")
    assert [(one.name, one.address, one.type) for one in (next(peers), next(peers))] == [
        ("n1", "192.0.2.1:4244", 1),
        ("n2", "192.0.2.2:4244", 1),
    ]
    peers.cancel()
    for service in ("", "hubble.server.Observer"):
        request = C["HealthRequest"](service=service)
        assert node.call("/grpc.health.v1.Health/Check", request).status == 1


def test_the_socket_is_roots_alone(node):
    assert (node.shm.folder.parent / "hubble.sock").stat().st_mode & 0o077 == 0


# --- under way ------------------------------------------------------------------------------------


def test_a_thread_that_collects_while_writers_write_and_clients_ask(tmp_path):
    """What was read and what was lost are all that was written; answers are whole meanwhile."""
    node = Node(tmp_path)
    rings, records = node.shm.event_rings, node.shm.flow_records
    batch = np.zeros(5000, DTYPE["flow_record"])
    batch["family"], batch["protocol"], batch["kind"], batch["tcp"] = 4, 6, NEW, SYN
    batch["source_lo"], batch["target_lo"] = WEB, DB
    node.source.start()
    try:
        for turn in range(60):
            for ring in range(3):
                head = int(rings["head"][ring])
                batch["time_ns"] = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
                where = (head + np.arange(len(batch))) % CONST["EVENTS_MAX"]
                records[ring][where] = batch
                rings["head"][ring] = head + len(batch)
            if turn % 6 == 0:
                late = {"namespace": "x", "name": f"p{turn}", "number": 20 + turn, "node": "n1",
                        "addresses": [f"10.9.0.{turn}"]}  # fmt: skip
                node.news.append([*PODS, late])
                found = node.flows(number=50, whitelist=filters(source_pod=["shop/web"]))
                assert all(flow.destination.pod_name == "db" for flow in found)
        deadline = time.monotonic() + 20
        while node.source.store.head + node.source.lost < 60 * 3 * 5000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert node.source.store.head + node.source.lost == 60 * 3 * 5000
    finally:
        node.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Folder with ca.pem, server.pem and client.pem and their .key files."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
    (folder / "names").write_text("subjectAltName=DNS:n1.hubble-grpc.cilium.io\n")
    for name in ("server", "client"):
        openssl(
            "req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"
        )
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                "-CAcreateserial", "-extfile", "names", "-out", f"{name}.pem")  # fmt: skip
    return folder


def test_tls_with_certificates_of_clients(node, certificates):
    path = certificates
    server = Server(Observer(node.source, node.book, "n1"), Peer(dict, lambda: True))
    made = credentials(path / "server.pem", path / "server.key", path / "ca.pem")
    port = server.listen_tcp("127.0.0.1:0", made)
    server.start()
    try:
        words = ["observe", "--status", "--server", f"127.0.0.1:{port}", "--tls-ca-cert-file",
                 str(path / "ca.pem"), "--tls-server-name", "n1.hubble-grpc.cilium.io"]  # fmt: skip
        refused = CliRunner().invoke(main, words)
        assert refused.exit_code == 1
        pair = ["--tls-client-cert-file", str(path / "client.pem"), "--tls-client-key-file",
                str(path / "client.key")]  # fmt: skip
        found = CliRunner().invoke(main, [*words, *pair])
        assert found.exit_code == 0, found.output
        assert "Flows:" in found.stdout
        plain = CliRunner().invoke(main, words[:4])
        assert plain.exit_code == 1
    finally:
        server.stop()


def test_a_port_that_is_taken_is_an_error(node):
    server = Server(Observer(node.source, node.book, "n1"), Peer(dict, lambda: True))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RuntimeError):
            server.listen_tcp(f"127.0.0.1:{taken.getsockname()[1]}")
    server.stop()


def test_an_observer_that_is_away_is_named(tmp_path):
    found = CliRunner().invoke(main, ["observe", "--run-dir", str(tmp_path)])
    assert found.exit_code == 1
    assert "is `penstock run` up?" in found.output
