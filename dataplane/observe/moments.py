"""Times as people write them, and as lines show them: those of `hubble observe`.

Rule: what `observe` prints can be given to --since; what has no zone is UTC.

Theory. A time is "5m" (ago), one of Hubble's formats, or what ISO 8601 allows. StampMilli, which
lines have unless told otherwise, names no year: the last such moment is meant.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime

from dataplane.observe.filters import FilterError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _second(at: datetime, nanos: int, digits: int) -> str:
    """Return RFC 3339 with at most so many digits below the second, none of them a last 0."""
    return f"{at:%Y-%m-%dT%H:%M:%S}{f'.{nanos:09}'[: digits + 1].rstrip('0').rstrip('.')}Z"


FORMATS: dict[str, Callable[[datetime, int], str]] = {
    "StampMilli": lambda at, ns: f"{at:%b} {at.day:2} {at:%H:%M:%S}.{ns // 1_000_000:03}",
    "YearMonthDay": lambda at, ns: f"{at:%Y-%m-%d}",
    "YearMonthDayHour": lambda at, ns: f"{at:%Y-%m-%dT%H}Z",
    "YearMonthDayHourMinute": lambda at, ns: f"{at:%Y-%m-%dT%H:%M}Z",
    "RFC3339": lambda at, ns: _second(at, 0, 0),
    "RFC3339Milli": lambda at, ns: _second(at, ns, 3),
    "RFC3339Micro": lambda at, ns: _second(at, ns, 6),
    "RFC3339Nano": lambda at, ns: _second(at, ns, 9),
    "RFC1123Z": lambda at, ns: format_datetime(at),
}
"""Of a time in UTC and its nanoseconds."""


def moment(text: str, now: datetime | None = None) -> datetime:
    """Return the time that a text names. Raises FilterError."""
    now = now or datetime.now(UTC)
    parts = _DURATION.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        try:
            return now - timedelta(seconds=sum(float(n) * _UNITS[unit] for n, unit in parts))
        except OverflowError as error:
            raise FilterError(f"{text!r} ago is before all times") from error
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            at = read(text)
        except ValueError:
            continue
        return at if at.tzinfo else at.replace(tzinfo=UTC)
    try:
        at = datetime.strptime(f"{now.year} {text}", "%Y %b %d %H:%M:%S.%f").replace(tzinfo=UTC)
    except ValueError as error:
        raise FilterError(f"{text!r} is no time: 5m, 2026-11-25T10:00:00Z") from error
    return at if at <= now + timedelta(days=1) else at.replace(year=at.year - 1)
