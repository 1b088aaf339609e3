"""Label selectors as people type them: `app=web,tier in (a, b),!legacy`, `reserved:world`.

Rule: what cannot be read is refused with the place, never guessed.

Theory. The grammar is Kubernetes' (apimachinery, labels.Parse): conditions joined by commas, with
=, ==, !=, in, notin, presence and absence. A key may have a source in front ("k8s:app",
"reserved:host"); without one it means a label of any source. A negative condition holds where the
label is missing.
"""

import re
from collections.abc import Callable, Iterable, Sequence

_PART = re.compile(
    r"""\s*(?:
      (?P<absent>!)\s*(?P<no>[^\s,=!()]+) |
      (?P<key>[^\s,=!()]+)\s*
      (?: (?P<sign>==|=|!=)\s*(?P<value>[^\s,()]*)
        | \s(?P<many>in|notin)\s*\((?P<values>[^()]*)\) )?
    )\s*(?:,|$)""",
    re.VERBOSE,
)
Condition = Callable[[Sequence[tuple[str, str, str]]], bool]


def parse(text: str) -> Callable[[Iterable[str]], bool]:
    """Return whether labels ("source:key=value") fit a selector. Raises ValueError."""
    at, conditions = 0, []
    while at < len(text):
        found = _PART.match(text, at)
        if found is None:
            raise ValueError(f"label selector {text!r}: cannot be read from {text[at:]!r} on")
        conditions.append(_condition(found))
        at = found.end()

    def fits(labels: Iterable[str]) -> bool:
        split = [_split(label) for label in labels]
        return all(condition(split) for condition in conditions)

    return fits


def _split(label: str) -> tuple[str, str, str]:
    """Return source, key and value of a label."""
    place, _, value = label.partition("=")
    source, _, key = place.partition(":")
    return (source, key, value) if key else ("", source, value)


def _condition(found: re.Match[str]) -> Condition:
    text = found["no"] or found["key"]
    source, _, key = text.partition(":")
    if not key:
        source, key = "any", source

    def values(labels: Sequence[tuple[str, str, str]]) -> list[str]:
        return [value for where, name, value in labels if name == key and source in ("any", where)]

    if found["absent"]:
        return lambda labels: not values(labels)
    if found["sign"]:
        wanted, negative = {found["value"]}, found["sign"] == "!="
    elif found["many"]:
        wanted = {one.strip() for one in found["values"].split(",")}
        negative = found["many"] == "notin"
    else:
        return lambda labels: bool(values(labels))
    if negative:
        return lambda labels: not wanted.intersection(values(labels))
    return lambda labels: bool(wanted.intersection(values(labels)))
