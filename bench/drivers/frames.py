"""The driver `frames`: the generator in the client, the sink in the server, on this machine.

Rule: a flow is answered once before it is measured, unless the case says otherwise.

Theory. Connection trackers treat a flow that nobody answered as new for ever, and look every one of
its packets up in their rules; so the server first sends every flow's packet back (`reflect`), at a
rate at which none is lost, and a pass that did not come back whole is repeated. With two directions
the reflector stays, and what comes back to the client is what has arrived. Rates are read after a
warm-up; counted trials wait until the sink has been silent for a while.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from bench.drivers import Trial
from bench.generator import Generator
from bench.lab import LabError
from bench.scenario import Case
from bench.sink import Sink, sink
from bench.subjects.base import DEVICE, GENERATOR_CPU, Subject
from bench.traffic import LEAST, plan
from bench.usage import between, moment

WARM_S = 0.4
ANSWER_RATE = 100_000.0
ANSWERED_FOR_S = 60.0  # trackers keep answered flows for longer than this
TRIES = 3
STAMP_EVERY = 16
_answered: dict[tuple[int, Case], float] = {}


class Frames:
    """A session."""

    def __init__(self, subject: Subject, case: Case, generator: Generator, far: Sink) -> None:
        """far: where frames arrive, the server or (both directions) the client."""
        self._subject, self._case = subject, case
        self._generator, self._far = generator, far

    def flood(self, seconds: float) -> Trial:
        """Send as fast as possible; counts are of a window in the middle."""
        generator, far = self._generator, self._far
        own = list(self._subject.pids())
        generator.begin()
        try:
            time.sleep(WARM_S)
            before = moment(own, generator.pid)
            start = time.perf_counter(), far.packets(), generator.sent
            time.sleep(seconds)
            end = time.perf_counter(), far.packets(), generator.sent
            after = moment(own, generator.pid)
        finally:
            generator.end()
        passed, arrived, sent = (b - a for a, b in zip(start, end, strict=True))
        return Trial(0.0, int(sent), int(arrived), passed, usage=between(before, after))

    def trial(self, rate: float, seconds: float, stamp: bool = False) -> Trial:
        """Send at a rate for a time and wait for the last frame; stamp: also take times."""
        return self._counted(rate, 0, seconds, stamp)

    def burst(self, frames: int) -> Trial:
        """Send frames back to back and wait for the last one."""
        return self._counted(0.0, frames, 0.0, False)

    def _counted(self, rate: float, frames: int, seconds: float, stamp: bool) -> Trial:
        generator, far = self._generator, self._far
        own = list(self._subject.pids())
        if stamp:
            far.times()
        first, before = far.settle(), moment(own)
        generator.begin(rate, frames, seconds, STAMP_EVERY if stamp else 0)
        generator.wait(seconds + frames / 10_000 + 10)
        sent = generator.end()
        arrived = far.settle() - first
        after = moment(own)
        if not sent.frames:
            raise LabError("the generator has sent nothing")
        trial = Trial(
            rate,
            sent.frames,
            arrived.frames,
            sent.seconds,
            sent.left_out,
            usage=between(before, after),
        )
        return replace(trial, times=far.times()) if stamp else trial


@contextlib.contextmanager
def open_session(subject: Subject, case: Case, options: Mapping[str, str]) -> Iterator[Frames]:
    """Prepare a case; LabError for what live frames cannot be."""
    if case.traffic.flows > subject.flows_most:
        raise LabError(f"{case.traffic.flows:,} flows: it remembers {subject.flows_most:,}")
    path = subject.path()
    made = plan(path, case.traffic)
    client, server = subject.client.namespace, subject.server.namespace
    answer(subject, case)
    program = "reflect" if case.directions == 2 else "collect"
    with (
        sink(server, DEVICE, program) as there,
        sink(client, DEVICE) as here,
        Generator(client, made, GENERATOR_CPU) as generator,
    ):
        yield Frames(subject, case, generator, here if case.directions == 2 else there)
    _answered[id(subject), case] = time.monotonic()


def answer(subject: Subject, case: Case) -> None:
    """Have every flow answered once, unless it was lately, or is not to be."""
    if not (case.established and subject.stateful):
        return
    last = _answered.get((id(subject), case))
    if last is not None and time.monotonic() - last < ANSWERED_FOR_S:
        return
    client, server = subject.client.namespace, subject.server.namespace
    size = LEAST[subject.place.family]
    made = plan(subject.path(), replace(case.traffic, order="uniform", size=size))
    flows, back = case.traffic.flows, 0
    with (
        sink(server, DEVICE, "reflect"),
        sink(client, DEVICE) as here,
        Generator(client, made, GENERATOR_CPU) as generator,
    ):
        for _ in range(TRIES):
            before = here.packets()
            generator.begin(ANSWER_RATE, flows)
            generator.wait(flows / ANSWER_RATE * 3 + 10)
            generator.end()
            back = here.settle().frames - before
            if back >= flows:
                return
    if back < 0.99 * flows:
        raise LabError(f"{subject.name}: only {back} of {flows} flows were answered")
