"""What becomes of DNS messages, told: counters of pod, server and name, and an event.

Rule: one call a message; what is told is what the connection's record says.

Theory. A query that goes on and an answer that fits one are counted for the pod and for the server
(the backend, not the service: that is who is slow); a refusal is the pod's alone. Names count by
atomic additions, since all workers share their rows.
"""

import numpy as np

from dataplane.kernels import dns_message as m
from dataplane.kernels.dns_count import (
    EVENT_ADDRESSES,
    EVENTS_MASK,
    begin_event,
    count_answer,
    count_kind,
    count_query,
    end_event,
    kind_of,
    server_row,
    set_text,
)
from dataplane.kernels.dns_lead import server_of
from dataplane.kernels.house import add32, inline, load16be
from dataplane.kernels.naming import S_NAME
from xdp.abi import CONST, DTYPE, value

TRUNCATED, TCP = CONST["EVENT_TRUNCATED"], CONST["EVENT_TCP"]
QUERY, ANSWER = value("DNS_EVENT_QUERY"), value("DNS_EVENT_ANSWER")
REFUSED, MISSING = value("DNS_EVENT_REFUSED"), value("DNS_EVENT_MISSING")
PROTOCOL_TCP = 6
NAME = DTYPE["name"].itemsize
_fields = DTYPE["name"].fields
assert _fields is not None
N_QUERIES, N_ANSWERS, N_REFUSED, N_FAILURES, N_MISSING = (
    int(_fields[field][1]) for field in ("queries", "answers", "refused", "failures", "missing")
)
ONE, HALF = np.uint64(1), np.uint64(32)


@inline
def _event(t, c, number, kind, message, end, length, now):
    """Begin the event of a message; return its number."""
    con = t.connections[number]
    event = begin_event(c.dns_events, c.dns_notes)
    row = c.dns_events[event & EVENTS_MASK]
    hi, lo, port = server_of(t, number)
    row.time_ns, row.latency_ns = now, 0
    row.client_hi, row.client_lo = con.source_hi, con.source_lo
    row.server_hi, row.server_lo = hi, lo
    row.verdict, row.identity = con.egress_rule, con.source_identity
    row.endpoint, row.port = t.ports[con.port].endpoint, con.port
    row.client_port, row.server_port = np.int64(con.word >> np.uint64(48)), port
    row.type = load16be(message + end)
    row.id = load16be(message + m.ID)
    row.kind, row.rcode, row.ttl = kind, 0, 0
    row.family = np.int64(con.word & np.uint64(0xFF))
    row.flags = TCP if np.int64(con.word >> np.uint64(8)) & 0xFF == PROTOCOL_TCP else 0
    row.address_count = row.cnames = 0
    set_text(c.dns_events, event, t.naming.scratch.address + S_NAME, length)
    return event


@inline
def _add(t, name, field):
    if name >= 0:
        add32(t.naming.names.address + name * NAME + field, 1)


@inline
def tell_query(t, c, number, pod, name, message, end, length, again, flags, now):
    """Tell of a query that goes on. name: row of names or NOWHERE; flags: EVENT_*."""
    hi, lo, _ = server_of(t, number)
    kind = load16be(message + end)
    count_query(c.dns_pods, pod, kind, again)
    count_query(c.dns_servers, server_row(c.dns_servers, hi, lo), kind, again)
    count_kind(c.dns_kinds, pod, kind_of(QUERY, kind, 0, 0, 0, 0))
    _add(t, name, N_QUERIES)
    event = _event(t, c, number, QUERY, message, end, length, now)
    c.dns_events[event & EVENTS_MASK].flags |= flags
    end_event(c.dns_events, c.dns_notes, event)


@inline
def tell_refusal(t, c, number, pod, name, message, end, length, rcode, now):
    """Tell of a query that is answered here."""
    c.dns_pods[pod].refused += ONE
    count_kind(c.dns_kinds, pod, kind_of(REFUSED, load16be(message + end), rcode, 0, 0, 0))
    _add(t, name, N_REFUSED)
    event = _event(t, c, number, REFUSED, message, end, length, now)
    c.dns_events[event & EVENTS_MASK].rcode = rcode
    end_event(c.dns_events, c.dns_notes, event)


@inline
def tell_answer(t, c, number, pod, name, message, end, length, latency, found, flags, now):
    """Tell of an answer that fits a query; found: packed as of m.addresses, or MALFORMED."""
    hi, lo, _ = server_of(t, number)
    head = load16be(message + m.FLAGS)
    rcode = head & m.RCODE
    truncated = (head & m.TC) != 0 or flags & TRUNCATED != 0
    count_answer(c.dns_pods, pod, rcode, truncated, latency)
    count_answer(c.dns_servers, server_row(c.dns_servers, hi, lo), rcode, truncated, latency)
    _add(t, name, N_ANSWERS)
    if name >= 0:
        t.naming.names[name].latency_ns += np.uint64(latency)
    if rcode != m.NOERROR:
        _add(t, name, N_FAILURES)
    event = _event(t, c, number, ANSWER, message, end, length, now)
    row = c.dns_events[event & EVENTS_MASK]
    row.latency_ns, row.rcode = latency, rcode
    row.flags |= flags | (TRUNCATED if truncated else 0)
    count, cnames, six = np.int64(0), np.int64(0), np.int64(0)
    if found >= 0:
        count, cnames = found & m.FOUND_MASK, (found >> m.CNAMES_SHIFT) & 0xFF
        row.address_count, row.cnames = min(count, 255), cnames
        row.ttl = found >> m.TTL_SHIFT if count else 0
        for k in range(min(count, EVENT_ADDRESSES)):
            c.dns_events[event & EVENTS_MASK].hi[k] = t.naming.found[k].hi
            c.dns_events[event & EVENTS_MASK].lo[k] = t.naming.found[k].lo
        if count and (t.naming.found[0].hi or t.naming.found[0].lo >> HALF):
            six = np.int64(1)
    key = kind_of(ANSWER, load16be(message + end), rcode, min(count, 255), cnames, six)
    count_kind(c.dns_kinds, pod, key)
    end_event(c.dns_events, c.dns_notes, event)
