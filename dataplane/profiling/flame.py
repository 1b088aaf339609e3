"""Flame graphs: an SVG that needs nothing else, or a file for speedscope.

Rule: a width is time; nothing is drawn that has none.

Theory. As Gregg's flame graphs: callers below, alphabetical from left to right, so that equal
stacks lie side by side. Titles show names and times under the mouse. speedscope's file is its
"sampled" format (speedscope.app/file-format-schema.json).
"""

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Stacks = Mapping[tuple[str, ...], float]
WIDTH, LINE, MARGIN, LETTER = 1200.0, 18, 30, 6.6
LEAST = 0.4  # pixels
COLOURS = (("bpf_prog_", "#7fb069"), ("worker", "#d9a441"), ("xsk_", "#6c9bc9"), ("", "#c9b79c"))
STAGE_COLOUR, KERNEL_COLOUR = "#d9704a", "#7aa3c7"


@dataclass
class Node:
    """A frame with those above it."""

    weight: float = 0.0
    above: dict[str, "Node"] = field(default_factory=dict)


def tree(stacks: Stacks) -> Node:
    """Return the root of all stacks."""
    root = Node()
    for stack, weight in stacks.items():
        root.weight += weight
        node = root
        for name in stack:
            node = node.above.setdefault(name, Node())
            node.weight += weight
    return root


def write(stacks: Stacks, path: Path, title: str) -> None:
    """Write a graph: .svg, or .json for speedscope. Raises ValueError for other names."""
    if path.suffix == ".svg":
        path.write_text(svg(stacks, title))
    elif path.suffix == ".json":
        path.write_text(json.dumps(speedscope(stacks, title)) + "\n")
    else:
        raise ValueError(f"{path}: a flame graph is .svg or .json (speedscope)")


def svg(stacks: Stacks, title: str) -> str:
    """Return the graph as SVG."""
    root = tree(stacks)
    boxes: list[str] = []
    levels = max((len(stack) for stack in stacks), default=0)
    height = (levels + 1) * LINE + 2 * MARGIN
    _draw(root, "all", 0, 0.0, height - MARGIN - LINE, root.weight or 1.0, boxes)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height}" '
        f'font-family="monospace" font-size="11"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="8" y="18" font-size="13">{html.escape(title)}</text>'
    )
    return "\n".join([head, *boxes, "</svg>"]) + "\n"


def _draw(
    node: Node, name: str, depth: int, left: float, top: float, whole: float, boxes: list[str]
) -> None:
    width = WIDTH * node.weight / whole
    if width < LEAST:
        return
    share = 100 * node.weight / whole
    tip = html.escape(f"{name}: {node.weight * 1000:.1f} ms, {share:.1f} %")
    room = int((width - 6) / LETTER)
    label = name if len(name) <= room else name[: room - 2] + ".." if room > 3 else ""
    drawn = max(width - 0.5, 0.3)
    boxes.append(
        f'<g><title>{tip}</title><rect x="{left:.1f}" y="{top}" width="{drawn:.1f}" '
        f'height="{LINE - 1}" rx="1" fill="{_colour(name, depth)}"/>'
        f'<text x="{left + 3:.1f}" y="{top + 12}">{html.escape(label)}</text></g>'
    )
    for above in sorted(node.above):
        child = node.above[above]
        _draw(child, above, depth + 1, left, top - LINE, whole, boxes)
        left += WIDTH * child.weight / whole


def _colour(name: str, depth: int) -> str:
    found = next(colour for start, colour in COLOURS if name.startswith(start))
    if depth == 2:
        return STAGE_COLOUR
    return KERNEL_COLOUR if depth > 2 and found == COLOURS[-1][1] else found


def speedscope(stacks: Stacks, title: str) -> dict:
    """Return the graph as a file for speedscope."""
    names = list(dict.fromkeys(name for stack in stacks for name in stack))
    number = {name: n for n, name in enumerate(names)}
    ordered = sorted(stacks)
    return {
        "$schema": "https://www.speedscope.app/file-format-schema.json",
        "shared": {"frames": [{"name": name} for name in names]},
        "profiles": [
            {
                "type": "sampled",
                "name": title,
                "unit": "seconds",
                "startValue": 0,
                "endValue": sum(stacks.values()),
                "samples": [[number[name] for name in stack] for stack in ordered],
                "weights": [stacks[stack] for stack in ordered],
            }
        ],
        "exporter": "penstock profile",
    }
