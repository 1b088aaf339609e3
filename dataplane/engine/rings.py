"""The rings of AF_XDP sockets, seen from a worker.

Rule: a frame is in exactly one place: the free stack, a fill ring, a vector, a held fragment, a
transmit ring (until its completion). `owner` says which socket holds it, so that a socket that dies
gives all back.

Theory. Each (port, queue) has one socket with four single-producer single-consumer rings in shared
memory (Documentation/networking/af_xdp.rst). All sockets of a forwarder register the same memory as
their UMEM, so a frame received on one is transmitted on another by moving its number. Chunks are
FRAME_STRIDE apart (unaligned mode), which spreads packet headers over all cache sets (decision 3);
a descriptor's address is base | offset << 48. Ring indices run freely and are masked on use. This
file receives and keeps the frames; transmit.py sends.
"""

from typing import NamedTuple

import numpy as np

from dataplane.kernels.batch import (
    FLAG_ADMITTED,
    SEGMENTS_MAX,
    VECTOR_MAX,
    VERDICT_DROP,
)
from dataplane.kernels.fragments import HELD_MAX, HOLD_NS, SLOT_FREE, SLOT_READY
from dataplane.kernels.house import (
    inline,
    load16be,
    load32,
    load32_acquire,
    load64,
    prefetch,
    store32,
    store32_release,
    store64,
)
from dataplane.kernels.rows import Rows
from xdp.abi import CONST, value

SOCKS_MAX = 2048  # sockets of one worker: a queue of each port and room
FRAME_STRIDE = CONST["FRAME_STRIDE"]
PORTS_MAX = CONST["PORTS_MAX"]
SEGMENTS_PER_PACKET = CONST["SEGMENTS_PER_PACKET"]
FILL_MOST = 2048  # frames that wait in one fill ring at most
FILL_LEAST = 64  # and at least, however many ports there are: what a new one begins with
BASE_MASK = (1 << 48) - 1
PACKET_CONTINUES = 1  # XDP_PKT_CONTD
ETHERTYPE_VLAN, TAGGED = 0x8100, 18  # IEEE 802.1Q; bytes of a tagged Ethernet header

STATE_EMPTY = 0
STATE_OPEN = 1

REASON_OVERSIZE = value("REASON_OVERSIZE")
FRAGMENT_NOT_FOUND = value("REASON_FRAGMENT_NOT_FOUND")

_RINGS = ("rx", "tx", "fill", "completion")
SOCK = np.dtype(
    [
        ("state", "i8"),
        ("fd", "i8"),
        ("tx_fd", "i8"),
        ("port", "i8"),
        ("pending", "i8"),
        ("errors", "i8"),
        ("lost", "i8"),
    ]
    + [(f"{ring}_{word}", "i8") for ring in _RINGS for word in ("producer", "consumer")]
    + [(f"{ring}_descriptors", "i8") for ring in _RINGS]
    + [(f"{ring}_size", "i8") for ring in _RINGS]
    + [("tx_flags", "i8"), ("fill_flags", "i8"), ("tx_head", "i8"), ("tx_room", "i8")]
    + [("fill_goal", "i8"), ("receives", "i8"), ("trunk", "i8")]
)
"""One socket: memory addresses of ring words, sizes, and the worker's own cursors."""


class Rings(NamedTuple):
    """All that a worker's loop needs of its sockets and frames."""

    socks: Rows  # SOCK[SOCKS_MAX]
    active: Rows  # int64[SOCKS_MAX]: indices of open sockets, those that receive first
    active_count: Rows  # int64[2]: all; those that receive
    port_sock: Rows  # int64[PORTS_MAX]: socket that transmits for a port, -1: none
    free: Rows  # int64[frames]: stack of chunk bases
    free_count: Rows  # int64[1]
    owner: Rows  # int64[frames]: socket that holds the frame, -1: nobody
    area: Rows  # int64[1]: memory address of the UMEM
    turn: Rows  # int64[1]: socket that receives first in this step
    fill_target: Rows  # int64[2]: frames a fill ring may grow to; free ones that growth leaves


def make_rings(area: int, frames: np.ndarray) -> Rings:
    """Return empty rings over a UMEM at memory address `area`, with chunk bases `frames`."""
    total = int(frames.max()) // FRAME_STRIDE + 1 if len(frames) else 0
    rings = Rings(
        socks=Rows(np.zeros(SOCKS_MAX, SOCK)),
        active=Rows(np.zeros(SOCKS_MAX, np.int64)),
        active_count=Rows(np.zeros(2, np.int64)),
        port_sock=Rows(np.full(PORTS_MAX, -1, np.int64)),
        free=Rows(np.zeros(len(frames), np.int64)),
        free_count=Rows(np.full(1, len(frames), np.int64)),
        owner=Rows(np.full(total, -1, np.int64)),
        area=Rows(np.full(1, area, np.int64)),
        turn=Rows(np.zeros(1, np.int64)),
        fill_target=Rows(np.zeros(2, np.int64)),
    )
    rings.free[:] = frames[::-1]
    return rings


@inline
def release(r, frame):
    """Put a frame on the free stack."""
    r.owner[frame // FRAME_STRIDE] = -1
    r.free[r.free_count[0]] = frame
    r.free_count[0] += 1


@inline
def start(b, i, address, frame, length, port):
    """Start the columns of packet i, whose first byte stands at `address`."""
    b.address[i] = address
    b.frame[i] = frame
    b.length[i] = length
    b.total[i] = length
    b.segments[i] = 0
    b.segment_first[i] = 0
    b.ingress[i] = port
    b.egress[i] = -1
    b.verdict[i] = 0
    b.reason[i] = 0
    b.kind[i] = 0
    b.flags[i] = 0
    b.adjacency[i] = 0
    b.identity[i] = 0
    b.refusal[i] = 0
    b.source_identity[i] = 0
    b.target_identity[i] = 0


@inline
def _admit(b, r, i, address, length, port):
    """Take the packet of a descriptor as packet i."""
    frame = address & BASE_MASK
    first = r.area[0] + frame + ((address >> 48) & 0xFFFF)
    prefetch(first)
    r.owner[frame // FRAME_STRIDE] = -1
    start(b, i, first, frame, length, port)


@inline
def _receive_from(b, r, s, count, used):
    """Take packets of socket s until the vector or the ring ends; return (count, segments used)."""
    sock = r.socks[s]
    consumer = load32(sock.rx_consumer)
    available = (load32_acquire(sock.rx_producer) - consumer) & 0xFFFFFFFF
    taken = 0
    mask = sock.rx_size - 1
    while taken < available and count < VECTOR_MAX and used + SEGMENTS_PER_PACKET <= SEGMENTS_MAX:
        at = sock.rx_descriptors + ((consumer + taken) & mask) * 16
        address = load64(at)
        continues = load32(at + 12) & PACKET_CONTINUES
        _admit(b, r, count, address, load32(at + 8), sock.port)
        taken += 1
        if continues:
            first = used
            b.segment_first[count] = first
            more = 0
            while continues and taken < available:
                at = sock.rx_descriptors + ((consumer + taken) & mask) * 16
                address = load64(at)
                continues = load32(at + 12) & PACKET_CONTINUES
                taken += 1
                if more < SEGMENTS_PER_PACKET - 1:
                    frame = address & BASE_MASK
                    r.owner[frame // FRAME_STRIDE] = -1
                    b.segment_frame[used] = frame
                    b.segment_offset[used] = (address >> 48) & 0xFFFF
                    b.segment_length[used] = load32(at + 8)
                    b.total[count] += load32(at + 8)
                    used += 1
                    more += 1
                else:
                    release(r, address & BASE_MASK)
                    b.verdict[count] = VERDICT_DROP
                    b.reason[count] = REASON_OVERSIZE
            b.segments[count] = more
        count += 1
    if taken:
        store32_release(sock.rx_consumer, consumer + taken)
    return count, used


@inline
def _again(b, f, now):
    """Take the fragments that no longer wait: their first one has come, or their time is over."""
    count = 0
    for n in range(HELD_MAX):
        row = f.waiting[n]
        if row.state == SLOT_FREE or count >= VECTOR_MAX:
            continue
        over = now - row.since_ns > HOLD_NS
        if row.state != SLOT_READY and not over:
            continue
        start(b, count, row.address, row.frame, row.length, row.ingress)
        b.flags[count] = row.flags | FLAG_ADMITTED
        b.identity[count] = row.identity
        if row.state != SLOT_READY:
            b.verdict[count] = VERDICT_DROP
            b.reason[count] = FRAGMENT_NOT_FOUND
        f.waiting[n].state = SLOT_FREE
        f.waiting_count[0] -= 1
        count += 1
    return count


@inline
def _untag(b, first, count):
    """Packets first.. came over the trunk: whose VLAN tag names a port is a packet of that port."""
    for i in range(first, count):
        at = b.address[i]
        if b.length[i] < TAGGED or load16be(at + 12) != ETHERTYPE_VLAN:
            continue
        port = load16be(at + 14)
        if port >= PORTS_MAX:
            continue
        high, low = load64(at), load32(at + 8)
        store64(at + 4, high)
        store32(at + 12, low)
        b.address[i] = at + 4
        b.length[i] -= 4
        b.total[i] -= 4
        b.ingress[i] = port


@inline
def receive(b, r, f, now):
    """Fill the vector from all sockets in turn; b.count[0] says how many packets came."""
    count = _again(b, f, now) if f.waiting_count[0] else 0
    used = 0
    b.area[0] = r.area[0]
    sockets = r.active_count[1]
    first = r.turn[0]
    for n in range(sockets):
        k = first + n
        if k >= sockets:
            k -= sockets
        before = count
        count, used = _receive_from(b, r, r.active[k], count, used)
        if r.socks[r.active[k]].trunk and count > before:
            _untag(b, before, count)
        if count >= VECTOR_MAX:
            break
    r.turn[0] = first + 1 if first + 1 < sockets else 0
    b.count[0] = count
    return count


@inline
def complete(r, s):
    """Take back the frames that the kernel has sent for socket s."""
    sock = r.socks[s]
    consumer = load32(sock.completion_consumer)
    available = (load32_acquire(sock.completion_producer) - consumer) & 0xFFFFFFFF
    mask = sock.completion_size - 1
    for n in range(available):
        address = load64(sock.completion_descriptors + ((consumer + n) & mask) * 8)
        release(r, address & BASE_MASK)
    if available:
        store32_release(sock.completion_consumer, consumer + available)
    return available


@inline
def _refill(r, s):
    """Top up the fill ring of socket s to its goal, which doubles when half of it was used up.

    The kernel gives no frame back that nothing was received into: a port that gets no traffic must
    not hold what later ones need.
    """
    sock = r.socks[s]
    producer = load32(sock.fill_producer)
    level = (producer - load32_acquire(sock.fill_consumer)) & 0xFFFFFFFF
    goal = sock.fill_goal
    most = r.fill_target[0]
    if 2 * level < goal and goal < most and r.free_count[0] > r.fill_target[1]:
        goal = 2 * goal
    if goal > most:
        goal = most
    r.socks[s].fill_goal = goal
    wanted = goal - level
    if wanted > r.free_count[0]:
        wanted = r.free_count[0]
    if wanted <= 0 or (wanted < 32 and level >= 32):
        return
    mask = sock.fill_size - 1
    for n in range(wanted):
        r.free_count[0] -= 1
        frame = r.free[r.free_count[0]]
        r.owner[frame // FRAME_STRIDE] = s
        store64(sock.fill_descriptors + ((producer + n) & mask) * 8, frame)
    store32_release(sock.fill_producer, producer + wanted)


@inline
def collect(r):
    """Completions and refills of all sockets; returns the completions taken."""
    total = 0
    for n in range(r.active_count[0]):
        total += complete(r, r.active[n])
    for n in range(r.active_count[0]):
        _refill(r, r.active[n])
    return total
