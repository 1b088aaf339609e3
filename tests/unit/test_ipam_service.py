"""Addresses: given once, kept by key, rested, swept, and never lost."""

import json
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipam.errors import AllocationExhausted, IpamError, PoolRefused
from ipam.pool import bounds, router_address, size
from ipam.service import REUSE_FROM, SUSPECT_S, Ipam


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ipam(tmp_path, clock):
    ipam = Ipam.open(tmp_path / "ipam.db", clock)
    yield ipam
    assert ipam._store.problems() == []
    ipam.close()


POOLS = {4: ip_network("10.9.1.0/29"), 6: ip_network("fd09:0:0:1::/64")}


def fours(ipam: Ipam, count: int, start: int = 0) -> list[str]:
    return [str(ipam.allocate("n", f"c{start + i}", "eth0").addresses[4]) for i in range(count)]


@pytest.mark.parametrize(
    ("cidr", "first", "last", "router", "pods"),
    [
        ("10.0.0.0/24", "10.0.0.1", "10.0.0.254", "10.0.0.1", 253),
        ("10.0.0.4/30", "10.0.0.5", "10.0.0.6", "10.0.0.5", 1),
        ("10.0.0.4/31", "10.0.0.4", "10.0.0.5", "10.0.0.4", 1),
        ("10.0.0.4/32", "10.0.0.4", "10.0.0.4", "10.0.0.4", 0),
        ("fd00::/64", "fd00::1", "fd00::ffff:ffff:ffff:ffff", "fd00::1", 2**64 - 2),
        ("fd00::/127", "fd00::", "fd00::1", "fd00::", 1),
    ],
)
def test_what_a_pool_gives_out(cidr, first, last, router, pods):
    network = ip_network(cidr)
    assert bounds(network) == (int(ip_address(first)), int(ip_address(last)))
    assert router_address(network) == ip_address(router)
    assert size(network, [router_address(network)]) == pods


def test_both_families_in_order_without_the_router(ipam):
    ipam.set_node_pools(POOLS)
    first = ipam.allocate("n", "a", "eth0", {"name": "web"})
    assert first.addresses == {4: IPv4Address("10.9.1.2"), 6: IPv6Address("fd09:0:0:1::2")}
    assert dict(first.owner) == {"name": "web"}
    assert ipam.allocate("n", "b", "eth0").addresses[6] == IPv6Address("fd09:0:0:1::3")


def test_the_same_attachment_has_the_same_addresses(ipam, clock):
    ipam.set_node_pools(POOLS)
    first = ipam.allocate("n", "a", "eth0", {"name": "web"})
    clock.now += 5
    assert ipam.allocate("n", "a", "eth0", {"name": "other"}) == first
    assert ipam.leases() == [first]
    others = [("m", "a", "eth0"), ("n", "b", "eth0"), ("n", "a", "eth1")]
    found = {ipam.allocate(*key).addresses[4] for key in others}
    assert len(found) == 3
    assert first.addresses[4] not in found


def test_more_addresses_may_be_reserved(ipam):
    ipam.set_node_pools(POOLS, reserved=[ip_address("10.9.1.3"), ip_address("192.0.2.1")])
    assert fours(ipam, 2) == ["10.9.1.2", "10.9.1.4"]


def test_release_of_the_unknown_is_none(ipam):
    ipam.set_node_pools(POOLS)
    lease = ipam.allocate("n", "a", "eth0")
    assert ipam.release(("n", "a", "eth1")) is None
    assert ipam.release(lease.key) == lease
    assert ipam.release(lease.key) is None
    assert ipam.leases() == []


def test_fresh_first_then_the_one_released_longest_ago(ipam, clock):
    ipam.set_node_pools({4: POOLS[4]})
    assert fours(ipam, 4) == ["10.9.1.2", "10.9.1.3", "10.9.1.4", "10.9.1.5"]
    for name in ("c2", "c0", "c1"):
        ipam.release(("n", name, "eth0"))
        clock.now += 1
    assert fours(ipam, 1, start=10) == ["10.9.1.6"]
    clock.now += 100
    assert fours(ipam, 3, start=20) == ["10.9.1.4", "10.9.1.2", "10.9.1.3"]


def test_exhaustion_says_how_long_to_wait(ipam, clock):
    ipam.set_node_pools({4: POOLS[4]})
    fours(ipam, 5)
    with pytest.raises(AllocationExhausted, match=r"10\.9\.1\.0/29.*5 of 5.*0 resting; a larger"):
        ipam.allocate("n", "late", "eth0")
    ipam.release(("n", "c3", "eth0"))
    clock.now += 18
    with pytest.raises(AllocationExhausted, match=r"4 of 5.*1 resting.*free in 42 s"):
        ipam.allocate("n", "late", "eth0")
    assert len(ipam.leases()) == 4
    clock.now += 42
    assert fours(ipam, 1, start=9) == ["10.9.1.5"]


def test_a_clock_set_back_does_not_prolong_the_rest(ipam, clock):
    ipam.set_node_pools({4: POOLS[4]})
    fours(ipam, 5)
    ipam.release(("n", "c0", "eth0"))
    clock.now -= 1_000_000
    with pytest.raises(AllocationExhausted, match="free in 60 s"):
        ipam.allocate("n", "late", "eth0")
    clock.now += 60
    ipam.allocate("n", "late", "eth0")


def test_one_family_exhausted_takes_nothing_of_the_other(ipam):
    ipam.set_node_pools(POOLS)
    fours(ipam, 5)
    before = ipam.usage()
    with pytest.raises(AllocationExhausted):
        ipam.allocate("n", "late", "eth0")
    assert ipam.usage() == before


def test_a_huge_pool_reuses_what_has_rested(ipam, clock, monkeypatch):
    monkeypatch.setattr("ipam.service.REUSE_FROM", 3)
    assert REUSE_FROM > 1000
    ipam.set_node_pools({6: POOLS[6]})
    seen = set()
    for turn in range(30):
        lease = ipam.allocate("n", f"c{turn}", "eth0")
        seen.add(lease.addresses[6])
        ipam.release(lease.key)
        clock.now += 100
    assert len(seen) == 4


def test_no_pool_yet(ipam):
    with pytest.raises(IpamError, match="podCIDRs"):
        ipam.allocate("n", "a", "eth0")


def test_a_pool_may_grow(ipam):
    ipam.set_node_pools({4: ip_network("10.9.1.8/29")})
    old = fours(ipam, 5)
    ipam.set_node_pools({4: ip_network("10.9.1.0/28"), 6: POOLS[6]})
    assert fours(ipam, 5) == old
    new = fours(ipam, 7, start=10)
    assert new == [f"10.9.1.{n}" for n in (2, 3, 4, 5, 6, 7, 8)]
    assert 6 in ipam.allocate("n", "c30", "eth0").addresses


@pytest.mark.parametrize(
    "pools",
    [
        {4: ip_network("10.9.2.0/24"), 6: POOLS[6]},
        {4: POOLS[4]},
        {4: ip_network("10.9.1.2/31"), 6: POOLS[6]},  # the lease would be the router's address
    ],
)
def test_a_change_that_strands_leases_is_refused(ipam, pools):
    ipam.set_node_pools(POOLS)
    ipam.allocate("n", "a", "eth0")
    before = ipam.usage()
    with pytest.raises(PoolRefused, match=r"(10\.9\.1\.2|fd09:0:0:1::2)"):
        ipam.set_node_pools(pools)
    assert ipam.usage() == before
    ipam.release(("n", "a", "eth0"))
    ipam.set_node_pools(pools)


@pytest.mark.parametrize(
    ("pools", "says"),
    [
        ({4: ip_network("10.0.0.0/32")}, "/30"),
        ({6: ip_network("fd00::1/128")}, "/126"),
        ({6: ip_network("10.0.0.0/24")}, "IPv4"),
    ],
)
def test_pools_that_make_no_sense(ipam, pools, says):
    with pytest.raises(PoolRefused, match=says):
        ipam.set_node_pools(pools)


def test_a_leak_is_returned_when_denied_twice_and_late_enough(ipam, clock):
    ipam.set_node_pools(POOLS)
    leak, live = ipam.allocate("n", "a", "eth0"), ipam.allocate("n", "b", "eth0")
    assert ipam.sweep(lambda lease: lease == live) == []
    clock.now += SUSPECT_S - 1
    assert ipam.sweep(lambda lease: lease == live) == []
    clock.now += 1
    assert ipam.sweep(lambda lease: lease == live) == [leak]
    assert ipam.leases() == [live]
    assert ipam.history(1)[0]["event"] == "leak returned"


def test_a_sign_of_life_clears_the_suspicion(ipam, clock):
    ipam.set_node_pools(POOLS)
    ipam.allocate("n", "a", "eth0")
    ipam.sweep(lambda lease: False)
    clock.now += SUSPECT_S
    ipam.sweep(lambda lease: True)
    assert ipam.sweep(lambda lease: False) == []
    assert len(ipam.leases()) == 1


def test_a_lease_made_anew_during_a_sweep_is_not_the_one_that_was_denied(ipam, clock):
    ipam.set_node_pools(POOLS)
    ipam.allocate("n", "a", "eth0")
    ipam.sweep(lambda lease: False)
    clock.now += SUSPECT_S

    def deny_and_replace(lease):
        ipam.release(lease.key)
        clock.now += 1
        ipam.allocate(*lease.key)
        return False

    assert ipam.sweep(deny_and_replace) == []
    assert len(ipam.leases()) == 1


def test_usage_and_history_are_plain_data(ipam):
    ipam.set_node_pools(POOLS)
    ipam.allocate("n", "a", "eth0")
    ipam.allocate("n", "b", "eth0")
    ipam.release(("n", "a", "eth0"))
    usage = ipam.usage()[0]
    assert usage == {
        "family": 4, "cidr": "10.9.1.0/29", "size": 5, "used": 1, "resting": 1, "free": 3
    }  # fmt: skip
    events = ipam.history(3)
    assert [event["event"] for event in events] == ["release", "allocate", "allocate"]
    assert events[0]["addresses"] == "10.9.1.2 fd09:0:0:1::2"
    assert len(ipam.history(1)) == 1
    json.dumps([usage, *events])


def test_a_restart_changes_nothing(tmp_path, clock):
    ipam = Ipam.open(tmp_path / "ipam.db", clock)
    ipam.set_node_pools(POOLS)
    lease = ipam.allocate("n", "a", "eth0", {"name": "web"})
    ipam.close()
    again = Ipam.open(tmp_path / "ipam.db", clock)
    again.set_node_pools(POOLS)
    assert again.leases() == [lease]
    assert again.allocate("n", "b", "eth0").addresses[4] == IPv4Address("10.9.1.3")
    again.close()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("adw"), st.integers(0, 7)), max_size=30))
def test_any_sequence_against_a_plain_model(tmp_path_factory, steps):
    clock = Clock()
    ipam = Ipam.open(tmp_path_factory.mktemp("model") / "ipam.db", clock)
    ipam.set_node_pools({4: POOLS[4]})
    held: dict[int, IPv4Address] = {}
    released: dict[IPv4Address, float] = {}
    for what, number in steps:
        key = ("n", f"c{number}", "eth0")
        if what == "w":
            clock.now += number * 10
        elif what == "d":
            assert (ipam.release(key) is None) == (number not in held)
            if number in held:
                released[held.pop(number)] = clock.now
        else:
            try:
                given_ = ipam.allocate(*key).addresses[4]
            except AllocationExhausted:
                assert number not in held
                assert len(held) + len(released) == 5
                assert all(clock.now - at < 60 for at in released.values())
                continue
            assert held.get(number, given_) == given_
            assert given_ not in {a for n, a in held.items() if n != number}
            assert clock.now - released.pop(given_, 0) >= 60
            held[number] = given_
    assert {lease.key[1]: lease.addresses[4] for lease in ipam.leases()} == {
        f"c{number}": address for number, address in held.items()
    }
    ipam.close()
