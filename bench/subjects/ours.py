"""Penstock as a subject: the daemon on every node, pods by CNI, manifests for what is asked.

Rule: nothing but configuration and manifests; what is measured is what a user would run.

Theory. One worker a node, on the cores that the generator does not use. Where pods send and receive
frames by XDP programs, their hook is xdp (decision 13), else it is as it comes. The flow table is
on; the last subject has it off, so that what the vector path alone does is seen beside
DPDK's testpmd, which has the same sockets.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

from bench import rules
from bench.balance import Snapshot, snapshot
from bench.lab import LabError, eventually
from bench.penstock import Cluster, Outside, PodSpec, Settings
from bench.scenario import Place
from bench.subjects.base import WORLD, End, Subject, other_cpus
from dataplane.control.config import ForwarderSection
from dataplane.tables.shm import Shm
from xdp.abi import value

MODES = {"same": "overlay", "vxlan": "overlay", "direct": "direct", "outside": "overlay"}
IN_FORCE_S = 60.0
DELETED = 127  # struct policy_entry
USED = value("SLOT_USED")


class Penstock(Subject):
    """Penstock's daemon, pods by CNI."""

    name = "penstock"
    remark = "forwarder on the other core"
    forwarder: ClassVar[dict[str, Any]] = {}
    anywhere: ClassVar[bool] = False  # the daemon may run on all cores

    def build(self) -> tuple[End, End]:
        """One node or two, or one and the world."""
        place = self.place
        hook = {"pod_hook": "xdp"} if place.frames else {}
        settings = Settings(
            mode=MODES[place.topology],
            mtu=place.mtu,
            cpus=frozenset() if self.anywhere else other_cpus(),
            forwarder={"workers": 1, **hook, **self.forwarder},
            more={"masquerade": {"ipv4": place.masquerade, "ipv6": place.masquerade}},
        )
        self.cluster = Cluster(self.lab, settings)
        far = self._start()
        nodes = self.cluster.nodes
        client = nodes[0].pod("client", PodSpec(labels={"app": "client"}))
        self.pods = [nodes[0].pod(f"idle{n}") for n in range(place.pods)]
        first = End(client.namespace, client.addresses)
        if far is not None:
            return first, End(far.namespace, far.addresses)
        self.pod = nodes[-1].pod("server", PodSpec(labels={"app": "server"}))
        return first, End(self.pod.namespace, self.pod.addresses)

    def _start(self) -> Outside | None:
        if self.place.topology == "outside":
            world = self.cluster.start_beside()
            assert world.addresses == WORLD
            return world
        self.cluster.start(1 if self.place.topology == "same" else 2)
        return None

    def settle(self) -> None:
        """Apply policies and services; wait until they are in force."""
        asked = self.asked
        if asked.rules:
            for n, policy in enumerate(rules.policies(asked)):
                self.cluster.apply(f"policy-{n}", policy)
        objects = rules.services(asked, self.cluster.nodes[-1].name) if asked.services else []
        for n in range(0, len(objects), rules.SERVICES_A_FILE):
            self.cluster.apply(f"services-{n}", *objects[n : n + rules.SERVICES_A_FILE])
        if asked.rules:
            eventually(lambda: self._entries() >= asked.rules, "the policy in force", IN_FORCE_S)
        if asked.services:
            eventually(self._serves, "the services in force", IN_FORCE_S)

    def _entries(self) -> int:
        """Policy entries of the server's node."""
        with Shm.open(self.cluster.nodes[-1].run_dir) as shm:
            parts = shm.extents("policy_entries")  # what is a hole stays one
            return sum(int((shm.policy_entries[a:b]["match"] > DELETED).sum()) for a, b in parts)

    def _serves(self) -> bool:
        with Shm.open(self.cluster.nodes[0].run_dir) as shm:
            parts = shm.extents("frontends")
            found = sum(int((shm.frontends[a:b]["state"] == USED).sum()) for a, b in parts)
        return found >= self.asked.services

    def pids(self) -> Iterable[int]:
        """The forwarders, with what the kernel does in their system calls."""
        return [pid for node in self.cluster.nodes if (pid := node.pid("forwarder"))]

    @property
    def has_flow_table(self) -> bool:
        """Whether XDP may forward packets that are counted later."""
        return self.forwarder.get("flow_table") != "off"

    def snapshots(self) -> list[Snapshot]:
        """What every node has counted."""
        return [snapshot(node.run_dir) for node in self.cluster.nodes]


class PenstockXdp(Penstock):
    """The same with pods whose packets are taken by XDP, as frames, though programs send them."""

    name = "penstock, pods at xdp"
    remark = "forwarder.pod_hook: xdp, as for pods that send frames"
    quick = False
    forwarder: ClassVar[dict[str, Any]] = {"pod_hook": "xdp"}

    @classmethod
    def refuses(cls, place: Place) -> str:
        """There the subject itself is so."""
        return " " if place.frames else ""


class PenstockVector(Penstock):
    """The same without the flow table: every packet goes through the vector path."""

    name = "penstock, flow table off"
    remark = "every packet through AF_XDP and the kernels"
    quick = False
    forwarder: ClassVar[dict[str, Any]] = {"flow_table": "off"}

    @classmethod
    def refuses(cls, place: Place) -> str:
        """There may be no flow table to switch off."""
        return "" if "flow_table" in ForwarderSection.model_fields else " "

    def build(self) -> tuple[End, End]:
        """As the other."""
        if "flow_table" not in ForwarderSection.model_fields:
            raise LabError("this version has no flow table")
        return super().build()
