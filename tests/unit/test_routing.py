"""The kernel's routes as next hops; what a node is without its uplink; liars among the nodes."""

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.control.desired import NotReady, desired
from dataplane.control.model import PROTOCOL, Actual, Link, Neighbour, Route
from dataplane.control.routing import NEXTHOP, UNRESOLVED, Underlay
from tests.fake_node import NEIGHBOUR_MAC, FakeKernel, config, node, objects
from xdp.abi import CONST, value

ETH0 = Link(2, "eth0", b"\x0c" + bytes(5), 1500, True, 1)
ETH1 = Link(3, "eth1", b"\x0d" + bytes(5), 1500, True, 1)
GATEWAY = ip_address("192.0.2.254")
NOARP, PERMANENT, FAILED, STALE = 0x40, 0x80, 0x20, 0x04


def underlay(routes, neighbours=()) -> Underlay:
    entries = {(entry.device, entry.address): entry for entry in neighbours}
    actual = Actual({"eth0": ETH0, "eth1": ETH1}, {}, tuple(routes), entries)
    return Underlay(actual, {2: ETH0}, {2: 7})


def route(text: str, device: int = 2, **more) -> Route:
    return Route(ip_network(text), more.pop("gateway", None), device, **more)


def neighbour(text: str, state: int, mac: bytes = NEIGHBOUR_MAC, device: int = 2) -> Neighbour:
    return Neighbour(device, ip_address(text), mac, state)


prefixes = st.tuples(
    st.integers(0, 32), st.integers(0, 0xF), st.integers(1, 3), st.integers(0, 2), st.booleans()
)


@settings(max_examples=150, deadline=None)
@given(st.lists(prefixes, max_size=8), st.integers(0, 0xF))
def test_find_is_the_longest_prefix_and_the_least_metric(entries, low):
    target = ip_address((10 << 24) | low << 28 | low)
    routes = [
        Route(
            ip_network(((10 << 24) | bits << 28 | bits, length), strict=False),
            None, device, metric, protocol=PROTOCOL if ours else 0,
        )
        for length, bits, device, metric, ours in entries
    ]  # fmt: skip
    matching = [r for r in routes if target in r.network and r.protocol != PROTOCOL]
    found = underlay(routes).find(target)
    if not matching:
        assert found is None
        return
    longest = max(r.network.prefixlen for r in matching)
    least = min(r.metric for r in matching if r.network.prefixlen == longest)
    first = next(
        r for r in matching if r.network.prefixlen == longest and r.metric == least
    )  # fmt: skip
    assert found == ((ETH0, target) if first.device == 2 else None)


def test_another_device_with_a_longer_prefix_is_not_bypassed():
    under = underlay([route("0.0.0.0/0", gateway=GATEWAY), route("198.51.100.0/24", device=3)])
    assert under.find(ip_address("198.51.100.9")) is None
    assert under.find(ip_address("203.0.113.9")) == (ETH0, GATEWAY)


def test_routes_take_macs_mtus_and_on_link_neighbours():
    under = underlay(
        [
            route("0.0.0.0/0", gateway=GATEWAY, mtu=1400),
            route("192.0.2.0/24"),
            route("10.0.0.0/8", device=3),
            route("ff00::/8"),
            route("fe80::/64"),
            route("10.244.2.0/24", gateway=GATEWAY, protocol=PROTOCOL),
        ],
        [
            neighbour("192.0.2.254", STALE),
            neighbour("192.0.2.5", PERMANENT),
            neighbour("192.0.2.6", FAILED),
            neighbour("192.0.2.255", NOARP, b"\xff" * 6),
            neighbour("10.0.0.1", PERMANENT, device=3),
        ],
    )
    found = {str(network): adjacency for network, adjacency in under.routes().items()}
    assert found.keys() == {"0.0.0.0/0", "192.0.2.0/24", "192.0.2.254/32", "192.0.2.5/32"}
    assert (found["0.0.0.0/0"].kind, found["0.0.0.0/0"].mtu) == (NEXTHOP, 1400)
    assert found["0.0.0.0/0"].destination_mac == NEIGHBOUR_MAC
    assert found["192.0.2.0/24"].kind == UNRESOLVED
    assert (found["192.0.2.5/32"].port, found["192.0.2.5/32"].mtu) == (7, 1500)
    assert under.provoke == {(2, GATEWAY)}, "a stale gateway is asked again, idle hosts are not"


def test_the_least_metric_wins_whatever_the_device():
    under = underlay(
        [route("198.51.100.0/24", device=3, metric=1), route("198.51.100.0/24", metric=5)]
    )
    assert under.routes() == {}


def want(kernel, options=None, things=None, ends=(), current=None):
    return desired(
        options or config(), things or objects(), ends, kernel.snapshot(), current or {}
    )  # fmt: skip


def test_a_lost_uplink_changes_neither_ports_nor_workers_and_new_pods_still_come():
    kernel = FakeKernel(queues=2)
    kernel.make_host_pair(1, bytes(6))
    before = want(kernel)
    del kernel.links["eth0"], kernel.addresses[2]
    kernel.routes.clear()
    kernel.neighbours.clear()
    end = kernel.pod(1)
    after = want(kernel, ends=[end], current=before.tables.ports)
    assert before.tables.ports.items() <= after.tables.ports.items()
    assert after.queues == before.queues
    assert after.view["path_mtu"] == before.view["path_mtu"]
    assert after.host_routes == before.host_routes
    assert after.tables.routes[ip_network("10.244.1.11/32")].kind == value("ADJACENCY_POD")
    assert after.tables.routes[ip_network("10.244.2.0/24")].kind == UNRESOLVED
    assert any("192.0.2.1" in problem for problem in after.problems)
    named = want(kernel, config(uplinks=["eth0"]), current=before.tables.ports)
    assert any("eth0" in problem for problem in named.problems)


@pytest.mark.parametrize(
    ("liar", "words"),
    [
        (node(3, internal_ips=(ip_address("192.0.2.1"),)), "192.0.2.1 is this node's own"),
        (node(3, pod_cidrs=(ip_network("10.244.1.0/24"),)), "part of this node's own"),
        (node(3, pod_cidrs=(ip_network("10.244.1.128/25"),)), "part of this node's own"),
        (node(3, pod_cidrs=(ip_network("0.0.0.0/0"),)), "covers our 192.0.2.1"),
        (node(3, pod_cidrs=(ip_network("10.244.2.0/24"),)), "is Node node2's"),
        (node(3, internal_ips=()), "no InternalIP of family 4"),
        (node(3, internal_ips=(ip_address("203.0.113.9"),)), "no uplink leads to 203.0.113.9"),
    ],
)
def test_a_lying_node_is_a_problem_and_takes_nothing_from_others(liar, words):
    kernel = FakeKernel()
    del kernel.routes[2]
    kernel.make_host_pair(1, bytes(6))
    honest = want(kernel)
    lied = want(kernel, things=objects(node(1), node(2), liar))
    assert any(words in problem and "node3" in problem for problem in lied.problems)
    assert honest.tables.routes.items() <= lied.tables.routes.items()
    assert set(honest.host_routes) <= set(lied.host_routes)


def test_small_mtus():
    assert "1280" in want(FakeKernel(mtu=1300)).problems[0]
    assert want(FakeKernel(mtu=1350)).problems == ()
    with pytest.raises(NotReady, match="path MTU 50"):
        want(FakeKernel(mtu=100))


@pytest.mark.parametrize(
    ("queues", "workers", "wanted"), [(1, 0, 1), (1, 1, 1), (4, 3, 3), (64, 16, 16)]
)
def test_workers_fit_the_uplinks(queues, workers, wanted):
    options = config()
    options = options.model_copy(
        update={"forwarder": options.forwarder.model_copy(update={"workers": workers})}
    )
    assert want(FakeKernel(queues=queues), options).tables.node["workers"] == wanted
    if queues < 2:
        more = options.forwarder.model_copy(update={"workers": 2})
        with pytest.raises(NotReady, match="ethtool -L eth0"):
            want(FakeKernel(queues=queues), options.model_copy(update={"forwarder": more}))


def test_pod_cidrs_need_room_and_one_a_family_counts():
    tiny = node(1, pod_cidrs=(ip_network("10.244.1.1/32"),))
    with pytest.raises(NotReady, match=r"10\.244\.1\.1/32 has 1 addresses"):
        want(FakeKernel(), things=objects(tiny))
    double = node(1, pod_cidrs=(ip_network("10.244.1.0/24"), ip_network("10.244.9.0/24")))
    routes = want(FakeKernel(), things=objects(double)).tables.routes
    assert ip_network("10.244.1.1/32") in routes
    assert ip_network("10.244.9.0/24") not in routes


def test_a_port_index_does_not_change_its_device_in_one_turn():
    kernel = FakeKernel()
    first = want(kernel, ends=[kernel.pod(1)])
    second = want(kernel, ends=[kernel.pod(2)], current=first.tables.ports)
    index = {port.name: number for number, port in first.tables.ports.items()}
    assert index["pst00000001"] not in second.tables.ports
    assert index["eth0"] in second.tables.ports


def test_a_full_port_table_is_said_and_a_bad_record_stops_no_other():
    kernel = FakeKernel()
    good, bad = kernel.pod(1), kernel.pod(2)
    wanted = want(kernel, ends=[replace(bad, queue_count=99), good])
    assert "endpoint 2" in wanted.problems[0]
    assert ip_network("10.244.1.11/32") in wanted.tables.routes
    many = [kernel.pod(number) for number in range(1, CONST["PORTS_MAX"] + 1)]
    with pytest.raises(NotReady, match=f"{CONST['PORTS_MAX']} a node"):
        want(kernel, ends=[replace(end, address4=None, address6=None) for end in many])


def test_a_remote_nodes_gateway_is_followed_in_direct_mode():
    kernel = FakeKernel()
    far = node(
        3, internal_ips=(ip_address("203.0.113.3"),), pod_cidrs=(ip_network("10.244.3.0/24"),)
    )
    kernel.known("192.0.2.254", b"\x0e" + bytes(5))
    wanted = want(kernel, config(mode="direct"), objects(node(1), far))
    assert wanted.tables.routes[ip_network("10.244.3.0/24")].destination_mac == b"\x0e" + bytes(5)
    hop = next(r for r in wanted.host_routes if str(r.network) == "10.244.3.0/24")
    assert (hop.gateway, hop.device) == (GATEWAY, "eth0")
