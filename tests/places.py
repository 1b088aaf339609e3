"""Who is where in the small node of tests/worlds.py, and what services and policies it may have.

Rule: a frame starts where its source is at home: a pod's port, the node's own, or the uplink, there
through the tunnel when node 2 is its home.

Theory. By family, so that a test says `NODE[f]` and runs for both.
"""

from ipaddress import ip_address, ip_network

from scapy.all import Ether

from tests import segments as sg
from tests import worlds as w
from tests.naive import node
from tests.naive.packets import Packet, read
from tests.setting import WIDE, Backend, Peer, Service
from tests.worlds import HOST, POD_A, POD_B, UPLINK, Result, World
from xdp.abi import CONST, value

FAMILIES = (4, 6)
POD = {4: w.POD4, 6: w.POD6}
A, B = ({f: POD[f][port] for f in FAMILIES} for port in (POD_A, POD_B))
NODE, ROUTER = {4: w.NODE4, 6: w.NODE6}, {4: w.ROUTER4, 6: w.ROUTER6}
LOOPBACK = {4: w.LOOPBACK4, 6: w.LOOPBACK6}
FAR = {4: w.FAR4[9], 6: w.FAR6[9]}
OUT = {4: w.OUTSIDE4[7], 6: w.OUTSIDE6[7]}
OUT_KEPT = {4: w.OUTSIDE4[200], 6: w.OUTSIDE6[200]}  # not masqueraded
BETWEEN = {4: w.OUTSIDE4[250], 6: w.OUTSIDE6[250]}  # a router on the way
VIPS = {
    f: [ip_network(net)[n] for n in range(8)] for f, net in ((4, "10.96.0.0/24"), (6, "fd96::/64"))
}
NOWHERE = {4: ip_address("10.99.0.1"), 6: ip_address("fd99::1")}
HOLE = {4: ip_address("10.1.1.99"), 6: ip_address("fd00:1:1::99")}  # inside our prefix, no pod
CLUSTER_IP, ADDRESS = CONST["SERVICE_CLUSTER_IP"], CONST["SERVICE_ADDRESS"]
HTTP, DNS = 80, 53

PEERS = {
    ip_network(POD[f][port]): Peer(70000 + port, port, CONST["PEER_POD"])
    for f in FAMILIES
    for port in (POD_A, POD_B)
}
PEERS |= {ip_network(NODE[f]): Peer(1, 3, CONST["PEER_HOST"]) for f in FAMILIES}
PEERS |= {w.FAR4: Peer(300, 4, 0, WIDE + 1), w.FAR6: Peer(300, 4, 0, WIDE + 1)}
PEERS |= {ip_network(OUT_KEPT[f]): Peer(400, 5, CONST["PEER_KEEP_SOURCE"]) for f in FAMILIES}
"""Groups: 1 and 2 the pods, 3 the node, 4 pods of node 2, 5 what is not masqueraded."""


def services(f: int) -> tuple[Service, ...]:
    """Services of a family: what makes NAT hard."""
    vips, tcp, udp, sctp = VIPS[f], sg.TCP, sg.UDP, sg.SCTP
    to_b, far, to_a = Backend(B[f], 8080), Backend(FAR[f], 8080), Backend(A[f], 8080)
    inside = ip_network(f"{OUT[f]}/{25 if f == 4 else 121}", strict=False)
    return (
        Service(((vips[1], 80, tcp),), (to_b, far), flags=CLUSTER_IP),
        Service(((vips[2], 80, tcp), (NODE[f], 30080, tcp)), (to_b,), (to_b, far)),
        Service(((vips[3], 80, tcp),), (to_a,)),  # hairpin for A
        Service(((vips[4], 80, tcp), (vips[4], 53, udp))),  # nobody
        Service(
            ((vips[5], 53, udp),), (Backend(B[f], 53, udp), Backend(FAR[f], 53, udp)), affinity_s=60
        ),
        Service(
            ((vips[6], 9, sctp), (NODE[f], 9, sctp)), (Backend(B[f], 99, sctp),), sources=(inside,)
        ),
        Service(((NODE[f], 30053, udp),), (Backend(OUT[f], 53, udp), Backend(NODE[f], 53, udp))),
        *(
            Service(((vip, 0, 0),), flags=ADDRESS | (CLUSTER_IP if n == 1 else 0))
            for n, vip in enumerate(vips[1:4], 1)
        ),
    )


SERVICES = services(4) + services(6)


def home(address) -> int:
    """The port that an address sends from."""
    kind, port = node.route(address)
    return HOST if kind in ("host", "gateway") else UPLINK if port is None else port


def placed(frame: bytes, direct: bool = False) -> tuple[int, bytes]:
    """(port, frame) where a frame's source is at home; direct: node 2 has no tunnel."""
    source = read(0, frame[14:]).tuple.source
    if node.route(source, direct)[0] == "tunnel":
        return UPLINK, sg.vxlan(frame, w.REMOTE4, w.NODE4, w.VNI)
    return home(source), frame


def send(world: World, frame: bytes) -> Result:
    """Send one frame from where its source is at home."""
    return world.one(*placed(frame))


def read_in(port: int, frame: bytes) -> Packet:
    """The packet in a frame, out of the tunnel."""
    inside = frame[14:]
    if (
        port == UPLINK
        and inside[0] >> 4 == 4
        and inside[9] == sg.UDP
        and inside[22:24] == b"\x21\x18"
    ):
        return read(port, inside[20 + 8 + 8 + 14 :])
    return read(port, inside, outside=port == UPLINK)


def inside(result: Result) -> Ether:
    """What left, as scapy reads it; out of the tunnel."""
    assert result.sent, result
    frame = Ether(result.frame)
    return frame["VXLAN"].payload if frame.haslayer("VXLAN") else frame


def is_drop(result: Result, name: str) -> bool:
    """Whether a packet was dropped for a reason."""
    return result.dropped and result.reason == value(f"REASON_{name}")
