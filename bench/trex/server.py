"""The server: listens, answers, says when there are events.

Rule: one thread; a call is carried out before the next one is read.

Theory. Requests come over ZMQ REQ/REP (TRex: port 4501), the publisher (4500) says only that events
wait, which the client then fetches. Between requests the server looks a few times a second whether
profiles have ended. It needs root, for XDP; whoever reaches the port can send packets, so it
listens on the loopback address unless told otherwise.
"""

import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import zmq

from bench.lab import LabError
from bench.trex.methods import call
from bench.trex.ports import Device, Port
from bench.trex.state import State
from bench.trex.wire import RpcError, answer
from xdp.errors import XdpError

SYNC, ASYNC = 4501, 4500
TICK_MS, SAMPLE_S = 20, 0.5
PORTS_MOST = 8


@contextmanager
def opened(devices: Sequence[Device], cpus: Sequence[int] = ()) -> Iterator[State]:
    """Ports on devices, for the body. cpus: of the generators, in turn; none: any."""
    if not 1 <= len(devices) <= PORTS_MOST:
        raise LabError(f"{len(devices)} ports: 1..{PORTS_MOST}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-trex-")))
        ports = []
        for n, device in enumerate(devices):
            cpu = frozenset({cpus[n % len(cpus)]}) if cpus else frozenset[int]()
            port = Port(n, device, cpu, folder)
            stack.callback(port.close)
            ports.append(port)
        yield State(ports)


class Server:
    """Sockets in front of a State; a context manager."""

    def __init__(self, state: State, host: str, sync: int = SYNC, events: int = ASYNC) -> None:
        """Listen. Raises LabError when a port is taken."""
        self._state = state
        self._context = zmq.Context()
        self._rpc = self._context.socket(zmq.REP)
        self._publisher = self._context.socket(zmq.PUB)
        self.running = True
        for socket, port in ((self._rpc, sync), (self._publisher, events)):
            socket.setsockopt(zmq.LINGER, 0)
            try:
                socket.bind(f"tcp://{host}:{port}")
            except zmq.ZMQError as error:
                self.close()
                raise LabError(f"{host} port {port}: {error}") from error

    def close(self) -> None:
        """Listen no more."""
        self._context.destroy(linger=0)

    def _handle(self, name: str, given: dict) -> object:
        try:
            return call(self._state, name, given)
        except (LabError, XdpError, OSError) as error:
            raise RpcError(f"{name}: {error}") from error

    def step(self) -> None:
        """Answer what has come within a tick."""
        if self._rpc.poll(TICK_MS):
            self._rpc.send(answer(self._rpc.recv(), self._handle))
        if self._state.rung:
            self._state.rung = False
            self._publisher.send(b"{}")

    def run(self) -> None:
        """Serve until `running` is false."""
        due = 0.0
        while self.running:
            self.step()
            for port in self._state.ports:
                self._state.end(port)
            if time.monotonic() > due:
                due = time.monotonic() + SAMPLE_S
                self._state.tick()


def serve(
    devices: Sequence[Device], host: str, sync: int, events: int, cpus: Sequence[int] = ()
) -> None:
    """Serve until SIGTERM or SIGINT."""
    with opened(devices, cpus) as state:
        server = Server(state, host, sync, events)

        def stop(number: int, frame: FrameType | None) -> None:
            server.running = False

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        print(
            f"ports {', '.join(one.name for one in devices)}: {host}:{sync}, {events}", flush=True
        )
        try:
            server.run()
        finally:
            server.close()
