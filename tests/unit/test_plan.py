"""Desired state and plan: applying leads to an empty plan; each rule of addressing holds."""

from dataclasses import replace
from ipaddress import ip_address, ip_network
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.control import overlay
from dataplane.control.desired import NotReady, desired
from dataplane.control.model import HOST, HOST_PEER
from dataplane.control.plan import plan
from dataplane.control.ports import merged, parse, shown, without
from dataplane.objects.core import MAC_ANNOTATION
from dataplane.objects.manifest import ManifestError
from tests.fake_node import NEIGHBOUR_MAC, UPLINK_MAC, FakeKernel, config, node, objects
from xdp.abi import value


def settle(kernel, options, things, ends=(), stands=None):
    """Apply plans until one is empty, as the reconciler does; return (desired, actions done)."""
    done = []
    for _ in range(6):
        ports = stands.ports if stands else {}
        wanted = desired(options, things, ends, kernel.snapshot(), ports)
        actions = plan(wanted, kernel.snapshot(), stands)
        if not actions:
            return wanted, done
        for action in actions:
            if action.method:
                getattr(kernel, action.method)(*action.arguments)
        done += actions
        if not any(action.method for action in actions):
            stands = wanted.tables
    raise AssertionError(f"no rest after {[str(action) for action in done]}")


def test_a_second_plan_is_empty():
    kernel = FakeKernel()
    wanted, done = settle(kernel, config(), objects())
    assert any("make penstock0" in str(action) for action in done)
    assert plan(wanted, kernel.snapshot(), wanted.tables) == []


def test_routes_of_an_overlay_node():
    kernel = FakeKernel()
    ends = [kernel.pod(1)]
    wanted, _ = settle(kernel, config(), objects(), ends)
    routes, ports = wanted.tables.routes, wanted.tables.ports
    kinds = {str(network): adjacency.kind for network, adjacency in routes.items()}
    assert kinds["10.244.1.0/24"] == value("ADJACENCY_BLACKHOLE")
    assert kinds["10.244.1.1/32"] == value("ADJACENCY_GATEWAY")
    assert kinds["fd00:244:0:1::1/128"] == value("ADJACENCY_GATEWAY")
    assert kinds["192.0.2.1/32"] == value("ADJACENCY_HOST")
    assert kinds["10.244.1.11/32"] == value("ADJACENCY_POD")
    for text in ("10.244.2.0/24", "fd00:244:0:2::/64", "192.0.2.2/32", "2001:db8::2/128"):
        adjacency = routes[ip_network(text)]
        assert adjacency.kind == value("ADJACENCY_TUNNEL")
        assert str(adjacency.tunnel.remote) == "192.0.2.2"
        assert adjacency.tunnel.inner_destination_mac == bytes.fromhex("0250c0000202")
        assert (adjacency.source_mac, adjacency.destination_mac) == (UPLINK_MAC, NEIGHBOUR_MAC)
        assert adjacency.mtu == 1450
    assert {port.name for port in ports.values()} == {HOST_PEER, "eth0", "pst00000001"}
    assert wanted.tables.locals == (ip_address("192.0.2.1"),)
    assert [str(cidr) for cidr in wanted.tables.prefixes] == ["10.244.1.0/24", "fd00:244:0:1::/64"]
    assert [str(at) for at in wanted.tables.nat] == ["192.0.2.1", "2001:db8::1"]


def test_routes_of_a_direct_node():
    kernel = FakeKernel()
    wanted, _ = settle(kernel, config(mode="direct"), objects())
    adjacency = wanted.tables.routes[ip_network("10.244.2.0/24")]
    assert adjacency.kind == value("ADJACENCY_NEXTHOP")
    assert adjacency.tunnel is None
    assert adjacency.mtu == 1500
    assert [str(cidr) for cidr in wanted.tables.prefixes] == ["10.244.1.0/24", "fd00:244:0:1::/64"]
    hops = {str(r.network): (str(r.gateway), r.device) for r in wanted.host_routes}
    assert hops["10.244.2.0/24"] == ("192.0.2.2", "eth0")
    assert hops["10.244.1.0/24"] == ("169.254.1.1", HOST)


@pytest.mark.parametrize(("family", "mtu"), [(4, 1450), (6, 1430)])
def test_path_mtu_is_the_uplinks_less_the_overhead(family, mtu):
    wanted, _ = settle(FakeKernel(), config(underlay_family=family), objects())
    assert wanted.view["path_mtu"] == mtu
    assert overlay.path_mtu(9000, None, 0) == 9000
    assert overlay.path_mtu(9000, 4, 1400) == 1400
    assert overlay.path_mtu(1500, 4, 9000) == 1450


def test_an_unknown_neighbour_is_provoked_and_meanwhile_unresolved():
    kernel = FakeKernel()
    kernel.neighbours.clear()
    wanted, _ = settle(kernel, config(), objects())
    unresolved = value("ADJACENCY_UNRESOLVED")
    assert wanted.tables.routes[ip_network("10.244.2.0/24")].kind == unresolved
    assert (2, ip_address("192.0.2.2")) in wanted.provoke
    kernel.known("192.0.2.2")
    wanted, _ = settle(kernel, config(), objects(), stands=wanted.tables)
    assert wanted.tables.routes[ip_network("10.244.2.0/24")].kind == value("ADJACENCY_TUNNEL")
    kernel.known("192.0.2.2", bytes.fromhex("0c00000000ff"))
    moved, actions = settle(kernel, config(), objects(), stands=wanted.tables)
    assert moved.tables.routes[ip_network("10.244.2.0/24")].destination_mac[-1] == 0xFF
    assert any("10.244.2.0/24" in str(action) for action in actions)


def test_one_bad_node_does_not_stop_the_others():
    far = node(3, internal_ips=(ip_address("2001:db8::3"),))
    wanted, _ = settle(FakeKernel(), config(), objects(node(1), far, node(2)))
    assert ip_network("10.244.2.0/24") in wanted.tables.routes
    assert "node3" in wanted.problems[0]
    bad = node(3, annotations={MAC_ANNOTATION: "zz"})
    wanted, _ = settle(FakeKernel(), config(), objects(node(1), bad, node(2)))
    assert ip_network("10.244.2.0/24") in wanted.tables.routes


@pytest.mark.parametrize(
    ("things", "options", "words"),
    [
        (objects(node(2)), {}, "no Node 'node1'"),
        (objects(node(1, pod_cidrs=())), {}, "podCIDRs"),
        (objects(node(1, internal_ips=())), {}, "InternalIP"),
        (objects(), {"uplinks": ["eth7"]}, "eth7"),
    ],
)
def test_what_is_missing_is_named(things, options, words):
    with pytest.raises(NotReady, match=words):
        desired(config(**options), things, (), FakeKernel().snapshot(), {})


def test_ports_keep_their_index():
    kernel = FakeKernel()
    ends = [kernel.pod(number) for number in range(1, 5)]
    first, _ = settle(kernel, config(), objects(), ends)
    second, _ = settle(kernel, config(), objects(), [*ends[2:], kernel.pod(9)], first.tables)
    before = {port.name: index for index, port in first.tables.ports.items()}
    for index, port in second.tables.ports.items():
        assert before.get(port.name, index) == index


def test_vtep_macs():
    assert overlay.vtep_mac(node(1), ip_address("192.0.2.1")) == bytes.fromhex("0250c0000201")
    six = overlay.vtep_mac(node(1), ip_address("2001:db8::1"))
    assert six[:2] == b"\x02\x50"
    given = node(1, annotations={MAC_ANNOTATION: "0a:0b:0c:0d:0e:0f"})
    assert overlay.vtep_mac(given, ip_address("192.0.2.1")).hex() == "0a0b0c0d0e0f"
    with pytest.raises(ManifestError, match="vtep-mac"):
        overlay.vtep_mac(node(1, annotations={MAC_ANNOTATION: "01:00:00:00:00:00"}), None)


def test_the_node_reaches_services_through_the_dataplane():
    wanted, _ = settle(FakeKernel(), config(), objects())
    hops = {str(r.network): (str(r.gateway), r.device, str(r.source)) for r in wanted.host_routes}
    assert hops["10.96.0.0/12"] == ("169.254.1.1", HOST, "10.244.1.1")
    assert hops["fd00:96::/108"] == ("fe80::1", HOST, "fd00:244:0:1::1")
    assert hops["169.254.42.1/32"][:2] == ("169.254.1.1", HOST)
    assert hops["fd00:42::1/128"][:2] == ("fe80::1", HOST)
    inside = node(1, internal_ips=(ip_address("10.96.7.1"), ip_address("2001:db8::1")))
    kernel = FakeKernel()
    kernel.addresses[2].add((ip_address("10.96.7.1"), 24))
    wanted, _ = settle(kernel, config(), objects(inside, node(2)))
    assert "10.96.0.0/12 covers" in wanted.problems[0]
    assert ip_network("10.96.0.0/12") not in {route.network for route in wanted.host_routes}


def test_ports_are_reserved_beside_those_that_are():
    kernel = FakeKernel()
    settle(kernel, config(), objects())
    assert kernel.reserved == ((53, 53), (30000, 32767), (40960, 65535))


def test_the_node_row_says_what_nat_and_tracking_need():
    wanted, _ = settle(FakeKernel(), config(), objects())
    row = wanted.tables.node
    assert (row["nat_first"], row["nat_count"]) == (40960, 24576)
    assert row["masquerade4"] == int(ip_address("192.0.2.1"))
    assert row["masquerade6_hi"] == 0x20010DB8 << 32
    assert row["loopback4"] == int(ip_address("169.254.42.1"))
    assert row["loopback6_lo"] == 1
    assert row["connections"] == 1 << 19
    assert row["timeout_s"][value("CONNECTION_ESTABLISHED")] == 8000
    assert row["timeout_s"][value("CONNECTION_CLOSED")] == 10
    assert len(row["timeout_s"]) == 16
    off = config().model_copy(
        update={
            "masquerade": config().masquerade.model_copy(update={"ipv6": False}),
            "conntrack": config().conntrack.model_copy(update={"max": 1025}),
        }
    )
    wanted, _ = settle(FakeKernel(), off, objects())
    assert wanted.tables.node["masquerade6_hi"] == 0
    assert wanted.tables.node["connections"] == 2048


RANGES = st.lists(
    st.tuples(st.integers(0, 80), st.integers(0, 9)).map(lambda pair: (pair[0], sum(pair)))
)


def ports_in(ranges):
    return {port for first, last in ranges for port in range(first, last + 1)}


@given(RANGES, RANGES)
def test_ranges_of_ports_are_sets(one, other):
    one, other = merged(one), merged(other)
    assert parse(shown(one) + "\n") == one
    assert ports_in(merged([*one, *other])) == ports_in(one) | ports_in(other)
    assert ports_in(without(one, other)) == ports_in(one) - ports_in(other)
    assert all(a[1] + 1 < b[0] for a, b in pairwise(one))


DAMAGE = {
    "host gone": lambda k: k.links.pop(HOST, None),
    "host down": lambda k: (
        k.links.update({HOST: replace(k.links[HOST], up=False)}) if HOST in k.links else None
    ),
    "routes gone": lambda k: k.routes.__delitem__(slice(3, None)),
    "addresses gone": lambda k: [k.addresses.pop(i) for i in list(k.addresses) if i != 2],
    "stray address": lambda k: k.addresses.setdefault(
        k.links[HOST].index if HOST in k.links else 99, set()
    ).add((ip_address("10.9.9.9"), 32)),
    "neighbours gone": lambda k: k.neighbours.clear(),
    "neighbour back": lambda k: k.known("192.0.2.2"),
    "ports free": lambda k: setattr(k, "reserved", ()),
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(DAMAGE)), max_size=6), st.booleans())
def test_any_damage_is_healed(damages, with_pod):
    kernel = FakeKernel()
    ends = [kernel.pod(1)] if with_pod else []
    wanted, _ = settle(kernel, config(), objects(), ends)
    for damage in damages:
        DAMAGE[damage](kernel)
    healed, _ = settle(kernel, config(), objects(), ends, wanted.tables)
    assert plan(healed, kernel.snapshot(), healed.tables) == []
    host = kernel.links[HOST]
    assert host.up
    assert kernel.addresses[host.index] == set(healed.host_addresses)
