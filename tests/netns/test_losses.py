"""What is lost between kernel and worker has its reason; the device's own counter is the oracle."""

import re
import socket
import threading

import pytest

from tests.netns.test_engine import World, eventually, inside, sh
from xdp.abi import value

pytestmark = [pytest.mark.root, pytest.mark.net]

SENT = 1500  # more than a new socket has receive buffers
FILL_EMPTY, REFUSED = value("REASON_FILL_EMPTY"), value("REASON_DEVICE_REFUSED")


@pytest.fixture
def world():
    world = World()
    try:
        world.start()
        yield world
    finally:
        world.close()


def send(world: World, count: int) -> None:
    """Datagrams from the first pod to the second."""
    with inside(world.pods[0]), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for number in range(count):
            sock.sendto(number.to_bytes(4, "big"), ("10.9.0.3", 9))


def taken(world: World) -> tuple[int, int]:
    """Packets that came in by ports, and by reasons."""
    world.forwarder.losses.collect()
    return int(world.shm.port_counters["rx_packets"].sum()), sum(world.reasons().values())


def test_packets_that_find_no_buffer_are_drops_like_any_other(world):
    sh(f"ip netns exec {world.pods[0]} ping -c 1 -W 5 10.9.0.3")
    hold = threading.Event()
    worker = world.forwarder.workers[0]
    held = threading.Thread(target=worker.call, args=(hold.wait,))
    held.start()
    try:
        send(world, SENT)
        told = sh(f"ip netns exec {world.node} ethtool -S h0")
    finally:
        hold.set()
        held.join()
    dropped = int(re.search(r"rx_queue_0_drops: (\d+)", told)[1])
    assert dropped > 0
    assert eventually(lambda: taken(world)[0] >= SENT)
    received, ended = taken(world)
    assert received == ended
    assert world.reasons()[FILL_EMPTY] == dropped
    assert int(world.shm.port_counters[-1, 0]["rx_drops"]) == dropped


def test_packets_that_the_device_refuses_are_drops_and_not_forwarded(world):
    sh(f"ip netns exec {world.pods[0]} ping -c 1 -W 5 10.9.0.3")
    sh(f"ip -n {world.pods[1]} link set eth0 down")
    before = world.reasons()
    send(world, 20)
    gone = lambda: world.reasons().get(REFUSED, 0)  # noqa: E731
    assert eventually(lambda: gone() == 20), world.reasons()
    assert world.reasons()[0] == before[0], "none of them was forwarded"
    assert int(world.shm.port_counters["tx_drops"][:, 1].sum()) == 20
    received, ended = taken(world)
    assert received == ended
