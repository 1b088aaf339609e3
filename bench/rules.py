"""One set of rules and services, said in every subject's own language. Pure text and objects.

Rule: all subjects are given the same rules: the same number, of the same kind, the one that lets
the traffic pass at the same place (last).

Theory. A policy over the server pod: rules that allow single addresses of a test network (RFC
2544's 198.18.0.0/15; 2001:db8:2::/48) a port each, and at last the client. Where the server is a
host outside, the same over what the client pod may send, and at last the server. Services:
ClusterIPs of which the last one leads to the server pod. nft gets linear chains, as agents that
speak iptables make them for policies (a jump by pod, then rule after rule) and kube-proxy's
iptables mode for services (a jump by ClusterIP); connections that are known pass first, as with all
of them. In `each` order they pass last: rules that know no connections, such as network ACLs, look
at every packet. Open vSwitch gets a flow a rule behind its connection tracker. Kubernetes objects
are standard ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from bench.traffic import PORTS_MOST, TARGET_PORT

LAST_PORT = TARGET_PORT + PORTS_MOST - 1
TCP_PORTS = (5201, 7777)  # iperf3, penstock-rr
DNS_PORT = 5353
STRANGERS = {4: IPv4Address("198.18.0.1"), 6: IPv6Address("2001:db8:2::1")}
VIPS = {4: IPv4Address("10.96.0.1"), 6: IPv6Address("fd00:96::1")}
NOBODY = {4: "198.19.255.1", 6: "2001:db8:2:ffff::1"}  # a backend of services that are not used
CLUSTER = {4: "10.244.0.0/16", 6: "fd00:244::/48"}
WORD = {4: "ip", 6: "ip6"}


@dataclass(frozen=True)
class Asked:
    """What a subject is to do. Addresses are of one family."""

    family: int
    client: str
    server: str
    rules: int = 0
    services: int = 0
    masquerade: bool = False
    outward: bool = False  # the rules are about what the client may send

    @property
    def subject(self) -> str:
        """Whose rules they are."""
        return self.client if self.outward else self.server

    @property
    def peer(self) -> str:
        """Whom the last one allows."""
        return self.server if self.outward else self.client

    @property
    def ways(self) -> tuple[str, str]:
        """Where subject and peers stand in a packet: source or destination."""
        return ("src", "dst") if self.outward else ("dst", "src")

    @property
    def vip(self) -> str:
        """The ClusterIP that leads to the server."""
        return str(VIPS[self.family] + self.services - 1)

    @property
    def target(self) -> str:
        """Where the client's packets go."""
        return self.vip if self.services else self.server


def strangers(family: int, count: int) -> Iterator[tuple[str, int]]:
    """Yield address and port of the rules that do not fit."""
    for n in range(count):
        yield str(STRANGERS[family] + n), 1024 + n % 8000


# --- nftables -------------------------------------------------------------------------------------


def nft(asked: Asked, each: bool = False) -> str:
    """Return a ruleset. each: known connections are no shortcut."""
    lines = ["table inet penstock_bench {"]
    if asked.services:
        lines += _nft_services(asked)
    known = "ct state established,related accept"
    lines += ["chain forward {", "type filter hook forward priority filter; policy accept;"]
    lines += [] if each else [known]
    lines.append("ct state invalid drop")
    if asked.rules:
        lines.append(f"{WORD[asked.family]} {asked.ways[0][0]}addr {asked.subject} jump pod")
    lines += [known, "ct state new accept"] if each or not asked.rules else []
    lines.append("}")
    if asked.rules:
        lines += _nft_pod(asked, each)
    if asked.masquerade:
        cluster = CLUSTER[asked.family]
        word = WORD[asked.family]
        lines += ["chain postrouting {", "type nat hook postrouting priority srcnat;"]
        lines += [f"{word} saddr {cluster} {word} daddr != {cluster} masquerade", "}"]
    return "\n".join([*lines, "}", ""])


def _nft_pod(asked: Asked, each: bool) -> list[str]:
    peers = f"{WORD[asked.family]} {asked.ways[1][0]}addr"
    end = "return" if each else "accept"
    lines = ["chain pod {"]
    for address, port in strangers(asked.family, asked.rules - 1):
        lines.append(f"{peers} {address} udp dport {port} accept")
    lines.append(f"{peers} {asked.peer} udp dport {TARGET_PORT}-{LAST_PORT} {end}")
    lines += [f"{peers} {asked.peer} tcp dport {port} {end}" for port in TCP_PORTS]
    lines.append(f"{peers} {asked.peer} udp dport {DNS_PORT} {end}")
    return [*lines, "meta l4proto { icmp, ipv6-icmp } accept", "drop", "}"]


def _nft_services(asked: Asked) -> list[str]:
    word = WORD[asked.family]
    lines = []
    for n in range(asked.services):
        last = n == asked.services - 1
        backend = asked.server if last else NOBODY[asked.family]
        to = f"dnat {word} to {backend}"
        lines += [f"chain service{n} {{", f"udp dport {TARGET_PORT}-{LAST_PORT} {to}"]
        if last:
            lines += [f"udp dport {DNS_PORT} {to}"]
            lines += [f"tcp dport {port} {to}" for port in TCP_PORTS]
        lines.append("}")
    lines += ["chain prerouting {", "type nat hook prerouting priority dstnat;"]
    for n in range(asked.services):
        lines.append(f"{word} daddr {VIPS[asked.family] + n} jump service{n}")
    return [*lines, "}"]


# --- Kubernetes -----------------------------------------------------------------------------------

RULES_A_POLICY = 100
SERVICES_A_FILE = 500


def policies(asked: Asked) -> list[dict[str, Any]]:
    """Return NetworkPolicies over pods labelled app=server, or app=client, in `default`."""
    ports = [{"protocol": "UDP", "port": TARGET_PORT, "endPort": LAST_PORT}]
    ports += [{"protocol": "TCP", "port": port} for port in TCP_PORTS]
    ports.append({"protocol": "UDP", "port": DNS_PORT})
    bits = 32 if asked.family == 4 else 128
    last: dict[str, Any] = {"podSelector": {"matchLabels": {"app": "client"}}}
    way, peers, app = "ingress", "from", "server"
    if asked.outward:
        last = {"ipBlock": {"cidr": f"{asked.server}/{bits}"}}
        way, peers, app = "egress", "to", "client"
    rules = [
        {
            peers: [{"ipBlock": {"cidr": f"{address}/{bits}"}}],
            "ports": [{"protocol": "UDP", "port": port}],
        }
        for address, port in strangers(asked.family, asked.rules - 1)
    ]
    rules.append({peers: [last], "ports": ports})
    if asked.outward:  # pings of the gateway: a NetworkPolicy knows no ICMP
        rules.append({peers: [{"ipBlock": {"cidr": CLUSTER[asked.family]}}]})
    parts = [rules[n : n + RULES_A_POLICY] for n in range(0, len(rules), RULES_A_POLICY)]
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"rules-{n}", "namespace": "default"},
            "spec": {
                "podSelector": {"matchLabels": {"app": app}},
                "policyTypes": [way.capitalize()],
                way: part,
            },
        }
        for n, part in enumerate(parts)
    ]


def services(asked: Asked, node: str) -> list[dict[str, Any]]:
    """Return Services and EndpointSlices; the last one leads to the server, on `node`."""
    found = []
    ports = [("UDP", port) for port in (*range(TARGET_PORT, LAST_PORT + 1), DNS_PORT)]
    ports += [("TCP", port) for port in TCP_PORTS]
    for n in range(asked.services):
        last = n == asked.services - 1
        backend = asked.server if last else NOBODY[asked.family]
        mine = ports if last else [("UDP", TARGET_PORT), ("TCP", TCP_PORTS[0])]
        found += _service(f"service-{n}", str(VIPS[asked.family] + n), mine, backend, node)
    return found


def _service(
    name: str, vip: str, ports: list[tuple[str, int]], backend: str, node: str
) -> list[dict[str, Any]]:
    family = f"IPv{ip_address(vip).version}"
    named = [
        {"name": f"{protocol}-{port}".lower(), "protocol": protocol, "port": port}
        for protocol, port in ports
    ]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": vip,
            "clusterIPs": [vip],
            "ipFamilies": [family],
            "ports": [{**one, "targetPort": one["port"]} for one in named],
        },
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-1",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": family,
        "ports": named,
        "endpoints": [
            {
                "addresses": [backend],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": node,
            }
        ],
    }
    return [service, endpoints]
