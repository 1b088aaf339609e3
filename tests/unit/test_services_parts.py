"""What the writer of services is made of: parts, rows, and the table of frontends."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels.house import kernel
from dataplane.kernels.service import slot_of
from dataplane.tables import frontends as frontends_table
from dataplane.tables.adjacencies import REST_S
from dataplane.tables.errors import TableFull
from dataplane.tables.frontends import PROBES, Frontends, slot
from dataplane.tables.parts import ROW_REST_S, Parts, Rows
from tests.naive import services as naive
from tests.services_world import Clock
from xdp.abi import CONST, DTYPE, value

MASK64 = (1 << 64) - 1


@kernel
def compiled_slot(hi, lo, port, protocol):
    return slot_of(hi, lo, port, protocol)


def words(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint32)


def content(array: np.ndarray, word: int) -> list[int]:
    first, count = word >> 32, word & 0xFFFFFFFF
    return array[first : first + count].tolist()


# --- parts --------------------------------------------------------------------------------------


def test_equal_contents_share_a_part():
    array, clock = np.zeros(100, np.uint32), Clock()
    parts = Parts(array, "lists", "fewer", clock=clock)
    one, two = parts.put(words(1, 2, 3)), parts.put(words(1, 2, 3))
    assert one == two
    assert content(array, one) == [1, 2, 3]
    assert parts.put(words()) == 0
    other = parts.put(words(1, 2))
    assert other != one
    assert parts.used == 5


def test_a_part_rests_before_others_may_have_it_and_is_taken_up_meanwhile():
    array, clock = np.zeros(8, np.uint32), Clock()
    parts = Parts(array, "lists", "fewer", clock=clock)
    one = parts.put(words(1, 2, 3, 4))
    parts.put(words(5, 6, 7, 8))
    parts.drop(one)
    with pytest.raises(TableFull, match=r"8 of 8.*fewer"):
        parts.put(words(9, 9))
    assert content(array, one) == [1, 2, 3, 4]
    assert parts.put(words(1, 2, 3, 4)) == one, "it is still there"
    parts.drop(one)
    clock.rest(REST_S / 2)
    parts.put(words(1, 2, 3, 4))
    clock.rest()
    with pytest.raises(TableFull):
        parts.put(words(9))
    parts.drop(one)
    clock.rest()
    assert content(array, parts.put(words(9))) == [9]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), resting=st.booleans())
def test_parts_never_overlap_and_all_space_comes_back(seed, resting):
    rng = random.Random(seed)
    array, clock = np.zeros(300, np.uint32), Clock()
    parts = Parts(array, "lists", "fewer", clock=clock)
    held: list[tuple[int, list[int]]] = []
    for step in range(120):
        if held and rng.random() < 0.45:
            word, _ = held.pop(rng.randrange(len(held)))
            parts.drop(word)
        else:
            wanted = [rng.randrange(3) + step * 10 for _ in range(rng.randrange(1, 40))]
            try:
                held.append((parts.put(words(*wanted)), wanted))
            except TableFull:
                clock.rest()
        if resting:
            clock.rest(rng.random() * REST_S)
        for word, wanted in held:
            assert content(array, word) == wanted
    for word, _ in held:
        parts.drop(word)
    clock.rest()
    assert len(content(array, parts.put(np.arange(300, dtype=np.uint32)))) == 300


def test_parts_are_read_back():
    array, clock = np.zeros(64, np.uint32), Clock()
    first = Parts(array, "lists", "fewer", clock=clock)
    kept, lost = first.put(words(1, 2, 3)), first.put(words(4, 5))
    also = first.put(words(6))
    parts = Parts(array, "lists", "fewer", [kept, also, kept], clock)
    assert parts.used == 4
    assert parts.put(words(6)) == also
    fresh = parts.put(words(7, 7))
    assert fresh >> 32 == lost >> 32, "nobody referred to it"
    for _ in range(2):
        parts.drop(kept)
    clock.rest()
    parts.put(words(8))
    assert parts.used == 4


def test_a_damaged_word_is_nobodys_part():
    array = np.zeros(64, np.uint32)
    parts = Parts(array, "lists", "fewer", [60 << 32 | 10, 3 << 32 | 4, 5 << 32 | 9])
    assert parts.used == 4
    parts.drop(60 << 32 | 10)
    assert parts.put(words(*range(20))) >> 32 == 7


# --- rows ---------------------------------------------------------------------------------------


def test_rows_rest_for_long_while_there_are_fresh_ones():
    clock = Clock()
    rows = Rows(6, "services", clock=clock)
    assert [rows.take() for _ in range(3)] == [1, 2, 3]
    rows.give(2)
    clock.rest()
    assert rows.take() == 4
    clock.rest(ROW_REST_S)
    assert rows.take() == 2
    rows.give(1)
    assert rows.take() == 5
    with pytest.raises(TableFull, match=r"services is full: 4 in use, 1 at rest, limit 5"):
        rows.take()
    clock.rest()
    assert rows.take() == 1, "there is no other"


def test_a_row_at_rest_is_taken_up_for_what_it_was():
    clock = Clock()
    rows = Rows(4, "services", clock=clock)
    assert [rows.take() for _ in range(3)] == [1, 2, 3]
    rows.give(1)
    rows.give(2)
    assert rows.take_up(1)
    assert not rows.take_up(1)
    assert not rows.take_up(3)
    clock.rest()
    assert rows.take() == 2
    rows.give(1)
    with pytest.raises(TableFull):
        rows.take()
    clock.rest()
    assert rows.take() == 1


def test_rows_are_read_back():
    rows = Rows(10, "services", used=[2, 5], touched=[1, 5, 3], clock=Clock())
    assert [rows.take() for _ in range(4)] == [4, 6, 7, 8]
    assert rows.used == 6


# --- frontends ----------------------------------------------------------------------------------

KEYS = st.tuples(
    st.integers(0, MASK64), st.integers(0, MASK64), st.integers(0, 65535), st.integers(0, 255)
)


@settings(deadline=None)
@given(KEYS)
def test_kernel_writer_and_twin_agree_on_the_slot(key):
    hi, lo, port, protocol = key
    assert int(compiled_slot(np.uint64(hi), np.uint64(lo), port, protocol)) == slot(key)
    assert naive.mix(*key) % naive.SLOTS == slot(key)


@pytest.fixture
def few(monkeypatch):
    """A table of 16 slots, so that runs are long."""
    monkeypatch.setattr(frontends_table, "SLOTS_MASK", 15)
    monkeypatch.setattr(frontends_table, "PROBES", 16)
    return np.zeros(16, DTYPE["frontend"])


def found(rows: np.ndarray, key) -> int:
    """What a lookup gets, by a scan of its run."""
    first = naive.mix(*key)
    for probe in range(16):
        row = rows[(first + probe) % 16]
        if row["state"] == value("SLOT_EMPTY"):
            return 0
        same = tuple(int(row[name]) for name in ("hi", "lo", "port", "protocol")) == key
        if row["state"] == value("SLOT_USED") and same:
            return int(row["service"])
    return 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_frontends_are_what_a_dictionary_says(seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontends_table, "SLOTS_MASK", 15)
        patch.setattr(frontends_table, "PROBES", 16)
        rows, clock, rng = np.zeros(16, DTYPE["frontend"]), Clock(), random.Random(seed)
        table, model = Frontends(rows, clock), {}
        keys = [(0, n, 80, 6) for n in range(24)]
        for _ in range(150):
            key = rng.choice(keys)
            if rng.random() < 0.5:
                assert table.delete(key) == (model.pop(key, None) is not None)
            else:
                service = rng.randrange(1, 99)
                try:
                    assert table.set(key, service) == (key not in model)
                    model[key] = service
                except TableFull:
                    assert len(model) <= 16
            clock.rest(rng.choice([0, REST_S / 3, REST_S]))
            if rng.random() < 0.05:
                table = Frontends(rows, clock)
        assert table.services == model
        assert all(found(rows, key) == model.get(key, 0) for key in keys)


def test_a_slot_rests_before_another_has_it(few):
    clock = Clock()
    table = Frontends(few, clock)
    keys = [(0, n, 80, 6) for n in range(17)]
    for key in keys[:16]:
        table.set(key, 1)
    with pytest.raises(TableFull, match="16 in 16 slots"):
        table.set(keys[16], 1)
    table.delete(keys[0])
    with pytest.raises(TableFull):
        table.set(keys[16], 1)
    clock.rest()
    assert table.set(keys[16], 1)


def test_probes_bound_a_lookup():
    assert PROBES == CONST["FRONTEND_PROBES_MAX"] == 64
