"""Records of connections: the clock hand, eviction, sweep by time-outs, restart after a crash."""

from collections import Counter

import numpy as np
import pytest

from dataplane.kernels import ageing
from dataplane.kernels import connections as c
from dataplane.kernels.rows import Rows
from tests.connection_table import (
    CLAIMED,
    MINUTE,
    RECORDS,
    SECOND,
    STATES,
    Table,
    find_in,
    hash_of,
    remove_from,
)
from xdp.abi import CONST, value

# --- the clock hand -----------------------------------------------------------------------------


def test_memory_follows_the_peak_of_live_connections():
    table = Table(limit=16)
    numbers = [table.make(n) for n in range(40)]
    assert len(set(numbers)) == 40
    assert int(table.k.words[c.LIMIT]) == 64
    assert int(table.k.counters[0]["limit"]) == 64
    for number in numbers:
        assert remove_from(table.t, table.k, number)
    table.tick(table.now + c.REST)
    assert max(table.make(100 + n) for n in range(40)) < 64
    assert int(table.k.counters[0]["evicted"]) == 0


def test_a_freed_record_rests():
    """A worker in the middle of its vector may still look at it."""
    table = Table(limit=RECORDS)
    first = table.make(0)
    for n in range(1, RECORDS):
        table.make(n)
    assert remove_from(table.t, table.k, first)
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
        assert remove_from(table.t, table.k, number)


def test_nobody_is_evicted_while_there_is_room():
    table = Table(1024, limit=1024)
    for n in range(700):
        table.make(n, state="REPLIED")
    for n in range(1000):
        number = table.make(10_000 + n)
        table.tick(table.now + 1)
        assert remove_from(table.t, table.k, number)
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


def test_a_full_table_refuses_only_where_nobody_can_go():
    """Half stays, side by side; the other half is a flood that gives way to itself."""
    table = Table(1024, limit=1024)
    for n in range(1024):
        table.make(n, state="ESTABLISHED" if n < 512 else "SYN_SENT", idle=1)
    refused = 0
    for n in range(2000):
        table.tick(table.now + 1)
        number = table.make(5000 + n, state="SYN_SENT")
        assert number == -1 or number >= 512
        refused += number < 0
    assert refused < 100


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
def test_workers_take_from_their_own_part(workers):
    """The parts are the table: no record is nobody's, or it would never be swept."""
    table = Table(workers=workers)
    part = RECORDS // workers
    for n, tracker in enumerate(table.trackers):
        end = (n + 1) * part if n < workers - 1 else RECORDS
        numbers = [table.make(1000 * n + m, k=tracker) for m in range(end - n * part)]
        assert sorted(numbers) == list(range(n * part, end))
    assert table.words() == 2 * RECORDS


# --- time ---------------------------------------------------------------------------------------

TIMEOUTS = np.zeros(CONST["TIMEOUTS_MAX"], np.uint32)
TIMEOUTS[: len(STATES)] = [10 + 7 * n for n in range(len(STATES))]


def swept(table: Table, tick: int) -> tuple[int, int, int]:
    rows = (table.t.records, table.t.index, table.k.places, table.k.ring, Rows(TIMEOUTS))
    return ageing.sweep(*rows, table.mask, 0, len(table.records), tick)


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
    rows = (table.t.records, table.t.index, table.k.places)
    live, end = ageing.restore(*rows, table.mask, 0, RECORDS)
    assert (live, end) == (48, 60)
    assert table.words() == 96
    assert table.ports.sum() == 48
    taken = Counter(40000 + n % 7 for n in range(60) if n % 5)
    assert {int(p): int(table.ports[p]) for p in np.flatnonzero(table.ports)} == taken
    assert (table.records["owner"] != CLAIMED).all()
    for n in range(60):  # found by the hash that kernels compute of the tuple
        row = table.records[n]
        lo, word = np.uint64(row["source_lo"]), np.uint64(row["word"])
        found = find_in(table.t, table.mask, lo, word, np.uint64(hash_of(lo, word)))
        assert found == (n << 1 if n % 5 else -1)
