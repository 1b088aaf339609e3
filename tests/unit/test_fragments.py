"""Fragments: ports from the first one, in any order, both families, through NAT and the tunnel.

What the frames of held ones do is in test_rings.py; here a world takes them from its vector.
"""

import struct
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels.fragments import HELD_MAX, KEEP_NS
from tests import records
from tests import segments as sg
from tests.naive.packets import Tuple
from tests.naive.rewrite import completed
from tests.places import (
    FAMILIES,
    FAR,
    NODE,
    OUT,
    PEERS,
    SERVICES,
    VIPS,
    A,
    B,
    inside,
    is_drop,
    placed,
)
from tests.setting import DENY, Agent, Policy, Setting, word
from tests.worlds import POD_A, POD_B, UPLINK
from xdp.abi import value

BY_FAMILY = pytest.mark.parametrize("f", FAMILIES)


@pytest.fixture(scope="module")
def stage(worlds):
    world = worlds("TUNNEL_VXLAN", 4, 1_000_000, 1, 1024)
    return world, Agent(world)


@pytest.fixture
def world(stage):
    """Masquerading, services, open policies; no connection."""
    world, agent = stage
    agent.write(Setting(peers=PEERS, services=SERVICES, masquerade=True))
    world.forget()
    world.now += 60_000_000_000
    return world


def piece(e: sg.Ends, offset: int, identification: int = 7, more: bool = True, *, before=b"",
          protocol=sg.UDP, data=b"\xee" * 32) -> bytes:  # fmt: skip
    """A fragment as a frame. offset: in bytes; before: IPv6 options before the transport."""
    if not offset and protocol == sg.UDP:
        data = struct.pack(">HHHH", e.source_port, e.target_port, 500, 0x1234) + data
    if e.source.version == 4:
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(data), identification,
                           offset >> 3 | more << 13, 64, protocol, 0)  # fmt: skip
        return sg.ethernet(completed(head + e.source.packed + e.target.packed + data, 20, 0))
    following = 60 if before else protocol
    if offset == 0:
        data = before + data
    shim = struct.pack(">BBHI", following, 0, offset | more, identification)
    head = struct.pack(">IHBB", 6 << 28, 8 + len(data), 44, 64)
    return sg.ethernet(head + e.source.packed + e.target.packed + shim + data)


def again(world, frames: list[bytes]):
    """Send frames that were held once more, as the engine does when their first has come."""
    return world.run([placed(frame) for frame in frames])


def ready(world) -> int:
    """Fragments whose first one has come."""
    return int((world.fragments.waiting["state"] == 2).sum())


@BY_FAMILY
def test_later_fragments_take_the_ports_of_the_first(world, f):
    e = sg.Ends(A[f], 1000, B[f], 53)
    frames = [piece(e, 0), piece(e, 40), piece(e, 72, more=False)]
    results = world.run([(POD_A, frame) for frame in frames])
    assert [result.egress for result in results] == [POD_B] * 3
    (row,) = records.live(world).values()
    assert records.sides(row)[0] == Tuple(*e, sg.UDP)
    assert int(row["packets_original"]) == 3
    assert set(world.batch.connection[:3].tolist()) == {int(world.batch.connection[0])}


@BY_FAMILY
@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("together", [True, False], ids=["one vector", "many"])
def test_any_order_ends_in_the_same_translation(world, f, order, together):
    """Through a service: all fragments leave for one backend, none without translation."""
    e = sg.Ends(A[f], 1000, VIPS[f][5], 53)
    frames = [piece(e, 0), piece(e, 40), piece(e, 72, more=False)]
    sent = [frames[n] for n in order]
    results = []
    if together:
        results = world.run([(POD_A, frame) for frame in sent])
    else:
        results = [world.one(POD_A, frame) for frame in sent]
    first = order.index(0)
    assert [result.held for result in results] == [n < first for n in range(3)]
    assert ready(world) == first
    late = again(world, sent[:first])
    targets = {str(inside(r).payload.dst) for r in [*late, *results[first:]]}
    assert len(targets) == 1
    assert targets <= {str(B[f]), str(FAR[f])}
    (row,) = records.live(world).values()
    assert int(row["packets_original"]) == 3


@BY_FAMILY
def test_answers_in_fragments_find_their_way_back(world, f):
    """From outside to a masqueraded pod, later fragment first: the ports are the connection's."""
    out = inside(world.one(POD_A, sg.udp(sg.Ends(A[f], 1000, OUT[f], 53)))).payload
    e = sg.Ends(OUT[f], 53, NODE[f], out.payload.sport)
    frames = [piece(e, 40), piece(e, 0)]
    results = world.run([(UPLINK, frame) for frame in frames])
    assert results[0].held
    got = [inside(result).payload for result in (*results[1:], *again(world, frames[:1]))]
    assert [packet.dst for packet in got] == [str(A[f])] * 2


@BY_FAMILY
def test_fragments_inside_the_tunnel(world, f):
    e = sg.Ends(FAR[f], 1000, B[f], 53)
    frames = [piece(e, 40), piece(e, 0)]
    results = world.run([placed(frame) for frame in frames])
    assert results[0].held
    assert results[1].egress == POD_B
    waiting = world.fragments.waiting
    row = waiting[waiting["state"] == 2][0]
    # What the engine takes up again is the inner frame, and it stays one from the tunnel.
    at = int(row["address"]) - world.area.ctypes.data
    assert world.area[at + 12 : at + int(row["length"])].tobytes() == frames[0][12:]
    assert int(row["ingress"]) == UPLINK
    assert int(row["flags"]) == 64  # FLAG_DECAPSULATED


@BY_FAMILY
def test_a_denied_datagram_is_denied_whole(stage, world, f):
    world, agent = stage
    closed = Policy(egress_otherwise=word(DENY, 7, "ICMP"))
    agent.write(Setting(peers=PEERS, policies={POD_A: closed}))
    e = sg.Ends(A[f], 1000, B[f], 53)
    first, later = world.run([(POD_A, piece(e, 0)), (POD_A, piece(e, 40))])
    assert first.sent  # the ICMP error
    assert first.reason == value("REASON_POLICY_DENIED")
    assert is_drop(later, "POLICY_DENIED")
    assert not records.live(world)


@BY_FAMILY
def test_only_its_own_first_gives_ports(world, f):
    """Source, target, identification and (IPv4) protocol all count (RFC 791 3.2, RFC 8200 4.5)."""
    e = sg.Ends(A[f], 1000, B[f], 53)
    world.one(POD_A, piece(e, 0))
    assert world.one(POD_A, piece(e, 40, 8)).held
    assert world.one(POD_A, piece(e._replace(target=FAR[f]), 40)).held
    if f == 4:
        assert world.one(POD_A, piece(e, 40, protocol=sg.GRE)).held
    assert ready(world) == 0
    assert world.one(POD_A, piece(e, 40)).egress == POD_B


def test_options_between_fragment_header_and_transport(world):
    """RFC 8200 4.5: only the first fragment has them; a datagram is known without a protocol."""
    e = sg.Ends(A[6], 1000, B[6], 53)
    options = struct.pack(">BBBB", sg.UDP, 0, 1, 2) + bytes(4)
    frames = [piece(e, 0, before=options), piece(e, 40, before=options)]
    results = world.run([(POD_A, frame) for frame in frames])
    assert [result.egress for result in results] == [POD_B, POD_B]
    (row,) = records.live(world).values()
    assert int(row["packets_original"]) == 2


@BY_FAMILY
def test_ports_are_known_for_as_long_as_a_receiver_waits(world, f):
    e = sg.Ends(A[f], 1000, B[f], 53)
    world.one(POD_A, piece(e, 0))
    world.now += KEEP_NS - 1
    assert world.one(POD_A, piece(e, 40)).egress == POD_B
    world.now += 1
    assert world.one(POD_A, piece(e, 72)).held


def test_a_full_buffer_is_a_counted_drop(world):
    e = sg.Ends(A[4], 1000, B[4], 53)
    results = world.run([(POD_A, piece(e, 40, n)) for n in range(HELD_MAX + 5)])
    assert [result.held for result in results] == [True] * HELD_MAX + [False] * 5
    assert all(is_drop(result, "FRAGMENT_NOT_FOUND") for result in results[HELD_MAX:])
    counters = world.tracker.counters[0]
    assert (int(counters["fragments_held"]), int(counters["fragments_lost"])) == (HELD_MAX, 5)


def test_many_datagrams_at_a_time(world):
    """The ports of a few hundred are remembered; the oldest of a set are forgotten first."""
    e = sg.Ends(A[4], 1000, B[4], 53)
    for start in range(0, 512, 128):
        world.now += 1_000_000
        world.run([(POD_A, piece(e, 0, n)) for n in range(start, start + 128)])
    found = []
    for start in range(0, 512, 64):
        results = world.run([(POD_A, piece(e, 40, n)) for n in range(start, start + 64)])
        found += [result.sent for result in results]
        world.fragments.waiting["state"] = 0
        world.fragments.waiting_count[0] = 0
    assert sum(found[-128:]) > 120  # the newest
    assert sum(found) > 400


# --- the twin ------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(FAMILIES),
        st.sampled_from([0, 0, 40, 72]),
        st.integers(1, 3),  # identification
        st.sampled_from([1000, 2000]),
        st.sampled_from([0, 0, 0, KEEP_NS // 2]),
    ),
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(steps=STEPS, size=st.integers(1, 8))
def test_fragments_are_their_twin(stage, steps, size):
    """A dictionary of first fragments, over vectors of any size."""
    world, agent = stage
    agent.write(Setting(peers=PEERS))
    world.forget()
    firsts: dict[tuple, tuple[int, int]] = {}
    for start in range(0, len(steps), size):
        vector = steps[start : start + size]
        world.now += vector[0][4]
        frames = [piece(sg.Ends(A[f], port, B[f], 53), offset, number)
                  for f, offset, number, port, _ in vector]  # fmt: skip
        results = world.run([(POD_A, frame) for frame in frames])
        for i, (f, offset, number, port, _) in enumerate(vector):
            if offset == 0:
                firsts[f, number] = port, world.now
            known, seen = firsts.get((f, number), (0, -KEEP_NS))
            if world.now - seen >= KEEP_NS:
                assert results[i].held
                continue
            assert results[i].egress == POD_B
            assert int(world.batch.word[i]) >> 48 == known
        world.fragments.waiting["state"] = 0
        world.fragments.waiting_count[0] = 0
