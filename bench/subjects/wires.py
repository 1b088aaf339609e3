"""Limits, not equals: what moves frames between two pods and looks at no address.

Rule: they are wires; what they leave out is in the remark.

Theory. DPDK's testpmd has the same AF_XDP sockets as Penstock's vector path (and, as a second
subject, AF_PACKET rings), in C. Bare XDP redirect is what any dataplane on veths stays below. The
generator with nothing behind it says what can be offered at all.
"""

import shutil
from contextlib import AbstractContextManager
from typing import ClassVar

from bench.lab import LabError
from bench.peers import Wire
from bench.scenario import FRAMES, Measure, Place
from bench.subjects.base import End, Subject, polling_cpu


class _Plain(Subject):
    """One node, nothing asked for."""

    stateful = False

    @classmethod
    def refuses(cls, place: Place) -> str:
        """They look at no address."""
        return "" if place.plain and place.topology == "same" and place.mtu == 1500 else " "


class Ceiling(_Plain):
    """The generator and the sink with nothing between them."""

    name = "generator alone"
    remark = "what can be offered"
    quick = False
    measures = frozenset({"most"})

    def build(self) -> tuple[End, End]:
        """Two ends of one veth pair."""
        ends = []
        for n in range(2):
            addresses = {4: f"10.244.1.{n + 2}", 6: f"fd00:244:0:1::{n + 2}"}
            ends.append(End(self.lab.namespace(f"end{n}"), addresses))
        self.lab.wire(ends[0].namespace, ends[1].namespace, ("eth0", "eth0"))
        for end in ends:
            end.namespace.ip(f"addr add {end.addresses[4]}/24 dev eth0")
            end.namespace.ip(f"addr add {end.addresses[6]}/64 dev eth0 nodad")
        return ends[0], ends[1]


class Redirect(_Plain):
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

    def turn(self, measure: Measure) -> AbstractContextManager[None]:
        """With the programs attached."""
        return self.wire.redirect()


class TestpmdXdp(Redirect):
    """DPDK's testpmd over AF_XDP."""

    name = "testpmd af_xdp"
    remark = "macswap (frames) or io (programs), no lookup; polls the other core"
    quick = False  # its counterpart, Penstock without the flow table, is none of a quick run's
    device: ClassVar[str] = "af_xdp"

    def build(self) -> tuple[End, End]:
        """A wire; refused where DPDK is not installed."""
        if shutil.which("dpdk-testpmd") is None:
            raise LabError("dpdk-testpmd is not installed: apt install dpdk-dev")
        polling_cpu()
        return super().build()

    def turn(self, measure: Measure) -> AbstractContextManager[None]:
        """Only now it runs, since it never sleeps."""
        mode = "macswap" if measure in FRAMES else "io"
        return self.wire.testpmd(mode, polling_cpu(), self.device)


class TestpmdPacket(TestpmdXdp):
    """DPDK's testpmd over AF_PACKET."""

    name = "testpmd af_packet"
    remark = "the same over AF_PACKET rings"
    device: ClassVar[str] = "af_packet"
