"""Policy entries and the one writer of policies, over arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels import policy as kernel_policy
from dataplane.kernels.house import kernel
from dataplane.tables.entries import DELETED, Batch, Entries, slots
from dataplane.tables.errors import TableFull
from dataplane.tables.policies import CLOSED, OPEN, Numbers, PolicyWriter
from dataplane.tables.shm import Shm
from tests.naive import policy as naive
from xdp.abi import CONST, DTYPE

ALLOW, DENY = CONST["POLICY_ALLOW"], CONST["POLICY_DENY"]
MATCH = 6 << 8 | 17


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def batch(entries: dict) -> Batch:
    """Entries (key, match) -> verdict."""
    keys, matches = zip(*entries, strict=True) if entries else ((), ())
    return Batch.of(keys, matches, entries.values())


def columns(places) -> tuple[np.ndarray, np.ndarray]:
    one = batch(dict.fromkeys(places, 0))
    return one.keys, one.matches


def standing(entries: Entries) -> dict:
    found = entries.all()
    pairs = zip(found.keys.tolist(), found.matches.tolist(), strict=True)
    return dict(zip(pairs, found.verdicts.tolist(), strict=True))


def small(slots_: int = 64, clock=None, most: int = 40) -> tuple[np.ndarray, Entries]:
    rows = np.zeros(slots_, DTYPE["policy_entry"])
    return rows, Entries(rows, clock or Clock(), most=most)


@kernel
def _slots(keys, matches, out):
    for i in range(len(out)):
        out[i] = kernel_policy.slot_of(keys[i], matches[i])


def test_the_kernel_mixes_alike():
    numbers = np.random.default_rng(1)
    keys = numbers.integers(0, 1 << 60, 500, np.uint64)
    matches = numbers.integers(0, 1 << 16, 500, np.uint64)
    out = np.zeros(500, np.int64)
    _slots(keys, matches, out)
    assert (out == slots(keys, matches, CONST["POLICY_SLOTS"] - 1)).all()


PLACES = st.tuples(st.integers(0, 30), st.sampled_from([MATCH, MATCH + 1, 17 << 8 | 1]))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.dictionaries(PLACES, st.sampled_from([1, 2, 257, 6]))),
        st.tuples(st.just("delete"), st.lists(PLACES)),
        st.tuples(st.just("wait"), st.just(None)),
        st.tuples(st.just("keep"), st.dictionaries(PLACES, st.just(1))),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_entries_are_a_dictionary(steps):
    clock = Clock()
    rows, entries = small(clock=clock)
    known: dict = {}
    for what, given_ in steps:
        if what == "wait":
            clock.now += 2
        elif what == "set":
            try:
                entries.write(entries.plan(batch(given_)))
            except TableFull:
                assert len(known.keys() | given_.keys()) > 20  # room was short
                continue
            known |= given_
        elif what == "delete":
            gone = known.keys() & set(given_)
            assert entries.delete(*columns(given_)) == len(gone)
            known = {place: word for place, word in known.items() if place not in gone}
        else:
            entries.keep(batch(given_))
            known = {place: word for place, word in known.items() if place in given_}
        assert standing(entries) == known
        assert entries.count == len(known)
    again = Entries(rows, clock)
    assert standing(again) == known
    assert again.count == len(known)
    found = entries.find(*columns(known)) if known else []
    assert all(at >= 0 for at in found)


def test_a_full_table_changes_nothing_and_says_so():
    rows, entries = small(most=20)
    entries.write(entries.plan(batch({(n, MATCH): 1 for n in range(20)})))
    before = rows.copy()
    with pytest.raises(TableFull, match=r"20 policy entries and 1 more: limit 20.*fewer"):
        entries.plan(batch({(99, MATCH): 1, (3, MATCH): 2}))
    assert (rows == before).all()
    entries.write(entries.plan(batch({(3, MATCH): 2})))
    assert standing(entries)[3, MATCH] == 2


def test_no_slot_in_reach_changes_nothing():
    rows, entries = small(64, most=100)
    entries.write(entries.plan(batch({(n, MATCH): 1 for n in range(60)})))
    before = rows.copy()
    with pytest.raises(TableFull, match="no slot within 64 probes"):
        entries.plan(batch({(n, MATCH): 1 for n in range(60, 70)}))
    assert (rows == before).all()
    plan = entries.plan(batch({(n, MATCH): 1 for n in range(60, 64)}))
    entries.write(plan)
    assert entries.count == 64


def test_a_deleted_slot_rests_but_for_its_own_key():
    clock = Clock()
    _, entries = small(64, clock, most=100)
    entries.write(entries.plan(batch({(n, MATCH): 1 for n in range(64)})))
    entries.delete(*columns([(5, MATCH)]))
    with pytest.raises(TableFull):
        entries.plan(batch({(999, MATCH): 1}))
    for _ in range(100):  # a policy that flaps takes no more room
        entries.write(entries.plan(batch({(5, MATCH): 1})))
        entries.delete(*columns([(5, MATCH)]))
    clock.now += 2.5
    entries.write(entries.plan(batch({(999, MATCH): 1})))
    assert (999, MATCH) in standing(entries)


def test_rested_slots_at_the_end_of_a_run_become_empty():
    clock = Clock()
    rows, entries = small(64, clock)
    entries.write(entries.plan(batch({(n, MATCH): 1 for n in range(20)})))
    entries.delete(*columns([(n, MATCH) for n in range(20)]))
    assert (rows["match"] == DELETED).any()
    clock.now += 2.5
    entries.write(entries.plan(batch({(1, 1): 1})))
    clock.now += 2.5
    entries.plan(batch({(2, 1): 1}))
    assert not (rows["match"] == DELETED).any()


def test_denies_are_planned_before_allows():
    _, entries = small(64, most=100)
    mixed = {(n, MATCH): DENY if n % 3 == 0 else ALLOW for n in range(30)}
    plan = entries.plan(batch(mixed))
    assert [set((step.verdicts & 3).tolist()) for step, _ in plan.steps] == [{DENY}, {ALLOW}]
    # With only the denies written a lookup finds each of them: none lies behind an empty slot.
    first, where = plan.steps[0]
    entries._keys[where] = first.keys
    entries._seconds[where] = first.matches | first.verdicts << np.uint64(32)
    assert (entries.find(first.keys, first.matches) >= 0).all()


# --- the writer -----------------------------------------------------------------------------------


@pytest.fixture
def shm(tmp_path):
    with Shm.create(tmp_path) as made:
        yield made


def test_numbers_are_taken_given_back_and_rested():
    clock = Clock()
    numbers = Numbers("row", "use fewer", [3], range(2, 6), clock)
    assert [numbers.take() for _ in range(3)] == [2, 4, 5]
    numbers.give(4)
    with pytest.raises(TableFull, match=r"no row is left: 3 in use, 1 resting, limit 4: use fewer"):
        numbers.take()
    clock.now += 2
    assert numbers.take() == 4


def test_what_stands_is_read_back(shm):
    writer = PolicyWriter(shm)
    assert (shm.policies[OPEN]["ingress_otherwise"], shm.policies[CLOSED]["flags"]) == (ALLOW, 0)
    row, policy = writer.peers.take(), writer.policies.take()
    writer.set_peer(row, 1234, (7, 0), CONST["PEER_POD"])
    assert writer.map(4, 0x0A000001, 32, row)
    assert not writer.map(4, 0x0A000001, 32, row)
    assert writer.map(6, 1, 128, row)
    assert writer.map_identity(300, row)
    assert writer.set_policy(policy, (1, 2, 0, 0, 0, 0), (3, 4), 1)
    assert not writer.set_policy(policy, (1, 2, 0, 0, 0, 0), (3, 4), 1)
    assert writer.set_subject(9, 1234, policy)
    assert naive.peer_of(shm, "10.0.0.1") == naive.peer_of(shm, "::1") == row
    again = PolicyWriter(shm)
    assert again.peers.used == {row}
    assert again.policies.used == {policy}
    assert again.subject(9) == (1234, policy)
    assert again.unmap(4, 0x0A000001, 32)
    assert not again.unmap(4, 0x0A000001, 32)
    again.set_subject(9, 0, CLOSED)
    again.clear_policy(policy)
    assert not int(shm.policies[policy]["egress_otherwise"])


def test_a_group_moves_by_one_word_a_row(shm):
    writer = PolicyWriter(shm)
    rows = [writer.peers.take() for _ in range(3)]
    for row in rows:
        writer.set_peer(row, 5, (1, 2), 0)
    writer.set_groups(rows[:2], [(8, 2), (9, 3)])
    assert shm.peers["groups"][rows].tolist() == [8 | 2 << 32, 9 | 3 << 32, 1 | 2 << 32]
    assert shm.peers["identity"][rows].tolist() == [5, 5, 5]


def test_a_writer_that_died_is_repaired(shm):
    writer = PolicyWriter(shm)
    row = writer.peers.take()
    writer.map(4, 0x0A000000, 23, row)
    shm.ipcache4_wide[0x0A0001] = 0  # half of it was written
    with pytest.raises(RuntimeError), writer.changing():
        raise RuntimeError("killed")
    PolicyWriter(shm)
    assert naive.peer_of(shm, "10.0.1.1") == row


def test_depths_are_widened_before_and_narrowed_after(shm):
    writer = PolicyWriter(shm)
    row = writer.policies.take()
    writer.set_policy(row, (1, 0, 0, 2, 0, 0), (ALLOW, DENY), 0)
    writer.widen(row, (4, 8, 16, 32, 0, 64))
    assert (shm.policies[row]["ingress_depths"], shm.policies[row]["egress_depths"]) == (5, 8)
    wide = shm.policies[row]["ingress_wide_depths"], shm.policies[row]["egress_wide_depths"]
    assert wide == (16, 34)
    assert int(shm.policies[row]["egress_any_depths"]) == 64
    assert int(shm.policies[row]["egress_otherwise"]) == DENY
