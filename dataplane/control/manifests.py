"""The text of a manifest file: its objects, and the lines where they stand.

Rule: any text gives objects or a Refused with line and reason, quickly, and never a crash.

Theory. Files are read with libyaml, nine times faster than PyYAML's own parser, which answers deep
nesting by running out of stack: what is nested deeper than any manifest is refused before. Lines
are looked up only for an error: the text is composed again into nodes with marks, and the place
that the reader complains about (dataplane/objects/manifest.py) is followed in them. A field that is
missing has the line of what should hold it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from dataplane.objects.collect import interpret
from dataplane.objects.manifest import ManifestError, Place

DEPTH_MOST = 200
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BRACKETS = re.compile(r"[\[\]{}]")
_COMPACT = re.compile(rf"^(?: *[-?] ){{{DEPTH_MOST}}}", re.MULTILINE)
_INDENTED = re.compile(rf"^ {{{20 * DEPTH_MOST}}}", re.MULTILINE)

Found = tuple[str, Any, Any]  # field of Objects, key (None: in `others`), object


class Refused(Exception):
    """The file, or an object of it, cannot be used. line 0: not known."""

    def __init__(self, message: str, line: int = 0) -> None:
        """line: the first is 1."""
        super().__init__(message)
        self.line = line


def objects(text: str, suffix: str) -> tuple[list[Found], list[Refused]]:
    """Read a file; return its objects, and the errors of those that were refused.

    Raises Refused when it is no YAML (suffix .json: JSON) at all.
    """
    found, errors = [], []
    for manifest, root in _manifests(text, suffix):
        try:
            found.append(interpret(manifest))
        except ManifestError as error:
            errors.append(Refused(str(error), line(text, (*root, *error.place))))
    return found, errors


def _manifests(text: str, suffix: str) -> Iterator[tuple[Mapping[str, Any], Place]]:
    """Yield manifests with their places: document, and in a List also items and index."""
    for number, document in enumerate(_documents(text, suffix)):
        if document is None:
            continue
        kind = document.get("kind") if isinstance(document, Mapping) else None
        if not isinstance(kind, str) or not kind.endswith("List"):
            yield document, (number,)
            continue
        items = document.get("items") or []
        if not isinstance(items, list):
            why = f"{kind}: items must be a list, is {type(items).__name__}"
            raise Refused(why, line(text, (number, "items")))
        for index, item in enumerate(items):
            yield item, (number, "items", index)


def _documents(text: str, suffix: str) -> list[Any]:
    if suffix == ".json":
        try:
            return [json.loads(text)]
        except json.JSONDecodeError as error:
            raise Refused(f"not JSON: {error.msg}", error.lineno) from error
        except RecursionError as error:
            raise Refused("not JSON: nested too deep") from error
    _check_depth(text)
    try:
        return list(yaml.load_all(text, Loader=_Loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        last = text.count("\n") + (not text.endswith("\n"))
        at = min(mark.line + 1, last) if mark else 0  # the end of the text is no line
        raise Refused(f"not YAML: {problem}", at) from error
    except (ValueError, RecursionError) as error:  # such as a date that is none
        raise Refused(f"not YAML: {error}") from error


def _check_depth(text: str) -> None:
    depth = most = 0
    for bracket in _BRACKETS.findall(text):
        depth += 1 if bracket in "[{" else -1
        most = max(most, depth)
    if most > DEPTH_MOST or _COMPACT.search(text) or _INDENTED.search(text):
        raise Refused(f"not YAML that we read: nested deeper than {DEPTH_MOST}")


def line(text: str, place: Place) -> int:
    """Return the line of a place: document, then keys and indices. 0: not found."""
    number, *rest = place
    assert isinstance(number, int)
    try:
        for at, node in enumerate(yaml.compose_all(text, Loader=_Loader)):
            if at == number:
                return _follow(node, rest)
    except (yaml.YAMLError, ValueError, RecursionError):
        pass
    return 0


def _follow(node: yaml.Node | None, place: list[str | int]) -> int:
    found = node.start_mark.line + 1 if node else 0
    for part in place:
        if isinstance(node, yaml.MappingNode):
            key, node = next(((k, v) for k, v in node.value if k.value == str(part)), (None, None))
            mark = key.start_mark if key else None
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part] if part < len(node.value) else None
            mark = node.start_mark if node else None
        else:
            break
        if mark is None:
            break
        found = mark.line + 1
    return found
