"""What the DNS proxy asks the kernels: whose connection it has, what may pass.

Rule: the same compiled code judges a message here and in a packet, over the same tables.

Theory. A lane of counters and a scratch of its own make this process one more worker about names.
Nothing is asked of the agent: policies, connections and names are in shared memory.
"""

import time
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import numpy as np

from dataplane.engine.account import make_lane
from dataplane.engine.worker import make_tables
from dataplane.kernels.dns_proxy import CLOSE, GO_ON, answer, ask, connection_of
from xdp.abi import CONST

Address = IPv4Address | IPv6Address
SLACK = 8  # bytes behind a message that kernels may read
DEFAULT = 1 << 17  # records, where the agent has not said: as engine/conntrack.py


class Judge:
    """Messages of pods' TCP connections, judged."""

    def __init__(self, shm: Any) -> None:
        """shm: writable."""
        self._shm, self._tables = shm, make_tables(shm)
        self._lane = make_lane(shm, CONST["DNS_PROXY"])
        self._buffer = np.zeros(65536 + SLACK, np.uint8)

    def connection(self, pod: Address, pod_port: int, server: Address, port: int) -> int:
        """Return the record of a pod's connection to its server, -1: there is none."""
        wanted = int(self._shm.node[0]["connections"]) or DEFAULT
        records = max(CONST["CONNECTIONS_LEAST"], min(wanted, CONST["CONNECTIONS_MOST"]))
        mask = records * 4 // CONST["INDEX_WAYS"] - 1
        return int(
            connection_of(
                self._tables, mask, pod.version, *_halves(pod), *_halves(server),
                pod_port << 16 | port,
            )
        )  # fmt: skip

    def query(self, record: int, message: bytes) -> bytes | None:
        """Judge a query: None: it may go on; else the answer to it, empty: end the connection."""
        now = time.monotonic_ns()
        at = self._load(message)
        done = int(
            ask(self._tables, self._lane, record, at, len(message), now, now >> CONST["TICK_SHIFT"])
        )
        if done == GO_ON:
            return None
        return b"" if done == CLOSE else self._buffer[:done].tobytes()

    def answer(self, record: int, message: bytes) -> bool:
        """Learn from an answer; whether it fits a query and may pass."""
        now = time.monotonic_ns()
        tick = now >> CONST["TICK_SHIFT"]
        at = self._load(message)
        return bool(answer(self._tables, self._lane, record, at, len(message), now, tick))

    def _load(self, message: bytes) -> int:
        self._buffer[: len(message)] = np.frombuffer(message, np.uint8)
        return self._buffer.ctypes.data

    def compile(self) -> None:
        """Compile what is asked later."""
        self.connection(IPv4Address(0), 0, IPv4Address(0), 0)
        self.query(0, b"\0")
        self.answer(0, b"\0")


def _halves(address: Address) -> tuple[np.uint64, np.uint64]:
    whole = int(address)
    return np.uint64(whole >> 64), np.uint64(whole & (1 << 64) - 1)
