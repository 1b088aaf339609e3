"""What the policy engine is told beside the objects: options, and this node as it is.

Rule: plain values; the configuration's shape is not known here.

Theory. The daemon fills these from its configuration, the endpoints and the kernel's state, so the
engine can be run without any of them: in tests, and offline by the command line.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from types import MappingProxyType

from dataplane.objects.manifest import Address, Cidr
from xdp.abi import value

ANSWERS: Mapping[str, int] = MappingProxyType(
    {
        "drop": value("REFUSAL_DROP"),
        "icmp": value("REFUSAL_ICMP"),
        "reset": value("REFUSAL_RESET"),
    }
)
"""Answer to what is denied -> enum refusal."""


@dataclass(frozen=True)
class PolicyOptions:
    """How policies are enforced. Values as in the configuration's section `policy`."""

    enforcement: str = "default"  # default, always, never
    cidr_match: str = "kubernetes"  # kubernetes, cilium
    audit: bool = False
    deny_response: str = "drop"  # drop, icmp, reset
    entries_max: int = 65536
    wide_from: int = 256  # peers; a selector of as many makes wide groups. Not configured


@dataclass(frozen=True, slots=True)
class LocalEndpoint:
    """A pod's attachment. port: index of its row in the port table; pod "": a mere container."""

    port: int
    namespace: str
    pod: str
    addresses: tuple[Address, ...]


@dataclass(frozen=True)
class LocalView:
    """This node. addresses: all of its own, the pods' gateway among them.

    clusters: all pod addresses of the cluster; keep_source: destinations that see pods' own
    addresses (excluded from masquerading); host_port: index of the port towards the node's stack.
    """

    node: str
    addresses: frozenset[Address] = frozenset()
    endpoints: tuple[LocalEndpoint, ...] = ()
    clusters: tuple[Cidr, ...] = field(
        default_factory=lambda: (ip_network("10.244.0.0/16"), ip_network("fd00:244::/48"))
    )
    keep_source: tuple[Cidr, ...] = ()
    host_port: int | None = None
