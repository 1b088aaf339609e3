"""The server over a fake kernel: roll-back, order of operations, recovery, remembered DELs."""

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from dataplane.cni import conflist, wire
from dataplane.cni.backend import Backend
from dataplane.cni.check import Link, Pod, differences
from dataplane.cni.deletes import INTERRUPTED_S, Deletes
from dataplane.cni.endpoints import Endpoints
from dataplane.cni.errors import CniError, Code
from dataplane.cni.model import host_name
from dataplane.cni.result import build
from dataplane.cni.server import CniServer
from ipam.service import Ipam
from tests.cni_agent import NODE
from tests.unit.test_cni_protocol import add_request, attachment

C1 = host_name("c1", "eth0")


class Kernel:
    """Host ends by name; fails or waits when told to."""

    def __init__(self) -> None:
        self.ends: dict[str, int] = {}
        self.failure: CniError | None = None
        self.running = 0
        self.most = 0

    def attach(self, attachment) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(0.005)  # long enough for others to overlap, where they may
        self.running -= 1
        if self.failure:
            raise self.failure
        self.ends[attachment.host_ifname] = len(self.ends) + 2
        return self.ends[attachment.host_ifname]

    def detach(self, name: str) -> bool:
        return self.ends.pop(name, None) is not None

    def host_ends(self) -> dict[str, int]:
        return dict(self.ends)


class World:
    """A server with a fake kernel and forwarder, and real records and leases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernel = Kernel()
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0
        self.node = NODE
        self.ipam = Ipam.open(folder / "ipam.db")
        self.ipam.set_node_pools({cidr.version: cidr for cidr in NODE.local_cidrs})
        self.restart()

    def restart(self) -> None:
        self.endpoints = Endpoints(self.folder)
        deletes = Deletes(self.folder / "deletes")
        arguments = (self.ipam, self.endpoints, lambda: self.node, self.ready, 2, deletes)
        self.backend = Backend(*arguments)
        self.server = CniServer(self.folder / "cni.sock", self.backend)

    async def ready(self, endpoint) -> None:
        self.waiting += 1
        await self.gate.wait()

    async def ask(self, data: bytes) -> tuple[int, dict | None]:
        answer = await self.server.answer(data)
        head, _, body = answer.partition(b"\n")
        status, length = head.split()
        assert int(length) == len(body)
        return int(status), json.loads(body) if body else None

    def remember(self, container: str = "c1") -> None:
        (self.folder / "deletes").mkdir(exist_ok=True)
        data = add_request(COMMAND="DEL", CONTAINERID=container)
        (self.folder / f"deletes/{container}@eth0").write_bytes(data)

    def is_clean(self) -> bool:
        return not self.kernel.ends and not len(self.endpoints) and not self.ipam.leases()


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = World(tmp_path)
    for name in ("attach", "detach", "host_ends"):
        monkeypatch.setattr(wire, name, lambda *a, name=name: getattr(made.kernel, name)(*a))
    yield made
    made.ipam.close()


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def test_an_add_and_its_delete(world):
    async def body():
        status, result = await world.ask(add_request(ARGS="K8S_POD_NAME=web;K8S_POD_UID=u1"))
        assert status == 0, result
        [endpoint] = world.endpoints
        assert (endpoint.pod_name, endpoint.pod_uid) == ("web", "u1")
        assert world.ipam.leases()[0].owner["name"] == "web"
        assert [ip["address"] for ip in result["ips"]] == [
            f"{endpoint.address4}/32",
            f"{endpoint.address6}/128",
        ]
        for _ in range(2):
            assert await world.ask(add_request(COMMAND="DEL")) == (0, None)
        assert world.is_clean()

    asyncio.run(body())


def test_a_kernel_that_refuses_leaves_nothing(world):
    world.kernel.failure = CniError(Code.KERNEL_REFUSED, "no")
    status, error = asyncio.run(world.ask(add_request()))
    assert (status, error["code"], error["msg"]) == (1, 101, "no")
    assert world.is_clean()


def test_a_refused_repetition_keeps_what_stands(world):
    async def body():
        await world.ask(add_request())
        world.kernel.failure = CniError(Code.INTERFACE_EXISTS, "eth0")
        assert (await world.ask(add_request()))[1]["code"] == 100
        assert list(world.kernel.ends) == [C1]
        assert len(world.endpoints) == len(world.ipam.leases()) == 1

    asyncio.run(body())


def test_a_forwarder_that_does_not_come_is_try_again(world, monkeypatch):
    monkeypatch.setattr("dataplane.cni.backend.READY_S", 0.02)
    world.gate.clear()
    status, error = asyncio.run(world.ask(add_request()))
    assert (status, error["code"]) == (1, 11)
    assert C1 in error["msg"]
    assert world.is_clean()


def test_an_unexpected_failure_is_answered_and_undone(world, monkeypatch):
    def broken(endpoint):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(world.endpoints, "save", broken)
    status, error = asyncio.run(world.ask(add_request()))
    assert (status, error["code"]) == (1, 104)
    assert "disk on fire" in error["msg"]
    assert world.is_clean()


@pytest.mark.parametrize("moment", ["in the kernel", "at the forwarder"])
def test_an_agent_that_stops_undoes_what_it_was_doing(world, moment):
    async def body():
        world.gate.clear()
        task = asyncio.create_task(world.ask(add_request()))
        if moment == "in the kernel":
            await until(lambda: world.kernel.most)
        else:
            await until(lambda: world.waiting)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert world.is_clean()

    asyncio.run(body())


def test_containers_are_attached_side_by_side_but_one_of_them_in_turn(world):
    async def body():
        world.gate.clear()
        adds = [asyncio.create_task(world.ask(add_request(CONTAINERID=f"c{n}"))) for n in range(3)]
        await until(lambda: world.waiting == 3)
        delete = asyncio.create_task(world.ask(add_request(COMMAND="DEL", CONTAINERID="c0")))
        everything = {"cni.dev/valid-attachments": []}
        collect = asyncio.create_task(world.ask(add_request(COMMAND="GC", **everything)))
        late = asyncio.create_task(world.ask(add_request(CONTAINERID="c9")))
        await asyncio.sleep(0)
        assert not delete.done()
        assert len(world.endpoints) == 3
        world.gate.set()
        assert all(status == 0 for status, _ in await asyncio.gather(*adds, delete, collect, late))
        # The DEL and the GC came after the ADDs before them, the late ADD after the GC.
        assert [endpoint.container_id for endpoint in world.endpoints] == ["c9"]

    asyncio.run(body())


def test_gc_goes_on_after_a_failure_and_reports_it(world, monkeypatch):
    async def body():
        for container in ("c1", "c2"):
            await world.ask(add_request(CONTAINERID=container))

        def stubborn(name):
            if name == C1:
                raise CniError(Code.KERNEL_REFUSED, "busy")
            return world.kernel.detach(name)

        monkeypatch.setattr(wire, "detach", stubborn)
        everything = {"cni.dev/valid-attachments": []}
        status, error = await world.ask(add_request(COMMAND="GC", **everything))
        assert status == 1
        assert "c1/eth0: busy" in error["details"]
        assert list(world.kernel.ends) == [C1]

    asyncio.run(body())


def test_gc_leaves_other_networks_alone(world):
    async def body():
        await world.ask(add_request())
        await world.ask(add_request(name="other", CONTAINERID="c2"))
        await world.ask(add_request(COMMAND="GC", **{"cni.dev/valid-attachments": []}))
        assert [endpoint.network for endpoint in world.endpoints] == ["other"]

    asyncio.run(body())


def test_recovery_removes_halves_and_keeps_the_rest(world):
    async def body():
        for container in ("c1", "c2", "c3"):
            await world.ask(add_request(CONTAINERID=container))
        world.kernel.ends["pst0000beef"] = 99  # a pair without record
        world.ipam.allocate("penstock", "c7", "eth0")  # a lease without record
        del world.kernel.ends[host_name("c2", "eth0")]  # a record without pair
        damaged = world.folder / "endpoints" / f"{host_name('c3', 'eth0')}.json"
        damaged.write_text("{")  # a running pod whose record cannot be read
        world.restart()
        removed = await world.backend.recover()
        assert removed == ["pst0000beef", "penstock/c2/eth0", "penstock/c7/eth0"]
        assert set(world.kernel.ends) == {C1, host_name("c3", "eth0")}
        assert {lease.key[1] for lease in world.ipam.leases()} == {"c1", "c3"}
        await world.ask(add_request(COMMAND="DEL", CONTAINERID="c3"))
        assert not damaged.exists()
        assert not world.endpoints.broken

    asyncio.run(body())


def test_remembered_deletes_are_done_at_the_start(world):
    async def body():
        await world.ask(add_request())
        world.remember()
        world.remember("never-seen")
        (world.folder / "deletes/garbage").write_bytes(b"\xff")
        (world.folder / "deletes/an-add").write_bytes(add_request())
        old, fresh = world.folder / "deletes/.1.1", world.folder / "deletes/.2.2"
        old.touch()
        fresh.touch()
        past = time.time() - 2 * INTERRUPTED_S
        os.utime(old, (past, past))
        await world.server.start()
        assert world.is_clean()
        assert os.listdir(world.folder / "deletes") == [".2.2"]
        await world.server.stop()

    asyncio.run(body())


def test_a_remembered_delete_that_fails_is_kept(world, monkeypatch):
    async def body():
        await world.ask(add_request())
        world.remember()

        def stubborn(name):
            raise CniError(Code.KERNEL_REFUSED, "busy")

        monkeypatch.setattr(wire, "detach", stubborn)
        await world.server.start()
        assert os.listdir(world.folder / "deletes") == ["c1@eth0"]
        await world.server.stop()

    asyncio.run(body())


def test_the_socket_is_roots_and_survives_any_client(world):
    async def exchange(data: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(world.server.path)
        writer.write(data)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer

    async def body():
        world.server.path.touch()  # what a killed agent leaves
        await world.server.start()
        assert world.server.path.stat().st_mode & 0o777 == 0o600
        assert (await exchange(add_request(COMMAND="STATUS"))) == b"0 0\n"
        assert b'"code": 5' in await exchange(b"")
        assert b'"code": 6' in await exchange(b"CNI_COMMAND=ADD\0\0nonsense")
        _, writer = await asyncio.open_unix_connection(world.server.path)
        writer.write(b"CNI_")
        writer.transport.abort()
        assert b'"supportedVersions"' in await exchange(add_request(COMMAND="VERSION"))
        await world.server.stop()
        assert not world.server.path.exists()

    asyncio.run(body())


def test_check_of_an_unknown_container_says_what_is_missing(world):
    data = add_request(COMMAND="CHECK", prevResult={"ips": []})
    status, error = asyncio.run(world.ask(data))
    assert (status, error["code"]) == (1, 103)
    assert "c1" in error["msg"]


# --- CHECK's comparison -------------------------------------------------------------------------


def standing() -> tuple[dict, Link, Pod]:
    """prevResult and the kernel right after an ADD."""
    made = attachment()
    previous = build("1.1.0", made)
    host = Link(made.host_mac, made.mtu, True)
    pod = Pod(
        Link(made.mac, made.mtu, True),
        frozenset(ip["address"] for ip in previous["ips"]),
        {(r["dst"], r.get("gw", "")): r.get("mtu", 0) for r in previous["routes"]},
        {str(router): made.router_mac for router in made.routers},
        False,
    )
    return previous, host, pod


def test_check_is_content_with_what_add_made():
    assert differences(attachment(), *standing()) == []


def test_check_allows_what_a_later_plugin_changed_and_said():
    previous, host, pod = standing()
    previous["interfaces"][1] |= {"mac": "02:AA:00:00:00:01", "mtu": 1400}
    previous["interfaces"].append({"name": "later0"})
    previous["routes"].append({"dst": "198.51.100.0/24", "gw": "192.0.2.9"})
    changed = Pod(
        Link("02:aa:00:00:00:01", 1400, True), pod.addresses, pod.routes, pod.neighbours, False
    )
    assert differences(attachment(), previous, host, changed) == []


def test_check_finds_a_missing_end():
    previous, host, pod = standing()
    assert "node" in differences(attachment(), previous, None, pod)[0]
    assert "eth0" in differences(attachment(), previous, host, None)[0]


def test_check_finds_a_previous_result_that_is_not_ours():
    _, host, pod = standing()
    found = differences(attachment(), {}, host, pod)
    assert any("prevResult does not have the interface" in text for text in found)
    assert any("10.1.0.7/32" in text for text in found)


# --- the conflist -------------------------------------------------------------------------------


def test_the_conflist_is_written_once_and_removed(tmp_path):
    folder, socket = tmp_path / "net.d", tmp_path / "cni.sock"
    assert conflist.write(folder, socket, tmp_path)
    before = (folder / conflist.FILE).stat().st_ino
    assert not conflist.write(folder, socket, tmp_path)
    assert (folder / conflist.FILE).stat().st_ino == before
    assert conflist.write(folder, tmp_path / "other.sock", tmp_path)
    assert os.listdir(folder) == [conflist.FILE]
    told = json.loads((folder / conflist.FILE).read_text())
    assert told["plugins"][0]["socket"] == str(tmp_path / "other.sock")
    assert told["plugins"][0]["capabilities"] == {"portMappings": True}
    assert conflist.remove(folder)
    assert not conflist.remove(folder)


def test_a_conflist_that_cannot_be_written_leaves_no_half(tmp_path, monkeypatch):
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        conflist.write(tmp_path, tmp_path / "s", tmp_path)
    assert os.listdir(tmp_path) == []
