"""Rings against a fake kernel: no frame is lost or doubled, whatever comes and goes."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.all import IP, UDP, Ether, Raw, raw

from dataplane.engine import rings as ring_code
from dataplane.engine import transmit as transmit_code
from dataplane.engine.conntrack import NAT_PORTS, Conntrack
from dataplane.engine.worker import Worker
from dataplane.kernels.batch import VERDICT_DROP, VERDICT_HOLD, VERDICT_SEND, make_batch
from dataplane.kernels.fragments import HELD_MAX, HOLD_NS, SLOT_FREE, fragments
from dataplane.kernels.house import kernel
from dataplane.kernels.parse import parse
from dataplane.tables.shm import Shm
from tests.fake_kernel import FakeXsk
from xdp.abi import CONST, value

FRAMES = 96
STRIDE = CONST["FRAME_STRIDE"]


@kernel
def _receive(b, r, f, now):
    return ring_code.receive(b, r, f, now)


@kernel
def _transmit(b, r, stats):
    transmit_code.transmit(b, r, stats)


@kernel
def _collect(r):
    return ring_code.collect(r)


class World:
    """A worker with two sockets on ports 0 and 1."""

    def __init__(self, shm: Shm, sockets: int = 2, size: int = 64, total: int = FRAMES) -> None:
        self.total = total
        self.area = np.zeros(total * STRIDE, np.uint8)
        frames = np.arange(total, dtype=np.int64) * STRIDE
        self.nat_ports = np.zeros(NAT_PORTS, np.uint32)
        conntrack = Conntrack(shm, self.nat_ports, 1)
        lane = (conntrack.trackers[0], conntrack.flows)
        self.worker = Worker(0, shm, self.area.ctypes.data, frames, 0, *lane)
        self.now = HOLD_NS
        self.rings = self.worker.rings
        self.batch = make_batch()
        self.stats = np.zeros(4, np.int64)
        self.pipes = [os.pipe() for _ in range(sockets)]
        self.xsks = [FakeXsk(self.area, pipe[0], size) for pipe in self.pipes]
        self.slots = [self.worker.add(xsk, port) for port, xsk in enumerate(self.xsks)]
        _collect(self.rings)

    def step(self, egress: int | None) -> int:
        """Receive a vector and send it all to a port, or drop it."""
        count = self.receive()
        self.batch.verdict[:count] = VERDICT_DROP if egress is None else VERDICT_SEND
        self.batch.egress[:count] = -1 if egress is None else egress
        _transmit(self.batch, self.rings, self.stats)
        return count

    def receive(self) -> int:
        """Receive a vector; return how many packets came."""
        return _receive(self.batch, self.rings, self.worker.fragments, self.now)

    def hold(self, egress: int) -> list[int]:
        """As `step`, but fragments that come before their first are held; return the reasons."""
        count = self.receive()
        self.batch.now_ns[0] = self.now
        parse(self.batch)
        fragments(self.batch, self.worker.fragments, self.worker.tracker)
        pending = self.batch.verdict[:count] == 0
        self.batch.verdict[:count][pending] = VERDICT_SEND
        self.batch.egress[:count] = egress
        _transmit(self.batch, self.rings, self.stats)
        _collect(self.rings)
        return self.batch.reason[:count].tolist()

    def held(self) -> np.ndarray:
        """Chunk bases of the fragments that wait."""
        waiting = self.worker.fragments.waiting
        assert self.worker.fragments.waiting_count[0] == (waiting["state"] != SLOT_FREE).sum()
        return waiting["frame"][waiting["state"] != SLOT_FREE]

    def audit(self) -> None:
        """Each frame is free, owned by a socket, or a held fragment's, and nowhere twice."""
        free = self.rings.free[: self.rings.free_count[0]] // STRIDE
        owned = np.flatnonzero(self.rings.owner.array >= 0)
        everything = np.concatenate([free, owned, self.held() // STRIDE])
        assert sorted(everything.tolist()) == list(range(self.total))

    def close(self) -> None:
        for pipe in self.pipes:
            for fd in pipe:
                os.close(fd)


@pytest.fixture(scope="module")
def shm(tmp_path_factory):
    with Shm.create(tmp_path_factory.mktemp("rings")) as shm:
        yield shm


@pytest.fixture
def world(shm):
    world = World(shm)
    yield world
    world.close()


def test_a_packet_crosses_from_one_socket_to_the_other(world):
    assert world.xsks[0].deliver(b"a" * 60)
    assert world.step(egress=1) == 1
    assert world.xsks[1].sent() == [b"a" * 60]
    _collect(world.rings)
    world.audit()


def test_a_packet_of_many_segments_arrives_whole(world):
    payload = bytes(range(256)) * 100
    assert world.xsks[0].deliver(payload)
    assert world.step(egress=1) == 1
    assert world.batch.total[0] == len(payload)
    assert world.batch.segments[0] == -(-len(payload) // 3840) - 1
    assert world.xsks[1].sent() == [payload]
    _collect(world.rings)
    world.audit()


def test_too_many_segments_are_dropped_with_their_reason(world):
    world.xsks[0].deliver(bytes(3840 * 4), segment=600)
    count = world.receive()
    assert count == 1
    assert world.batch.verdict[0] == VERDICT_DROP
    assert world.batch.reason[0] == value("REASON_OVERSIZE")
    _transmit(world.batch, world.rings, world.stats)
    world.audit()


def test_a_truncated_answer_frees_its_continuations(world):
    world.xsks[0].deliver(bytes(8000))
    count = world.receive()
    world.batch.verdict[:count] = VERDICT_SEND
    world.batch.egress[:count] = 0
    world.batch.length[0] = world.batch.total[0] = 100
    _transmit(world.batch, world.rings, world.stats)
    assert world.xsks[0].sent() == [bytes(100)]
    _collect(world.rings)
    world.audit()


def test_a_port_without_a_socket_is_a_counted_drop(world):
    world.xsks[0].deliver(b"x" * 60)
    world.step(egress=7)
    assert world.batch.reason[0] == value("REASON_PORT_GONE")
    world.audit()


def test_a_full_transmit_ring_is_a_counted_drop(shm):
    world = World(shm, size=16)
    try:
        for _ in range(3):
            while world.xsks[0].deliver(b"x" * 60):
                pass
            world.step(egress=1)
            _collect(world.rings)
        reasons = world.batch.reason[: world.batch.count[0]]
        assert value("REASON_TRANSMIT_FULL") in reasons.tolist()
        assert world.xsks[1].tx.level() == 16
        world.audit()
    finally:
        world.close()


def test_a_removed_socket_gives_its_frames_back(world):
    world.xsks[0].deliver(b"x" * 60)
    world.step(egress=1)
    world.worker.remove(world.slots[1])
    held = world.worker.reclaim(world.slots[1])
    assert held > 1
    assert world.rings.port_sock[1] == -1
    world.audit()


# --- ports at tc ---------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(tag=st.integers(0, 4095), inner=st.binary(min_size=2, max_size=60), large=st.booleans())
def test_a_tag_on_the_trunk_says_which_port_a_packet_is_from(shm, tag, inner, large):
    """The tag goes, the rest of the frame stays; a tag that is no port is the packet's own."""
    world = World(shm, sockets=3)
    try:
        world.rings.socks[world.slots[0]]["trunk"] = 1
        inner += bytes(6000 * large)
        plain = bytes(range(100, 112)) + inner
        tagged = plain[:12] + b"\x81\x00" + tag.to_bytes(2, "big") + inner
        for xsk, frame in ((0, tagged), (0, plain), (1, tagged)):
            assert world.xsks[xsk].deliver(frame)
        assert world.step(egress=2) == 3
        known = tag < CONST["PORTS_MAX"]
        assert world.batch.ingress[:3].tolist() == [tag if known else 0, 0, 1]
        assert world.xsks[2].sent() == [plain if known else tagged, plain, tagged]
        _collect(world.rings)
        world.audit()
    finally:
        world.close()


def test_a_socket_that_only_sends_holds_no_frames_and_is_not_looked_at(shm):
    world = World(shm, sockets=1)
    try:
        pipe = os.pipe()
        world.pipes.append(pipe)
        silent = FakeXsk(world.area, pipe[0])
        slot = world.worker.add(silent, 1, receives=False)
        _collect(world.rings)
        assert (world.rings.owner.array == slot).sum() == 0
        assert world.rings.active_count.array.tolist() == [2, 1]
        assert world.xsks[0].deliver(b"x" * 60)
        assert world.step(egress=1) == 1
        assert silent.sent() == [b"x" * 60]
        _collect(world.rings)
        world.audit()
    finally:
        world.close()


# --- fragments that wait ------------------------------------------------------------------------

HELD, LOST = value("REASON_HELD"), value("REASON_FRAGMENT_NOT_FOUND")


def piece(offset: int, identification: int = 7) -> bytes:
    """A fragment of a UDP datagram: the first, or one at an offset of eights of bytes."""
    ip = IP(src="10.1.1.2", dst="10.1.1.3", id=identification, proto=17, frag=offset)
    if offset:
        return raw(Ether() / ip / Raw(b"later" + bytes(55)))
    ip.flags = "MF"
    return raw(Ether() / ip / UDP(sport=1, dport=2, len=500) / Raw(bytes(56)))


def test_a_fragment_that_comes_first_waits_for_its_first(world):
    world.xsks[0].deliver(piece(8))
    assert world.hold(egress=1) == [HELD]
    assert world.xsks[1].sent() == []
    world.audit()
    assert world.receive() == 0  # it waits
    world.xsks[0].deliver(piece(0))
    assert world.hold(egress=1) == [0]
    assert world.xsks[1].sent() == [piece(0)]
    assert world.hold(egress=1) == [0]  # by itself: nothing new came
    assert world.xsks[1].sent() == [piece(8)]
    assert len(world.held()) == 0
    _collect(world.rings)
    world.audit()


def test_a_fragment_whose_first_does_not_come_is_given_up(world):
    world.xsks[0].deliver(piece(8))
    world.hold(egress=1)
    world.now += HOLD_NS
    assert world.receive() == 0
    world.now += 1
    lost = int(world.worker.tracker.counters[0]["fragments_lost"])
    assert world.hold(egress=1) == [LOST]
    assert world.batch.verdict[0] == VERDICT_DROP
    assert int(world.worker.tracker.counters[0]["fragments_lost"]) == lost + 1
    assert world.xsks[1].sent() == []
    world.audit()
    world.xsks[0].deliver(piece(0))  # too late
    world.hold(egress=1)
    assert world.xsks[1].sent() == [piece(0)]
    assert world.hold(egress=1) == []


def test_only_so_many_fragments_wait(shm):
    world = World(shm, total=4 * HELD_MAX)
    try:
        reasons: list[int] = []
        for number in range(HELD_MAX + 3):
            assert world.xsks[0].deliver(piece(8, number))
            reasons += world.hold(egress=1)
            world.audit()
        assert reasons == [HELD] * HELD_MAX + [LOST] * 3
        assert VERDICT_HOLD not in world.batch.verdict[:1]
        world.now += HOLD_NS + 1
        assert world.hold(egress=1) == [LOST] * HELD_MAX
        world.audit()
    finally:
        world.close()


def test_fragments_of_many_segments_do_not_wait(world):
    ip = IP(src="10.1.1.2", dst="10.1.1.3", id=7, proto=17, frag=8)
    long = raw(Ether() / ip / Raw(bytes(5000)))
    world.xsks[0].deliver(long)
    assert world.hold(egress=1) == [LOST]
    world.audit()
    world.xsks[0].deliver(piece(0))
    world.hold(egress=1)
    world.xsks[0].deliver(long)
    assert world.hold(egress=1) == [0]
    assert world.xsks[1].sent() == [piece(0), long]
    _collect(world.rings)
    world.audit()


def test_growth_leaves_half_of_the_frames(world):
    assert list(world.rings.fill_target) == [max(ring_code.FILL_LEAST, FRAMES // 2), FRAMES // 2]


def test_ports_without_traffic_leave_frames_to_later_ones(shm):
    """Half the frames of a default node, 90 ports: the first ones do not hold everything."""
    world = World(shm, sockets=0, size=2048, total=8192)
    try:
        for port in range(90):
            world.pipes.append(os.pipe())
            world.xsks.append(FakeXsk(world.area, world.pipes[-1][0], 2048))
            world.slots.append(world.worker.add(world.xsks[-1], port))
            _collect(world.rings)
            assert world.xsks[-1].deliver(bytes(100)), f"port {port} has no frame to receive into"
            world.step(None)
        world.audit()
    finally:
        world.close()


def test_a_port_with_traffic_gets_more_frames(shm):
    world = World(shm, sockets=1, size=2048, total=4096)
    try:
        goals = set()
        for _ in range(40):
            while world.xsks[0].deliver(bytes(60)):
                pass
            world.step(None)
            _collect(world.rings)
            goals.add(int(world.rings.socks[world.slots[0]]["fill_goal"]))
        assert max(goals) == ring_code.FILL_MOST
        world.audit()
    finally:
        world.close()


PIECES = [piece(offset, number) for offset in (0, 8, 16) for number in (1, 2)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1),
            st.integers(1, 9000) | st.sampled_from(PIECES),
            st.sampled_from([None, 0, 1]),
            st.booleans(),
        ),
        max_size=60,
    )
)
def test_frames_are_conserved(shm, history):
    world = World(shm)
    try:
        for socket, what, egress, complete in history:
            world.xsks[socket].deliver(what if isinstance(what, bytes) else bytes(what))
            world.now += HOLD_NS // 4
            if isinstance(what, bytes):
                world.hold(egress or 0)
            else:
                world.step(egress)
            if complete:
                for xsk in world.xsks:
                    xsk.sent()
            _collect(world.rings)
            world.audit()
    finally:
        world.close()
