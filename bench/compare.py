"""Two files of results beside each other: what changed, and whether that can be told.

Rule: a difference is said to be one only when its whole interval lies beyond nothing.

Theory. Runs at different times differ by the machine's mood, so beside the plain change stands the
change relative to a peer of the same run (by default the kernel): what happened to both is not
ours. Intervals are 95 %, by bootstrap over the turns of both runs. An interval that holds no change
and is wide says nothing: "too noisy", not "same". Other machines, kernels or versions are named.
"""

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.measure import LESS_IS_BETTER, NEUTRAL, UNITS
from bench.report import IN_FILE, short
from bench.results import CONFIDENCE, DRAWS, OURS, Key, key_of, warnings

TELLING = 0.05  # an interval wider than this on either side of 1 cannot say "same"
PEERS = ("linux", "linux + nft")
BETTER, WORSE, SAME, NOISY = "better", "worse", "same", "too noisy to tell"
STYLES = {BETTER: "green", WORSE: "red", SAME: "dim", NOISY: "yellow"}
FACTS = ("cpu", "cores", "kernel", "virtual")


@dataclass(frozen=True)
class Change:
    """How one number changed: more than 1 is better."""

    key: Key
    before: float
    after: float
    factor: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.low > 1:
            return BETTER
        if self.high < 1:
            return WORSE
        close = self.low > 1 - TELLING and self.high < 1 + TELLING
        return SAME if close else NOISY


def change(key: Key, before: list[float], after: list[float]) -> Change:
    """Return the change between two samples; more than 1 is better."""
    random = np.random.default_rng(len(before) * 1000 + len(after))
    drawn = [_medians(np.asarray(values), random) for values in (before, after)]
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = drawn[1] / drawn[0]
    old, new = statistics.median(before), statistics.median(after)
    if key.quantity in LESS_IS_BETTER:
        factors, factor = 1 / factors, old / new if new else float("inf")
    else:
        factor = new / old if old else float("inf")
    half = (100 - CONFIDENCE) / 2
    low, high = np.nanpercentile(factors, [half, 100 - half])
    if len(before) < 2 or len(after) < 2:  # one turn says nothing about its spread
        low, high = 0.0, float("inf")
    return Change(key, old, new, factor, float(low), float(high))


def _medians(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    picked = values[random.integers(0, len(values), (DRAWS, len(values)))]
    return np.median(picked, axis=1)


def changes(one: dict[str, Any], two: dict[str, Any], relative: str = "") -> list[Change]:
    """Return what both files have. relative: a subject of the same run that all is divided by."""
    first, second = ({key_of(row): row for row in whole["rows"]} for whole in (one, two))
    found = []
    for key in first:
        if key not in second or key.quantity in NEUTRAL:
            continue
        pair = []
        for rows in (first, second):
            turns = rows[key]["turns"]
            if relative:
                base = rows.get(key.of(relative), {}).get("turns", {})
                turns = {t: turns[t] / base[t] for t in turns if base.get(t)}
            pair.append([float(number) for number in turns.values()])
        if all(pair):
            found.append(change(key, *pair))
    return found


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Return what else is not the same, for people."""
    found = []
    for part, names in (("machine", FACTS), ("versions", sorted(_names(one) | _names(two)))):
        for name in names:
            before, after = (whole.get(part, {}).get(name) for whole in (one, two))
            if before != after:
                found.append(f"{name}: {before} -> {after}")
    return found


def _names(whole: dict[str, Any]) -> set[str]:
    return set(whole.get("versions", {}))


def show(
    one: dict[str, Any], two: dict[str, Any], console: Console, everybody: bool = False
) -> int:
    """Print the comparison; return how many numbers of ours became worse."""
    plain = changes(one, two)
    beside = {peer: {found.key: found for found in changes(one, two, peer)} for peer in PEERS}
    table = Table(box=SIMPLE_HEAD, title="change: more than 1 is better", title_justify="left")
    for heading in ("", "before", "after", "x", "95 %", "", *(f"beside {p}" for p in PEERS)):
        table.add_column(heading, justify="left" if not heading else "right")
    worse = 0
    for found in plain:
        key = found.key
        if (key.subject != OURS and not everybody) or key.quantity in IN_FILE:
            continue
        peers = [beside[peer].get(key) for peer in PEERS]
        verdict = found.verdict
        worse += verdict == WORSE and key.subject == OURS
        name = f"{key.scenario}: {key.place}; {key.case}"
        name += f", {key.subject}" if everybody else ""
        table.add_row(
            f"{name}, {UNITS[key.quantity]}",
            short(found.before),
            short(found.after),
            f"{found.factor:.2f}",
            _interval(found),
            f"[{STYLES[verdict]}]{verdict}[/]",
            *(_beside(one) for one in peers),
        )
    console.print(table)
    for line in differences(one, two):
        console.print(f"not the same: {line}", style="yellow", markup=False, highlight=False)
    for name, whole in (("before", one), ("after", two)):
        for line in warnings(whole["noise"]):
            console.print(f"{name}, noisy: {line}", style="yellow", markup=False, highlight=False)
    return worse


def _interval(found: Change) -> str:
    if found.high == float("inf"):
        return "one turn"
    return f"{found.low:.2f}..{found.high:.2f}"


def _beside(found: Change | None) -> str:
    if found is None:
        return ""
    return f"{found.factor:.2f} [{STYLES[found.verdict]}]{_interval(found)}[/]"
