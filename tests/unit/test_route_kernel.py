"""Lookups of the compiled kernel in tables of the real writers, against the ipaddress module."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.engine.worker import make_tables
from dataplane.kernels.batch import KIND_IP4, KIND_IP6, VECTOR_MAX, make_batch
from dataplane.kernels.house import kernel
from dataplane.kernels.route import peer_of, route
from dataplane.tables import fib6
from dataplane.tables.fib4 import Fib4
from dataplane.tables.fib6 import Fib6
from dataplane.tables.shm import Shm
from tests.naive.route import longest

MASK64 = (1 << 64) - 1
LENGTHS4 = [8, 9, 15, 16, 23, 24, 25, 26, 30, 31, 32]
LENGTHS6 = [0, 1, 32, 48, 63, 64, 65, 96, 127, 128]
BITS = {IPv4Network: 32, IPv6Network: 128}


@kernel
def _peers(b, t):
    """What `route` does, for the table of peers."""
    for i in range(b.count[0]):
        b.adjacency[i] = peer_of(t, b.kind[i], b.target_hi[i], b.target_lo[i])


class Lookups:
    """The tables of a node, writers of two of them, and the kernel that reads those."""

    def __init__(self, shm: Shm, names: tuple[str, str, str, str], find) -> None:
        wide, deep, entries, lengths = (getattr(shm, name) for name in names)
        self.writers = {4: Fib4(wide, deep), 6: Fib6(entries, lengths)}
        self.tables, self.mask6 = make_tables(shm), len(entries) - 1
        self.batch = make_batch()
        self._kernel = find

    def set(self, network, index: int) -> None:
        self.writers[network.version].set(int(network.network_address), network.prefixlen, index)

    def delete(self, network) -> None:
        assert self.writers[network.version].delete(int(network.network_address), network.prefixlen)

    def find(self, addresses: list) -> list[int]:
        """Adjacencies of addresses, a vector at a time."""
        found: list[int] = []
        for start in range(0, len(addresses), VECTOR_MAX):
            found += self._vector(addresses[start : start + VECTOR_MAX])
        return found

    def _vector(self, addresses: list) -> list[int]:
        b = self.batch
        b.count[0] = len(addresses)
        for i, address in enumerate(addresses):
            b.kind[i] = KIND_IP4 if address.version == 4 else KIND_IP6
            b.target_hi[i], b.target_lo[i] = int(address) >> 64, int(address) & MASK64
        self._kernel(b, self.tables)
        return b.adjacency[: len(addresses)].tolist()


FIB = (("fib4_wide", "fib4_deep", "fib6", "fib6_lengths"), route)
IPCACHE = (("ipcache4_wide", "ipcache4_deep", "ipcache6", "ipcache6_lengths"), _peers)


@pytest.fixture(scope="module", params=[FIB, IPCACHE], ids=["routes", "peers"])
def lookups(request, tmp_path_factory):
    with Shm.create(tmp_path_factory.mktemp("lookups")) as shm:
        yield Lookups(shm, *request.param)


@st.composite
def networks(draw, kind, lengths):
    """Prefixes of few distinct bits, so that they nest and stand side by side."""
    bits = BITS[kind]
    length = draw(st.sampled_from(lengths))
    noise = draw(st.integers(0, 7)) << bits - 3 | draw(st.integers(0, 3)) << bits // 2 - 1
    value = noise | draw(st.integers(0, 7)) << 6 | draw(st.integers(0, 3))
    return kind((value >> (bits - length) << (bits - length), length))


def edges(network, make) -> list:
    """The first and last address of a network and their neighbours outside."""
    first, last = int(network.network_address), int(network.broadcast_address)
    top = (1 << network.max_prefixlen) - 1
    return [
        make(n) for n in (first - 1, first, (first + last) // 2, last, last + 1) if 0 <= n <= top
    ]


@pytest.mark.parametrize(
    ("kind", "make", "lengths"),
    [(IPv4Network, IPv4Address, LENGTHS4), (IPv6Network, IPv6Address, LENGTHS6)],
)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_lookups_are_their_twin(lookups, kind, make, lengths, data):
    found = data.draw(st.lists(networks(kind, lengths), min_size=1, max_size=16, unique=True))
    steps = data.draw(st.permutations(found))
    gone = set(data.draw(st.lists(st.sampled_from(found), max_size=8)))
    addresses = [address for network in found for address in edges(network, make)]
    routes = {network: index for index, network in enumerate(steps, 1)}
    for network, index in routes.items():
        lookups.set(network, index)
    assert lookups.find(addresses) == [longest(routes, address) for address in addresses]
    for network in gone:
        lookups.delete(network)
        del routes[network]
    assert lookups.find(addresses) == [longest(routes, address) for address in addresses]
    for network in routes:
        lookups.delete(network)
    assert lookups.find(addresses) == [0] * len(addresses)


def crowded(count: int, mask: int) -> list[IPv6Network]:
    """Host routes whose first slots lie within a few of each other."""
    hi, lo = 0x20010DB8 << 32, np.arange(1 << 22, dtype=np.uint64)
    mixed = np.uint64(hi * 0x9E3779B97F4A7C15 & MASK64)
    mixed = mixed ^ ((lo + np.uint64(129)) * np.uint64(0xC2B2AE3D27D4EB4F))
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    slots = (mixed ^ (mixed >> np.uint64(29))) & np.uint64(mask)
    near = lo[(slots >= 1000) & (slots < 1016)].tolist()[:count]
    assert len({fib6.slot(hi, n, 129, mask) for n in near} - set(range(1000, 1016))) == 0
    return [IPv6Network((hi << 64 | n, 128)) for n in near]


def test_routes_that_crowd_one_place_are_all_found(lookups):
    """Runs of slots are searched past others' entries and past the holes of deleted ones."""
    networks = crowded(12, lookups.mask6)
    assert len(networks) == 12
    addresses = [network.network_address for network in networks]
    for index, network in enumerate(networks, 1):
        lookups.set(network, index)
    assert lookups.find(addresses) == list(range(1, 13))
    for network in networks[::2]:
        lookups.delete(network)
    assert lookups.find(addresses) == [0, 2, 0, 4, 0, 6, 0, 8, 0, 10, 0, 12]
    for network in networks[1::2]:
        lookups.delete(network)


def test_halves_and_a_default_route(lookups):
    """The shortest prefixes, which fill the whole table, under a longest one."""
    routes = {ip_network(text): index for index, text in enumerate(
        ("0.0.0.0/0", "128.0.0.0/1", "192.0.2.7/32", "::/0", "8000::/1", "2001:db8::/127"), 1
    )}  # fmt: skip
    for network, index in routes.items():
        lookups.set(network, index)
    texts = "0.0.0.0 127.255.255.255 128.0.0.0 192.0.2.6 192.0.2.7 192.0.2.8 255.255.255.255"
    texts += " :: 7fff:: 8000:: ffff:: 2001:db8:: 2001:db8::1 2001:db8::2"
    addresses = [ip_address(text) for text in texts.split()]
    assert lookups.find(addresses) == [longest(routes, address) for address in addresses]
    for network in routes:
        lookups.delete(network)
    assert lookups.find(addresses) == [0] * len(addresses)


@pytest.mark.parametrize("lookups", [FIB], indirect=True, ids=["routes"])
def test_dropped_and_other_packets_keep_no_route(lookups):
    """Only pending IP packets are looked up."""
    everything = ip_network("0.0.0.0/8")
    lookups.set(everything, 9)
    try:
        b = lookups.batch
        b.adjacency[:2] = 0
        b.verdict[0], b.kind[1] = 1, 0
        b.count[0], b.kind[0], b.target_lo[:2] = 2, KIND_IP4, 5
        route(b, lookups.tables)
        assert b.adjacency[:2].tolist() == [0, 0]
    finally:
        b.verdict[0] = 0
        lookups.delete(everything)
