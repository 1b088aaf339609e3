"""Objects of the agent as plain data for its API.

Rule: JSON types only.

Theory. The command line prints these as tables or passes them through with -o json.
"""

from collections.abc import Iterable
from typing import Any

from dataplane.cni.endpoints import Endpoint
from dataplane.objects.collect import Objects
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


def pods(objects: Objects, endpoints: Iterable[Endpoint]) -> list[dict[str, Any]]:
    """Return who has which addresses: pods of this node as attached, others as their objects say.

    number: the endpoint's, 0 on other nodes.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for pod in objects.pods.values():
        if not pod.host_network and not pod.over:
            found[pod.namespace, pod.name] = {
                "namespace": pod.namespace,
                "name": pod.name,
                "number": 0,
                "node": pod.node,
                "addresses": [str(address) for address in pod.ips],
            }
    for one in endpoints:
        key = one.pod_namespace, one.pod_name
        if not one.pod_name:
            continue
        row = found.setdefault(key, {"namespace": key[0], "name": key[1], "node": ""})
        addresses = [str(address) for address in (one.address4, one.address6) if address]
        row |= {"number": one.number, "addresses": addresses}
    return list(found.values())


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
