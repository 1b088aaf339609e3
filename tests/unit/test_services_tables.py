"""The writer of services: what stands, moves, overflows, and outlives a restart."""

import numpy as np
import pytest

from dataplane.tables import frontends as frontends_table
from dataplane.tables.errors import TableFull
from dataplane.tables.service_view import backends, decoded, frontends, maglev
from dataplane.tables.services import ServiceRow, ServiceWriter, Table
from dataplane.tables.shm import Shm
from tests.naive import services as naive
from tests.services_world import Clock
from xdp.abi import CONST

KEEP_SOURCE, CLUSTER_IP = CONST["SERVICE_KEEP_SOURCE"], CONST["SERVICE_CLUSTER_IP"]


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
