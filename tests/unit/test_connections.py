"""The table of connections by itself: index, clock hand, eviction, sweep, restart.

Tuples and hashes are made up, so that buckets overflow and tags collide when a test wants it.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels import connections as c
from dataplane.kernels.house import kernel
from dataplane.kernels.rows import Rows
from xdp.abi import CONST, DTYPE, value

RECORDS = 256
BUCKETS = RECORDS * 4 // c.WAYS
FREE, CLAIMED, LIVE = (value(f"RECORD_{name}") for name in ("FREE", "CLAIMED", "LIVE"))
STATES = ("CLOSED", "SYN_SENT", "INIT", "UNREPLIED", "ICMP", "SYN_RECEIVED", "CLOSING", "REPLIED",
          "ESTABLISHED")  # fmt: skip
SECOND = 1_000_000_000
MINUTE = -(-60 * SECOND >> c.TICK_SHIFT)
REPLY = 6 << 8  # word of a reply's tuple, without a port
TAKEN = CONST["CONNECTION_FLAG_PORT_TAKEN"]


@kernel
def _find(t, mask, lo, word, hashed):
    zero = np.uint64(0)
    return c.find(t.index.address, t.records.address, mask, zero, lo, zero, zero, word, hashed)


@kernel
def _hash(lo, word):
    zero = np.uint64(0)
    return c.mix(zero, lo, zero, zero, word)


@kernel
def _publish(t, mask, number, hashed, reply):
    return c.publish(t.index.address, t.records.address, mask, number, hashed, reply)


@kernel
def _allocate(t, k):
    index, records, ports = t.index.address, t.records.address, k.nat_ports.address
    return c.allocate(index, records, k.words.address, ports, k.counters.address)


@kernel
def _remove(t, k, number):
    index, records, ports = t.index.address, t.records.address, k.nat_ports.address
    return c.remove(index, records, k.words.address, ports, number)


class Arrays(NamedTuple):
    """What kernels get."""

    records: Rows
    index: Rows


class Table:
    """Records, index, and one or more trackers; a connection is a number in source_lo."""

    def __init__(self, records: int = RECORDS, workers: int = 1, limit: int | None = None) -> None:
        self.records = aligned(records, DTYPE["connection"])
        self.index = aligned(records * 4, np.dtype("<u8"))
        self.t = Arrays(Rows(self.records), Rows(self.index))
        self.ports = np.zeros(4 << 16, np.uint32)
        self.trackers = [
            c.make_tracker(np.zeros(1, DTYPE["track_counter"]), np.zeros(1, DTYPE["exhausted"]),
                           self.ports, records, n, workers)
            for n in range(workers)
        ]  # fmt: skip
        self.k = self.trackers[0]
        if limit:
            self.k.words[c.LIMIT] = limit
        self.mask = int(self.k.words[c.MASK])
        self.tick(100_000)

    def tick(self, now: int) -> None:
        self.now = now
        for tracker in self.trackers:
            tracker.words[c.TICK] = now

    def fill(self, number: int, lo: int, state: str = "UNREPLIED", idle: int = 0, port: int = 0):
        """Write a CLAIMED record: its tuple is (lo), its reply's (lo + 2**40)."""
        row = self.records[number]
        row["source_lo"], row["reply_source_lo"] = lo, lo + (1 << 40)
        row["state"], row["created"] = value(f"CONNECTION_{state}"), 1
        row["last_original"] = row["last_reply"] = (self.now - idle) % (1 << 32)
        row["flags"], row["reply_word"] = TAKEN * bool(port), port << 32 | REPLY
        if port:
            self.ports[port] += 1

    def make(self, lo: int, hashed: int | None = None, k=None, **fields) -> int:
        """Make a connection; return its record, -1 where there is no room."""
        number = _allocate(self.t, k or self.k)
        if number < 0:
            return -1
        assert self.records[number]["owner"] == CLAIMED
        self.fill(number, lo, **fields)
        first, reply = self.hashes(lo, hashed)
        if not _publish(self.t, self.mask, number, np.uint64(first), np.uint64(reply)):
            self.records[number]["owner"] = FREE
            return -1
        return number

    @staticmethod
    def hashes(lo: int, hashed: int | None = None) -> tuple[int, int]:
        if hashed is not None:
            return hashed, (hashed + (1 << 63)) % (1 << 64) ^ 0x5A
        return (lo * 0x9E3779B97F4A7C15) % (1 << 64), (lo * 0xC2B2AE3D27D4EB4F + 1) % (1 << 64)

    def find(self, lo: int, hashed: int | None = None, back: bool = False) -> int:
        """Record << 1 | way of a tuple, or of its reply's; -1: none."""
        number = np.uint64(self.hashes(lo, hashed)[back])
        key, word = np.uint64(lo + (back << 40)), np.uint64(REPLY if back else 0)
        return int(_find(self.t, self.mask, key, word, number))

    def live(self) -> set[int]:
        return set(np.flatnonzero(self.records["owner"] == LIVE).tolist())

    def words(self) -> int:
        return int(np.count_nonzero(self.index > 1))


def aligned(count: int, dtype: np.dtype) -> np.ndarray:
    """Zeros that start with a cache line, as shared memory does."""
    memory = np.zeros(count * dtype.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + count * dtype.itemsize].view(dtype)


def same_bucket(n: int, bucket: int = 3) -> int:
    """A hash that falls into a bucket, with a tag of its own."""
    return n << 32 | bucket


# --- the index ----------------------------------------------------------------------------------


def test_a_connection_is_found_both_ways():
    table = Table()
    number = table.make(7)
    assert table.find(7) == number << 1
    assert table.find(7, back=True) == number << 1 | 1
    assert table.find(8) == -1
    assert _remove(table.t, table.k, number)
    assert table.find(7) == -1
    assert table.words() == 0
    assert not _remove(table.t, table.k, number)


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
        assert _remove(table.t, table.k, numbers[n])
    for n in range(20):
        assert (table.find(n, same_bucket(n + 1)) >= 0) == (n not in (0, 3, 9, 15))
    # The places of removed words are used again, and the tails go on being found.
    table.tick(table.now + c.REST)
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
    assert _remove(table.t, table.k, number)
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
            assert _remove(table.t, table.k, known.pop(n))
        assert table.find(n, hashed(n)) == (known[n] << 1 if n in known else -1)
    for n in range(41):
        assert table.find(n, hashed(n)) == (known[n] << 1 if n in known else -1)
    assert table.words() == 2 * len(known)


# --- the clock hand -----------------------------------------------------------------------------


def test_memory_follows_the_peak_of_live_connections():
    table = Table(limit=16)
    numbers = [table.make(n) for n in range(40)]
    assert len(set(numbers)) == 40
    assert int(table.k.words[c.LIMIT]) == 64
    assert int(table.k.counters[0]["limit"]) == 64
    for number in numbers:
        assert _remove(table.t, table.k, number)
    table.tick(table.now + c.REST)
    assert max(table.make(100 + n) for n in range(40)) < 64
    assert int(table.k.counters[0]["evicted"]) == 0


def test_a_freed_record_rests():
    """A worker in the middle of its vector may still look at it."""
    table = Table(limit=RECORDS)
    first = table.make(0)
    for n in range(1, RECORDS):
        table.make(n)
    assert _remove(table.t, table.k, first)
    table.tick(table.now + c.REST - 1)
    table.k.words[c.HAND] = first
    assert table.make(1000, state="ESTABLISHED") != first
    table.tick(table.now + 1)
    table.k.words[c.HAND] = first
    assert table.make(1001) == first


def fill_up(table: Table, states: list[str], idle: int = 0) -> None:
    for n in range(RECORDS):
        assert table.make(n, state=states[n % len(states)], idle=idle) >= 0


def test_the_order_of_eviction_is_the_order_of_states():
    """Closed and half-open ones go first; of one state the longest idle."""
    table = Table(limit=RECORDS)
    for n in range(RECORDS):
        table.make(n, state=STATES[n % len(STATES)], idle=n % 5)
    gone = []
    for n in range(60):
        table.k.words[c.HAND] = 0
        before = table.records.copy()
        number = table.make(1000 + n, state="ESTABLISHED")
        assert 0 <= number < c.SCAN
        gone.append((int(before[number]["state"]), int(before[number]["last_original"])))
        if before[number]["state"] == value("CONNECTION_REPLIED"):
            break
    assert gone == sorted(gone)
    assert int(table.k.counters[0]["evicted"]) == len(gone)


def test_established_ones_stay_while_they_live():
    table = Table(limit=RECORDS)
    fill_up(table, ["ESTABLISHED"])
    assert [table.make(1000 + n) for n in range(50)] == [-1] * 50
    assert int(table.k.counters[0]["evicted"]) == 0
    table.tick(table.now + c.EVICT_IDLE - 1)
    assert table.make(2000) == -1
    table.tick(table.now + 1)
    assert table.make(2000) >= 0
    assert c.EVICT_IDLE >= MINUTE


def test_one_direction_is_enough_to_live():
    table = Table(limit=RECORDS)
    fill_up(table, ["ESTABLISHED"], idle=c.EVICT_IDLE)
    table.records["last_reply"] = table.now
    assert table.make(1000) == -1


def test_an_evicted_connection_gives_its_words_and_its_port_back():
    table = Table(limit=RECORDS)
    for n in range(RECORDS):
        table.make(n, port=40000 + n)
    number = table.make(1000)
    assert number >= 0
    assert table.words() == 2 * RECORDS
    assert table.ports.sum() == RECORDS - 1
    assert table.ports[40000 + number] == 0


def test_a_free_record_is_found_among_many_that_stay():
    """Established connections side by side must not hide the free half of the table."""
    table = Table(1024, limit=1024)
    numbers = [table.make(n, state="ESTABLISHED") for n in range(700)]
    assert numbers == list(range(700))
    for n in range(1000):  # short ones, that end
        number = table.make(10_000 + n)
        table.tick(table.now + 1)
        assert number >= 700
        assert _remove(table.t, table.k, number)


def test_nobody_is_evicted_while_there_is_room():
    table = Table(1024, limit=1024)
    for n in range(700):
        table.make(n, state="REPLIED")
    for n in range(1000):
        number = table.make(10_000 + n)
        table.tick(table.now + 1)
        assert _remove(table.t, table.k, number)
    assert int(table.k.counters[0]["evicted"]) == 0


def test_a_flood_over_a_full_table_costs_few_steps():
    """The hand goes far only for what it has saved; without free records it saves nothing."""
    table = Table(1024, limit=1024)
    for n in range(1024):
        table.make(n, state="ESTABLISHED")
    for n in range(100):
        before = int(table.k.words[c.HAND])
        assert table.make(5000 + n) == -1
        moved = (int(table.k.words[c.HAND]) - before) % 1024
        assert n == 0 or moved == c.SCAN


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_take_from_their_own_part(workers):
    table = Table(workers=workers)
    part = RECORDS // workers
    for n, tracker in enumerate(table.trackers):
        numbers = [table.make(1000 * n + m, k=tracker) for m in range(part)]
        assert sorted(numbers) == list(range(n * part, (n + 1) * part))
    assert table.words() == 2 * RECORDS


# --- time ---------------------------------------------------------------------------------------

TIMEOUTS = np.zeros(CONST["TIMEOUTS_MAX"], np.uint32)
TIMEOUTS[: len(STATES)] = [10 + 7 * n for n in range(len(STATES))]


def swept(table: Table, tick: int) -> tuple[int, int, int]:
    rows = (table.t.records, table.t.index, Rows(table.ports), Rows(TIMEOUTS))
    return c.sweep(*rows, table.mask, 0, len(table.records), tick)


@pytest.mark.parametrize("start", [1000, (1 << 32) - 300, (1 << 31) - 300, (1 << 32) + 100])
def test_a_sweep_goes_by_the_state_and_the_latest_packet(start):
    """Also when the tick no longer fits the record's 32 bits, after 834 days."""
    table = Table()
    table.tick(start)
    for n, state in enumerate(STATES):
        number = table.make(n, state=state, port=40000 + n)
        table.records[number]["last_original"] = (start - 5) % (1 << 32)
        table.records[number]["last_reply"] = start % (1 << 32)
    for second in (0, 9, 10, 16, 17, 40, 66, 70):
        tick = start + -(-second * SECOND >> c.TICK_SHIFT)
        expected = [state for n, state in enumerate(STATES) if int(TIMEOUTS[n]) > second]
        live, established, _ = swept(table, tick)
        assert live == len(expected)
        assert established == sum(state in ("REPLIED", "ESTABLISHED") for state in expected)
        assert table.words() == 2 * live
        assert table.ports.sum() == live


def test_a_sweep_leaves_alone_what_somebody_works_on():
    table = Table()
    number = table.make(1)
    table.records[number]["owner"] = CLAIMED
    assert swept(table, table.now + 10**6) == (0, 0, 0)
    assert table.records[number]["owner"] == CLAIMED


@pytest.mark.parametrize("start", [(1 << 32) - 10, 1 << 32, (1 << 31) - 10])
def test_the_hand_knows_time_after_834_days(start):
    table = Table(limit=RECORDS)
    table.tick(start)
    for n in range(RECORDS):
        table.make(n, state="ESTABLISHED")
        table.records[n]["last_original"] = table.records[n]["last_reply"] = start % (1 << 32)
    table.tick(start + 20)
    assert table.make(1000) == -1
    table.tick(start + c.EVICT_IDLE + 1)
    assert table.make(1000) >= 0


# --- after a crash ------------------------------------------------------------------------------


def test_a_restart_indexes_what_stands_and_counts_ports_again():
    """Records that somebody was at work on are free; what a record says decides, not the index."""
    table = Table()
    for n in range(60):
        number = table.make(n, port=40000 + n % 7)
        row = table.records[number]
        row["hash"] = row["reply_hash"] = 0xDEAD  # what is left of a half written record
        if n % 5 == 0:
            row["owner"] = CLAIMED
    table.index[:] = 0
    table.ports[:] = 0
    rows = (table.t.records, table.t.index, Rows(table.ports))
    live, end = c.restore(*rows, table.mask, 0, RECORDS)
    assert (live, end) == (48, 60)
    assert table.words() == 96
    assert table.ports.sum() == 48
    taken = Counter(40000 + n % 7 for n in range(60) if n % 5)
    assert {int(p): int(table.ports[p]) for p in np.flatnonzero(table.ports)} == taken
    assert (table.records["owner"] != CLAIMED).all()
    for n in range(60):  # found by the hash that kernels compute of the tuple
        row = table.records[n]
        lo, word = np.uint64(row["source_lo"]), np.uint64(row["word"])
        found = _find(table.t, table.mask, lo, word, np.uint64(_hash(lo, word)))
        assert found == (n << 1 if n % 5 else -1)
