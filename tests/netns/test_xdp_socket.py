"""AF_XDP sockets on a real veth: packets in, packets out, and what the kernel says of them."""

import contextlib
import errno
import os
import socket

import numpy as np
import pytest

from tests.netns.wire import BASE_MASK, CONTINUES, HEADROOM, STRIDE, Rings, Wire, eventually, frame
from xdp import artifacts, xsk
from xdp.abi import CONST, DTYPE
from xdp.errors import KernelError
from xdp.link import attach_netlink
from xdp.object import BpfObject, ObjectSpec
from xdp.umem import Umem
from xdp.xsk import Xsk

pytestmark = [pytest.mark.root, pytest.mark.net]

FRAMES = 256


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


def wire_of(stack, **options) -> Wire:
    wire = Wire(**options)
    stack.callback(wire.close)
    return wire


def umem_of(stack) -> Umem:
    umem = Umem(FRAMES, huge=False)
    stack.callback(umem.close)
    return umem


def socket_of(stack, umem: Umem, wire: Wire, **options) -> Rings:
    with wire.inside(wire.near):
        opened = Xsk(umem, wire.ifindex, options.pop("queue", 0), **options)
    stack.callback(opened.close)
    return Rings(opened, umem)


def steer(stack, wire: Wire, rings: Rings, native: bool) -> None:
    """Attach pod_rx so that everything that comes from the wire goes to the socket."""
    bpf = stack.enter_context(BpfObject(ObjectSpec.load(artifacts.find("penstock.bpf.o"))))
    bpf.maps["xsks"].update(0, rings.xsk.fd)
    entry = np.zeros((), DTYPE["xdp_port"])
    entry["queue_count"] = 1
    bpf.maps["xdp_ports"].update(wire.ifindex, entry.tobytes())
    with wire.inside(wire.near):
        attached = attach_netlink(bpf.programs["pod_rx"], wire.ifindex, native)
    assert attached.native == native


@pytest.mark.parametrize("native", [True, False], ids=["native", "generic"])
def test_a_packet_arrives_and_goes_back_in_its_own_frame(stack, native):
    wire = wire_of(stack)
    rings = socket_of(stack, umem_of(stack), wire)
    assert (rings.xsk.zero_copy, rings.xsk.sg, rings.xsk.need_wakeup) == (False, True, True)
    steer(stack, wire, rings, native)
    rings.fill(range(8))
    with wire.peer() as peer:
        sent = frame(bytes(range(200)))
        peer.send(sent)
        assert rings.receive() == sent
        [(address, length, options)] = rings.descriptors
        assert (length, options) == (len(sent), 0)
        assert address & BASE_MASK in {number * STRIDE for number in range(8)}
        assert address >> 48 >= HEADROOM, "no room for outer headers"
        rings.send(rings.descriptors)
        assert peer.recv(65536) == sent
    assert rings.completed(1)[0] & BASE_MASK == address & BASE_MASK


@pytest.mark.parametrize("native", [True, False], ids=["native", "generic"])
def test_a_large_packet_is_several_frames_both_ways(stack, native):
    wire = wire_of(stack, mtu=CONST["MTU_MAX"])
    rings = socket_of(stack, umem_of(stack), wire)
    steer(stack, wire, rings, native)
    rings.fill(range(64))
    with wire.peer() as peer:
        sent = frame(os.urandom(60000 - 14))
        peer.send(sent)
        assert rings.receive() == sent
        room = CONST["FRAME_SIZE"] - HEADROOM
        assert len(rings.descriptors) == -(-len(sent) // room)
        assert [options for *_, options in rings.descriptors] == (
            [CONTINUES] * (len(rings.descriptors) - 1) + [0]
        )
        rings.send(rings.descriptors)
        assert peer.recv(65536) == sent
    rings.completed(len(rings.descriptors))


def test_a_frame_received_on_one_device_is_sent_on_another(stack):
    first, second = wire_of(stack), wire_of(stack)
    umem = umem_of(stack)
    receiver, sender = socket_of(stack, umem, first), socket_of(stack, umem, second)
    steer(stack, first, receiver, native=True)
    receiver.fill(range(4))
    with first.peer() as source, second.peer() as target:
        sent = frame(b"the same memory, registered twice")
        source.send(sent)
        receiver.receive()
        sender.send(receiver.descriptors)
        assert target.recv(65536) == sent
    assert sender.completed(1)[0] & BASE_MASK == receiver.descriptors[0][0] & BASE_MASK


def test_one_call_sends_more_than_the_kernels_default(stack):
    wire = wire_of(stack)
    umem = umem_of(stack)
    rings = socket_of(stack, umem, wire)
    if rings.xsk.tx_budget == 32:
        pytest.skip("no XDP_MAX_TX_SKB_BUDGET: needs Linux 6.17")
    packet = frame(bytes(50))
    for number in range(128):
        start = number * STRIDE + HEADROOM
        umem.area[start : start + len(packet)] = memoryview(packet)
        rings.tx.put(number * STRIDE | HEADROOM << 48, len(packet))
    rings.kick()
    assert rings.tx.level() == 0
    rings.completed(128)


def test_statistics_count_what_went_wrong(stack):
    wire = wire_of(stack)
    rings = socket_of(stack, umem_of(stack), wire)
    steer(stack, wire, rings, native=True)
    assert set(rings.xsk.statistics()) == set(xsk.STATISTIC_NAMES)
    with wire.peer() as peer:
        peer.send(frame(bytes(50)))  # no frame in the fill ring
        assert eventually(lambda: rings.xsk.statistics()["rx_fill_ring_empty_descs"])
        rings.send([(FRAMES * STRIDE * 4, 64, 0)])  # outside the area
        assert rings.xsk.statistics()["tx_invalid_descs"] == 1


def test_a_queue_can_be_opened_right_after_it_was_closed(stack):
    wire = wire_of(stack)
    umem = umem_of(stack)
    for _ in range(10):
        with contextlib.ExitStack() as once:
            socket_of(once, umem, wire, ring_size=64, fill_size=64)


def test_a_queue_in_use_is_refused_with_its_name(stack, monkeypatch):
    monkeypatch.setattr(xsk, "BUSY_S", 0.02)
    wire = wire_of(stack)
    umem = umem_of(stack)
    socket_of(stack, umem, wire)
    with pytest.raises(KernelError, match=f"ifindex {wire.ifindex} queue 0") as caught:
        socket_of(stack, umem, wire)
    assert caught.value.errno == errno.EBUSY


def test_what_the_device_has_not_is_refused(stack):
    wire = wire_of(stack)
    umem = umem_of(stack)
    for options, code in (
        ({"zero_copy": True}, errno.EOPNOTSUPP),
        ({"queue": 7}, errno.EINVAL),
    ):
        with pytest.raises(KernelError) as caught:
            socket_of(stack, umem, wire, **options)
        assert caught.value.errno == code
    wire.ifindex = 0x7FFF
    with pytest.raises(KernelError, match="the device is gone"):
        socket_of(stack, umem, wire)
    with pytest.raises(ValueError, match="power of two"):
        Xsk(umem, 1, 0, ring_size=100)


def test_busy_polling_is_taken_where_the_kernel_has_it(stack):
    rings = socket_of(stack, umem_of(stack), wire_of(stack), busy_poll_us=20)
    if not rings.xsk.busy_poll:
        pytest.skip("no SO_PREFER_BUSY_POLL: needs Linux 5.11")
    with rings.opened(rings.xsk.fd) as opened:
        assert opened.getsockopt(socket.SOL_SOCKET, xsk.SO_BUSY_POLL) == 20
        assert opened.getsockopt(socket.SOL_SOCKET, xsk.SO_PREFER_BUSY_POLL) == 1


def test_a_device_that_vanishes_leaves_a_socket_that_closes(stack):
    wire = wire_of(stack)
    rings = socket_of(stack, umem_of(stack), wire)
    steer(stack, wire, rings, native=True)
    wire.close()

    def refused() -> bool:
        try:
            rings.kick()
        except OSError as error:
            return error.errno in (errno.ENXIO, errno.ENETDOWN)
        return False

    assert eventually(refused)
    assert rings.xsk.statistics()["rx_dropped"] == 0
    rings.xsk.close()
    rings.xsk.close()
