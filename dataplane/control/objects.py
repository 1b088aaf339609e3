"""Kubernetes objects, as far as the dataplane needs them.

Rule: frozen values made from manifests; a manifest that lies is refused with the field's name.

Theory. Only these classes know the shape of Kubernetes' JSON. Objects of other kinds are kept as
they came (`others`), for the parts that will need them.
"""

import reprlib
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
_BRIEF = reprlib.Repr()  # a manifest may be huge, or hold itself


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


def _list(section: Mapping[str, Any], name: str, of: type, where: str) -> list:
    values = section.get(name) or []
    if not isinstance(values, list) or not all(isinstance(value, of) for value in values):
        kind = "mappings" if of is Mapping else "strings"
        raise ManifestError(f"{where}.{name}: must be a list of {kind}, is {_BRIEF.repr(values)}")
    return values


def _many(parse: Any, values: list, where: str) -> tuple:
    found = []
    for value in values:
        if not isinstance(value, str):  # ipaddress takes 5 for 0.0.0.5
            raise ManifestError(f"{where}: {_BRIEF.repr(value)} is not a string")
        try:
            found.append(parse(value))
        except ValueError as error:
            raise ManifestError(f"{where}: {error}") from error
    return tuple(found)


def _section(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = manifest.get(name) or {}
    if not isinstance(value, Mapping):
        raise ManifestError(f"{name}: must be a mapping, is {_BRIEF.repr(value)}")
    return value


def _texts(manifest: Mapping[str, Any], name: str) -> dict[str, str]:
    """metadata.labels or metadata.annotations: text by text."""
    found = dict(_section(_section(manifest, "metadata"), name))
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, str):
            pair = f"{_BRIEF.repr(key)}: {_BRIEF.repr(value)}"
            raise ManifestError(f"metadata.{name}: {pair} must be strings, quote them")
    return found


def _text(section: Mapping[str, Any], name: str, where: str) -> str:
    value = section.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ManifestError(f"{where}.{name}: {_BRIEF.repr(value)} is not a string")
    return value


def node(manifest: Mapping[str, Any], name: str) -> Node:
    """Read a Node. Raises ManifestError."""
    addresses = _list(_section(manifest, "status"), "addresses", Mapping, "status")
    internal = [item.get("address") for item in addresses if item.get("type") == "InternalIP"]
    spec = _section(manifest, "spec")
    cidrs = _list(spec, "podCIDRs", str, "spec")
    if not cidrs and spec.get("podCIDR"):
        cidrs = [spec["podCIDR"]]
    return Node(
        name,
        _many(ip_address, internal, "status.addresses"),
        _many(ip_network, cidrs, "spec.podCIDRs"),
        _texts(manifest, "annotations"),
    )


def namespace(manifest: Mapping[str, Any], name: str) -> Namespace:
    """Read a Namespace. Raises ManifestError."""
    labels = _texts(manifest, "labels")
    return Namespace(name, {"kubernetes.io/metadata.name": name, **labels})


def pod(manifest: Mapping[str, Any], name: str) -> Pod:
    """Read a Pod. Raises ManifestError."""
    metadata, spec = _section(manifest, "metadata"), _section(manifest, "spec")
    ips = [
        item.get("ip") for item in _list(_section(manifest, "status"), "podIPs", Mapping, "status")
    ]
    return Pod(
        _text(metadata, "namespace", "metadata") or "default",
        name,
        _texts(manifest, "labels"),
        _many(ip_address, ips, "status.podIPs"),
        _text(spec, "nodeName", "spec"),
        spec.get("hostNetwork") is True,
    )


def collect(manifests: list[Mapping[str, Any]]) -> Objects:
    """Read manifests into Objects; a later one of the same name wins. Raises ManifestError."""
    nodes, namespaces, pods, others = {}, {}, {}, []
    for manifest in manifests:
        kind = manifest.get("kind") if isinstance(manifest, Mapping) else None
        if not isinstance(kind, str) or not kind:
            raise ManifestError(f"not a Kubernetes object: {_BRIEF.repr(manifest)} has no kind")
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
