"""Where Kubernetes objects come from, as the agent sees it.

Rule: the agent depends on this alone, never on a folder or an API server.

Theory. A source yields whole snapshots: they are small beside what the agent computes from them,
and a change that was missed is made good by the next one.
"""

from collections.abc import AsyncIterator
from typing import Protocol

from dataplane.objects.collect import Objects


class Source(Protocol):
    """A stream of snapshots; `errors` says where an object was refused, and why."""

    errors: dict[str, str]

    def changes(self) -> AsyncIterator[Objects]:
        """Yield the objects now and after every change."""
        ...
