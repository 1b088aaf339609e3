"""Results as pictures.

Rule: a picture shows medians with their 95 % intervals and starts at zero, or is logarithmic and
says so.

Theory. One picture a case with bars by subject, ours in colour, all others grey by how near they
are; curves for what grows (flows, rules, services, pods, load) and for times (percentiles on the
axis that HdrHistogram made usual, 1 / (1 - p)). The words say what is measured; the command that
repeats it is on the page. Files are PNG, so that they show everywhere.
"""

import io
import re
from collections.abc import Iterator
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from hdrh.histogram import HdrHistogram

from bench.claims import Seen
from bench.report import MAIN, groups
from bench.results import OURS
from bench.subjects import NAMES

OURS_COLOUR, SECOND_COLOUR = "#c8503c", "#e0a08c"
GREYS = ("#3d4a57", "#5f6f7f", "#8494a4", "#a9b5c1", "#c6cfd8", "#dfe5ea")
MARKS = "os^Dvpx*+h<>"
WIDTH, DPI = 8.0, 150
NINES = (0, 50, 90, 99, 99.9, 99.99)

plt.rcParams.update(
    {
        "font.size": 10,
        "font.family": "DejaVu Sans",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#8494a4",
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "figure.constrained_layout.use": True,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
)


def colours(subjects: list[str]) -> dict[str, str]:
    """Return a colour a subject: ours stand out."""
    others = [name for name in subjects if not name.startswith(OURS)]
    found = {name: GREYS[n % len(GREYS)] for n, name in enumerate(others)}
    for name in subjects:
        if name.startswith(OURS):
            found[name] = OURS_COLOUR if name == OURS else SECOND_COLOUR
    return found


def png(figure: Any) -> bytes:
    """Return a figure's bytes and forget it."""
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=DPI)
    plt.close(figure)
    return target.getvalue()


def pictures(whole: dict[str, Any]) -> Iterator[tuple[str, str, bytes]]:
    """Yield (file name, title, PNG) of everything that is worth a picture."""
    curves = {name for name, one in whole["scenarios"].items() if one.get("curve")}
    for (scenario, place, case), rows in groups(whole):
        if scenario in curves:
            continue
        title = f"{place}; {case}"
        for quantity in MAIN:
            if any(row["quantity"] == quantity for row in rows):
                name = _file(f"{scenario}-{place}-{case}-{quantity}")
                yield name, title, bars(title, quantity, rows)
    for scenario in sorted(curves):
        if picture := growth(whole, scenario):
            yield _file(f"curve-{scenario}"), whole["scenarios"][scenario]["title"], picture
    for (where, of), rows in _by(whole["curves"], "loss").items():
        yield _file(f"loss-{where}"), f"{where}: {of}", loss(where, rows)
    for (where, of), rows in _by(whole["histograms"], "times").items():
        yield _file(f"times-{where}-{of}"), f"{where}: {of}", times(f"{where}; {of}", rows)


def _file(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") + ".png"


def _order(names: Any) -> list[str]:
    known = {name: n for n, name in enumerate(NAMES)}
    return sorted(dict.fromkeys(names), key=lambda name: known.get(name, len(known)))


def bars(title: str, quantity: str, rows: list[dict[str, Any]]) -> bytes:
    """A bar a subject, with its interval."""
    mine = {row["subject"]: row for row in rows if row["quantity"] == quantity}
    names = _order(mine)[::-1]
    colour = colours(_order(mine))
    figure, axes = plt.subplots(figsize=(WIDTH, 0.9 + 0.36 * len(names)))
    for n, name in enumerate(names):
        row = mine[name]
        low, high = row["interval"]
        middle = row["median"]
        axes.barh(n, middle, color=colour[name], height=0.7)
        axes.plot([low, high], [n, n], color="#222222", linewidth=1.2)
        ratio = row.get("penstock_is_better_by")
        note = f"{middle:.2f}" if middle < 100 else f"{middle:,.0f}"
        note += f"   (ours is {ratio:.2f} x)" if ratio else ""
        axes.annotate(
            note, (max(high, middle), n), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=9, color="#333333",
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.3 * max(max(row["interval"][1], row["median"]) for row in mine.values()))
    axes.set_xlabel(MAIN[quantity])
    axes.set_title(title)
    return png(figure)


def overview(found: list[Seen]) -> bytes:
    """A bar a claim: the ratio that was seen, and a mark where it is to be at least."""
    names = [f"{seen.claim.what}\nbeside {seen.claim.beside or 'itself'}" for seen in found][::-1]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.9 + 0.5 * len(found)))
    for n, seen in enumerate(found[::-1]):
        colour = OURS_COLOUR if seen.reached else GREYS[3]
        axes.barh(n, seen.ratio, color=colour, height=0.6)
        axes.plot(seen.interval, [n, n], color="#222222", linewidth=1.2)
        axes.plot([seen.claim.least] * 2, [n - 0.42, n + 0.42], color="#222222", linewidth=2.5)
        axes.annotate(
            f"{seen.ratio:.2f}", (max(seen.ratio, seen.interval[1], seen.claim.least), n),
            xytext=(6, 0), textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    axes.axvline(1, color="#8494a4", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("times better (logarithmic); the mark: at least")
    axes.set_title("What must hold")
    return png(figure)


def growth(whole: dict[str, Any], scenario: str) -> bytes | None:
    """Cost of a packet over what grows."""
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    axis = whole["scenarios"][scenario]["curve"]
    for row in whole["rows"]:
        if row["scenario"] == scenario and row["quantity"] == "pps":
            at = amount(row, axis)
            cost = tuple(1000 / max(n, 1e-9) for n in (row["median"], *row["interval"][::-1]))
            points.setdefault(row["subject"], []).append((at, *cost))
    if not points:
        return None
    names = _order(points)
    colour = colours(names)
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8))
    for n, name in enumerate(names):
        x, middle, low, high = zip(*sorted(points[name]), strict=True)
        style: Any = {"color": colour[name], "marker": MARKS[n % len(MARKS)], "markersize": 5}
        axes.plot(x, middle, label=name, linewidth=2 if name == OURS else 1.3, **style)
        axes.fill_between(x, low, high, color=colour[name], alpha=0.15, linewidth=0)
    axes.set_xscale("symlog" if axis == "pods" else "log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel({"policy": "rules"}.get(axis, axis))
    axes.set_ylabel("ns between packets delivered")
    axes.set_title(whole["scenarios"][scenario]["title"])
    axes.legend(ncols=2)
    return png(figure)


def amount(row: dict[str, Any], axis: str) -> float:
    """Return how much of what grows a row stands for."""
    words = {"flows": r"([\d,]+) flows?", "policy": r"([\d,]+) rules?"}
    words |= {"services": r"([\d,]+) services?", "pods": r"([\d,]+) further pods"}
    found = re.search(words[axis], f"{row['place']}; {row['case']}")
    return float(found[1].replace(",", "")) if found else 0.0


def loss(title: str, rows: list[dict[str, Any]]) -> bytes:
    """Share lost over load."""
    names = _order(row["subject"] for row in rows)
    colour = colours(names)
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8))
    for n, name in enumerate(names):
        points = sorted(p for row in rows if row["subject"] == name for p in row["points"])
        x, y = [p[0] / 1e6 for p in points], [100 * p[1] for p in points]
        axes.plot(x, y, MARKS[n % len(MARKS)], color=colour[name], label=name, markersize=5)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("offered, M packets/s")
    axes.set_ylabel("lost, % (logarithmic above 0.1)")
    axes.set_title(title)
    axes.legend(ncols=2)
    return png(figure)


def times(title: str, rows: list[dict[str, Any]]) -> bytes:
    """Percentiles of times, all turns of a subject together."""
    names = _order(row["subject"] for row in rows)
    colour = colours(names)
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8))
    for n, name in enumerate(names):
        whole = HdrHistogram(1, 3_600_000_000_000, 3)
        for row in rows:
            if row["subject"] == name:
                whole.add(HdrHistogram.decode(row["hdr"]))
        shares = [p / 10 for p in range(0, 900, 5)] + [100 - 10 ** (1 - k / 20) for k in range(80)]
        shares = [p for p in shares if whole.get_total_count() * (100 - p) / 100 >= 1]
        y = [whole.get_value_at_percentile(p) / 1000 for p in shares]
        x = [1 / (1 - p / 100) for p in shares]
        axes.plot(x, y, color=colour[name], label=name, linewidth=2 if name == OURS else 1.3)
        axes.plot(x[:1], y[:1], MARKS[n % len(MARKS)], color=colour[name], markersize=5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([1 / (1 - p / 100) for p in NINES], [f"{p} %" for p in NINES])
    axes.minorticks_off()
    axes.set_xlabel("percentile")
    axes.set_ylabel("us (logarithmic)")
    axes.set_title(title)
    axes.legend(ncols=2)
    return png(figure)


def _by(rows: list[dict[str, Any]], kind: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        where = f"{row['place']}; {row['case']}"
        found.setdefault((where, row.get("of", kind)), []).append(row)
    return found
