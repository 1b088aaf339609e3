"""Results as one page of HTML that needs nothing else.

Rule: pictures and style are in the file; what a number is, and the command that repeats it, stand
beside it.

Theory. A reader wants first: against whom, how many times, how sure; then the pictures; then every
number. The page has them in this order. It is made from a file of results, so an old one can be
made again. PNG files lie beside it for other documents.
"""

import base64
import html
import time
from pathlib import Path
from typing import Any

from bench import claims
from bench.measure import UNITS
from bench.plots import overview, pictures
from bench.report import IN_FILE, MAIN, groups, short
from bench.results import OURS, warnings

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem;margin:0 0 .2rem} h2{margin:2.2rem 0 .6rem;font-size:1.25rem}
p.sub,small,td.i{color:#6b7785} img{max-width:100%;height:auto;display:block;margin:.4rem 0 1.6rem}
table{border-collapse:collapse;margin:.3rem 0 1.4rem;font-variant-numeric:tabular-nums}
th,td{padding:.22rem .7rem;text-align:right;border-bottom:1px solid #e6eaee;white-space:nowrap}
th:first-child,td:first-child{text-align:left} th{font-weight:600;color:#3d4a57}
tr.ours td{font-weight:600;color:#a83c2a} .good{color:#1d7a46} .bad{color:#b3261e}
.warn{background:#fff5dd;border-left:4px solid #e0a030;padding:.5rem .9rem;margin:.4rem 0}
code{background:#f1f4f6;padding:.1rem .3rem;border-radius:3px} details{margin:.6rem 0}
summary{cursor:pointer;color:#3d4a57}
@media (prefers-color-scheme:dark){body{background:#fff}}
"""


def write(whole: dict[str, Any], path: Path) -> list[Path]:
    """Write the page at `path` and the pictures beside it; return all files."""
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    files, parts = [path], []
    for name, title, picture in (*_overview(whole), *pictures(whole)):
        (folder / name).write_bytes(picture)
        files.append(folder / name)
        data = base64.b64encode(picture).decode()
        parts.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')
    path.write_text(_page(whole, "\n".join(parts)))
    return files


def _overview(whole: dict[str, Any]) -> list[tuple[str, str, bytes]]:
    seen = [one for claim in claims.load() if (one := claims.check(claim, whole))]
    return [("claims.png", "What must hold", overview(seen))] if seen else []


def _page(whole: dict[str, Any], images: str) -> str:
    machine, run = whole.get("machine", {}), whole.get("run", {})
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.get("started", 0)))
    line = (
        f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores, Linux "
        f"{machine.get('kernel', '?')}; {when}; {run.get('turns', '?')} turns"
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>Penstock, measured</title><style>{STYLE}</style>",
        f"<h1>Penstock beside its peers</h1><p class=sub>{html.escape(line)}</p>",
        *(f"<p class=warn>{html.escape(one)}</p>" for one in warnings(whole["noise"])),
        _counters(whole["counters"]),
        "<h2>What must hold</h2>",
        _claims(whole),
        "<h2>How many times better</h2>",
        "<p class=sub>Ours over theirs, turn by turn: median, 95 % interval. More than 1: ours is "
        "better, whatever the unit.</p>",
        _summary(whole),
        "<h2>Pictures</h2>",
        images,
        "<h2>Every number</h2>",
        *(_table(whole, where, rows) for where, rows in groups(whole)),
        _about(whole),
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _counters(checks: dict[str, int]) -> str:
    if not checks["checks"]:
        return ""
    good = checks["checks"] == checks["exact"]
    word = "good" if good else "bad"
    return (
        f"<p class={word}>Counters: in = forwarded + dropped by reason, to the packet, in "
        f"{checks['exact']} of {checks['checks']} measurements.</p>"
    )


def _claims(whole: dict[str, Any]) -> str:
    rows = []
    for claim in claims.load():
        beside = html.escape(claim.beside or f"itself, {claim.base}")
        row = f"<tr><td>{html.escape(claim.what)}<td>{beside}<td>{claim.least:g}"
        if seen := claims.check(claim, whole):
            low, high = seen.interval
            word = "good" if seen.reached else "bad"
            row += f"<td class='{word}'>{seen.ratio:.2f}<td class=i>{low:.2f}..{high:.2f}"
        else:
            row += "<td class=i>not measured<td>"
        rows.append(row)
    head = "<tr><th>claim<th>beside<th>at least<th>x<th>95 %"
    return f"<table>{head}{''.join(rows)}</table>"


def _summary(whole: dict[str, Any]) -> str:
    rows = []
    for (_, place, case), found in groups(whole):
        for row in found:
            if row["quantity"] not in (*MAIN, "p50_us", "p99_us", "ndr", "pdr"):
                continue
            if row["subject"] == OURS or "penstock_is_better_by" not in row:
                continue
            low, high = row["better_interval"]
            ratio = row["penstock_is_better_by"]
            word = "good" if low > 1 else "bad" if high < 1 else ""
            rows.append(
                f"<tr><td>{html.escape(place)}; {html.escape(case)}, {UNITS[row['quantity']]}"
                f"<td>{html.escape(row['subject'])}<td class='{word}'>{ratio:.2f}"
                f"<td class=i>{low:.2f}..{high:.2f}"
            )
    head = "<tr><th>case<th>beside<th>x<th>95 %"
    return f"<table>{head}{''.join(rows)}</table>" if rows else "<p>Nothing to compare.</p>"


def _table(whole: dict[str, Any], where: tuple[str, str, str], rows: list[dict[str, Any]]) -> str:
    scenario, place, case = where
    csit = whole["scenarios"].get(scenario, {}).get("csit")
    title = f"<b>{html.escape(place)}; {html.escape(case)}</b> <small>{html.escape(scenario)}"
    title += f", CSIT: {html.escape(csit)}" if csit else ""
    names = [q for q in dict.fromkeys(row["quantity"] for row in rows) if q not in IN_FILE]
    head = "<tr><th>" + "".join(f"<th>{UNITS[name]}<th>95 %" for name in names)
    by = {(row["subject"], row["quantity"]): row for row in rows}
    lines = []
    for subject in dict.fromkeys(row["subject"] for row in rows):
        cells = [f"<td>{html.escape(subject)}"]
        for name in names:
            row = by.get((subject, name))
            if row is None:
                cells.append("<td>-<td>")
                continue
            low, high = row["interval"]
            cells.append(f"<td>{short(row['median'])}<td class=i>{short(low)}..{short(high)}")
        lines.append(f"<tr{' class=ours' * (subject == OURS)}>{''.join(cells)}")
    return f"<p>{title}</small></p><table>{head}{''.join(lines)}</table>"


def _about(whole: dict[str, Any]) -> str:
    command = html.escape(whole.get("run", {}).get("command", ""))
    parts = [f"<h2>How</h2><p>Repeat with <code>{command}</code>. Subjects:</p><ul>"]
    for name, remark in whole["remarks"].items():
        parts.append(f"<li><b>{html.escape(name)}</b>: {html.escape(remark)}")
    parts.append("</ul>")
    for heading, lines in (
        ("Skipped", whole["skipped"]),
        ("Versions", [f"{name} {version}" for name, version in whole["versions"].items()]),
        ("Machine", [f"{name}: {text}" for name, text in whole["machine"].items()]),
        ("Noise", [f"{name}: {number}" for name, number in whole["noise"].items()]),
    ):
        items = "".join(f"<li>{html.escape(line)}" for line in lines)
        summary = f"{heading} ({len(lines)})"
        parts.append(f"<details><summary>{summary}</summary><ul>{items}</ul></details>")
    return "\n".join(parts)
