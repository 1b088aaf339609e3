"""Who reads the copies of DNS messages that the flow table has forwarded: a thread of its own.

Rule: nobody waits for this thread, so it never takes a core from somebody who wants it now.

Theory. A message is forwarded in the time of its sender; what is left is counting, which may come
milliseconds later (kernels/dns_copies.py). The thread looks into the ring every LOOK_MS as long as
copies come, and reads many at a time: what one needs in the caches the next one finds there, which
halves what it costs. Whoever wakes meanwhile takes its core (xdp/sched.py). When none have come
twice it sleeps until the next one wakes it: `dns_wake` asks the programs for that, one turn before
it sleeps long, so that none comes unseen in between.
"""

import os
import select
import threading
from typing import Any

from dataplane.engine.account import make_lane
from dataplane.engine.flowtable import FlowTable
from dataplane.kernels.dns_copies import ALL, read
from dataplane.kernels.tables import Tables
from xdp.abi import CONST
from xdp.sched import defer

LOOK_MS = 20
PIECE = 256  # copies, after which it yields to whoever waits, on kernels without slices
SLEEP_MS = 60_000


class CopyReader:
    """The thread, over the ring of one forwarder."""

    def __init__(self, shm: Any, tables: Tables, table: FlowTable) -> None:
        """tables: a view of our own, with a scratch."""
        lane = make_lane(shm, CONST["DNS_READER"])
        self._arguments = tables, table.flows, lane, ALL, PIECE
        self._steering = table.steering
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._stop, select.EPOLLIN)
        self._epoll.register(table.copies.fd, select.EPOLLIN | select.EPOLLET)
        self._thread = threading.Thread(target=self._main, name="copies", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what is left in the ring is the next forwarder's."""
        os.eventfd_write(self._stop, 1)
        self._thread.join(10)

    def _main(self) -> None:
        defer()
        while True:
            count = read(*self._arguments)
            asked = bool(self._steering["dns_wake"])
            self._steering["dns_wake"] = not count
            wait = SLEEP_MS if asked and not count else LOOK_MS
            if any(fd == self._stop for fd, _ in self._epoll.poll(wait / 1000)):
                return
