"""`make run`: two nodes, four pods, everything between them, a story, then a live view.

Rule: whatever happens, the machine is left as it was; `--once` exits non-zero if a check failed.

Theory. The nodes are network namespaces on a veth underlay that behaves as a wire. Pings run side
by side, then transfers by curl, which fill queues; iperf3 alone, since it measures. A transfer
within a node is larger than one across, so that each takes about as long. The story is that of
bench/story.py. The live view ends with Ctrl-C.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import checks, live, story
from bench.lab import Lab, LabError, Namespace
from bench.penstock import Cluster, Settings
from xdp.artifacts import find

AMOUNT = {True: "500M", False: "60M"}  # a transfer: same node or not
AT_ONCE = 4


@dataclass
class Place:
    """Where traffic starts or ends: a pod or a node."""

    name: str
    node: str
    namespace: Namespace
    addresses: dict[int, str]
    is_pod: bool
    servers: checks.Servers | None = None


@dataclass
class Pair:
    """What was found between two places, by family."""

    source: Place
    target: Place
    ping: dict[int, checks.Ping] = field(default_factory=dict)
    fetch: dict[int, float] = field(default_factory=dict)
    stream: dict[int, checks.Stream] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def same_node(self) -> bool:
        """Whether no underlay lies between."""
        return self.source.node == self.target.node

    def attempt(
        self, family: int, found: dict, check: Callable[..., Any], *arguments: Any, **options: Any
    ) -> None:
        """Check from the source to the target; keep what was found, or the error."""
        try:
            address = self.target.addresses[family]
            found[family] = check(self.source.namespace, address, *arguments, **options)
        except LabError as error:
            one_line = " ".join(str(error).split())[:400]
            where = f"{self.source.name} -> {self.target.name}, IPv{family}"
            self.errors.append(f"{where}, {check.__name__}: {one_line}")

    def echo(self) -> None:
        """Ping in both families."""
        for family in self.target.addresses:
            self.attempt(family, self.ping, checks.ping)

    def load(self) -> None:
        """Fetch the page in both families."""
        for family in self.target.addresses:
            self.attempt(family, self.fetch, checks.curl, self.target.servers)

    def measure(self) -> None:
        """One TCP stream a family."""
        for family in self.target.addresses:
            self.attempt(family, self.stream, checks.iperf3, amount=AMOUNT[self.same_node])


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        yield progress


def build(lab: Lab, settings: Settings, progress: Progress) -> tuple[Cluster, list[Place]]:
    """Start two nodes, attach two pods on each, start servers everywhere."""
    task = progress.add_task("two nodes: start the daemons", total=2)
    cluster = Cluster(lab, settings).start()
    progress.update(task, advance=2)
    task = progress.add_task("four pods: attach by CNI", total=4)
    places = []
    for node in cluster.nodes:
        places.append(Place(node.name, node.name, node.namespace, node.addresses, False))
        for letter in "ab":
            pod = node.pod(f"pod{node.number}{letter}")
            places.append(Place(pod.name, node.name, pod.namespace, pod.addresses, True))
            progress.update(task, advance=1)
    task = progress.add_task("servers in pods and nodes", total=len(places))
    for place in places:
        place.servers = checks.serve(place.namespace)
        progress.update(task, advance=1)
    return cluster, places


def check(places: list[Place], progress: Progress) -> list[Pair]:
    """Try every pair in which a pod takes part; streams between pods only."""
    pairs = [
        Pair(source, target)
        for source in places
        for target in places
        if source is not target and (source.is_pod or target.is_pod)
    ]
    for title, step in (("ping, IPv4 and IPv6", Pair.echo), ("curl, IPv4 and IPv6", Pair.load)):
        task = progress.add_task(title, total=len(pairs))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(step, pairs):
                progress.update(task, advance=1)
    streams = [pair for pair in pairs if pair.source.is_pod and pair.target.is_pod]
    task = progress.add_task("iperf3, IPv4 and IPv6", total=len(streams))
    for pair in streams:
        pair.measure()
        progress.update(task, advance=1)
    return pairs


def follow(told: story.Story, progress: Progress) -> None:
    """Tell the story; its service stays, its policy is lifted at the end."""
    task = progress.add_task("service, policy, names", total=told.length)
    for _ in told.tell():
        progress.update(task, advance=1)


def table(pairs: list[Pair]) -> Table:
    """What was found, one row a pair."""
    found = Table(
        title="ping: average round trip, ms; curl: 1 MiB, compared; TCP: iperf3, Gbit/s",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for heading in ("from", "to", "path"):
        found.add_column(heading, no_wrap=True)
    for heading in ("ping v4", "v6", "curl v4", "v6", "TCP v4", "v6"):
        found.add_column(heading, justify="right", no_wrap=True)
    found.add_column("result", no_wrap=True)
    order = sorted(pairs, key=lambda p: (p.source.is_pod + p.target.is_pod < 2, not p.same_node))
    for pair in order:
        cells = [pair.source.name, pair.target.name, "node" if pair.same_node else "across"]
        cells += [f"{pair.ping[f].average:.2f}" if f in pair.ping else "-" for f in (4, 6)]
        cells += ["ok" if f in pair.fetch else "-" for f in (4, 6)]
        cells += [f"{pair.stream[f].gbits:.1f}" if f in pair.stream else "" for f in (4, 6)]
        found.add_row(*cells, "[red]failed[/red]" if pair.errors else "[green]ok[/green]")
    return found


def background(places: list[Place]) -> None:
    """A little traffic for the live view; it ends with the lab."""
    pods = [place for place in places if place.is_pod]
    for number, pod in enumerate(pods):
        following = pods[(number + 1) % len(pods)]
        for address in following.addresses.values():
            pod.namespace.spawn("ping", "-n", "-i", "0.1", address)
    far = next(pod for pod in pods if pod.node != pods[0].node)
    words = ("iperf3", "-c", far.addresses[4], "-p", str(checks.IPERF_PORT), "-t", "86400")
    pods[0].namespace.spawn(*words, "-b", "100M")


def run(console: Console, settings: Settings, once: bool, seconds: float | None) -> int:
    """The whole demonstration; returns the exit status."""
    start = time.monotonic()
    with Lab() as lab:
        try:
            with _progress(console) as progress:
                cluster, places = build(lab, settings, progress)
                pairs = check(places, progress)
                told = story.Story(cluster)
                follow(told, progress)
            console.print(table(pairs))
            console.print(told.show())
            errors = [error for pair in pairs for error in pair.errors] + told.errors()
            for error in errors:
                console.print(error, style="red", markup=False)
            passed = time.monotonic() - start
            console.print(f"{len(pairs)} pairs, {len(errors)} failures, {passed:.0f} s")
            if not once:
                background(places)
                console.print("live view; Ctrl-C ends it and removes everything")
                with contextlib.suppress(KeyboardInterrupt):
                    live.show(cluster.nodes, console, seconds)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not stop this
            console.print("\nremoving pods, nodes and files")
        for node in cluster.nodes:
            for pod in list(node.pods):
                pod.delete()
        cluster.stop()
    return 1 if errors else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Entry of `make run`."""
    parser = argparse.ArgumentParser(prog="bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--once", action="store_true", help="no live view; exit status tells")
    parser.add_argument("--seconds", type=float, help="end the live view after so long")
    parser.add_argument("--mode", choices=("overlay", "direct"), default="overlay")
    parser.add_argument("--tunnel", choices=("vxlan", "geneve"), default="vxlan")
    parser.add_argument("--underlay", type=int, choices=(4, 6), default=4)
    options = parser.parse_args()
    if os.geteuid():
        parser.error("network namespaces and XDP need root: sudo make run")
    find("penstock.bpf.o")
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    settings = Settings(options.mode, options.tunnel, options.underlay)
    console = Console()
    try:
        return run(console, settings, options.once, options.seconds)
    except KeyboardInterrupt:
        return 130
    except LabError as error:
        console.print(str(error), style="red", markup=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())
