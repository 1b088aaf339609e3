"""The measurements, by name: numbers of one subject in one case.

Rule: a measurement returns numbers in the units of UNITS; what went wrong is a LabError.

Theory. Frames come from a driver (bench/drivers), programs are what a user would run: iperf3, our
own requests (rr.c), dnsperf. Servers run for the measurement only. Requests have both ends on one
core, where the scheduler adds least; streams run anywhere. Rates of several subjects are compared
turn by turn (results.py), so a measurement is short and done often. Latency under load is taken at
shares of the subject's own throughput of the same turn.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from bench import checks, searches
from bench.drivers import driver
from bench.histogram import Histogram
from bench.lab import LabError, Namespace, Process, eventually
from bench.rules import DNS_PORT
from bench.scenario import FRAMES, Case
from bench.subjects.base import GENERATOR_CPU, Subject
from bench.traffic import FRAME_MOST, sizes
from bench.usage import Usage, between, moment
from xdp.artifacts import find

UNITS = {
    "pps": "Mpps",
    "ndr": "NDR Mpps",
    "pdr": "PDR Mpps",
    "burst": "frames",
    "busy_ns": "CPU ns/packet",
    "softirq_ns": "softirq ns/packet",
    "own_ns": "forwarder ns/packet",
    "sender_ns": "generator ns/packet",
    "gbits": "Gbit/s",
    "per_s": "k/s",
    "cores": "cores busy",
    "mean_us": "mean us",
    "p50_us": "p50 us",
    "p99_us": "p99 us",
    "p999_us": "p99.9 us",
}
for _share in searches.SHARES:
    UNITS |= {f"p50_{_share}_us": f"p50 us at {_share} %", f"p99_{_share}_us": f"p99 at {_share} %"}
LESS_IS_BETTER = frozenset(name for name in UNITS if name.endswith(("_ns", "_us")))
NEUTRAL = frozenset({"cores"})


@dataclass
class Found:
    """What a measurement found."""

    numbers: dict[str, float]
    usage: Usage | None = None
    histograms: dict[str, Histogram] = field(default_factory=dict)
    curve: list[tuple[float, float]] = field(default_factory=list)  # offered, share lost
    frames: tuple[int, int] = (0, 0)  # sent, arrived: of all that was sent


@dataclass(frozen=True)
class How:
    """What is the same for all measurements of a run."""

    seconds: float = 2.0
    driver: str = "frames"
    options: Mapping[str, str] = field(default_factory=dict)
    goal: searches.Goal = searches.QUICK


Memo = dict[tuple[int, object], float]
"""Throughput of subjects in this turn, by (id of subject, traffic)."""


def measure(subject: Subject, case: Case, how: How, memo: Memo) -> Found:
    """Measure one case of one subject, within its turn. Raises LabError."""
    with subject.turn(case.measure):
        if case.measure in FRAMES:
            with driver(_driver(case, how)).open_session(subject, case, how.options) as session:
                return _FRAMES[case.measure](session, subject, case, how, memo)
        return _PROGRAMS[case.measure](subject, case, how)


def _driver(case: Case, how: How) -> str:
    """The driver that was asked for, or the one that can make such frames."""
    largest = max(sizes(case.traffic.size, case.place.family))
    return "pcap" if how.driver == "frames" and largest > FRAME_MOST else how.driver


# --- frames ---------------------------------------------------------------------------------------


def _most(session, subject: Subject, case: Case, how: How, memo: Memo) -> Found:
    trial = session.flood(how.seconds)
    if not trial.arrived:
        raise LabError(f"{subject.name}: no packet arrived of {trial.sent}")
    numbers = {"pps": trial.delivered / 1e6}
    if trial.usage:
        numbers |= trial.usage.per(trial.arrived)
    memo.setdefault((id(subject), case.traffic), 0.9 * trial.delivered)
    return Found(numbers, trial.usage, frames=(trial.sent, trial.arrived))


def _search(session, subject: Subject, case: Case, how: How, memo: Memo) -> Found:
    most = 1.2 * session.flood(min(how.seconds, 0.5)).delivered
    found = searches.throughput(session, most, how.goal)
    memo[id(subject), case.traffic] = found.pdr or found.ndr or most / 2
    return Found({"ndr": found.ndr / 1e6, "pdr": found.pdr / 1e6})


def _base(session, subject: Subject, case: Case, memo: Memo) -> float:
    """The throughput that shares are taken of: searched for in this turn, or near it."""
    key = (id(subject), case.traffic)
    if key not in memo:
        memo[key] = 0.9 * session.flood(0.5).delivered
    return memo[key]


def _latency(session, subject: Subject, case: Case, how: How, memo: Memo) -> Found:
    found = searches.latencies(session, _base(session, subject, case, memo), how.seconds)
    numbers, histograms = {}, {}
    for share, trial in found.items():
        if not trial.times.count:
            raise LabError(f"{subject.name}: nothing that was stamped arrived at {share} %")
        numbers[f"p50_{share}_us"] = trial.times.percentile(50) / 1000
        numbers[f"p99_{share}_us"] = trial.times.percentile(99) / 1000
        histograms[f"{share} %"] = trial.times
    return Found(numbers, histograms=histograms)


def _loss(session, subject: Subject, case: Case, how: How, memo: Memo) -> Found:
    base = session.flood(min(how.seconds, 0.5)).delivered
    curve = searches.loss_curve(session, base, min(how.seconds, 1.0))
    lossless = [offered for offered, loss in curve if loss == 0]
    numbers = {"ndr": max(lossless) / 1e6} if lossless else {"ndr": 0.0}
    return Found(numbers, curve=curve)


def _burst(session, subject: Subject, case: Case, how: How, memo: Memo) -> Found:
    return Found({"burst": float(searches.longest_burst(session))})


_FRAMES: dict[str, Callable[..., Found]] = {
    "most": _most, "search": _search, "latency": _latency, "loss": _loss, "burst": _burst,
}  # fmt: skip


# --- programs -------------------------------------------------------------------------------------


@contextmanager
def _served(subject: Subject, command: list[str], port: int, cpus: frozenset[int]) -> Iterator:
    """A server in the server pod, for the body."""
    server = subject.server.namespace
    process = server.spawn(*command, cpus=cpus)
    try:
        eventually(partial(_listens, server, process, port), f"{command[0]} on {server.name}")
        yield
    finally:
        process.stop()


def _listens(server: Namespace, process: Process, port: int) -> bool:
    if not process.alive:
        raise LabError(f"{' '.join(process.command)} has ended: {process.output()[-500:]}")
    return bool(server.run("ss", "-Hlntu", f"sport = {port}").strip())


def _watched(subject: Subject, work: Callable[[], dict]) -> tuple[dict, Usage]:
    own = list(subject.pids())
    before = moment(own)
    found = work()
    return found, between(before, moment(own))


def _stream(subject: Subject, case: Case, how: How) -> Found:
    port = checks.IPERF_PORT
    several = ("-P", str(case.connections)) if case.connections > 1 else ()
    seconds = max(1, round(how.seconds))

    def work() -> dict:
        client, target = subject.client.namespace, subject.target
        return {"gbits": checks.iperf3(client, target, seconds, options=several).gbits}

    with _served(subject, ["iperf3", "-s", "-p", str(port)], port, frozenset()):
        found, usage = _watched(subject, work)
    return Found({**found, "cores": usage.busy / usage.wall}, usage)


def _requests(subject: Subject, case: Case, how: How) -> Found:
    kind = "crr" if case.measure == "crr" else "tcp"
    words = ["-b"]
    words += ["-n", str(case.connections)] if case.connections > 1 or case.rate else []
    words += ["-r", str(case.rate)] if case.rate else []

    def work() -> dict:
        return checks.request_response(
            subject.client.namespace, subject.target, kind, how.seconds, GENERATOR_CPU, words
        )

    one_core = frozenset({GENERATOR_CPU})
    server = [str(find("penstock-rr")), "server", str(checks.RR_PORT)]
    with _served(subject, server, checks.RR_PORT, one_core):
        found, usage = _watched(subject, work)
    times = found["response" if case.rate else "service"]
    numbers = {"per_s": found["rate"] / 1000}
    numbers |= {name: times[name] for name in ("p50_us", "p99_us", "p999_us")}
    histogram = Histogram.of_pairs([(value, count) for value, count in times["buckets"]])
    return Found(numbers, usage, {"response" if case.rate else "service": histogram})


def _dns(subject: Subject, case: Case, how: How) -> Found:
    for program in ("dnsperf", "dnsmasq"):
        if shutil.which(program) is None:
            raise LabError(f"{program} is not installed: make bench installs it")
    server = ["dnsmasq", "--keep-in-foreground", f"--port={DNS_PORT}", "--no-resolv", "--no-hosts"]
    server += ["--address=/bench.test/192.0.2.53", "--pid-file=", "--user=root", "--conf-file=-"]
    names = subject.lab.folder / "names"
    names.write_text("".join(f"name{n}.bench.test A\n" for n in range(1000)))
    words = ["dnsperf", "-s", subject.target, "-p", str(DNS_PORT), "-d", str(names)]
    words += ["-c", str(case.connections), "-l", str(max(1, round(how.seconds)))]

    def work() -> dict:
        return parse_dnsperf(subject.client.namespace.run(*words, timeout=how.seconds + 60))

    with _served(subject, server, DNS_PORT, frozenset()):
        found, usage = _watched(subject, work)
    return Found(found, usage)


def parse_dnsperf(text: str) -> dict[str, float]:
    """Return rate and mean time of dnsperf's summary; LabError when it is none."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.strip().partition(":")
        if name == "Queries per second":
            found["per_s"] = float(rest) / 1000
        elif name == "Average Latency (s)":
            found["mean_us"] = float(rest.split()[0]) * 1e6
    if "per_s" not in found:
        raise LabError(f"not a summary of dnsperf: {text[-500:]}")
    return found


_PROGRAMS: dict[str, Callable[[Subject, Case, How], Found]] = {
    "stream": _stream, "rr": _requests, "crr": _requests, "dns": _dns,
}  # fmt: skip


def prepare(subject: Subject) -> None:
    """Make both ends fit for many short connections, and prove that they reach each other once."""
    for end in (subject.client, subject.server):
        end.namespace.sysctl(
            {"net.ipv4.tcp_tw_reuse": 1, "net.ipv4.ip_local_port_range": "1024 65535"}
        )
    programs = not subject.measures <= FRAMES
    with subject.turn("rr" if programs else "most"):
        if not programs:
            subject.next_hop()
            return
        server = [str(find("penstock-rr")), "server", str(checks.RR_PORT)]
        with _served(subject, server, checks.RR_PORT, frozenset()):
            eventually(partial(_answers, subject), f"{subject.name}: an answer from the server")


def _answers(subject: Subject) -> bool:
    rr, port = str(find("penstock-rr")), str(checks.RR_PORT)
    command = ["timeout", "5", rr, "client", "tcp", subject.target, port, "0.01"]
    try:
        return bool(json.loads(subject.client.namespace.run(*command, timeout=10)))
    except (LabError, ValueError):
        return False
