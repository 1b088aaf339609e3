"""What the compiler of services takes and gives, as values.

Rule: frozen and comparable, so that what did not change is known by comparing.

Theory. `Here` is all that the outcome depends on beside a Service and its EndpointSlices: the node
and the options. A compiled service is rows of the service table by name, and claims on frontends:
two services may want the same one, and only the engine, which sees all, says who has it.
"""

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from dataplane.objects.core import Pod
from dataplane.services.maglev import SIZES, seed_bytes
from dataplane.tables.frontends import Key
from dataplane.tables.services import Range, ServiceRow

Address = IPv4Address | IPv6Address
Cidr = IPv4Network | IPv6Network

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
ALGORITHMS = ("random", "maglev")
FAMILIES = (4, 6)
MASK64 = (1 << 64) - 1

# Who has a frontend that several want: the lowest. A ClusterIP is the API server's to give and may
# not be taken over by who can write an external IP (CVE-2020-8554); a NodePort is the whole
# cluster's, a host port one pod's.
RANK_CLUSTER_IP = 0
RANK_NODE_PORT = 1
RANK_LOAD_BALANCER = 2
RANK_EXTERNAL_IP = 3
RANK_HOST_PORT = 4

CLUSTER_ADDRESSES = "addresses//cluster"  # rows that say: this address is services' alone
OUTSIDE_ADDRESSES = "addresses//external"


@dataclass(frozen=True)
class ServiceOptions:
    """Options of services, as the configuration has them."""

    algorithm: str = "random"
    maglev_size: int = 16381
    maglev_seed: str = "JLfvgnHc2kaSUFaI"
    node_port_addresses: tuple[Cidr, ...] = ()  # empty: the node's InternalIPs

    def __post_init__(self) -> None:
        """Raise ValueError for what has no meaning."""
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm {self.algorithm!r} is none of {', '.join(ALGORITHMS)}")
        if self.maglev_size not in SIZES:
            raise ValueError(f"maglev_size {self.maglev_size} is none of {SIZES}")
        seed_bytes(self.maglev_seed)


@dataclass(frozen=True)
class HostPort:
    """A port of the node that leads to a pod. address None: every address of the node."""

    owner: str  # namespace/pod, or what else names it
    port: int
    protocol: str  # TCP, UDP, SCTP
    target_port: int
    targets: tuple[Address, ...]  # addresses of the pod
    address: Address | None = None


@dataclass(frozen=True)
class HealthCheck:
    """What a health check node port answers."""

    namespace: str
    name: str
    local_endpoints: int


@dataclass(frozen=True)
class Here:
    """The node and the options. Addresses by family, as (high half, low half)."""

    node: str = ""
    zone: str = ""
    options: ServiceOptions = field(default_factory=ServiceOptions)
    node_ports_at: tuple[tuple[tuple[int, int], ...], ...] = ((), ())  # IPv4, IPv6
    host_ports_at: tuple[tuple[tuple[int, int], ...], ...] = ((), ())


@dataclass(frozen=True)
class Claim:
    """A wish for a frontend, and the row that it shall lead to."""

    key: Key
    rank: int  # RANK_*
    row: str


@dataclass(frozen=True)
class Compiled:
    """A service as it should stand, before others are looked at."""

    rows: dict[str, ServiceRow] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    problems: tuple[str, ...] = ()
    health: tuple[int, HealthCheck] | None = None  # port, and its answer


def halves(address: Address) -> tuple[int, int]:
    """Return an address as (high half, low half); IPv4 stands in the low one."""
    number = int(address)
    return number >> 64, number & MASK64


def family_of(hi: int, lo: int) -> int:
    """Return 4 or 6. No IPv6 address that may be used is below 2**32 (RFC 4291 2.5)."""
    return 4 if hi == 0 and lo < 1 << 32 else 6


def source_range(cidr: Cidr) -> Range:
    """Return a network as a row of source ranges."""
    hi, lo = halves(cidr.network_address)
    mask_hi, mask_lo = halves(cidr.netmask)
    return hi, lo, mask_hi, mask_lo


def host_ports_of(pod: Pod) -> list[HostPort]:
    """Return what a Pod's containers ask for by hostPort; a pod of the host network has them."""
    if pod.host_network or pod.over or not pod.ips:
        return []
    return [
        HostPort(
            f"{pod.namespace}/{pod.name}",
            port.host_port,
            port.protocol,
            port.number,
            pod.ips,
            port.host_ip,
        )
        for port in pod.ports
        if port.host_port
    ]
