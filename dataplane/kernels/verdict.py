"""What the policies of both ends say of a connection.

Rule: both ends on this node are asked, the sender's policy about the receiver and the receiver's
about the sender; each answer names its rule.

Theory. An end is a local pod when the route to its address leads to a pod's port. The sender's
policy sees the backend that a service has chosen, not the service (Kubernetes leaves this open;
Cilium and kube-proxy do it so), and the receiver's policy sees the sender before masquerading. ICMP
is judged by its type, which stands in the place of the port. A source that came through the tunnel
and is not known here yet counts as what its VNI says, where identities are allocated for the whole
cluster. Where no rule about addresses decides, those about names may (rules toFQDNs): the address
may be one that an answer of DNS has led to.
"""

from typing import NamedTuple

import numpy as np

from dataplane.kernels import policy
from dataplane.kernels.dns_learned import ask_names, scope_of
from dataplane.kernels.house import inline
from dataplane.kernels.route import lookup, peer_of
from xdp.abi import CONST, value

ADJACENCY_POD = value("ADJACENCY_POD")
POLICY_DENIED = value("REASON_POLICY_DENIED")
DENIED_BY_RULE = value("REASON_POLICY_DENIED_BY_RULE")
NOT_READY = value("REASON_ENDPOINT_NOT_READY")
AUDIT = CONST["POLICY_AUDIT"]
POLICY_HAIRPIN = CONST["NODE_POLICY_HAIRPIN"]
BY_NAMES = CONST["POLICY_FQDN"]
UNMANAGED = value("IDENTITY_UNMANAGED")
IDENTITIES_MAX = CONST["IDENTITIES_MAX"]
RESTRICTED = CONST["POLICY_NAMES"] | CONST["POLICY_NAMES_ONLY"]
KNOWN = CONST["PEER_HOST"] | CONST["PEER_REMOTE_NODE"] | CONST["PEER_POD"]


class Verdict(NamedTuple):
    """Answer about a connection. reason: 0 it may pass, else enum reason; `word` says by what."""

    reason: int
    word: int
    egress: int  # verdict words, 0: nobody to ask
    ingress: int
    audited: bool
    source: int  # rows of the peer table
    target: int


@inline
def source_peer(t, kind, hi, lo, identity):
    """Row of the peer table of a source; identity: as the tunnel's VNI says, 0: it does not."""
    row = peer_of(t, kind, hi, lo)
    if 0 < identity < IDENTITIES_MAX and not t.peers[row].flags & KNOWN:
        told = np.int64(t.identity_peers[identity])
        if told:
            return told
    return row


@inline
def in_cluster(peer):
    """Whether a row of peers is of the cluster: names do not lead there, whatever DNS says."""
    return peer.flags & KNOWN != 0 or peer.identity == UNMANAGED


@inline
def _egress(t, row, kind, hi, lo, target, protocol, port, identity, tick):
    """Verdict word of policy `row`, of a pod of this identity, for a peer (row) at an address."""
    rules = t.policies[row]
    word = policy.egress(t, row, t.peers[target].groups, protocol, port)
    if not rules.flags & BY_NAMES or in_cluster(t.peers[target]):
        return word
    allowed = policy.allows(word)
    if word & RESTRICTED == 0 if allowed else word != np.int64(rules.egress_otherwise):
        return word
    found = ask_names(
        t.naming, t.policy_entries.address, kind, hi, lo, scope_of(t.naming, identity), row,
        protocol, port, np.int64(rules.egress_depths), np.int64(0), tick,
    )  # fmt: skip
    if found == 0:
        return word
    return policy.both(word if allowed else np.int64(0), found)


@inline
def _reason(word, otherwise):
    if word == 0:
        return NOT_READY
    return POLICY_DENIED if word == otherwise else DENIED_BY_RULE


@inline
def judge_both(
    t, kind, source_hi, source_lo, target_hi, target_lo, protocol, port, identity, tick
):  # fmt: skip
    """Return the Verdict about a connection. port: the target's, or the ICMP type."""
    source = source_peer(t, kind, source_hi, source_lo, identity)
    target = peer_of(t, kind, target_hi, target_lo)
    sender = t.adjacencies[lookup(t, kind, source_hi, source_lo)]
    receiver = t.adjacencies[lookup(t, kind, target_hi, target_lo)]
    from_pod, to_pod = sender.kind == ADJACENCY_POD, receiver.kind == ADJACENCY_POD
    egress = ingress = np.int64(0)
    reason = word = np.int64(0)
    audited = False
    if from_pod and to_pod and sender.port == receiver.port:
        if not t.node[0].flags & POLICY_HAIRPIN and t.subjects[sender.port].policy:
            return Verdict(reason, word, egress, ingress, audited, source, target)
    if from_pod:
        row = np.int64(t.subjects[sender.port].policy)
        own = np.int64(t.subjects[sender.port].identity)
        egress = _egress(
            t, row, kind, target_hi, target_lo, target, protocol, port, own, tick
        )  # fmt: skip
        if not policy.allows(egress):
            reason = _reason(egress, np.int64(t.policies[row].egress_otherwise))
            word = egress
            audited = (t.policies[row].flags & AUDIT) != 0
    if to_pod and (reason == 0 or audited):
        row = np.int64(t.subjects[receiver.port].policy)
        ingress = policy.ingress(t, row, t.peers[source].groups, protocol, port)
        if not policy.allows(ingress):
            audits = (t.policies[row].flags & AUDIT) != 0
            if reason == 0 or not audits:
                reason = _reason(ingress, np.int64(t.policies[row].ingress_otherwise))
                word = ingress
                audited = audits
    if audited:
        reason = np.int64(0)
    return Verdict(reason, word, egress, ingress, audited, source, target)
