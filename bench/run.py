"""`make bench`: Penstock and its peers on the same topology, turn by turn.

Rule: subjects take turns within each measurement; a peer that is not there is skipped with a word.

Theory. Everything is built first, then each turn measures every subject once, so that a slow hour
slows all of them. Results go to bench/results as JSON, with every turn's value, and to a table.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import measure, report, subjects
from bench.lab import Lab, LabError
from bench.subjects import ACROSS, LATENCY, PACKETS, SAME, STREAM, Subject

RESULTS = Path(__file__).parent / "results"
FLOWS = (1, 1024)
Plan = list[tuple[str, str, Callable[[Subject], dict[str, float]]]]


def plan(seconds: float) -> Plan:
    """The measurements: title, kind, function."""
    found: Plan = []
    for flows in FLOWS:
        title = f"64-byte packets, {flows} flow{'s' if flows > 1 else ''}"
        found.append((title, PACKETS, partial(measure.packets, flows=flows, seconds=seconds)))
    whole = max(1, round(seconds))
    found.append(("iperf3, one TCP stream", STREAM, partial(measure.stream, seconds=whole)))
    found.append(
        ("one byte there and back, TCP", LATENCY, partial(measure.latency, seconds=seconds))
    )
    return found


def build(
    stack: ExitStack, scenario: str, wanted: set[str], results: report.Results, console: Console
) -> list[Subject]:
    """Make every subject of a scenario, each in a lab of its own."""
    made = []
    for kind in subjects.SUBJECTS[scenario]:
        if wanted and kind.name not in wanted:
            continue
        console.print(f"building {kind.name}, {scenario}")
        with ExitStack() as own:
            try:
                subject = kind(own.enter_context(Lab()), scenario)
                subjects.prove(subject)
            except LabError as error:
                results.skipped.append(f"{kind.name}, {scenario}: {' '.join(str(error).split())}")
                continue
            stack.push(own.pop_all())
        results.remarks[kind.name] = kind.remark
        made.append(subject)
    return made


def turns(
    made: list[Subject],
    scenario: str,
    runs: int,
    measurements: Plan,
    results: report.Results,
    console: Console,
) -> None:
    """Measure every subject once a turn."""
    columns = (TextColumn("{task.description:<60}"), BarColumn(), MofNCompleteColumn())
    count = runs * sum(kind in one.measures for _, kind, _ in measurements for one in made)
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(scenario, total=count)
        for turn in range(runs):
            for title, kind, function in measurements:
                for subject in made:
                    if kind not in subject.measures:
                        continue
                    progress.update(task, description=f"{scenario}: {title}, {subject.name}")
                    try:
                        found = function(subject)
                    except LabError as error:
                        text = " ".join(str(error).split())[:300]
                        results.skipped.append(f"turn {turn + 1}, {title}, {subject.name}: {text}")
                    else:
                        results.add(scenario, title, subject.name, turn, found)
                    progress.advance(task)


def main() -> int:
    """Entry of `make bench`."""
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="turns")
    parser.add_argument("--seconds", type=float, default=2.0, help="a measurement's window")
    parser.add_argument("--scenario", choices=("same", "across"), action="append")
    parser.add_argument("--subject", action="append", default=[], help="only these, by name")
    parser.add_argument("--kind", choices=(PACKETS, STREAM, LATENCY), action="append")
    parser.add_argument("--json", type=Path, help="where results go")
    options = parser.parse_args()
    if os.geteuid():
        parser.error("network namespaces and XDP need root")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    results = report.Results()
    measurements = [one for one in plan(options.seconds) if one[1] in (options.kind or one[1])]
    names = {"same": SAME, "across": ACROSS}
    for word in options.scenario or names:
        with ExitStack() as stack:
            made = build(stack, names[word], set(options.subject), results, console)
            turns(made, names[word], options.runs, measurements, results, console)
    report.show(results, console)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    path = options.json or RESULTS / f"{stamp}.json"
    about = {"machine": measure.machine(), "runs": options.runs, "seconds": options.seconds}
    measure.dump(path, {**about, "results": results.plain(), "skipped": results.skipped})
    console.print(f"written to {path}")
    return 0 if results.values else 1


if __name__ == "__main__":
    sys.exit(main())
