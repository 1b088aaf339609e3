"""Kubernetes objects, as far as the dataplane needs them.

Rule: frozen values made from manifests; a manifest that lies is refused with the field's name.

Theory. Only these classes know the shape of Kubernetes' JSON. Objects of other kinds are kept as
they came (`others`), for the parts that will need them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Any

Address = IPv4Address | IPv6Address
Cidr = IPv4Network | IPv6Network
MAC_ANNOTATION = "penstock.io/vtep-mac"


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the field and the value."""


@dataclass(frozen=True)
class Node:
    """core/v1 Node."""

    name: str
    internal_ips: tuple[Address, ...] = ()
    pod_cidrs: tuple[Cidr, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)

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
class Pod:
    """core/v1 Pod."""

    namespace: str
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    ips: tuple[Address, ...] = ()
    node: str = ""
    host_network: bool = False


@dataclass(frozen=True)
class Objects:
    """All objects that a source has."""

    nodes: Mapping[str, Node] = field(default_factory=dict)
    namespaces: Mapping[str, Namespace] = field(default_factory=dict)
    pods: Mapping[tuple[str, str], Pod] = field(default_factory=dict)
    others: tuple[Mapping[str, Any], ...] = ()


def _many(parse: Any, values: Any, where: str) -> tuple:
    if not isinstance(values, list):
        raise ManifestError(f"{where}: must be a list, is {values!r}")
    found = []
    for value in values:
        try:
            found.append(parse(value))
        except (ValueError, TypeError) as error:
            raise ManifestError(f"{where}: {error}") from error
    return tuple(found)


def _section(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = manifest.get(name) or {}
    if not isinstance(value, Mapping):
        raise ManifestError(f"{name}: must be a mapping, is {value!r}")
    return value


def node(manifest: Mapping[str, Any], name: str) -> Node:
    """Read a Node. Raises ManifestError."""
    addresses = _section(manifest, "status").get("addresses") or []
    if not isinstance(addresses, list) or not all(isinstance(a, Mapping) for a in addresses):
        raise ManifestError(f"status.addresses: must be a list of mappings, is {addresses!r}")
    internal = [item.get("address") for item in addresses if item.get("type") == "InternalIP"]
    spec = _section(manifest, "spec")
    cidrs = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])
    return Node(
        name,
        _many(ip_address, internal, "status.addresses"),
        _many(ip_network, cidrs, "spec.podCIDRs"),
        dict(_section(manifest, "metadata").get("annotations") or {}),
    )


def namespace(manifest: Mapping[str, Any], name: str) -> Namespace:
    """Read a Namespace."""
    labels = dict(_section(manifest, "metadata").get("labels") or {})
    return Namespace(name, {"kubernetes.io/metadata.name": name, **labels})


def pod(manifest: Mapping[str, Any], name: str) -> Pod:
    """Read a Pod. Raises ManifestError."""
    metadata, spec = _section(manifest, "metadata"), _section(manifest, "spec")
    ips = [item.get("ip") for item in _section(manifest, "status").get("podIPs") or []]
    return Pod(
        str(metadata.get("namespace") or "default"),
        name,
        dict(metadata.get("labels") or {}),
        _many(ip_address, ips, "status.podIPs"),
        str(spec.get("nodeName") or ""),
        bool(spec.get("hostNetwork")),
    )


def collect(manifests: list[Mapping[str, Any]]) -> Objects:
    """Read manifests into Objects; a later one of the same name wins. Raises ManifestError."""
    nodes, namespaces, pods, others = {}, {}, {}, []
    for manifest in manifests:
        if not isinstance(manifest, Mapping) or not manifest.get("kind"):
            raise ManifestError(f"not a Kubernetes object: {str(manifest)[:60]!r} has no kind")
        kind = manifest["kind"]
        name = _section(manifest, "metadata").get("name")
        if not isinstance(name, str) or not name:
            raise ManifestError(f"{kind}: metadata.name is missing")
        try:
            if kind == "Node":
                nodes[name] = node(manifest, name)
            elif kind == "Namespace":
                namespaces[name] = namespace(manifest, name)
            elif kind == "Pod":
                one = pod(manifest, name)
                pods[one.namespace, name] = one
            else:
                others.append(manifest)
        except ManifestError as error:
            raise ManifestError(f"{kind} {name}: {error}") from error
    return Objects(nodes, namespaces, pods, tuple(others))
