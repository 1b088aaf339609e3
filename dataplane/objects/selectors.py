"""Label selectors as values, and their reading.

Rule: a Selector is a conjunction over labels with sources; reading one never loses a condition.

Theory. Kubernetes knows two kinds of labels, of a pod and of its namespace; Cilium writes both as
labels of one identity, with the source in front: "k8s:app", "k8s:io.kubernetes.pod.namespace",
"k8s:io.cilium.k8s.namespace.labels.team", "reserved:host". A selector of either API becomes the
same list of requirements over such keys, so there is one matcher. NotIn and DoesNotExist hold where
the label is missing (apimachinery, labels.Requirement.Matches). Two selectors that ask the same are
equal.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dataplane.objects.manifest import Place, brief, choice, refuse, section, sections, text, texts

IN, NOT_IN, EXISTS, ABSENT = "In", "NotIn", "Exists", "DoesNotExist"
OPERATORS = (IN, NOT_IN, EXISTS, ABSENT)

NAMESPACE = "k8s:io.kubernetes.pod.namespace"
NAMESPACE_LABELS = "k8s:io.cilium.k8s.namespace.labels."
SERVICE_ACCOUNT = "k8s:io.cilium.k8s.policy.serviceaccount"
CLUSTER = "k8s:io.cilium.k8s.policy.cluster"
RESERVED = "reserved:"

_PREFIX = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"  # a DNS name
_KEY = re.compile(rf"({_PREFIX}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,500}}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_SOURCE = re.compile(r"([a-z0-9-]+):(.+)")


@dataclass(frozen=True, slots=True, order=True)
class Requirement:
    """One condition. values: sorted, without repetition; none for EXISTS and ABSENT."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def __str__(self) -> str:
        match self.operator:
            case "In" if len(self.values) == 1:
                return f"{self.key}={self.values[0]}"
            case "NotIn" if len(self.values) == 1:
                return f"{self.key}!={self.values[0]}"
            case "Exists":
                return self.key
            case "DoesNotExist":
                return f"!{self.key}"
        return f"{self.key} {self.operator.lower()} ({', '.join(self.values)})"


@dataclass(frozen=True, slots=True)
class Selector:
    """All of its requirements must hold; without any it selects every identity."""

    requirements: tuple[Requirement, ...] = ()
    _hash: int = field(default=0, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Work the hash out once: selectors are looked up again and again."""
        object.__setattr__(self, "_hash", hash(self.requirements))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return ", ".join(map(str, self.requirements)) or "everything"

    def keys(self) -> frozenset[str]:
        """Return the label keys that it asks for."""
        return frozenset(requirement.key for requirement in self.requirements)


def selector(requirements: Iterable[Requirement]) -> Selector:
    """Return the selector of some requirements, in canonical order."""
    return Selector(tuple(sorted(set(requirements))))


def equals(key: str, value: str) -> Requirement:
    """Return the requirement that a label has this value."""
    return Requirement(key, IN, (value,))


def exists(key: str) -> Requirement:
    """Return the requirement that a label is there."""
    return Requirement(key, EXISTS)


def pod_key(key: str) -> str:
    """Return the key of a pod's label, as NetworkPolicy writes it."""
    return f"k8s:{key}"


def namespace_key(key: str) -> str:
    """Return the key of a namespace's label, as NetworkPolicy writes it."""
    return NAMESPACE_LABELS + key


def cilium_key(key: str) -> str:
    """Return a key with its source, as CiliumNetworkPolicy writes it.

    "any:" and no source at all mean Kubernetes here, the one source of labels that pods have.
    """
    found = _SOURCE.fullmatch(key)
    if found is None:
        return f"k8s:{key}"
    return f"k8s:{found[2]}" if found[1] == "any" else key


def read(value: object, place: Place, rename: Callable[[str], str]) -> list[Requirement]:
    """Read a LabelSelector; rename: gives keys their source. Raises ManifestError."""
    found = section(value, place)
    known(found, place, ("matchLabels", "matchExpressions"))
    requirements = []
    labels = texts(found.get("matchLabels"), (*place, "matchLabels"))
    for key, one in labels.items():
        at: Place = (*place, "matchLabels", key)
        check_key(key, at, rename)
        check_value(one, at)
        requirements.append(equals(rename(key), one))
    at = (*place, "matchExpressions")
    for n, expression in enumerate(sections(found.get("matchExpressions"), at)):
        requirements.append(_expression(expression, (*at, n), rename))
    return requirements


def _expression(
    expression: Mapping[str, Any], place: Place, rename: Callable[[str], str]
) -> Requirement:
    known(expression, place, ("key", "operator", "values"))
    key = text(expression.get("key"), (*place, "key"))
    check_key(key, (*place, "key"), rename)
    operator = choice(expression.get("operator"), (*place, "operator"), OPERATORS)
    at = (*place, "values")
    values = expression.get("values") or []
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise refuse(at, f"must be a list of strings, is {brief(values)}")
    for one in values:
        check_value(one, at)
    if operator in (IN, NOT_IN) and not values:
        raise refuse(at, f"operator {operator} needs at least one value")
    if operator in (EXISTS, ABSENT) and values:
        raise refuse(at, f"operator {operator} takes no values")
    return Requirement(rename(key), operator, tuple(sorted(set(values))))


def known(value: Mapping[str, Any], place: Place, fields: Iterable[str]) -> None:
    """Raise ManifestError for a field that is none of these: a misspelt one would be lost."""
    for name in value:
        if name not in fields:
            raise refuse((*place, str(name)), f"unknown field; known are {', '.join(fields)}")


def check_key(key: str, place: Place, rename: Callable[[str], str]) -> None:
    """Raise ManifestError for a label key that the API server would not take."""
    sourced = _SOURCE.fullmatch(key) if rename is cilium_key else None
    if not _KEY.fullmatch(sourced[2] if sourced else key):
        raise refuse(place, f"{brief(key)} is not a label key")


def check_value(value: str, place: Place) -> None:
    """Raise ManifestError for a label value that the API server would not take."""
    if not _VALUE.fullmatch(value):
        raise refuse(place, f"{brief(value)} is not a label value")
