"""Regular expressions that a client sends, in the language of RE2, as Hubble reads them.

Rule: no pattern holds a thread: a search takes time linear in the text, or is refused beforehand.

Theory. Python's `re` tries alternatives one after the other, so "(a+)+$" against thirty letters may
take hours; RE2 walks an automaton. Go's regexp, in which Hubble's meaning is defined, has the same
syntax: what it lacks (back references, looking ahead), it lacks here as well.
"""

from typing import Any

import re2

_OPTIONS = re2.Options()
_OPTIONS.log_errors = False  # the client is told; stderr is not its place


def compiled(text: str) -> Any:
    """Return a pattern with search and fullmatch. Raises ValueError: what is wrong with it."""
    try:
        return re2.compile(text, _OPTIONS)
    except re2.error as error:
        (said,) = error.args
        said = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        raise ValueError(f"{text[:100]!r}: {said}") from error
