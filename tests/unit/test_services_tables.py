"""Parts, rows, frontends and the writer of services: what stands, rests, overflows, restarts."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels.service import slot_of
from dataplane.tables import frontends as frontends_table
from dataplane.tables import services as services_table
from dataplane.tables.adjacencies import REST_S
from dataplane.tables.errors import TableFull
from dataplane.tables.frontends import PROBES, Frontends, slot
from dataplane.tables.parts import ROW_REST_S, Parts, Rows
from dataplane.tables.service_view import backends, decoded, frontends, maglev
from dataplane.tables.services import ServiceRow, ServiceWriter, Table
from dataplane.tables.shm import Shm
from tests.naive import services as naive
from tests.services_world import Clock
from xdp.abi import CONST, DTYPE, value

KEEP_SOURCE, CLUSTER_IP = CONST["SERVICE_KEEP_SOURCE"], CONST["SERVICE_CLUSTER_IP"]
MASK64 = (1 << 64) - 1


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


def test_rows_are_read_back():
    rows = Rows(10, "services", used=[2, 5], touched=[1, 5, 3], clock=Clock())
    assert [rows.take() for _ in range(4)] == [4, 6, 7, 8]
    assert rows.used == 6


# --- frontends ----------------------------------------------------------------------------------

KEYS = st.tuples(
    st.integers(0, MASK64), st.integers(0, MASK64), st.integers(0, 65535), st.integers(0, 255)
)


@given(KEYS)
def test_kernel_writer_and_twin_agree_on_the_slot(key):
    hi, lo, port, protocol = key
    assert int(slot_of(np.uint64(hi), np.uint64(lo), port, protocol)) == slot(key)
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


# --- the writer ---------------------------------------------------------------------------------


def target(number: int, port: int = 8080, protocol: int = 6):
    return (0, 0x0A010000 + number, port, protocol)


def vip(number: int, port: int = 80):
    return (0, 0x0A600000 + number, port, 6)


def row(*numbers: int, **more) -> ServiceRow:
    keys = tuple(map(target, numbers))
    return ServiceRow(inside=keys, outside=keys, active=keys, **more)


@pytest.fixture
def shm(tmp_path):
    with Shm.create(tmp_path) as made:
        yield made


def reach(shm: Shm, number: int, flow_hash: int = 0) -> str:
    return naive.reach(shm, f"10.96.0.{number}", 80, "tcp", flow_hash=flow_hash)


def test_a_service_is_found_and_gone(shm):
    writer = ServiceWriter(shm)
    assert writer.set_service("a", row(1, 2))
    assert not writer.set_service("a", row(1, 2))
    assert writer.set_frontend(vip(1), "a")
    assert not writer.set_frontend(vip(1), "a")
    assert writer.commit()
    assert {reach(shm, 1, n << 32) for n in range(4)} == {"10.1.0.1:8080", "10.1.0.2:8080"}
    assert reach(shm, 2) == ""
    control = shm.control[0]
    before = int(control["frontends_generation"]), int(control["judgement"])
    assert not writer.commit()
    assert (int(control["frontends_generation"]), int(control["judgement"])) == before
    writer.set_service("a", row(2))
    writer.commit()
    assert int(control["frontends_generation"]) == before[0], "no frontend has changed"
    assert int(control["judgement"]) == before[1] + 1
    writer.drop_frontend(vip(1))
    assert reach(shm, 1) == "10.1.0.2:8080", "until the commit"
    writer.remove_service("a")
    writer.commit()
    assert reach(shm, 1) == ""
    assert backends(shm) == []
    assert int(control["frontends_generation"]) == before[0] + 1


def test_a_backend_of_two_services_is_one_row_with_one_state(shm):
    writer = ServiceWriter(shm)
    writer.set_service("a", row(1))
    writer.set_service("b", ServiceRow(draining=(target(1),)))
    writer.commit()
    assert [one["state"] for one in backends(shm)] == ["active"]
    writer.set_service("a", ServiceRow())
    writer.commit()
    assert [one["state"] for one in backends(shm)] == ["terminating"]
    writer.set_service("b", ServiceRow())
    writer.commit()
    assert backends(shm) == []


def test_a_backend_that_moves_keeps_its_row(shm):
    writer = ServiceWriter(shm)
    writer.set_service("a", row(1))
    writer.commit()
    number = backends(shm)[0]["backend"]
    writer.set_service("a", row(2))
    writer.set_service("b", row(1))
    writer.commit()
    assert number in [one["backend"] for one in backends(shm)]
    assert {one["state"] for one in backends(shm)} == {"active"}


def test_a_frontend_that_moves_is_never_nobodys(shm):
    writer = ServiceWriter(shm)
    for name, number in (("a", 1), ("b", 2)):
        writer.set_service(name, row(number))
    writer.set_frontend(vip(1), "a")
    writer.commit()
    writer.drop_frontend(vip(1))
    writer.remove_service("a")
    assert reach(shm, 1) == "10.1.0.1:8080"
    writer.set_frontend(vip(1), "b")
    assert reach(shm, 1) == "10.1.0.2:8080"
    writer.commit()
    assert reach(shm, 1) == "10.1.0.2:8080"


def test_maglev_tables_hold_rows_of_backends(shm):
    writer = ServiceWriter(shm)
    keys = (target(1), target(2))
    positions = np.array([0, 1, 1, 0, 1], np.uint32)
    table = Table(keys, (), lambda: positions)
    says = ServiceRow(inside=keys, outside=keys, outside_table=table, active=keys)
    writer.set_service("a", says)
    writer.set_frontend(vip(1), "a")
    writer.commit()
    number = writer.row_of("a")
    rows = {one["address"]: one["backend"] for one in backends(shm)}
    wanted = [rows[f"10.1.0.{n + 1}"] for n in positions]
    hashes = [n << 32 for n in range(5)]
    assert [naive.choose(shm, number, True, h) for h in hashes] == wanted
    assert [one["entries"] for one in maglev(shm, number)] == [2, 3]
    writer.set_service("a", row(1, 2))
    writer.commit()
    assert maglev(shm, number) == []


def test_source_ranges(shm):
    writer = ServiceWriter(shm)
    net = (0, 0xC0000200, 0, 0xFFFFFF00)
    writer.set_service("a", row(1, sources=(net,)))
    writer.set_frontend(vip(1), "a")
    writer.commit()
    number = writer.row_of("a")
    assert naive.may_come(shm, number, 0, 0xC0000207)
    assert not naive.may_come(shm, number, 0, 0xC0000307)
    assert frontends(shm)[0]["sources"] == ["192.0.2.0/24"]
    writer.set_service("a", row(1))
    assert naive.may_come(shm, number, 0, 0xC0000307)


@pytest.mark.parametrize(
    ("table", "limit", "says"),
    [
        ("backends", 4, row(5, 6, 7)),
        ("backend_lists", 6, row(1, 2, 2, 1, 2)),
        ("services", 3, row(1)),
        ("source_ranges", 1, row(1, sources=((0, 1, 0, 1), (0, 2, 0, 2)))),
        ("maglev", 4, None),
    ],
)
def test_what_does_not_fit_changes_nothing(shm, monkeypatch, table, limit, says):
    keys = (target(1), target(2))
    if says is None:
        big = Table(keys, (), lambda: np.zeros(5, np.uint32))
        says = ServiceRow(inside=keys, inside_table=big, active=keys)
    monkeypatch.setattr(shm, table, getattr(shm, table)[:limit])
    writer = ServiceWriter(shm)
    for name in ("a", "b"):
        writer.set_service(name, row(1, 2))
        writer.set_frontend(vip(ord(name)), name)
    writer.commit()
    before = decoded(shm)
    names = ("c",) if table == "services" else ("a", "c")
    for name in names:
        with pytest.raises(TableFull, match=r"limit|in use"):
            writer.set_service(name, says)
        writer.commit()
        assert decoded(shm) == before
        assert len(backends(shm)) == 2
    writer.set_service("a", row(2))
    writer.commit()
    assert reach(shm, ord("a")) == "10.1.0.2:8080"


def test_a_full_table_of_frontends_leaves_the_others(shm, monkeypatch):
    writer = ServiceWriter(shm)
    writer.set_service("a", row(1))
    writer.set_frontend(vip(1), "a")
    monkeypatch.setattr(frontends_table, "PROBES", 0)
    with pytest.raises(TableFull, match="fewer services"):
        writer.set_frontend(vip(2), "a")
    writer.commit()
    assert reach(shm, 1) == "10.1.0.1:8080"


# --- restarts -----------------------------------------------------------------------------------


def stand(shm: Shm) -> ServiceWriter:
    writer = ServiceWriter(shm)
    for number in (1, 2, 3):
        writer.set_service(f"s{number}", row(number, number + 1, flags=CLUSTER_IP))
        writer.set_frontend(vip(number), f"s{number}")
    writer.commit()
    return writer


def test_a_new_writer_takes_over_rows_and_writes_nothing(shm):
    before = stand(shm)
    arrays = ("frontends", "services", "backends", "backend_lists")
    bytes_before = [getattr(shm, name)[:100].tobytes() for name in arrays]
    again = ServiceWriter(shm)
    for number in (3, 1, 2):
        says = row(number, number + 1, flags=CLUSTER_IP)
        again.set_service(f"s{number}", says, [vip(number)])
        again.set_frontend(vip(number), f"s{number}")
    again.settle()
    again.commit()
    assert again.names() == before.names()
    assert [getattr(shm, name)[:100].tobytes() for name in arrays] == bytes_before
    assert again.usage() == before.usage()


def test_what_nobody_claims_goes_and_all_else_serves_all_the_time(shm):
    stand(shm)
    again = ServiceWriter(shm)
    again.set_service("s1", row(2, 9), [vip(1)])
    assert reach(shm, 1) in ("10.1.0.2:8080", "10.1.0.9:8080")
    assert reach(shm, 2) != "none"
    again.set_frontend(vip(1), "s1")
    again.settle()
    again.commit()
    assert reach(shm, 2) == reach(shm, 3) == ""
    assert {one["address"] for one in backends(shm)} == {"10.1.0.2", "10.1.0.9"}
    assert again.usage()["services"][0] == 1
    assert again.usage()["backend_lists"][0] >= 2


def test_a_predecessor_that_died_before_its_commit(shm):
    writer = stand(shm)
    generation = int(shm.control[0]["frontends_generation"])
    writer.set_service("s4", row(7))
    writer.set_frontend(vip(4), "s4")  # and no commit
    again = ServiceWriter(shm)
    for number in (1, 2, 3):
        again.set_service(f"s{number}", row(number, flags=CLUSTER_IP), [vip(number)])
        again.set_frontend(vip(number), f"s{number}")
    again.settle()
    again.commit()
    assert reach(shm, 4) == ""
    assert int(shm.control[0]["frontends_generation"]) > generation
    assert "10.1.0.7" not in {one["address"] for one in backends(shm)}


def test_numbers_of_rows_that_were_others_are_not_given_again_soon(shm):
    clock = Clock()
    writer = ServiceWriter(shm, clock)
    writer.set_service("a", row(1))
    writer.commit()
    service, backend = writer.row_of("a"), backends(shm)[0]["backend"]
    writer.remove_service("a")
    writer.commit()
    clock.rest()
    for made in (writer, ServiceWriter(shm, clock)):
        made.set_service("b", row(2, flags=KEEP_SOURCE))
        made.commit()
        assert made.row_of("b") != service
        assert backends(shm)[0]["backend"] != backend


def test_probes_bound_a_lookup():
    assert PROBES == CONST["FRONTEND_PROBES_MAX"] == 64
    assert services_table.EMPTY == 0
