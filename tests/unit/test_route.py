"""Longest prefix match: the writer's tables and the kernel's lookups against brute force."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels.batch import KIND_IP4, KIND_IP6
from dataplane.kernels.house import kernel
from dataplane.kernels.route import FIB6_MASK, lookup, slot6
from dataplane.tables import fib6
from dataplane.tables.model import Adjacency
from dataplane.tables.shm import Shm
from dataplane.tables.writer import TableWriter
from tests.worlds import World
from xdp.abi import value

MASK64 = (1 << 64) - 1


@kernel
def _lookup4(t, address):
    return lookup(t, KIND_IP4, np.uint64(0), np.uint64(address))


@kernel
def _lookup6(t, hi, lo):
    return lookup(t, KIND_IP6, hi, lo)


@kernel
def _slot6(hi, lo, depth):
    return slot6(hi, lo, depth, FIB6_MASK)


def prefixes(kind, bits, lengths):
    """Networks that nest: few distinct high bits, any low ones."""
    base = st.sampled_from([0x0A, 0x0B, 0xFD]).map(lambda top: top << (bits - 8))
    rest = st.integers(0, (1 << (bits - 8)) - 1)
    few = st.integers(0, 15).map(lambda low: low)
    return st.builds(
        lambda top, low, more, length: kind(((top | low >> 40 << 40 | more) , length), strict=False)
        if bits == 128
        else kind(((top | (low & 0x300) | more), length), strict=False),
        base, rest, few, st.sampled_from(lengths),
    )  # fmt: skip


NETWORKS = prefixes(IPv4Network, 32, [0, 8, 15, 16, 23, 24, 25, 28, 31, 32]) | prefixes(
    IPv6Network, 128, [0, 1, 32, 48, 63, 64, 65, 96, 127, 128]
)
STEPS = st.lists(st.tuples(NETWORKS, st.integers(1, 30), st.booleans()), max_size=40)


class Tables:
    """One writer over one shared memory for all examples: they delete what they add."""

    def __init__(self, folder) -> None:
        self.world = World(folder)
        self.writer = self.world.writer
        self.writer.replace_routes({})

    def best(self, address, routes):
        """Row of the longest prefix by trying all; 0 for none."""
        found = [
            (network.prefixlen, index)
            for network, index in routes.items()
            if network.version == address.version and address in network
        ]
        return max(found)[1] if found else 0

    def look(self, address) -> int:
        if address.version == 4:
            return int(_lookup4(self.world.tables, np.int64(int(address))))
        hi, lo = int(address) >> 64, int(address) & MASK64
        return int(_lookup6(self.world.tables, np.uint64(hi), np.uint64(lo)))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    made = Tables(tmp_path_factory.mktemp("routes"))
    yield made
    made.writer.replace_routes({})


def probes(network):
    """Addresses at and around a network's ends."""
    kind = IPv4Address if network.version == 4 else IPv6Address
    first, last = int(network.network_address), int(network.broadcast_address)
    return [kind(n % (1 << network.max_prefixlen)) for n in (first, last, first - 1, last + 1)]


@settings(max_examples=80, deadline=None)
@given(STEPS)
def test_lookups_are_brute_force(tables, steps):
    wanted = {}
    for network, number, add in steps:
        if add:
            wanted[network] = Adjacency(value("ADJACENCY_NEXTHOP"), port=number, mtu=1500)
            tables.writer.set_route(network, wanted[network])
        else:
            wanted.pop(network, None)
            tables.writer.delete_route(network)
    routes = tables.writer.routes()
    assert set(routes) == set(wanted)
    for network, _, _ in steps:
        for address in probes(network):
            assert tables.look(address) == tables.best(address, routes), address
    tables.writer.replace_routes({})
    for network, _, _ in steps:
        assert tables.look(probes(network)[0]) == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(0, MASK64), st.integers(0, MASK64), st.integers(1, 129))
def test_kernel_and_writer_mix_alike(hi, lo, depth):
    assert int(_slot6(np.uint64(hi), np.uint64(lo), depth)) == fib6.slot(hi, lo, depth)


def test_a_restarted_writer_finds_its_routes(tmp_path):
    networks = [
        IPv4Network("0.0.0.0/0"), IPv4Network("10.1.0.0/16"), IPv4Network("10.1.2.0/24"),
        IPv4Network("10.1.2.128/25"), IPv4Network("10.1.2.3/32"), IPv6Network("::/0"),
        IPv6Network("fd00::/48"), IPv6Network("fd00::1/128"),
    ]  # fmt: skip
    with Shm.create(tmp_path) as shm:
        wanted = {
            network: Adjacency(value("ADJACENCY_NEXTHOP"), port=number, mtu=1500)
            for number, network in enumerate(networks)
        }
        writer = TableWriter(shm)
        writer.replace_routes(wanted)
        writer.publish()
        routes = writer.routes()
        again = TableWriter(shm)
        assert again.routes() == routes
        assert again.replace_routes(wanted) == []
        del writer, again
