"""What address management refuses.

Rule: the message names the pool, the numbers and the fix.

Theory. Exhaustion passes with time or a larger pool, an unusable file with space or rights; a
damaged state needs a person.
"""


class IpamError(Exception):
    """Anything that this package raises on purpose."""


class AllocationExhausted(IpamError):
    """No address (or node CIDR) is free."""


class PoolRefused(IpamError):
    """A change of pools would strand leases, or a pool makes no sense."""


class StateDamaged(IpamError):
    """The state file cannot be read; it is never silently started anew."""


class StateUnavailable(IpamError):
    """The state file is sound but cannot be used now: locked, read-only, disk full."""
