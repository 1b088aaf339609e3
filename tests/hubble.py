"""A client of Hubble's API made from the public field numbers alone, and a small node to ask.

Rule: our server's own proto files are not used here.

Theory. `C` has messages by the numbers of Hubble's public API (api/v1/flow/flow.proto,
api/v1/observer/observer.proto); `CALLS` its methods. A `Node` is rings in shared memory, a
collector whose thread does not run unless a test starts it, and a server.
"""

import time

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from dataplane.observe.book import LiveBook
from dataplane.observe.collector import Collector
from dataplane.observe.service import Observer, Peer, Server
from dataplane.policy.rulebook import Rulebook
from dataplane.tables.shm import Shm
from xdp.abi import CONST, DTYPE

PODS = [
    {"namespace": "shop", "name": "web", "number": 7, "node": "n1", "addresses": ["10.1.0.2"]},
    {"namespace": "shop", "name": "db", "number": 0, "node": "n2", "addresses": ["10.1.1.2"]},
    {"namespace": "ops", "name": "web-probe", "number": 8, "node": "n1",
     "addresses": ["fd00::3", "10.1.0.3"]},
]  # fmt: skip

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
    "l7": (15, "Layer7"),
}  # fmt: skip
FILTER = {
    "source_ip": (1, "string", True), "source_pod": (2, "string", True),
    "destination_ip": (3, "string", True), "destination_pod": (4, "string", True),
    "verdict": (5, "int32", True), "event_type": (6, "EventType", True),
    "protocol": (12, "string", True), "destination_port": (14, "string", True),
    "source_identity": (19, "uint32", True), "ip_version": (25, "int32", True),
    "uuid": (29, "string", True), "http_method": (21, "string", True),
    "cel": (999, "Cel"), "source_label": (10, "string", True), "dns_query": (18, "string", True),
}  # fmt: skip
MESSAGES = {
    "Stamp": STAMP, "Ip": IP, "Flags": FLAGS, "Tcp": TCP, "L4": L4, "Endpoint": ENDPOINT,
    "Policy": POLICY, "Bool": {"value": (1, "bool")}, "Cel": {"cel": (1, "string", True)},
    "EventType": {"type": (1, "int32"), "sub_type": (2, "int32")},
    "Flow": FLOW, "Filter": FILTER,
    "Layer7": {"type": (1, "int32"), "latency_ns": (2, "uint64"), "dns": (100, "Dns")},
    "Dns": {"query": (1, "string"), "ips": (2, "string", True), "ttl": (3, "uint32"),
            "observation_source": (5, "string"), "rcode": (6, "uint32"),
            "qtypes": (7, "string", True), "rrtypes": (8, "string", True)},
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
        self.book = LiveBook(self.shm, folder / "rules.db", folder / "services.json")
        self.book.messages = self.source.messages.get
        peers = {"n1": "192.0.2.1:4244", "n2": "192.0.2.2:4244"}
        self.server = Server(
            Observer(self.source, self.book, "n1"), Peer(lambda: peers, lambda: True)
        )
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
        found = self.call("/observer.Observer/GetFlows", request)
        return [one.flow for one in found if one.HasField("flow")]


def filters(**members):
    """One filter in a list."""
    made = C["Filter"]()
    for name, some in members.items():
        getattr(made, name).extend(some)
    return [made]
