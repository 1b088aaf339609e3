"""A node whose policies are tested: manifests and endpoints in, questions to shared memory."""

from ipaddress import ip_address, ip_network

from dataplane.objects.collect import Objects, interpret
from dataplane.policy.engine import PolicyEngine
from dataplane.policy.options import LocalEndpoint, LocalView, PolicyOptions
from dataplane.tables.policies import PolicyWriter
from dataplane.tables.shm import Shm
from tests.naive import policy as naive
from tests.naive.netpol import Oracle

NODE = "n1"
OWN = ("192.0.2.1", "2001:db8::1")
DIRECTIONS = ("ingress", "egress")


def node(number: int) -> dict:
    return {
        "kind": "Node",
        "metadata": {"name": f"n{number}"},
        "spec": {"podCIDRs": [f"10.244.{number}.0/24", f"fd00:244:0:{number}::/64"]},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": f"192.0.2.{number}"},
                {"type": "InternalIP", "address": f"2001:db8::{number}"},
            ]
        },
    }


def namespace(name: str, **labels: str) -> dict:
    return {"kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def pod(namespace: str, name: str, number: int, host: int, ports=(), **labels: str) -> dict:
    """ports: (name, number, protocol)."""
    containers = [{"ports": [
        {"name": n, "containerPort": p, "protocol": protocol} for n, p, protocol in ports
    ]}]  # fmt: skip
    return {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": dict(labels)},
        "spec": {"nodeName": f"n{host}", "containers": containers},
        "status": {"podIPs": [{"ip": ip} for ip in addresses(host, number)]},
    }


def addresses(host: int, number: int) -> tuple[str, str]:
    return f"10.244.{host}.{number}", f"fd00:244:0:{host}::{number:x}"


def policy(namespace: str, name: str, spec: dict, kind: str = "NetworkPolicy", **notes) -> dict:
    """notes: annotations of ours, such as deny_response."""
    group = "networking.k8s.io/v1" if kind == "NetworkPolicy" else "cilium.io/v2"
    metadata = {"name": name, "namespace": namespace}
    if kind == "CiliumClusterwideNetworkPolicy":
        del metadata["namespace"]
    if notes:
        metadata["annotations"] = {
            f"penstock.io/{k.replace('_', '-')}": v for k, v in notes.items()
        }
    return {"apiVersion": group, "kind": kind, "metadata": metadata, "spec": spec}


def slice_of(namespace: str, service: str, ips) -> dict:
    """An EndpointSlice of a service."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service}-1",
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [ip]} for ip in ips if ":" not in ip],
        "ports": [],
    }


class PolicyWorld:
    """Tables, an engine, and what it was told. endpoints: port -> (namespace, pod, addresses)."""

    def __init__(self, run_dir, **options) -> None:
        self.shm = Shm.create(run_dir)
        self.rules = run_dir / "rules.db"
        self.manifests: dict[object, dict] = {}
        self.endpoints: dict[int, tuple[str, str, tuple[str, ...]]] = {}
        self._parsed: dict[int, tuple] = {}
        self.now = 1000.0
        self.start(**options)

    def start(self, **options) -> None:
        """Begin with a new engine, as after a restart."""
        self.options = PolicyOptions(**options)
        self.writer = PolicyWriter(self.shm, lambda: self.now)
        self.engine = PolicyEngine(self.writer, self.options, self.rules, lambda: self.now)

    def put(self, *manifests: dict) -> None:
        for manifest in manifests:
            metadata = manifest["metadata"]
            place = manifest["kind"], metadata.get("namespace"), metadata["name"]
            self.manifests[place] = manifest

    def drop(self, *manifests: dict) -> None:
        for manifest in manifests:
            metadata = manifest["metadata"]
            del self.manifests[manifest["kind"], metadata.get("namespace"), metadata["name"]]

    def attach(self, port: int, manifest: dict) -> None:
        """Give a pod's endpoint a port of this node."""
        ips = tuple(ip["ip"] for ip in manifest["status"]["podIPs"])
        metadata = manifest["metadata"]
        self.endpoints[port] = metadata["namespace"], metadata["name"], ips

    def objects(self) -> Objects:
        """What a source would yield: manifests that stay the same object are parsed once."""
        found: dict[str, dict] = {}
        for manifest in self.manifests.values():
            known = self._parsed.get(id(manifest))
            if known is None or known[0] is not manifest:
                known = self._parsed[id(manifest)] = (manifest, interpret(manifest))
            field, key, one = known[1]
            found.setdefault(field, {})[key] = one
        return Objects(**found)

    def local(self) -> LocalView:
        ends = [
            LocalEndpoint(port, namespace, name, tuple(map(ip_address, ips)))
            for port, (namespace, name, ips) in sorted(self.endpoints.items())
        ]
        keep = (ip_network("172.16.0.0/12"), ip_network("10.0.0.0/8"))
        own = frozenset(map(ip_address, OWN))
        return LocalView(NODE, own, tuple(ends), keep_source=keep)

    def update(self) -> list[str]:
        return self.engine.update(self.objects(), self.local())

    # --- questions --------------------------------------------------------------------------------

    def oracle(self) -> Oracle:
        manifests = list(self.manifests.values())
        return Oracle(manifests, NODE, OWN, self.endpoints, self.options.cidr_match)

    def word(self, port: int, direction: str, peer: str, protocol: int, number: int) -> int:
        turn = DIRECTIONS.index(direction)
        return naive.verdict(self.shm, port, peer, turn, protocol, number)

    def allows(self, port: int, direction: str, peer: str, protocol: int, number: int) -> bool:
        return naive.allows(self.word(port, direction, peer, protocol, number))

    def about(self, port: int, direction: str, peer: str, protocol: int, number: int) -> dict:
        word = self.word(port, direction, peer, protocol, number)
        return self.engine.book.about(word >> 8) or {}

    def check(self, peers, ports, among=None) -> None:
        """Compare the tables with the oracle, and say where they differ."""
        oracle = self.oracle()
        said: dict = {}
        rows = self.shm.subjects["policy"]
        known = {peer: naive.groups_of(self.shm, peer) for peer in peers}
        for port in among or self.endpoints:
            for peer, groups in known.items():
                for direction in DIRECTIONS:
                    for protocol, number in ports:
                        key = int(rows[port]), groups, direction, protocol, number
                        if key not in said:
                            said[key] = self.allows(port, direction, peer, protocol, number)
                        wanted = oracle.allowed(port, direction, peer, protocol, number)
                        assert said[key] == wanted, (
                            f"{self.endpoints[port]} {direction} {peer} {protocol}/{number}: "
                            f"tables {said[key]}, oracle {wanted}"
                        )
