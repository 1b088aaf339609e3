"""Rings against a fake kernel: no frame is lost or doubled, whatever comes and goes."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.engine import rings as ring_code
from dataplane.engine.worker import Worker
from dataplane.kernels.batch import VERDICT_DROP, VERDICT_SEND, make_batch
from dataplane.kernels.house import kernel
from dataplane.tables.shm import Shm
from tests.fake_kernel import FakeXsk
from xdp.abi import CONST, value

FRAMES = 96
STRIDE = CONST["FRAME_STRIDE"]


@kernel
def _receive(b, r):
    return ring_code.receive(b, r)


@kernel
def _transmit(b, r, stats):
    ring_code.transmit(b, r, stats)


@kernel
def _collect(r):
    return ring_code.collect(r)


class World:
    """A worker with two sockets on ports 0 and 1."""

    def __init__(self, shm: Shm, sockets: int = 2, size: int = 64) -> None:
        self.area = np.zeros(FRAMES * STRIDE, np.uint8)
        frames = np.arange(FRAMES, dtype=np.int64) * STRIDE
        self.worker = Worker(0, shm, self.area.ctypes.data, frames, 0)
        self.rings = self.worker.rings
        self.batch = make_batch()
        self.stats = np.zeros(2, np.int64)
        self.pipes = [os.pipe() for _ in range(sockets)]
        self.xsks = [FakeXsk(self.area, pipe[0], size) for pipe in self.pipes]
        self.slots = [self.worker.add(xsk, port) for port, xsk in enumerate(self.xsks)]
        _collect(self.rings)

    def step(self, egress: int | None) -> int:
        """Receive a vector and send it all to a port, or drop it."""
        count = _receive(self.batch, self.rings)
        self.batch.verdict[:count] = VERDICT_DROP if egress is None else VERDICT_SEND
        self.batch.egress[:count] = -1 if egress is None else egress
        _transmit(self.batch, self.rings, self.stats)
        return count

    def audit(self) -> None:
        """Each frame is free or owned by a socket, and nowhere twice."""
        free = self.rings.free[: self.rings.free_count[0]] // STRIDE
        owned = np.flatnonzero(self.rings.owner >= 0)
        everything = np.concatenate([free, owned])
        assert sorted(everything.tolist()) == list(range(FRAMES))

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
    count = _receive(world.batch, world.rings)
    assert count == 1
    assert world.batch.verdict[0] == VERDICT_DROP
    assert world.batch.reason[0] == value("REASON_OVERSIZE")
    _transmit(world.batch, world.rings, world.stats)
    world.audit()


def test_a_truncated_answer_frees_its_continuations(world):
    world.xsks[0].deliver(bytes(8000))
    count = _receive(world.batch, world.rings)
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


def test_every_socket_gets_its_share_of_frames(world):
    assert world.rings.fill_target[0] == max(ring_code.FILL_LEAST, FRAMES // 2 // 2)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1), st.integers(1, 9000), st.sampled_from([None, 0, 1]), st.booleans()
        ),
        max_size=60,
    )
)
def test_frames_are_conserved(shm, history):
    world = World(shm)
    try:
        for socket, size, egress, complete in history:
            world.xsks[socket].deliver(bytes(size))
            world.step(egress)
            if complete:
                for xsk in world.xsks:
                    xsk.sent()
            _collect(world.rings)
            world.audit()
    finally:
        world.close()
