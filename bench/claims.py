"""What must hold (claims.yaml), checked against a file of results.

Rule: a claim names its scenario, its peer and its least ratio; it is reached when the median is.

Theory. A claim is a ratio of two numbers of one turn, as every ratio here (results.py), so it means
the same on a slow machine and on a noisy one, only less surely: the interval stands beside it. A
claim over every case is as good as its worst. What was not measured is said not to be.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from bench.measure import LESS_IS_BETTER, UNITS
from bench.report import MAIN, groups, short
from bench.results import OURS, bootstrap

FILE = Path(__file__).with_suffix(".yaml")
Rows = dict[str, dict[str, Any]]


class Claim(BaseModel):
    """A row of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    scenario: str = Field("", description="empty: every scenario")
    place: str = Field("", description="part of the place")
    case: str = Field("", description="part of the case: whole words; =TEXT: all of it")
    quantity: str = Field("", description="empty: the case's main one")
    ours: str = OURS
    beside: str = ""
    base: str = Field("", description="part of the case that ours is divided by")
    least: float


class Seen(NamedTuple):
    """What a file of results says of a claim."""

    claim: Claim
    ours: float
    unit: str
    ratio: float
    interval: tuple[float, float]
    where: str

    @property
    def reached(self) -> bool:
        """Whether the median is."""
        return self.ratio >= self.claim.least


def load(path: Path = FILE) -> list[Claim]:
    """Return all claims."""
    return TypeAdapter(list[Claim]).validate_python(yaml.safe_load(path.read_text()))


def check(claim: Claim, whole: dict[str, Any]) -> Seen | None:
    """Return the worst case of a claim; None: it was not measured."""
    found = [_seen(claim, *pair) for pair in _pairs(claim, whole)]
    return min((one for one in found if one), key=lambda one: one.ratio, default=None)


def _pairs(claim: Claim, whole: dict[str, Any]) -> Iterator[tuple[str, dict, dict]]:
    """Yield (where, our row, the row it is divided by)."""
    cases = [
        (where, {(row["subject"], row["quantity"]): row for row in rows})
        for where, rows in groups(whole)
        if claim.scenario in ("", where[0]) and claim.place in where[1]
    ]
    bases = [rows for where, rows in cases if claim.base and _holds(where[2], claim.base)]
    for where, rows in cases:
        if not _holds(where[2], claim.case):
            continue
        for quantity in [claim.quantity] if claim.quantity else MAIN:
            mine = rows.get((claim.ours, quantity))
            other = rows.get((claim.beside, quantity))
            if claim.base:
                other = bases[0].get((claim.ours, quantity)) if bases else None
            if mine and other:
                yield f"{where[1]}; {where[2]}", mine, other


def _holds(label: str, part: str) -> bool:
    """Whether a label has this part as whole words: "1,000 flows" is not in "11,000 flows"."""
    if part.startswith("="):
        return label == part[1:]
    return not part or f" {part}" in f" {label}"


def _seen(claim: Claim, where: str, mine: dict[str, Any], other: dict[str, Any]) -> Seen | None:
    turns = [t for t in mine["turns"] if mine["turns"][t] and other["turns"].get(t)]
    ratios = [mine["turns"][t] / other["turns"][t] for t in turns]
    if mine["quantity"] in LESS_IS_BETTER:
        ratios = [1 / ratio for ratio in ratios]
    if not ratios:
        return None
    unit = UNITS[mine["quantity"]]
    middle = statistics.median(ratios)
    return Seen(claim, mine["median"], unit, middle, bootstrap(ratios), where)


def markdown(whole: dict[str, Any]) -> str:
    """Return the claims as a table for the README."""
    lines = [
        "| what | seen | beside | x | 95 % | at least | scenario |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in load():
        beside = claim.beside or f"itself, {claim.base}"
        tail = f"| {claim.least:g} | `{claim.scenario or 'all'}` |"
        if seen := check(claim, whole):
            low, high = seen.interval
            mark = "" if seen.reached else " (**not reached**)"
            sure = f"{low:.2f}..{high:.2f}" if low != high else "one turn"
            lines.append(
                f"| {claim.what} | {short(seen.ours)} {seen.unit} | {beside} "
                f"| {seen.ratio:.2f}{mark} | {sure} {tail}"
            )
        else:
            lines.append(f"| {claim.what} | not measured | {beside} | | {tail}")
    return "\n".join(lines) + "\n"
