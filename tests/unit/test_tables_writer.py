"""The writer: differences only, restarts, full tables, kill -9."""

import multiprocessing
import os
import signal
import tempfile
import time
from ipaddress import IPv4Network, ip_address, ip_network
from pathlib import Path

import numpy as np
import pytest

from dataplane.tables import view
from dataplane.tables.errors import TableError, TableFull
from dataplane.tables.model import Adjacency, Port
from dataplane.tables.shm import ARRAYS, Shm
from dataplane.tables.writer import TableWriter
from xdp.abi import CONST, value

POD = value("ADJACENCY_POD")
TABLES = ("node", "ports", "adjacencies", "rewrites", "fib6_lengths")
DEADLINE_S = 60


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def shm():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, Shm.create(Path(folder)) as shm:
        yield shm


@pytest.fixture
def clock():
    return Clock()


def pod(number: int) -> Adjacency:
    mac = number.to_bytes(6, "big")
    return Adjacency(POD, number % 1000, 1500, bytes(6), mac)


def networks(*texts: str) -> dict:
    return {ip_network(text): pod(number) for number, text in enumerate(texts, 1)}


def image(shm: Shm) -> dict[str, bytes]:
    """All that stands in the tables."""
    found = {name: getattr(shm, name).tobytes() for name in TABLES}
    for name in ("fib4_wide", "fib4_deep", "fib6"):
        array = getattr(shm, name)
        for first, end in shm.extents(name):
            if array[first:end].tobytes().strip(b"\0"):
                found[f"{name}{first}"] = array[first:end].tobytes()
    return found


PORT = Port(
    value("PORT_POD"), "pst1", 7, 65000, 2, b"\2\0\0\0\0\1", b"\2\0\0\0\0\2",
    ip_address("10.9.0.2"), ip_address("fd09::2"), 5,
)  # fmt: skip
ROUTES = networks("0.0.0.0/0", "10.0.0.0/8", "10.9.0.2/32", "10.9.0.3/32", "::/0", "fd09::2/128")


def test_an_empty_table_takes_no_memory(shm):
    TableWriter(shm).routes()
    with Shm.open(shm.folder.parent) as reader:
        TableWriter(reader).routes()
    assert sum(path.stat().st_blocks for path in shm.folder.iterdir()) * 512 < 4 << 20


def test_node_members_are_checked_before_any_is_written(shm):
    writer = TableWriter(shm)
    assert writer.set_node(vni=5, gateway_mac=b"\2\0\0\0\0\1")
    assert not writer.set_node(vni=5)
    for wrong in ({"vni": 1 << 32}, {"colour": 1}, {"gateway_mac": b"123"}, {"vni": "x"}):
        with pytest.raises(TableError, match=next(iter(wrong))):
            writer.set_node(workers=9, **wrong)
    assert int(shm.node[0]["workers"]) == 0
    assert int(shm.node[0]["vni"]) == 5


def test_ports_are_read_back_and_cleared(shm):
    writer = TableWriter(shm)
    assert writer.set_port(3, PORT)
    assert not writer.set_port(3, PORT)
    assert writer.ports() == {3: PORT}
    assert int(shm.ports[3]["state"]) == value("PORT_ACTIVE")
    assert TableWriter(shm).ports() == {3: PORT}
    assert writer.clear_port(3)
    assert not writer.clear_port(3)
    assert writer.ports() == {}
    with pytest.raises(TableError, match="1024"):
        writer.set_port(CONST["PORTS_MAX"], PORT)


def test_generations_move_with_changes(shm):
    def generations() -> tuple[int, int]:
        row = shm.control[0]
        return int(row["generation"]), int(row["ports_generation"])

    writer = TableWriter(shm)
    writer.publish()
    start = generations()
    assert not writer.publish()
    assert generations() == start
    writer.set_route(ip_network("10.0.0.0/8"), pod(1))
    assert writer.publish()
    assert generations() == (start[0] + 1, start[1])
    writer.set_port(1, PORT)
    writer.publish()
    assert generations() == (start[0] + 2, start[1] + 1)
    TableWriter(shm).publish()  # the one before may have died just before its publish
    assert generations() == (start[0] + 3, start[1] + 2)


def test_replacing_returns_what_changed(shm):
    writer = TableWriter(shm)
    assert len(writer.replace_routes(ROUTES)) == len(ROUTES)
    assert writer.replace_routes(ROUTES) == []
    fewer = {network: hop for network, hop in ROUTES.items() if network.prefixlen != 8}
    fewer[ip_network("10.9.0.2/32")] = pod(77)
    changes = writer.replace_routes(fewer)
    assert changes == ["route 10.9.0.2/32", "no route 10.0.0.0/8"]
    assert writer.routes().keys() == fewer.keys()


def test_a_restart_writes_nothing_and_keeps_rows(shm):
    first = TableWriter(shm)
    first.set_port(3, PORT)
    first.replace_routes(ROUTES)
    before, rows = image(shm), first.routes()
    again = TableWriter(shm)
    assert again.routes() == rows
    again.set_port(3, PORT)
    assert again.replace_routes(ROUTES) == []
    assert image(shm) == before


def test_equal_next_hops_share_a_row_a_family(shm):
    writer = TableWriter(shm)
    hop = pod(5)
    for text in ("10.0.0.1/32", "10.0.0.2/32", "fd00::1/128", "fd00::2/128"):
        writer.set_route(ip_network(text), hop)
    assert len(set(writer.routes().values())) == 2  # the EtherType differs


def test_a_freed_row_rests_before_it_is_used_again(shm, clock):
    writer = TableWriter(shm, clock)
    writer.replace_routes(networks("10.0.0.1/32"))
    row = next(iter(writer.routes().values()))
    writer._adjacencies._free.clear()
    writer.replace_routes({})
    with pytest.raises(TableFull, match="1 resting"):
        writer.replace_routes({ip_network("10.0.0.1/32"): pod(9)})
    clock.now += 2
    writer.replace_routes({ip_network("10.0.0.1/32"): pod(9)})
    assert next(iter(writer.routes().values())) == row


def test_a_full_adjacency_table_changes_no_route(shm, clock):
    writer = TableWriter(shm, clock)
    writer.replace_routes(ROUTES)
    rows = writer.routes()
    del writer._adjacencies._free[2:]
    many = {ip_network(f"10.1.0.{n}/32"): pod(100 + n) for n in range(5)}
    with pytest.raises(TableFull, match=r"16383 \(ADJACENCIES_MAX\)"):
        writer.replace_routes(many)
    assert writer.routes() == rows
    assert writer.replace_routes(ROUTES) == []
    clock.now += 2  # what was interned in vain is free again
    assert len(writer.replace_routes({**ROUTES, ip_network("10.1.0.1/32"): pod(101)})) == 1


def test_full_groups_undo_a_replacement(shm):
    writer = TableWriter(shm)
    writer.replace_routes(ROUTES)
    before = image(shm)
    writer._fib4._next = CONST["FIB4_GROUPS"] - 1  # one is left
    changed = {**ROUTES, ip_network("0.0.0.0/0"): pod(50), ip_network("10.2.0.0/16"): pod(51)}
    changed |= {ip_network(f"10.1.{n}.1/32"): pod(52) for n in range(3)}
    rows = writer.routes()
    with pytest.raises(TableFull, match="FIB4_GROUPS"):
        writer.replace_routes(changed)
    assert writer.routes() == rows
    after = image(shm)
    wide = {name: data for name, data in before.items() if name.startswith("fib4_wide")}
    assert {name: after[name] for name in wide} == wide
    assert not (shm.folder / "changing").exists()


def test_what_a_killed_writer_left_is_repaired(shm):
    TableWriter(shm).replace_routes(ROUTES)
    before = image(shm)
    shm.fib4_wide[0x0B0000:0x0C0000] = 0  # halfway through the deletion of the default route
    (shm.folder / "changing").touch()
    with Shm.open(shm.folder.parent) as reader:
        TableWriter(reader)
        assert (shm.folder / "changing").exists()
    TableWriter(shm)
    assert image(shm) == before
    assert not (shm.folder / "changing").exists()


def _flap(run_dir: Path) -> None:
    writer = TableWriter(Shm.create(run_dir))
    turn = 0
    while True:
        turn += 1
        wide = {IPv4Network((n << 24, 8)): pod(turn % 7 + n) for n in range(1, 40)}
        deep = {IPv4Network((10 << 24 | n << 8 | turn % 200, 32)): pod(n) for n in range(60)}
        six = {ip_network(f"fd00::{turn % 50 + n:x}/128"): pod(n) for n in range(60)}
        writer.replace_routes(wide | deep | six if turn % 3 else six)
        writer.publish()


def test_kill_in_the_middle_of_a_replacement():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        run_dir = Path(folder)
        for rounds in (1, 3, 6):
            with Shm.create(run_dir) as shm:
                start = int(shm.control[0]["generation"])
                child = multiprocessing.get_context("spawn").Process(target=_flap, args=(run_dir,))
                child.start()
                deadline = time.monotonic() + DEADLINE_S
                while int(shm.control[0]["generation"]) < start + rounds:
                    assert child.is_alive(), "the child failed"
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                os.kill(child.pid, signal.SIGKILL)
                child.join(DEADLINE_S)
                writer = TableWriter(shm)
                writer.replace_routes(ROUTES)
                assert_stands_like_fresh(shm)
                writer.replace_routes({})
                assert not shm.fib4_wide.any()
                assert not shm.fib6_lengths.any()


def assert_stands_like_fresh(shm: Shm) -> None:
    """ROUTES stand in shm as they would in a table that was never anything else."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as clean, Shm.create(Path(clean)) as fresh:
        TableWriter(fresh).replace_routes(ROUTES)
        for address in (0, 1, 10 << 24, 0x0A090002, 0x0A090003, 0x0B000000, 2**31):
            assert hop(shm, address) == hop(fresh, address)
        assert wide_hops(shm) == wide_hops(fresh)


def hop(shm: Shm, address: int) -> bytes:
    """The template that an address leads to."""
    word = int(shm.fib4_wide[address >> 8])
    if word >> 31:
        word = int(shm.fib4_deep[(word & 0xFFFFFF) * 256 + (address & 255)])
    return shm.rewrites[word & 0xFFFFFF].tobytes()


def wide_hops(shm: Shm) -> list[tuple[int, bytes]]:
    """Where the next hop changes along the /24s, and to what."""
    words = shm.fib4_wide
    changes = np.flatnonzero(np.diff(words)) + 1
    return [(int(at), hop(shm, int(at) << 8)) for at in [0, *changes.tolist()]]


def test_a_million_routes_in_bulk(shm):
    numbers = np.random.default_rng(7)
    hops = [pod(number) for number in range(64)]
    lengths = numbers.choice([16, 18, 20, 22, 24, 24, 24, 24], 300_000)
    four = numbers.integers(1 << 24, 0xE0000000, 300_000)
    routes: dict = {
        IPv4Network((a >> (32 - n) << (32 - n), n)): hops[a % 64]
        for a, n in zip(four.tolist(), lengths.tolist(), strict=True)
    }
    writer = TableWriter(shm)
    writer.replace_routes(routes)
    for number in range(700_000):
        writer._fib6.set(0x20010DB8 << 96 | number << 64, 64, number % 64 + 1)
    keys = writer._fib4.routes
    assert len(keys) == len(routes)
    for address in numbers.choice(four, 300).tolist():
        found = max(n for n in range(16, 25) if (address >> (32 - n) << (32 - n), n) in keys)
        index = keys[address >> (32 - found) << (32 - found), found]
        assert int(shm.fib4_wide[address >> 8]) == (found + 1) << 24 | index
    again = TableWriter(shm)
    assert again._fib6.routes == writer._fib6.routes
    assert again._fib4.routes.items() <= keys.items()


def test_views_are_plain_data(shm):
    writer = TableWriter(shm)
    writer.set_node(workers=2)
    writer.set_port(3, PORT)
    shm.port_counters[0, 3]["rx_packets"] = 4
    shm.port_counters[1, 3]["rx_packets"] = 5
    shm.reasons[0, 1, value("REASON_FORWARDED")] = (9, 900)
    shm.reasons[1, 0, value("REASON_TTL_EXCEEDED")] = (2, 200)
    shm.worker_stats[0]["packets"] = 9
    flow = shm.flow_records[1, 0]
    for name, number in (("source_lo", 0x0A090002), ("target_lo", 0x0A090003), ("family", 4),
                         ("protocol", 6), ("port", 3), ("packets", 8),
                         ("kind", value("EVENT_DROP"))):  # fmt: skip
        flow[name] = number
    shm.event_rings[1]["head"] = 1
    with Shm.open(shm.folder.parent) as reader:
        port = view.ports(reader)[0]
        assert (port["name"], port["rx_packets"], port["ipv4"]) == ("pst1", 9, "10.9.0.2")
        rows = view.counters(reader)
        assert [(row["direction"], row["text"], row["packets"], row["drop"]) for row in rows] == [
            ("egress", "Forwarded", 9, False),
            ("ingress", "TTL exceeded", 2, True),
        ]
        assert [row["packets"] for row in view.workers(reader)] == [9, 0]
        found = view.flows(reader)[0]
        assert (found["source"], found["destination"]) == ("10.9.0.2", "10.9.0.3")
        assert (found["protocol"], found["ingress"]) == ("tcp", "pst1")
        flow["protocol"], flow["target_port"] = 58, 143 << 8 | 1
        assert view.flows(reader)[0]["destination_port"] == 143, "ICMP: the type"


def test_every_array_is_named_in_the_class():
    assert set(ARRAYS) == set(Shm.__annotations__)
