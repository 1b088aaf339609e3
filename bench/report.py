"""Results as a table on the terminal.

Rule: whatever is shown is in the file of results; a table is made of a file.

Theory. One table a place and case: subjects below each other, for each quantity the median, its 95
% interval, and how many times better Penstock was. A run on a noisy machine says so below.
"""

import sys
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.measure import UNITS
from bench.results import OURS, warnings

Rows = list[dict[str, Any]]
IN_FILE = frozenset({"softirq_ns", "sender_ns", "p999_us"})
"""Quantities that only the file has."""
HEADLINES = frozenset({"pps", "ndr", "pdr", "gbits", "per_s", "p50_us", "p99_us"})
"""Quantities that the README's table has."""
MAIN = {"pps": "M packets/s", "gbits": "Gbit/s", "per_s": "thousand a second"}
"""Quantities that have bars, and what their axis says."""
WIDE = 160


def terminal() -> Console:
    """Return a console for stdout, wide where nobody looks at it."""
    return Console(width=None if sys.stdout.isatty() else WIDE)


def groups(whole: dict[str, Any]) -> Iterator[tuple[tuple[str, str, str], Rows]]:
    """Yield (scenario, place, case) and its rows, in the order in which they were measured."""
    found: dict[tuple[str, str, str], Rows] = {}
    for row in whole["rows"]:
        found.setdefault((row["scenario"], row["place"], row["case"]), []).append(row)
    yield from found.items()


def show(whole: dict[str, Any], console: Console) -> None:
    """Print everything."""
    for (scenario, place, case), rows in groups(whole):
        csit = whole["scenarios"].get(scenario, {}).get("csit")
        title = f"{scenario}: {place}; {case}" + (f"  ({csit})" if csit else "")
        console.print(_table(title, rows))
    for subject, remark in whole["remarks"].items():
        console.print(f"{subject}: {remark}", markup=False, highlight=False)
    console.print(
        "median, 95 % interval; x: how many times better penstock is, turn by turn",
        highlight=False,
    )
    for line in whole["skipped"]:
        console.print(f"skipped: {line}", style="yellow", markup=False, highlight=False)
    checks = whole["counters"]
    if checks["checks"]:
        good = checks["exact"] == checks["checks"]
        console.print(
            f"counters: in = forwarded + dropped by reason in {checks['exact']} of "
            f"{checks['checks']} measurements, to the packet",
            style="green" if good else "red",
            highlight=False,
        )
    for line in warnings(whole["noise"]):
        console.print(f"noisy: {line}", style="yellow", highlight=False)


def _table(title: str, rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    quantities = [q for q in dict.fromkeys(row["quantity"] for row in rows) if q not in IN_FILE]
    for quantity in quantities:
        table.add_column(UNITS[quantity], justify="right")
        table.add_column("x", justify="right", no_wrap=True)
    by = {(row["subject"], row["quantity"]): row for row in rows}
    for subject in dict.fromkeys(row["subject"] for row in rows):
        cells = [subject]
        for quantity in quantities:
            cells += cells_of(by.get((subject, quantity)))
        table.add_row(*cells)
    return table


def cells_of(row: dict[str, Any] | None) -> list[str]:
    """Return median with interval, and ratio."""
    if row is None:
        return ["-", ""]
    low, high = row["interval"]
    text = short(row["median"])
    if low != high:
        text += f"\n[dim]{short(low)}..{short(high)}[/dim]"
    ratio = row.get("penstock_is_better_by")
    return [text, "" if ratio is None else f"{ratio:.2f}"]


def short(number: float) -> str:
    """Return three digits or so."""
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}"


def markdown(whole: dict[str, Any]) -> str:
    """Return the main numbers as a table for the README: a row a case."""
    lines = [
        "| case | penstock | beside (x: how many times better) | scenario |",
        "|---|---|---|---|",
    ]
    for (scenario, place, case), rows in groups(whole):
        for quantity in dict.fromkeys(row["quantity"] for row in rows):
            if quantity not in HEADLINES:
                continue
            mine = [row for row in rows if row["quantity"] == quantity]
            ours = next((row for row in mine if row["subject"] == OURS), None)
            if ours is None:
                continue
            beside = [
                f"{row['subject']} {short(row['median'])} (**{row['penstock_is_better_by']:.2f}**)"
                for row in mine
                if "penstock_is_better_by" in row
            ]
            unit = UNITS[quantity]
            lines.append(
                f"| {place}; {case} | {short(ours['median'])} {unit} | {'; '.join(beside)} "
                f"| `{scenario}` |"
            )
    machine, run = whole.get("machine", {}), whole.get("run", {})
    about = f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores, Linux "
    about += f"{machine.get('kernel', '?')}; median of {run.get('turns', '?')} interleaved turns; "
    lines += ["", about + f"`{run.get('command', '')}`."]
    lines += [f"- Noisy: {line}." for line in warnings(whole["noise"])]
    return "\n".join(lines) + "\n"
