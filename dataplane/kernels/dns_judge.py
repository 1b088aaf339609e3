"""A query, judged: may it go on?

Rule: where names count, what cannot be read is answered, never let through.

Theory. Works on a message and the record of its connection, so it serves packets and the proxy
alike. Which names a policy allows is asked with each query, by the row and the rules of now: a
change of the policy holds for the next query of a connection that has long been open.
"""

import numpy as np

from dataplane.kernels import dns_message as m
from dataplane.kernels.dns_allow import may_ask, shorter_name
from dataplane.kernels.dns_count import pod_row
from dataplane.kernels.dns_lead import server_of
from dataplane.kernels.dns_learned import scope_of
from dataplane.kernels.dns_names import SELECTORS, name_of, refresh, select
from dataplane.kernels.dns_queries import AGAIN, DISPLACED, note_query
from dataplane.kernels.dns_tell import tell_query, tell_refusal
from dataplane.kernels.house import inline, load16be, load64
from dataplane.kernels.naming import S_HASHES, S_NAME, S_OFFSETS
from dataplane.kernels.policy import NAMES_ONLY
from dataplane.kernels.route import peer_of
from dataplane.kernels.verdict import AUDIT, BY_NAMES, in_cluster
from xdp.abi import CONST

NXDOMAIN_FLAG = CONST["NAMING_NXDOMAIN"]
EVENT_AUDITED = CONST["EVENT_AUDITED"]
ONE = np.uint64(1)

# What is to be done with a query: the lowest byte of a packed result.
PASS, PASS_AUDITED, REFUSE, DROP = 0, 1, 2, 3
RCODE_SHIFT, END_SHIFT = 8, 16


@inline
def _answer(rcode, end):
    return np.int64(REFUSE | rcode << RCODE_SHIFT | end << END_SHIFT)


@inline
def _allowed(t, number, name, count, tick):
    """Whether the policy of a connection's pod lets it ask its server for a name."""
    con = t.connections[number]
    row = np.int64(t.subjects[con.port].policy)
    policy = t.policies[row]
    family = np.int64(con.word & np.uint64(0xFF))
    hi, lo, port = server_of(t, number)
    peer = t.peers[peer_of(t, family, hi, lo)]
    by_names = policy.flags & BY_NAMES != 0 and not in_cluster(peer)
    scope = scope_of(t.naming, np.int64(con.source_identity))
    protocol = np.int64(con.word >> np.uint64(8)) & 0xFF
    return may_ask(
        t.naming, t.policy_entries.address, row, np.int64(policy.egress_depths),
        np.int64(policy.egress_wide_depths), np.int64(policy.egress_any_depths), peer.groups,
        by_names, family, hi, lo, scope, protocol, port, name, count, tick,
    )  # fmt: skip


@inline
def _refusal(t, number, length, labels, tick):
    """Rcode for a name that is not allowed and stands in n.scratch."""
    if t.naming.setting[0].flags & NXDOMAIN_FLAG:
        return np.int64(m.NXDOMAIN)
    for step in range(3):
        shorter = shorter_name(t.naming, length, labels, step)
        if shorter and _allowed(t, number, np.int64(-1), shorter >> 32, tick):
            return np.int64(m.NXDOMAIN)
    return np.int64(m.REFUSED)


@inline
def _selectors(n, c, name, labels, odd):
    """How many selectors a name has that stands in n.scratch, with its row of names or without."""
    if name < 0:
        c.dns_notes[0].names_full += ONE
        scratch = n.scratch.address
        at, offsets, hashes = scratch + S_NAME, scratch + S_OFFSETS, scratch + S_HASHES
        return select(n, at, offsets, labels, hashes) if not odd else np.int64(0)
    count = refresh(n, name)
    if count > SELECTORS:
        c.dns_notes[0].selectors_full += ONE
    return count


@inline
def judge_query(t, c, number, message, size, now, tick):
    """Judge the query of a connection (record); return what is to be done, packed as above.

    message: memory address of `size` bytes; now: ns; tick: the same in ticks.
    """
    con = t.connections[number]
    n, only = t.naming, con.egress_rule & NAMES_ONLY
    scratch = n.scratch.address
    pod = pod_row(c, np.int64(con.port), np.int64(t.ports[con.port].endpoint))
    packed = m.read_question(message, size, scratch + S_NAME, scratch + S_OFFSETS)
    if packed < 0 or load16be(message + m.FLAGS) & m.QR:
        c.dns_pods[pod].malformed += ONE
        if not only:
            return np.int64(PASS)
        return _answer(m.FORMERR, m.HEADER) if size >= m.HEADER else np.int64(DROP)
    end, length = packed & m.END_MASK, (packed >> m.LENGTH_SHIFT) & 0xFFFF
    labels, odd = (packed >> m.LABELS_SHIFT) & 0xFF, packed >> m.ODD_SHIFT
    name = name_of(n, length, labels, odd, tick)
    asked = np.uint64(load64(scratch + S_HASHES))
    count = _selectors(n, c, name, labels, odd)
    flags = np.int64(0)
    if only and not _allowed(t, number, name, count, tick):
        if not t.policies[t.subjects[con.port].policy].flags & AUDIT:
            rcode = _refusal(t, number, length, labels, tick)
            tell_refusal(t, c, number, pod, name, message, end, length, rcode, now)
            return _answer(rcode, end + m.QUESTION_TAIL)
        flags = np.int64(EVENT_AUDITED)
    hi, lo, _ = server_of(t, number)
    noted = note_query(
        n.queries, number, np.int64(con.hash), load16be(message + m.ID), load16be(message + end),
        asked, now, name, np.int64(con.port), hi, lo,
    )  # fmt: skip
    if noted == DISPLACED:
        c.dns_notes[0].queries_displaced += ONE
    tell_query(t, c, number, pod, name, message, end, length, noted == AGAIN, flags, now)
    return np.int64(PASS_AUDITED if flags else PASS)
