"""Labels of identities, and the numbers that follow from them.

Rule: a pod cannot choose the labels that its cluster gives it: namespace, namespace labels, service
account.

Theory. An identity is a set of labels with sources, as Cilium has it. Policies may ask for every
label of a pod; its number follows from the security-relevant ones (Cilium's default filter,
pkg/labelsfilter), so that a label that differs from pod to pod, such as pod-template-hash, does not
make a number for each. Without an allocator the number is a hash of these labels, the same on every
node: 24 bits fit the VNI. Two sets of labels may share a number; verdicts do not suffer, since they
go by address (decision 7).
"""

import hashlib
from collections.abc import Mapping
from functools import lru_cache

from dataplane.objects.cilium_words import CLUSTER_NAME
from dataplane.objects.core import Namespace, Pod
from dataplane.objects.selectors import (
    CLUSTER,
    NAMESPACE,
    NAMESPACE_LABELS,
    RESERVED,
    SERVICE_ACCOUNT,
)
from xdp.abi import value

Labels = Mapping[str, str]

HASHED_FIRST, HASHED_END = value("IDENTITY_HASHED_FIRST"), value("IDENTITY_CIDR_FIRST")
NAMESPACE_NAME = "kubernetes.io/metadata.name"
_GIVEN = tuple(key.removeprefix("k8s:") for key in (NAMESPACE, SERVICE_ACCOUNT, CLUSTER))
_GIVEN_PREFIX = NAMESPACE_LABELS.removeprefix("k8s:")

_RELEVANT = (
    "io.kubernetes.pod.namespace", "io.cilium.k8s.namespace.labels", "app.kubernetes.io",
    "io.cilium.k8s.policy.cluster", "io.cilium.k8s.policy.serviceaccount",
)  # fmt: skip
_IRRELEVANT = (
    "io.kubernetes", "kubernetes.io", "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index", "batch.kubernetes.io/job-completion-index", "k8s.io",
    "pod-template-generation", "pod-template-hash", "controller-revision-hash", "annotation",
    "etcd_node",
)  # fmt: skip


def reserved(*names: str) -> Labels:
    """Return the labels of a reserved identity."""
    return {RESERVED + name: "" for name in names}


def namespace_labels(name: str, namespace: Namespace | None) -> dict[str, str]:
    """Return what all pods of a namespace have; one without an object has its name as label."""
    labels = namespace.labels if namespace else {NAMESPACE_NAME: name}
    found = {NAMESPACE_LABELS + key: one for key, one in labels.items()}
    found[NAMESPACE] = name
    found[CLUSTER] = CLUSTER_NAME
    return found


def pod_labels(pod: Pod, given: Labels) -> dict[str, str]:
    """Return the labels of a pod; given: namespace_labels()."""
    found = {f"k8s:{key}": one for key, one in pod.labels.items() if not _is_given(key)}
    found[SERVICE_ACCOUNT] = pod.service_account or "default"
    found.update(given)
    return found


def unknown_labels(given: Labels) -> dict[str, str]:
    """Return what is known of a pod whose object is not there yet."""
    return {**reserved("init"), **given}


def _is_given(key: str) -> bool:
    return key in _GIVEN or key.startswith(_GIVEN_PREFIX)


def is_unknown(key: str) -> bool:
    """Return whether a label of an unknown pod may have any value, or none."""
    if not key.startswith("k8s:"):
        return False
    return key == SERVICE_ACCOUNT or not _is_given(key[4:])


def relevant(labels: Labels) -> dict[str, str]:
    """Return the security-relevant labels."""
    return {key: one for key, one in labels.items() if _is_relevant(key)}


@lru_cache(1 << 14)
def _is_relevant(key: str) -> bool:
    source, _, bare = key.partition(":")
    if source != "k8s":
        return True
    taken = max((len(prefix) for prefix in _RELEVANT if bare.startswith(prefix)), default=0)
    left = min((len(prefix) for prefix in _IRRELEVANT if bare.startswith(prefix)), default=0)
    if "beta.kubernetes.io" in bare:
        left = left or len(bare)
    return taken > left or not left


def hashed(labels: Labels) -> int:
    """Return the number of a set of labels, the same everywhere, for ever."""
    text = "\n".join(f"{key}={one}" for key, one in sorted(labels.items()))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return HASHED_FIRST + int.from_bytes(digest, "big") % (HASHED_END - HASHED_FIRST)
