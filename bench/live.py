"""The live view: what the nodes count, refreshed while traffic flows.

Rule: it reads shared memory, as `penstock counters` and `penstock flows` do, and changes nothing.

Theory. Counters only grow, so two readings give a rate. Reading costs the forwarder nothing.
"""

import time
from dataclasses import dataclass, field

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from bench.penstock import Node
from dataplane.tables import view
from dataplane.tables.shm import Shm

EVERY_S = 0.5
FLOWS = 8


@dataclass
class Eye:
    """What one node showed last."""

    node: Node
    shm: Shm
    when: float = 0.0
    before: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def look(self) -> RenderableType:
        """Return the node's tables with rates since the last look."""
        now = time.monotonic()
        passed = now - self.when
        self.when = now
        reasons = Table(title=f"{self.node.name}: packets by reason", title_justify="left")
        for heading in ("direction", "reason", "packets", "packets/s", "Mbit/s"):
            reasons.add_column(heading, justify="left" if heading in _WORDS else "right")
        for row in view.counters(self.shm):
            key = (row["direction"], row["text"])
            packets, size = row["packets"], row["bytes"]
            old_packets, old_size = self.before.get(key, (packets, size))
            self.before[key] = (packets, size)
            rate, bits = (packets - old_packets) / passed, (size - old_size) * 8e-6 / passed
            reasons.add_row(*key, f"{packets:,}", f"{rate:,.0f}", f"{bits:,.1f}")
        return Group(reasons, self._flows())

    def _flows(self) -> RenderableType:
        flows = Table(title="newest flows", title_justify="left")
        for heading in ("from", "to", "protocol", "verdict", "packets"):
            flows.add_column(heading, justify="right" if heading == "packets" else "left")
        for row in view.flows(self.shm, FLOWS):
            flows.add_row(
                f"{row['source']} {row['source_port'] or ''}",
                f"{row['destination']} {row['destination_port'] or ''}",
                str(row["protocol"]),
                str(row["verdict"]),
                f"{row['packets']:,}",
            )
        return flows


_WORDS = ("direction", "reason")


def show(nodes: list[Node], console: Console, seconds: float | None = None) -> None:
    """Refresh until `seconds` have passed (None: for ever) or KeyboardInterrupt is raised."""
    eyes = [Eye(node, Shm.open(node.run_dir), time.monotonic()) for node in nodes]
    end = time.monotonic() + (seconds if seconds is not None else float("inf"))
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        while time.monotonic() < end:
            live.update(Columns([eye.look() for eye in eyes]))
            time.sleep(EVERY_S)
