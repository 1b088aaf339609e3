"""An answer, judged: does it fit a query, and what does it teach?

Rule: an answer teaches where its connection's rules have rules.dns, and nowhere else: else a pod
without policies could have a server of its own say where another pod may go.

Theory. As judge_query, on a message and a connection's record. All addresses that the question
leads to become the name's that was asked for, never a CNAME's (Cilium: pkg/fqdn). An address lives
as long as its TTL says, or `least_s`, and `grace_s` more; at most a week (RFC 8767 4).
"""

import numpy as np

from dataplane.kernels import dns_message as m
from dataplane.kernels.connections import TICK_SHIFT, since
from dataplane.kernels.dns_count import pod_row
from dataplane.kernels.dns_learned import (
    ADDRESSES_FULL,
    CONTENDED,
    NAME_CAPPED_NOW,
    NAMES_FULL,
    NEW,
    RENEWED,
    learn,
    scope_of,
)
from dataplane.kernels.dns_names import find_name, hash_ends, make_name
from dataplane.kernels.dns_queries import NONE, free_query, take_query
from dataplane.kernels.dns_tell import tell_answer
from dataplane.kernels.house import inline, load16be
from dataplane.kernels.naming import ADDRESSES_MOST, S_HASHES, S_NAME, S_OFFSETS
from dataplane.kernels.policy import NAMES
from xdp.abi import CONST

LIFE_MOST_S = 7 * 86400
EVENT_LEARNED, EVENT_TRUNCATED = CONST["EVENT_LEARNED"], CONST["EVENT_TRUNCATED"]
ONE = np.uint64(1)

# What is to be done with an answer: the lowest byte of a packed result.
PASS, UNASKED, SHORTEN = 0, 1, 2
END_SHIFT = 16


@inline
def _expiry(n, ttl, tick):
    """Tick at which an address of this TTL is forgotten."""
    setting = n.setting[0]
    life = ttl if ttl > np.int64(setting.least_s) else np.int64(setting.least_s)
    life += np.int64(setting.grace_s)
    life = life if life < LIFE_MOST_S else np.int64(LIFE_MOST_S)
    return tick + ((life * 1_000_000_000) >> TICK_SHIFT) + 1


@inline
def _count(c, result):
    notes = c.dns_notes[0]
    if result == NEW:
        notes.learned += ONE
    elif result == RENEWED:
        notes.renewed += ONE
    elif result == ADDRESSES_FULL:
        notes.addresses_full += ONE
    elif result == NAMES_FULL:
        notes.learned += ONE
        notes.address_names_full += ONE
    elif result == NAME_CAPPED_NOW:
        notes.name_capped += ONE
    elif result == CONTENDED:
        notes.contended += ONE


@inline
def _teach(t, c, number, name, found, tick):
    """Note the addresses that were found as a name's; return EVENT_LEARNED if one is new."""
    n = t.naming
    scope = scope_of(n, np.int64(t.connections[number].source_identity))
    expiry = _expiry(n, found >> m.TTL_SHIFT, tick)
    pinned = np.int64(n.names[name].pinned_until)
    if pinned == 0 or since(expiry, pinned) > 0:
        n.names[name].pinned_until = expiry | 1  # before an address has it
    flags = np.int64(0)
    for k in range(min(found & m.FOUND_MASK, ADDRESSES_MOST)):
        one = n.found[k]
        result = learn(n, name, one.family, one.hi, one.lo, scope, tick, expiry)
        _count(c, result)
        if result == NEW or result == NAMES_FULL:
            flags = np.int64(EVENT_LEARNED)
        elif result == NAME_CAPPED_NOW:
            c.dns_notes[0].capped_hash = n.names[name].hash
    return flags


@inline
def _row(n, kept, length, labels, odd, hashed, tick):
    """Row of the name in n.scratch. kept: the one that its query had, or NOWHERE."""
    if kept >= 0 and n.names[kept].hash == hashed:
        return kept
    at = n.scratch.address + S_NAME
    row = find_name(n, at, length, hashed, tick)
    return row if row >= 0 else make_name(n, at, length, labels, odd, hashed, tick)


@inline
def judge_answer(t, c, number, message, size, whole, now, tick):
    """Judge an answer that came on a connection (record); return what is to be done, packed.

    message: memory address of the `size` bytes that are there; whole: these are all.
    """
    con = t.connections[number]
    n, names = t.naming, con.egress_rule & NAMES
    scratch = n.scratch.address
    name_at, offsets, hashes = scratch + S_NAME, scratch + S_OFFSETS, scratch + S_HASHES
    pod = pod_row(c, np.int64(con.port), np.int64(t.ports[con.port].endpoint))
    packed = m.read_question(message, size, name_at, offsets)
    head = load16be(message + m.FLAGS) if size >= m.HEADER else np.int64(0)
    if packed < 0 or not head & m.QR:
        c.dns_pods[pod].malformed += ONE
        return np.int64(UNASKED)
    end, length = packed & m.END_MASK, (packed >> m.LENGTH_SHIFT) & 0xFFFF
    labels, odd = (packed >> m.LABELS_SHIFT) & 0xFF, packed >> m.ODD_SHIFT
    hashed = hash_ends(name_at, offsets, labels, n.setting[0].seed, hashes)
    query = take_query(
        n.queries, number, np.int64(con.hash), load16be(message + m.ID), load16be(message + end),
        hashed,
    )  # fmt: skip
    if query == NONE:
        c.dns_pods[pod].unasked += ONE
        return np.int64(UNASKED)
    latency = now - np.int64(n.queries[query].sent_ns)
    name = np.int64(n.queries[query].name) - 1
    free_query(n.queries, query)
    name = _row(n, name, length, labels, odd, hashed, tick)
    flags, found = np.int64(0), np.int64(m.MALFORMED)
    shorten = names != 0 and not whole
    if shorten:
        flags = np.int64(EVENT_TRUNCATED)
        c.dns_pods[pod].shortened += ONE
    elif head & (m.OPCODE | m.RCODE) == 0:
        records = load16be(message + m.ANSWERS)
        found = m.addresses(
            message, size, end + m.QUESTION_TAIL, records, np.int64(m.HEADER), n.found,
            np.int64(ADDRESSES_MOST),
        )  # fmt: skip
        if found < 0 and whole:
            c.dns_pods[pod].malformed += ONE
        if names and found & m.FOUND_MASK and found >= 0:
            if name >= 0:
                flags |= _teach(t, c, number, name, found, tick)
            else:
                c.dns_notes[0].names_full += ONE
    tell_answer(t, c, number, pod, name, message, end, length, latency, found, flags, now)
    return np.int64(SHORTEN | (end + m.QUESTION_TAIL) << END_SHIFT if shorten else PASS)
