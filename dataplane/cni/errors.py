"""The error of a CNI operation.

Rule: everything that a caller can do wrong, and all that fails here, becomes a CniError.

Theory. Codes below 100 are the specification's (SPEC.md "Error"), those from 100 on are ours. A
message names the value, the limit and the fix: it is what `kubectl describe pod` shows.
"""

from enum import IntEnum


class Code(IntEnum):
    """Error codes of the CNI specification 1.1.0, and ours from 100 on."""

    INCOMPATIBLE_VERSION = 1
    UNSUPPORTED_FIELD = 2
    INVALID_ENVIRONMENT = 4
    IO_FAILURE = 5
    DECODE_FAILURE = 6
    INVALID_CONFIG = 7
    TRY_LATER = 11
    NOT_AVAILABLE = 50
    INTERFACE_EXISTS = 100
    KERNEL_REFUSED = 101
    POOL_EXHAUSTED = 102
    CHECK_FAILED = 103
    INTERNAL = 104


class CniError(Exception):
    """An operation failed with `code`; str() is the message that the runtime shows."""

    def __init__(self, code: Code, message: str, details: str = "") -> None:
        """Make an error with a short message and, where it helps, longer details."""
        super().__init__(message)
        self.code = code
        self.details = details
