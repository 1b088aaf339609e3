"""What sockets lose is counted once, by reason and port, also of sockets that are gone."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from dataplane.engine.losses import Losses
from xdp.abi import CONST, DTYPE, value
from xdp.errors import KernelError
from xdp.xsk import STATISTIC_NAMES

UPLINK, POD, HOST = 1, 2, 3  # ports
INGRESS, EGRESS = 0, 1
FILL_EMPTY, RECEIVE_FULL = value("REASON_FILL_EMPTY"), value("REASON_RECEIVE_FULL")


class Socket:
    """Its counters stand still unless the test moves them."""

    def __init__(self) -> None:
        self.lost = dict.fromkeys(STATISTIC_NAMES, 0)
        self.closed = False

    def statistics(self) -> dict[str, int]:
        if self.closed:
            raise KernelError("getsockopt", 9)
        return dict(self.lost)


@pytest.fixture
def world():
    shm = SimpleNamespace(
        reasons=np.zeros((2, 2, CONST["REASONS_MAX"]), DTYPE["reason_counter"]),
        port_counters=np.zeros((2, CONST["PORTS_MAX"]), DTYPE["port_counter"]),
        ports=np.zeros(CONST["PORTS_MAX"], DTYPE["port"]),
        dns_notes=np.zeros(CONST["DNS_LANES"], DTYPE["naming_counter"]),
    )
    shm.ports["kind"][UPLINK], shm.ports["kind"][POD] = value("PORT_UPLINK"), value("PORT_POD")
    worker = SimpleNamespace(sockets={0: (Socket(), UPLINK), 1: (Socket(), POD)}, ended=deque())
    drops = np.zeros(2 * CONST["PROGRAM_DROPS"], np.uint64)
    losses = Losses(shm, [worker], drops)
    return SimpleNamespace(shm=shm, worker=worker, losses=losses, drops=drops)


def counted(world) -> dict[tuple[int, int], int]:
    rows = world.shm.reasons["packets"]
    assert not rows[0].any(), "a worker's row was written"
    return {
        (int(way), int(n)): int(rows[-1][way, n])
        for way, n in zip(*rows[-1].nonzero(), strict=True)
    }


def test_losses_are_counted_once_and_packets_in_still_agree(world):
    uplink, pod = (world.worker.sockets[n][0] for n in (0, 1))
    uplink.lost.update(rx_dropped=4, rx_fill_ring_empty_descs=9)
    pod.lost.update(rx_ring_full=3)
    world.losses.collect()
    world.losses.collect()
    uplink.lost.update(rx_dropped=6)
    world.losses.collect()
    assert counted(world) == {(INGRESS, FILL_EMPTY): 6, (EGRESS, RECEIVE_FULL): 3}
    ports = world.shm.port_counters[-1]
    for name in ("rx_packets", "rx_drops"):
        assert (ports[UPLINK][name], ports[POD][name]) == (6, 3)


def test_the_last_losses_of_a_closed_socket_count_and_a_new_one_begins_at_nothing(world):
    gone, port = world.worker.sockets[0]
    gone.lost.update(rx_dropped=4)
    world.losses.collect()
    gone.lost.update(rx_dropped=5)
    world.worker.ended.append((gone, port, gone.statistics()))
    gone.closed = True
    world.worker.sockets[0] = Socket(), UPLINK
    world.worker.sockets[0][0].lost.update(rx_dropped=1)
    world.losses.collect()
    assert counted(world) == {(INGRESS, FILL_EMPTY): 6}


def test_a_socket_that_closes_meanwhile_is_left_alone(world):
    world.worker.sockets[0][0].closed = True
    world.losses.collect()
    assert counted(world) == {}


def test_what_programs_drop_has_a_reason_once_whoever_counts_it(world):
    """The map is the next forwarder's as well; where no port stands for it yet, it waits."""
    world.drops[value("DROP_POD_NO_SOCKET")] = 5
    world.losses.collect()
    assert counted(world) == {}
    world.shm.ports["kind"][HOST] = value("PORT_HOST")
    world.drops[value("DROP_UPLINK_NO_DEVICE")] = 2
    for losses in (world.losses, world.losses, Losses(world.shm, [world.worker], world.drops)):
        losses.collect()
    world.drops[value("DROP_POD_NO_SOCKET")] = 6
    Losses(world.shm, [world.worker], world.drops).collect()
    gone, not_ready = value("REASON_PORT_GONE"), value("REASON_ENDPOINT_NOT_READY")
    assert counted(world) == {(INGRESS, gone): 2, (EGRESS, not_ready): 6}
    ports = world.shm.port_counters[-1]
    assert (ports[UPLINK]["rx_drops"], ports[HOST]["rx_drops"]) == (2, 6)


def test_what_does_not_fit_into_the_trunk_has_a_reason(world, monkeypatch):
    world.shm.ports["kind"][HOST] = value("PORT_HOST")
    world.shm.ports["peer_ifindex"][HOST] = 7
    counts = {7: 3}
    monkeypatch.setattr("dataplane.engine.losses._tx_dropped", counts.get)
    world.losses.collect()  # what was before us is not ours
    assert counted(world) == {}
    counts[7] = 10
    world.losses.collect()
    assert counted(world) == {(EGRESS, RECEIVE_FULL): 7}
    world.shm.ports["peer_ifindex"][HOST] = 8  # the pair was made anew
    world.losses.collect()
    counts[8] = 1
    world.losses.collect()
    counts[8] = 2
    world.losses.collect()
    assert counted(world) == {(EGRESS, RECEIVE_FULL): 8}
