"""What a worker counts: packets and bytes by reason and by port, and what it dropped lately.

Rule: one writer a row (the worker), any number of readers, no locks; a reader may see a packet
counted in one table and not yet in another.

Theory. Reasons are enum reason of xdp/abi.h, so a counter needs no name. Flows that pass are
counted in their connection's record; those that do not have none, so they stand in a table of their
own, direct-mapped by hash: a newer one replaces an older one, which bounds memory and cost. A
packet that is held counts when it goes on.
"""

from typing import NamedTuple

import numpy as np

from dataplane.kernels.batch import (
    FLAG_AUDITED,
    KIND_IP4,
    KIND_IP6,
    VERDICT_HOLD,
    VERDICT_SEND,
)
from dataplane.kernels.house import inline
from dataplane.kernels.rows import Rows
from xdp.abi import CONST, value

FLOWS_MASK = np.uint64(CONST["FLOWS_MAX"] - 1)
PORTS_MAX = CONST["PORTS_MAX"]
REASONS_MAX = CONST["REASONS_MAX"]
PORT_UPLINK = value("PORT_UPLINK")
AUDITED = value("REASON_AUDITED")
DROPS = 130  # reasons from here on are drops


class Counters(NamedTuple):
    """The worker's own rows of the shared counters."""

    reasons: Rows  # reason_counter[2, REASONS_MAX]
    ports: Rows  # port_counter[PORTS_MAX]
    stats: Rows  # worker_stats[1]
    flows: Rows  # flow[FLOWS_MAX]
    kicks: Rows  # int64[2]: transmit system calls, and those refused
    clock: Rows  # int64[3]: struct timespec for clock_gettime, and its own memory address
    marks: Rows  # int64[1]: time of the last stage mark, ns


def make_counters(reasons, ports, stats, flows) -> Counters:
    """Return a worker's Counters over its rows of the shared counters (dtypes of xdp/abi.h)."""
    clock = np.zeros(3, np.int64)
    clock[2] = clock.ctypes.data
    rows = (reasons, ports, stats, flows, np.zeros(2, np.int64), clock, np.zeros(1, np.int64))
    return Counters(*map(Rows, rows))


@inline
def _note_flow(b, i, c):
    at = b.hash[i] & FLOWS_MASK
    row = c.flows[at]
    same = (
        row.source_lo == b.source_lo[i]
        and row.destination_lo == b.target_lo[i]
        and row.source_hi == b.source_hi[i]
        and row.destination_hi == b.target_hi[i]
        and row.source_port == b.source_port[i]
        and row.destination_port == b.target_port[i]
        and row.protocol == b.protocol[i]
        and row.family == b.kind[i]
    )
    if not same:
        c.flows[at].source_hi = b.source_hi[i]
        c.flows[at].source_lo = b.source_lo[i]
        c.flows[at].destination_hi = b.target_hi[i]
        c.flows[at].destination_lo = b.target_lo[i]
        c.flows[at].source_port = b.source_port[i]
        c.flows[at].destination_port = b.target_port[i]
        c.flows[at].protocol = b.protocol[i]
        c.flows[at].family = b.kind[i]
        c.flows[at].hash = b.hash[i] & np.uint64(0xFFFFFFFF)
        c.flows[at].packets = 0
        c.flows[at].bytes = 0
        c.flows[at].first_ns = b.now_ns[0]
    c.flows[at].reason = b.reason[i]
    c.flows[at].verdict = b.refusal[i]
    c.flows[at].source_identity = b.source_identity[i]
    c.flows[at].destination_identity = b.target_identity[i]
    c.flows[at].ingress_port = b.ingress[i]
    c.flows[at].egress_port = b.egress[i] if b.verdict[i] == VERDICT_SEND else PORTS_MAX
    c.flows[at].packets += 1
    c.flows[at].bytes += b.total[i]
    c.flows[at].last_ns = b.now_ns[0]


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
        if b.reason[i] >= DROPS and (b.kind[i] == KIND_IP4 or b.kind[i] == KIND_IP6):
            _note_flow(b, i, c)
