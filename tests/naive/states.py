"""What a connection is after a packet, from the RFCs: twin of kernels/states.py.

Rule: names in, names out.

Theory. TCP as RFC 5382 and RFC 7857 want a NAT to see it: opened, answered, confirmed, closing,
closed; a bare SYN (or an SCTP INIT) opens anew what is over. Only who has been answered is
established.
"""

FIN, SYN, RST, ACK = 1, 2, 4, 16
TCP, SCTP, ICMP, ICMP6 = 6, 132, 1, 58
INIT, INIT_ACK, ABORT, SHUTDOWN, SHUTDOWN_COMPLETE = 1, 2, 6, 7, 14
OVER = ("CLOSED", "CLOSING")


def first(protocol: int, mark: int) -> str:
    """State after the first packet. mark: TCP flags, or type of the first SCTP chunk."""
    if protocol == TCP:
        return "CLOSED" if mark & RST else "SYN_SENT"
    if protocol == SCTP:
        return "CLOSED" if mark == ABORT else "INIT"
    return "ICMP" if protocol in (ICMP, ICMP6) else "UNREPLIED"


def after(state: str, protocol: int, mark: int, way: int, seen: tuple[int, int]) -> str:
    """State after one more packet; way: 0 as the first, 1 a reply; seen: TCP flags of both ways."""
    if protocol == TCP:
        return _tcp(state, mark, way, seen)
    if protocol == SCTP:
        return _sctp(state, mark, way)
    return "REPLIED" if state == "UNREPLIED" and way else state


def _tcp(state: str, flags: int, way: int, seen: tuple[int, int]) -> str:
    if flags & RST:
        return "CLOSED"
    if flags & FIN:
        return "CLOSED" if seen[1 - way] & FIN else "CLOSING"
    if state == "SYN_SENT" and way == 1 and flags & ACK:
        return "SYN_RECEIVED"
    if state == "SYN_RECEIVED" and way == 0 and flags & ACK and not flags & SYN:
        return "ESTABLISHED"
    if state == "CLOSED" and not (seen[0] & FIN and seen[1] & FIN):
        return "CLOSING"  # what was reset lives on
    return state


def _sctp(state: str, chunk: int, way: int) -> str:
    if chunk in (ABORT, SHUTDOWN_COMPLETE):
        return "CLOSED"
    if chunk == SHUTDOWN:
        return "CLOSING"
    if state == "INIT" and way == 1 and chunk != INIT_ACK:
        return "ESTABLISHED"
    return state


def opens_anew(state: str, protocol: int, mark: int) -> bool:
    """Whether a packet begins another connection where this one stands."""
    if state not in OVER:
        return False
    if protocol == TCP:
        return mark & (SYN | ACK) == SYN
    return protocol == SCTP and mark == INIT
