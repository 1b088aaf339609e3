"""Objects of the agent as plain data for its API.

Rule: JSON types only.

Theory. The command line prints these as tables or passes them through with -o json.
"""

from typing import Any

from dataplane.cni.endpoints import Endpoint
from dataplane.objects.core import Node


def endpoint(one: Endpoint) -> dict[str, Any]:
    """Return a pod's attachment."""
    return {
        "number": one.number,
        "pod": f"{one.pod_namespace}/{one.pod_name}" if one.pod_name else "",
        "container": one.container_id,
        "ifname": one.ifname,
        "host_ifname": one.host_ifname,
        "ipv4": str(one.address4 or ""),
        "ipv6": str(one.address6 or ""),
        "mac": one.mac,
        "network": one.network,
    }


def node(one: Node) -> dict[str, Any]:
    """Return a cluster node."""
    return {
        "name": one.name,
        "internal_ips": [str(address) for address in one.internal_ips],
        "pod_cidrs": [str(cidr) for cidr in one.pod_cidrs],
    }


def lease(one: Any) -> dict[str, Any]:
    """Return an address lease."""
    network, container, ifname = one.key
    return {
        "network": network,
        "container": container,
        "ifname": ifname,
        "addresses": [str(address) for _, address in sorted(one.addresses.items())],
        "owner": dict(one.owner),
        "created": one.created,
    }
