"""The words of Cilium's policies: protocols, ICMP types, entities, and what we refuse.

Rule: tables only; each word with its number, its selectors or the reason why it is refused.

Theory. Names and members are those of Cilium's pkg/policy/api (l4.go, icmp.go, entity.go); numbers
are IANA's. An entity is a set of selectors over reserved labels (dataplane/policy/labels.py gives
them to addresses); "cluster" is every pod, node and unmanaged address of the cluster.
"""

from collections.abc import Mapping
from types import MappingProxyType

from dataplane.objects.selectors import CLUSTER, RESERVED, Selector, equals, exists, selector

CLUSTER_NAME = "default"

PROTOCOLS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "TCP": (6,),
        "UDP": (17,),
        "SCTP": (132,),
        "ANY": (6, 17, 132),
        "ICMP": (1,),
        "ICMPV6": (58,),
        "VRRP": (112,),
        "IGMP": (2,),
        "GRE": (47,),
        "IPIP": (4,),
        "IPV6": (41,),
        "ESP": (50,),
        "AH": (51,),
    }
)
"""Name -> IANA's numbers."""

WITHOUT_PORTS = frozenset((1, 58, 112, 2, 47, 4, 41, 50, 51))

ICMP4_TYPES: Mapping[str, int] = MappingProxyType(
    {
        "EchoReply": 0, "DestinationUnreachable": 3, "Redirect": 5, "Echo": 8, "EchoRequest": 8,
        "RouterAdvertisement": 9, "RouterSelection": 10, "RouterSolicitation": 10,
        "TimeExceeded": 11, "ParameterProblem": 12, "Timestamp": 13, "TimestampReply": 14,
        "Photuris": 40, "ExtendedEchoRequest": 42, "ExtendedEchoReply": 43,
    }
)  # fmt: skip
ICMP6_TYPES: Mapping[str, int] = MappingProxyType(
    {
        "DestinationUnreachable": 1, "PacketTooBig": 2, "TimeExceeded": 3, "ParameterProblem": 4,
        "EchoRequest": 128, "EchoReply": 129, "MulticastListenerQuery": 130,
        "MulticastListenerReport": 131, "MulticastListenerDone": 132, "RouterSolicitation": 133,
        "RouterAdvertisement": 134, "NeighborSolicitation": 135, "NeighborAdvertisement": 136,
        "RedirectMessage": 137, "RouterRenumbering": 138, "ICMPNodeInformationQuery": 139,
        "ICMPNodeInformationResponse": 140, "InverseNeighborDiscoverySolicitation": 141,
        "InverseNeighborDiscoveryAdvertisement": 142, "HomeAgentAddressDiscoveryRequest": 144,
        "HomeAgentAddressDiscoveryReply": 145, "MobilePrefixSolicitation": 146,
        "MobilePrefixAdvertisement": 147, "DuplicateAddressRequestCodeSuffix": 157,
        "DuplicateAddressConfirmationCodeSuffix": 158, "ExtendedEchoRequest": 160,
        "ExtendedEchoReply": 161,
    }
)  # fmt: skip
UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "nodeSelector": "policies of nodes are not supported yet",
        "toFQDNs": "names can only be allowed, and only in egress",
        "fromRequires": "is not supported: Cilium has given it up, add its labels to fromEndpoints",
        "toRequires": "is not supported: Cilium has given it up, add its labels to toEndpoints",
        "fromNodes": "is not supported yet: use fromEntities: [remote-node] or fromCIDR",
        "toNodes": "is not supported yet: use toEntities: [remote-node] or toCIDR",
        "fromGroups": "groups of cloud providers are not supported: use fromCIDR",
        "toGroups": "groups of cloud providers are not supported: use toCIDR",
        "authentication": "mutual authentication is not supported yet",
        "cidrGroupRef": "CiliumCIDRGroup is not supported yet: write the CIDRs out",
        "cidrGroupSelector": "CiliumCIDRGroup is not supported yet: write the CIDRs out",
        "rules": "names can be restricted in egress only, and not where the element denies",
        "http": "rules of layer 7 other than dns are not supported",
        "kafka": "rules of layer 7 other than dns are not supported",
        "l7": "rules of layer 7 other than dns are not supported",
        "l7proto": "rules of layer 7 other than dns are not supported",
        "terminatingTLS": "TLS inspection is not supported",
        "originatingTLS": "TLS inspection is not supported",
        "serverNames": "TLS server names are not supported yet",
        "listener": "Envoy listeners are not supported",
    }
)
"""Fields of Cilium that we refuse -> why."""

_RESERVED_NAMES = (
    "host", "remote-node", "init", "ingress", "health", "unmanaged", "kube-apiserver",
)  # fmt: skip


def _reserved(name: str) -> Selector:
    return selector([exists(RESERVED + name)])


ENTITIES: Mapping[str, tuple[Selector, ...] | None] = MappingProxyType(
    {
        "all": None,
        "none": (),
        "world": (_reserved("world"), _reserved("world-ipv4"), _reserved("world-ipv6")),
        "world-ipv4": (_reserved("world-ipv4"),),
        "world-ipv6": (_reserved("world-ipv6"),),
        "cluster": (
            selector([equals(CLUSTER, CLUSTER_NAME)]),
            *(_reserved(name) for name in _RESERVED_NAMES),
        ),
        **{name: (_reserved(name),) for name in _RESERVED_NAMES},
    }
)
"""Entity -> selectors of its members; None: everything. pkg/policy/api/entity.go."""
