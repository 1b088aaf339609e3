"""What a worker counts: packets and bytes by reason and by port; and its drops, told as events.

Rule: one writer a row (the worker), any number of readers, no locks; a reader may see a packet
counted in one table and not yet in another.

Theory. Reasons are enum reason of xdp/abi.h, so a counter needs no name. Flows that pass are
counted in their connection's record. Those that do not have none: each drop becomes an event
(kernels/drops.py), so that reason counters and events agree. A packet that is held counts when it
goes on.
"""

from typing import NamedTuple

import numpy as np

from dataplane.kernels.batch import FLAG_AUDITED, FLAG_NOTED, VECTOR_MAX, VERDICT_HOLD, VERDICT_SEND
from dataplane.kernels.drops import PENDING, WATCH_WORDS, flush_drops, note_drop, sample
from dataplane.kernels.events import make_ring
from dataplane.kernels.house import inline
from dataplane.kernels.rows import Rows
from xdp.abi import CONST, DTYPE, value

REASONS_MAX = CONST["REASONS_MAX"]
PORT_UPLINK = value("PORT_UPLINK")
AUDITED = value("REASON_AUDITED")
TRANSMIT_FULL, DEVICE_REFUSED = value("REASON_TRANSMIT_FULL"), value("REASON_DEVICE_REFUSED")
DROPS = 130  # reasons from here on are drops


class Counters(NamedTuple):
    """The worker's own rows of the shared counters, and where its events go."""

    reasons: Rows  # reason_counter[2, REASONS_MAX]
    ports: Rows  # port_counter[PORTS_MAX]
    stats: Rows  # worker_stats[1]
    ring: Rows  # of events.make_ring
    pending: Rows  # flow_record[PENDING]: drops that are gathered
    watch: Rows  # int64[WATCH_WORDS]
    kicks: Rows  # int64[4]: transmit system calls, those refused; packets lost by that, and charged
    clock: Rows  # int64[3]: struct timespec for clock_gettime, and its own memory address
    marks: Rows  # int64[1]: time of the last stage mark, ns
    dns_pods: Rows  # dns_counter[PORTS_MAX]
    dns_kinds: Rows  # dns_kind[PORTS_MAX * DNS_KINDS]
    dns_servers: Rows  # dns_counter[DNS_SERVERS_MAX]
    dns_events: Rows  # dns_event[DNS_EVENTS_MAX]
    dns_notes: Rows  # naming_counter[1]
    dns_lane: Rows  # int64[1]: number of these rows
    steps: Rows  # tap_step[STAGES_MAX * VECTOR_MAX]: what stages made of packets, for a trace


def make_counters(reasons, ports, stats, dns, ring: Rows | None = None) -> Counters:
    """Return a worker's Counters over its rows of the shared counters (dtypes of xdp/abi.h).

    dns: as of dns_rows; ring: the one that its Tracker has; none: nobody watches.
    """
    clock = np.zeros(3, np.int64)
    clock[2] = clock.ctypes.data
    rows = map(Rows, (reasons, ports, stats))
    pending, watch = np.zeros(PENDING, DTYPE["flow_record"]), np.zeros(WATCH_WORDS, np.int64)
    steps = np.zeros(CONST["STAGES_MAX"] * VECTOR_MAX, DTYPE["tap_step"])
    own = (pending, watch, np.zeros(4, np.int64), clock, np.zeros(1, np.int64))
    return Counters(*rows, ring or make_ring(), *map(Rows, (*own, *dns, steps)))


class DnsLane(NamedTuple):
    """Rows of the counters of DNS of who is no worker."""

    dns_pods: Rows
    dns_kinds: Rows
    dns_servers: Rows
    dns_events: Rows
    dns_notes: Rows
    dns_lane: Rows


def make_lane(shm, number) -> DnsLane:
    """Return a lane of the counters of DNS: DNS_SWEEPER, DNS_PROXY, DNS_READER."""
    return DnsLane(*map(Rows, dns_rows(shm, number)))


def dns_rows(shm, number) -> tuple[np.ndarray, ...]:
    """Return a worker's rows of what is counted and told of DNS."""
    return (
        shm.dns_pods[number],
        shm.dns_kinds[number].reshape(-1),
        shm.dns_servers[number],
        shm.dns_events[number],
        shm.dns_notes[number : number + 1],
        np.array([number]),
    )


@inline
def account(b, t, c):
    """Count every packet of the vector; runs after the last verdict."""
    for i in range(b.count[0]):
        if b.verdict[i] == VERDICT_HOLD:
            continue
        size = b.total[i]
        port = b.ingress[i]
        way = 0 if t.ports[port].kind == PORT_UPLINK else 1
        if b.reason[i] == 0 and b.flags[i] & FLAG_AUDITED:
            b.reason[i] = AUDITED
        c.reasons[way * REASONS_MAX + b.reason[i]].packets += 1
        c.reasons[way * REASONS_MAX + b.reason[i]].bytes += size
        c.ports[port].rx_packets += 1
        c.ports[port].rx_bytes += size
        if b.verdict[i] == VERDICT_SEND:
            out = b.egress[i]
            c.ports[out].tx_packets += 1
            c.ports[out].tx_bytes += size
        else:
            c.ports[port].rx_drops += 1
            if b.reason[i] == TRANSMIT_FULL or b.reason[i] == DEVICE_REFUSED:
                c.ports[b.egress[i]].tx_drops += 1
        if b.reason[i] >= DROPS and not b.flags[i] & FLAG_NOTED:
            note_drop(b, t, c, i)
    sample(b, t, c)
    flush_drops(c, b.now_ns[0])
