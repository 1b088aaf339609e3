"""XDP forwards what the stages have decided, exactly as they would; the stages are the oracle."""

import random
from ipaddress import ip_address

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataplane.engine import flowtable
from tests import segments as sg
from tests import worlds as w
from tests.netns.flow_node import SHOT, SLOTS, TC_REDIRECT, FlowNode
from tests.places import FAMILIES, FAR, NODE, OUT, OUT_KEPT, PEERS, SERVICES, VIPS, A, B, placed
from tests.setting import Agent, Backend, Policy, Service, Setting, word
from tests.worlds import POD_A, UPLINK, World
from xdp.abi import CONST, value
from xdp.run import prog_run_skb

pytestmark = [pytest.mark.root, pytest.mark.net]
BY_FAMILY = pytest.mark.parametrize("f", FAMILIES)
BY_PROTOCOL = pytest.mark.parametrize("protocol", [sg.TCP, sg.UDP])
HTTP = 80
MTU = 1500  # where there is no tunnel
UDP_SERVICES = tuple(
    Service(((VIPS[f][7], HTTP, sg.UDP),), (Backend(B[f], 99, sg.UDP), Backend(FAR[f], 99, sg.UDP)))
    for f in FAMILIES
)
USUAL = Setting(peers=PEERS, services=SERVICES + UDP_SERVICES, masquerade=True)
OUTSIDE = {*OUT.values(), *OUT_KEPT.values()}
TUNNELS = [("TUNNEL_VXLAN", 4), ("TUNNEL_VXLAN", 6), ("TUNNEL_GENEVE", 4), ("TUNNEL_NONE", 4)]


@pytest.fixture(scope="module", params=["xdp", "tc"])
def nodes(request, tmp_path_factory):
    """Return a function that makes (once) a node of a kind, whose pods have this hook."""
    made = {}

    def make(tunnel: str = "TUNNEL_VXLAN", underlay: int = 4) -> FlowNode:
        if (tunnel, underlay) not in made:
            world = World(tmp_path_factory.mktemp("flows"), tunnel, underlay, 1_000_000, 1, 1024)
            made[tunnel, underlay] = FlowNode(world, hook=request.param), Agent(world)
        node, agent = made[tunnel, underlay]
        node.forget()
        agent.write(USUAL)
        node.agent = agent
        return node

    yield make
    for node, _ in made.values():
        node.close()
        node.world.close()


def open_tcp(node: FlowNode, e: sg.Ends) -> sg.Ends:
    """Shake hands; return the ends of the answers as the server sends them."""
    first = node.world.one(*placed(sg.tcp(e, sg.SYN), direct=not node.world.tunnel))
    back = answer_ends(node, first, e.target)
    node.world.one(*at_far(node, back, sg.tcp(back, sg.SYN | sg.ACK)))
    node.world.one(*placed(sg.tcp(e, sg.ACK), direct=not node.world.tunnel))
    return back


def answer_ends(node: FlowNode, result: w.Result, target) -> sg.Ends:
    """Ends of the answer to a packet that left for `target`."""
    assert result.sent, result
    at = 0
    if node.world.tunnel and result.egress == UPLINK and target not in OUTSIDE:
        at = 14 + (20 if node.world.underlay == 4 else 40) + 8 + 8
    ip = result.frame[at + 14 :]
    start, size, header = (12, 4, 20) if ip[0] >> 4 == 4 else (8, 16, 40)
    source, target = (ip_address(ip[start + n * size :][:size]) for n in range(2))
    ports = [int.from_bytes(ip[header + n :][:2], "big") for n in (0, 2)]
    return sg.Ends(target, ports[1], source, ports[0])


def at_far(node: FlowNode, e: sg.Ends, frame: bytes) -> tuple[int, bytes]:
    """(port, frame) of an answer, from where its source is at home."""
    if node.world.tunnel and e.source in (FAR[4], FAR[6]):
        return UPLINK, tunnelled(node, frame)
    return placed(frame, direct=not node.world.tunnel)


def tunnelled(node: FlowNode, frame: bytes, vni: int = w.VNI, remote=None) -> bytes:
    """A frame as node 2 sends it."""
    ends = (w.REMOTE4, w.NODE4) if node.world.underlay == 4 else (w.REMOTE6, w.NODE6)
    source, target = remote or ends[0], ends[1]
    if node.world.port == 8472:
        return sg.vxlan(frame, source, target, vni)
    header = bytes.fromhex("00006558") + (vni << 8).to_bytes(4, "big")
    return sg.ethernet(sg.packet(
        sg.Ends(source, 50000, target, node.world.port), sg.UDP,
        b"\xc3\x50" + node.world.port.to_bytes(2, "big")
        + (8 + len(header) + len(frame)).to_bytes(2, "big") + b"\0\0" + header + frame,
    ))  # fmt: skip


def exchange(node: FlowNode, e: sg.Ends, protocol: int, size: int = 64) -> None:
    """Packets of one connection in both directions: the program does with them what stages do."""
    if protocol == sg.TCP:
        back = open_tcp(node, e)
        there = sg.tcp(e, sg.ACK | sg.PSH, bytes(range(size)))
        here = sg.tcp(back, sg.ACK | sg.PSH, bytes(size))
    else:
        there = sg.udp(e, bytes(range(size)))
        first = node.world.one(*placed(there, direct=not node.world.tunnel))
        back = answer_ends(node, first, e.target)
        here = sg.udp(back, bytes(size))
    for port, frame in (placed(there, direct=not node.world.tunnel), at_far(node, back, here)):
        expected = node.settle(port, frame)
        assert expected.sent, expected
        ran = node.xdp(port, frame)
        assert ran.forwarded, (port, ran.verdict)
        assert ran.frame == expected.frame


@BY_FAMILY
@BY_PROTOCOL
@pytest.mark.parametrize("where", ["pod", "far", "outside", "kept", "service", "node"])
@pytest.mark.parametrize(("tunnel", "underlay"), TUNNELS)
def test_established_flows_are_forwarded_as_the_stages_do(
    nodes, tunnel, underlay, f, protocol, where
):
    node = nodes(tunnel, underlay)
    target = {
        "pod": B, "far": FAR, "outside": OUT, "kept": OUT_KEPT, "node": NODE,
        "service": {g: VIPS[g][1 if protocol == sg.TCP else 7] for g in FAMILIES},
    }[where]  # fmt: skip
    exchange(node, sg.Ends(A[f], 40001, target[f], HTTP), protocol)


@BY_FAMILY
@pytest.mark.parametrize("where", ["pod", "service"])
def test_between_pods_of_a_node_a_handshake_is_enough(nodes, f, where):
    """Its last packet gives the answers an entry, before one of them comes."""
    node = nodes()
    e = sg.Ends(A[f], 40001, B[f] if where == "pod" else VIPS[f][2], HTTP)
    back = open_tcp(node, e)
    there, here = (sg.tcp(ends, sg.ACK | sg.PSH, b"data") for ends in (e, back))
    ways = [placed(there), at_far(node, back, here)]
    ran = [node.xdp(*way) for way in ways]
    assert all(one.forwarded for one in ran), ran
    assert [node.world.one(*way).frame for way in ways] == [one.frame for one in ran]


# --- what is left to the stages -----------------------------------------------------------------


def established(node: FlowNode, f: int, target=FAR, port: int = HTTP) -> sg.Ends:
    """A TCP connection of pod A with an entry; return its ends."""
    e = sg.Ends(A[f], 40001, target[f], port)
    open_tcp(node, e)
    node.same(sg.tcp(e, sg.ACK, b"data"))
    return e


@BY_FAMILY
@pytest.mark.parametrize("flags", [sg.SYN, sg.FIN | sg.ACK, sg.RST, sg.SYN | sg.ACK])
def test_what_changes_a_tcp_connection_is_for_the_stages(nodes, f, flags):
    node = nodes()
    e = established(node, f)
    node.misses(sg.tcp(e, flags))


@BY_FAMILY
def test_what_is_not_plain_is_for_the_stages(nodes, f):
    """Expiring TTL, fragments, options, oversize, wrong lengths, other protocols, multicast."""
    node = nodes()
    e = established(node, f)
    assert node.settle(POD_A, sg.echo(e)).sent
    frame = sg.tcp(e, sg.ACK, b"data")
    header = 20 if f == 4 else 40
    at = {4: {"ttl": 8, "length": 2}, 6: {"ttl": 7, "length": 4}}[f]

    def changed(*pairs: tuple[int, int]) -> bytes:
        wrong = bytearray(frame)
        for offset, byte in pairs:
            wrong[offset] = byte
        return bytes(wrong)

    l3, l4 = 14, 14 + header
    wrong = [
        changed((l3 + at["ttl"], 1)),
        changed((l3 + at["ttl"], 0)),
        changed((l3 + at["length"], 0x7F)),  # longer than the frame
        changed((l3 + at["length"], 0), (l3 + at["length"] + 1, 10)),
        changed((l4 + 12, 0x40)),  # TCP header shorter than a TCP header
        changed((l4 + 12, 0xF0)),  # and longer than the packet
        changed((0, 1)),
        sg.tcp(e, sg.ACK, bytes(w.PATH_MTU)),
        frame[: l4 + 12],
        frame[:20],
        sg.ethernet(sg.packet(e, sg.GRE, bytes(8))),
        sg.echo(e),
    ]
    if f == 4:
        wrong += [changed((l3, 0x46)), changed((l3 + 6, 0x20)), changed((l3 + 7, 1))]
    else:
        wrong += [changed((l3 + 6, 0)), changed((l3 + 6, 44)), changed((l3 + 6, 60))]
    for broken in filter(lambda frame: node.runs(POD_A, frame), wrong):
        ran = node.xdp(POD_A, broken)
        assert (ran.dropped, ran.frame) == (True, broken)


@BY_FAMILY
def test_of_a_large_packet_each_segment_has_to_fit(nodes, f):
    """At tc a packet may be what the device at the end cuts into segments."""
    node = nodes("TUNNEL_NONE")
    if node.hook != "tc":
        pytest.skip("XDP sees frames, which are segments already")
    e = established(node, f)
    room = MTU - (40 if f == 4 else 60)
    frame = sg.tcp(e, sg.ACK, bytes(2 * room))

    def run(segment: int):
        with node.wire.inside(node.wire.near):
            program, ifindex = node.bpf.programs["pod_tc"], node.wire.ifindex
            return prog_run_skb(program, frame, ifindex, 2 if segment else 0, segment)

    for segment in (0, room + 1):
        assert (run(segment).retval, run(segment).data) == (SHOT, frame)
    node.collect()
    before = int(node.table.packets)
    ran = run(room)
    assert ran.retval == TC_REDIRECT
    assert len(ran.data) == len(frame)  # the rest is as of any packet
    node.collect()
    assert node.table.packets - before == 2


def test_a_device_that_takes_no_frames_from_xdp_takes_packets_from_tc(nodes):
    """A veth whose other end has neither XDP nor GRO; some drivers."""
    node = nodes()
    node.table.devices[UPLINK] = flowtable.BY_TC
    frame = sg.udp(sg.Ends(A[4], 40001, FAR[4], HTTP), b"out")
    node.same(frame) if node.hook == "tc" else node.misses(frame)


@BY_FAMILY
def test_dns_that_no_policy_looks_into_is_a_flow_like_any_other(nodes, f):
    """What becomes of its copies: test_dns_copies.py."""
    node = nodes()
    for e in (
        sg.Ends(A[f], 40001, VIPS[f][5], 53),
        sg.Ends(A[f], 40001, B[f], 53),
        sg.Ends(A[f], 53, FAR[f], 999),
    ):
        node.same(sg.udp(e, b"query"))


@BY_FAMILY
@pytest.mark.parametrize(("tunnel", "underlay"), TUNNELS[:3])
def test_only_the_right_tunnel_leads_in(nodes, tunnel, underlay, f):
    """Another remote, another VNI, another source, a marked packet, a flag: not the same flow."""
    node = nodes(tunnel, underlay)
    e = sg.Ends(A[f], 40001, FAR[f], HTTP)
    back = open_tcp(node, e)
    inside = sg.tcp(back, sg.ACK, b"data")
    good = tunnelled(node, inside)
    node.settle(UPLINK, good)
    assert node.xdp(UPLINK, good).forwarded
    forged = ip_address("192.0.2.9") if underlay == 4 else ip_address("2001:db8::9")
    outer = 14 + (20 if underlay == 4 else 40) + 8
    flagged = bytearray(good)
    flagged[outer] ^= 0x08 if tunnel == "TUNNEL_VXLAN" else 0x80
    other = sg.tcp(back._replace(source=FAR[f] + 1), sg.ACK, b"data")
    for wrong in (
        tunnelled(node, inside, remote=forged),
        tunnelled(node, inside, vni=w.VNI + 1),
        tunnelled(node, other),
        bytes(flagged),
    ):
        assert not node.xdp(UPLINK, wrong).forwarded


# --- generations, ends, counters ----------------------------------------------------------------


def test_one_increment_makes_every_entry_stale_and_one_packet_renews_it(nodes):
    node = nodes()
    e = established(node, 4)
    frame = sg.tcp(e, sg.ACK, b"data")
    for change in ("judgement", "generation", "ports_generation"):
        node.world.shm.control[change] += 1
        node.table.renew()
        node.misses(frame)
        assert node.world.one(POD_A, frame).sent
        assert node.xdp(POD_A, frame).forwarded


def test_the_stages_notice_a_change_that_nobody_told_them(nodes):
    node = nodes()
    e = established(node, 4)
    frame = sg.tcp(e, sg.ACK, b"data")
    node.world.shm.control["judgement"] += 1
    node.world.one(POD_A, sg.udp(sg.Ends(A[4], 1, B[4], 2)))
    node.misses(frame)


def test_a_forbidden_flow_stops_and_starts_again(nodes):
    node = nodes()
    e = established(node, 4)
    frame = sg.tcp(e, sg.ACK, b"data")
    closed = Policy(egress_otherwise=word(CONST["POLICY_DENY"], 9))
    node.agent.write(Setting(peers=PEERS, policies={POD_A: closed}, masquerade=True))
    node.table.renew()
    for _ in range(9):
        node.misses(frame)
        assert node.world.one(POD_A, frame).dropped
    node.agent.write(USUAL)
    node.table.renew()
    node.misses(frame)
    assert node.world.one(POD_A, frame).sent
    assert node.xdp(POD_A, frame).forwarded


@pytest.mark.parametrize("ended", ["fin", "reset", "flushed", "evicted"])
def test_who_ends_takes_the_entries_along(nodes, ended):
    node = nodes()
    e = sg.Ends(A[4], 40001, FAR[4], HTTP)
    back = open_tcp(node, e)
    there, here = sg.tcp(e, sg.ACK, b"data"), tunnelled(node, sg.tcp(back, sg.ACK, b"data"))
    for port, frame in ((POD_A, there), (UPLINK, here)):
        node.settle(port, frame)
        assert node.xdp(port, frame).forwarded
    if ended == "fin":
        node.world.one(POD_A, sg.tcp(e, sg.FIN | sg.ACK))
    elif ended == "reset":
        node.world.one(UPLINK, tunnelled(node, sg.tcp(back, sg.RST)))
    elif ended == "flushed":
        from dataplane.tables.connection_view import Select

        assert node.world.conntrack.flush(Select(None, None, None)) == 1
    else:
        node.world.now += 9000 * w.SECOND
        assert node.world.sweep() == 1
    for port, frame in ((POD_A, there), (UPLINK, here)):
        assert not node.xdp(port, frame).forwarded


@BY_FAMILY
def test_every_packet_counts_once_whoever_forwards_it(nodes, f):
    node = nodes()
    world = node.world
    e = sg.Ends(A[f], 40001, FAR[f], HTTP)
    back = open_tcp(node, e)
    frames = {POD_A: sg.tcp(e, sg.ACK, bytes(100)), UPLINK: tunnelled(node, sg.tcp(back, sg.ACK))}
    for port, frame in frames.items():
        node.settle(port, frame)
    row = world.shm.connections[world.shm.connections["owner"] == value("RECORD_LIVE")][0]
    reasons, ports = (world.shm.reasons[-1].copy(), world.shm.port_counters[-1].copy())
    for port, frame in frames.items():
        for _ in range(50):
            assert node.xdp(port, frame).forwarded
    node.collect()
    node.collect()
    after = world.shm.connections[world.shm.connections["owner"] == value("RECORD_LIVE")][0]
    for way in ("original", "reply"):
        assert after[f"packets_{way}"] - row[f"packets_{way}"] == 50
    ip = len(frames[POD_A]) - 14
    assert after["bytes_original"] - row["bytes_original"] == 50 * ip
    forwarded = value("REASON_FORWARDED")
    counted = world.shm.reasons[-1]["packets"] - reasons["packets"]
    assert counted[0, forwarded] == counted[1, forwarded] == 50
    assert counted.sum() == 100
    fresh = {name: world.shm.port_counters[-1][name] - ports[name] for name in ports.dtype.names}
    for port in (POD_A, UPLINK):
        assert fresh["rx_packets"][port] == fresh["tx_packets"][port] == 50


def test_traffic_in_the_table_keeps_a_connection_alive(nodes):
    """The sweeper knows of the packets that XDP has forwarded."""
    node = nodes()
    e = sg.Ends(A[4], 40001, FAR[4], HTTP)
    frame = sg.udp(e, b"data")
    node.settle(POD_A, frame)
    node.world.now += 1000 * w.SECOND  # the program has the kernel's time, which is far behind
    node.table.flows.entries.array["last_ns"] = 0
    assert node.xdp(POD_A, frame).forwarded
    slot = int(np.flatnonzero(node.world.shm.flow_seen["state"] == value("FLOW_LIVE"))[0])
    node.table.flows.entries.array[slot]["last_ns"] = node.world.now
    node.collect()
    assert node.world.sweep() == 0
    node.world.now += 1000 * w.SECOND
    assert node.world.sweep() == 1


# --- full and attacked --------------------------------------------------------------------------


def test_a_full_table_forwards_what_it_has_and_makes_room_for_who_lasts(nodes):
    """Twice as many flows as slots: each is forwarded, by whom does not matter."""
    node = nodes()
    frames = [sg.udp(sg.Ends(A[4], 1000 + n, B[4], 2000 + n)) for n in range(2 * SLOTS)]
    expected = {}
    for frame in frames:
        expected[frame] = node.settle(POD_A, frame).frame
    first = {frame: node.xdp(POD_A, frame) for frame in frames}
    inside = [frame for frame, ran in first.items() if ran.forwarded]
    assert SLOTS // 2 < len(inside) <= SLOTS
    assert all(first[frame].frame == expected[frame] for frame in inside)
    outside = [frame for frame in frames if not first[frame].forwarded]
    node.world.now += 5 * w.SECOND
    live = node.table.flows.entries.array
    live["last_ns"] = 0  # all are idle
    for _ in range(3):
        for frame in outside:
            node.settle(POD_A, frame)
        live["last_ns"][:] = node.world.now
        node.collect()
        node.collect()
        node.collect()
    won = [frame for frame in outside if node.xdp(POD_A, frame).forwarded]
    assert len(won) > len(outside) // 2


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32))
def test_whatever_comes_is_forwarded_as_the_stages_would_or_not_at_all(nodes, seed):
    """Frames with changed bytes: what the program forwards, the stages forward alike."""
    node = nodes()
    draw = random.Random(seed)
    ways = []
    for f in FAMILIES:
        e = sg.Ends(A[f], 40001, (B, FAR, OUT)[draw.randrange(3)][f], HTTP)
        back = open_tcp(node, e)
        ways.append(placed(sg.tcp(e, sg.ACK, bytes(40))))
        ways.append(at_far(node, back, sg.tcp(back, sg.ACK, bytes(40))))
    for port, frame in ways:
        node.settle(port, frame)
    for _ in range(200):
        port, frame = draw.choice(ways)
        wrong = bytearray(frame)
        for _ in range(draw.randrange(3)):
            wrong[draw.randrange(12, min(len(wrong), 130))] = draw.randrange(256)
        cut = draw.choice([len(wrong)] * 5 + [draw.randrange(14, len(wrong))])
        broken = bytes(wrong[:cut]) + bytes(draw.choice([0, 0, 0, 6]))
        if not node.runs(port, broken):
            continue
        ran = node.xdp(port, broken)
        if not ran.forwarded:
            assert ran.frame == broken
            continue
        told = node.world.one(port, broken)
        if told.sent:
            size = len(told.frame)
            assert ran.frame[:size] == told.frame  # the stages take off what is behind
        else:  # a wrong sum, which stays wrong
            assert told.reason == value("REASON_L3_CHECKSUM"), told
