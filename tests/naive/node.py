"""A node's decision about a packet, slowly: twin of admit, route, judge and the verdict of forward.

Rule: addresses in, (reason, egress) out, from a few dicts.

Theory. The world is tests/worlds.py's. What is answered by ARP, ND or ICMP is left to scapy
(test_pipeline.py); this twin says whether a packet goes on, where, and why not.
"""

from ipaddress import ip_address

from dataplane.tables.model import Adjacency
from tests import worlds as w
from tests.naive.headers import Refused, is_error, parse
from xdp.abi import value

ROUTES = {
    w.PODS4: ("blackhole", None), w.PODS6: ("blackhole", None),
    w.OUTSIDE4: ("hop", w.UPLINK), w.OUTSIDE6: ("hop", w.UPLINK),
    w.UNKNOWN4: ("unresolved", None),
    w.FAR4: ("tunnel", w.UPLINK), w.FAR6: ("tunnel", w.UPLINK),
}  # fmt: skip
HERE = {w.ROUTER4: "gateway", w.ROUTER6: "gateway", w.NODE4: "host", w.NODE6: "host"}
PODS = {w.POD4[w.POD_A]: w.POD_A, w.POD4[w.POD_B]: w.POD_B,
        w.POD6[w.POD_A]: w.POD_A, w.POD6[w.POD_B]: w.POD_B}  # fmt: skip
REPLIES = {1: (0, 14, 16, 18), 58: (129,)}  # ICMP types that answer a query, in either family
MTU = {"hop": 1500, "tunnel": w.PATH_MTU, "pod": 65000}


def route(address, direct: bool = False) -> tuple[str, int | None]:
    """Longest prefix by trying all; direct: without a tunnel to node 2."""
    if address in HERE:
        return HERE[address], w.HOST
    if address in PODS:
        return "pod", PODS[address]
    for network, way in ROUTES.items():
        if address in network:
            return ("hop", way[1]) if direct and way[0] == "tunnel" else way
    return "none", None


def adjacency(world: w.World, address) -> Adjacency:
    """The adjacency that tests/worlds.py gives an address that has a way."""
    kind, port = route(address)
    if kind in ("host", "gateway"):
        name = f"ADJACENCY_{kind.upper()}"
        return Adjacency(value(name), w.HOST, 65000, w.GATEWAY_MAC, w.HOST_MAC)
    if kind == "pod":
        return Adjacency(value("ADJACENCY_POD"), port, 65000, w.GATEWAY_MAC, w.POD_MACS[port])
    if kind == "tunnel" and world.tunnel:
        return world.far()
    return Adjacency(value("ADJACENCY_NEXTHOP"), w.UPLINK, 1500, w.UPLINK_MAC, w.NEIGHBOUR_MAC)


def from_pod(port: int, frame: bytes, firsts: set) -> tuple[str, int | None] | None:
    """(reason, egress) of an IP packet from a pod; None for what test_pipeline.py judges.

    firsts: datagrams whose first fragment has been seen; no connection is known before.
    """
    try:
        found = parse(frame)
    except Refused as refused:
        return str(refused), None
    if found["kind"] == "arp":
        return None
    four = found["kind"] == 4
    make = (lambda n: ip_address(n.to_bytes(4, "big"))) if four else (
        lambda n: ip_address(n.to_bytes(16, "big")))  # fmt: skip
    source, target = make(found["source"]), make(found["target"])
    own = w.POD4[port] if four else w.POD6[port]
    datagram = (source, target, found["protocol"] if four else 0, found["identification"])
    if not four and found["protocol"] == 58:
        if source == own and not target.is_multicast and found["fragment"]:
            if found["later"] and datagram not in firsts:
                return "HELD", None
            firsts.add(datagram)
        return None
    multicast = int(target) >> 28 >= 14 if four else target.is_multicast
    if source != own:
        control = not four and (source.is_link_local or int(source) == 0)
        return ("MULTICAST" if control and multicast else "INVALID_SOURCE_IP"), None
    if found["protocol"] == 17 and found["ports"][1] == 8472:
        return "ENCAPSULATION_PROHIBITED", None
    if multicast:
        return "MULTICAST", None
    if found["later"] and datagram not in firsts:
        return "HELD", None
    if found["fragment"]:
        firsts.add(datagram)
    if is_error(found, frame[14:]):
        return "CT_INVALID", None  # about nothing that is known
    if found["protocol"] in REPLIES:
        if found["later"]:
            return None  # goes the way of its first one
        if frame[found["l4"]] in REPLIES[found["protocol"]]:
            return "CT_INVALID", None  # nobody has asked
    kind, egress = route(target)
    if kind in ("host", "gateway"):
        echo = found["protocol"] == 1 and kind == "gateway"
        return None if echo else ("FORWARDED", egress)
    if kind in ("none", "blackhole"):
        return "UNROUTABLE", None
    if kind == "unresolved":
        return "FIB_FAILED", None
    if found["ttl"] <= 1:
        return "TTL_EXCEEDED", None
    if found["ip_length"] > MTU[kind]:
        return "FRAGMENTATION_NEEDED", None
    return "FORWARDED", egress
