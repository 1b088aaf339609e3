"""Hubble's API, asked by a client made from the public field numbers alone.

Our server's own proto files are not used here: `client` below writes requests, and reads answers,
by the numbers of Hubble's public API (api/v1/flow/flow.proto, api/v1/observer/observer.proto).
"""

import time

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from dataplane.observe.book import LiveBook
from dataplane.observe.collector import Collector
from dataplane.observe.service import Observer, Peer, Server
from dataplane.policy.rulebook import Rulebook
from dataplane.tables.shm import Shm
from xdp.abi import CONST, DTYPE, value

PODS = [
    {"namespace": "shop", "name": "web", "number": 7, "node": "n1", "addresses": ["10.1.0.2"]},
    {"namespace": "shop", "name": "db", "number": 0, "node": "n2", "addresses": ["10.1.1.2"]},
    {"namespace": "ops", "name": "web-probe", "number": 8, "node": "n1",
     "addresses": ["fd00::3", "10.1.0.3"]},
]  # fmt: skip
DENY = 5 << CONST["POLICY_RULE_SHIFT"] | CONST["POLICY_DENY"]

# --- the client: (name, number, type, repeated); types are scalars or messages -------------------

STAMP = {"seconds": (1, "int64"), "nanos": (2, "int32")}
IP = {"source": (1, "string"), "destination": (2, "string"), "ipVersion": (3, "int32")}
FLAGS = {name: (n, "bool") for n, name in enumerate(("FIN", "SYN", "RST", "PSH", "ACK"), 1)}
TCP = {"source_port": (1, "uint32"), "destination_port": (2, "uint32"), "flags": (3, "Flags")}
L4 = {"TCP": (1, "Tcp"), "UDP": (2, "Tcp")}
ENDPOINT = {
    "ID": (1, "uint32"), "identity": (2, "uint32"), "namespace": (3, "string"),
    "labels": (4, "string", True), "pod_name": (5, "string"),
}  # fmt: skip
POLICY = {"name": (1, "string"), "namespace": (2, "string"), "kind": (5, "string")}
FLOW = {
    "time": (1, "Stamp"), "verdict": (2, "int32"), "IP": (5, "Ip"), "l4": (6, "L4"),
    "source": (8, "Endpoint"), "destination": (9, "Endpoint"), "Type": (10, "int32"),
    "node_name": (11, "string"), "event_type": (19, "EventType"),
    "traffic_direction": (22, "int32"), "drop_reason_desc": (25, "int32"),
    "is_reply": (26, "Bool"), "uuid": (34, "string"), "egress_denied_by": (21004, "Policy", True),
    "ingress_denied_by": (21005, "Policy", True), "Summary": (100000, "string"),
}  # fmt: skip
FILTER = {
    "source_ip": (1, "string", True), "source_pod": (2, "string", True),
    "destination_ip": (3, "string", True), "destination_pod": (4, "string", True),
    "verdict": (5, "int32", True), "event_type": (6, "EventType", True),
    "protocol": (12, "string", True), "destination_port": (14, "string", True),
    "source_identity": (19, "uint32", True), "ip_version": (25, "int32", True),
    "uuid": (29, "string", True), "http_method": (21, "string", True),
    "cel": (999, "Cel"), "source_label": (10, "string", True),
}  # fmt: skip
MESSAGES = {
    "Stamp": STAMP, "Ip": IP, "Flags": FLAGS, "Tcp": TCP, "L4": L4, "Endpoint": ENDPOINT,
    "Policy": POLICY, "Bool": {"value": (1, "bool")}, "Cel": {"cel": (1, "string", True)},
    "EventType": {"type": (1, "int32"), "sub_type": (2, "int32")},
    "Flow": FLOW, "Filter": FILTER,
    "Lost": {"source": (1, "int32"), "num_events_lost": (2, "uint64"), "cpu": (3, "Bool")},
    "GetFlows": {
        "number": (1, "uint64"), "follow": (3, "bool"), "blacklist": (5, "Filter", True),
        "whitelist": (6, "Filter", True), "since": (7, "Stamp"), "until": (8, "Stamp"),
        "first": (9, "bool"), "field_mask": (10, "Mask"),
    },
    "Mask": {"paths": (1, "string", True)},
    "Answer": {"flow": (1, "Flow"), "lost_events": (3, "Lost"), "node_name": (1000, "string"),
               "time": (1001, "Stamp")},
    "Empty": {},
    "Status": {"num_flows": (1, "uint64"), "max_flows": (2, "uint64"), "seen_flows": (3, "uint64"),
               "version": (8, "string")},
    "Nodes": {"nodes": (1, "Node", True)}, "Node": {"name": (1, "string"), "state": (4, "int32")},
    "Namespaces": {"namespaces": (1, "Namespace", True)},
    "Namespace": {"cluster": (1, "string"), "namespace": (2, "string")},
    "Change": {"name": (1, "string"), "address": (2, "string"), "type": (3, "int32")},
    "HealthRequest": {"service": (1, "string")}, "Health": {"status": (1, "int32")},
}  # fmt: skip


def _client() -> dict[str, type]:
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="client.proto", package="c", syntax="proto3")
    for name, fields in MESSAGES.items():
        made = file.message_type.add(name=name)
        for field, (number, kind, *many) in fields.items():
            one = made.field.add(name=field, number=number)
            one.label = kinds.LABEL_REPEATED if many else kinds.LABEL_OPTIONAL
            if kind[0].isupper():
                one.type, one.type_name = kinds.TYPE_MESSAGE, f".c.{kind}"
            else:
                one.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"c.{name}"))
        for name in MESSAGES
    }


C = _client()
CALLS = {
    "/observer.Observer/GetFlows": ("GetFlows", "Answer", True),
    "/observer.Observer/GetAgentEvents": ("Empty", "Answer", True),
    "/observer.Observer/GetDebugEvents": ("Empty", "Answer", True),
    "/observer.Observer/GetNodes": ("Empty", "Nodes", False),
    "/observer.Observer/GetNamespaces": ("Empty", "Namespaces", False),
    "/observer.Observer/ServerStatus": ("Empty", "Status", False),
    "/peer.Peer/Notify": ("Empty", "Change", True),
    "/grpc.health.v1.Health/Check": ("HealthRequest", "Health", False),
}


class Node:
    """Rings, a collector without its thread, a server, a client."""

    def __init__(self, folder) -> None:
        self.shm = Shm.create(folder)
        book = Rulebook(folder / "rules.db")
        about = '{"kind": "NetworkPolicy", "namespace": "shop", "name": "closed"}'
        while (number := book.number(f"rule {len(book)}", about)) < 5:
            pass
        assert number == 5
        book.identity(70001, {"k8s:app": "web"})
        book.flush()
        self.news = [PODS]
        self.source = Collector(self.shm, 1 << 16, lambda: self.news.pop() if self.news else None)
        live = LiveBook(self.shm, folder / "rules.db", folder / "services.json")
        peers = {"n1": "192.0.2.1:4244", "n2": "192.0.2.2:4244"}
        self.server = Server(Observer(self.source, live, "n1"), Peer(lambda: peers, lambda: True))
        self.server.listen_unix(folder / "hubble.sock")
        self.server.start()
        self.channel = grpc.insecure_channel(f"unix:{folder / 'hubble.sock'}")

    def close(self) -> None:
        self.channel.close()
        self.server.stop()
        self.source.close()
        self.shm.close()

    def tell(self, *rows: dict, ring: int = 0) -> None:
        """Write events and let them be read."""
        for row in rows:
            record = np.zeros(1, DTYPE["flow_record"])
            record["time_ns"] = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            record["family"], record["protocol"], record["packets"] = 4, 6, 1
            for name, number in row.items():
                record[name] = number
            head = int(self.shm.event_rings["head"][ring])
            self.shm.flow_records[ring][head % CONST["EVENTS_MAX"]] = record[0]
            self.shm.event_rings["head"][ring] = head + 1
        self.source.turn()

    def call(self, method: str, request=None, timeout: float = 20):
        asked, answer, stream = CALLS[method]
        make = self.channel.unary_stream if stream else self.channel.unary_unary
        ready = make(method, request_serializer=C[asked].SerializeToString,
                     response_deserializer=C[answer].FromString)  # fmt: skip
        return ready(request if request is not None else C[asked](), timeout=timeout)

    def flows(self, **asked) -> list:
        request = C["GetFlows"](number=asked.pop("number", 1000), **asked)
        return [one.flow for one in self.call("/observer.Observer/GetFlows", request)]


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


def filters(**members):
    made = C["Filter"]()
    for name, some in members.items():
        getattr(made, name).extend(some)
    return [made]


def summaries(flows) -> list[str]:
    return [flow.Summary.partition(";")[0] for flow in flows]


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
