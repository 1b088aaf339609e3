"""The engine alone, from memory: ns a packet and stage, and new connections a second. `make
engine`.

Rule: what is measured is one compiled call; Python's part is nothing.

Theory. A measurement sends vectors of 256 through the stages in turn; a second one stops a stage
earlier, and the difference is the stage. Established flows have all been seen before; new
connections are timed from an empty table. The least of many repeats is the machine's own speed, the
median is what one gets beside its neighbours. The cases are those of engine_world.py.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.engine_world import POD_CASE, SERVICE_CASE, STAGES, VECTOR, VXLAN_CASE, Case, World

WAYS = (POD_CASE, VXLAN_CASE, SERVICE_CASE)
LAST = len(STAGES) - 1


def _time(world: World, last: int, vectors: int) -> float:
    """Return ns a packet of the stages up to `last`."""
    start = time.perf_counter_ns()
    world.run(last, vectors)
    return (time.perf_counter_ns() - start) / (vectors * VECTOR)


def stages(world: World, repeats: int, vectors: int) -> dict[str, Any]:
    """Return for each stage and their sums: least and median ns a packet of established flows."""
    world.warm()
    rows = [[_time(world, last, vectors) for last in range(len(STAGES))] for _ in range(repeats)]
    found = {}
    for number, name in enumerate(STAGES[1:], 1):
        found[name] = _between(rows, number - 1, number)
    found["parse..forward"] = _between(rows, 0, STAGES.index("forward"))
    return found


def connections(world: World, repeats: int) -> dict[str, float]:
    """Return least and median ns of a new connection, its packet's whole way included."""
    vectors = world.frames // VECTOR
    times = []
    for _ in range(repeats):
        world.forget()
        times.append(_time(world, LAST, vectors) - _time(world, 0, vectors))
    return {"least": round(min(times), 1), "median": round(statistics.median(times), 1)}


def _between(rows: list[list[float]], before: int, after: int) -> dict[str, float]:
    """Least and median of what stands between two cumulative columns."""
    first, last = ([row[column] for row in rows] for column in (before, after))
    return {
        "least": round(min(last) - min(first), 1),
        "median": round(statistics.median(last) - statistics.median(first), 1),
    }


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Return everything about one case."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="penstock-engine-") as folder:
        world = World(Path(folder), case)
        vectors = min(max(400, world.frames // VECTOR), 4096)
        found = stages(world, repeats, vectors)
        fresh = connections(world, 5) if case.flows >= 10_000 else None
        world.close()
    return {"way": case.way, "flows": case.flows, "ns": found, "new": fresh}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; --json FILE keeps the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, 1 k and 100 k flows")
    parser.add_argument("--flows", type=int, nargs="*", help="numbers of flows, up to 6 million")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    flows = options.flows or ([1000, 100_000] if options.quick else [1, 1000, 100_000, 1_000_000])
    results = []
    for way in WAYS:
        for count in flows:
            repeats = 7 if options.quick or count > 100_000 else 21
            results.append(measure(Case(way, count), repeats))
            print(f"{way}, {count:,} flows: done", file=sys.stderr)
    _print(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


def _print(results: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="ns a packet: median (least)", title_justify="left")
    names = [*STAGES[1:], "parse..forward"]
    for name in ("way", "flows", *names, "new, ns", "new, M/s"):
        table.add_column(name, justify="right")
    for row in results:
        cells = [f"{row['ns'][name]['median']} ({row['ns'][name]['least']})" for name in names]
        new = row["new"]
        cells += [f"{new['median']} ({new['least']})", f"{1e3 / new['median']:.2f}"] if new else []
        table.add_row(row["way"], f"{row['flows']:,}", *cells)
    Console(width=None if sys.stdout.isatty() else 220).print(table)


if __name__ == "__main__":
    sys.exit(main())
