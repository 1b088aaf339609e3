"""What `penstock policy lint` can say.

Rule: each code has one severity and one text, here; codes are stable words for scripts.

Theory. A warning is most likely not what was meant, an info may well be.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dataplane.objects.policies import Policy

WARNING, INFO = "warning", "info"

TEXTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "selects-no-pod": (WARNING, "selects no pod ({}){}"),
        "host-network": (
            WARNING,
            "selects pod {}/{}, which is of the host network: policies do not concern it",
        ),
        "no-dns": (
            WARNING,
            "isolates egress of {}, and no policy of it allows port 53/udp: names cannot be "
            "resolved; allow it to kube-dns",
        ),
        "audit-beside-enforced": (
            INFO,
            "is audited, but {} is enforced for {}: there it denies and counts nothing, its "
            "allowances hold",
        ),
        "fits-nothing": (INFO, "has no {}: it isolates, but nothing fits it"),
        "sctp-only": (
            INFO,
            "is about SCTP only; the policy isolates its pods for TCP and UDP as well",
        ),
        "denies-own-node": (
            WARNING,
            "denies also the pod's own node: kubelet's probes fail; a deny rule is stronger than "
            "the allowance for it",
        ),
        "service-without-endpoints": (WARNING, "means {}, which has no endpoints: it fits nothing"),
        "or-not-and": (
            WARNING,
            "means ({}) OR ({}): namespaceSelector and podSelector stand in two elements of the "
            "list; in one element (without the second dash) they mean AND",
        ),
        "unknown-source": (WARNING, "asks for {}: labels of pods have the source k8s, no other"),
        "peer-selects-nothing": (WARNING, "selects no pod as a peer ({})"),
        "block-misses-pods": (
            INFO,
            "{} contains {}: pods and nodes are not meant (policy.cidr_match is cilium); select "
            "them by labels",
        ),
        "block-covers-pods": (
            INFO,
            "{} {} {}, too: except the cluster's networks, if only the world is meant",
        ),
        "no-such-port": (WARNING, "no {} has a port {}: it fits nothing"),
        "shadowed": (INFO, "says no more than {}"),
        "defeated": (WARNING, "never allows anything: {} denies all of it"),
        "not-compared": (
            INFO,
            "{} rules of {} in namespace {}: more than {} are not compared with each other",
        ),
    }
)
"""Code -> severity and text."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One surprise."""

    severity: str
    code: str
    policy: str
    rule: str
    text: str

    def plain(self) -> dict[str, str]:
        """Return it as JSON types."""
        return {name: getattr(self, name) for name in self.__slots__}


def finding(policy: Policy | None, rule: str, code: str, *values: object) -> Finding:
    """Return the finding of a code. rule: such as ingress[0]; values: for its text."""
    severity, text = TEXTS[code]
    return Finding(severity, code, str(policy or ""), rule, text.format(*values))
