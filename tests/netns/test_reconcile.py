"""The reconciler against a real kernel: it makes, heals, follows, and leaves nothing behind."""

import asyncio
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_network
from types import SimpleNamespace

import pytest

from bench.lab import Lab
from dataplane.control import reconcile
from dataplane.control.config import Config
from dataplane.control.kernel import events
from dataplane.control.kernel.netlink import RESERVED, Kernel
from dataplane.control.model import HOST, HOST_MTU, HOST_PEER, EndpointView
from dataplane.control.reconcile import Reconciler
from dataplane.daemon.teardown import cleanup
from dataplane.objects.collect import Objects
from dataplane.objects.core import Node
from dataplane.tables.shm import Shm
from dataplane.tables.writer import TableWriter
from tests.fake_node import no_engines
from xdp.abi import value

pytestmark = [pytest.mark.root, pytest.mark.net]

SECONDS = 40
TUNNEL, UNRESOLVED = value("ADJACENCY_TUNNEL"), value("ADJACENCY_UNRESOLVED")
FAR = "10.244.2.0/24"
SERVICES = {"10.96.0.0/12", "fd00:96::/108", "169.254.42.1", "fd00:42::1"}


def node(number: int) -> Node:
    return Node(
        f"node{number}",
        (ip_address(f"192.0.2.{number}"), ip_address(f"2001:db8::{number}")),
        (ip_network(f"10.244.{number}.0/24"), ip_network(f"fd00:244:0:{number}::/64")),
    )


class Under:
    """A reconciler in namespace `one`, joined to the plain namespace `two`."""

    def __init__(self, lab: Lab, **network) -> None:
        self.one, self.two = lab.namespace("one"), lab.namespace("two")
        lab.pair(self.one, self.two)
        self.lab, self.ends = lab, []
        self.config = Config.model_validate(
            {
                "node": {
                    "name": "node1",
                    "run_dir": lab.folder / "run",
                    "state_dir": lab.folder / "state",
                    "cni": {"conf_dir": lab.folder / "net.d"},
                },
                "network": network,
            }
        )
        self.nodes = {1: node(1), 2: node(2)}
        self.shm = Shm.create(self.config.run_dir)
        self.writer = TableWriter(self.shm)

    @property
    def objects(self) -> Objects:
        return Objects({one.name: one for one in self.nodes.values()})

    @asynccontextmanager
    async def running(self):
        async def follow() -> None:
            """The forwarder of this test follows at once."""

        loop = Reconciler(
            self.config, lambda: self.objects, lambda: self.ends, self.writer, follow, no_engines
        )
        stop = asyncio.Event()
        task = asyncio.create_task(loop.run(stop))
        self.loop = loop
        try:
            await self.until(lambda: loop.status()["ready"], "ready")
            yield loop
        finally:
            stop.set()
            await task

    async def until(self, check: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not check():
            assert time.monotonic() < deadline, f"not {what}: {self.loop.status()}"
            await asyncio.sleep(0.02)

    async def at_rest(self) -> None:
        """Until a plan is empty."""
        deadline = time.monotonic() + SECONDS
        while plan := await self.loop.plan_only():
            assert time.monotonic() < deadline, [str(action) for action in plan]
            await asyncio.sleep(0.02)

    def row(self, network: str):
        """(kind, destination MAC) of a route of the tables."""
        index = self.writer.routes().get(ip_network(network))
        if index is None:
            return None
        return int(self.shm.adjacencies[index]["kind"]), self.shm.rewrites[index][:6].tobytes()

    def mac(self, namespace, device: str = "eth0") -> bytes:
        return bytes.fromhex(namespace.link(device)["address"].replace(":", ""))

    def node_side(self) -> dict:
        """What `ip` says of penstock0 and our routes."""
        one = self.one
        routes = [*one.show("route", "show", "proto", "80")]
        routes += one.show("-6", "route", "show", "proto", "80")
        found = one.show("addr", "show", "dev", HOST)[0]["addr_info"]
        return {
            "addresses": {f"{entry['local']}/{entry['prefixlen']}" for entry in found},
            "routes": {entry["dst"]: entry for entry in routes},
            "neighbours": {
                entry["dst"]: entry["lladdr"] for entry in one.show("neigh", "show", "nud", "perm")
            },
        }


@pytest.fixture
def under(request):
    with Lab() as lab:
        made = Under(lab, **getattr(request, "param", {}))
        with made.one.inside():
            yield made
        made.shm.close()


def drive(main) -> None:
    asyncio.run(main())


def test_the_pair_appears_and_the_end_leaves_nothing(under):
    before = {row["ifname"] for row in under.one.show("link")}
    RESERVED.write_text("80,30000")

    async def main():
        async with under.running():
            await under.at_rest()
            stands = under.node_side()
            assert stands["addresses"] == {"10.244.1.1/32", "fd00:244:0:1::1/128"}
            assert set(stands["routes"]) == {
                "10.244.1.0/24", FAR, "fd00:244:0:1::/64", "fd00:244:0:2::/64",
            } | SERVICES  # fmt: skip
            assert RESERVED.read_text() == "80,30000-32767,40960-65535\n"
            far = stands["routes"][FAR]
            assert (far["gateway"], far["dev"]) == ("169.254.1.1", HOST)
            assert far["prefsrc"] == "10.244.1.1"
            assert far["metrics"][0]["mtu"] == 1450
            gateway = "02:50:c0:00:02:01"
            assert stands["neighbours"] == {"169.254.1.1": gateway, "fe80::1": gateway}
            for name in (HOST, HOST_PEER):
                link = under.one.link(name)
                assert link["mtu"] == HOST_MTU
                assert link["num_rx_queues"] == under.loop.status()["workers"]
                assert link["inet6_addr_gen_mode"] == "none"
            assert not under.one.show("addr", "show", "dev", HOST_PEER)[0]["addr_info"]
            for target in ("10.244.2.9", "fd00:244:0:2::9"):
                chosen = under.one.show("route", "get", target)[0]
                assert chosen["dev"] == HOST
                assert ip_address(chosen["prefsrc"]) in (
                    ip_address("10.244.1.1"), ip_address("fd00:244:0:1::1"),
                )  # fmt: skip
            await under.until(lambda: (under.row(FAR) or [0])[0] == TUNNEL, "a tunnel")

    drive(main)
    cleanup(under.config)
    assert {row["ifname"] for row in under.one.show("link")} == before
    for family in ("-4", "-6"):
        assert under.one.show(family, "route", "show", "proto", "80") == []
    assert not under.config.run_dir.exists()
    assert RESERVED.read_text() == "80,30000\n"


DAMAGE = [
    (f"link del {HOST}",),
    (f"addr flush dev {HOST}",),
    (f"link set {HOST} down",),
    (f"link set {HOST_PEER} down",),
    (f"link set {HOST} mtu 1500",),
    (f"neigh del 169.254.1.1 dev {HOST}",),
    (f"neigh replace fe80::1 lladdr 02:00:00:00:00:99 dev {HOST} nud permanent",),
    ("route flush proto 80",),
    ("route del 10.96.0.0/12",),
    (f"route replace {FAR} via 169.254.1.1 dev {HOST} onlink proto 80 mtu 1200",),
    (f"addr add 10.99.0.1/32 dev {HOST}", f"route add 10.77.0.0/16 dev {HOST} proto 80"),
]


def test_whatever_others_change_is_put_right(under):
    async def main():
        async with under.running() as loop:
            await under.at_rest()
            healthy = under.node_side()
            for lines in DAMAGE:
                turns = loop.turns
                under.one.ip(*lines)
                await under.until(lambda turns=turns: loop.turns > turns, f"awake after {lines}")
                await under.at_rest()
                stands = under.node_side()
                for part in ("addresses", "neighbours"):
                    assert stands[part] == healthy[part], lines
                assert set(stands["routes"]) == set(healthy["routes"]), lines
                assert stands["routes"][FAR]["metrics"][0]["mtu"] == 1450
                for name in (HOST, HOST_PEER):
                    assert "UP" in under.one.link(name)["flags"]
            mac = under.mac(under.one, HOST)
            port = next(p for p in under.writer.ports().values() if p.name == HOST_PEER)
            assert (port.ifindex, port.peer_mac) == (under.one.link(HOST_PEER)["ifindex"], mac)

    drive(main)


def test_a_neighbour_that_changes_its_mac_is_followed(under):
    async def main():
        async with under.running():
            old = under.mac(under.two)
            await under.until(lambda: under.row(FAR) == (TUNNEL, old), "a tunnel")
            fresh = "0a:00:00:00:00:42"
            under.two.ip("link set eth0 down", f"link set eth0 address {fresh}", "link set eth0 up")
            under.one.ip("neigh flush dev eth0")  # as its entry would fail in a minute
            wanted = (TUNNEL, bytes.fromhex(fresh.replace(":", "")))
            await under.until(lambda: under.row(FAR) == wanted, "the new MAC")

    drive(main)


def test_a_silent_neighbour_is_asked_until_it_answers(under, monkeypatch):
    monkeypatch.setattr(reconcile, "NUDGE_S", 0.2)
    under.two.ip("link set eth0 down")
    under.two.ip("addr flush dev eth0")
    under.one.sysctl({"net.ipv4.neigh.eth0.retrans_time_ms": 100})

    def failed() -> bool:
        rows = under.one.show("neigh", "show", "dev", "eth0")
        return any(row["dst"] == "192.0.2.2" and "FAILED" in row["state"] for row in rows)

    async def main():
        async with under.running() as loop:
            under.two.ip("link set eth0 up")
            await under.until(failed, "given up once")
            assert under.row(FAR)[0] == UNRESOLVED
            assert loop.status()["ready"]
            under.two.ip("addr add 192.0.2.2/24 dev eth0")
            await under.until(lambda: under.row(FAR)[0] == TUNNEL, "resolved")

    drive(main)


def test_an_uplink_that_goes_and_comes_back(under):
    under.one.ip("link add pst00000001 type veth peer name inner", "link set pst00000001 up")
    link = under.one.link("pst00000001")
    end = EndpointView(
        1, link["ifname"], link["ifindex"], under.mac(under.one, "pst00000001"), bytes(6),
        1500, 1, ip_address("10.244.1.11"), None,
    )  # fmt: skip

    async def main():
        async with under.running() as loop:
            await under.until(lambda: (under.row(FAR) or [0])[0] == TUNNEL, "a tunnel")
            ports = {port.name: index for index, port in under.writer.ports().items()}
            under.one.ip("link del eth0")
            await under.until(lambda: loop.status()["problems"], "said")
            assert "192.0.2.1" in loop.status()["problems"][0]
            assert under.row(FAR)[0] == UNRESOLVED
            under.ends = [end]  # a pod comes meanwhile
            await loop.settled(1, SECONDS)
            assert under.row("10.244.1.11/32")[0] == value("ADJACENCY_POD")
            under.lab.pair(under.one, under.two)
            await under.until(lambda: under.row(FAR)[0] == TUNNEL, "a tunnel again")
            await under.until(lambda: not loop.status()["problems"], "content")
            after = {port.name: index for index, port in under.writer.ports().items()}
            assert ports.items() <= after.items()
            uplink = under.writer.ports()[after["eth0"]]
            assert uplink.ifindex == under.one.link("eth0")["ifindex"]
            assert under.row(FAR)[1] == under.mac(under.two)

    drive(main)


def test_nodes_join_and_leave(under):
    async def main():
        async with under.running() as loop:
            under.nodes[3] = node(3)
            loop.trigger("objects")
            await under.until(lambda: under.row("10.244.3.0/24"), "joined")
            await under.at_rest()
            assert "10.244.3.0/24" in under.node_side()["routes"]
            del under.nodes[3], under.nodes[2]
            loop.trigger("objects")
            await under.until(lambda: not under.row("10.244.3.0/24"), "left")
            await under.at_rest()
            own = {"10.244.1.0/24", "fd00:244:0:1::/64"}
            assert set(under.node_side()["routes"]) == own | SERVICES

    drive(main)


@pytest.mark.parametrize("under", [{"mode": "direct"}], indirect=True)
def test_direct_routes_go_through_the_underlay(under):
    async def main():
        async with under.running():
            await under.at_rest()
            far = under.node_side()["routes"]
            assert (far[FAR]["gateway"], far[FAR]["dev"]) == ("192.0.2.2", "eth0")
            assert far["fd00:244:0:2::/64"]["gateway"] == "2001:db8::2"
            wanted = (value("ADJACENCY_NEXTHOP"), under.mac(under.two))
            await under.until(lambda: under.row(FAR) == wanted, "next hop")
            await under.until(lambda: under.row("fd00:244:0:2::/64") == wanted, "IPv6 next hop")

    drive(main)


def test_lost_messages_ring(under, monkeypatch):
    monkeypatch.setattr(events, "BUFFER", 1)  # the kernel makes it its least
    rings: list[int] = []
    doorbell = events.Doorbell(lambda: rings.append(1))
    try:
        under.one.ip(
            *(f"neigh add 192.0.2.{n} lladdr 02:00:00:00:00:01 dev eth0" for n in range(10, 250))
        )
        doorbell.known = Kernel().snapshot().neighbours
        assert len(doorbell.known) >= 240
        doorbell.read()
        assert rings == [1], "it must ring for the lost ones, though it knows all it was told of"
    finally:
        doorbell.close()


def test_it_says_what_the_kernel_refuses(under):
    kernel = Kernel()
    try:
        with pytest.raises(reconcile.KernelRefused, match=r"route 10\.5\.0\.0/16 .*ENETUNREACH"):
            kernel.replace_route(
                SimpleNamespace(
                    network=ip_network("10.5.0.0/16"), gateway=ip_address("203.0.113.1"),
                    device="eth0", mtu=0, source=None,
                )
            )  # fmt: skip
    finally:
        kernel.close()
