"""Whether a pod may ask a server for a name: rules.dns.

Rule: a name is allowed when an entry of one of its selectors stands in a chain of the server; a
name that no pattern can match is never allowed.

Theory. The entries are those of policies, with the selector's number in their match, so that the
same kinds of chains are asked as for addresses: of the server's group, of its wide group, of any
peer, and of names that led to the server. A resolver appends its search domains first
(resolv.conf(5), ndots), so a pod asks for api.example.com.shop.svc.cluster.local before
api.example.com. Where the cluster's domain and what Kubernetes puts before it are taken off such a
name and the rest is allowed, the name does not exist rather than being refused: what kube-dns would
say, and what musl and glibc need to go on to the next.
"""

import numpy as np

from dataplane.kernels.dns_learned import ask_names
from dataplane.kernels.dns_names import SELECTORS, hash_ends, select
from dataplane.kernels.house import inline, load8, load32be, outline, store8
from dataplane.kernels.naming import S_HASHES, S_NAME, S_OFFSETS
from dataplane.kernels.policy import ACTION, ALLOW, chain, group_of, wide_of
from xdp.abi import DTYPE

EGRESS = 1
SVC = 0x03737663  # a label "svc"
_fields = DTYPE["naming"].fields
assert _fields is not None
DOMAIN = int(_fields["domain"][1])


@inline
def _selector(n, name, k):
    """Selector k of a row of names, or, where there is none, of the name in n.scratch."""
    if name >= 0:
        return np.int64(n.names[name].selectors[k])
    return np.int64(n.scratch[0].selectors[k])


@outline
def may_ask(
    n, entries, row, depths, wide_depths, any_depths, groups, by_names, family, hi, lo, scope,
    protocol, port, name, count, tick,
):  # fmt: skip
    """Whether policy `row` lets its pod ask the server (family, hi, lo), which is of `groups`.

    name: row of names, or NOWHERE; count: of its selectors; by_names: the policy has rules toFQDNs
    and the server is outside the cluster.
    """
    none = np.int64(0)
    group, wide = group_of(groups), wide_of(groups)
    for k in range(min(count, SELECTORS)):
        selector = _selector(n, name, k)
        if group:
            word = chain(entries, row, group, EGRESS, protocol, port, depths, selector)
            if word & ACTION == ALLOW:
                return True
        if wide and wide_depths:
            word = chain(entries, row, wide, EGRESS, protocol, port, wide_depths, selector)
            if word & ACTION == ALLOW:
                return True
        word = chain(entries, row, none, EGRESS, protocol, port, any_depths, selector)
        if word & ACTION == ALLOW:
            return True
        if by_names and ask_names(
            n, entries, family, hi, lo, scope, row, protocol, port, depths, selector, tick
        ):
            return True
    return False


@inline
def _ends_in_domain(n, name, length):
    """Whether a name ends in the cluster's domain, and has more than that."""
    size = np.int64(n.setting[0].domain_length)
    if size == 0 or length <= size + 1:
        return False
    domain = n.setting.address + DOMAIN
    at = name + length - 1 - size
    for k in range(size):
        if load8(domain + k) != load8(at + k):
            return False
    return True


@outline
def shorter_name(n, length, labels, step):
    """Take a search domain off the name in n.scratch: labels that are left, 0: none.

    step 0: the cluster's domain; 1: with svc before it; 2: with a namespace too. The selectors of
    what is left are in n.scratch; their number is in the upper half of the result.
    """
    scratch = n.scratch.address
    name, offsets, hashes = scratch + S_NAME, scratch + S_OFFSETS, scratch + S_HASHES
    if not _ends_in_domain(n, name, length):
        return np.int64(0)
    left = labels - np.int64(n.setting[0].domain_labels)
    if step:
        if left < 1 or load32be(name + load8(offsets + left - 1)) != SVC:
            return np.int64(0)
        left -= step
    if left < 1:
        return np.int64(0)
    at = load8(offsets + left)
    kept = load8(name + at)
    store8(name + at, 0)
    hash_ends(name, offsets, left, n.setting[0].seed, hashes)
    count = select(n, name, offsets, left, hashes)
    store8(name + at, kept)
    return left | count << 32
