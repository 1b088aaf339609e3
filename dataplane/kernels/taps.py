"""Packets for whoever captures or traces: copied into a ring, with what became of them.

Rule: no tap open, no cost but one load a vector; a tap takes part in no decision and never waits:
what finds no room is counted.

Theory. Stages change packets in place, so `keep` copies first segments aside before the first stage
looks at them, and `tap` runs after the last one, when reasons are final and frames are not yet
handed out again. A packet is seen at two points: as it came, on the port where it came in, and as
it left, on the port that it left through. At each a tap asks for port, reason, identity and filter;
the filter (bpf.py) also sees the inner packet of one with a tunnel header, so that `host POD` finds
it on an uplink. `note` keeps what a stage has made of a vector, for a tap that wants that too.
A ring has one writer and one reader; a record lies in one piece.
"""

from typing import Any, NamedTuple

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.batch import (
    FLAG_DECAPSULATED,
    VECTOR_MAX,
    VERDICT_HOLD,
    VERDICT_SEND,
    WAY_REPLY,
)
from dataplane.kernels.bpf import WORDS, accepts
from dataplane.kernels.connections import offset_of
from dataplane.kernels.house import (
    inline,
    kernel,
    load8,
    load64_acquire,
    outline,
    store8,
    store32,
    store64_release,
    types,
)
from dataplane.kernels.rows import Rows
from xdp.abi import CONST, DTYPE, value

TAPS_MAX = CONST["TAPS_MAX"]
PORTS_MAX = CONST["PORTS_MAX"]
FRAME = CONST["FRAME_SIZE"]
STAGES_MAX = CONST["STAGES_MAX"]
TAP_IN, TAP_OUT, TAP_STAGES = CONST["TAP_IN"], CONST["TAP_OUT"], CONST["TAP_STAGES"]
RING_BYTES = CONST["TAP_RING_BYTES"]
RING_MASK = RING_BYTES - 1
PROGRAM_BYTES = CONST["TAP_INSTRUCTIONS_MAX"] * DTYPE["tap_instruction"].itemsize
RECORD, STEP = DTYPE["tap_record"].itemsize, DTYPE["tap_step"].itemsize
CONTROL_TAPS = offset_of("control", "taps")
HEAD, TAIL = (offset_of("tap_ring", name) for name in ("head", "tail"))
RECORD_SIZE, RECORD_POINT = (offset_of("tap_record", name) for name in ("size", "point"))
RING = DTYPE["tap_ring"].itemsize
GENEVE, TRACK = value("TUNNEL_GENEVE"), value("STAGE_TRACK")
LINE = 64  # bytes that records begin at multiples of
assert RECORD == LINE, "a ring is an array of records"

memcpy = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.intp))


class Watch(NamedTuple):
    """What a worker needs for taps: the taps and its own rings and memory."""

    control: Rows  # control[1]
    taps: Rows  # tap[TAPS_MAX]
    programs: Rows  # tap_instruction[TAPS_MAX * TAP_INSTRUCTIONS_MAX]
    rings: Rows  # tap_ring[TAPS_MAX]
    space: Rows  # tap_record[TAPS_MAX * TAP_RING_BYTES / 64]: the rings' bytes
    kept: Rows  # uint8[VECTOR_MAX * FRAME]: first segments as they came
    lengths: Rows  # int64[VECTOR_MAX]: bytes of these
    totals: Rows  # int64[VECTOR_MAX]: of the whole packets
    segments: Rows  # int64[VECTOR_MAX]: segments beyond the first
    scratch: Rows  # int64[WORDS]: the filter's


def make_watch(shm: Any, worker: int) -> Watch:
    """Return a worker's Watch over shared memory; its own memory is not touched before it is used.

    shm: arrays `control`, `taps`, `tap_programs`, `tap_rings`, `tap_space` as in ARRAYS.
    """
    own = [np.zeros(VECTOR_MAX * FRAME, np.uint8)]
    own += [np.zeros(VECTOR_MAX, np.int64) for _ in range(3)]
    shared = (shm.control, shm.taps, shm.tap_programs, shm.tap_rings[worker], shm.tap_space[worker])
    return Watch(*map(Rows, (*shared, *own, np.zeros(WORDS, np.int64))))


@inline
def open_taps(w):
    """Bits of the open taps, and of those that want the stages."""
    return load64_acquire(w.control.address + CONTROL_TAPS)


@kernel
def keep(b, w):
    """Copy first segments aside, before a stage changes them."""
    for i in range(b.count[0]):
        memcpy(w.kept.address + i * FRAME, b.address[i], min(b.length[i], FRAME))
        w.lengths[i] = min(b.length[i], FRAME)
        w.totals[i] = b.total[i]
        w.segments[i] = b.segments[i]


@kernel
def note(b, steps, stage, ns):
    """Keep what a stage made of each packet. steps: tap_step[STAGES_MAX * VECTOR_MAX]."""
    for i in range(b.count[0]):
        n = stage * VECTOR_MAX + i
        steps[n].ns = min(ns, 0xFFFFFFFF)
        steps[n].adjacency = b.adjacency[i]
        steps[n].connection = b.connection[i] + 1 if stage >= TRACK else 0
        steps[n].flags = b.flags[i]
        steps[n].stage = stage
        steps[n].verdict = b.verdict[i]
        steps[n].reason = b.reason[i]
        steps[n].kind = b.kind[i]


@inline
def _inner(t, at, length):
    """Where the inner frame of a tunnel packet begins, counted from `at`; 0: there is none."""
    ip = at + wire.ETHER_LENGTH
    size = wire.IP6_LENGTH
    if load8(ip) >> 4 == 4:
        size = (load8(ip) & 0xF) * 4
    found = wire.ETHER_LENGTH + size + wire.UDP_LENGTH
    if found + wire.VXLAN_LENGTH >= length:
        return 0
    if t.node[0].tunnel_kind == GENEVE:
        return found + wire.GENEVE_LENGTH + (load8(at + found) & 0x3F) * 4
    return found + wire.VXLAN_LENGTH


@outline
def _place(ring, space, size):
    """Memory address of room for `size` bytes, a multiple of LINE, in one piece; 0: there is none.

    ring: memory address of the tap_ring; space: of its bytes. What is written there counts when the
    head is moved behind it.
    """
    head = load64_acquire(ring + HEAD)
    used = head - load64_acquire(ring + TAIL)
    here = head & RING_MASK
    filler = RING_BYTES - here if RING_BYTES - here < size else 0
    if used < 0 or used + filler + size > RING_BYTES:
        return np.int64(0)
    if filler == 0:
        return space + here
    store32(space + here + RECORD_SIZE, filler)
    store8(space + here + RECORD_POINT, 0)
    store64_release(ring + HEAD, head + filler)
    return np.int64(space)


@inline
def _copy_packet(b, i, to, at, length, segments, most):
    """Copy a packet of one or more segments, `most` bytes at most; returns the bytes copied."""
    done = min(length, most)
    memcpy(to, at, done)
    for n in range(segments):
        k = b.segment_first[i] + n
        part = min(b.segment_length[k], most - done)
        if part > 0:
            memcpy(to + done, b.area[0] + b.segment_frame[k] + b.segment_offset[k], part)
            done += part
    return done


@inline
def _fits(b, t, w, n, i, point, at, length, total):
    """Whether tap n wants packet i at a point, whose first segment is at a memory address."""
    tap = w.taps[n]
    port = b.ingress[i] if point == TAP_IN else b.egress[i]
    if not tap.points & np.uint32(point):
        return False
    if tap.port != PORTS_MAX and tap.port != port:
        return False
    reason = b.reason[i]
    if not (tap.reasons[reason >> 6] >> np.uint64(reason & 63)) & np.uint64(1):
        return False
    if tap.identity:
        source, target = _identities(b, t, i)
        if tap.identity != source and tap.identity != target:
            return False
    count = np.int64(tap.instructions)
    if not count:
        return True
    program = w.programs.address + n * PROGRAM_BYTES
    if accepts(program, count, at, length, total, w.scratch.address):
        return True
    tunneled = b.flags[i] & FLAG_DECAPSULATED
    if point == TAP_OUT:
        tunneled = t.adjacencies[b.adjacency[i]].tunnel_family
    if not tunneled:
        return False
    inner = _inner(t, at, length)
    if inner == 0 or inner >= length:
        return False
    rest = total - inner
    return accepts(program, count, at + inner, length - inner, rest, w.scratch.address) != 0


@inline
def _identities(b, t, i):
    """Identities of packet i's source and target: where policy was asked, else its connection's,
    else those of the ports that it came in on and left through."""
    source, target = np.int64(b.source_identity[i]), np.int64(b.target_identity[i])
    if source == 0 and target == 0 and b.connection[i] >= 0:
        row = t.connections[b.connection[i]]
        source, target = np.int64(row.source_identity), np.int64(row.target_identity)
        if b.way[i] == WAY_REPLY:
            source, target = target, source
    if source == 0:
        source = np.int64(t.subjects[b.ingress[i]].identity)
    if target == 0 and b.verdict[i] == VERDICT_SEND:
        target = np.int64(t.subjects[b.egress[i]].identity)
    return source, target


@inline
def _describe(b, t, w, n, i, point, row):
    """Write what became of packet i into a record of the space."""
    out = b.egress[i] if b.verdict[i] == VERDICT_SEND else PORTS_MAX
    w.space[row].time_ns = b.now_ns[0]
    w.space[row].port = b.ingress[i] if point == TAP_IN else out
    w.space[row].other = out if point == TAP_IN else b.ingress[i]
    w.space[row].point = point
    w.space[row].reason = b.reason[i]
    w.space[row].vector = b.count[0]
    source, target = _identities(b, t, i)
    w.space[row].source_identity = source
    w.space[row].target_identity = target
    w.space[row].refusal = b.refusal[i]
    w.space[row].egress_rule = 0
    w.space[row].ingress_rule = 0
    w.space[row].flags = 0
    w.space[row].way = 0
    if b.connection[i] >= 0:
        connection = t.connections[b.connection[i]]
        w.space[row].egress_rule = connection.egress_rule
        w.space[row].ingress_rule = connection.ingress_rule
        w.space[row].flags = connection.flags
        w.space[row].way = b.way[i]


@inline
def _record(b, t, w, n, i, point, steps, at, length, total, segments):
    """Write packet i, at a memory address, into tap n's ring, or count it as lost."""
    ring = w.rings.address + n * RING
    stages = STAGES_MAX if w.taps[n].points & np.uint32(TAP_STAGES) else 0
    most = min(total, np.int64(w.taps[n].snap))
    size = (RECORD + stages * STEP + most + LINE - 1) & ~(LINE - 1)
    place = _place(ring, w.space.address + n * RING_BYTES, size)
    if place == 0:
        w.rings[n].lost += np.uint64(1)
        return
    row = (place - w.space.address) // RECORD
    _describe(b, t, w, n, i, point, row)
    to = place + RECORD
    for stage in range(stages):
        memcpy(to, steps.address + (stage * VECTOR_MAX + i) * STEP, STEP)
        to += STEP
    w.space[row].steps = stages
    w.space[row].length = total
    w.space[row].captured = _copy_packet(b, i, to, at, length, segments, most)
    w.space[row].size = size
    store64_release(ring + HEAD, load64_acquire(ring + HEAD) + size)


@kernel
def tap(b, t, w, steps, bits):
    """Copy what the open taps want. bits: open_taps of before the first stage."""
    for i in range(b.count[0]):
        if b.verdict[i] == VERDICT_HOLD:
            continue
        kept, length, total = w.kept.address + i * FRAME, w.lengths[i], w.totals[i]
        for n in range(TAPS_MAX):
            if not bits >> n & 1:
                continue
            if _fits(b, t, w, n, i, TAP_IN, kept, length, total):
                _record(b, t, w, n, i, TAP_IN, steps, kept, length, total, w.segments[i])
            if b.verdict[i] != VERDICT_SEND:
                continue
            at, left = b.address[i], b.length[i]
            if _fits(b, t, w, n, i, TAP_OUT, at, left, b.total[i]):
                more = b.segments[i] if b.total[i] > left else 0
                _record(b, t, w, n, i, TAP_OUT, steps, at, left, b.total[i], more)
