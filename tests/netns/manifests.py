"""Kubernetes objects as tests write them, short."""

from typing import Any

NETWORKING, CILIUM = "networking.k8s.io/v1", "cilium.io/v2"


def namespace(name: str, **labels: str) -> dict[str, Any]:
    """A Namespace."""
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def service(
    name: str,
    addresses: list[str],
    ports: list[tuple[int, int]],
    protocol: str = "TCP",
    space: str = "default",
    **spec: Any,
) -> dict[str, Any]:
    """A Service. addresses: clusterIPs; ports: (port, targetPort)."""
    families = ["IPv6" if ":" in address else "IPv4" for address in addresses]
    entries = [
        {"name": f"p{port}", "port": port, "targetPort": target, "protocol": protocol}
        for port, target in ports
    ]
    for entry, node_port in zip(entries, spec.pop("node_ports", []), strict=False):
        entry["nodePort"] = node_port
    status = spec.pop("status", {})
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": space},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": addresses[0],
            "clusterIPs": addresses,
            "ipFamilies": families,
            "ports": entries,
            **spec,
        },
        "status": status,
    }


def slices(
    name: str,
    ports: list[tuple[int, int]],
    endpoints: list[tuple[str, dict[int, str]]],
    protocol: str = "TCP",
    space: str = "default",
    **conditions: bool,
) -> list[dict[str, Any]]:
    """EndpointSlices of a Service, one a family. endpoints: (node, addresses by family)."""
    ready = {"ready": True, "serving": True, "terminating": False, **conditions}
    return [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{name}-v{family}",
                "namespace": space,
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": f"IPv{family}",
            "ports": [
                {"name": f"p{port}", "port": target, "protocol": protocol} for port, target in ports
            ],
            "endpoints": [
                {"addresses": [found[family]], "conditions": ready, "nodeName": node}
                for node, found in endpoints
                if family in found
            ],
        }
        for family in (4, 6)
    ]


def network_policy(name: str, space: str = "default", **spec: Any) -> dict[str, Any]:
    """A NetworkPolicy."""
    return {
        "apiVersion": NETWORKING,
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": space},
        "spec": {"podSelector": {}, **spec},
    }


def cilium_policy(name: str, space: str = "default", **spec: Any) -> dict[str, Any]:
    """A CiliumNetworkPolicy; annotations by the keyword of that name."""
    annotations = spec.pop("annotations", {})
    return {
        "apiVersion": CILIUM,
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": name, "namespace": space, "annotations": annotations},
        "spec": spec,
    }
