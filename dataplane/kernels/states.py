"""States of a connection: what a packet makes of what was known.

Rule: pure: state and flags in, state out; time-outs belong to states and are applied by `sweep`.

Theory. TCP as a bystander sees it (RFC 9293 3.3.2; states as few as NAT's requirements need, RFC
5382 5, RFC 7857 2.2): opened by one side, answered, confirmed; one side closed, both closed or
reset. A connection that was there before us is taken up in its middle, but counts as half open
until both sides have spoken: a flood of invented packets must not look established. A reset may be
forged, so traffic after it brings the connection back. SCTP by its chunk types (RFC 9260 3.2). UDP
and the rest are replied or not.
"""

from dataplane.kernels import wire
from dataplane.kernels.house import inline, load8, store8
from xdp.abi import value

CLOSED = value("CONNECTION_CLOSED")
SYN_SENT = value("CONNECTION_SYN_SENT")
INIT = value("CONNECTION_INIT")
UNREPLIED = value("CONNECTION_UNREPLIED")
ICMP_QUERY = value("CONNECTION_ICMP")
SYN_RECEIVED = value("CONNECTION_SYN_RECEIVED")
CLOSING = value("CONNECTION_CLOSING")
REPLIED = value("CONNECTION_REPLIED")
ESTABLISHED = value("CONNECTION_ESTABLISHED")

UNUSUAL = wire.TCP_SYN | wire.TCP_FIN | wire.TCP_RST
CHUNK_INIT, CHUNK_INIT_ACK, CHUNK_ABORT, CHUNK_SHUTDOWN = 1, 2, 6, 7
CHUNK_SHUTDOWN_COMPLETE = 14
SETTLED_NO_MORE, FLAGS_ARE_NEW = 1, 2


@inline
def first_state(protocol, at):
    """State that the first packet of a connection makes. at: its transport header."""
    if protocol == wire.TCP:
        return CLOSED if load8(at + wire.TCP_FLAGS) & wire.TCP_RST else SYN_SENT
    if protocol == wire.SCTP:
        return CLOSED if load8(at + wire.SCTP_CHUNK) == CHUNK_ABORT else INIT
    if protocol == wire.ICMP or protocol == wire.ICMP6:
        return ICMP_QUERY
    return UNREPLIED


@inline
def next_tcp(state, flags, way, seen, other):
    """TCP state after a packet. seen, other: flags seen before in its and the other direction."""
    if flags & wire.TCP_RST:
        return CLOSED
    if flags & wire.TCP_FIN:
        return CLOSED if other & wire.TCP_FIN else CLOSING
    if state == SYN_SENT:
        return SYN_RECEIVED if way == 1 and flags & wire.TCP_ACK else SYN_SENT
    if state == SYN_RECEIVED:
        confirmed = way == 0 and flags & wire.TCP_ACK and not flags & wire.TCP_SYN
        return ESTABLISHED if confirmed else SYN_RECEIVED
    if state == CLOSED and not (seen & other & wire.TCP_FIN):
        return CLOSING  # life after a reset
    return state


@inline
def next_sctp(state, chunk, way):
    """SCTP state after a packet with this first chunk."""
    if chunk == CHUNK_ABORT or chunk == CHUNK_SHUTDOWN_COMPLETE:
        return CLOSED
    if chunk == CHUNK_SHUTDOWN:
        return CLOSING
    if state == INIT and way == 1 and chunk != CHUNK_INIT_ACK:
        return ESTABLISHED
    return state


@inline
def next_other(state, way):
    """State of anything else after a packet."""
    return REPLIED if state == UNREPLIED and way == 1 else state


@inline
def advance(record_state, record_seen, protocol, at, way):
    """Bring a record's state up to date with a packet whose transport header stands at `at`.

    Returns bits: SETTLED_NO_MORE when an established connection is so no more, FLAGS_ARE_NEW when
    its direction has not shown these TCP flags before.
    record_state: memory address of its state byte; record_seen: of its two bytes of TCP flags.
    """
    state = load8(record_state)
    said = 0
    if protocol == wire.TCP:
        flags = load8(at + wire.TCP_FLAGS)
        if state == ESTABLISHED and not flags & UNUSUAL:
            return 0
        seen, other = load8(record_seen + way), load8(record_seen + 1 - way)
        fresh = next_tcp(state, flags, way, seen, other)
        if flags | seen != seen:
            store8(record_seen + way, flags | seen)
            said = FLAGS_ARE_NEW
    elif protocol == wire.SCTP:
        fresh = next_sctp(state, load8(at + wire.SCTP_CHUNK), way)
    else:
        fresh = next_other(state, way)
    if fresh == state:
        return said
    store8(record_state, fresh)
    return said | SETTLED_NO_MORE if state == ESTABLISHED else said


@inline
def reopens(state, protocol, at):
    """True when a packet opens a new connection where a finished one still stands."""
    if state != CLOSED and state != CLOSING:
        return False
    if protocol == wire.TCP:
        return load8(at + wire.TCP_FLAGS) & (wire.TCP_SYN | wire.TCP_ACK) == wire.TCP_SYN
    return protocol == wire.SCTP and load8(at + wire.SCTP_CHUNK) == CHUNK_INIT
