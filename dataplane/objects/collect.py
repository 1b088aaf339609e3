"""All Kubernetes objects of a source, from their manifests.

Rule: one table says which kinds are read, by whom and where they are kept; everything else is kept
as it came (`others`).

Theory. An object is known by its API group, kind, namespace and name; a later one of the same name
wins. The version of a group does not matter here: readers take the fields that all served versions
share. Objects are a snapshot; a source may say how it differs from the one before (`since`), so
that who follows it need not compare a hundred thousand objects to find one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import is_not
from typing import Any
from weakref import ref

from dataplane.objects.cilium import (
    CiliumIdentity,
    cilium_policy,
    clusterwide_policy,
    identity,
)
from dataplane.objects.core import Namespace, Node, Pod, namespace, namespace_of, node, pod
from dataplane.objects.manifest import ManifestError, brief, refuse, section
from dataplane.objects.policies import Policy, network_policy
from dataplane.objects.services import EndpointSlice, Service, endpoint_slice, service

Key = tuple[str, str]  # namespace, name
PolicyKey = tuple[str, str, str]  # kind, namespace ("": clusterwide), name


@dataclass(frozen=True)
class Objects:
    """All objects that a source has."""

    nodes: Mapping[str, Node] = field(default_factory=dict)
    namespaces: Mapping[str, Namespace] = field(default_factory=dict)
    pods: Mapping[Key, Pod] = field(default_factory=dict)
    services: Mapping[Key, Service] = field(default_factory=dict)
    slices: Mapping[Key, EndpointSlice] = field(default_factory=dict)
    policies: Mapping[PolicyKey, Policy] = field(default_factory=dict)
    identities: Mapping[str, CiliumIdentity] = field(default_factory=dict)
    others: tuple[Mapping[str, Any], ...] = ()
    since: "Since | None" = field(default=None, compare=False, repr=False)

    def changed(self, old: "Objects", name: str) -> set[Any]:
        """Return the keys of a field whose object is another than in `old`, or is in one only.

        Costs what changed, if the source has said so; else a comparison of all.
        """
        before, now = getattr(old, name), getattr(self, name)
        if before is now:
            return set()
        if self.since is not None and self.since.base() is old:
            keys = self.since.changed.get(name, frozenset())
            return {key for key in keys if before.get(key) != now.get(key)}
        return diff(before, now)


@dataclass(frozen=True)
class Since:
    """How objects differ from those that the source yielded before. changed: keys by field."""

    base: "ref[Objects]"
    changed: Mapping[str, frozenset[Any]]


def diff(old: Mapping[Any, Any], new: Mapping[Any, Any]) -> set[Any]:
    """Return the keys whose value is another object that is not equal, or is in one only."""
    others = compress(new, map(is_not, map(old.get, new), new.values()))
    changed = {key for key in others if old.get(key) != new[key]}
    if len(old) + len(changed) > len(new):
        changed |= old.keys() - new.keys()
    return changed


@dataclass(frozen=True)
class _Kind:
    """Where objects of a kind go."""

    field: str  # of Objects
    read: Callable[[Mapping[str, Any], str], Any]
    namespaced: bool
    shared: bool = False  # the field holds several kinds: keys begin with the kind


_KINDS = {
    ("", "Node"): _Kind("nodes", node, False),
    ("", "Namespace"): _Kind("namespaces", namespace, False),
    ("", "Pod"): _Kind("pods", pod, True),
    ("", "Service"): _Kind("services", service, True),
    ("discovery.k8s.io", "EndpointSlice"): _Kind("slices", endpoint_slice, True),
    ("networking.k8s.io", "NetworkPolicy"): _Kind("policies", network_policy, True, True),
    ("cilium.io", "CiliumNetworkPolicy"): _Kind("policies", cilium_policy, True, True),
    ("cilium.io", "CiliumClusterwideNetworkPolicy"): _Kind(
        "policies", clusterwide_policy, False, True
    ),
    ("cilium.io", "CiliumIdentity"): _Kind("identities", identity, False),
}


def group_of(manifest: Mapping[str, Any]) -> str:
    """Return the API group of an object: "" for core/v1 and for one that names no version."""
    version = manifest.get("apiVersion")
    return version.rpartition("/")[0] if isinstance(version, str) else ""


def interpret(manifest: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """Return an object's field of Objects, its key there, and the object; Raises ManifestError.

    The key in `others` is None.
    """
    kind = manifest.get("kind") if isinstance(manifest, Mapping) else None
    if not isinstance(kind, str) or not kind:
        raise ManifestError(f"not a Kubernetes object: {brief(manifest)} has no kind")
    known = _KINDS.get((group_of(manifest), kind))
    name = None
    try:
        name = section(manifest.get("metadata"), ("metadata",)).get("name")
        if not isinstance(name, str) or not name:
            raise refuse(("metadata", "name"), "is missing")
        if known is None:
            return "others", None, manifest
        namespace = namespace_of(manifest) if known.namespaced else ""
        key: Any = (namespace, name) if known.namespaced else name
        if known.shared:
            key = (kind, namespace, name)
        return known.field, key, known.read(manifest, name)
    except ManifestError as error:
        called = f"{kind} {name}" if isinstance(name, str) else kind
        raise ManifestError(f"{called}: {error}", error.place) from error


def collect(manifests: Sequence[Mapping[str, Any]]) -> Objects:
    """Read manifests into Objects; a later one of the same name wins. Raises ManifestError."""
    found: dict[str, dict] = {kind.field: {} for kind in _KINDS.values()}
    others = []
    for manifest in manifests:
        where, key, value = interpret(manifest)
        if key is None:
            others.append(value)
        else:
            found[where][key] = value
    return Objects(**found, others=tuple(others))  # type: ignore[arg-type]
