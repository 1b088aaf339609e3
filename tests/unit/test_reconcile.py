"""The loop on a kernel in memory: it heals, it waits, and no refusal stops the rest."""

import asyncio
import json
import socket
import struct
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_network

import pytest

from dataplane.control import reconcile
from dataplane.control.kernel.events import Doorbell
from dataplane.control.kernel.netlink import KernelRefused
from dataplane.control.model import HOST, HOST_PEER, Neighbour
from dataplane.control.reconcile import Reconciler
from dataplane.tables.shm import Shm
from dataplane.tables.writer import TableWriter
from tests.fake_node import NEIGHBOUR_MAC, FakeKernel, config, no_engines, node, objects
from xdp.abi import value

SECONDS = 30


class Silence:
    """A doorbell that no kernel rings: this machine's own events are not the fake's."""

    def __init__(self, ring) -> None:
        self.known: dict = {}
        self.ends = socket.socketpair()

    def fileno(self) -> int:
        return self.ends[0].fileno()

    def read(self) -> None:
        raise AssertionError("nobody rings")

    def close(self) -> None:
        for end in self.ends:
            end.close()


class Node:
    """A reconciler with everything it meets in the test's hands."""

    def __init__(self, folder, monkeypatch) -> None:
        self.kernel, self.things, self.ends = FakeKernel(), objects(), []
        self.kernel.close = lambda: None
        self.away, self.syncs = False, 0
        self.ports_then: list[list[int]] = []  # that stood when policies were asked for
        self.engine_problems: list[str] = []
        monkeypatch.setattr(reconcile, "Kernel", lambda: self.kernel)
        monkeypatch.setattr(reconcile, "Doorbell", Silence)
        self.shm = Shm.create(folder)
        self.writer = TableWriter(self.shm)
        self.loop = Reconciler(
            config(), lambda: self.things, lambda: self.ends, self.writer, self.follow, self.engines
        )

    async def follow(self) -> None:
        if self.away:
            raise OSError("the forwarder is away")
        self.syncs += 1

    async def engines(self, objects, wanted) -> list[str]:
        self.ports_then.append(sorted(self.writer.ports()))
        return list(self.engine_problems)

    def kinds(self) -> dict[str, int]:
        rows = self.shm.adjacencies
        return {str(net): int(rows[row]["kind"]) for net, row in self.writer.routes().items()}

    @asynccontextmanager
    async def running(self):
        stop = asyncio.Event()
        task = asyncio.create_task(self.loop.run(stop))
        try:
            yield self.loop
        finally:
            stop.set()
            await task


@pytest.fixture
def there(tmp_path, monkeypatch):
    made = Node(tmp_path, monkeypatch)
    yield made
    made.shm.close()


def drive(main) -> None:
    async def limited():
        async with asyncio.timeout(SECONDS):
            await main()

    asyncio.run(limited())


def test_one_turn_does_everything_and_the_second_nothing(there):
    async def main():
        there.ends = [there.kernel.pod(1)]
        done = [str(action) for action in await there.loop.once()]
        assert done[0].startswith("make penstock0")
        assert await there.loop.once() == []
        assert await there.loop.plan_only() == []
        state = there.loop.status()
        assert (state["ready"], state["error"], state["problems"]) == (True, "", [])
        assert state["actions"][0]["action"] == done[0]
        assert there.syncs == 1
        there.loop.close()

    drive(main)
    assert there.kinds()["10.244.1.11/32"] == value("ADJACENCY_POD")
    ports = {port.name for port in there.writer.ports().values()}
    assert ports == {"eth0", HOST_PEER, "pst00000001"}
    steering = json.loads((there.shm.folder / "steering.json").read_text())
    assert steering == {
        "tunnel_port": 8472,
        "locals": ["192.0.2.1"],
        "prefixes": ["10.244.1.0/24", "fd00:244:0:1::/64"],
        "nat": ["192.0.2.1", "2001:db8::1"],
    }


def test_a_new_reconciler_writes_nothing_that_stands(there):
    def rows() -> tuple:
        shm = there.shm
        arrays = (shm.node, shm.ports, shm.adjacencies[:64], shm.rewrites[:64])
        return tuple(array.tobytes() for array in arrays), there.writer.routes()

    async def main():
        await there.loop.once()
        before = rows()
        again = Reconciler(
            config(), lambda: there.things, list, TableWriter(there.shm), there.follow, no_engines
        )
        await again.once()
        assert rows() == before
        assert there.syncs == 2, "it cannot know whether the forwarder followed"
        again.close()
        there.loop.close()

    drive(main)


def test_policies_come_before_the_ports_of_their_pods(there):
    async def main():
        there.ends = [there.kernel.pod(1)]
        there.engine_problems = ["policy shop/web: refused"]
        await there.loop.once()
        assert there.ports_then[0] == []
        assert there.writer.ports()
        assert "policy shop/web: refused" in there.loop.status()["problems"]
        there.loop.close()

    drive(main)


def test_what_is_missing_is_said_until_it_comes(there):
    async def main():
        things, there.things = there.things, objects(node(2))
        async with there.running() as loop:
            turn = await loop.turned(0)
            assert not loop.status()["ready"]
            assert "no Node 'node1'" in loop.status()["error"]
            there.things = things
            loop.trigger("objects")
            while not loop.status()["ready"]:
                turn = await loop.turned(turn)

    drive(main)
    assert HOST in there.kernel.links


def test_a_refused_route_stops_neither_the_rest_nor_the_retry(there):
    replace_route, refusals = there.kernel.replace_route, []

    def refuse(route):
        if str(route.network) == "10.244.2.0/24" and len(refusals) < 3:
            refusals.append(route)
            raise KernelRefused("route 10.244.2.0/24: ENETUNREACH")
        replace_route(route)

    there.kernel.replace_route = refuse

    async def main():
        await there.loop.once()
        state = there.loop.status()
        assert state["ready"]
        assert state["problems"] == ["route 10.244.2.0/24: ENETUNREACH"]
        assert there.kinds()["10.244.2.0/24"] == value("ADJACENCY_TUNNEL")
        async with there.running() as loop:
            turn = loop.turns
            while loop.status()["problems"]:
                turn = await loop.turned(turn)

    drive(main)
    assert len(refusals) == 3
    networks = {str(route.network) for route in there.kernel.routes}
    assert {"10.244.2.0/24", "fd00:244:0:2::/64"} <= networks


def test_whatever_fails_the_loop_lives(there):
    snapshot = there.kernel.snapshot
    failures = iter([RuntimeError("netlink is confused"), KernelRefused("no"), OSError("never")])

    def confused():
        for error in failures:
            raise error
        return snapshot()

    there.kernel.snapshot = confused

    async def main():
        async with there.running() as loop:
            turn = await loop.turned(0)
            assert loop.status()["error"] == "RuntimeError: netlink is confused"
            while not loop.status()["ready"]:
                turn = await loop.turned(turn)

    drive(main)


def test_settled_waits_for_the_forwarder_and_says_why_not(there):
    async def main():
        there.away = True
        async with there.running() as loop:
            await loop.turned(0)
            there.ends = [there.kernel.pod(1)]
            with pytest.raises(TimeoutError, match="the forwarder is away"):
                await loop.settled(1, 0.5)
            there.away = False
            await loop.settled(1, SECONDS)
            with pytest.raises(TimeoutError, match="endpoint 7"):
                await loop.settled(7, 0.2)

    drive(main)
    assert there.syncs >= 1


def test_settled_is_not_deceived_by_a_number_that_is_used_again(there):
    async def main():
        there.ends = [there.kernel.pod(1)]
        await there.loop.once()
        await there.loop.settled(1, SECONDS)
        there.ends = [there.kernel.pod(1)]  # another veth, the same number
        with pytest.raises(TimeoutError):
            await there.loop.settled(1, 0.05)
        await there.loop.once()
        await there.loop.settled(1, SECONDS)
        there.loop.close()

    drive(main)


def test_neighbours_that_do_not_answer_are_asked_again_without_turns(there, monkeypatch):
    monkeypatch.setattr(reconcile, "NUDGE_S", 0.01)
    there.kernel.neighbours.clear()
    remote = (2, ip_address("192.0.2.2"))

    async def main():
        async with there.running() as loop:
            turns = await loop.turned(0)
            while there.kernel.provoked.count(remote) < 5:
                await asyncio.sleep(0.01)
            assert loop.turns == turns
            assert there.kinds()["10.244.2.0/24"] == value("ADJACENCY_UNRESOLVED")
            there.kernel.known("192.0.2.2")
            loop.trigger("the doorbell")
            await loop.turned(turns)
            assert there.kinds()["10.244.2.0/24"] == value("ADJACENCY_TUNNEL")

    drive(main)


def test_a_full_table_is_an_error_and_pods_already_there_stay(there):
    async def main():
        there.ends = [there.kernel.pod(1)]
        await there.loop.once()
        routes = there.kinds()
        there.ends.append(there.kernel.pod(2))

        def full(*_):
            raise reconcile.TableError("the adjacency table is full: limit 16383")

        intern = there.writer.replace_routes
        there.writer.replace_routes = full
        await there.loop.once()
        assert "limit 16383" in there.loop.status()["error"]
        assert there.kinds() == routes
        there.writer.replace_routes = intern
        await there.loop.once()
        assert there.loop.status()["ready"]
        assert "10.244.1.12/32" in there.kinds()
        there.loop.close()

    drive(main)


def _message(kind: int, address: str, state: int, mac: bytes = b"") -> bytes:
    packed = ip_address(address).packed
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    body = struct.pack("=BxxxiHBB", family, 2, state, 0, 1)
    body += struct.pack("=HH", 4 + len(packed), 1) + packed
    if mac:
        body += struct.pack("=HH", 4 + len(mac), 2) + mac + bytes(2)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


@pytest.mark.parametrize(
    ("data", "rings"),
    [
        (_message(28, "192.0.2.2", 0x04, NEIGHBOUR_MAC), False),  # STALE, the same MAC
        (_message(28, "192.0.2.2", 0x10, NEIGHBOUR_MAC), False),  # PROBE
        (_message(28, "192.0.2.2", 0x02, b"\x0e" + bytes(4) + b"\x01"), True),  # another MAC
        (_message(28, "192.0.2.2", 0x20), True),  # FAILED, was usable
        (_message(29, "192.0.2.2", 0x04, NEIGHBOUR_MAC), True),  # deleted
        (_message(28, "192.0.2.9", 0x01), False),  # INCOMPLETE, unknown
        (_message(28, "192.0.2.9", 0x20), False),  # FAILED, unknown
        (_message(28, "192.0.2.9", 0x02, NEIGHBOUR_MAC), True),  # a new one
        (_message(28, "2001:db8::9", 0x02, NEIGHBOUR_MAC), True),
        (_message(28, "192.0.2.9", 0x40, b"\xff" * 6), False),  # NOARP broadcast
        (_message(28, "192.0.2.9", 0x01) + _message(24, "0.0.0.0", 0), True),  # and a route
        (struct.pack("=IHHII", 16, 16, 0, 0, 0), True),  # a link
        (struct.pack("=IHHII", 3, 28, 0, 0, 0), False),
        (struct.pack("=IHHII", 20, 28, 0, 0, 0) + bytes(4), False),
        (b"\0" * 7, False),
    ],
)
def test_only_messages_that_matter_ring(data, rings):
    doorbell = Doorbell(lambda: None)
    known = Neighbour(2, ip_address("192.0.2.2"), NEIGHBOUR_MAC, 0x02)
    doorbell.known = {(2, known.address): known}
    assert doorbell.matters(data) is rings
    doorbell.close()


def test_a_node_leaves(there):
    async def main():
        await there.loop.once()
        there.things = objects(node(1))
        await there.loop.once()
        there.loop.close()

    drive(main)
    assert ip_network("10.244.2.0/24") not in {route.network for route in there.kernel.routes}
    assert "10.244.2.0/24" not in there.kinds()
    assert "192.0.2.2/32" in there.kinds(), "it is still a neighbour on the underlay"
