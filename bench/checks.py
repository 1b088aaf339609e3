"""What a user would try: ping, curl, iperf3. Each returns what it measured or raises.

Rule: a check uses the real program and believes only what that program reports.

Theory. The servers run in the pod for as long as the lab does. The page that curl fetches is made
of random bytes and compared by digest, so a corrupted payload with a good checksum is found too.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.lab import LabError, Namespace, Process, eventually
from xdp.artifacts import find

HTTP_PORT = 8080
IPERF_PORT = 5201
RR_PORT = 7777
PAGE = "page.bin"
# iperf3's server takes one test at a time and closes its listener, with whoever waits, in between.
_BETWEEN_TESTS = ("Connection refused", "Connection reset", "server is busy")
PAGE_BYTES = 1 << 20


@dataclass(frozen=True)
class Ping:
    """What ping(8) summed up; times in milliseconds."""

    sent: int
    received: int
    least: float
    average: float
    most: float


@dataclass(frozen=True)
class Stream:
    """What iperf3 summed up."""

    gbits: float  # received, 10^9 bit/s
    retransmits: int


def ping(
    source: Namespace,
    address: str,
    count: int = 3,
    size: int = 56,
    every: float = 0.02,
    wait: float = 5.0,
    options: tuple[str, ...] = (),
) -> Ping:
    """Send `count` echo requests of `size` bytes; LabError unless every one is answered."""
    words = ["ping", "-n", "-c", str(count), "-s", str(size), "-i", str(every), "-W", str(wait)]
    text = source.run(*words, *options, address, timeout=60 + count * wait)
    return parse_ping(text)


def eventually_pings(source: Namespace, address: str, seconds: float = 30.0) -> None:
    """Ping until the first answer; LabError when none comes in time."""

    def answered() -> bool:
        try:
            return bool(ping(source, address, count=1, wait=1))
        except LabError:
            return False

    eventually(answered, f"an answer from {address} to {source.name}", seconds)


def parse_ping(text: str) -> Ping:
    """Read ping's summary; LabError when a packet is missing."""
    counts = re.search(r"(\d+) packets transmitted, (\d+) received", text)
    times = re.search(r"= ([\d.]+)/([\d.]+)/([\d.]+)", text)
    if not counts or not times:
        raise LabError(f"not a summary of ping: {text}")
    sent, received = int(counts[1]), int(counts[2])
    if received < sent:
        raise LabError(f"{sent - received} of {sent} echo requests were not answered: {text}")
    return Ping(sent, received, float(times[1]), float(times[2]), float(times[3]))


@dataclass(frozen=True)
class Servers:
    """What answers in a namespace: HTTP, iperf3, penstock-rr."""

    digest: str  # SHA-256 of the page
    processes: tuple[Process, ...]


def serve(target: Namespace) -> Servers:
    """Start the servers; they listen when this returns."""
    folder = target.lab.folder / f"{target.short}-www"
    folder.mkdir(exist_ok=True)
    page = os.urandom(PAGE_BYTES)
    (folder / PAGE).write_bytes(page)
    http = (sys.executable, "-m", "http.server", "-b", "::", "-d", str(folder), str(HTTP_PORT))
    processes = (
        target.spawn(*http, log=f"{target.short}-http"),
        target.spawn("iperf3", "-s", "-p", str(IPERF_PORT), log=f"{target.short}-iperf3"),
        target.spawn(str(find("penstock-rr")), "server", str(RR_PORT), log=f"{target.short}-rr"),
    )
    for port in (HTTP_PORT, IPERF_PORT, RR_PORT):
        eventually(partial(_listening, target, port), f"a server on {target.name}, port {port}")
    return Servers(hashlib.sha256(page).hexdigest(), processes)


def _listening(target: Namespace, port: int) -> bool:
    return bool(target.run("ss", "-Hltn", f"sport = {port}").strip())


def curl(source: Namespace, address: str, servers: Servers, seconds: float = 20.0) -> float:
    """Fetch the page and compare it; returns Gbit/s as curl saw it. LabError otherwise."""
    url = f"http://{_literal(address)}:{HTTP_PORT}/{PAGE}"
    got = Path(source.lab.folder / f"{source.short}-{os.urandom(4).hex()}")
    try:
        words = ["curl", "-sSf", "-g", "-m", str(seconds), "-o", str(got)]
        speed = source.run(*words, "-w", "%{speed_download}", url, timeout=seconds + 10)
        if hashlib.sha256(got.read_bytes()).hexdigest() != servers.digest:
            raise LabError(f"{url}: the page that arrived is not the page that was sent")
    finally:
        got.unlink(missing_ok=True)
    return float(speed) * 8 / 1e9


def iperf3(
    source: Namespace,
    address: str,
    seconds: int = 1,
    amount: str = "",
    cpu: int | None = None,
    options: tuple[str, ...] = (),
) -> Stream:
    """One TCP stream of whole seconds, or of an amount of bytes ("100M") when one is given."""
    words = ["iperf3", "-c", address, "-p", str(IPERF_PORT), "-J", "--connect-timeout", "5000"]
    words += ["-n", amount] if amount else ["-t", str(seconds)]
    if cpu is not None:
        words = ["taskset", "-c", str(cpu), *words]
    end: dict = {}

    def done() -> bool:
        report = _report(source, [*words, *options], seconds + 60)
        end.update(report.get("end") or {})
        error = report.get("error", "")
        begun = report.get("start", {}).get("connected")
        between = not begun and any(text in error for text in _BETWEEN_TESTS)
        if "sum_received" not in end and not between:
            raise LabError(f"iperf3 to {address}: {error or 'no result'}")
        return "sum_received" in end

    eventually(done, f"an iperf3 server at {address}", 10, 0.1)
    received = end["sum_received"]["bits_per_second"]
    return Stream(received / 1e9, end["sum_sent"].get("retransmits", 0))


def _report(source: Namespace, words: list[str], timeout: float) -> dict:
    """What iperf3 -J printed, whatever its exit status says."""
    try:
        done = subprocess.run(
            source.wrap(words), capture_output=True, text=True, timeout=timeout, check=False
        )
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(words)}: not done within {timeout:g} s") from None
    except ValueError:
        raise LabError(f"{' '.join(words)}: {done.stdout}{done.stderr}") from None


def request_response(
    source: Namespace,
    address: str,
    protocol: str = "tcp",
    seconds: float = 1.0,
    cpu: int | None = None,
    options: Sequence[str] = (),
) -> dict:
    """Run penstock-rr against its server and return what it printed (microseconds)."""
    words = [str(find("penstock-rr")), "client", protocol, address, str(RR_PORT), str(seconds)]
    words += options
    if cpu is not None:
        words = ["taskset", "-c", str(cpu), *words]
    return json.loads(source.run(*words, timeout=seconds + 60))


def _literal(address: str) -> str:
    return f"[{address}]" if ":" in address else address
