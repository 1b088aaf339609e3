"""Names over time: addresses whose time is over, queries without an answer, what connections use.

Rule: runs on a thread of its own beside the workers, and takes a row only as they do, by making it
CLAIMED.

Theory. Nothing of this costs a packet. An address whose names have all expired is forgotten, unless
a connection that was let through by one of them was seen lately: `mark` goes over the connections
for that, often enough that no live one is missed (Cilium marks its zombies when it collects
connections). A query counts as missing once, after MISSING_NS, and is forgotten later, so a late
answer still fits; its row of names tells which one it was, if that still is the same name's.
"""

import numpy as np

from dataplane.kernels.connections import CLAIMED, FREE, LIVE, OWNER, RECORD, since
from dataplane.kernels.dns_count import (
    EVENTS_MASK,
    begin_event,
    end_event,
    pod_row,
    server_row,
    set_text,
)
from dataplane.kernels.dns_learned import (
    LEARNED,
    LEARNED_WORD,
    NAMES_MOST,
    find_address,
    forget_pair,
    is_valid,
    learn,
    scope_of,
)
from dataplane.kernels.dns_learned import OWNER as LEARNED_OWNER
from dataplane.kernels.dns_names import NAME, NAME_TEXT, name_of
from dataplane.kernels.dns_queries import QUERY
from dataplane.kernels.dns_tell import MISSING, N_MISSING
from dataplane.kernels.house import (
    add32,
    inline,
    kernel,
    load32_acquire,
    prefetch,
    store32_release,
    swap32,
)
from dataplane.kernels.naming import give_word
from xdp.abi import CONST

MISSING_NS = 5_000_000_000  # what resolvers wait for an answer (resolv.conf(5), timeout)
FORGET_NS = 60_000_000_000
QUERIES = CONST["QUERIES_MAX"]
ONE, ZERO = np.uint64(1), np.uint64(0)


@inline
def _expire(n, number, tick):
    """Forget the names of a row that have expired; return (forgotten, kept, whether none is left).

    The row is ours.
    """
    gone = kept = left = 0
    for k in range(NAMES_MOST):
        if n.learned[number].tags[k] == 0:
            continue
        if not is_valid(n, number, k, tick):
            forget_pair(n, number, k)
            gone += 1
            continue
        left += 1
        if since(tick, np.int64(n.learned[number].expiry[k])) >= 0:
            kept += 1
    return gone, kept, left == 0


@kernel
def expire(n, notes, rows, count, tick):
    """Forget what has expired of so many rows of learned addresses. rows: Rows of int64."""
    kept = 0
    for at in range(count):
        number = rows[at]
        owner = n.learned.address + number * LEARNED + LEARNED_OWNER
        if load32_acquire(owner) != LIVE or not swap32(owner, LIVE, CLAIMED):
            continue  # a worker is at it; the next time then
        gone, more, empty = _expire(n, number, tick)
        kept += more
        notes[0].expired += np.uint64(gone)
        if empty:
            give_word(n.learned_index.address, number)
        store32_release(owner, FREE if empty else LIVE)
    notes[0].kept = np.uint64(kept)


@kernel
def mark(n, connections, first, end, tick):
    """Note which addresses the live connections first..end-1 use that were let through by name."""
    for number in range(first, end):
        record = connections.address + number * RECORD
        prefetch(record + 8 * RECORD + OWNER)
        con = connections[number]
        if load32_acquire(record + OWNER) != LIVE or not con.egress_rule & LEARNED_WORD:
            continue
        family = np.int64(con.reply_word & np.uint64(0xFF))
        scope = scope_of(n, np.int64(con.source_identity))
        row = find_address(n, family, con.reply_source_hi, con.reply_source_lo, scope)
        if row >= 0:
            n.learned[row].used = tick | 1


@inline
def _tell(t, c, number, now):
    """Count a query that has no answer, and tell of it."""
    n = t.naming
    query = n.queries[number]
    con = t.connections[query.connection]
    pod = pod_row(c, np.int64(query.port), np.int64(t.ports[query.port].endpoint))
    c.dns_pods[pod].missing += ONE
    server = server_row(c.dns_servers, query.server_hi, query.server_lo)
    c.dns_servers[server].missing += ONE
    event = begin_event(c.dns_events, c.dns_notes)
    row = c.dns_events[event & EVENTS_MASK]
    row.time_ns, row.latency_ns = now, now - np.int64(query.sent_ns)
    row.client_hi = row.client_lo = ZERO
    row.verdict = row.identity = row.client_port = row.server_port = 0
    if np.int64(con.hash) == np.int64(query.tuple):  # else the record is another's by now
        row.client_hi, row.client_lo = con.source_hi, con.source_lo
        row.verdict, row.identity = con.egress_rule, con.source_identity
        row.client_port = np.int64(con.word >> np.uint64(48))
        row.server_port = np.int64(con.reply_word >> np.uint64(48))
    row.server_hi, row.server_lo = query.server_hi, query.server_lo
    row.endpoint, row.port = t.ports[query.port].endpoint, query.port
    row.type, row.id, row.kind, row.rcode, row.ttl = query.type, query.id, MISSING, 0, 0
    row.family = 6 if query.server_hi != ZERO or query.server_lo >> np.uint64(32) else 4
    row.flags = row.address_count = row.cnames = 0
    row.length = 0
    name = np.int64(query.name) - 1
    if name >= 0 and n.names[name].hash == query.question:
        at = n.names.address + name * NAME
        add32(at + N_MISSING, 1)
        set_text(c.dns_events, event, at + NAME_TEXT, np.int64(n.names[name].length))
    end_event(c.dns_events, c.dns_notes, event)


@kernel
def look_for_missing(t, c, now):
    """Count the queries that wait for too long; forget the oldest. c: counters of DNS, a lane."""
    queries = t.naming.queries
    for number in range(QUERIES):
        query = queries[number]
        age = now - np.int64(query.sent_ns)
        if query.owner != LIVE or age < MISSING_NS or (query.missed and age < FORGET_NS):
            continue
        owner = queries.address + number * QUERY
        if not swap32(owner, LIVE, CLAIMED):
            continue
        if not query.missed and now - np.int64(query.sent_ns) >= MISSING_NS:
            query.missed = 1
            _tell(t, c, number, now)
        store32_release(owner, FREE if age >= FORGET_NS else LIVE)


@kernel
def plant(n, length, labels, odd, family, hi, lo, scope, tick, expiry):
    """Note that the name in n.scratch leads to an address, as a snapshot says; False: no room."""
    name = name_of(n, length, labels, odd, tick)
    if name < 0:
        return False
    pinned = np.int64(n.names[name].pinned_until)
    if pinned == 0 or since(expiry, pinned) > 0:
        n.names[name].pinned_until = expiry | 1
    return learn(n, name, family, hi, lo, scope, tick, expiry) <= 1
