"""Transmit rings: what a vector sends is queued, and the kernel kicked.

Rule: each packet is queued, or freed with a reason; what a device drops gets its reason, too.

Theory. In copy mode the kernel sends only when kicked: one sendto a socket a step, which carries
the whole ring (XDP_MAX_TX_SKB_BUDGET; net/xdp/xsk.c). EAGAIN (budget, completion ring full) passes
and is tried again. EBUSY is one packet that the device has dropped, since the ring of its peer or
the core's backlog is full, or there is no carrier: the call ends there, the packet is gone.
"""

import errno

from dataplane.engine.rings import (
    FRAME_STRIDE,
    PACKET_CONTINUES,
    complete,
    release,
)
from dataplane.kernels.batch import VERDICT_DROP, VERDICT_HOLD, VERDICT_SEND
from dataplane.kernels.house import (
    inline,
    load32,
    load32_acquire,
    store32,
    store32_release,
    store64,
    types,
)
from xdp.abi import value

NEED_WAKEUP = 1  # XDP_RING_NEED_WAKEUP
DONT_WAIT = 0x40  # MSG_DONTWAIT
REASON_TRANSMIT_FULL = value("REASON_TRANSMIT_FULL")
REASON_PORT_GONE = value("REASON_PORT_GONE")
REASON_DEVICE_REFUSED = value("REASON_DEVICE_REFUSED")

sendto = types.ExternalFunction(
    "sendto",
    types.intp(types.intc, types.intp, types.intp, types.intc, types.intp, types.intp),
)
errno_location = types.ExternalFunction("__errno_location", types.intp())


@inline
def _room(r, s):
    """Slots of the transmit ring that are free, read from the kernel's cursor."""
    sock = r.socks[s]
    used = (sock.tx_head - load32_acquire(sock.tx_consumer)) & 0xFFFFFFFF
    return sock.tx_size - used


@inline
def kick(r, s, stats):
    """One sendto for what waits in the transmit ring of socket s, and one for each packet lost."""
    sock = r.socks[s]
    r.socks[s].pending = 0
    if sock.tx_flags and not (load32(sock.tx_flags) & NEED_WAKEUP):
        return
    stats[0] += 1
    failed = sendto(sock.tx_fd, 0, 0, DONT_WAIT, 0, 0) < 0
    lost = 0
    while failed and not sock.tx_flags and load32(errno_location()) == errno.EBUSY:
        if lost == sock.tx_size:
            break
        lost += 1
        failed = sendto(sock.tx_fd, 0, 0, DONT_WAIT, 0, 0) < 0
    stats[0] += lost
    stats[2] += lost
    r.socks[s].lost += lost
    if failed:
        stats[1] += 1
        # EAGAIN (budget, completion ring full) passes: try again. A device that is down or
        # gone does not: after a few refusals wait for the next packet instead of spinning.
        r.socks[s].errors += 1
        if r.socks[s].errors < 64:
            r.socks[s].pending = 1
    else:
        r.socks[s].errors = 0


@inline
def _enqueue(b, r, i, s, needed):
    """Write the descriptors of packet i to the transmit ring of socket s."""
    sock = r.socks[s]
    mask = sock.tx_size - 1
    head = sock.tx_head
    frame = b.frame[i]
    at = sock.tx_descriptors + (head & mask) * 16
    store64(at, frame | ((b.address[i] - r.area[0] - frame) << 48))
    store32(at + 8, b.length[i])
    store32(at + 12, PACKET_CONTINUES if needed > 1 else 0)
    r.owner[frame // FRAME_STRIDE] = s
    for n in range(needed - 1):
        k = b.segment_first[i] + n
        frame = b.segment_frame[k]
        at = sock.tx_descriptors + ((head + n + 1) & mask) * 16
        store64(at, frame | (b.segment_offset[k] << 48))
        store32(at + 8, b.segment_length[k])
        store32(at + 12, PACKET_CONTINUES if n + 2 < needed else 0)
        r.owner[frame // FRAME_STRIDE] = s
    r.socks[s].tx_head = head + needed
    r.socks[s].tx_room = sock.tx_room - needed
    r.socks[s].pending = 1


@inline
def _discard(b, r, i, from_segment):
    """Free the frames of packet i: the head unless from_segment > 0, and its continuations."""
    if from_segment == 0:
        release(r, b.frame[i])
    for n in range(b.segments[i]):
        release(r, b.segment_frame[b.segment_first[i] + n])


@inline
def transmit(b, r, stats):
    """Queue every packet to be sent, free the others, then kick each socket that has work."""
    for i in range(b.count[0]):
        if b.verdict[i] == VERDICT_HOLD:
            continue
        if b.verdict[i] != VERDICT_SEND:
            _discard(b, r, i, 0)
            continue
        s = r.port_sock[b.egress[i]]
        if s < 0:
            b.verdict[i] = VERDICT_DROP
            b.reason[i] = REASON_PORT_GONE
            _discard(b, r, i, 0)
            continue
        needed = 1 + b.segments[i] if b.total[i] > b.length[i] else 1
        if r.socks[s].tx_room < needed:
            r.socks[s].tx_room = _room(r, s)
            if r.socks[s].tx_room < needed:
                _publish(r, s)
                kick(r, s, stats)
                complete(r, s)
                r.socks[s].tx_room = _room(r, s)
        if r.socks[s].tx_room < needed:
            b.verdict[i] = VERDICT_DROP
            b.reason[i] = REASON_TRANSMIT_FULL
            _discard(b, r, i, 0)
            continue
        _enqueue(b, r, i, s, needed)
        if needed == 1 and b.segments[i]:
            _discard(b, r, i, 1)
    flush(r, stats)
    if stats[2] != stats[3]:
        _charge(b, r, stats)


@inline
def _charge(b, r, stats):
    """Give what devices have dropped its reason: the vector's last packets to the same sockets.

    The kernel does not say which packet it was: in number and way they are those. What was lost of
    an earlier vector, and finds none here, waits for the next.
    """
    for n in range(b.count[0]):
        i = b.count[0] - 1 - n
        if b.verdict[i] != VERDICT_SEND:
            continue
        s = r.port_sock[b.egress[i]]
        if r.socks[s].lost:
            r.socks[s].lost -= 1
            stats[3] += 1
            b.verdict[i] = VERDICT_DROP
            b.reason[i] = REASON_DEVICE_REFUSED


@inline
def _publish(r, s):
    store32_release(r.socks[s].tx_producer, r.socks[s].tx_head)


@inline
def flush(r, stats):
    """Publish and kick all sockets with waiting descriptors; returns how many still wait."""
    waiting = 0
    for n in range(r.active_count[0]):
        s = r.active[n]
        if r.socks[s].pending:
            _publish(r, s)
            kick(r, s, stats)
            waiting += r.socks[s].pending
    return waiting
