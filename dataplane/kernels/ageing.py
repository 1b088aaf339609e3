"""Connections that go: by time, by name; and those that a predecessor has left.

Rule: runs on a thread of its own beside the workers, and takes a record only as they do, by making
it CLAIMED.

Theory. Ageing costs a packet nothing: nobody walks a list or arms a timer. A sweep goes over the
used part of the table about once a second and compares each record's last packet with the time-out
of its state. After a crash the records are the truth; index and NAT ports are made of them again.
"""

import numpy as np

from dataplane.kernels.connections import (
    CLAIMED,
    ESTABLISHED,
    FLAGS,
    FREE,
    LINE,
    LIVE,
    OWNER,
    PLACE_NAT_PORTS,
    PORT_TAKEN,
    RECORD,
    REPLIED,
    STATE,
    TICK_SHIFT,
    count_port,
    cut_flows,
    hash_at,
    idle_of,
    keep_flows,
    publish,
    release,
    unlink,
)
from dataplane.kernels.events import end as tell_end
from dataplane.kernels.house import (
    kernel,
    load8,
    load32,
    load32_acquire,
    load64,
    prefetch,
    store32,
    swap32,
)


@kernel
def sweep(connections, index, places, ring, timeout_s, mask, first, end, tick):
    """Forget records first..end-1 whose time is over; return (live, established, removed).

    Runs beside the workers. connections, index: Rows of connection, uint64; places: of
    flows.places_of; ring: the sweeper's; timeout_s: Rows of uint32[TIMEOUTS_MAX]; mask: buckets-1;
    tick: now.
    """
    records, where, along = connections.address, index.address, places.address
    live = established = removed = 0
    for number in range(first, end):
        record = records + number * RECORD
        prefetch(record + 8 * RECORD + OWNER)
        if load32_acquire(record + OWNER) != LIVE:
            continue
        state = load8(record + STATE)
        idle_s = (idle_of(record, tick) << TICK_SHIFT) // 1_000_000_000
        if idle_s >= np.int64(timeout_s[state]) and swap32(record + OWNER, LIVE, CLAIMED):
            tell_end(ring.address, record)
            unlink(where, records, mask, number, along)
            release(records, number, tick)
            removed += 1
            continue
        live += 1
        if state == ESTABLISHED or state == REPLIED:
            established += 1
    return live, established, removed


@kernel
def forget(connections, index, places, ring, mask, numbers, count, tick):
    """Forget the records of a list; return how many were there. numbers: Rows of int64."""
    records, where, along = connections.address, index.address, places.address
    gone = 0
    for n in range(count):
        record = records + numbers[n] * RECORD
        if swap32(record + OWNER, LIVE, CLAIMED):
            tell_end(ring.address, record)
            unlink(where, records, mask, numbers[n], along)
            release(records, numbers[n], tick)
            gone += 1
    return gone


@kernel
def restore(connections, index, places, mask, first, end):
    """Index records first..end-1 again after a forwarder has died; return (live, highest + 1).

    Arguments as for `sweep`; the index must be empty. Records that were CLAIMED become free: nobody
    is at work on them.
    """
    records, where, along = connections.address, index.address, places.address
    live = highest = 0
    for number in range(first, end):
        record = records + number * RECORD
        owner = load32(record + OWNER)
        if owner == FREE:
            continue
        store32(record + OWNER, CLAIMED)
        hashed, reply = hash_at(record), hash_at(record + LINE)
        if owner == LIVE and publish(where, records, mask, number, hashed, reply):
            live += 1
            highest = number + 1
            keep_flows(along, record, number)
            if load8(record + FLAGS) & PORT_TAKEN:
                count_port(load64(along + PLACE_NAT_PORTS * 8), record, 1)
        else:
            cut_flows(along, record, number)
            store32(record + OWNER, FREE)
    return live, highest
