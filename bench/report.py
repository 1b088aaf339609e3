"""Results as a table: median, spread, and how Penstock compares.

Rule: a ratio is the median of the ratios of turns that stood side by side, never of two medians.

Theory. The machine is shared and drifts; two subjects measured a second apart drift together. More
than 1 always means that Penstock is better, whatever the direction of the unit.
"""

import statistics
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.measure import LESS_IS_BETTER, UNITS

OURS = "penstock"


@dataclass
class Results:
    """Values by (scenario, measurement, subject, quantity), one a turn; None: it failed."""

    values: dict[tuple[str, str, str, str], dict[int, float]] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def add(self, scenario: str, what: str, subject: str, turn: int, found: dict) -> None:
        """Keep what one turn found."""
        for quantity, number in found.items():
            self.values.setdefault((scenario, what, subject, quantity), {})[turn] = number

    def ratio(self, key: tuple[str, str, str, str]) -> float | None:
        """How many times better Penstock was than this subject; None: not comparable."""
        scenario, what, subject, quantity = key
        ours = self.values.get((scenario, what, OURS, quantity), {})
        theirs = self.values[key]
        both = [turn for turn in ours if turn in theirs and ours[turn] and theirs[turn]]
        if subject == OURS or not both:
            return None
        ratios = [ours[turn] / theirs[turn] for turn in both]
        if quantity in LESS_IS_BETTER:
            ratios = [1 / one for one in ratios]
        return statistics.median(ratios)

    def plain(self) -> list[dict]:
        """Rows for JSON, every turn's value among them."""
        names = ("scenario", "measurement", "subject", "quantity")
        rows = []
        for key, turns in self.values.items():
            numbers = list(turns.values())
            rows.append(
                {
                    **dict(zip(names, key, strict=True)),
                    "unit": UNITS[key[3]],
                    "median": statistics.median(numbers),
                    "least": min(numbers),
                    "most": max(numbers),
                    "penstock_is_better_by": self.ratio(key),
                    "turns": turns,
                }
            )
        return rows


def show(results: Results, console: Console) -> None:
    """Print a table for each scenario and measurement."""
    groups: dict[tuple[str, str], list[tuple[str, str, str, str]]] = {}
    for key in results.values:
        groups.setdefault(key[:2], []).append(key)
    for (scenario, what), keys in groups.items():
        table = Table(title=f"{scenario}: {what}", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("", no_wrap=True)
        quantities = list(dict.fromkeys(key[3] for key in keys))
        for quantity in quantities:
            table.add_column(UNITS[quantity], justify="right")
            table.add_column("x", justify="right", no_wrap=True)
        for subject in dict.fromkeys(key[2] for key in keys):
            cells = [subject]
            for quantity in quantities:
                cells += _cells(results, (scenario, what, subject, quantity))
            table.add_row(*cells)
        console.print(table)
    for subject, remark in results.remarks.items():
        console.print(f"{subject}: {remark}", markup=False, highlight=False)
    console.print("median and least..most of the turns; x: how many times better penstock is")
    for line in results.skipped:
        console.print(f"skipped: {line}", style="yellow", markup=False)


def _cells(results: Results, key: tuple[str, str, str, str]) -> list[str]:
    if key not in results.values:
        return ["-", ""]
    numbers = list(results.values[key].values())
    middle, least, most = statistics.median(numbers), min(numbers), max(numbers)
    ratio = results.ratio(key)
    text = f"{_short(middle)}\n[dim]{_short(least)}..{_short(most)}[/dim]"
    return [text, "" if ratio is None else f"{ratio:.2f}"]


def _short(number: float) -> str:
    if number >= 100:
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}"
