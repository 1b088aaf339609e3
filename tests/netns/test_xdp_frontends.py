"""What uplinks take for services: frontends, their fragments, and errors about their packets."""

import time
from ipaddress import ip_address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Raw

from dataplane.engine.frontends import SteeredFrontends
from dataplane.services.model import halves
from dataplane.tables.services import ServiceRow, ServiceWriter
from dataplane.tables.shm import Shm
from tests.netns.test_xdp_steering import MAC, PASS, REDIRECT, World
from xdp.abi import CONST, DTYPE
from xdp.errors import KernelError

pytestmark = [pytest.mark.root, pytest.mark.net]

NODE4, NODE6 = "198.51.100.1", "2001:db8:5::1"
VIP4, VIP6 = "203.0.113.7", "2001:db8:7::7"
CLUSTER4, CLUSTER6 = "10.96.0.10", "fd00:96::a"
CLIENT4, CLIENT6 = "198.51.100.99", "2001:db8:9::9"
NODE_PORT = 30080
NUMBERS = {TCP: 6, UDP: 17, SCTP: 132}
CLUSTER_IP, ADDRESS = CONST["SERVICE_CLUSTER_IP"], CONST["SERVICE_ADDRESS"]


def key(address: str, port: int = 0, protocol: int = 0):
    return (*halves(ip_address(address)), port, protocol)


class Services(World):
    """The programs, with frontends that an agent wrote."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.steer([], [], 0)
        self.shm = Shm.create(folder)
        self.writer = ServiceWriter(self.shm)
        steering = self.bpf.maps["steering"].mmap(DTYPE["steering"])
        self.frontends = SteeredFrontends(self.bpf.maps["frontends"], steering, self.shm)
        self.writer.set_service("cluster", ServiceRow(CLUSTER_IP))
        self.writer.set_service("external", ServiceRow())
        self.writer.set_service("address", ServiceRow(ADDRESS))
        for address in (NODE4, NODE6):
            for protocol in NUMBERS.values():
                self.writer.set_frontend(key(address, NODE_PORT, protocol), "external")
        for address in (VIP4, VIP6):
            self.writer.set_frontend(key(address, 80, 6), "external")
            self.writer.set_frontend(key(address), "address")
        for address in (CLUSTER4, CLUSTER6):
            self.writer.set_frontend(key(address, 80, 6), "cluster")
        self.follow()

    def restore(self) -> None:
        super().restore()
        self.steer([], [], 0)

    def follow(self) -> bool:
        self.writer.commit()
        return self.frontends.sync()

    def close(self) -> None:
        super().close()
        self.shm.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    world = Services(tmp_path_factory.mktemp("frontends"))
    try:
        yield world
    finally:
        world.close()


@pytest.fixture
def world(shared):
    shared.restore()
    return shared


def ip(target: str, **more):
    source = CLIENT6 if ":" in target else CLIENT4
    made = IPv6 if ":" in target else IP
    return Ether(dst=MAC) / made(src=source, dst=target, **more)


BOTH = pytest.mark.parametrize("node", [NODE4, NODE6])


@BOTH
@pytest.mark.parametrize("layer", [TCP, UDP, SCTP])
def test_a_node_port_is_taken_and_its_neighbour_is_not(world, node, layer):
    assert world.run(ip(node) / layer(dport=NODE_PORT)) == REDIRECT
    assert world.run(ip(node) / layer(dport=NODE_PORT + 1)) == PASS
    assert world.run(ip(node) / layer(sport=NODE_PORT, dport=22)) == PASS


@pytest.mark.parametrize("vip", [VIP4, VIP6])
def test_of_a_service_address_everything_is_taken(world, vip):
    echo = ICMPv6EchoRequest() if ":" in vip else ICMP()
    for packet in (TCP(dport=80), TCP(dport=81), UDP(dport=80), echo, Raw(b"what")):
        assert world.run(ip(vip) / packet) == REDIRECT
    later = IPv6ExtHdrFragment(offset=8) if ":" in vip else None
    packet = ip(vip) / later / Raw(b"x" * 8) if later else ip(vip, frag=8) / Raw(b"x" * 8)
    assert world.run(packet) == REDIRECT


def test_neighbour_discovery_is_whose_who_announces(world):
    for packet in (ICMPv6ND_NS(tgt=VIP6), ICMPv6ND_NA(tgt=VIP6)):
        assert world.run(ip(VIP6, hlim=255) / packet) == PASS


@pytest.mark.parametrize("address", [CLUSTER4, CLUSTER6])
def test_a_cluster_ip_is_not_for_outside(world, address):
    assert world.run(ip(address) / TCP(dport=80)) == PASS


@BOTH
def test_the_nodes_own_traffic_passes(world, node):
    echo = ICMPv6EchoRequest() if ":" in node else ICMP()
    for packet in (echo, TCP(dport=22), UDP(dport=53), Raw(b"what")):
        assert world.run(ip(node) / packet) == PASS


def test_options_and_extension_headers_are_passed_over(world):
    for count in (4, 40):
        packet = ip(NODE4, options=[IPOption_NOP()] * count)
        assert world.run(packet / UDP(dport=NODE_PORT)) == REDIRECT
        assert world.run(packet / UDP(dport=NODE_PORT + 1)) == PASS
    chain = IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting(addresses=[NODE6])
    assert world.run(ip(NODE6) / chain / TCP(dport=NODE_PORT)) == REDIRECT
    assert world.run(ip(NODE6) / chain / TCP(dport=NODE_PORT + 1)) == PASS


def test_a_chain_is_followed_so_far_as_parse_does(world):
    for count, verdict in ((8, REDIRECT), (9, PASS), (20, PASS)):
        packet = ip(NODE6)
        for _ in range(count):
            packet /= IPv6ExtHdrDestOpt()
        assert world.run(packet / TCP(dport=NODE_PORT)) == verdict, count


def test_an_authentication_header_is_passed_over(world):
    header = bytes([6, 4, 0, 0]) + bytes(20)  # next TCP, 24 bytes (RFC 4302 2.2)
    packet = ip(NODE6, nh=51) / Raw(header + bytes(TCP(dport=NODE_PORT)))
    assert world.run(packet) == REDIRECT


def fragments(node: str, number: int, port: int = NODE_PORT):
    """First, middle and last fragment of a UDP packet."""
    head = bytes(UDP(dport=port, len=48)) + b"x" * 8
    if ":" in node:
        name = {"nh": 17, "id": number}
        return [
            ip(node) / IPv6ExtHdrFragment(m=1, **name) / Raw(head),
            ip(node) / IPv6ExtHdrFragment(offset=2, m=1, **name) / Raw(b"y" * 16),
            ip(node) / IPv6ExtHdrFragment(offset=4, m=0, **name) / Raw(b"z" * 16),
        ]
    name = {"proto": 17, "id": number}
    return [
        ip(node, flags="MF", **name) / Raw(head),
        ip(node, flags="MF", frag=2, **name) / Raw(b"y" * 16),
        ip(node, frag=4, **name) / Raw(b"z" * 16),
    ]


@BOTH
def test_later_fragments_follow_the_first(world, node):
    first, middle, last = fragments(node, 11)
    assert world.run(middle) == PASS, "it overtook the first"
    assert [world.run(one) for one in (first, middle, last)] == [REDIRECT] * 3
    assert [world.run(one) for one in (last, middle)] == [REDIRECT] * 2
    for other in fragments(node, 12)[1:]:
        assert world.run(other) == PASS, "another packet's"
    assert [world.run(one) for one in fragments(node, 13, 53)] == [PASS] * 3


@BOTH
def test_a_remembered_fragment_grows_old(world, node):
    first, middle, _ = fragments(node, 21)
    world.run(first)
    names = world.bpf.maps["steered_fragments"]
    for name, _ in list(names.items()):
        names.update(name, time.clock_gettime_ns(time.CLOCK_MONOTONIC) - 61 * 10**9)
    assert world.run(middle) == PASS


def quoted(node: str, port: int, layer=TCP):
    inner = IPv6 if ":" in node else IP
    client = CLIENT6 if ":" in node else CLIENT4
    return inner(src=node, dst=client) / layer(sport=port, dport=999)


def test_errors_about_what_a_service_sent_are_taken(world):
    four = [ICMP(type=3, code=4), ICMP(type=11), ICMP(type=12)]
    six = [ICMPv6PacketTooBig(mtu=1280), ICMPv6DestUnreach(), ICMPv6TimeExceeded()]
    for node, errors in ((NODE4, four), (NODE6, six)):
        for error in errors:
            packet = ip(node) / error
            assert world.run(packet / quoted(node, NODE_PORT)) == REDIRECT
            assert world.run(packet / quoted(node, NODE_PORT, UDP)) == REDIRECT
            assert world.run(packet / quoted(node, 22)) == PASS
        other = NODE6[:-1] + "2" if ":" in node else "198.51.100.2"
        assert world.run(ip(other) / errors[0] / quoted(node, NODE_PORT)) == PASS
        assert world.run(ip(node) / errors[0] / Raw(bytes(quoted(node, NODE_PORT))[:18])) == PASS


@BOTH
def test_a_packet_cut_short_passes(world, node):
    raw = bytes(ip(node) / UDP(dport=NODE_PORT))
    for length in range(14, len(raw) + 1):
        needed = len(raw) - 4  # both ports
        assert world.run(raw[:length]) == (REDIRECT if length >= needed else PASS), length


def test_without_a_forwarder_everything_is_the_kernels(world):
    world.row["timeout_ns"] = 1
    for target in (NODE4, NODE6, VIP4, VIP6):
        assert world.run(ip(target) / TCP(dport=NODE_PORT)) == PASS


def test_nothing_is_looked_up_while_there_is_nothing(world):
    count = int(world.row["frontend_count"])
    world.row["frontend_count"] = 0
    assert world.run(ip(NODE4) / TCP(dport=NODE_PORT)) == PASS
    world.row["frontend_count"] = count
    assert world.run(ip(NODE4) / TCP(dport=NODE_PORT)) == REDIRECT


def test_the_map_follows_the_tables(world):
    world.follow()
    stood = len(world.frontends)
    assert not world.frontends.sync(), "nothing changed"
    world.writer.set_frontend(key(NODE4, 31000, 6), "external")
    assert world.follow()
    assert world.run(ip(NODE4) / TCP(dport=31000)) == REDIRECT
    assert int(world.row["frontend_count"]) == stood + 1
    world.writer.set_frontend(key(NODE4, 31000, 6), "cluster")
    assert world.follow()
    assert world.run(ip(NODE4) / TCP(dport=31000)) == PASS
    world.writer.set_frontend(key(NODE4, 31000, 6), "external")
    world.writer.drop_frontend(key(NODE4, 31000, 6))
    world.follow()
    assert world.run(ip(NODE4) / TCP(dport=31000)) == PASS
    assert len(world.frontends) == stood


def test_a_map_that_refuses_is_told_and_tried_again(world, monkeypatch):
    def refuse(*_):
        raise KernelError("update of map frontends", -7)

    world.writer.set_frontend(key(NODE4, 31001, 6), "external")
    with monkeypatch.context() as patch:
        patch.setattr(world.frontends._entries, "update", refuse)
        world.follow()
        assert "services" in world.frontends.error
        assert world.run(ip(NODE4) / TCP(dport=NODE_PORT)) == REDIRECT
    assert world.frontends.sync()
    assert world.frontends.error == ""
    assert world.run(ip(NODE4) / TCP(dport=31001)) == REDIRECT
    world.writer.drop_frontend(key(NODE4, 31001, 6))
    world.follow()


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    target=st.sampled_from([NODE4, NODE6]),
    rest=st.binary(max_size=120),
    protocol=st.sampled_from([0, 1, 6, 17, 43, 44, 51, 58, 60, 132]),
)
def test_whatever_follows_the_address_is_read_or_passes(world, target, rest, protocol):
    made = {"nh": protocol} if ":" in target else {"proto": protocol}
    world.run(ip(target, **made) / Raw(rest))
