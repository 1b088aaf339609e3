"""Patterns of DNS names, as toFQDNs and rules.dns have them.

Rule: what two manifests write differently and mean alike is one pattern; what a pattern means is
Cilium's matchpattern (pkg/fqdn/matchpattern, from 1.19 on).

Theory. A name has a dot at its end, which may be left out; case does not matter. A star is any
characters of one label, also none; a run of stars is one, but at the very beginning `**.` is one
or more whole labels; a pattern of stars alone is every name. So a pattern is a list of labels, of
which those behind the last one with a star are its literal end, by which it is found.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataplane.objects.manifest import Place, brief, refuse, text
from dataplane.objects.selectors import known

LENGTH_MOST = 255  # characters: pkg/policy/api/fqdn.go
_NAME = re.compile(r"([-a-z0-9_]+\.?)+")
_PATTERN = re.compile(r"([-a-z0-9_*]+\.?)+")
_STARS = re.compile(r"\*+")
ANY = "*"


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A pattern in its one spelling: lower case, no dot at the end, no two stars but at `**.`."""

    text: str

    @property
    def any(self) -> bool:
        """Whether every name fits, the root too."""
        return self.text == ANY

    @property
    def deep(self) -> bool:
        """Whether one or more labels more may stand before it."""
        return self.text.startswith("**.")

    @property
    def labels(self) -> tuple[str, ...]:
        """Its labels, without the `**`; those of every name are none."""
        if self.any:
            return ()
        return tuple(self.text.removeprefix("**.").split("."))

    def __str__(self) -> str:
        return self.text


def pattern(given: str) -> NamePattern:
    """Return the pattern of a valid spelling."""
    spelled = given.strip().lower().removesuffix(".")
    if not spelled.strip("*"):
        return NamePattern(ANY)
    deep = re.match(r"\*{2,}\.", spelled)
    rest = spelled[deep.end() :] if deep else spelled
    return NamePattern(("**." if deep else "") + _STARS.sub("*", rest))


def name_pattern(given: Mapping[str, Any], place: Place) -> NamePattern:
    """Read an element of toFQDNs or rules.dns. Raises ManifestError."""
    known(given, place, ("matchName", "matchPattern"))
    kinds = [kind for kind in ("matchName", "matchPattern") if given.get(kind)]
    if len(kinds) != 1:
        raise refuse(place, "needs one of matchName and matchPattern")
    kind = kinds[0]
    at: Place = (*place, kind)
    found = text(given[kind], at).strip()
    if len(found) > LENGTH_MOST:
        raise refuse(at, f"has {len(found)} characters, limit {LENGTH_MOST}")
    allowed = _NAME if kind == "matchName" else _PATTERN
    if not allowed.fullmatch(found.lower()):
        star = ", *" if kind == "matchPattern" else ""
        raise refuse(
            at,
            f"{brief(found)} is no {'pattern' if star else 'name'}: labels of a-z, 0-9, -, _{star} "
            "with single dots between them",
        )
    return pattern(found)


def regexp(one: NamePattern) -> str:
    """Return what a pattern means, as a regular expression over names with a dot at their end."""
    label = "[-a-z0-9_]"
    if one.any:
        return rf"({label}+\.)+|\."
    body = r"\.".join(each.replace("*", f"{label}*") for each in one.labels) + r"\."
    return (rf"({label}+\.)+" if one.deep else "") + body
