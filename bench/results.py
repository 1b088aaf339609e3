"""Results: every turn's number, what they say together, and how sure that is.

Rule: a ratio is the median of the ratios of turns that stood side by side, never of two medians.

Theory. The machine is shared and drifts; two subjects measured a second apart drift together. More
than 1 always means that Penstock is better, whatever the direction of the unit. Intervals are 95 %,
by bootstrap over turns: no shape of the noise is assumed. A file of results has all turns, so it
can be compared and drawn again later.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.lab import LabError
from bench.measure import LESS_IS_BETTER, NEUTRAL, UNITS

OURS = "penstock"
SCHEMA = 2
DRAWS = 2000
CONFIDENCE = 95.0


@dataclass(frozen=True, order=True)
class Key:
    """What a number is of."""

    scenario: str
    place: str
    case: str
    subject: str
    quantity: str

    def of(self, subject: str) -> "Key":
        """The same of another subject."""
        return Key(self.scenario, self.place, self.case, subject, self.quantity)


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[np.ndarray], np.ndarray] = lambda drawn: np.median(drawn, axis=-1),
    draws: int = DRAWS,
) -> tuple[float, float]:
    """Return the interval in which the statistic of further such values would lie."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return float(array[0]), float(array[0])
    random = np.random.default_rng(len(array))
    drawn = array[random.integers(0, len(array), (draws, len(array)))]
    half = (100 - CONFIDENCE) / 2
    low, high = np.percentile(statistic(drawn), [half, 100 - half])
    return float(low), float(high)


def variation(values: Sequence[float]) -> float:
    """Return the coefficient of variation: standard deviation over mean."""
    mean = statistics.fmean(values)
    return statistics.stdev(values) / mean if len(values) > 1 and mean else 0.0


@dataclass
class Results:
    """Numbers by key and turn, and all that was said about them."""

    values: dict[Key, dict[int, float]] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    scenarios: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)
    histograms: list[dict[str, Any]] = field(default_factory=list)
    balances: list[dict[str, Any]] = field(default_factory=list)
    noise: list[dict[str, Any]] = field(default_factory=list)

    def add(self, key: Key, turn: int, number: float) -> None:
        """Keep what one turn found."""
        self.values.setdefault(key, {})[turn] = number

    def ratios(self, key: Key) -> list[float]:
        """How many times better Penstock was than this subject, by turn; empty: not comparable."""
        ours, theirs = self.values.get(key.of(OURS), {}), self.values.get(key, {})
        if key.subject == OURS or key.quantity in NEUTRAL:
            return []
        both = [turn for turn in ours if turn in theirs and ours[turn] and theirs[turn]]
        found = [ours[turn] / theirs[turn] for turn in both]
        return [1 / one for one in found] if key.quantity in LESS_IS_BETTER else found

    def ratio(self, key: Key) -> float | None:
        """The median of the ratios; None: not comparable."""
        found = self.ratios(key)
        return statistics.median(found) if found else None

    def rows(self) -> list[dict[str, Any]]:
        """Rows for JSON, every turn's value among them."""
        rows = []
        for key, turns in self.values.items():
            numbers, ratios = list(turns.values()), self.ratios(key)
            row = {
                **vars(key),
                "unit": UNITS[key.quantity],
                "median": statistics.median(numbers),
                "least": min(numbers),
                "most": max(numbers),
                "interval": bootstrap(numbers),
                "variation": round(variation(numbers), 4),
                "turns": turns,
            }
            if ratios:
                row["penstock_is_better_by"] = statistics.median(ratios)
                row["better_interval"] = bootstrap(ratios)
            rows.append(row)
        return rows

    def plain(self, about: dict[str, Any]) -> dict[str, Any]:
        """Everything for JSON."""
        exact = [one["exact"] for one in self.balances]
        return {
            "schema": SCHEMA,
            **about,
            "noise": self.noise_summary(),
            "counters": {"checks": len(exact), "exact": sum(exact)},
            "scenarios": self.scenarios,
            "remarks": self.remarks,
            "skipped": self.skipped,
            "rows": self.rows(),
            "curves": self.curves,
            "histograms": self.histograms,
            "balances": self.balances,
        }

    def noise_summary(self) -> dict[str, float]:
        """How much of the machine others had while we measured, and how steady it was."""
        found: dict[str, float] = {}
        for name in ("steal_share", "foreign_share", "yardstick_us"):
            numbers = [one[name] for one in self.noise if name in one]
            if numbers:
                found[name] = round(statistics.fmean(numbers), 4)
                found[f"{name}_most"] = round(max(numbers), 4)
        sticks = [one["yardstick_us"] for one in self.noise if "yardstick_us" in one]
        if sticks:
            found["yardstick_variation"] = round(variation(sticks), 4)
        return found


STEAL_MOST, FOREIGN_MOST, DRIFT_MOST = 0.02, 0.05, 0.1


def warnings(noise: dict[str, float]) -> list[str]:
    """Return what makes a run doubtful, for people."""
    found = []
    if noise.get("foreign_share", 0) > FOREIGN_MOST:
        share = noise["foreign_share"]
        found.append(f"other processes had {share:.0%} of the machine while it was measured")
    if noise.get("steal_share", 0) > STEAL_MOST:
        found.append(f"the hypervisor took {noise['steal_share']:.0%} of the time (steal)")
    if noise.get("yardstick_variation", 0) > DRIFT_MOST:
        drift = noise["yardstick_variation"]
        found.append(f"the same piece of work took {drift:.0%} more or less from turn to turn")
    return found


def dump(path: Path, whole: dict[str, Any]) -> None:
    """Write a file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Read a file of results. Raises LabError."""
    try:
        whole = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LabError(f"{path}: {error}") from error
    if not isinstance(whole, dict) or whole.get("schema") != SCHEMA:
        raise LabError(f"{path}: not results of this version (schema {SCHEMA})")
    return whole


def key_of(row: dict[str, Any]) -> Key:
    """Return the key of a row."""
    return Key(*(row[name] for name in ("scenario", "place", "case", "subject", "quantity")))
