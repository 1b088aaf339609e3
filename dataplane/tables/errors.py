"""The errors of the shared tables.

Rule: an error leaves the tables as they were.

Theory. Callers tell apart: nothing to map yet (wait), the tables of another version (restart
both), a full table (a limit of xdp/abi.h), and a value that no row can hold (a bug or bad input).
"""


class TableError(Exception):
    """A value does not fit its table; str() names the value, the limit and the fix."""


class TableFull(TableError):
    """No row, group or slot is left; nothing was changed."""


class LayoutError(TableError):
    """The files in shared memory are of another version, or damaged."""


class NotRunningError(TableError, FileNotFoundError):
    """There are no tables: the daemon has not run here."""
