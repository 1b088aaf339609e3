"""One worker: a thread in the compiled loop, and the way to change what it works on.

Rule: only the worker's own thread touches its rings. Everybody else sends it a function, which it
runs between two calls of the loop.

Theory. `run` (loop.py) returns when the stop word is raised; an eventfd wakes it out of epoll_wait.
The thread then runs the functions that wait, and calls the loop again. Adding or removing a socket
is such a function: rare, so it may take its time; traffic of the other sockets waits meanwhile, a
millisecond at most.
"""

import os
import queue
import select
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np

from dataplane.engine import loop
from dataplane.engine.account import dns_rows, make_counters
from dataplane.engine.rings import (
    FILL_LEAST,
    FILL_MOST,
    FRAME_STRIDE,
    SOCK,
    SOCKS_MAX,
    STATE_EMPTY,
    STATE_OPEN,
    make_rings,
)
from dataplane.kernels.batch import make_batch
from dataplane.kernels.connections import Tracker
from dataplane.kernels.flows import Flows
from dataplane.kernels.fragments import make_fragments
from dataplane.kernels.naming import make_naming
from dataplane.kernels.rows import Rows
from dataplane.kernels.tables import Tables
from dataplane.kernels.taps import make_watch
from xdp.errors import KernelError
from xdp.sched import hasten
from xdp.xsk import Xsk

_RINGS = ("rx", "tx", "fill", "completion")
# What a new socket's fill ring begins with while there are plenty: beside busy processes a worker
# may wait for its core for some 10 ms, and a packet that finds no frame meanwhile is lost.
FILL_FIRST = 512


class Worker:
    """A forwarding thread with its frames, sockets and counters."""

    def __init__(
        self,
        number: int,
        shm: Any,
        area: int,
        frames: np.ndarray,
        spin_us: int,
        tracker: Tracker,
        flows: Flows,
        nice: int = 0,
    ) -> None:
        """Prepare worker `number` over UMEM address `area` with its own chunk bases `frames`.

        nice: of its thread, -20..19.
        """
        self._nice = nice
        self.number = number
        self.tracker = tracker
        self.flows = flows
        self.fragments = make_fragments()
        self.rings = make_rings(area, frames)
        self.batch = make_batch()
        self.tables = make_tables(shm)
        self.counters = make_counters(
            shm.reasons[number],
            shm.port_counters[number],
            shm.worker_stats[number : number + 1],
            dns_rows(shm, number),
            tracker.ring,
        )
        self.watch = make_watch(shm, number)
        self.sockets: dict[int, tuple[Xsk, int]] = {}  # by index: and the port of each
        self.ended: deque[tuple[Xsk, int, dict[str, int]]] = deque()  # and its last statistics
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._events = np.zeros(loop.EVENTS_MAX * 12, np.uint8)
        self.control = np.zeros(loop.CONTROL_WORDS, np.int64)
        self.control[loop.CONTROL_EPOLL] = self._epoll.fileno()
        self.control[loop.CONTROL_SPIN_NS] = spin_us * 1000
        self.control[loop.CONTROL_EVENTS] = self._events.ctypes.data
        self.control[loop.CONTROL_ADDRESS] = self.control.ctypes.data
        self._epoll.register(self._wake, select.EPOLLIN)
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None]
        self._commands = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=f"worker-{number}", daemon=True)

    @property
    def arguments(self) -> tuple:
        """What loop.run takes."""
        stages = (self.tables, self.tracker, self.fragments, self.flows, self.counters)
        return (self.batch, self.rings, *stages, self.watch, self.control)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def call(self, function: Callable[[], Any], timeout: float = 10.0) -> Any:
        """Run a function on the worker's thread between two vectors; return or raise what it does.

        Raises TimeoutError when the worker does not come back in `timeout` seconds: it hangs.
        """
        done: Future = Future()
        self._commands.put((function, done))
        self._interrupt()
        return done.result(timeout)

    def stop(self) -> None:
        """End the thread; the sockets stay open until they are removed or the process ends."""
        self._commands.put(None)
        self._interrupt()
        self._thread.join(10)

    def _interrupt(self) -> None:
        self.control[loop.CONTROL_STOP] = 1
        os.eventfd_write(self._wake, 1)

    def _main(self) -> None:
        self.counters.stats[0]["tid"] = threading.get_native_id()
        hasten(self._nice)
        while True:
            loop.run(*self.arguments)
            self.control[loop.CONTROL_STOP] = 0
            try:
                os.eventfd_read(self._wake)
            except BlockingIOError:
                pass
            while not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                function, done = command
                try:
                    done.set_result(function())
                except BaseException as error:
                    done.set_exception(error)

    # --- what `call` runs: the worker's own thread only ---------------------------------------

    def add(self, xsk: Xsk, port: int, receives: bool = True, trunk: bool = False) -> int:
        """Take a socket into the loop; return its index among this worker's sockets.

        receives: it gets packets, and memory for them; trunk: they carry VLAN tags (rings.py).
        """
        free = np.flatnonzero(self.rings.socks["state"] == STATE_EMPTY)
        if not len(free):
            raise RuntimeError(f"worker {self.number} has {SOCKS_MAX} sockets, the limit")
        index = int(free[0])
        sock = self.rings.socks[index]
        for name in SOCK.names or ():
            sock[name] = 0
        sock["fd"], sock["tx_fd"], sock["port"] = xsk.fd, xsk.tx_fd, port
        for name in _RINGS:
            ring = getattr(xsk, name)
            sock[f"{name}_producer"] = ring.producer
            sock[f"{name}_consumer"] = ring.consumer
            sock[f"{name}_descriptors"] = ring.descriptors
            sock[f"{name}_size"] = ring.size
        # In copy mode the kernel always wants a kick, whatever the flag says.
        sock["tx_flags"] = xsk.tx.flags if xsk.zero_copy else 0
        sock["fill_flags"] = xsk.fill.flags
        sock["tx_room"] = xsk.tx.size
        plenty = int(self.rings.free_count[0]) > int(self.rings.fill_target[1]) + FILL_FIRST
        sock["fill_goal"] = (FILL_FIRST if plenty else FILL_LEAST) // 2  # doubled at once
        sock["receives"], sock["trunk"] = receives, trunk
        if not receives:
            sock["fill_goal"] = 0
        sock["state"] = STATE_OPEN
        if self.rings.port_sock[port] < 0:
            self.rings.port_sock[port] = index
        self._settle()
        if receives:
            self._epoll.register(xsk.fd, select.EPOLLIN)
        self.sockets[index] = xsk, port
        return index

    def remove(self, index: int) -> int:
        """Drop a socket (before it is closed); return how many frames it gave back."""
        sock = self.rings.socks[index]
        try:
            self._epoll.unregister(int(sock["fd"]))
        except OSError:
            pass  # the fd is gone already
        xsk, port = self.sockets.pop(index)
        with suppress(KernelError):
            self.ended.append((xsk, port, xsk.statistics()))
        sock["state"] = STATE_EMPTY
        if self.rings.port_sock[port] == index:
            others = (self.rings.socks["port"] == port) & (self.rings.socks["state"] == STATE_OPEN)
            found = np.flatnonzero(others)
            self.rings.port_sock[port] = int(found[0]) if len(found) else -1
        self._settle()
        return index

    def reclaim(self, index: int) -> int:
        """Take back the frames of a removed socket, once it is closed; return their number."""
        held = np.flatnonzero(self.rings.owner.array == index)
        count = int(self.rings.free_count[0])
        self.rings.free[count : count + len(held)] = held * FRAME_STRIDE
        self.rings.free_count[0] = count + len(held)
        self.rings.owner[held] = -1
        return len(held)

    def _settle(self) -> None:
        active = np.flatnonzero(self.rings.socks["state"] == STATE_OPEN)
        receives = self.rings.socks["receives"][active] > 0
        self.rings.active[: len(active)] = np.concatenate((active[receives], active[~receives]))
        self.rings.active_count[:] = len(active), receives.sum()
        self.rings.turn[0] = 0
        half = len(self.rings.free) // 2  # kept for later ports and what is on its way
        self.rings.fill_target[:] = max(FILL_LEAST, min(FILL_MOST, half)), half


def make_tables(shm: Any) -> Tables:
    """Return the kernels' view of the tables in shared memory."""
    shared = [name for name in Tables._fields if name not in ("buckets", "naming")]
    return Tables(
        naming=make_naming(shm),
        buckets=Rows(np.zeros(4, np.int64)),
        **{name: Rows(getattr(shm, name)) for name in shared},
    )
