"""What uplink_rx and pod_rx take from the wire, run by the kernel on packets that scapy built."""

import ipaddress
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw

from tests.netns.wire import Wire
from xdp import artifacts
from xdp.abi import DTYPE
from xdp.errors import XdpError
from xdp.object import BpfObject, ObjectSpec
from xdp.run import prog_run
from xdp.umem import Umem
from xdp.xsk import Xsk

pytestmark = [pytest.mark.root, pytest.mark.net]

DROP, PASS, REDIRECT = 1, 2, 4  # enum xdp_action
PORT = 8472
BASE = 40  # key of our socket in the XSKMAP
LOCALS = ["192.0.2.1", "192.0.2.77", "2001:db8::1", "2001:db8::77"]
PREFIXES = ["10.1.2.0/24", "10.9.0.0/16", "fd01:2::/64", "fd09::/48"]
MAC = "02:50:00:00:00:01"
OURS4, OURS6 = LOCALS[1], LOCALS[3]


class World:
    """The programs, with one socket behind them."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.umem = Umem(64, huge=False)
        self.bpf = BpfObject(ObjectSpec.load(artifacts.find("penstock.bpf.o")))
        with self.wire.inside(self.wire.near):
            self.xsk = Xsk(self.umem, self.wire.ifindex, 0, ring_size=64, fill_size=64)
        self.row = self.bpf.maps["steering"].mmap(DTYPE["steering"])[0]
        self.restore()

    def restore(self) -> None:
        entry = np.zeros((), DTYPE["xdp_port"])
        entry["socket_base"], entry["queue_count"] = BASE, 1
        self.bpf.maps["xdp_ports"].update(self.wire.ifindex, entry[()])
        self.bpf.maps["xsks"].update(BASE, self.xsk.fd)
        self.steer(LOCALS, PREFIXES, PORT)
        self.row["timeout_ns"] = self.row["heartbeat_ns"] = 0

    def steer(self, locals_: list[str], prefixes: list[str], port: int) -> None:
        row = self.row
        for family, name in ((4, "local4_be"), (6, "local6")):
            mine = [ipaddress.ip_address(text).packed for text in locals_]
            mine = [raw for raw in mine if len(raw) == (4 if family == 4 else 16)]
            raw = np.frombuffer(b"".join(mine), row[name].dtype)
            row[name][: len(raw)] = raw
            row[f"local{family}_count"] = len(mine)
            nets = [net for net in map(ipaddress.ip_network, prefixes) if net.version == family]
            for entry, net in zip(row[f"prefix{family}"], nets, strict=False):
                for field, value in (("address", net.network_address), ("mask", net.netmask)):
                    entry[field] = 0
                    entry[field][: len(value.packed)] = memoryview(value.packed)
            row[f"prefix{family}_count"] = len(nets)
        row["tunnel_port_be"] = int.from_bytes(port.to_bytes(2, "big"), "little")

    def run(self, packet, program: str = "uplink_rx", queue: int = 0) -> int:
        raw = bytes(packet)
        with self.wire.inside(self.wire.near):
            result = prog_run(
                self.bpf.programs[program], raw, ingress_ifindex=self.wire.ifindex, queue=queue
            )
        assert result.data == raw, "steering must not change a packet"
        return result.retval

    def close(self) -> None:
        self.xsk.close()
        self.bpf.close()
        self.umem.close()
        self.wire.close()


@pytest.fixture(scope="module")
def shared():
    world = World()
    try:
        yield world
    finally:
        world.close()


@pytest.fixture
def world(shared):
    shared.restore()
    return shared


def tunnel(target: str, port: int = PORT, ether=None):
    ip = IPv6(dst=target) if ":" in target else IP(dst=target)
    return (ether or Ether(dst=MAC)) / ip / UDP(sport=50000, dport=port) / Raw(b"inner")


def test_an_object_of_other_sources_says_so(shared):
    with pytest.raises(XdpError, match=r"penstock\.bpf\.o has no map copies: .*`make build`"):
        shared.bpf.maps["copies"]
    with pytest.raises(ValueError, match=r"map steering has \d+ bytes a value, 8 .*`make build`"):
        shared.bpf.maps["steering"].mmap(np.dtype("<u8"))


@pytest.mark.parametrize("target", LOCALS)
def test_tunnel_packets_to_our_addresses_are_taken(world, target):
    assert world.run(tunnel(target)) == REDIRECT


@pytest.mark.parametrize("target", ["10.1.2.1", "10.9.255.255", "fd01:2::5", "fd09:0:0:ffff::1"])
def test_packets_to_our_pod_prefixes_are_taken_whatever_they_carry(world, target):
    ip = IPv6(dst=target) if ":" in target else IP(dst=target, frag=3, options=[IPOption_NOP()] * 4)
    assert world.run(Ether(dst=MAC) / ip / TCP(dport=80)) == REDIRECT


@pytest.mark.parametrize(
    "packet",
    [
        tunnel("192.0.2.2"),
        tunnel("2001:db8::2"),
        tunnel(OURS4, port=4789),
        tunnel(OURS6, port=PORT + 256),
        tunnel(OURS4, ether=Ether(dst="ff:ff:ff:ff:ff:ff")),
        tunnel(OURS6, ether=Ether(dst="33:33:00:00:00:01")),
        tunnel(OURS4, ether=Ether(dst=MAC) / Dot1Q(vlan=5)),
        Ether(dst=MAC) / IP(dst=OURS4, flags="MF") / UDP(dport=PORT),
        Ether(dst=MAC) / IP(dst=OURS4, frag=1) / UDP(dport=PORT),
        Ether(dst=MAC) / IP(dst=OURS4, options=[IPOption_NOP()] * 4) / UDP(dport=PORT),
        Ether(dst=MAC) / IPv6(dst=OURS6) / IPv6ExtHdrDestOpt() / UDP(dport=PORT),
        Ether(dst=MAC) / IP(dst=OURS4) / TCP(dport=PORT),
        Ether(dst=MAC) / IPv6(dst=OURS6) / TCP(dport=PORT),
        Ether(dst=MAC) / IP(dst="10.1.3.1") / UDP(),
        Ether(dst=MAC) / IPv6(dst="fd01:3::1") / UDP(),
        Ether(dst=MAC) / ARP(pdst=OURS4),
    ],
    ids=lambda packet: packet.summary().split(" > ")[0].replace(" ", "") or "packet",
)
def test_everything_else_passes_to_the_kernel(world, packet):
    assert world.run(packet) == PASS


def test_options_are_not_read_as_ports(world):
    raw = bytearray(bytes(Ether(dst=MAC) / IP(dst=OURS4, options=[IPOption_NOP()] * 8) / UDP()))
    raw[36:38] = PORT.to_bytes(2, "big")  # where the destination port stands without options
    assert world.run(raw) == PASS


def test_dont_fragment_is_no_fragment(world):
    assert world.run(Ether(dst=MAC) / IP(dst=OURS4, flags="DF") / UDP(dport=PORT)) == REDIRECT


@pytest.mark.parametrize("whole", [tunnel(OURS4), tunnel(OURS6)], ids=["IPv4", "IPv6"])
def test_a_packet_cut_short_passes(world, whole):
    raw = bytes(whole)
    needed = len(raw) - len(b"inner")
    for length in range(14, len(raw) + 1):
        assert world.run(raw[:length]) == (REDIRECT if length >= needed else PASS), length


def test_no_tunnel_and_no_prefix_takes_nothing(world):
    world.steer(LOCALS, [], 0)
    assert world.run(tunnel(OURS4, port=0)) == PASS
    assert world.run(tunnel(OURS6, port=0)) == PASS
    assert world.run(tunnel("10.1.2.1")) == PASS


def test_full_lists_work_to_their_last_entry(world):
    world.steer(
        [f"192.0.2.{n}" for n in range(32)] + [f"2001:db8::{n:x}" for n in range(32)],
        [f"10.{n}.0.0/16" for n in range(16)] + [f"fd00:{n:x}::/32" for n in range(16)],
        PORT,
    )
    for target in ("192.0.2.31", "2001:db8::1f", "10.15.1.1", "fd00:f::1"):
        assert world.run(tunnel(target)) == REDIRECT
    for target in ("192.0.2.32", "2001:db8::20", "10.16.1.1", "fd00:10::1"):
        assert world.run(tunnel(target)) == PASS


def test_a_count_beyond_the_list_is_harmless(world):
    for name in ("local4_count", "local6_count", "prefix4_count", "prefix6_count"):
        world.row[name] = 0xFFFFFFFF
    assert world.run(tunnel("198.51.100.9")) in (PASS, REDIRECT)
    assert world.run(tunnel(OURS4)) == REDIRECT


def test_a_stale_heartbeat_passes_everything(world):
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    hour = 3600 * 10**9
    packets = [tunnel(OURS4), tunnel(OURS6), tunnel("10.1.2.1"), tunnel("fd01:2::1")]
    for heartbeat, timeout, verdict in (
        (now, hour, REDIRECT),
        (now + hour, hour, REDIRECT),  # written between the program's two reads
        (now - 2 * 10**9, 10**9, PASS),
        (0, 1, PASS),  # what a forwarder that ends leaves
        (0, 0, REDIRECT),  # watchdog off
    ):
        world.row["heartbeat_ns"], world.row["timeout_ns"] = heartbeat, timeout
        assert {world.run(packet) for packet in packets} == {verdict}
        assert world.run(tunnel("192.0.2.2")) == PASS


def test_a_pod_has_our_socket_or_nothing(world):
    anything = Ether(dst=MAC) / Raw(b"anything")
    assert world.run(anything, "pod_rx") == REDIRECT
    assert world.run(tunnel(OURS4), "pod_rx") == REDIRECT
    world.row["timeout_ns"] = 1  # a stale heartbeat does not open a pod's way into the node
    assert world.run(anything, "pod_rx") == REDIRECT


@pytest.mark.parametrize("without", ["socket", "port", "queue"])
def test_without_a_socket_pods_drop_and_uplinks_pass(world, without):
    if without == "socket":
        assert world.bpf.maps["xsks"].delete(BASE)
    elif without == "port":
        assert world.bpf.maps["xdp_ports"].delete(world.wire.ifindex)
    else:
        entry = np.zeros((), DTYPE["xdp_port"])
        entry["socket_base"] = BASE
        world.bpf.maps["xdp_ports"].update(world.wire.ifindex, entry[()])
    assert world.run(tunnel(OURS4), "pod_rx") == DROP
    assert world.run(tunnel(OURS4), "uplink_rx") == PASS


def wanted(raw: bytes) -> bool:
    """The steering rule over scapy's reading of a frame."""
    packet = Ether(raw)
    if raw[0] & 1 or packet.type not in (0x0800, 0x86DD):
        return False
    ip = packet.payload
    if not isinstance(ip, IP | IPv6) or len(raw) < (34 if packet.type == 0x0800 else 54):
        return False
    target = ipaddress.ip_address(ip.dst)
    if any(target in ipaddress.ip_network(prefix) for prefix in PREFIXES):
        return True
    plain = ip.ihl == 5 and not ip.frag and not ip.flags.MF if target.version == 4 else True
    protocol = ip.proto if target.version == 4 else ip.nh
    at = 34 if target.version == 4 else 54
    return (
        plain
        and protocol == 17
        and len(raw) >= at + 8
        and int.from_bytes(raw[at + 2 : at + 4], "big") == PORT
        and str(target) in LOCALS
    )


@st.composite
def frames(draw):
    """A frame that is near the rule: a good one, bytes of its headers changed, maybe cut."""
    target = draw(st.sampled_from([*LOCALS, "10.1.2.9", "fd09::9", "192.0.2.9", "2001:db8::9"]))
    raw = bytearray(bytes(tunnel(target, draw(st.sampled_from([PORT, 53])))))
    for _ in range(draw(st.integers(0, 2))):
        # The nibbles of version and header length stay: there scapy reads another format.
        at = draw(st.integers(0, len(raw) - 6).filter(lambda at: at not in (12, 13, 14)))
        raw[at] = draw(st.integers(0, 255))
    return bytes(raw[: draw(st.integers(14, len(raw)))])


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(raw=frames())
def test_mutated_frames_follow_the_rule(world, raw):
    assert (world.run(raw) == REDIRECT) == wanted(raw)


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(raw=st.binary(min_size=14, max_size=200))
def test_noise_passes(world, raw):
    assert world.run(raw) == PASS
