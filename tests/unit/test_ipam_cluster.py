"""Node CIDRs: deterministic, disjoint, kept."""

from ipaddress import ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipam.cluster import ClusterPools
from ipam.errors import AllocationExhausted, PoolRefused

POOLS = {4: (ip_network("10.0.0.0/22"), 24), 6: (ip_network("fd00::/48"), 64)}


@pytest.fixture
def cluster(tmp_path):
    cluster = ClusterPools.open(tmp_path / "cluster.db", POOLS)
    yield cluster
    cluster.close()


def test_nodes_get_blocks_of_both_families_in_order(cluster):
    assert cluster.carve("a") == {4: ip_network("10.0.0.0/24"), 6: ip_network("fd00::/64")}
    assert cluster.carve("b") == {4: ip_network("10.0.1.0/24"), 6: ip_network("fd00:0:0:1::/64")}
    assert cluster.carve("a")[4] == ip_network("10.0.0.0/24")
    assert list(cluster.nodes()) == ["a", "b"]


def test_state_and_order_survive_a_restart(tmp_path):
    first = ClusterPools.open(tmp_path / "cluster.db", POOLS)
    held = first.carve("a")
    first.close()
    again = ClusterPools.open(tmp_path / "cluster.db", POOLS)
    assert again.carve("a") == held
    assert again.carve("b")[4] == ip_network("10.0.1.0/24")
    again.close()


def test_a_released_block_comes_again_as_late_as_possible(cluster):
    for node in "abc":
        cluster.carve(node)
    freed = cluster.release("a")
    assert cluster.release("a") == {}
    assert cluster.carve("d")[4] == ip_network("10.0.3.0/24")
    assert cluster.carve("e")[4] == freed[4]


def test_exhaustion_takes_nothing(cluster):
    for node in "abcd":
        cluster.carve(node)
    with pytest.raises(AllocationExhausted, match=r"10\.0\.0\.0/22.*all 4 node CIDRs of /24"):
        cluster.carve("e")
    assert "e" not in cluster.nodes()
    assert cluster.usage()[0]["free"] == 0
    assert cluster.usage()[1] == {
        "family": 6, "cidr": "fd00::/48", "mask_size": 64, "size": 65536, "used": 4, "free": 65532
    }  # fmt: skip


def test_claimed_cidrs_are_not_carved(cluster):
    cluster.claim("x", {4: ip_network("10.0.0.0/24")})
    cluster.claim("x", {4: ip_network("10.0.0.0/24")})
    assert cluster.carve("a")[4] == ip_network("10.0.1.0/24")
    assert cluster.carve("x") == {4: ip_network("10.0.0.0/24"), 6: ip_network("fd00:0:0:1::/64")}
    with pytest.raises(PoolRefused, match="node x's"):
        cluster.claim("b", {4: ip_network("10.0.0.0/24")})
    with pytest.raises(PoolRefused, match="no block of"):
        cluster.claim("b", {4: ip_network("10.9.0.0/24")})
    with pytest.raises(PoolRefused, match="no block of"):
        cluster.claim("b", {4: ip_network("10.0.2.0/25")})
    with pytest.raises(PoolRefused, match="it has"):
        cluster.claim("a", {4: ip_network("10.0.3.0/24")})
    assert "b" not in cluster.nodes()


def test_a_change_of_pools_that_strands_nodes_is_refused(tmp_path):
    first = ClusterPools.open(tmp_path / "cluster.db", POOLS)
    first.carve("a")
    first.close()
    for pools in ({4: POOLS[4]}, {**POOLS, 4: (ip_network("10.0.0.0/22"), 25)}):
        with pytest.raises(PoolRefused, match="of a"):
            ClusterPools.open(tmp_path / "cluster.db", pools)
    grown = ClusterPools.open(
        tmp_path / "cluster.db", {**POOLS, 4: (ip_network("10.0.0.0/16"), 24)}
    )
    assert grown.carve("b")[4] == ip_network("10.0.1.0/24")
    grown.close()


@pytest.mark.parametrize("mask", [21, 31, 33])
def test_masks_that_make_no_sense(tmp_path, mask):
    with pytest.raises(PoolRefused, match="mask_size"):
        ClusterPools.open(tmp_path / "cluster.db", {4: (ip_network("10.0.0.0/22"), mask)})


def test_history_names_the_nodes(cluster):
    cluster.carve("a")
    cluster.release("a")
    assert [(e["event"], e["node"]) for e in cluster.history(2)] == [
        ("release", "a"),
        ("carve", "a"),
    ]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcdefg")), max_size=25))
def test_blocks_never_overlap(tmp_path_factory, steps):
    cluster = ClusterPools.open(tmp_path_factory.mktemp("cluster") / "c.db", POOLS)
    for take, node in steps:
        try:
            cluster.carve(node) if take else cluster.release(node)
        except AllocationExhausted:
            assert len(cluster.nodes()) == 4
        held = [cidrs[4] for cidrs in cluster.nodes().values()]
        assert len(set(held)) == len(held) <= 4
        assert all(cidr.prefixlen == 24 and cidr.subnet_of(POOLS[4][0]) for cidr in held)
    cluster.close()
