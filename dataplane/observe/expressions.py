"""Regular expressions that a client sends, in the language of RE2, as Hubble reads them.

Rule: no pattern holds a thread: a search takes time linear in the text, and a pattern that would
need much memory, or too many of them, are refused beforehand.

Theory. Python's `re` tries alternatives one after the other, so "(a+)+$" against forty letters may
take hours; RE2 walks an automaton. Go's regexp, in which Hubble's meaning is defined, has the same
syntax: what it lacks (back references, looking ahead), it lacks here as well. The limits keep the
worst pattern to some milliseconds for making it and for a name of 255 bytes; Hubble has none.
"""

from typing import Any

import re2

MOST = 100  # in one question
_OPTIONS = re2.Options()
_OPTIONS.max_mem = 1 << 20  # bytes; the default is 8 times as much
_OPTIONS.log_errors = False  # the client is told; stderr is not its place


class FilterError(ValueError):
    """A filter that cannot be used; the message names member and value."""


def compiled(member: str, text: str) -> Any:
    """Return a pattern with search and fullmatch. member: whose it is. Raises FilterError."""
    try:
        return re2.compile(text, _OPTIONS)
    except re2.error as error:
        (said,) = error.args
        said = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        raise FilterError(f"{member}: {text[:100]!r}: {said}") from error
