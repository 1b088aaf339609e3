"""What is counted and told of DNS: by pod, by server, by kind, and as a ring of events.

Rule: each worker has its own counters and its own ring; readers add up, and miss nothing unseen: an
event's number says how many were overwritten.

Theory. Latency goes into buckets, four an octave (as HDR histograms), from a microsecond to some
minutes: a percentile is right within an eighth, costs one addition, and adds up over workers. A
pod's row begins anew when its port is another pod's. Messages that are alike in all that Hubble's
metrics ask for (type, rcode, records) are one row of a small table of the pod, which is exact where
a reader of events would miss some. Servers have rows by address in a small table, first come;
beyond it all others share the last row. An event is written around its `sequence`, 0 meanwhile, so
a reader can tell whether it was overwritten under his eyes.
"""

import numpy as np

from dataplane.kernels import dns_message as m
from dataplane.kernels.house import (
    highest_bit,
    inline,
    load64,
    load64_acquire,
    outline,
    store64,
    store64_release,
)
from xdp.abi import CONST, DTYPE, value

BUCKETS = CONST["DNS_LATENCY_BUCKETS"]
SERVERS = CONST["DNS_SERVERS_MAX"]
RCODES = CONST["DNS_RCODES"]
TYPES = CONST["DNS_TYPES"]
EVENTS_MASK = CONST["DNS_EVENTS_MAX"] - 1
EVENT_ADDRESSES = CONST["DNS_EVENT_ADDRESSES"]
COUNTER, EVENT = DTYPE["dns_counter"].itemsize, DTYPE["dns_event"].itemsize
_fields = DTYPE["dns_event"].fields
assert _fields is not None
EVENT_TEXT = int(_fields["text"][1])
KINDS, KIND = CONST["DNS_KINDS"], DTYPE["dns_kind"].itemsize
KIND_OTHER = CONST["DNS_KIND_OTHER"]
TYPE_AT, RCODE_AT, EVENT_AT, ADDRESSES_AT, CNAMES_AT, SIX_AT = (
    CONST[f"DNS_KIND_{name}"] for name in ("TYPE", "RCODE", "EVENT", "ADDRESSES", "CNAMES", "SIX")
)
EVENTS = value("DNS_EVENT_REFUSED")  # those that have kinds are 1..3
MIX_A, MIX_B = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
SHIFT = np.uint64(32)
ONE = np.uint64(1)
LOOKS = 8  # rows of servers that a lookup may touch

TYPE_OTHER, TYPE_A, TYPE_AAAA = (value(f"DNS_TYPE_{name}") for name in ("OTHER", "A", "AAAA"))
TYPE_CNAME, TYPE_PTR, TYPE_SRV = (value(f"DNS_TYPE_{name}") for name in ("CNAME", "PTR", "SRV"))
TYPE_TXT, TYPE_HTTPS = value("DNS_TYPE_TXT"), value("DNS_TYPE_HTTPS")


@inline
def latency_bucket(nanoseconds):
    """Bucket of a time: four an octave of 1024 ns."""
    units = nanoseconds >> 10
    if units < 4:
        return units if units > 0 else np.int64(0)
    octave = highest_bit(np.uint64(units))
    bucket = (octave - 1) * 4 + ((units >> (octave - 2)) & 3)
    return bucket if bucket < BUCKETS else np.int64(BUCKETS - 1)


@inline
def type_of(kind):
    """Enum dns_type of a type of records."""
    if kind == m.A:
        return TYPE_A
    if kind == m.AAAA:
        return TYPE_AAAA
    if kind == m.HTTPS or kind == m.SVCB:
        return TYPE_HTTPS
    if kind == m.PTR:
        return TYPE_PTR
    if kind == m.SRV:
        return TYPE_SRV
    if kind == m.CNAME:
        return TYPE_CNAME
    return TYPE_TXT if kind == m.TXT else TYPE_OTHER


@inline
def _begin(rows, row, used, hi, lo):
    """Make a row of counters one of something else."""
    at = rows.address + row * COUNTER
    for n in range(0, COUNTER, 8):
        store64(at + n, 0)
    rows[row].hi, rows[row].lo, rows[row].used = hi, lo, used


@inline
def pod_row(c, port, endpoint):
    """Row of a pod's counters. c: Counters or DnsLane."""
    if c.dns_pods[port].used != endpoint + 1:
        kinds = c.dns_kinds.address + port * KINDS * KIND
        for at in range(0, KINDS * KIND, 8):
            store64(kinds + at, 0)
        _begin(c.dns_pods, port, endpoint + 1, np.uint64(0), np.uint64(0))
    return port


@outline
def count_kind(kinds, pod, key):
    """Count a message of a pod. kinds: Rows of dns_kind; key: as of `kind_of`."""
    first = kinds.address + pod * KINDS * KIND
    h = np.int64((np.uint64(key) * MIX_A) >> SHIFT)
    for n in range(KINDS - EVENTS):
        row = first + (h + n) % (KINDS - EVENTS) * KIND
        stands = load64(row)
        if stands == key:
            store64(row + 8, load64(row + 8) + 1)
            return
        if stands == 0:
            store64(row + 8, 1)
            store64_release(row, key)
            return
    event = key >> EVENT_AT & 0xFF
    row = first + (KINDS - event) * KIND
    store64(row + 8, load64(row + 8) + 1)
    store64_release(row, KIND_OTHER | event << EVENT_AT)


@inline
def kind_of(event, asked, rcode, addresses, cnames, six):
    """Key of struct dns_kind. event: enum dns_event_kind; asked: type; six: 1: IPv6."""
    key = asked << TYPE_AT | rcode << RCODE_AT | event << EVENT_AT
    return key | addresses << ADDRESSES_AT | cnames << CNAMES_AT | six << SIX_AT


@outline
def server_row(servers, hi, lo):
    """Row of a server's counters. servers: Rows of dns_counter[DNS_SERVERS_MAX]; uint64 halves."""
    h = (hi * MIX_A) ^ (lo * MIX_B)
    h ^= h >> SHIFT
    first = np.int64(h * MIX_A >> SHIFT)
    for n in range(LOOKS):
        row = (first + n) % (SERVERS - 1)
        if servers[row].used == 0:
            _begin(servers, row, 1, hi, lo)
            return row
        if servers[row].lo == lo and servers[row].hi == hi:
            return row
    servers[SERVERS - 1].used = 1
    return np.int64(SERVERS - 1)


@inline
def count_query(rows, row, kind, again):
    """Count a query that goes on to a server."""
    rows[row].queries += ONE
    rows[row].types[type_of(kind)] += ONE
    if again:
        rows[row].retries += ONE


@inline
def count_answer(rows, row, rcode, truncated, latency):
    """Count an answer that fits a query."""
    rows[row].answers += ONE
    rows[row].rcodes[rcode] += ONE
    if truncated:
        rows[row].truncated += ONE
    rows[row].latency_ns += np.uint64(latency)
    rows[row].latency[latency_bucket(latency)] += np.uint32(1)


@inline
def begin_event(events, notes):
    """Number of the next event, which nobody reads until `end_event`."""
    number = np.int64(notes[0].events)
    row = number & EVENTS_MASK
    at = events.address + row * EVENT
    store64_release(at, 0)
    load64_acquire(at)  # what is written next is written after
    return number


@inline
def end_event(events, notes, number):
    """Publish an event."""
    row = number & EVENTS_MASK
    store64_release(events.address + row * EVENT, number + 1)
    notes[0].events = np.uint64(number + 1)


@outline
def set_text(events, number, name, length):
    """Copy the name that stands at a memory address into an event."""
    row = number & EVENTS_MASK
    text = events.address + row * EVENT + EVENT_TEXT
    for at in range(0, length, 8):
        store64(text + at, load64(name + at))
    events[row].length = length
