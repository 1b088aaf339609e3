"""A node in memory whose pods ask for names: manifests in, DNS packets through all stages."""

from ipaddress import ip_address

import dns.message
import dns.rcode
import dns.rrset
import yaml

from dataplane.engine.account import make_lane
from dataplane.engine.worker import make_tables
from dataplane.kernels.dns_sweep import expire, look_for_missing, mark
from dataplane.kernels.rows import Rows
from dataplane.objects.collect import Objects, interpret
from dataplane.policy.engine import PolicyEngine
from dataplane.policy.options import LocalEndpoint, LocalView, PolicyOptions
from dataplane.tables.names import NamingOptions
from dataplane.tables.names_view import NameReader
from dataplane.tables.policies import PolicyWriter
from tests import worlds as w
from tests.naive.rewrite import completed
from tests.policy_world import namespace
from tests.segments import UDP, Ends, udp
from xdp.abi import CONST

import numpy as np  # isort: skip

SERVER = {4: ip_address("10.1.2.53"), 6: ip_address("fd00:1:2::53")}  # kube-dns, on node 2
OTHER = {4: ip_address("10.1.2.54"), 6: ip_address("fd00:1:2::54")}
STORE = {4: ip_address("198.51.100.7"), 6: ip_address("2001:db8:f::7")}
ELSEWHERE = {4: ip_address("198.51.100.9"), 6: ip_address("2001:db8:f::9")}
NAME = "myblobstorage.com"
STORY = """
endpointSelector: {matchLabels: {app: genai}}
egress:
- toFQDNs: [{matchName: myblobstorage.com}, {matchPattern: "*.cdn.example"}]
  toPorts: [{ports: [{port: "443", protocol: TCP}]}]
- toEndpoints: [{matchLabels: {k8s:io.kubernetes.pod.namespace: kube-system, k8s-app: kube-dns}}]
  toPorts:
  - ports: [{port: "53", protocol: ANY}]
    rules: {dns: [{matchName: myblobstorage.com}, {matchPattern: "*.cdn.example"}]}
"""


def _node(number: int) -> dict:
    return {
        "kind": "Node",
        "metadata": {"name": f"n{number}"},
        "spec": {"podCIDRs": [f"10.1.{number}.0/24", f"fd00:1:{number}::/64"]},
        "status": {"addresses": [{"type": "InternalIP", "address": f"192.0.2.{number}"}]},
    }


def _pod(space: str, name: str, host: int, ips, **labels: str) -> dict:
    return {
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": space,
            "labels": {key.replace("_", "-"): one for key, one in labels.items()},
        },
        "spec": {"nodeName": f"n{host}", "containers": [{}]},
        "status": {"podIPs": [{"ip": str(ip)} for ip in ips]},
    }


class DnsWorld:
    """Pod A (port 1) is default/genai, pod B is default/free; kube-dns is on node 2."""

    def __init__(self, world: w.World) -> None:
        """Begin with no policy and nothing learned."""
        self.world, self.shm = world, world.shm
        self.rules = self.shm.folder / "rules.db"
        for name in ("names", "name_index", "learned", "learned_index", "dns_queries",
                     "dns_pods", "dns_servers", "dns_notes", "dns_events", "name_patterns",
                     "name_pattern_slots", "naming", "policy_entries"):  # fmt: skip
            self.shm.clear(name)
        world.forget()
        self.manifests = [
            _node(1), _node(2), namespace("default"), namespace("kube-system"),
            _pod("default", "genai", 1, (w.POD4[1], w.POD6[1]), app="genai"),
            _pod("default", "free", 1, (w.POD4[2], w.POD6[2]), app="free"),
            _pod("kube-system", "dns", 2, SERVER.values(), k8s_app="kube-dns"),
        ]  # fmt: skip
        self.policies: dict[str, dict] = {}
        self.reader = NameReader(self.shm, lambda: self.world.now)
        self.restart()

    def restart(self) -> None:
        """Begin with a new agent over the tables that stand."""
        self.writer = PolicyWriter(self.shm, lambda: self.world.now / 1e9)
        options = PolicyOptions()
        self.engine = PolicyEngine(self.writer, options, self.rules, lambda: self.world.now / 1e9)
        self.engine.names.configure(NamingOptions())
        assert self.update() == []

    def apply(self, text: str, name: str = "genai") -> None:
        """Put a CiliumNetworkPolicy into force; text: its spec."""
        metadata = {"name": name, "namespace": "default"}
        self.policies[name] = {
            "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": metadata,
            "spec": yaml.safe_load(text),
        }  # fmt: skip
        assert self.update() == []

    def remove(self, name: str = "genai") -> None:
        del self.policies[name]
        assert self.update() == []

    def update(self) -> list[str]:
        found: dict[str, dict] = {}
        for manifest in (*self.manifests, *self.policies.values()):
            field, key, one = interpret(manifest)
            found.setdefault(field, {})[key] = one
        ends = tuple(
            LocalEndpoint(port, "default", name, (w.POD4[port], w.POD6[port]))
            for port, name in ((w.POD_A, "genai"), (w.POD_B, "free"))
        )
        own = frozenset((w.NODE4, w.NODE6, w.ROUTER4, w.ROUTER6))
        return self.engine.update(Objects(**found), LocalView("n1", own, ends))

    # --- packets ----------------------------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        self.world.now += int(seconds * w.SECOND)

    def query(self, message: bytes, port: int = 5000, pod: int = w.POD_A, family: int = 4,
              server=None) -> w.Result:  # fmt: skip
        """A pod's UDP datagram to its resolver."""
        source = (w.POD4 if family == 4 else w.POD6)[pod]
        target = server or SERVER[family]
        return self.world.one(pod, udp(Ends(source, port, target, 53), message))

    def answer(self, message: bytes, port: int = 5000, pod: int = w.POD_A, family: int = 4,
               server=None, server_port: int = 53) -> w.Result:  # fmt: skip
        """The resolver's datagram, as it comes off the tunnel."""
        return self.world.one(w.UPLINK, self.tunnelled(
            udp(Ends(server or SERVER[family], server_port,
                     (w.POD4 if family == 4 else w.POD6)[pod], port), message)))  # fmt: skip

    def tunnelled(self, frame: bytes) -> bytes:
        """A frame from node 2 with the VXLAN header of this world."""
        from tests.segments import vxlan

        return vxlan(frame, w.REMOTE4, w.NODE4, w.VNI, self.world.port)

    def ask(self, name: str, kind: str = "A", identifier: int = 7, **where) -> w.Result:
        """Ask for a name."""
        return self.query(question(name, kind, identifier), **where)

    def tell(self, name: str, *records: str, kind: str = "A", identifier: int = 7, rcode: int = 0,
             ttl: int = 60, **where) -> w.Result:  # fmt: skip
        """Answer a question with records such as `A 192.0.2.1` or `OWNER CNAME TARGET`."""
        return self.answer(response(name, *records, kind=kind, identifier=identifier,
                                    rcode=rcode, ttl=ttl), **where)  # fmt: skip

    def learn(self, name: str, *records: str, **where) -> None:
        """Ask and answer; both pass."""
        asked = {key: one for key, one in where.items() if key not in ("ttl", "rcode")}
        assert self.ask(name, **asked).sent
        assert self.tell(name, *records, **where).sent

    def reaches(self, address, port: int = 443, pod: int = w.POD_A, source: int = 40000) -> bool:
        """Whether a TCP connection may be opened."""
        from tests.segments import tcp

        own = (w.POD4 if address.version == 4 else w.POD6)[pod]
        return self.world.one(pod, tcp(Ends(own, source, address, port))).sent

    # --- time -------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """What the forwarder does once a second."""
        now, tick = self.world.now, self.world.now >> CONST["TICK_SHIFT"]
        tables = make_tables(self.shm)
        lane = make_lane(self.shm, CONST["DNS_SWEEPER"])
        mark(tables.naming, tables.connections, 0, self.world.conntrack.records, tick)
        rows = np.flatnonzero(self.shm.learned_index)
        expire(tables.naming, lane.dns_notes, Rows(rows), len(rows), tick)
        look_for_missing(tables, lane, now)


def question(name: str, kind: str = "A", identifier: int = 7, **options) -> bytes:
    """A query on the wire."""
    made = dns.message.make_query(name, kind, **options)
    made.id = identifier
    return made.to_wire()


def response(name: str, *records: str, kind: str = "A", identifier: int = 7, rcode: int = 0,
             ttl: int = 60) -> bytes:  # fmt: skip
    """An answer on the wire."""
    asked = dns.message.make_query(name, kind)
    asked.id = identifier
    made = dns.message.make_response(asked)
    made.set_rcode(rcode)
    for record in records:
        words = record.split()
        owner, type_, value = words if len(words) == 3 else (name, *words)
        one = dns.rrset.from_text(owner.rstrip(".") + ".", ttl, "IN", type_, value)
        made.answer.append(one)
    return made.to_wire()


def message_of(frame: bytes) -> dns.message.Message:
    """The DNS message of a frame, whose checksums are right."""
    ip = frame[14:]
    head = 20 if ip[0] >> 4 == 4 else 40
    assert completed(ip, head, UDP) == ip, "a checksum is wrong"
    return dns.message.from_wire(ip[head + 8 :])
