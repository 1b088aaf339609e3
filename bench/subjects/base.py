"""What is measured: two ends and something that joins them.

Rule: a subject stands for the whole run and costs nothing while it is another's turn.

Theory. Turns are interleaved, so subjects are built once a place and stay. Those that poll
(testpmd, Open vSwitch) run only inside `turn`. The generator and both ends of a latency test have
core 0; what forwards in a process of its own has the other cores, as the remark of each subject
says. A subject is asked what is to be forwarded, filtered and translated (rules.Asked) and says
what it cannot do (`refuses`), in a word that stands in the results.
"""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

from bench import checks
from bench.lab import Lab, LabError, Namespace
from bench.rules import Asked
from bench.scenario import FRAMES, Measure, Place
from bench.traffic import FLOWS_MOST, Path

DEVICE = "eth0"  # of every pod
GENERATOR_CPU = 0
PROGRAMS: frozenset[Measure] = frozenset({"stream", "rr", "crr", "dns"})
WORLD = {4: "11.0.2.1", 6: "2001:db8:ffff:2::1"}  # an address behind the host outside


@dataclass(frozen=True)
class End:
    """A pod, or a host, as a measurement sees it."""

    namespace: Namespace
    addresses: dict[int, str]

    def mac(self) -> str:
        """Of its interface."""
        link = self.namespace.link(DEVICE)
        if link is None:
            raise LabError(f"{self.namespace.name} has no {DEVICE}")
        return link["address"]


class Subject:
    """Two ends and what joins them."""

    name: ClassVar[str] = ""
    remark: ClassVar[str] = ""
    measures: ClassVar[frozenset[Measure]] = FRAMES | PROGRAMS
    quick: ClassVar[bool] = True  # part of a quick run
    stateful: ClassVar[bool] = True  # remembers flows: they are to be answered once before

    def __init__(self, lab: Lab, place: Place) -> None:
        """Build it; LabError with the reason when this machine cannot."""
        self.lab = lab
        self.place = place
        self.client, self.server = self.build()
        self.settle()

    @classmethod
    def refuses(cls, place: Place) -> str:
        """Return why it cannot stand at a place; empty: it can. A space: not worth a word."""
        return ""

    def build(self) -> tuple[End, End]:
        """Make both ends."""
        raise NotImplementedError

    def settle(self) -> None:
        """What is done when both ends stand: rules, services."""

    @property
    def asked(self) -> Asked:
        """What it is to do."""
        family, place = self.place.family, self.place
        ends = self.client.addresses[family], self.server.addresses[family]
        outward = place.topology == "outside"
        return Asked(family, *ends, place.policy, place.services, place.masquerade, outward)

    @property
    def target(self) -> str:
        """The address that the client speaks to."""
        return self.asked.target

    def turn(self, measure: Measure) -> AbstractContextManager[None]:
        """Around every measurement of this subject."""
        return nullcontext()

    def path(self) -> Path:
        """Between whom frames go."""
        return Path(
            self.client.mac(),
            self.next_hop(),
            self.client.addresses[self.place.family],
            self.target,
        )

    def next_hop(self) -> str:
        """The MAC that the client's frames go to, as its kernel knows it."""
        client, family = self.client.namespace, self.place.family
        route = client.show(f"-{family}", "route", "get", self.target)[0]
        hop = route.get("gateway", self.target)
        checks.eventually_pings(client, hop)
        for row in client.show(f"-{family}", "neigh", "show", "dev", DEVICE):
            if row["dst"] == hop and "lladdr" in row:
                return row["lladdr"]
        raise LabError(f"{client.name}: no neighbour {hop} on {DEVICE}")

    @property
    def flows_most(self) -> int:
        """How many flows it can remember; more are not measured."""
        return FLOWS_MOST

    def pids(self) -> Iterable[int]:
        """Its own processes, whose time is told apart."""
        return ()


def other_cpus() -> frozenset[int]:
    """The cores that are not the generator's; all, when there is only one."""
    allowed = frozenset(os.sched_getaffinity(0))
    return allowed - {GENERATOR_CPU} or allowed


def polling_cpu() -> int:
    """A core for what polls; LabError where the generator has the only one."""
    if len(os.sched_getaffinity(0)) < 2:
        raise LabError("it polls: it needs a second core")
    return max(other_cpus())
