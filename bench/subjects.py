"""What is measured: Penstock and its peers, each as two pods with something between them.

Rule: a subject stands for the whole run and costs nothing while it is another's turn.

Theory. Turns are interleaved, so subjects are built once and stay. Those that poll (testpmd) run
only inside `turn`. The generator and both ends of a latency test have core 0; what forwards in a
process of its own has the other cores, as the remark of each subject says.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from bench import checks
from bench.lab import Lab, LabError, Namespace
from bench.peers import LinuxNode, Wire, testpmd_is_here
from bench.penstock import Cluster, Node, Settings

DEVICE = "eth0"  # of every pod
GENERATOR_CPU = 0
SAME, ACROSS = "same node", "across, VXLAN"
PACKETS, STREAM, LATENCY = "packets", "stream", "latency"
VTEP = ("02:50:c0:00:02:01", "02:50:c0:00:02:02")


@dataclass(frozen=True)
class End:
    """A pod as a measurement sees it."""

    namespace: Namespace
    addresses: dict[int, str]

    def mac(self) -> str:
        """Of its interface."""
        link = self.namespace.link(DEVICE)
        if link is None:
            raise LabError(f"{self.namespace.name} has no {DEVICE}")
        return link["address"]


class Subject:
    """Two pods and what joins them."""

    name = ""
    remark = ""
    measures = frozenset({PACKETS, STREAM, LATENCY})

    def __init__(self, lab: Lab, scenario: str) -> None:
        """Build it; LabError with the reason when this machine cannot."""
        self.lab = lab
        self.scenario = scenario
        self.client, self.server = self.build()

    def build(self) -> tuple[End, End]:
        """Make both pods."""
        raise NotImplementedError

    def turn(self, measure: str) -> AbstractContextManager[None]:
        """Around every measurement of this subject."""
        return nullcontext()

    def next_hop(self) -> str:
        """The MAC that the client's frames go to, as its kernel knows it; every table is warm."""
        client, target = self.client.namespace, self.server.addresses[4]
        checks.eventually_pings(client, target)
        hop = client.show("route", "get", target)[0].get("gateway", target)
        for row in client.show("neigh", "show", "dev", DEVICE):
            if row["dst"] == hop and "lladdr" in row:
                return row["lladdr"]
        raise LabError(f"{client.name}: no neighbour {hop} on {DEVICE}")

    def cpu_ns(self) -> int:
        """Processor time of its own processes so far; 0: it has none."""
        return 0


class Ceiling(Subject):
    """The generator and the sink with nothing between them."""

    name = "generator alone"
    remark = "what can be offered"
    measures = frozenset({PACKETS})

    def build(self) -> tuple[End, End]:
        """Two ends of one veth pair."""
        ends = []
        for number in range(2):
            ends.append(End(self.lab.namespace(f"end{number}"), {4: f"10.244.1.{number + 2}"}))
        self.lab.wire(ends[0].namespace, ends[1].namespace, ("eth0", "eth0"))
        for end in ends:
            end.namespace.ip(f"addr add {end.addresses[4]}/24 dev eth0")
        return ends[0], ends[1]


class Penstock(Subject):
    """Penstock's daemon, pods by CNI."""

    name = "penstock"
    remark = "forwarder on the other core"

    def build(self) -> tuple[End, End]:
        """One node or two."""
        settings = Settings(cpus=other_cpus(), forwarder={"workers": 1})
        self.cluster = Cluster(self.lab, settings).start(1 if self.scenario == SAME else 2)
        nodes: list[Node] = self.cluster.nodes
        pods = [nodes[0].pod("client"), nodes[-1].pod("server")]
        self.pids = [node.pid("forwarder") for node in nodes]
        first, second = (End(pod.namespace, pod.addresses) for pod in pods)
        return first, second

    def cpu_ns(self) -> int:
        """Of the forwarders, with what the kernel does in their system calls."""
        return sum(_schedstat(pid) for pid in self.pids)


class Kernel(Subject):
    """Linux routes between the pods' veths, or through its vxlan device."""

    name = "linux"
    remark = "routing in the generator's softirq, one core for all"
    steered: frozenset[int] = frozenset()

    def build(self) -> tuple[End, End]:
        """One node or two, joined as Penstock's are."""
        count = 1 if self.scenario == SAME else 2
        spaces = [self.lab.namespace(f"node{number}") for number in range(1, count + 1)]
        self.nodes = [LinuxNode(space, number) for number, space in enumerate(spaces, 1)]
        if count == 2:
            self.lab.pair(spaces[0], spaces[1])
            for node, mac in zip(self.nodes, VTEP, strict=True):
                node.overlay(4, mac)
        pods = [self.nodes[0].pod("client"), self.nodes[-1].pod("server")]
        if count == 2:
            self.nodes[0].reach(2, 4, VTEP[1])
            self.nodes[1].reach(1, 4, VTEP[0])
        return End(pods[0].namespace, pods[0].addresses), End(pods[1].namespace, pods[1].addresses)

    @contextmanager
    def turn(self, measure: str) -> Iterator[None]:
        """NAPI for generated frames only: streams get the veth as it comes."""
        frames = measure == PACKETS
        for node in self.nodes:
            node.accept_frames(frames)
            node.steer(self.steered if frames else frozenset())
        yield


class KernelSteered(Kernel):
    """The same with receive packet steering to the other cores."""

    name = "linux, steered"
    remark = "RPS: forwarding on the other core"
    measures = frozenset({PACKETS})

    def build(self) -> tuple[End, End]:
        """As the other."""
        self.steered = other_cpus()
        return super().build()


class Redirect(Subject):
    """Bare XDP redirect between the host ends."""

    name = "xdp redirect"
    remark = "the limit: no lookup, no header is read; MTU 1500"

    def build(self) -> tuple[End, End]:
        """A wire between two pods."""
        self.wire = Wire(self.lab)
        first, second = (End(pod.namespace, pod.addresses) for pod in self.wire.pods)
        return first, second

    def next_hop(self) -> str:
        """The other pod itself: between them is but a wire, which may not let ARP through."""
        return self.server.mac()

    def turn(self, measure: str) -> AbstractContextManager[None]:
        """With the programs attached."""
        return self.wire.redirect()


class Testpmd(Redirect):
    """DPDK's testpmd over AF_XDP."""

    name = "testpmd af_xdp"
    remark = "macswap (packets) or io, no lookup; polls the other core"

    def build(self) -> tuple[End, End]:
        """A wire; refused where DPDK is not installed."""
        if not testpmd_is_here():
            raise LabError("dpdk-testpmd is not installed: apt install dpdk-dev")
        if len(os.sched_getaffinity(0)) < 2:
            raise LabError("testpmd polls: it needs a second core")
        return super().build()

    def turn(self, measure: str) -> AbstractContextManager[None]:
        """Only now it runs, since it never sleeps."""
        return self.wire.testpmd("macswap" if measure == PACKETS else "io", max(other_cpus()))


SUBJECTS: dict[str, tuple[type[Subject], ...]] = {
    SAME: (Penstock, Kernel, KernelSteered, Testpmd, Redirect, Ceiling),
    ACROSS: (Penstock, Kernel, KernelSteered),
}


def other_cpus() -> frozenset[int]:
    """The cores that are not the generator's; all, when there is only one."""
    allowed = frozenset(os.sched_getaffinity(0))
    return allowed - {GENERATOR_CPU} or allowed


def prove(subject: Subject) -> None:
    """Let the pods reach each other once: what does not forward is not measured."""
    if subject.measures != {PACKETS}:
        measure = STREAM
    else:
        measure = PACKETS
    with subject.turn(measure):
        checks.eventually_pings(subject.client.namespace, subject.server.addresses[4])


def _schedstat(pid: int) -> int:
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total
