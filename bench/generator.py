"""The generator: UDP frames out of a pod's own eth0, as fast as one core can make them or at a
rate.

Rule: one BPF_PROG_RUN call a trial; what was sent is what the program counted.

Theory. With BPF_F_TEST_XDP_LIVE_FRAMES the kernel runs `generate` (xdp/bpf/generator.bpf.c) on
recycled pages and carries out its redirect into the pod's veth, as fast as a dedicated generator
and on any machine. The program is loaded here and handed to `penstock-frames`, a process of its own
on a core of its own, by file descriptor; its maps are our memory, so a trial is told what to do,
and watched, without a system call. A call costs tens of milliseconds before its first frame, so the
program itself takes the times. A generator serves more than one device: the devmap takes them from
any namespace.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from bench.lab import LabError, Namespace, Process, eventually
from bench.layout import LAYOUT
from bench.traffic import Plan
from xdp.artifacts import find
from xdp.object import BpfObject, ObjectSpec

SHIFT = 16  # the generator's fixed point
LAG_NS = 100_000  # behind a rate by more: frames are left out
BATCH_FAST, BATCH_PACED = 64, 16  # a paced frame waits for its batch to be full
NO_STAMP = (1 << 64) - 1


@dataclass(frozen=True)
class Sent:
    """What a trial has sent."""

    frames: int
    seconds: float  # from the first to the last
    left_out: int  # what the rate asked for and the generator could not
    by_template: tuple[int, ...]

    @property
    def rate(self) -> float:
        """Frames a second."""
        return self.frames / self.seconds if self.seconds else 0.0


class Generator:
    """The generator in a pod; a context manager."""

    def __init__(
        self, pod: Namespace, plan: Plan, cpu: int, devices: Sequence[tuple[Namespace, str]] = ()
    ) -> None:
        """Load it for a plan. devices: by slot of the templates; none: the pod's eth0."""
        self._pod, self._cpu, self._plan = pod, cpu, plan
        self._process: Process | None = None
        self._bpf = BpfObject(ObjectSpec.load(find("generator.bpf.o")))
        places = list(devices) or [(pod, "eth0")]
        for slot, (namespace, device) in enumerate(places):
            index = _index(namespace, device)
            with namespace.inside():  # a devmap takes a device of the caller's namespace
                self._bpf.maps["devices"].update(slot, index)
        self._ifindex = _index(pod, places[0][1] if places[0][0] is pod else "lo")
        self._control = self._bpf.maps["control"].mmap(LAYOUT["generator_control"])
        self._templates = self._bpf.maps["templates"].mmap(LAYOUT["generator_template"])
        self._templates[: len(plan.templates)] = plan.templates
        schedule = self._bpf.maps["schedule"].mmap(np.dtype("<u8"))
        if len(plan.schedule) > len(schedule):
            raise LabError(f"a round of {len(plan.schedule)} frames: at most {len(schedule)}")
        schedule[: len(plan.schedule)] = plan.schedule
        if len(plan.sequence):
            sequence = self._bpf.maps["sequence"].mmap(np.dtype("<u8"))
            sequence.view("<u4")[: len(plan.sequence)] = plan.sequence

    def begin(
        self, rate: float = 0.0, frames: int = 0, seconds: float = 0.0, stamp_every: int = 0
    ) -> None:
        """Start to send. rate: a second, 0: as fast as it can; frames, seconds: an end; 0: none.

        stamp_every: a power of two; every so manyth frame carries the time; 0: none.
        """
        self.end()
        plan, control = self._plan, self._control
        for name in LAYOUT["generator_control"].names or ():
            control[name] = 0
        self._templates["sent"] = self._templates["bytes"] = 0
        control["gap"] = round((1 << SHIFT) * 1e9 / rate) if rate else 0
        control["lag"] = LAG_NS << SHIFT
        control["limit"], control["duration_ns"] = frames, round(seconds * 1e9)
        control["flow_mask"], control["sequence_mask"] = (
            plan.flow_mask,
            max(len(plan.sequence) - 1, 0),
        )
        control["stamp_mask"] = stamp_every - 1 if stamp_every else NO_STAMP
        self._templates["stamped"] = 1 if stamp_every else 0
        control["slots"] = len(plan.schedule)
        batch = BATCH_PACED if rate else BATCH_FAST
        words = [str(n) for n in (self._program.fd, self._ifindex, plan.longest, batch)]
        self._process = self._pod.spawn(
            str(find("penstock-frames")),
            *words,
            cpus=frozenset({self._cpu}),
            fds=(self._program.fd,),
            log=f"{self._pod.short}-frames",
        )
        eventually(self._started, f"a generator in {self._pod.name}", every=0.001)

    @property
    def _program(self):
        return self._bpf.programs["generate"]

    def _started(self) -> bool:
        if self._process is None or not self._process.alive:
            raise LabError(f"the generator has ended: {self._process and self._process.output()}")
        return bool(self._control["start_ns"][0])

    @property
    def pid(self) -> int:
        """Of the process that sends, 0 when none does."""
        return self._process.pid if self._process else 0

    @property
    def sent(self) -> int:
        """Frames of this trial so far."""
        return int(self._control["sent"][0])

    def wait(self, seconds: float) -> None:
        """Wait until the trial's end is reached; LabError when it is not in time."""
        eventually(self._done, "the end of a trial", seconds, every=0.002)

    def _done(self) -> bool:
        if self._process is None or not self._process.alive:
            raise LabError(f"the generator has ended: {self._process and self._process.output()}")
        return bool(self._control["done"][0])

    def end(self) -> Sent:
        """Stop; return what was sent. Twice is fine."""
        self._control["stop"] = 1
        if self._process is not None:
            time.sleep(0.0005)  # a batch that has begun
            self._process.stop()
            self._process = None
        row = self._control[0]
        seconds = (int(row["last_ns"]) >> SHIFT) / 1e9
        sent = tuple(int(n) for n in self._templates["sent"][: len(self._plan.templates)])
        return Sent(int(row["sent"]), seconds, int(row["left_out"]), sent)

    def close(self) -> None:
        """Stop, unload."""
        self.end()
        self._bpf.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _index(namespace: Namespace, device: str) -> int:
    link = namespace.link(device)
    if link is None:
        raise LabError(f"{namespace.name} has no {device}")
    return int(link["ifindex"])
