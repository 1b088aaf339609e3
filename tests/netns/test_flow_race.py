"""The flow table under attack, and read while it is written: never with another flow's action."""

import threading
import time

import numpy as np
import pytest

from dataplane.kernels.flow_entry import ENTRY, fill
from dataplane.kernels.house import kernel
from tests import segments as sg
from tests import worlds as w
from tests.netns.test_flow_table import HTTP, SLOTS, nodes  # noqa: F401
from tests.places import VIPS, A, B, placed
from tests.worlds import POD_A
from xdp.abi import CONST, value

pytestmark = [pytest.mark.root, pytest.mark.net]
WAYS = CONST["FLOW_WAYS"]
LIVE = value("FLOW_LIVE")
RACE_S = 3.0


@kernel
def write_once(b, t, f, i, at, ifindex):
    fill(b, t, f, i, at, ifindex)


@kernel
def write_in_turn(b, t, f, at, ifindex, stop):
    """Write an entry as packet 0 and as packet 1 of the vector in turn, until stop[0] is set."""
    turns = 0
    while stop[0] == 0:
        fill(b, t, f, turns & 1, at, ifindex)
        turns += 1
    return turns


KEY = ("source_hi", "source_lo", "source_port", "first_target_hi", "first_target_lo", "word")


@pytest.mark.parametrize("f", [4, 6])
def test_an_entry_is_never_read_half_written(nodes, f):  # noqa: F811
    """One flow whose entry says "this node" and "over the tunnel" in turn, as fast as it goes."""
    node = nodes()
    one, other = (sg.Ends(A[f], 40001 + n, VIPS[f][7], HTTP) for n in range(2))
    tries = 0
    while tries < 64:  # until the service has sent the two to different nodes
        frames = [sg.udp(e, bytes(64)) for e in (one, other)]
        for frame in frames:
            node.settle(POD_A, frame)
        results = node.world.run([(POD_A, frame) for frame in frames])
        if results[0].egress != results[1].egress:
            break
        other = other._replace(source_port=other.source_port + 1)
        tries += 1
    b, flows = node.world.batch, node.table.flows
    seen = flows.seen.array
    number = int(b.connection[0])
    slot = int(np.flatnonzero((seen["state"] == LIVE) & (seen["record"] == number))[0])
    at, ifindex = flows.entries.address + slot * ENTRY, node.wire.ifindex
    for name in KEY:  # the same packet, with the other's way
        column = getattr(b, name)
        column[1] = column[0]
    b.hash[1] = b.hash[0]
    made = []
    for i in range(2):
        write_once(b, node.world.tables, flows, i, at, ifindex)
        ran = node.xdp(POD_A, frames[0])
        assert ran.forwarded
        made.append(ran.frame)
    assert made[0] != made[1]
    stop = np.zeros(1, np.int64)
    arguments = (b, node.world.tables, flows, at, ifindex, stop)
    stop[0] = 1
    write_in_turn(*arguments)  # compiled
    stop[0] = 0
    turns: list[int] = []
    writer = threading.Thread(target=lambda: turns.append(write_in_turn(*arguments)))
    writer.start()
    came = {True: 0, False: 0}
    end = time.monotonic() + RACE_S
    try:
        while time.monotonic() < end:
            for _ in range(100):
                ran = node.xdp(POD_A, frames[0])
                came[ran.forwarded] += 1
                assert ran.frame in (made if ran.forwarded else frames[:1])
    finally:
        stop[0] = 1
        writer.join()
    assert came[True]
    assert turns[0] > 1000


def test_a_tag_that_is_the_same_is_not_the_flow(nodes):  # noqa: F811
    """What an attacker's collision would be: eight tags that all say "here"."""
    node = nodes()
    frames = [sg.udp(sg.Ends(A[4], 1000 + n, B[4], 2000 + n)) for n in range(SLOTS)]
    expected = {frame: node.settle(POD_A, frame).frame for frame in frames}
    tags = node.table.flows.tags.array.reshape(-1, WAYS)
    inside = [frame for frame in frames if node.xdp(POD_A, frame).forwarded]
    for bucket in tags:
        bucket[:] = bucket[bucket != 0][0] if bucket.any() else 0
    forwarded = 0
    for frame in inside:
        ran = node.xdp(POD_A, frame)
        assert ran.frame == (expected[frame] if ran.forwarded else frame)
        forwarded += ran.forwarded
    assert 0 < forwarded < len(inside)


def test_random_tuples_leave_the_stages_and_who_is_in_alone(nodes):  # noqa: F811
    """A flood of flows of one packet each: none gets an entry, and those that have one keep it.

    It fills the table of connections as well, where answered ones go last.
    """
    node = nodes()
    ends = [sg.Ends(A[4], 50000 + n, B[4], 9) for n in range(16)]
    mine = [sg.udp(e) for e in ends]
    for e in ends:
        node.world.one(POD_A, sg.udp(e))
        node.world.one(*placed(sg.udp(e.back())))
    expected = {frame: node.settle(POD_A, frame).frame for frame in mine}
    draw = np.random.default_rng(1)
    for _ in range(4):
        flood = [
            sg.udp(sg.Ends(A[4], int(a), B[4], int(z)))
            for a, z in draw.integers(1024, 49151, (512, 2))
        ]
        for n in range(0, len(flood), 64):
            results = node.world.run([(POD_A, frame) for frame in flood[n : n + 64]])
            assert all(result.sent for result in results)
        node.world.now += w.SECOND
        node.table.flows.entries.array["last_ns"] = node.world.now
        node.collect()
        for frame in mine:
            ran = node.xdp(POD_A, frame)
            assert ran.forwarded
            assert ran.frame == expected[frame]
    state = node.table.flows.seen.array["state"]
    assert int((state == LIVE).sum()) == len(mine)
