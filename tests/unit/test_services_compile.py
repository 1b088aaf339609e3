"""What a packet to a service meets: kube-proxy's rules, case by case, by reading the tables."""

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from dataplane.objects.services import EndpointPort, ServicePort
from dataplane.tables.service_view import backends
from tests.naive import services as naive
from tests.services_world import (
    HERE,
    LB4,
    LB6,
    NODE4,
    NODE6,
    THERE,
    VIP4,
    VIP6,
    Services,
    end,
    leaving,
    node,
    part,
    service,
)

A, B, C = "10.1.0.5", "10.1.0.6", "10.2.0.7"
A6 = "fd00:1::5"


@pytest.fixture
def there(tmp_path):
    made = Services(tmp_path)
    yield made
    made.close()


def at(*addresses: str, port: int = 8080) -> set[str]:
    return {f"{address}:{port}" for address in addresses}


def balanced(**more):
    return service(
        type="LoadBalancer", load_balancer_ips=(LB4,), external_ips=("198.51.100.7",), **more
    )


def test_a_cluster_ip_leads_to_ready_endpoints(there):
    assert there.update(service(), part(end(A), end(B, ready=False), end(C, THERE))) == []
    assert there.reach(VIP4) == at(A, C)
    assert there.reach(VIP4, 81) == {""}
    assert there.reach(VIP4, 80, "udp") == {""}
    stands = there.stands()
    assert stands[VIP4, 80, "tcp"]["flags"] == ["cluster ip"]
    assert stands[VIP4, 0, "any"]["flags"] == ["cluster ip", "address"]
    assert (NODE4, 30080, "tcp") not in stands, "its type is ClusterIP"


def test_without_endpoints_there_is_a_frontend_that_refuses(there):
    there.update(service())
    assert there.reach(VIP4) == {"none"}
    there.update(service(), part(end(A, ready=False)))
    assert there.reach(VIP4) == {"none"}
    there.update(service(), part())
    assert there.reach(VIP4) == {"none"}


def test_both_families(there):
    there.update(service(vips=(VIP4, VIP6)), part(end(A)), part(end(A6)))
    assert there.reach(VIP4) == at(A)
    assert there.reach(VIP6) == {f"{A6}:8080"}
    there.update(service(vips=(VIP4,)), part(end(A)), part(end(A6)))
    assert there.reach(VIP6) == {""}


@pytest.mark.parametrize(
    "more",
    [
        {"type": "ExternalName"},
        {"headless": True},
        {"labels": {"service.kubernetes.io/service-proxy-name": "other"}},
    ],
)
def test_services_that_are_not_ours(there, more):
    there.update(service(**more), part(end(A)))
    assert there.stands() == {}


@pytest.mark.parametrize(
    "label", ["service.kubernetes.io/headless", "service.kubernetes.io/service-proxy-name"]
)
def test_slices_that_are_not_ours(there, label):
    there.update(service(), part(end(A), labels={label: "x"}))
    assert there.reach(VIP4) == {"none"}


def test_ports_are_matched_by_name_and_protocol(there):
    ports = (
        ServicePort("http", "TCP", 80, "web"),
        ServicePort("dns", "UDP", 53, "dns"),
        ServicePort("dns-tcp", "TCP", 53, "dns-tcp"),
    )
    first = (EndpointPort("http", "TCP", 8080), EndpointPort("dns", "UDP", 5353))
    second = (EndpointPort("http", "TCP", 9090), EndpointPort("dns", "TCP", 1))
    slices = (
        part(end(A), name="one", ports=first),
        part(end(B), name="two", ports=second),
        part(end(C), name="three", ports=(EndpointPort("http", "TCP", 0),)),
    )
    there.update(service(ports=ports), *slices)
    assert there.reach(VIP4, 80) == {f"{A}:8080", f"{B}:9090"}, "the same name, another number"
    assert there.reach(VIP4, 53, "udp") == {f"{A}:5353"}
    assert there.reach(VIP4, 53, "tcp") == {"none"}


def test_duplicate_endpoints_in_several_slices(there):
    slices = [
        part(end(A, ready=False), end(B), name="old"),
        part(end(A), end(B, "", ready=False), name="new"),
    ]
    for order in (slices, slices[::-1]):
        there.update(service(internal_local=True), *order)
        assert there.reach(VIP4) == at(A, B)


def test_terminating_endpoints_serve_only_when_no_other_does(there):
    there.update(service(), part(end(A), leaving(B)))
    assert there.reach(VIP4) == at(A)
    states = {one["address"]: one["state"] for one in _backends(there)}
    assert states == {A: "active", B: "terminating"}
    there.update(service(), part(leaving(A), leaving(B), end(C, ready=False)))
    assert there.reach(VIP4) == at(A, B)
    assert {one["state"] for one in _backends(there)} == {"terminating"}
    gone = end(A, ready=False, serving=False, terminating=True)
    there.update(service(), part(gone))
    assert there.reach(VIP4) == {"none"}
    assert [one["state"] for one in _backends(there)] == ["terminating"], "its connections end it"
    there.update(service(), part())
    assert _backends(there) == []


def test_udp_does_not_stay_with_what_no_longer_serves(there):
    dns = service(ports=(ServicePort("dns", "UDP", 53),))
    ports = (EndpointPort("dns", "UDP", 53),)
    there.update(dns, part(end(A), end(B), ports=ports))
    there.update(dns, part(end(A), end(B, ready=False), ports=ports))
    assert [one["address"] for one in _backends(there)] == [A]
    there.update(dns, part(end(A), leaving(B), ports=ports))
    assert [one["address"] for one in _backends(there)] == [A, B]


def _backends(there):
    return sorted(backends(there.shm), key=lambda one: one["address"])


def test_publish_not_ready_addresses(there):
    ends = part(end(A, ready=False), end(B, ready=False, serving=False, terminating=True))
    there.update(service(publish_not_ready=True), ends)
    assert there.reach(VIP4) == at(A, B)


def test_internal_traffic_policy_local(there):
    ends = part(end(A), end(C, THERE))
    there.update(service(internal_local=True), ends)
    assert there.reach(VIP4) == at(A)
    there.update(service(internal_local=True), part(leaving(A), end(C, THERE)))
    assert there.reach(VIP4) == at(A), "here only one is left, and it still serves"
    there.update(service(internal_local=True), part(end(C, THERE)))
    assert there.reach(VIP4) == {"none"}


@pytest.mark.parametrize("local", [False, True])
def test_external_traffic_policy(there, local):
    ends = part(end(A), end(C, THERE))
    there.update(balanced(external_local=local, internal_local=True), ends)
    for address, port in ((NODE4, 30080), (LB4, 80), ("198.51.100.7", 80)):
        assert there.reach(address, port) == at(A, C), "inside the cluster: all"
        assert there.reach(address, port, outside=True) == (at(A) if local else at(A, C))
        flags = there.stands()[address, port, "tcp"]["flags"]
        assert flags == (["keep source"] if local else [])
    assert there.reach(VIP4) == at(A)
    there.update(balanced(external_local=local), part(end(C, THERE)))
    assert there.reach(LB4, outside=True) == ({"none"} if local else at(C))


def test_node_ports_stand_at_internal_ips(there):
    there.update(service(type="NodePort", vips=(VIP4, VIP6)), part(end(A)), part(end(A6)))
    assert there.reach(NODE4, 30080) == at(A)
    assert there.reach(NODE6, 30080) == {f"{A6}:8080"}
    assert (NODE4, 0, "any") not in there.stands(), "a node's address is never a service's alone"
    assert there.reach("192.0.2.2", 30080) == {""}, "another node's are its own business"


def test_node_port_addresses(tmp_path):
    there = Services(tmp_path, node_port_addresses=(ip_network("198.18.0.0/16"),))
    there.update(service(type="NodePort"), part(end(A)), addresses=("198.18.0.9", "127.0.0.1"))
    assert there.reach("198.18.0.9", 30080) == at(A)
    assert there.reach(NODE4, 30080) == {""}
    there.close()


def test_addresses_of_load_balancers(there):
    there.update(balanced(), part(end(A)))
    stands = there.stands()
    assert stands[LB4, 0, "any"]["flags"] == ["address"]
    assert stands["198.51.100.7", 0, "any"]["flags"] == ["address"]
    there.update(replace(balanced(), type="NodePort"), part(end(A)))
    assert there.reach(LB4) == {""}, "the status of what is no load balancer says nothing"
    assert (LB4, 0, "any") not in there.stands()


def test_a_load_balancer_address_that_is_a_nodes(there):
    other = node(THERE, 2)
    for address, nodes in ((NODE4, ()), ("192.0.2.2", (other,))):
        there.update(
            replace(balanced(), load_balancer_ips=(ip_address(address),)), part(end(A)), *nodes
        )
        assert there.reach(address) == at(A)
        assert (address, 0, "any") not in there.stands()
    lb = replace(balanced(), load_balancer_ips=(ip_address("192.0.2.2"),))
    there.update(lb, part(end(A)))
    assert ("192.0.2.2", 0, "any") in there.stands(), "the node has gone"
    there.update(lb, part(end(A)), other)
    assert ("192.0.2.2", 0, "any") not in there.stands(), "and come back"


def test_source_ranges_guard_load_balancer_addresses_only(there):
    lb = balanced(source_ranges=("192.0.2.0/24", "198.51.100.0/28"), vips=(VIP4, VIP6))
    lb = replace(lb, load_balancer_ips=(ip_address(LB4), ip_address(LB6)))
    there.update(lb, part(end(A)), part(end(A6)))
    stands = there.stands()
    assert stands[LB4, 80, "tcp"]["sources"] == ["192.0.2.0/24", "198.51.100.0/28"]
    assert stands["198.51.100.7", 80, "tcp"]["sources"] == []
    assert stands[NODE4, 30080, "tcp"]["sources"] == []
    assert stands[LB6, 80, "tcp"]["sources"] == ["nobody"], "not the other family either"
    number = naive.find(there.shm, 0, int(ip_address(LB4)), 80, 6)
    assert naive.may_come(there.shm, number, 0, int(ip_address("192.0.2.200")))
    assert not naive.may_come(there.shm, number, 0, int(ip_address("192.0.3.1")))
    six = int(ip_address(LB6))
    number = naive.find(there.shm, six >> 64, six & naive.MASK64, 80, 6)
    assert not naive.may_come(there.shm, number, six >> 64, six & naive.MASK64)
    there.update(balanced(source_ranges=("0.0.0.0/0", "192.0.2.0/24")), part(end(A)))
    assert there.stands()[LB4, 80, "tcp"]["sources"] == []


def test_session_affinity(there):
    there.update(balanced(affinity_s=60), part(end(A)))
    for frontend in ((VIP4, 80, "tcp"), (NODE4, 30080, "tcp"), (LB4, 80, "tcp")):
        assert there.stands()[frontend]["affinity_s"] == 60


def test_hints_keep_traffic_near(there):
    def ends(*hints):
        return part(*(end(a, w, zones=z, nodes=n) for a, w, z, n in hints))

    zone = node(labels={"topology.kubernetes.io/zone": "z1"})
    one, two = (A, HERE, ("z1",), ()), (C, THERE, ("z2",), ())
    there.update(service(), ends(one, two), zone)
    assert there.reach(VIP4) == at(A)
    there.update(service(), ends(one, two))
    assert there.reach(VIP4) == at(A, C), "the node has no zone"
    there.update(service(), ends(one, (C, THERE, (), ())), zone)
    assert there.reach(VIP4) == at(A, C), "one has no hint"
    there.update(service(), ends((A, HERE, ("z3",), ()), two), zone)
    assert there.reach(VIP4) == at(A, C), "none is for this zone"
    near = ((A, HERE, ("z2",), (HERE,)), (C, THERE, ("z1",), (THERE,)))
    there.update(service(), ends(*near), zone)
    assert there.reach(VIP4) == at(A), "the node comes before the zone"
    there.update(service(internal_local=True), ends(two, (A, HERE, ("z2",), ())), zone)
    assert there.reach(VIP4) == at(A), "policy Local knows no hints"
    assert {one["state"] for one in _backends(there)} == {"active"}, "others may have connections"


@pytest.mark.parametrize(
    ("given", "shares"),
    [
        ('{"10.1.0.5": 3}', {A: 3, B: 1}),
        ('{"web-b": 5, "10.1.0.5": 10}', {A: 2, B: 1}),
        ('{"web-b": 0}', {A: 1}),
        ('{"10.1.0.5": 65535}', {A: 4096, B: 1}),
    ],
)
def test_weights_repeat_backends(there, given, shares):
    weighted = service(annotations={"penstock.io/backend-weights": given})
    assert there.update(weighted, part(end(A, pod="web-a"), end(B, pod="web-b"))) == []
    keys = there.stands()[VIP4, 80, "tcp"]["inside"]
    counted = {a: sum(key[1] == int(ip_address(a)) for key in keys) for a in (A, B)}
    assert counted == {A: 0, B: 0, **shares}
    assert {one["address"] for one in _backends(there)} == {A, B}, "weight 0 drains"


def test_weights_of_slices(there):
    there.update(service(), part(end(A), weight=2, name="a"), part(end(B), name="b"))
    assert len(there.stands()[VIP4, 80, "tcp"]["inside"]) == 3


@pytest.mark.parametrize("given", ["x", "[]", '{"a": "b"}', '{"a": -1}', '{"a": true}', "[" * 5000])
def test_weights_that_mean_nothing_are_a_problem(there, given):
    weighted = service(annotations={"penstock.io/backend-weights": given})
    problems = there.update(weighted, part(end(A), end(B)))
    assert "shop/web" in problems[0]
    assert "penstock.io/backend-weights" in problems[0]
    assert there.reach(VIP4) == at(A, B)


@pytest.mark.parametrize("name", ["penstock.io/lb-algorithm", "service.cilium.io/lb-algorithm"])
def test_maglev_by_annotation_serves_both_sides(there, name):
    there.update(balanced(annotations={name: "maglev"}), part(end(A), end(B), end(C, THERE)))
    for frontend in ((VIP4, 80, "tcp"), (LB4, 80, "tcp")):
        assert len(there.stands()[frontend]["inside_table"]) == 16381
    assert there.stands()[LB4, 80, "tcp"]["outside_table"]
    problems = there.update(balanced(annotations={name: "best"}), part(end(A), end(B)))
    assert name in problems[0]
    assert not there.stands()[LB4, 80, "tcp"]["outside_table"]


def test_maglev_by_configuration_serves_clients_outside(tmp_path):
    there = Services(tmp_path, algorithm="maglev", maglev_size=251)
    there.update(balanced(), part(end(A), end(B)))
    stands = there.stands()
    assert len(stands[LB4, 80, "tcp"]["outside_table"]) == 251
    assert not stands[LB4, 80, "tcp"]["inside_table"]
    assert not stands[VIP4, 80, "tcp"]["inside_table"]
    there.update(balanced(), part(end(A)))
    assert not there.stands()[LB4, 80, "tcp"]["outside_table"], "there is nothing to choose"
    plain = {"penstock.io/lb-algorithm": "random"}
    there.update(balanced(annotations=plain), part(end(A), end(B)))
    assert not there.stands()[LB4, 80, "tcp"]["outside_table"]
    there.close()


def test_what_cannot_be_served_is_told(there):
    problems = there.update(
        service(vips=()),
        part(end(A)),
        service("other", external_ips=("2001:db8:5::5", "127.0.0.1", "198.51.100.1")),
    )
    assert "127.0.0.1 is not served" in problems[0]
    assert "2001:db8:5::5 is not served" in problems[1]
    assert "shop/web has no clusterIP" in problems[2]
    assert ("198.51.100.1", 80, "tcp") in there.stands()
