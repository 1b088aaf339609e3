"""Taps: what they take at which point, what it says, what is lost; pcapng as others read it."""

import io
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.all import IP, TCP, UDP, Ether, raw

from dataplane.capture.filters import compile_filter
from dataplane.capture.pcapng import Writer
from dataplane.capture.reader import TapGone, TapReader
from dataplane.capture.words import Words, stages, summary
from dataplane.engine import loop, taps
from dataplane.kernels.taps import keep, make_watch, tap
from tests import strategies
from tests import worlds as w
from tests.naive import taps as naive
from tests.segments import vxlan
from xdp.abi import CONST, value

IN, OUT, STAGES = CONST["TAP_IN"], CONST["TAP_OUT"], CONST["TAP_STAGES"]
SEND, DROP = value("VERDICT_SEND"), value("VERDICT_DROP")


def udp(source) -> bytes:
    """A frame from pod A to pod B."""
    return raw(
        Ether(src=w.POD_MACS[w.POD_A].hex(":"), dst=w.GATEWAY_MAC.hex(":"))
        / IP(src=str(source), dst=str(w.POD4[w.POD_B]), ttl=9)
        / UDP(sport=1000, dport=2000)
        / (b"payload" * 10)
    )


TO_B, SPOOFED = udp(w.POD4[w.POD_A]), udp("9.9.9.9")


class Rig:
    """A world whose worker has a watch, as Worker has."""

    class Idle:
        def call(self, function):
            return function()

    class Table:
        paused = 0

        def pause(self):
            self.paused += 1

        def resume(self):
            self.paused -= 1

    def __init__(self, world):
        self.world, self.table = world, self.Table()
        self.taps = taps.Taps(world.shm, [self.Idle()], self.table)
        self.watch = make_watch(world.shm, 0)

    def open(self, **wanted):
        wanted = {"points": IN, **wanted}
        if "filter" in wanted:
            wanted["program"] = compile_filter(wanted.pop("filter")).tobytes().hex()
        return TapReader(self.world.shm, **self.taps.open(wanted))

    def send(self, *frames):
        """Send (port, frame)s through all stages as a step of the loop does."""
        world = self.world
        world.load(list(frames))
        bits = open_taps_of(self.watch)
        if bits:
            keep(world.batch, self.watch)
        world.process()
        world.tally()
        if bits:
            steps = world.counters.steps
            tap(world.batch, world.tables, self.watch, steps, bits)


def open_taps_of(watch):
    return int(watch.control[0]["taps"])


@pytest.fixture
def rig(world):
    world.forget()
    return Rig(world)


def said(seen):
    row = seen.record
    return int(row["point"]), int(row["port"]), int(row["other"]), int(row["reason"])


def test_a_packet_is_seen_as_it_came_and_as_it_left(rig):
    reader = rig.open(points=IN | OUT)
    rig.send((w.POD_A, TO_B))
    came, left = reader.read()
    assert said(came) == (IN, w.POD_A, w.POD_B, 0)
    assert came.data == TO_B
    assert said(left) == (OUT, w.POD_B, w.POD_A, 0)
    assert left.data[:6] == w.POD_MACS[w.POD_B]
    assert Ether(left.data)[IP].ttl == 8
    assert left.data[34:] == TO_B[34:]
    assert reader.read() == []
    assert reader.lost == 0


def test_a_drop_has_its_reason_and_no_way_out(rig):
    reader = rig.open(points=IN | OUT)
    rig.send((w.POD_A, SPOOFED))
    (seen,) = reader.read()
    assert said(seen) == (IN, w.POD_A, CONST["PORTS_MAX"], value("REASON_INVALID_SOURCE_IP"))
    assert seen.data == SPOOFED


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        ({"filter": "udp port 2000"}, [0, 1]),
        ({"filter": "udp port 2001"}, []),
        ({"filter": "host 9.9.9.9"}, [1]),
        ({"reasons": range(130, 256)}, [1]),
        ({"reasons": [value("REASON_POLICY_DENIED")]}, []),
        ({"port": w.POD_B}, []),
        ({"port": w.POD_A}, [0, 1]),
        ({"identity": w.IDENTITY[w.POD_A]}, [0, 1]),
        ({"identity": 4711}, []),
        ({}, [0, 1]),
    ],
)
def test_selection(rig, wanted, taken):
    reader = rig.open(**wanted)
    frames = [TO_B, SPOOFED]
    rig.send(*((w.POD_A, frame) for frame in frames))
    assert [seen.data for seen in reader.read()] == [frames[n] for n in taken]


def test_filters_see_into_the_tunnel(rig):
    inner = raw(
        Ether(src=w.REMOTE_MAC.hex(":"), dst=w.GATEWAY_MAC.hex(":"))
        / IP(src=str(w.FAR4[9]), dst=str(w.POD4[w.POD_A]))
        / TCP(dport=4321)
    )
    frame = vxlan(inner, w.REMOTE4, w.NODE4, w.VNI)
    outward = raw(
        Ether(src=w.POD_MACS[w.POD_A].hex(":"), dst=w.GATEWAY_MAC.hex(":"))
        / IP(src=str(w.POD4[w.POD_A]), dst=str(w.FAR4[9]))
        / TCP(sport=4321)
    )
    reader = rig.open(points=IN | OUT, port=w.UPLINK, filter="tcp port 4321")
    rig.send((w.UPLINK, frame), (w.POD_A, outward))
    came, left = reader.read()
    assert came.data == frame
    assert (came.inbound, left.inbound) == (True, False)
    assert Ether(left.data)[UDP].dport == 8472
    assert "tunnel" in summary(left.data)


def test_packets_of_many_segments_are_whole(rig):
    payload = bytes(range(256)) * 24
    ends = IP(src=str(w.POD4[w.POD_A]), dst=str(w.POD4[w.POD_B]))
    frame = raw(Ether(TO_B[:14]) / ends / UDP(sport=1, dport=2) / payload)
    reader, cut = rig.open(points=IN | OUT), rig.open(snap=3000)
    rig.world.load_segments(w.POD_A, frame, [2000, 1500])
    keep(rig.world.batch, rig.watch)
    rig.world.process()
    tap(rig.world.batch, rig.world.tables, rig.watch, rig.world.counters.steps, 3)
    came = reader.read()[0]
    assert came.data == frame
    (short,) = cut.read()
    assert short.data == frame[:3000]
    assert int(short.record["length"]) == len(frame)


def test_what_finds_no_room_is_counted_and_the_rest_is_whole(rig):
    reader = rig.open()
    size = 64 + -(-len(TO_B) // 64) * 64
    fits = CONST["TAP_RING_BYTES"] // size
    vectors = fits // 256 + 3
    for _ in range(vectors):
        rig.send(*[(w.POD_A, TO_B)] * 256)
    found = reader.read()
    assert len(found) + reader.lost == vectors * 256
    assert fits - 1 <= len(found) <= fits
    assert {seen.data for seen in found} == {TO_B}
    before = reader.lost
    for _ in range(3):  # around the ring's end
        rig.send(*[(w.POD_A, TO_B)] * 256)
        assert [seen.data for seen in reader.read()] == [TO_B] * 256
    assert reader.lost == before


def test_taps_are_few_and_closed_when_nobody_reads(rig):
    readers = [rig.open() for _ in range(CONST["TAPS_MAX"])]
    with pytest.raises(ValueError, match="the limit"):
        rig.open()
    assert rig.table.paused == 1
    rig.world.shm.taps["lease_ns"] = 0
    rig.taps.turn()
    assert len(rig.taps) == 0
    assert rig.table.paused == 0
    assert open_taps_of(rig.watch) == 0
    with pytest.raises(TapGone):
        readers[0].read()


def test_a_tap_for_drops_leaves_the_flow_table_alone(rig):
    rig.open(reasons=list(range(130, 256)))
    assert rig.table.paused == 0


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"points": 0}, "points 0"),
        ({"points": 4}, "points 4"),
        ({"snap": 1 << 20}, "snap 1048576"),
        ({"port": 1 << 20}, "port 1048576"),
        ({"program": "00" * 7}, "8 an instruction"),
        ({"program": "2800000000000000"}, "does not return"),
        ({"reasons": [300]}, "0 to 255"),
    ],
)
def test_what_makes_no_sense_is_refused(rig, wanted, words):
    with pytest.raises(ValueError, match=words):
        rig.taps.open({"points": IN, **wanted})
    assert len(rig.taps) == 0


def test_stages_say_what_they_made_of_a_packet(rig, tmp_path):
    reader = rig.open(points=IN | STAGES)
    steps = rig.world.counters.steps
    steps.array[:] = 0
    rig.world.load([(w.POD_A, TO_B), (w.POD_A, SPOOFED)])
    keep(rig.world.batch, rig.watch)
    rig.world.process()
    for name in ("ADMIT", "FORWARD"):
        loop.note(rig.world.batch, steps, value(f"STAGE_{name}"), 500)
    tap(rig.world.batch, rig.world.tables, rig.watch, steps, open_taps_of(rig.watch))
    good, bad = reader.read()
    words = Words(rig.world.shm, tmp_path / "none", {f"pst{w.POD_B}": "default/b"})
    told = {row["stage"]: row for row in stages(good, words)}
    assert told["forward"]["ns"] == 250.0
    assert f"pod default/b (pst{w.POD_B})" in told["admit"]["after"]
    assert told["admit"]["after"].startswith("send")
    assert "Invalid source ip" in stages(bad, words)[-2]["after"]
    assert words.comment(bad).startswith("Invalid source ip")


def _pcapng(packets):
    file = io.BytesIO()
    writer = Writer(file, "penstock", 65536)
    for name, description, time_ns, data, comment in packets:
        writer.packet(writer.interface(name, description), time_ns, data, len(data), True, comment)
    writer.end(2_000_000_000, 7)
    return file.getvalue()


PACKETS = [
    ("pnsk1", "default/web", 1_700_000_000_123_456_789, TO_B, "Forwarded; egress by x"),
    ("pnsk2", "default/db", 1_700_000_001_000_000_001, SPOOFED, "Invalid source ip"),
    ("pnsk1", "default/web", 1_700_000_002_000_000_000, TO_B + b"\0", ""),
]


def test_wireshark_reads_interfaces_comments_and_losses(tmp_path):
    path = tmp_path / "c.pcapng"
    path.write_bytes(_pcapng(PACKETS))
    fields = ("frame.interface_name", "frame.interface_description", "frame.comment",
              "frame.time_epoch", "ip.src", "frame.packet_flags_direction")  # fmt: skip
    words = [word for field in fields for word in ("-e", field)]
    done = subprocess.run(
        ["tshark", "-r", path, "-T", "fields", "-E", "separator=|", *words],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert rows[0][:3] == ["pnsk1", "default/web", "Forwarded; egress by x"]
    assert rows[0][3] == "1700000000.123456789"
    assert [row[0] for row in rows] == ["pnsk1", "pnsk2", "pnsk1"]
    assert rows[1][4] == "9.9.9.9"
    assert [int(row[5], 16) for row in rows] == [1, 1, 1]
    info = subprocess.run(["capinfos", path], capture_output=True, text=True, check=True).stdout
    assert "penstock" in info


def test_lines_are_short_and_say_who():
    assert summary(TO_B) == f"{w.POD4[w.POD_A]}:1000 -> {w.POD4[w.POD_B]}:2000 udp"
    assert summary(b"") == "runt"
    assert summary(bytes(60)) == "ethertype 0x0000"
    assert np.array_equal(np.frombuffer(TO_B, np.uint8)[:6], list(w.GATEWAY_MAC))


FILTERS = [
    "",
    "ip",
    "udp",
    "tcp or icmp",
    "host 10.1.1.3",
    "ip6",
    "arp",
    "greater 200",
    "net 9.0.0.0/8",
]
PORTS = st.sampled_from([w.POD_A, w.POD_B, w.UPLINK])
ASKED = st.tuples(
    st.sampled_from([IN, OUT, IN | OUT]),
    st.sampled_from([20, 60, 65536]),
    st.one_of(st.none(), PORTS),
    st.sampled_from([range(256), range(130), range(130, 256)]),
    st.sampled_from(FILTERS),
)


@settings(max_examples=150, deadline=None)
@given(
    sent=st.lists(st.tuples(PORTS, strategies.frames, st.booleans()), min_size=1, max_size=8),
    asked=st.lists(ASKED, min_size=1, max_size=CONST["TAPS_MAX"]),
)
def test_taps_take_what_the_twin_takes(worlds, sent, asked):
    world = worlds()
    world.forget()
    rig = Rig(world)
    programs = {text: compile_filter(text) for text in FILTERS}
    readers = [
        rig.open(points=points, snap=snap, port=port, reasons=list(reasons), filter=text)
        for points, snap, port, reasons, text in asked
    ]
    frames = [
        (w.UPLINK, vxlan(frame, w.REMOTE4, w.NODE4, w.VNI)) if tunnel else (port, frame)
        for port, frame, tunnel in sent
    ]
    rig.send(*frames)
    packets = [_passed(world, i, frame) for i, (_, frame) in enumerate(frames)]
    for reader, (points, snap, port, reasons, text) in zip(readers, asked, strict=True):
        wanted = naive.Tap(points, snap, port, frozenset(reasons), programs[text])
        found = [
            (*said(seen)[:2], said(seen)[3], seen.data, int(seen.record["length"]))
            for seen in reader.read()
        ]
        assert found == naive.taken([one for one in packets if one], wanted)
        assert reader.lost == 0


def _passed(world, i, came):
    b = world.batch
    if b.verdict[i] == value("VERDICT_HOLD"):
        return None
    sent = b.verdict[i] == SEND
    result = world._result(i)
    return naive.Passed(
        came=came,
        left=result.frame if sent else None,
        ingress=int(b.ingress[i]),
        egress=result.egress,
        reason=result.reason,
        from_tunnel=bool(int(b.flags[i]) & value("PACKET_DECAPSULATED")),
        into_tunnel=bool(world.shm.adjacencies[int(b.adjacency[i])]["tunnel_family"]),
    )
