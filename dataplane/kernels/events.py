"""Events for whoever watches: what becomes of connections, written into a ring.

Rule: one writer a ring, who never waits: a record is written whole, then the head counts it.

Theory. The oldest record of the ring gives its place without being asked; readers notice
(tables/events.py). The head is stored with release, and a fence keeps the next record's stores
behind it, so that what a reader finds overwritten the head has announced. An event is a copy of the
connection's record: some twenty moves between cache lines that are at hand. What happens to single
packets is in drops.py.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.house import (
    copy32,
    fence_release,
    inline,
    load8,
    load32,
    load64,
    outline,
    store32,
    store64,
    store64_release,
)
from dataplane.kernels.layout import (
    CREATED,
    FLAGS,
    LINE,
    PACKETS,
    STATE,
    TCP_SEEN,
    WORD,
    offset,
    offset_of,
)
from dataplane.kernels.rows import Rows
from xdp.abi import CONST, DTYPE, value

EVENT = DTYPE["flow_record"].itemsize
MASK = CONST["EVENTS_MAX"] - 1
NEW, CHANGE, END = value("EVENT_NEW"), value("EVENT_CHANGE"), value("EVENT_END")
REPLY = CONST["EVENT_REPLY"]
TICK_SHIFT = CONST["TICK_SHIFT"]
LOWER = 0xFFFFFFFF

# Words of a ring, int64: what its writer has at hand.
HEAD_AT, RECORDS_AT = 0, 1  # memory addresses
HEAD, NOW = 2, 3  # events written; ns of this vector
OFF = 4  # bit n: events of kind n are not written
RING_WORDS = 8


def _at(field: str) -> int:
    return offset_of("flow_record", field)


SOURCE, TARGET, TIME, COUNTS = _at("source_hi"), _at("target_hi"), _at("time_ns"), _at("packets")
SIZE, EGRESS, INGRESS = _at("bytes"), _at("egress_rule"), _at("ingress_rule")
SOURCE_IDENTITY, TARGET_IDENTITY = _at("source_identity"), _at("target_identity")
PORTS, SERVICE, LASTED = _at("source_port"), _at("service"), _at("lasted")
FAMILY, EVENT_FLAGS, TCP = _at("family"), _at("flags"), _at("tcp")
EGRESS_RULE, INGRESS_RULE = offset("egress_rule"), offset("ingress_rule")
PORT, CONNECTION_SERVICE, REASON = offset("port"), offset("service"), offset("reason")


class Ring(Rows):
    """A writer's words, int64[RING_WORDS], which keep the ring itself alive."""

    def __init__(self, head: np.ndarray, records: np.ndarray) -> None:
        """head: event_ring[1]; records: flow_record[EVENTS_MAX]."""
        words = np.zeros(RING_WORDS, np.int64)
        words[HEAD_AT], words[RECORDS_AT] = head.ctypes.data, records.ctypes.data
        words[HEAD] = head["head"][0]
        super().__init__(words)
        self.head, self.records = head, records


def make_ring(head: np.ndarray | None = None, records: np.ndarray | None = None) -> Ring:
    """Return a writer's words over a ring of shared memory, or over one that nobody reads."""
    if head is None or records is None:
        head = np.zeros(1, DTYPE["event_ring"])
        records = np.zeros(CONST["EVENTS_MAX"], DTYPE["flow_record"])
    return Ring(head, records)


@inline
def place(ring):
    """Memory address of the next record."""
    return load64(ring + RECORDS_AT * 8) + (load64(ring + HEAD * 8) & MASK) * EVENT


@inline
def announce(ring):
    """Count the record that has been written."""
    head = load64(ring + HEAD * 8) + 1
    store64(ring + HEAD * 8, head)
    store64_release(load64(ring + HEAD_AT * 8), head)
    fence_release()


@outline
def note(ring, record, kind, tcp, flags):
    """Tell something of a connection. ring, record: memory addresses; flags: EVENT_REPLY or 0.

    tcp: flags of the packet; of END: those of the original direction, the others are in the record.
    """
    if (load64(ring + OFF * 8) >> kind) & 1:
        return
    at, now = place(ring), load64(ring + NOW * 8)
    store64(at + SOURCE, load64(record))
    store64(at + SOURCE + 8, load64(record + 8))
    copy32(at + TARGET, record + LINE)  # a reply's source and target: the backend, the new source
    store64(at + TIME, now)
    copy32(at + COUNTS, record + PACKETS)
    store64(at + EGRESS, load64(record + EGRESS_RULE))  # with the source's identity
    store64(at + INGRESS, load64(record + INGRESS_RULE))  # with the target's
    word, reply = load64(record + WORD), load64(record + LINE + WORD)
    ports = ((word >> 48) & 0xFFFF) | ((reply >> 32) & 0xFFFF0000)
    protocol = (word >> 8) & 0xFF
    kept = load32(record + PORT)  # port, ICMP type
    if protocol == wire.ICMP or protocol == wire.ICMP6:
        ports = ((word >> 48) & 0xFFFF) | ((kept >> 16) << 24)
    store64(at + PORTS, ports | (((reply >> 32) & 0xFFFF) << 32) | ((kept & 0xFFFF) << 48))
    store32(at + SERVICE, load32(record + CONNECTION_SERVICE))
    store32(at + LASTED, ((now >> TICK_SHIFT) - load32(record + CREATED)) & LOWER)
    reason = load32(record + REASON) & 0xFF
    store32(at + FAMILY, (word & 0xFF) | (protocol << 8) | (kind << 16) | (reason << 24))
    back = load8(record + TCP_SEEN + 1) if kind == END else 0
    mixed = load8(record + FLAGS) & ~REPLY | flags | (load8(record + STATE) << 8)
    store32(at + EVENT_FLAGS, mixed | (tcp << 16) | (back << 24))
    announce(ring)


@inline
def begin(ring, record):
    """Tell that a record has been made, and that its first packet has passed."""
    note(ring, record, NEW, load8(record + TCP_SEEN), 0)


@inline
def end(ring, record):
    """Tell that a CLAIMED record goes."""
    note(ring, record, END, load8(record + TCP_SEEN), 0)
