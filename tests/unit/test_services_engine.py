"""The engine: any way leads to the same tables; restarts, overflows, storms, readers beside it."""

import threading
from dataclasses import replace
from ipaddress import ip_address

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.objects.core import ContainerPort, Pod
from dataplane.objects.services import EndpointPort, ServicePort
from dataplane.services import names
from dataplane.services.engine import RETRY_S
from dataplane.services.model import HealthCheck
from dataplane.tables.adjacencies import REST_S
from dataplane.tables.service_view import backends
from tests.naive import services as naive
from tests.services_world import (
    HERE,
    HTTP,
    LB4,
    NODE4,
    THERE,
    VIP4,
    VIP6,
    Services,
    end,
    leaving,
    node,
    objects,
    part,
    service,
)


@pytest.fixture
def there(tmp_path):
    made = Services(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two sets of tables that all examples of a test share; making them maps 200 MB."""
    pair = [Services(tmp_path_factory.mktemp("s"), maglev_size=251) for _ in range(2)]
    yield pair
    for one in pair:
        one.close()


# --- any way leads there ------------------------------------------------------------------------

ENDS = st.builds(
    lambda n, where, state, weight: (
        leaving(f"10.1.0.{n}", where)
        if state == "leaving"
        else end(f"10.1.0.{n}", where, ready=state == "ready", zones=("z1",) if weight else ())
    ),
    st.integers(1, 6),
    st.sampled_from([HERE, THERE]),
    st.sampled_from(["ready", "ready", "not ready", "leaving"]),
    st.booleans(),
)
PORTS = (HTTP, ServicePort("dns", "UDP", 53, 0, 30053))


@st.composite
def services(draw):
    """One of four services, of which two want the same external address."""
    n = draw(st.integers(0, 3))
    return service(
        f"s{n}",
        (f"10.96.0.{n + 1}", f"fd00:96::{n + 1}")[: draw(st.integers(1, 2))],
        PORTS[: draw(st.integers(0, 2))],
        type=draw(st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer"])),
        external_ips=draw(st.sampled_from([(), (LB4,), ("198.51.100.1",), (NODE4,)])),
        load_balancer_ips=draw(st.sampled_from([(), (LB4,)])),
        source_ranges=draw(st.sampled_from([(), ("192.0.2.0/24",), ("2001:db8::/32",)])),
        external_local=draw(st.booleans()),
        internal_local=draw(st.booleans()),
        affinity_s=draw(st.sampled_from([0, 60])),
        publish_not_ready=draw(st.booleans()),
        annotations=draw(st.sampled_from([{}, {"penstock.io/lb-algorithm": "maglev"}])),
    )


@st.composite
def slices(draw):
    n = draw(st.integers(0, 3))
    ends = draw(st.lists(ENDS, max_size=4))
    ports = (EndpointPort("http", "TCP", 8080), EndpointPort("dns", "UDP", 53))
    name = f"s{n}-{draw(st.integers(0, 1))}"
    weight = draw(st.sampled_from([1, 1, 0, 3]))
    return part(*ends, of=f"s{n}", name=name, ports=ports, weight=weight)


PODS = st.builds(
    lambda n, port, where: Pod(
        "shop",
        f"pod{n}",
        ips=(ip_address(f"10.1.0.{n}"),),
        node=where,
        ports=(ContainerPort("", "TCP", 80, port),),
    ),
    st.integers(1, 3),
    st.sampled_from([0, 8080, 30080]),
    st.sampled_from([HERE, THERE]),
)
NODES = st.builds(
    lambda n, zone: node(f"node{n}", n, labels={"topology.kubernetes.io/zone": zone}),
    st.integers(1, 3),
    st.sampled_from(["z1", "z2"]),
)
THINGS = st.one_of(services(), services(), slices(), slices(), PODS, NODES)
STEPS = st.lists(
    st.tuples(st.sampled_from(["set", "set", "set", "delete", "restart", "rest"]), THINGS),
    min_size=1,
    max_size=25,
)


def identity(thing) -> tuple:
    return type(thing), getattr(thing, "namespace", ""), thing.name


@settings(max_examples=120, deadline=None)
@given(steps=STEPS)
def test_any_sequence_of_changes_ends_as_from_nothing(made, steps):
    one, fresh = made
    world: dict[tuple, object] = {}
    for what, thing in steps:
        if what == "restart":
            one.restart()
        elif what == "rest":
            one.clock.rest()
        elif what == "delete":
            world.pop(identity(thing), None)
        else:
            world[identity(thing)] = thing
        told = one.update(objects(*world.values()))
    fresh.restart()
    fresh.update()
    assert fresh.stands() == {}
    assert fresh.update(objects(*world.values())) == told
    assert one.stands() == fresh.stands()
    known = [{(b["address"], b["port"], b["protocol"], b["state"]) for b in backends(x.shm)}
             for x in made]  # fmt: skip
    assert known[0] == known[1]
    for table in ("frontends", "backends"):
        assert one.engine.usage()[table] == fresh.engine.usage()[table]
    one.update()
    one.clock.rest()
    one.update(service(), part(end("10.9.9.9")))
    one.update()
    assert one.engine.usage()["backends"][0] == 0
    assert one.engine.usage()["services"][0] == 2, "the rows of addresses"


def test_what_did_not_change_is_not_written(there):
    world = objects(service(), part(end("10.1.0.1")))
    there.update(world)
    control = there.shm.control[0]
    before = control.tobytes()
    again = objects(service(), part(end("10.1.0.1")))
    for same in (world, again, replace(world, pods={})):
        there.update(same)
        assert control.tobytes() == before
    there.update(service(), part(end("10.1.0.1"), end("10.1.0.2")))
    assert (
        int(control["judgement"]) == int(np.frombuffer(before, control.dtype)[0]["judgement"]) + 1
    )


def test_a_flapping_endpoint_takes_no_more_space(there):
    up, down = part(end("10.1.0.1"), end("10.1.0.2")), part(end("10.1.0.1"))
    there.update(service(), up)
    for turn in range(100):
        there.update(service(), down if turn % 2 == 0 else up)
        there.clock.rest(REST_S / 10)
    assert there.engine.usage()["backend_lists"][0] <= 4
    assert there.reach(VIP4) == {"10.1.0.1:8080", "10.1.0.2:8080"}


def test_an_endpoint_that_comes_back_has_its_row(there):
    both = part(end("10.1.0.1"), end("10.1.0.2"))
    there.update(service(), both)
    rows = {one["address"]: one["backend"] for one in backends(there.shm)}
    for restart in (False, True):
        there.update(service(), part(end("10.1.0.1")))
        there.clock.rest()
        if restart:
            there.restart()
        there.update(service(), both)
        assert {one["address"]: one["backend"] for one in backends(there.shm)} == rows


def test_slices_come_and_go(there):
    assert there.update() == []
    there.update(part(end("10.1.0.1")))
    assert there.stands() == {}
    there.update(service(), part(end("10.1.0.1")))
    assert there.reach(VIP4) == {"10.1.0.1:8080"}
    there.update(service(), part(end("10.1.0.1"), of="other", name="web-v4"))
    assert there.reach(VIP4) == {"none"}, "the slice is another's now"
    there.update(service(), replace(part(end("10.1.0.1")), service=""))
    assert there.reach(VIP4) == {"none"}
    there.update(service(), part(end("10.1.0.1")))
    there.update(service())
    assert there.reach(VIP4) == {"none"}


# --- restarts -----------------------------------------------------------------------------------


def test_after_a_restart_nothing_that_stands_is_written_again(there):
    lb = service(type="LoadBalancer", load_balancer_ips=(LB4,))
    world = objects(lb, part(end("10.1.0.1"), end("10.1.0.2")), service("b", (VIP6,)))
    there.update(world)
    tables = ("frontends", "services", "backends", "backend_lists")
    before = [getattr(there.shm, name)[:200].tobytes() for name in tables]
    stood = there.stands()
    there.restart()
    assert there.stands() == stood
    there.update(world)
    assert [getattr(there.shm, name)[:200].tobytes() for name in tables] == before
    assert there.stands() == stood


def test_a_frontend_that_changed_hands_while_the_agent_was_away(there):
    a, b = part(end("10.1.0.1"), of="a"), part(end("10.1.0.2"), of="b")
    one = service("a", ("10.96.0.1",), external_ips=(LB4,))
    other = service("b", ("10.96.0.2",), external_ips=(LB4,))
    there.update(one, a, other, b)
    assert there.reach(LB4) == {"10.1.0.1:8080"}
    there.restart()
    there.update(replace(one, external_ips=()), a, other, b)
    assert there.reach(LB4) == {"10.1.0.2:8080"}
    assert there.reach("10.96.0.1") == {"10.1.0.1:8080"}


# --- what does not fit --------------------------------------------------------------------------


def test_a_maglev_table_without_room_is_told_and_served_by_hash(tmp_path, monkeypatch):
    there = Services(tmp_path, algorithm="maglev", maglev_size=251)
    monkeypatch.setattr(there.shm, "maglev", there.shm.maglev[:300])
    there.restart()

    def lb(name: str, number: int):
        made = service(
            name,
            (f"10.96.0.{number}",),
            type="LoadBalancer",
            load_balancer_ips=(f"203.0.113.{number}",),
        )
        ends = part(end(f"10.1.{number}.1"), end(f"10.1.{number}.2"), of=name)
        return replace(made, ports=(ServicePort("http", "TCP", 80),)), ends

    first, second = lb("a", 1), lb("b", 2)
    problems = there.update(*first, *second)
    assert len(problems) == 1
    assert "maglev_size" in problems[0]
    assert "by hash, not by Maglev" in problems[0]
    for number in (1, 2):
        backends_ = {f"10.1.{number}.{n}:8080" for n in (1, 2)}
        assert there.reach(f"203.0.113.{number}", outside=True) == backends_
    there.update(*second)
    there.clock.rest(REST_S + RETRY_S)
    assert there.update(*second) == []
    assert there.stands()["203.0.113.2", 80, "tcp"]["outside_table"]
    there.close()


def test_endpoints_without_room_leave_the_service_as_it_was(there, monkeypatch):
    monkeypatch.setattr(there.shm, "backends", there.shm.backends[:4])
    there.restart()
    small = part(end("10.1.0.1"), end("10.1.0.2"))
    there.update(service(), small)
    big = part(*(end(f"10.1.0.{n}") for n in range(1, 9)))
    late = service("late", ("10.96.0.99",))
    problems = there.update(service(), big, late)
    assert "backends is full" in problems[0]
    assert there.reach(VIP4) == {"10.1.0.1:8080", "10.1.0.2:8080"}
    assert there.reach("10.96.0.99") == {"none"}
    there.clock.rest(REST_S + RETRY_S)
    assert there.update(service(), part(end("10.1.0.3")), late) == []
    assert there.reach(VIP4) == {"10.1.0.3:8080"}


def test_a_new_service_without_room_comes_when_there_is_some(there, monkeypatch):
    monkeypatch.setattr(there.shm, "services", there.shm.services[:4])
    there.restart()
    one, other = service("a", ("10.96.0.1",)), service("b", ("10.96.0.2",))
    ends = part(end("10.1.0.1"), of="b")
    problems = there.update(one, other, ends)
    assert "services is full" in problems[0]
    lost = [vip for vip in ("10.96.0.1", "10.96.0.2") if there.reach(vip) == {""}]
    assert len(lost) == 1
    kept = {"10.96.0.1": (other, ends), "10.96.0.2": (one,)}[lost[0]]
    gone = {"10.96.0.1": (one,), "10.96.0.2": (other, ends)}[lost[0]]
    assert kept
    there.update(*gone)
    there.clock.rest(REST_S + RETRY_S)
    assert there.update(*gone) == []
    assert there.reach(lost[0]) != {""}


def test_of_very_many_problems_the_first_are_told(there):
    broken = [
        service(f"s{n}", (f"10.96.1.{n}",), annotations={"penstock.io/lb-algorithm": "x"})
        for n in range(150)
    ]
    problems = there.update(*broken)
    assert len(problems) == 101
    assert problems[-1] == "and 50 more problems of services"


# --- beside it ----------------------------------------------------------------------------------


def test_a_reader_never_meets_a_service_without_backends(there):
    ends = [end(f"10.1.0.{n}") for n in range(1, 9)]
    there.update(service(), part(*ends))
    hi, lo = 0, int(ip_address(VIP4))
    stop, seen = threading.Event(), []

    def read() -> None:
        known = {int(one.address) for one in ends}
        while not stop.is_set():
            row = naive.find(there.shm, hi, lo, 80, 6)
            word = int(there.shm.services[row]["inside"])
            rows = there.shm.backend_lists[word >> 32 : (word >> 32) + (word & 0xFFFFFFFF)]
            addresses = set(there.shm.backends["lo"][rows].tolist())
            if not row or not len(rows) or not addresses <= known:
                seen.append((row, word, addresses - known))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for turn in range(300):
            there.update(service(), part(*ends[turn % 7 : turn % 7 + 2]))
            if turn % 100 == 99:
                there.restart()
                there.update(service(), part(ends[0]))
    finally:
        stop.set()
        thread.join()
    assert seen == []


def test_names_are_kept_beside_the_tables(there):
    path = there.shm.folder / names.FILE
    there.update(service(type="NodePort"), part(end("10.1.0.1")))
    called = names.read(path)
    row = naive.find(there.shm, 0, int(ip_address(VIP4)), 80, 6)
    assert names.split(called[row]) == ("shop/web:http", "cluster")
    assert {names.split(name)[1] for name in called.values()} == {"cluster", "external", "address"}
    there.update(service(type="NodePort"), part(end("10.1.0.1")), service("b", ("10.96.0.2",)))
    assert len(names.read(path)) == len(called), "not oftener than once in a while"
    there.clock.rest(names.WRITE_S)
    there.update(service(type="NodePort"), part(end("10.1.0.1")), service("b", ("10.96.0.2",)))
    assert len(names.read(path)) == len(called) + 1
    there.update()
    assert there.engine.flush()
    assert not there.engine.flush()
    assert len(names.read(path)) == 2
    for text in ("", "{", "[]", '{"x": 1}'):
        path.write_text(text)
        assert names.read(path) == {}
    assert names.read(path.with_name("absent")) == {}
    assert names.split("container abc:80/tcp/v4/host/192.0.2.1") == ("container abc:80", "host")
    assert names.split("") == ("", "")


def test_names_that_cannot_be_written_are_a_problem_and_no_more(there, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        problems = there.update(service(), part(end("10.1.0.1")))
    assert "No space left" in problems[0]
    assert there.reach(VIP4) == {"10.1.0.1:8080"}
    there.clock.rest()
    assert there.update(service(), part(end("10.1.0.1"))) == []
    assert names.read(there.shm.folder / names.FILE)


def test_health_checks_count_what_is_ready_here(there):
    lb = service(
        type="LoadBalancer", vips=(VIP4, VIP6), external_local=True, health_check_port=31000,
        ports=(HTTP, ServicePort("more", "TCP", 81)),
    )  # fmt: skip
    ports = (EndpointPort("http", "TCP", 8080), EndpointPort("more", "TCP", 8081))
    ends = [end("10.1.0.1"), end("10.1.0.2"), leaving("10.1.0.3"), end("10.2.0.1", THERE)]
    there.update(lb, part(*ends, ports=ports), part(end("fd00:1::1"), ports=ports))
    assert there.engine.health_checks() == {31000: HealthCheck("shop", "web", 2)}
    there.update(lb, part(ends[3], ports=ports))
    assert there.engine.health_checks() == {31000: HealthCheck("shop", "web", 0)}
    there.update(replace(lb, external_local=False), part(*ends, ports=ports))
    assert there.engine.health_checks() == {}
    there.update(lb)
    there.update()
    assert there.engine.health_checks() == {}
