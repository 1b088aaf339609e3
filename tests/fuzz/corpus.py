"""What the fuzzer mutates: valid frames of every kind, each with the port where it belongs.

Rule: every stage is reached by a frame that nothing was done to.

Theory. Frames of tests/strategies.py; what the node answers; tunnel packets; and stories of
connections: both directions, through services, masquerading (ports of the range, which are kept),
errors about them, fragments in and out of order. A story is chosen frame by frame, so directions
come in any order.
"""

import struct
import warnings

from scapy.all import ARP, ICMP, IP, TCP, UDP, Ether, IPv6, Raw, raw
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr

from tests import segments as sg
from tests.naive.rewrite import completed
from tests.places import BETWEEN, FAMILIES, FAR, NODE, OUT, ROUTER, VIPS, A, B, home
from tests.segments import ACK, FIN, RST, SYN
from tests.worlds import (
    FAR4,
    FAR6,
    GATEWAY_MAC,
    NODE4,
    POD4,
    POD6,
    POD_A,
    POD_MACS,
    REMOTE4,
    ROUTER4,
    ROUTER6,
    UPLINK,
    VNI,
    World,
)
from xdp.abi import value

LONGEST = 256
L2 = Ether(src=POD_MACS[POD_A].hex(":"), dst=GATEWAY_MAC.hex(":"))
ANYWHERE = -1

Placed = tuple[int, bytes]
"""The port that a frame belongs to (ANYWHERE: none in particular), and the frame."""


def corpus(world: World) -> list[Placed]:
    """Return everything; what must be chosen often is there often."""
    found = [(ANYWHERE, frame) for frame in _generated() + _controls()]
    if world.tunnel:
        found += [(UPLINK, frame) for frame in _tunnelled(world)]
    wrapped = world.tunnel == value("TUNNEL_VXLAN") and world.underlay == 4
    for f in FAMILIES:
        for e, frame in stories(f):
            if e.source != FAR[f]:
                found.append((home(e.source), frame))
            elif wrapped:
                found.append((UPLINK, sg.vxlan(frame, REMOTE4, NODE4, VNI)))
    return [(port, frame[:LONGEST]) for port, frame in found]


def _generated() -> list[bytes]:
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from tests.strategies import valid

    found: list[bytes] = []

    @seed(1)
    @settings(
        max_examples=400,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(valid)
    def gather(frame: bytes) -> None:
        found.append(frame[:LONGEST])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gather()
    return found


def _controls() -> list[bytes]:
    """Return what the node answers: ARP, neighbour solicitations, pings; often, to be chosen."""
    four = IP(src=str(POD4[POD_A]), dst=str(ROUTER4))
    six = IPv6(src=str(POD6[POD_A]), dst=str(ROUTER6))
    packets = [
        ARP(hwsrc=L2.src, psrc=four.src, pdst=four.dst),
        six / ICMPv6ND_NS(tgt=six.dst) / ICMPv6NDOptSrcLLAddr(lladdr=L2.src),
        four / ICMP(id=1) / Raw(bytes(range(56))),
        six / ICMPv6EchoRequest(data=bytes(range(56))),
    ]
    return [raw(L2 / packet) for packet in packets] * 10


def _tunnelled(world: World) -> list[bytes]:
    """Return what node 2 sends through the tunnel to pod A; often, to be chosen."""
    found = []
    for ip in (
        IP(src=str(POD4[POD_A]), dst=str(FAR4[9])),
        IPv6(src=str(POD6[POD_A]), dst=str(FAR6[9])),
    ):
        for packet in (UDP(sport=9, dport=53), TCP(sport=9, dport=80), ICMP(), Raw(bytes(40))):
            result = world.one(POD_A, raw(L2 / ip / packet / Raw(b"data")))
            assert result.sent
            found.append(_returned(result.frame))
    return found * 20


def _swapped(frame: bytes, at: int) -> bytes:
    """Exchange the addresses of the IP packet at `at`; checksums stay right."""
    first, size = (at + 12, 4) if frame[at] >> 4 == 4 else (at + 8, 16)
    second, end = first + size, first + 2 * size
    return frame[:first] + frame[second:end] + frame[first:second] + frame[end:]


def _returned(frame: bytes) -> bytes:
    """A tunnel packet of ours as node 2 would send it back."""
    inner = 14 + (20 if frame[14] >> 4 == 4 else 40) + 8 + 8 + 14
    return _swapped(_swapped(frame, 14), inner)


# --- stories -----------------------------------------------------------------------------------


def stories(f: int) -> list[tuple[sg.Ends, bytes]]:
    """Both directions of connections, and errors about them, with who sends them."""
    found = []
    for n in range(4):
        port = 41000 + n  # of the range: the masqueraded one is the same
        inside = [(A[f], B[f], 80), (A[f], FAR[f], 80), (B[f], A[f], 8080), (NODE[f], A[f], 80)]
        for source, target, there in inside:
            e = sg.Ends(source, port, target, there)
            found += _talk(e, e.back())
        found += _talk(sg.Ends(A[f], port, OUT[f], 80), sg.Ends(OUT[f], 80, NODE[f], port))
        outside = sg.Ends(OUT[f], port, NODE[f], 30080)
        found += _talk(outside, sg.Ends(B[f], 8080, OUT[f], port))
        for vip in VIPS[f][1:7]:
            answer = sg.Ends(B[f], 8080, A[f], port)
            found += [
                s for there in (80, 53, 9) for s in _talk(sg.Ends(A[f], port, vip, there), answer)
            ]
        pings = [sg.Ends(A[f], port, vip, 0) for vip in (*VIPS[f][1:4], ROUTER[f])]
        found += [(e, sg.echo(e)) for e in pings]
    return found


def _talk(there: sg.Ends, back: sg.Ends) -> list[tuple[sg.Ends, bytes]]:
    """A connection's packets, as they reach this node; back: where its answers come from."""
    found = [sg.tcp(there), sg.tcp(there, ACK, b"data"), sg.tcp(there, FIN | ACK), sg.udp(there)]
    found += [sg.sctp(there), sg.sctp(there, sg.DATA, bytes(60)), sg.gre(there)]
    found += [sg.echo(there._replace(target_port=0)), *_fragments(there)]
    answers = [sg.tcp(back, SYN | ACK), sg.tcp(back, ACK, b"d"), sg.tcp(back, RST), sg.udp(back)]
    answers += [sg.sctp(back, sg.INIT_ACK), sg.echo(back._replace(source_port=0), reply=True)]
    both = [(there, frame) for frame in found] + [(back, frame) for frame in answers]
    return both + _errors(there) + _errors(back)


def _errors(e: sg.Ends) -> list[tuple[sg.Ends, bytes]]:
    """Errors on this way, about what came the other way; from its end or a router between."""
    f = e.source.version
    kinds = ((3, 4), (11, 0)) if f == 4 else ((2, 0), (3, 0))
    quotes = [make(e.back())[14:][:60] for make in (sg.udp, sg.tcp)]
    ends = [e, e._replace(source=BETWEEN[f])]
    return [(s, sg.error(s, *kinds[n], quotes[n])) for n, s in enumerate(ends)]


def _fragments(e: sg.Ends) -> list[bytes]:
    first = struct.pack(">HHHH", e.source_port, e.target_port, 88, 0) + bytes(32)
    found = []
    for offset, body in ((0, first), (40, bytes(40)), (80, bytes(8))):
        more = int(offset < 80)
        if e.source.version == 4:
            word = offset >> 3 | more << 13
            head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 9, word, 64, 17, 0)
            found.append(completed(head + e.source.packed + e.target.packed + body, 20, 0))
        else:
            shim = struct.pack(">BBHI", 17, 0, offset | more, 9)
            head = struct.pack(">IHBB", 6 << 28, 8 + len(body), 44, 64)
            found.append(head + e.source.packed + e.target.packed + shim + body)
    return [sg.ethernet(packet) for packet in found]
