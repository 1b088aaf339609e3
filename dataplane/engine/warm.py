"""Compile every kernel into the cache, with progress: `python -m dataplane.engine.warm`.

Rule: what a forwarder runs is compiled here, with the very argument types it will use; a start
after this compiles nothing.

Theory. numba compiles a function once for each set of argument types. The types are those of
shared memory (read-only or not does not matter here: the arrays are mapped alike), so warming runs
on small mapped files. A second process compiles what the first does not need; the worker's loop,
which is made of all of them, comes last. `process`, the stages without rings, is for tests, which
compile it when they first call it.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SECOND = "--second"  # argument of the second process


def _jobs(second: bool, load: bool = False) -> list[tuple[str, Callable[[], object]]]:
    from dataplane.engine import loop
    from dataplane.engine.account import make_lane
    from dataplane.engine.conntrack import NAT_PORTS, Conntrack
    from dataplane.engine.judge import Judge
    from dataplane.engine.names import Names
    from dataplane.engine.worker import Worker, make_tables
    from dataplane.kernels.dns_copies import read
    from dataplane.kernels.flows import renew
    from dataplane.kernels.harvest import harvest
    from dataplane.tables.shm import Shm
    from xdp.abi import CONST

    scratch = tempfile.TemporaryDirectory(prefix="penstock-warm-")
    shm = Shm.create(Path(scratch.name))
    frames = np.arange(4, dtype=np.int64) * CONST["FRAME_STRIDE"]
    conntrack = Conntrack(shm, np.zeros(NAT_PORTS, np.uint32), 1)
    worker = Worker(0, shm, 0, frames, 0, conntrack.trackers[0], conntrack.flows)
    worker.control[loop.CONTROL_STOP] = 1  # run returns before its first step
    names = Names(shm, make_tables(shm), conntrack.trackers, Path(scratch.name))
    batch, _, *stages, _, _ = worker.arguments
    tables, _, _, flows, counters = stages
    kernels = [
        ("parse", lambda: loop.parse(batch)),
        ("admit", lambda: loop.admit(batch, tables)),
        ("track", lambda: loop.track(batch, tables, worker.tracker)),
        ("connect", lambda: loop.connect(batch, tables, worker.tracker)),
        ("answer", lambda: loop.answer(batch, tables, counters)),
        ("translate", lambda: loop.translate(batch, tables)),
        ("the flow table", lambda: loop.install(batch, tables, flows)),
        ("and its counters", lambda: harvest(tables, counters, flows, 0, 0)),
        ("and its generation", lambda: renew(flows)),
    ]
    beside = [
        ("the stage of names", lambda: loop.names(batch, tables, worker.tracker, counters)),
        ("route", lambda: loop.route(batch, tables)),
        ("judge", lambda: loop.judge(batch, tables)),
        ("forward", lambda: loop.forward(batch, tables)),
        ("the counters", lambda: loop.tally(batch, tables, counters)),
        ("connections' time-outs", conntrack.sweep),
        ("and flush", conntrack.compile),
        ("names", names.compile),
        ("names over TCP", Judge(shm).compile),
        (
            "copies of messages",
            lambda: read(tables, flows, make_lane(shm, CONST["DNS_READER"]), 0, 1),
        ),
    ]
    if second:
        return [*beside, ("the scratch files away", scratch.cleanup)]
    last = [
        ("the worker's loop", lambda: loop.run(*worker.arguments)),
        ("the scratch files away", scratch.cleanup),
    ]
    if load:
        return [*kernels, *last]
    other = subprocess.Popen([sys.executable, "-m", "dataplane.engine.warm", SECOND])
    return [
        *kernels,
        ("names, beside them", lambda: _finish(other)),
        *last,
    ]


def _finish(other: subprocess.Popen[bytes]) -> None:
    if other.wait():
        raise SystemExit("compiling the kernels failed: see above")


def load() -> None:
    """Take every kernel into this process, compiling what is missing."""
    main()
    for second in (True, False):
        for _, job in _jobs(second, load=True):
            job()


def main() -> int:
    """Compile what is missing; print a bar when something has to be compiled."""
    from dataplane.kernels import cache

    folder = cache.settle()
    stamp = folder / "warm"
    if stamp.exists():
        return 0
    cache.collect()
    start = time.monotonic()
    second = SECOND in sys.argv
    if not second:
        print("compiling the vector kernels for this CPU (once per version)", file=sys.stderr)
    jobs = _jobs(second)
    for number, (name, job) in enumerate(jobs, 1):
        job()
        if second:
            continue
        filled = "#" * (24 * number // len(jobs))
        passed = time.monotonic() - start
        print(f"  [{filled:<24}] {passed:5.1f} s  {name}", file=sys.stderr, flush=True)
    if not second:
        stamp.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
