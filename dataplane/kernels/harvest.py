"""What XDP has counted, collected; entries that have gone, freed.

Rule: runs on a thread of its own beside the workers, about once a second, with counters of its own.

Theory. XDP's counters of an entry only ever grow, through all its uses; `seen` says what has been
collected of them. So connections, ports and reasons count every packet once, whoever forwarded it,
and connections in the table do not age. An entry whose tag has gone is free again two turns later:
a program may have been in the middle of it.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.connections import (
    BYTES,
    CREATED,
    FLOW_LIVE,
    FLOW_RESTING,
    LAST,
    LIVE,
    OWNER,
    RECORD,
    SEEN,
    SEEN_STATE,
    TICK_SHIFT,
    offset_of,
    retire,
    since,
)
from dataplane.kernels.flow_entry import ENTRY, LAST_NS
from dataplane.kernels.flows import FLOW_EMPTY, FLOW_WRITTEN
from dataplane.kernels.house import (
    add64,
    inline,
    kernel,
    load32,
    load32_acquire,
    load64,
    store32,
    store32_release,
)
from dataplane.kernels.layout import PACKETS
from xdp.abi import CONST, value

IDLE_NS = 10_000_000_000  # an entry idle for longer goes
FLOW_RESTED = value("FLOW_RESTED")
PORT_UPLINK = value("PORT_UPLINK")
REASON_FORWARDED = value("REASON_FORWARDED")
REASONS_MAX = CONST["REASONS_MAX"]
COUNT = offset_of("flow_entry", "packets")


@inline
def _credit(t, c, slot, f, packets, size, last_ns):
    """Charge what XDP has forwarded by an entry to its connection, ports and reasons."""
    seen = f.seen[slot]
    record = t.connections.address + np.int64(seen.record) * RECORD
    way, port = np.int64(seen.way), np.int64(seen.port)
    if load32_acquire(record + OWNER) == LIVE and load32(record + CREATED) == seen.created:
        add64(record + PACKETS + way * 8, packets)
        add64(record + BYTES + way * 8, size)
        tick = last_ns >> TICK_SHIFT
        if since(tick, load32(record + LAST + way * 4)) > 0:
            store32(record + LAST + way * 4, tick)
    frames = np.uint64(size + packets * wire.ETHER_LENGTH)
    ingress = 0 if t.ports[port].kind == PORT_UPLINK else 1
    out = np.int64(f.hops[f.entries[slot].hop].port)
    count = np.uint64(packets)
    c.reasons[ingress * REASONS_MAX + REASON_FORWARDED].packets += count
    c.reasons[ingress * REASONS_MAX + REASON_FORWARDED].bytes += frames
    c.ports[port].rx_packets += count
    c.ports[port].rx_bytes += frames
    c.ports[out].tx_packets += count
    c.ports[out].tx_bytes += frames


@kernel
def harvest(t, c, f, slots, now):
    """Collect what XDP has counted, retire idle entries, free rested ones.

    Runs beside the workers about once a second, with counters of its own (c). An entry is used
    again two turns after it was retired. Returns (live entries, packets collected).
    """
    live = total = 0
    for slot in range(slots):
        at = f.seen.address + slot * SEEN
        state = load32_acquire(at + SEEN_STATE)
        if state == FLOW_EMPTY or state == FLOW_WRITTEN:
            continue
        entry = f.entries.address + slot * ENTRY
        packets, size = load64(entry + COUNT), load64(entry + COUNT + 8)
        last = load64(entry + LAST_NS)
        fresh = packets - np.int64(f.seen[slot].packets)
        if fresh:
            _credit(t, c, slot, f, fresh, size - np.int64(f.seen[slot].bytes), last)
            f.seen[slot].packets = packets
            f.seen[slot].bytes = size
            total += fresh
        if state == FLOW_LIVE:
            live += 1
            if now - last > IDLE_NS:
                retire(f.tags.address + slot * 4, at)
        elif state == FLOW_RESTING:
            store32_release(at + SEEN_STATE, FLOW_RESTED)
        else:
            store32_release(at + SEEN_STATE, FLOW_EMPTY)
    return live, total
