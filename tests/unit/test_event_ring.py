"""The ring of events: what is read and what is lost are together all that was written."""

from threading import Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels.events import EVENT, announce, make_ring, place
from dataplane.kernels.house import kernel, store64
from dataplane.tables import events
from dataplane.tables.events import SIZE, EventReader, latest
from dataplane.tables.shm import Shm
from xdp.abi import value

WORDS = EVENT // 8


@kernel
def write(ring, first, count):
    """Write events whose every word is their position."""
    for n in range(count):
        at = place(ring.address)
        for word in range(WORDS):
            store64(at + word * 8, first + n)
        announce(ring.address)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    shm = Shm.create(tmp_path_factory.mktemp("run"))
    yield shm
    shm.close()


@pytest.fixture
def shm(tables):
    tables.event_rings["head"] = 0
    return tables


def ring_of(shm, number: int = 0):
    return make_ring(shm.event_rings[number : number + 1], shm.flow_records[number])


def check(batch: events.Batch) -> None:
    """Each word of each record is its position."""
    words = batch.records.view(np.uint64).reshape(-1, WORDS)
    assert (words == batch.first + np.arange(len(words), dtype=np.uint64)[:, None]).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3 * SIZE // 2), st.integers(1, 2 * SIZE)), max_size=8))
def test_nothing_is_lost_without_being_counted(tables, steps):
    """steps: how many are written, how many may be read after that."""
    tables.event_rings["head"] = 0
    ring, reader = ring_of(tables), EventReader(tables)
    written = seen = 0
    for count, most in [*steps, (0, 2 * SIZE)]:
        write(ring, written, count)
        written += count
        for batch in reader.read(most):
            check(batch)
            seen += len(batch.records)
        assert seen + reader.lost[0] + reader.waiting == written
        assert reader.waiting <= max(0, written - most)


def test_who_keeps_up_loses_nothing(shm):
    ring, reader = ring_of(shm), EventReader(shm)
    for n in range(40):
        write(ring, n * (SIZE // 7), SIZE // 7)
        (batch,) = reader.read(SIZE)
        assert len(batch.records) == SIZE // 7
    assert reader.lost == [0] * events.RINGS


def test_a_reader_beside_its_writer(shm):
    """The writer runs as fast as it can: most is lost, what is read is whole, the sum is right."""
    ring, reader = ring_of(shm), EventReader(shm)
    total = 20_000_000
    write(ring, 0, 0)
    thread = Thread(target=write, args=(ring, 0, total))
    thread.start()
    seen = reads = 0
    while thread.is_alive() or reader.waiting:
        for batch in reader.read(events.PART):
            check(batch)
            seen += len(batch.records)
            reads += 1
    thread.join()
    assert seen + reader.lost[0] == total
    assert reads > 10
    assert seen >= SIZE - 1


def test_rings_are_read_apart_and_the_newest_first(shm):
    drop = value("EVENT_DROP")
    for number, times in enumerate(([5, 1], [4], [3, 2])):
        rows = shm.flow_records[number]
        for at, when in enumerate(times):
            rows[at] = np.zeros((), rows.dtype)
            rows[at]["time_ns"], rows[at]["kind"] = when, drop
        shm.event_rings[number]["head"] = len(times)
    assert [int(row["time_ns"]) for row in latest(shm, drop, 9)] == [5, 4, 3, 2, 1]
    assert [int(row["time_ns"]) for row in latest(shm, drop, 1)] == [4, 2, 1]
    assert not len(latest(shm, value("EVENT_NEW"), 9))


def test_a_reader_may_begin_with_the_last_few(shm):
    write(ring_of(shm), 0, 1000)
    (batch,) = EventReader(shm, 10).read(SIZE)
    assert batch.first == 990
    check(batch)


def test_a_writer_goes_on_where_another_stopped(shm):
    """A forwarder that is replaced does not begin again."""
    reader = EventReader(shm)
    write(ring_of(shm), 0, 10)
    write(ring_of(shm), 10, 10)
    (batch,) = reader.read(SIZE)
    assert len(batch.records) == 20
    check(batch)


def test_tables_that_were_made_anew_have_another_epoch(tmp_path):
    first = Shm.create(tmp_path / "a")
    second = Shm.create(tmp_path / "b")
    try:
        assert events.epoch(first) == events.epoch(first)
        assert events.epoch(first) != events.epoch(second)
    finally:
        first.close()
        second.close()
