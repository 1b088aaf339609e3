"""The index of connections by itself: buckets, tags, removed words; a dictionary is its twin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels.connections import REST
from tests.connection_table import BUCKETS, CLAIMED, FREE, Table, remove_from


def same_bucket(n: int, bucket: int = 3) -> int:
    """A hash that falls into a bucket, with a tag of its own."""
    return n << 32 | bucket


def test_a_connection_is_found_both_ways():
    table = Table()
    number = table.make(7)
    assert table.find(7) == number << 1
    assert table.find(7, back=True) == number << 1 | 1
    assert table.find(8) == -1
    assert remove_from(table.t, table.k, number)
    assert table.find(7) == -1
    assert table.words() == 0
    assert not remove_from(table.t, table.k, number)


@pytest.mark.parametrize("crowd", [8, 9, 31, 32])
def test_a_bucket_that_overflows_goes_on_in_the_next(crowd):
    table = Table()
    for n in range(crowd):
        assert table.make(n, same_bucket(n + 1)) >= 0
    assert all(table.find(n, same_bucket(n + 1)) >= 0 for n in range(crowd))
    assert table.find(99, same_bucket(99)) == -1


def test_four_full_buckets_are_the_end_and_leave_nothing_behind():
    table = Table()
    for n in range(32):
        assert table.make(n, same_bucket(n + 1)) >= 0
    before = table.index.copy()
    assert table.make(32, same_bucket(33)) == -1
    assert (table.index == before).all()
    for n in range(32):
        assert table.find(n, same_bucket(n + 1)) >= 0


def test_what_lies_behind_a_removed_word_is_still_found():
    table = Table()
    numbers = [table.make(n, same_bucket(n + 1)) for n in range(20)]
    for n in (0, 3, 9, 15):
        assert remove_from(table.t, table.k, numbers[n])
    for n in range(20):
        assert (table.find(n, same_bucket(n + 1)) >= 0) == (n not in (0, 3, 9, 15))
    # The places of removed words are used again, and the tails go on being found.
    table.tick(table.now + REST)
    for n in (30, 33, 39, 45):
        assert table.make(n, same_bucket(n + 1)) >= 0
    assert all(table.find(n, same_bucket(n + 1)) >= 0 for n in (19, 30, 33, 39, 45))


def test_the_last_bucket_is_followed_by_the_first():
    table = Table()
    for n in range(12):
        assert table.make(n, same_bucket(n + 1, BUCKETS - 1)) >= 0
    assert all(table.find(n, same_bucket(n + 1, BUCKETS - 1)) >= 0 for n in range(12))
    assert np.count_nonzero(table.index[:8] > 1)


def test_equal_tags_are_told_apart_by_their_tuples():
    table = Table()
    numbers = [table.make(n, 5 << 32 | 3) for n in range(6)]
    assert [table.find(n, 5 << 32 | 3) for n in range(6)] == [number << 1 for number in numbers]
    assert table.find(6, 5 << 32 | 3) == -1


@pytest.mark.parametrize("tag", [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_no_tag_is_taken_for_a_mark(tag):
    """Empty and deleted words have tag 0, and a tag may look negative."""
    table = Table()
    hashed = tag << 32 | 3
    number = table.make(1, hashed)
    assert table.find(1, hashed) == number << 1
    assert remove_from(table.t, table.k, number)
    assert table.find(1, hashed) == -1
    assert table.words() == 0


def test_a_record_that_is_not_live_is_not_found():
    table = Table()
    number = table.make(1)
    for owner in (CLAIMED, FREE):
        table.records[number]["owner"] = owner
        assert table.find(1) == -1


STEPS = st.lists(
    st.tuples(st.sampled_from(["make", "make", "remove", "find"]), st.integers(0, 40)), max_size=120
)


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, spread=st.sampled_from([1, 2, 5]))
def test_the_index_is_a_dictionary(steps, spread):
    """Few buckets, so that they overflow, fill with deleted words and wrap."""
    table, known = Table(), {}

    def hashed(n: int) -> int:
        return (n % 7) << 32 | BUCKETS - 1 + n % spread

    for what, n in steps:
        table.tick(table.now + 1)
        if what == "make" and n not in known:
            number = table.make(n, hashed(n))
            if number >= 0:
                known[n] = number
        elif what == "remove" and n in known:
            assert remove_from(table.t, table.k, known.pop(n))
        assert table.find(n, hashed(n)) == (known[n] << 1 if n in known else -1)
    for n in range(41):
        assert table.find(n, hashed(n)) == (known[n] << 1 if n in known else -1)
    assert table.words() == 2 * len(known)
