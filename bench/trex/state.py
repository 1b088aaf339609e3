"""What the server knows beside its ports: who owns them, packet groups, events that wait.

Rule: an event is kept for every subscriber until that one has fetched it.

Theory. The publisher only says that there are events; a client fetches them (get_async_events), in
an order that it checks by sequence numbers. A packet group has one number on all ports, so that
what one sends is known where it arrives; the first TIMED_MAX numbers are for latency.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.trex.ports import Port
from bench.trex.streams import LIMITS, Stream
from bench.trex.wire import RpcError

PORT_ACQUIRED, PORT_RELEASED = 5, 6
STARTED, STOPPED, PAUSED, RESUMED, FINISHED = 10, 11, 12, 13, 14
SILENT_S = 60.0  # a session that does not fetch its events is forgotten
Params = dict[str, Any]


@dataclass
class Session:
    """Events of one subscriber."""

    seen: float
    seq: int = 0
    waiting: list[dict[str, Any]] = field(default_factory=list)


class State:
    """The server: ports, packet groups, subscribers."""

    def __init__(self, ports: Sequence[Port]) -> None:
        """ports: by number."""
        self.ports = list(ports)
        self.api = secrets.token_hex(4)
        self.groups: dict[int, int] = {}  # number by TRex's id
        self.versions: dict[int, int] = {}
        self.sessions: dict[tuple[Any, Any], Session] = {}
        self.rung = False  # subscribers are to be told
        self.flow_sequence = 0
        self.started = time.time()

    def tell(self, name: str, kind: int, data: dict[str, Any]) -> None:
        """Keep an event for everybody."""
        for session in self.sessions.values():
            session.seq += 1
            event = {"name": name, "type": kind, "data": data, "seq": session.seq}
            session.waiting.append(event)
        self.rung = True

    def event(self, kind: int, port: Port, **data: Any) -> None:
        """Keep an event of a port."""
        self.tell("trex-event", kind, {"port_id": port.number, **data})

    def end(self, port: Port) -> None:
        """Say which profiles have sent their last frame."""
        for name in port.finished():
            self.event(FINISHED, port, profile_id=name)

    def tick(self) -> None:
        """What is to be done twice a second."""
        for port in self.ports:
            port.sample(list(self.groups.values()))
        late = time.monotonic() - SILENT_S
        self.sessions = {key: one for key, one in self.sessions.items() if one.seen > late}

    def port(self, given: Params) -> Port:
        """Return the port that is meant. Raises RpcError."""
        number = given.get("port_id")
        if not isinstance(number, int) or not 0 <= number < len(self.ports):
            raise RpcError(f"port_id {number!r}: there are ports 0..{len(self.ports) - 1}")
        return self.ports[number]

    def owned(self, given: Params) -> Port:
        """Return the port that is meant, if the caller owns it. Raises RpcError."""
        port = self.port(given)
        if not port.handler or given.get("handler") != port.handler:
            raise RpcError(f"port {port.number} is not yours: acquire it first")
        return port

    # --- packet groups ------------------------------------------------------------------------

    def group(self, stream: Stream) -> int | None:
        """Return the number of a stream's group; None: it has none. Raises RpcError."""
        rule = stream.flow_stats
        if not rule.enabled:
            return None
        timed = rule.rule_type == "latency"
        first, end = (0, LIMITS["TIMED_MAX"]) if timed else (LIMITS["TIMED_MAX"], None)
        known = self.groups.get(rule.stream_id)
        if known is not None:
            if (known < LIMITS["TIMED_MAX"]) != timed:
                raise RpcError(f"pg_id {rule.stream_id}: stats and latency cannot share one")
            return known
        free = set(range(first, end or LIMITS["GROUPS_MAX"])) - set(self.groups.values())
        if not free:
            raise RpcError(f"pg_id {rule.stream_id}: no more groups of rule {rule.rule_type}")
        self.versions[rule.stream_id] = self.versions.get(rule.stream_id, 0) + 1
        self.groups[rule.stream_id] = min(free)
        return min(free)

    def expect(self, groups: set[int], flow_sequence: int) -> None:
        """Have every port count timed groups anew from their first frame on."""
        for port in self.ports:
            for group in groups:
                if group < LIMITS["TIMED_MAX"]:
                    port.times[group]["expected"] = 0
                    port.times[group]["flow_sequence"] = flow_sequence
