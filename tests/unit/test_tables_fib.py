"""Route tables against a brute-force longest prefix match of the ipaddress module."""

from ipaddress import IPv4Network, IPv6Network, ip_address

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels import route
from dataplane.kernels.house import kernel
from dataplane.tables import fib6 as fib6_module
from dataplane.tables.errors import TableFull
from dataplane.tables.fib4 import DEPTH_MASK, DEPTH_SHIFT, Fib4, lookup4
from dataplane.tables.fib6 import DELETED, Fib6, lookup6, slot
from xdp.abi import CONST, DTYPE

GROUPS = 8


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def brute(routes: dict, address: int, bits: int) -> int:
    """The index of the longest matching prefix, 0: none."""
    make = IPv4Network if bits == 32 else IPv6Network
    target = ip_address(address.to_bytes(bits // 8, "big"))
    found = [(length, i) for (at, length), i in routes.items() if target in make((at, length))]
    return max(found)[1] if found else 0


def edges(routes, bits: int) -> set[int]:
    """Addresses at which the answer may change."""
    found = {0, (1 << bits) - 1}
    for address, length in routes:
        end = address + (1 << (bits - length))
        found |= {address - 1, address, end - 1, end}
    return {address for address in found if 0 <= address < 1 << bits}


# --- IPv4 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    return np.zeros(CONST["FIB4_WIDE"], np.uint32)


def area(first: int = 0x0A000000 >> 8, count: int = 1 << 12) -> list[tuple[int, int]]:
    return [(first - 1, first + count + 1)]


@st.composite
def prefix4(draw):
    length = draw(st.sampled_from([12, 13, 15, 20, 23, 24, 25, 26, 30, 31, 32]))
    low = draw(st.sampled_from([0, 1, 0xFF, 0x100, 0x180, 0x1FF, 0x200, 0xFFFF, 0x8FFFF, 0xFFFFF]))
    return (0x0A000000 | low) & (0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF, length


STEPS4 = st.lists(st.tuples(st.booleans(), prefix4(), st.integers(1, 9)), max_size=25)


@settings(max_examples=80, deadline=None)
@given(steps=STEPS4)
def test_ipv4_matches_brute_force_and_reads_back(wide, steps):
    deep = np.zeros(GROUPS * 256, np.uint32)
    fib, routes = Fib4(wide, deep, Clock(), ()), {}
    for insert, (address, length), index in steps:
        if insert:
            fib.set(address, length, index)
            routes[address, length] = index
        else:
            assert fib.delete(address, length) == ((address, length) in routes)
            routes.pop((address, length), None)
    assert fib.routes == routes
    places = edges({p for _, p, _ in steps}, 32)
    expected = {address: brute(routes, address, 32) for address in places}
    assert {address: lookup4(wide, deep, address) for address in places} == expected

    again = Fib4(wide, deep, Clock(), area())
    assert {address: brute(again.routes, address, 32) for address in places} == expected
    before = wide[area()[0][0] : area()[0][1]].copy(), deep.copy()
    again.repair()
    assert (wide[area()[0][0] : area()[0][1]] == before[0]).all()
    assert {address: lookup4(wide, deep, address) for address in places} == expected
    for address, length in list(again.routes):
        again.delete(address, length)
    assert not wide[area()[0][0] : area()[0][1]].any()
    assert not wide[[0, -1]].any()


def test_ipv4_default_route_and_host_route(wide):
    deep = np.zeros(GROUPS * 256, np.uint32)
    fib = Fib4(wide, deep, Clock(), ())
    fib.set(0, 0, 1)
    fib.set(0xFFFFFFFF, 32, 2)
    assert [lookup4(wide, deep, a) for a in (0, 1 << 31, 0xFFFFFFFE, 0xFFFFFFFF)] == [1, 1, 1, 2]
    again = Fib4(wide, deep, Clock())
    assert again.routes == {(0, 0): 1, (0xFFFFFFFF, 32): 2}
    again.delete(0, 0)
    assert [lookup4(wide, deep, a) for a in (0, 0xFFFFFFFE, 0xFFFFFFFF)] == [0, 0, 2]
    again.delete(0xFFFFFFFF, 32)
    assert not wide.any()


def test_ipv4_words_have_the_declared_layout(wide):
    deep = np.zeros(GROUPS * 256, np.uint32)
    fib = Fib4(wide, deep, Clock(), ())
    fib.set(0x0A000000, 24, 77)
    assert int(wide[0x0A0000]) == 25 << 24 | 77
    fib.set(0x0A000080, 25, 78)
    word = int(wide[0x0A0000])
    assert word >> 31 == 1
    group = word & 0xFFFFFF
    assert int(deep[group * 256]) == 25 << 24 | 77
    assert (int(deep[group * 256 + 128]) >> DEPTH_SHIFT) & DEPTH_MASK == 26
    fib.delete(0x0A000080, 25)
    fib.delete(0x0A000000, 24)
    assert not wide.any()


def test_ipv4_groups_run_out_without_a_trace_and_rest_before_reuse(wide):
    clock = Clock()
    deep = np.zeros(2 * 256, np.uint32)
    fib = Fib4(wide, deep, clock, ())
    fib.set(0x0A000000, 25, 1)
    fib.set(0x0A000100, 25, 2)
    with pytest.raises(TableFull, match="limit 2"):
        fib.set(0x0A000200, 25, 3)
    assert (0x0A000200, 25) not in fib.routes
    assert lookup4(wide, deep, 0x0A000200) == 0
    fib.delete(0x0A000000, 25)
    with pytest.raises(TableFull):
        fib.set(0x0A000200, 25, 3)
    clock.now += 2
    fib.set(0x0A000200, 25, 3)
    assert [lookup4(wide, deep, a) for a in (0x0A000000, 0x0A000100, 0x0A000200)] == [0, 2, 3]
    fib.delete(0x0A000100, 25)
    fib.delete(0x0A000200, 25)
    assert not wide.any()


# --- IPv6 ---------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A table of 64 slots, so that runs meet, wrap around and fill up."""
    monkeypatch.setattr(fib6_module, "SLOTS_MASK", 63)


@kernel
def _slots(hi, lo, depth, mask, out):
    for i in range(len(out)):
        out[i] = route.slot6(hi[i], lo[i], depth[i], mask)


@pytest.mark.parametrize("mask", [route.FIB6_MASK, route.IPCACHE6_MASK])
def test_the_kernel_mixes_alike(mask):
    numbers = np.random.default_rng(1)
    hi = numbers.integers(0, 1 << 64, 500, np.uint64, endpoint=False)
    lo = numbers.integers(0, 1 << 64, 500, np.uint64, endpoint=False)
    hi[:3], lo[:3] = (1 << 64) - 1, (1 << 64) - 1
    depth = numbers.integers(1, 130, 500)
    out = np.zeros(500, np.int64)
    _slots(hi, lo, depth, mask, out)
    each = zip(hi.tolist(), lo.tolist(), depth.tolist(), strict=True)
    expected = [slot(*entry, int(mask)) for entry in each]
    assert out.tolist() == expected


@st.composite
def prefix6(draw):
    length = draw(st.sampled_from([0, 1, 48, 63, 64, 65, 127, 128]))
    hi = draw(st.sampled_from([0, 0xFD09 << 48, (0xFD09 << 48) | 1, (1 << 64) - 1]))
    lo = draw(st.sampled_from([0, 1, 2, 1 << 63, (1 << 64) - 1]))
    return (hi << 64 | lo) >> (128 - length) << (128 - length), length


STEPS6 = st.lists(
    st.tuples(st.sampled_from(["set", "delete", "wait"]), prefix6(), st.integers(1, 9)),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(steps=STEPS6)
def test_ipv6_matches_brute_force_and_reads_back(steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fib6_module, "SLOTS_MASK", 63)
        clock = Clock()
        entries, lengths = np.zeros(64, DTYPE["fib6_entry"]), np.zeros(4, np.uint64)
        fib, routes = Fib6(entries, lengths, clock), {}
        for what, (address, length), index in steps:
            if what == "wait":
                clock.now += 2
            elif what == "delete":
                assert fib.delete(address, length) == ((address, length) in routes)
                routes.pop((address, length), None)
            else:
                try:
                    fib.set(address, length, index)
                except TableFull:
                    continue
                routes[address, length] = index
        assert fib.routes == routes
        places = edges({p for _, p, _ in steps}, 128)
        expected = {address: brute(routes, address, 128) for address in places}
        assert {address: lookup6(entries, lengths, address) for address in places} == expected
        used = {length for _, length in routes}
        assert {n for n in range(256) if int(lengths[n // 64]) >> (n % 64) & 1} == used

        again = Fib6(entries, lengths, clock)
        assert again.routes == routes
        for address, length in list(routes):
            again.delete(address, length)
        assert not lengths.any()
        clock.now += 2
        again.set(0, 0, 1)
        again.delete(0, 0)
        clock.now += 2
        again.set(0, 0, 1)  # wakes the rest: nothing that is deleted stays for ever
        assert not (entries["depth"] == DELETED).any()


@pytest.mark.usefixtures("small")
def test_ipv6_full_without_a_trace_and_rest_before_reuse():
    clock = Clock()
    entries, lengths = np.zeros(64, DTYPE["fib6_entry"]), np.zeros(4, np.uint64)
    fib = Fib6(entries, lengths, clock)
    for number in range(64):
        fib.set(number, 128, number + 1)
    before = entries.copy()
    with pytest.raises(TableFull, match="64 routes in 64 slots"):
        fib.set(1 << 64, 64, 5)
    assert (entries == before).all()
    assert not int(lengths[1]) & 1
    fib.set(7, 128, 99)  # a route that is there can still change
    assert lookup6(entries, lengths, 7) == 99
    fib.delete(3, 128)
    with pytest.raises(TableFull):
        fib.set(1 << 64, 64, 5)
    clock.now += 2
    fib.set(1 << 64, 64, 5)
    assert lookup6(entries, lengths, (1 << 64) + 12345) == 5
    assert lookup6(entries, lengths, 3) == 0


def test_over_read_only_memory_a_fib_only_reads():
    entries, lengths = np.zeros(64, DTYPE["fib6_entry"]), np.zeros(4, np.uint64)
    lengths[2] = 1  # stale: no such route
    entries.flags.writeable = lengths.flags.writeable = False
    assert Fib6(entries, lengths).routes == {}
