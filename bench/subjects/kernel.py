"""Linux itself: routing between veths, its vxlan device, nftables for all that is asked beyond.

Rule: set up as its own agents do it; what makes it slower or faster than it would be elsewhere is
in the remark.

Theory. Everything happens in the softirq of whoever sends, so on one core with the generator;
"steered" moves it to the others by receive packet steering. Conntrack does not check checksums
(nf_conntrack_checksum 0): a pod's own packets would not be checked either. For requests at a high
rate both pods reuse ports after a second (tcp_tw_reuse), as every subject's pods do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench import rules
from bench.lab import UNDERLAY4, UNDERLAY6, Namespace
from bench.peers import LinuxNode
from bench.scenario import FRAMES, Measure, Place
from bench.subjects.base import WORLD, End, Subject, other_cpus

VTEP = ("02:50:c0:00:02:01", "02:50:c0:00:02:02")


class Kernel(Subject):
    """Linux routes between the pods' veths, or through its vxlan device."""

    name = "linux"
    remark = "routing in the generator's softirq, one core for all; no conntrack, no filter"
    stateful = False
    steered: frozenset[int] = frozenset()

    @classmethod
    def refuses(cls, place: Place) -> str:
        """Routing alone does not filter or translate."""
        return "" if place.plain else " "

    def build(self) -> tuple[End, End]:
        """One node or two, joined as Penstock's are, or one and the world."""
        place = self.place
        spaces = [self.lab.namespace("node1")]
        if place.topology != "same":
            spaces.append(self.lab.namespace("world" if place.topology == "outside" else "node2"))
            self.lab.pair(spaces[0], spaces[1], place.mtu)
        count = len(spaces) - (place.topology == "outside")
        self.nodes = [LinuxNode(space, n) for n, space in enumerate(spaces[:count], 1)]
        mtu = 1500 if place.topology == "vxlan" else place.mtu
        client = self.nodes[0].pod("client", mtu)
        for n in range(place.pods):
            self.nodes[0].pod(f"idle{n}", mtu)
        first = End(client.namespace, client.addresses)
        if place.topology == "outside":
            self._to_world(spaces[1])
            return first, End(spaces[1], WORLD)
        server = self.nodes[-1].pod("server", mtu)
        if place.topology == "vxlan":
            for node, mac in zip(self.nodes, VTEP, strict=True):
                node.overlay(4, mac, underlay_mtu=place.mtu)
            self.nodes[0].reach(2, 4, VTEP[1])
            self.nodes[1].reach(1, 4, VTEP[0])
        elif place.topology == "direct":
            for node, other in ((self.nodes[0], 2), (self.nodes[1], 1)):
                node.namespace.ip(*_routes(other))
        return first, End(server.namespace, server.addresses)

    def _to_world(self, world: Namespace) -> None:
        node = self.nodes[0].namespace
        for family, bits in ((4, 32), (6, 128)):
            via = UNDERLAY4 + 2 if family == 4 else UNDERLAY6 + 2
            nodad = " nodad" if family == 6 else ""
            world.ip(f"addr add {WORLD[family]}/{bits} dev lo{nodad}")
            node.ip(f"route add {WORLD[family]}/{bits} via {via} dev eth0")
        world.ip(*_routes(1))

    @contextmanager
    def turn(self, measure: Measure) -> Iterator[None]:
        """NAPI for generated frames only: streams get the veth as it comes."""
        frames = measure in FRAMES
        for node in self.nodes:
            node.accept_frames(frames)
            node.steer(self.steered if frames else frozenset())
            if self.place.topology == "outside":  # what the world sends back
                node.namespace.run("ethtool", "-K", "eth0", "gro", "on")
        yield


def _routes(number: int) -> list[str]:
    return [
        f"route add 10.244.{number}.0/24 via {UNDERLAY4 + number} dev eth0",
        f"route add fd00:244:0:{number:x}::/64 via {UNDERLAY6 + number} dev eth0",
    ]


class KernelSteered(Kernel):
    """The same with receive packet steering to the other cores."""

    name = "linux, steered"
    remark = "RPS: forwarding on the other core"
    quick = False
    measures = FRAMES

    def build(self) -> tuple[End, End]:
        """As the other."""
        self.steered = other_cpus()
        return super().build()


class KernelNft(Kernel):
    """Linux with conntrack and what is asked for in nft."""

    name = "linux + nft"
    remark = "conntrack; rules and services in linear chains, known connections first, as agents do"
    stateful = True
    each = False

    @classmethod
    def refuses(cls, place: Place) -> str:
        """It can do all."""
        return ""

    def settle(self) -> None:
        """Load the rules: services where the client is, policies where the server is."""
        for node in self.nodes:
            first, last = node is self.nodes[0], node is self.nodes[-1]
            asked = replace(
                self.asked,
                rules=self.place.policy if last else 0,
                services=self.place.services if first else 0,
            )
            node.namespace.run("nft", "-f", "-", stdin=rules.nft(asked, self.each))
            node.namespace.sysctl({"net.netfilter.nf_conntrack_checksum": 0})

    @property
    def flows_most(self) -> int:
        """Half of what conntrack takes: a turn may find another's connections."""
        try:
            return int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text()) // 2
        except (OSError, ValueError):
            return 0


class KernelNftEach(KernelNft):
    """The same with rules that every packet walks through."""

    name = "linux + nft, every packet"
    remark = "the rules stand before `ct state established`: every packet walks through all of them"
    quick = False

    each = True
    measures = FRAMES

    @classmethod
    def refuses(cls, place: Place) -> str:
        """Only where rules are."""
        return "" if place.policy else " "
