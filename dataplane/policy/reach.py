"""Ways from a pod to the addresses of a name: what is behind them, who lets whom in, what went on.

Rule: what should be (tables, policies) and what has been (rings, connections) are both looked at.

Theory. A name leads to addresses, or is a service's and leads to its frontends. Behind each are
backends, policies of both ends, a route with its MTU. Rules by name know learned addresses only, so
an address that an answer has had and that is not learned now is one of before. What of all this is
in the pod's way is said by reasons.py.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from dataplane.policy.explain import Unknown
from dataplane.tables import service_view
from dataplane.tables.connection_view import Select, connections
from dataplane.tables.drops_view import dropped, port_text
from dataplane.tables.shm import Shm
from dataplane.tables.verdicts import Reader
from dataplane.tables.writer import TableWriter

Address = IPv4Address | IPv6Address
Judge = Callable[[str, str, str], dict[str, Any]]
"""(source, target, PORT/PROTOCOL) -> the answer of `penstock policy why`. Raises Unknown."""

WAYS_MOST = 8  # addresses and backends that are judged; a name may have thousands
PORTS_MOST = 4
CONNECTIONS_READ = 4096
LATELY_NS = 300_000_000_000
USUAL_PORT = "443/tcp"  # where nothing says which one is meant


@dataclass(frozen=True)
class Asked:
    """The question. pod: NAMESPACE/POD, addresses: its own; known: of name_why.why about both.

    service: NAMESPACE/NAME if the name is a service's; port: PORT/PROTOCOL, None: those that the
    pod has tried, that the service has, or that rules by this name allow.
    """

    pod: str
    addresses: tuple[Address, ...]
    known: dict[str, Any]
    service: str = ""
    port: str | None = None

    @property
    def name(self) -> str:
        """The name, without the dot at its end."""
        return str(self.known["name"]).rstrip(".")

    @property
    def ports(self) -> list[str]:
        """What the pod's rules by this name allow, such as 443/tcp."""
        return list(self.known["pod"]["ports"])


@dataclass
class Way:
    """One address and port of the name. mtu: of the route, 0: there is none."""

    address: Address
    port: str
    mtu: int = 0
    service: str = ""
    behind: list[tuple[Address, str]] = field(default_factory=list)  # where packets end
    backends: list[dict[str, Any]] = field(default_factory=list)
    judged: list[dict[str, Any]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "address": str(self.address),
            "port": self.port,
            "service": self.service,
            "backends": self.backends,
            "mtu": self.mtu,
            "policy": self.judged,
        }


class Reach:
    """What a Shm knows of one question."""

    def __init__(
        self, shm: Shm, asked: Asked, judge: Judge, services: Mapping[int, str],
        policy_of: Callable[[Iterable[int]], Mapping[int, str]], now_ns: int,
    ) -> None:  # fmt: skip
        """services: NAMESPACE/NAME:PORT by row; policy_of: who made verdict words."""
        self._shm, self.asked, self._judge = shm, asked, judge
        self._services, self.policy_of = services, policy_of
        self._reader = Reader(shm)
        self._routes = TableWriter(shm).routes()
        self.drops = dropped(shm, asked.addresses, now_ns, LATELY_NS)
        self.opened = [
            one
            for address in asked.addresses
            for one in connections(shm, Select(address=address), CONNECTIONS_READ)
            if one["source"] == str(address)
        ]
        self.now, self.before = self._leads()
        self.ways = self._ways()
        for way in self.ways:
            self._judge_way(way)
        self.there = self.now | {address for way in self.ways for address, _ in way.behind}

    # --- where the name leads ---------------------------------------------------------------------

    def _leads(self) -> tuple[set[Address], set[Address]]:
        """Return the addresses that the name leads to now, and others that it led to before."""
        known = self.asked.known
        mine = (0, known["pod"]["identity"])
        now = {ip_address(one["address"]) for one in known["addresses"] if one["identity"] in mine}
        latest: dict[str, set[Address]] = {}
        every: set[Address] = set()
        for one in known["events"]:
            if one["kind"] == "answer" and one["rcode"] == "NOERROR":
                latest[one["type"]] = {ip_address(text) for text in one["addresses"]}
                every |= latest[one["type"]]
        for address in set().union(*latest.values()):
            if not self.asked.ports or self.of_cluster(address):
                now.add(address)
        now |= {address for address, _, row in self._frontends if self._is_asked(row)}
        families = {one.version for one in self.asked.addresses}
        return {one for one in now if one.version in families}, every - now

    def of_cluster(self, address: Address) -> bool:
        """Return whether an address is a pod's, a node's or a service's: labels decide there."""
        pod_or_node = bool(self._reader.find(str(address))[1].flags)
        return pod_or_node or any(at == address for at, *_ in self._frontends)

    @cached_property
    def _frontends(self) -> list[tuple[Address, str, int]]:
        """Address, PORT/PROTOCOL and row of each service's frontend."""
        return [
            (ip_address(one["address"]), port_text(one["port"], one["protocol"]), one["service"])
            for one in service_view.frontends(self._shm)
            if one["protocol"] != "any"
        ]

    def _is_asked(self, row: int) -> bool:
        service = self._services.get(row, "").rpartition(":")[0]
        return bool(service) and service == self.asked.service

    # --- ways -------------------------------------------------------------------------------------

    def _ways(self) -> list[Way]:
        found = []
        for address in sorted(self.now, key=lambda one: (one.version, int(one)))[:WAYS_MOST]:
            rows = {port: row for at, port, row in self._frontends if at == address}
            ports = [self.asked.port] if self.asked.port else list(rows) or self._tried()
            for port in ports[:PORTS_MOST]:
                way = Way(address, port, self.mtu(address), behind=[(address, port)])
                if port in rows:
                    self._serve(way, rows[port])
                found.append(way)
        return found

    def _tried(self) -> list[str]:
        """Return the ports that are meant where nobody says."""
        tried = [one.port for one in self.drops if one.target in self.now]
        tried += [
            port_text(one["destination_port"], one["protocol"])
            for one in self.opened
            if ip_address(one["destination"]) in self.now
        ]
        ruled = [one for one in self.asked.ports if one.partition("/")[0].isdecimal()]
        return list(dict.fromkeys(tried)) or ruled or [USUAL_PORT]

    def _serve(self, way: Way, row: int) -> None:
        """Put the backends of a service behind its address."""
        way.service = self._services.get(row, "") or f"row {row}"
        way.backends = service_view.listed(self._shm, row, "inside")
        way.behind = [
            (ip_address(one["address"]), port_text(one["port"], one["protocol"]))
            for one in way.backends[:WAYS_MOST]
        ]
        way.mtu = min((self.mtu(address) for address, _ in way.behind), default=0)

    def mtu(self, address: Address) -> int:
        """Return the MTU of the route to an address, 0: there is no route."""
        fits = [net for net in self._routes if net.version == address.version and address in net]
        if not fits:
            return 0
        best = max(fits, key=lambda net: net.prefixlen)
        return int(self._shm.adjacencies["mtu"][self._routes[best]])

    def _judge_way(self, way: Way) -> None:
        for address, port in way.behind:
            try:
                way.judged.append(self._judge(self.asked.pod, str(address), port))
            except Unknown as error:
                way.judged.append({"target": str(address), "port": port, "unknown": str(error)})

    def works(self, there: set[Address], since_s: float) -> bool:
        """Return whether a connection to an address was opened since then, and answered."""
        return any(
            one["reply_packets"]
            and one["age_s"] < since_s
            and ip_address(one["destination"]) in there
            for one in self.opened
        )


def service_name(name: str, domain: str) -> str:
    """Return NAMESPACE/NAME of a service's DNS name, "" for another. domain: of the cluster."""
    head, found, rest = name.lower().rstrip(".").partition(".svc")
    parts = head.split(".")
    if not found or rest not in ("", f".{domain}") or len(parts) != 2:
        return ""
    return f"{parts[1]}/{parts[0]}"
