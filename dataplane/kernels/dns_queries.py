"""Queries that wait for their answer.

Rule: an answer counts only if it fits a query: the same connection, so the same addresses and ports
at both ends, the same id, the same question.

Theory. A set-associative table by connection and id. The connection is named by its record and the
hash of its tuple, since records are used again; a new backend is a new connection, so the server is
the one that was asked. The same query again while it waits is a retry: the time of the first one
counts, since that is what a client has waited. A full set forgets who has waited longest. The
sweeper counts those without an answer as missing once, and forgets them later, so that a late
answer still fits.
"""

import numpy as np

from dataplane.kernels.connections import CLAIMED, FREE, LIVE
from dataplane.kernels.house import inline, load32_acquire, outline, store32_release, swap32
from xdp.abi import CONST, DTYPE

QUERY = DTYPE["dns_query"].itemsize
WAYS = CONST["QUERY_WAYS"]
SETS_MASK = CONST["QUERIES_MAX"] // WAYS - 1
MIX = np.uint64(0x9E3779B97F4A7C15)
SHIFT = np.uint64(32)
LONG = 1 << 62
FRESH, AGAIN, DISPLACED = 0, 1, 2  # what became of a query
NONE = -1


@inline
def _first(connection, number):
    """First row of the set of a connection and an id."""
    h = np.uint64((connection << 16) | number) * MIX
    h ^= h >> SHIFT
    return (np.int64(h) & SETS_MASK) * WAYS


@inline
def _is(query, connection, tuple_hash, number, kind, question):
    return (
        query.connection == connection
        and query.tuple == tuple_hash
        and query.id == number
        and query.type == kind
        and query.question == question
    )


@outline
def note_query(queries, connection, tuple_hash, number, kind, question, now, name, port, hi, lo):
    """Note a query. queries: Rows of dns_query; question: hash, uint64; hi, lo: the server's.

    name: row of names, NOWHERE: none. Returns FRESH, AGAIN or DISPLACED (another was forgotten).
    """
    first = _first(connection, number)
    chosen, oldest, result = first, np.int64(LONG), np.int64(DISPLACED)
    for way in range(WAYS):
        query = queries[first + way]
        if query.owner == FREE:
            chosen, oldest, result = first + way, np.int64(-1), np.int64(FRESH)
        elif _is(query, connection, tuple_hash, number, kind, question):
            query.retries = min(query.retries + 1, 255)
            return np.int64(AGAIN)
        elif np.int64(query.sent_ns) < oldest:
            chosen, oldest = first + way, np.int64(query.sent_ns)
    owner = queries.address + chosen * QUERY
    if not swap32(owner, load32_acquire(owner), CLAIMED):
        return np.int64(DISPLACED)  # of two workers' queries one is forgotten
    query = queries[chosen]
    query.connection, query.tuple = connection, tuple_hash
    query.id, query.type, query.question = number, kind, question
    query.sent_ns, query.name, query.port = now, name + 1, port
    query.server_hi, query.server_lo = hi, lo
    query.retries = query.missed = 0
    store32_release(owner, LIVE)
    return result


@outline
def take_query(queries, connection, tuple_hash, number, kind, question):
    """Row of the query that an answer fits, which is CLAIMED now; NONE: it fits none."""
    first = _first(connection, number)
    for way in range(WAYS):
        owner = queries.address + (first + way) * QUERY
        query = queries[first + way]
        if load32_acquire(owner) != LIVE:
            continue
        if _is(query, connection, tuple_hash, number, kind, question):
            if swap32(owner, LIVE, CLAIMED):
                return first + way
    return np.int64(NONE)


@inline
def free_query(queries, row):
    """Forget a query that is CLAIMED."""
    store32_release(queries.address + row * QUERY, FREE)
