"""The loop of a worker: receive, decide, transmit; sleep when there is nothing.

Rule: the stages are listed once, in `stages`; tests, the fuzzer, the engine benchmark and the
worker all run that list.

Theory. One call of `run` lasts until the control thread raises the stop word (it then changes
sockets and calls again), holds no GIL and allocates nothing. The loop spins for `spin_us` after the
last packet and then sleeps in epoll_wait(2) on its sockets, so an idle node costs nothing. While it
spins it yields the core, since producer and consumer of a veth often share one. Every 64th step is
timed stage by stage; the sums are in worker_stats.
"""

import numpy as np

from dataplane.engine.account import account
from dataplane.engine.occupancy import received, unsent
from dataplane.engine.rings import collect, receive
from dataplane.engine.transmit import flush, transmit
from dataplane.kernels.admit import admit
from dataplane.kernels.answer import answer
from dataplane.kernels.connect import connect
from dataplane.kernels.dns import names
from dataplane.kernels.dns_copies import ALL, read_copies
from dataplane.kernels.drops import flush_drops, tell_drops
from dataplane.kernels.flows import install
from dataplane.kernels.forward import forward
from dataplane.kernels.fragments import fragments
from dataplane.kernels.house import inline, kernel, load64_acquire, sched_yield, types
from dataplane.kernels.judge import judge
from dataplane.kernels.parse import parse
from dataplane.kernels.route import route
from dataplane.kernels.taps import keep, note, open_taps, tap
from dataplane.kernels.track import track
from dataplane.kernels.translate import translate
from xdp.abi import CONST, value

CLOCK_MONOTONIC = 1
SAMPLE_MASK = 63  # every 64th step is timed
SAMPLED, NOTED = 1, 2  # and its time counted; and what each stage made of each packet kept
TAPS_MAX = CONST["TAPS_MAX"]
SLEEP_MS = 1000  # longest sleep: the heartbeat is at most this old
EVENTS_MAX = 64

RECEIVE = value("STAGE_RECEIVE")
PARSE = value("STAGE_PARSE")
ADMIT = value("STAGE_ADMIT")
TRACK = value("STAGE_TRACK")
CONNECT = value("STAGE_CONNECT")
ROUTE = value("STAGE_ROUTE")
JUDGE = value("STAGE_JUDGE")
ANSWER = value("STAGE_ANSWER")
TRANSLATE = value("STAGE_TRANSLATE")
FORWARD = value("STAGE_FORWARD")
INSTALL = value("STAGE_INSTALL")
ACCOUNT = value("STAGE_ACCOUNT")
TRANSMIT = value("STAGE_TRANSMIT")

# Words of the control array that the Python side and the loop share.
CONTROL_STOP = 0  # raised by Python: return at once
CONTROL_EPOLL = 1  # fd
CONTROL_SPIN_NS = 2
CONTROL_EVENTS = 3  # memory address of EVENTS_MAX epoll_event structures
CONTROL_ADDRESS = 4  # memory address of this array
CONTROL_WORDS = 8

clock_gettime = types.ExternalFunction("clock_gettime", types.intc(types.intc, types.intp))
epoll_wait = types.ExternalFunction(
    "epoll_wait", types.intc(types.intc, types.intp, types.intc, types.intc)
)


@inline
def _now(c):
    clock_gettime(CLOCK_MONOTONIC, c.clock[2])
    return c.clock[0] * 1_000_000_000 + c.clock[1]


@inline
def _mark(b, c, stage, watched):
    """Charge the time since the last mark to a stage. watched: SAMPLED, NOTED."""
    if watched:
        now = _now(c)
        if watched & SAMPLED:
            c.stats[0].stage_ns[stage] += np.uint64(now - c.marks[0])
        if watched & NOTED:
            note(b, c.steps, stage, now - c.marks[0])
            now = _now(c)
        c.marks[0] = now


@inline
def stages(b, t, k, f, x, c, watched):
    """Every decision about a vector, in order."""
    parse(b)
    _mark(b, c, PARSE, watched)
    admit(b, t)
    fragments(b, f, k)
    _mark(b, c, ADMIT, watched)
    track(b, t, k)
    _mark(b, c, TRACK, watched)
    if b.todo_count[0]:
        connect(b, t, k)
    _mark(b, c, CONNECT, watched)
    route(b, t)
    if b.dns_count[0]:
        read_copies(t, x, c, np.int64(ALL))
        names(b, t, k, c)
    _mark(b, c, ROUTE, watched)
    judge(b, t)
    _mark(b, c, JUDGE, watched)
    answer(b, t, c)
    _mark(b, c, ANSWER, watched)
    translate(b, t)
    _mark(b, c, TRANSLATE, watched)
    forward(b, t)
    _mark(b, c, FORWARD, watched)
    install(b, t, x)
    _mark(b, c, INSTALL, watched)


@kernel
def process(b, t, k, f, x, c):
    """Decide about a vector that does not come from rings (tests, fuzzer, engine benchmark)."""
    stages(b, t, k, f, x, c, 0)


@kernel
def tally(b, t, c):
    """Count a vector that does not come from rings."""
    account(b, t, c)


@inline
def _step(b, r, t, k, f, x, c, w, now):
    """Decide about and send the vector that was received; returns sockets that still wait."""
    stats = c.stats[0]
    taps = open_taps(w)
    watched = NOTED if taps >> TAPS_MAX else 0
    if taps:
        keep(b, w)
    if (stats.steps & np.uint64(SAMPLE_MASK)) == np.uint64(0):
        watched |= SAMPLED
        c.stats[0].sampled_steps += np.uint64(1)
        c.stats[0].sampled_packets += np.uint64(b.count[0])
        c.stats[0].rx_waiting += np.uint64(received(r))
        c.stats[0].tx_waiting += np.uint64(unsent(r))
    b.now_ns[0] = now
    c.marks[0] = now
    _mark(b, c, RECEIVE, watched)
    stages(b, t, k, f, x, c, watched)
    transmit(b, r, c.kicks)
    _mark(b, c, TRANSMIT, watched)
    account(b, t, c)
    _mark(b, c, ACCOUNT, watched)
    if taps:
        tap(b, t, w, c.steps, taps)
    collect(r)
    waiting = flush(r, c.kicks)
    _mark(b, c, TRANSMIT, watched)
    c.stats[0].steps += np.uint64(1)
    c.stats[0].packets += np.uint64(b.count[0])
    return waiting


@inline
def _publish_stats(r, c, now):
    c.stats[0].heartbeat_ns = np.uint64(now)
    c.stats[0].kicks = np.uint64(c.kicks[0])
    c.stats[0].kick_errors = np.uint64(c.kicks[1])
    c.stats[0].free_frames = np.uint64(r.free_count[0])


@inline
def _sleep(c, control):
    """Wait for packets, the wake-up event, or a second. (A dead device wakes nobody: ports.py.)"""
    c.stats[0].polls += np.uint64(1)
    epoll_wait(control[CONTROL_EPOLL], control[CONTROL_EVENTS], EVENTS_MAX, SLEEP_MS)


@kernel
def run(b, r, t, k, f, x, c, w, control):
    """Work until the stop word is raised.

    b: Batch, r: Rings, t: Tables, k: Tracker, f: Fragments, x: Flows, c: Counters, w: Watch.
    """
    stop = control[CONTROL_ADDRESS]
    now = _now(c)
    last = now
    waiting = 0
    while load64_acquire(stop) == 0:
        now = _now(c)
        if receive(b, r, f, now) > 0:
            waiting = _step(b, r, t, k, f, x, c, w, now)
            last = now
            c.stats[0].heartbeat_ns = np.uint64(now)
            continue
        if collect(r) > 0:
            last = now
        if waiting:
            waiting = flush(r, c.kicks)
        if now - last < control[CONTROL_SPIN_NS] or waiting or f.waiting_count[0]:
            c.stats[0].yields += np.uint64(1)
            sched_yield()
            continue
        flush_drops(c, now)
        _publish_stats(r, c, now)
        _sleep(c, control)
        last = _now(c)
    tell_drops(c)
    _publish_stats(r, c, now)
