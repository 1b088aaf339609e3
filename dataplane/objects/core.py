"""Nodes, namespaces and pods (core/v1), as far as the dataplane needs them.

Rule: frozen values made from manifests; a manifest that lies is refused with the field's name.

Theory. Only this package knows the shape of Kubernetes' JSON. Fields are those of the Kubernetes
API reference (core/v1); what the dataplane does not use is not read and so not checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

from dataplane.objects.manifest import (
    Address,
    Cidr,
    Place,
    choice,
    flag,
    integer,
    items,
    parsed,
    section,
    sections,
    text,
    texts,
)

MAC_ANNOTATION = "penstock.io/vtep-mac"
PROTOCOLS = ("TCP", "UDP", "SCTP")
PORT_MOST = 65535


@dataclass(frozen=True)
class Node:
    """core/v1 Node."""

    name: str
    internal_ips: tuple[Address, ...] = ()
    pod_cidrs: tuple[Cidr, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def internal_ip(self, family: int) -> Address | None:
        """Return the first InternalIP of family 4 or 6."""
        return next((ip for ip in self.internal_ips if ip.version == family), None)

    def pod_cidr(self, family: int) -> Cidr | None:
        """Return the pod CIDR of family 4 or 6."""
        return next((net for net in self.pod_cidrs if net.version == family), None)


@dataclass(frozen=True)
class Namespace:
    """core/v1 Namespace."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ContainerPort:
    """A port of a pod's container. host_port 0: none; host_ip None: every address of the node."""

    name: str
    protocol: str  # TCP, UDP, SCTP
    number: int
    host_port: int = 0
    host_ip: Address | None = None


@dataclass(frozen=True)
class Pod:
    """core/v1 Pod."""

    namespace: str
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    ips: tuple[Address, ...] = ()
    node: str = ""
    host_network: bool = False
    ports: tuple[ContainerPort, ...] = ()
    service_account: str = ""
    phase: str = ""  # Succeeded and Failed: its addresses are no longer its own
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether it has ended: it keeps its object, not its addresses."""
        return self.phase in ("Succeeded", "Failed")


def node(manifest: Mapping[str, Any], name: str) -> Node:
    """Read a Node. Raises ManifestError."""
    metadata = section(manifest.get("metadata"), ("metadata",))
    place: Place = ("status", "addresses")
    status = section(manifest.get("status"), ("status",))
    addresses = sections(status.get("addresses"), place)
    internal = [item.get("address") for item in addresses if item.get("type") == "InternalIP"]
    spec = section(manifest.get("spec"), ("spec",))
    cidrs = items(spec.get("podCIDRs"), ("spec", "podCIDRs"))
    if not cidrs and spec.get("podCIDR"):
        cidrs = [spec["podCIDR"]]
    return Node(
        name,
        parsed(ip_address, internal, place),
        parsed(ip_network, cidrs, ("spec", "podCIDRs")),
        texts(metadata.get("annotations"), ("metadata", "annotations")),
        texts(metadata.get("labels"), ("metadata", "labels")),
    )


def namespace(manifest: Mapping[str, Any], name: str) -> Namespace:
    """Read a Namespace. Raises ManifestError."""
    metadata = section(manifest.get("metadata"), ("metadata",))
    labels = texts(metadata.get("labels"), ("metadata", "labels"))
    return Namespace(name, {**labels, "kubernetes.io/metadata.name": name})


def namespace_of(manifest: Mapping[str, Any]) -> str:
    """Return the namespace that an object is in."""
    metadata = section(manifest.get("metadata"), ("metadata",))
    return text(metadata.get("namespace"), ("metadata", "namespace")) or "default"


def pod(manifest: Mapping[str, Any], name: str) -> Pod:
    """Read a Pod. Raises ManifestError."""
    metadata = section(manifest.get("metadata"), ("metadata",))
    spec, status = (section(manifest.get(part), (part,)) for part in ("spec", "status"))
    place: Place = ("status", "podIPs")
    ips = [item.get("ip") for item in sections(status.get("podIPs"), place)]
    return Pod(
        namespace_of(manifest),
        name,
        texts(metadata.get("labels"), ("metadata", "labels")),
        parsed(ip_address, ips, place),
        text(spec.get("nodeName"), ("spec", "nodeName")),
        flag(spec.get("hostNetwork"), ("spec", "hostNetwork"), False),
        _container_ports(spec),
        text(spec.get("serviceAccountName"), ("spec", "serviceAccountName")),
        text(status.get("phase"), ("status", "phase")),
        texts(metadata.get("annotations"), ("metadata", "annotations")),
    )


def _container_ports(spec: Mapping[str, Any]) -> tuple[ContainerPort, ...]:
    """Ports of containers, and of init containers that stay (sidecars)."""
    found = []
    for kind in ("initContainers", "containers"):
        for n, container in enumerate(sections(spec.get(kind), ("spec", kind))):
            if kind == "initContainers" and container.get("restartPolicy") != "Always":
                continue
            place: Place = ("spec", kind, n, "ports")
            for m, port in enumerate(sections(container.get("ports"), place)):
                found.append(_container_port(port, (*place, m)))
    return tuple(found)


def _container_port(port: Mapping[str, Any], place: Place) -> ContainerPort:
    host_ip = text(port.get("hostIP"), (*place, "hostIP"))
    address = parsed(ip_address, [host_ip], (*place, "hostIP"))[0] if host_ip else None
    return ContainerPort(
        text(port.get("name"), (*place, "name")),
        choice(port.get("protocol"), (*place, "protocol"), PROTOCOLS, "TCP"),
        integer(port.get("containerPort"), (*place, "containerPort"), 1, PORT_MOST),
        integer(port.get("hostPort") or 0, (*place, "hostPort"), 0, PORT_MOST),
        None if address is None or address.is_unspecified else address,
    )
