"""What metrics and the web page need of the agent, as values.

Rule: an exporter never looks into the agent; the agent hands it one of these a scrape.

Theory. Most numbers stand in shared memory and are read there. Who a device belongs to, how full
tables are that only their writers can count, and what the forwarder says of itself are known to the
agent alone. A value, taken on the event loop, may be read on another thread while the agent goes
on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Owner:
    """Whose a device is: a pod, or nobody's."""

    namespace: str = ""
    pod: str = ""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.pod}" if self.pod else ""


@dataclass(frozen=True)
class Facts:
    """The agent at one moment."""

    node: str = ""
    ready: bool = False
    forwarder: Mapping[str, Any] | None = None  # its status; None: it does not answer
    owners: Mapping[str, Owner] = field(default_factory=dict)  # by the device's name
    endpoints: Mapping[int, Owner] = field(default_factory=dict)  # by number
    addresses: Mapping[str, str] = field(default_factory=dict)  # -> what it is called
    tables: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # in use, limit
    pools: tuple[Mapping[str, Any], ...] = ()  # Ipam.usage()
    policies: int = 0
    nodes: int = 0
    problems: tuple[str, ...] = ()
    rules: Path | None = None  # the book of rules

    def owner(self, device: str) -> Owner:
        """Whose a device is."""
        return self.owners.get(device, Owner())
