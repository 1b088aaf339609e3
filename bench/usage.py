"""Processor time in a window: of each process, of softirqs, stolen, and of who is not ours.

Rule: times are read at both ends of a window in which nothing is started or ended by us.

Theory. /proc/stat has the machine's times by kind, in clock ticks: exact over seconds, not over
milliseconds. Softirqs are in it whoever's core they borrow; a process' own time (schedstat, in ns)
contains its system calls and what softirqs ran inside them. "Foreign" is the time of processes
that this run did not start: other people's work on the same cores makes a measurement doubtful, and
so does "steal", time that the hypervisor gave to somebody else.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
KINDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
PROC = Path("/proc")


@dataclass(frozen=True)
class Moment:
    """All counters at one time, ns."""

    when: int
    kinds: dict[str, int]
    own: int  # of the processes asked for
    sender: int
    foreign: int
    cpus: int


@dataclass(frozen=True)
class Usage:
    """What a window cost, in ns of one core."""

    wall: int
    cpus: int
    busy: int
    softirq: int
    steal: int
    own: int
    sender: int
    foreign: int

    @property
    def steal_share(self) -> float:
        """Of all cores' time."""
        return self.steal / (self.wall * self.cpus) if self.wall else 0.0

    @property
    def foreign_share(self) -> float:
        """Of all cores' time."""
        return self.foreign / (self.wall * self.cpus) if self.wall else 0.0

    def per(self, packets: int) -> dict[str, float]:
        """Return ns a packet of everything, softirqs, the subject's own processes, the sender."""
        if not packets:
            return {}
        found = {"busy_ns": self.busy / packets, "softirq_ns": self.softirq / packets}
        if self.own:
            found["own_ns"] = self.own / packets
        if self.sender:
            found["sender_ns"] = self.sender / packets
        return found


def moment(own: Iterable[int] = (), sender: int = 0) -> Moment:
    """Read everything. own: pids of the subject; sender: pid of the generator, 0: none."""
    words = (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    kinds = {name: int(word) * TICK_NS for name, word in zip(KINDS, words, strict=False)}
    return Moment(
        time.monotonic_ns(),
        kinds,
        sum(runtime(pid) for pid in own),
        runtime(sender) if sender else 0,
        _foreign(),
        os.cpu_count() or 1,
    )


def between(before: Moment, after: Moment) -> Usage:
    """Return what happened between two moments."""
    spent = {name: after.kinds[name] - before.kinds[name] for name in before.kinds}
    idle = spent["idle"] + spent["iowait"]
    return Usage(
        wall=after.when - before.when,
        cpus=after.cpus,
        busy=sum(spent.values()) - idle,
        softirq=spent["softirq"] + spent["irq"],
        steal=spent["steal"],
        own=after.own - before.own,
        sender=after.sender - before.sender,
        foreign=max(0, after.foreign - before.foreign),
    )


def runtime(pid: int) -> int:
    """Return ns that all threads of a process have run; 0 when it is gone."""
    total = 0
    try:
        for task in (PROC / str(pid) / "task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return total
    return total


def _foreign() -> int:
    """Time of all processes that do not descend from this one, of kernel threads not."""
    parents: dict[int, int] = {}
    times: dict[int, int] = {}
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            rest = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(entry.name)
        parents[pid] = int(rest[1])
        times[pid] = (int(rest[11]) + int(rest[12])) * TICK_NS
    return sum(spent for pid, spent in times.items() if not _ours(pid, parents))


def _ours(pid: int, parents: dict[int, int]) -> bool:
    me, kthreadd = os.getpid(), 2
    while pid > 1:
        if pid in (me, kthreadd):
            return True
        pid = parents.get(pid, 0)
    return False
