"""Reading fields of a manifest, each with a refusal that names its place.

Rule: a reader returns what it promises or raises ManifestError with the place and the value.

Theory. A place is the path of keys and indices from the object's root, as in
("spec", "ingress", 0, "from"). It is shown as spec.ingress[0].from, and a source that knows where
the text stood (control/folder.py) finds the line from it. Nothing here knows a kind of object.
"""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
)
from typing import Any, TypeVar

Address = IPv4Address | IPv6Address
Cidr = IPv4Network | IPv6Network
Place = tuple[str | int, ...]
T = TypeVar("T")

_BRIEF = reprlib.Repr()  # a manifest may be huge, or hold itself


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the field and the value."""

    def __init__(self, message: str, place: Place = ()) -> None:
        """place: the field's path from the root of the object, empty: the object itself."""
        super().__init__(message)
        self.place = place


def brief(value: object) -> str:
    """Return a value as a short text for a message."""
    return _BRIEF.repr(value)


def shown(place: Place) -> str:
    """Return a place as people write it: spec.ingress[0].from."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def refuse(place: Place, why: str) -> ManifestError:
    """Return the error for a place, to be raised by the caller."""
    return ManifestError(f"{shown(place)}: {why}" if place else why, place)


def section(value: object, place: Place) -> Mapping[str, Any]:
    """Return a mapping; nothing at all is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise refuse(place, f"must be a mapping, is {brief(value)}")
    return value


def items(value: object, place: Place) -> list[Any]:
    """Return a list; nothing at all is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise refuse(place, f"must be a list, is {brief(value)}")
    return value


def sections(value: object, place: Place) -> list[Mapping[str, Any]]:
    """Return a list of mappings."""
    found = items(value, place)
    if not all(isinstance(item, Mapping) for item in found):
        raise refuse(place, f"must be a list of mappings, is {brief(value)}")
    return found


def text(value: object, place: Place) -> str:
    """Return a string; nothing at all is an empty one."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise refuse(place, f"{brief(value)} is not a string")
    return value


def integer(value: object, place: Place, least: int, most: int) -> int:
    """Return an integer in a range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise refuse(place, f"{brief(value)} is not a number from {least} to {most}")
    return value


def flag(value: object, place: Place, default: bool) -> bool:
    """Return a boolean."""
    if value is None:
        return default
    if not isinstance(value, bool):
        raise refuse(place, f"{brief(value)} is neither true nor false")
    return value


def choice(value: object, place: Place, choices: Sequence[str], default: str = "") -> str:
    """Return one of some words."""
    if value is None and default:
        return default
    if not isinstance(value, str) or value not in choices:
        raise refuse(place, f"{brief(value)} is none of {', '.join(choices)}")
    return value


def texts(value: object, place: Place) -> dict[str, str]:
    """Return labels or annotations: string by string."""
    found = dict(section(value, place))
    for key, one in found.items():
        if not isinstance(key, str) or not isinstance(one, str):
            raise refuse(place, f"{brief(key)}: {brief(one)} must be strings, quote them")
    return found


def parsed(parse: Callable[[str], T], values: Sequence[object], place: Place) -> tuple[T, ...]:
    """Parse each of some strings, such as by ip_address."""
    found = []
    for value in values:
        if not isinstance(value, str):  # ipaddress takes 5 for 0.0.0.5
            raise refuse(place, f"{brief(value)} is not a string")
        try:
            found.append(parse(value))
        except ValueError as error:
            raise refuse(place, str(error)) from error
    return tuple(found)
