"""Host ports of pods, and who has a frontend that several want."""

from dataclasses import replace
from ipaddress import ip_address

import pytest

from dataplane.objects.core import ContainerPort, Pod
from dataplane.objects.services import EndpointPort, ServicePort
from dataplane.services.model import HostPort
from tests.services_world import (
    HERE,
    HTTP,
    LB4,
    NODE4,
    NODE6,
    THERE,
    VIP4,
    Services,
    end,
    objects,
    part,
    service,
)

A, B = "10.1.0.5", "10.1.0.6"
A6 = "fd00:1::5"


@pytest.fixture
def there(tmp_path):
    made = Services(tmp_path)
    yield made
    made.close()


def at(*addresses: str, port: int = 8080) -> set[str]:
    return {f"{address}:{port}" for address in addresses}


# --- host ports ---------------------------------------------------------------------------------


def pod(name: str = "web-1", where: str = HERE, ips=(A, A6), **port):
    ports = (ContainerPort("http", "TCP", 8080, **{"host_port": 8888, **port}),)
    return Pod("shop", name, ips=tuple(map(ip_address, ips)), node=where, ports=ports)


def test_host_ports_of_local_pods(there):
    there.update(pod(), pod("far", THERE, ("10.2.0.1",)))
    assert there.reach(NODE4, 8888) == at(A)
    assert there.reach(NODE6, 8888, outside=True) == {f"{A6}:8080"}
    assert there.stands()[NODE4, 8888, "tcp"]["flags"] == ["keep source", "host port"]
    assert len(there.stands()) == 2


def test_host_ports_at_every_address_or_at_one(there):
    extra = "198.18.0.9"
    there.update(pod(), addresses=(extra,))
    assert there.reach(extra, 8888) == there.reach(NODE4, 8888) == at(A)
    there.update(pod(host_ip=ip_address(extra)), addresses=(extra,))
    assert there.reach(extra, 8888) == at(A)
    assert there.reach(NODE4, 8888) == {""}


def test_the_same_host_port_of_another_protocol(there):
    ports = (
        ContainerPort("dns", "UDP", 53, 53),
        ContainerPort("dns-tcp", "TCP", 53, 53),
    )
    there.update(replace(pod(), ports=ports))
    assert there.reach(NODE4, 53, "udp") == there.reach(NODE4, 53, "tcp") == at(A, port=53)


@pytest.mark.parametrize("change", [{"host_network": True}, {"phase": "Succeeded"}, {"ips": ()}])
def test_pods_without_host_ports_of_ours(there, change):
    there.update(replace(pod(), **change))
    assert there.stands() == {}


def test_host_ports_by_cni_and_by_pod_are_the_same(there):
    given = HostPort("shop/web-1", 8888, "TCP", 8080, (ip_address(A), ip_address(A6)))
    assert there.update(pod(ips=(A6, A)), host_ports=(given,)) == []
    assert there.reach(NODE4, 8888) == at(A)
    assert there.update(host_ports=(given,)) == []
    assert there.reach(NODE4, 8888) == at(A)
    assert there.update() == []
    assert there.stands() == {}
    moved = replace(given, targets=(ip_address(B),))
    there.update(host_ports=(given,))
    there.update(host_ports=(moved,))
    assert there.reach(NODE4, 8888) == at(B)
    assert there.reach(NODE6, 8888) == {""}


# --- who has it ---------------------------------------------------------------------------------


def test_a_cluster_ip_cannot_be_taken_over(there):
    thief = service("thief", ("10.96.0.66",), external_ips=(VIP4,), created="2000")
    problems = there.update(service(created="2020"), part(end(A)), thief, part(end(B), of="thief"))
    assert there.reach(VIP4) == at(A)
    assert problems == [f"Service shop/thief wants {VIP4}:80/TCP, but Service shop/web has it"]
    assert there.stands()[VIP4, 0, "any"]["flags"] == ["cluster ip", "address"]


def test_the_older_service_has_it_then_the_first_by_name(there):
    def two(first, second):
        return objects(
            service("a", ("10.96.0.1",), external_ips=(LB4,), created=first),
            part(end(A), of="a"),
            service("b", ("10.96.0.2",), external_ips=(LB4,), created=second),
            part(end(B), of="b"),
        )

    for first, second, winner in (
        ("2020", "2021", A), ("2021", "2020", B), ("2020", "2020", A), ("", "2020", B), ("", "", A),
    ):  # fmt: skip
        problems = there.update(two(first, second))
        assert there.reach(LB4) == at(winner)
        assert len(problems) == 1
    there.update(service("b", ("10.96.0.2",), external_ips=(LB4,)), part(end(B), of="b"))
    assert there.reach(LB4) == at(B)
    assert there.engine.problems() == []


def test_a_node_port_comes_before_a_host_port(there):
    clash = pod(host_port=30080)
    problems = there.update(service(type="NodePort"), part(end(B)), clash)
    assert there.reach(NODE4, 30080) == at(B)
    assert "host port of shop/web-1 wants 192.0.2.1:30080/TCP" in problems[0]
    there.update(clash)
    assert there.reach(NODE4, 30080) == at(A)


def test_one_service_may_name_an_address_twice(there):
    twice = service(type="LoadBalancer", load_balancer_ips=(LB4,), external_ips=(LB4,))
    assert there.update(twice, part(end(A))) == []
    assert there.reach(LB4) == at(A)


def test_a_service_port_of_each_protocol(there):
    ports = (HTTP, ServicePort("sctp", "SCTP", 80, 0, 30080))
    both = (EndpointPort("http", "TCP", 8080), EndpointPort("sctp", "SCTP", 9999))
    there.update(service(type="NodePort", ports=ports), part(end(A), ports=both))
    assert there.reach(VIP4, 80, "sctp") == there.reach(NODE4, 30080, "sctp") == at(A, port=9999)
