"""Taps as the forwarder owns them: opened when asked, closed when nobody reads any more.

Rule: a worker sees a tap's bit only while its row, its program and its rings are whole.

Theory. Workers look at one word a vector (kernels/taps.py). Here rows are filled while their bit is
0; after closing every worker is waited for, so that a row that is filled anew has no reader of the
old. While a tap that wants forwarded packets is open, XDP looks nothing up in the flow table: an
established flow comes up to the workers like any other and goes back when the last such tap is
closed. Taps that want drops only leave the table alone, since what is dropped is never in it.
"""

import secrets
import time
from typing import Any

import numpy as np

from dataplane.engine.flowtable import FlowTable
from dataplane.engine.worker import Worker
from dataplane.kernels.bpf import check
from xdp.abi import CONST, DTYPE

TAPS_MAX = CONST["TAPS_MAX"]
PORTS_MAX = CONST["PORTS_MAX"]
SNAP_MOST = CONST["TAP_SNAP_MOST"]
STAGES = CONST["TAP_STAGES"]
DROPS = 130  # reasons from here on are drops
LEASE_NS = 5_000_000_000


class Taps:
    """All taps of one forwarder."""

    def __init__(self, shm: Any, workers: list[Worker], table: FlowTable) -> None:
        """Close what a predecessor left open."""
        self._shm, self._workers, self._table = shm, workers, table
        self._open: dict[int, bool] = {}  # tap -> whether the flow table rests for it
        self._closed_ns = 0
        shm.control[0]["taps"] = 0
        shm.taps["serial"] = 0
        shm.clear("tap_space")

    def __len__(self) -> int:
        return len(self._open)

    def open(self, wanted: dict[str, Any]) -> dict[str, int]:
        """Open a tap and return its number and serial.

        wanted: points, snap, port (None: any), identity (0: any), reasons (None: all), program
        (hexadecimal, 8 bytes an instruction). Raises ValueError, which names value and limit.
        """
        free = [n for n in range(TAPS_MAX) if n not in self._open]
        if not free:
            raise ValueError(f"{TAPS_MAX} captures are open, the limit: end one first")
        number = free[0]
        row, program, rests = _read(wanted)
        self._shm.tap_programs[number, : len(program)] = program
        row["serial"] = secrets.randbits(31) + 1
        row["lease_ns"] = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        self._shm.tap_rings[:, number] = np.zeros((), DTYPE["tap_ring"])
        self._shm.taps[number] = row
        if rests and not any(self._open.values()):
            self._table.pause()
        self._open[number] = rests
        bits = 1 << number | (1 << TAPS_MAX + number if int(row["points"]) & STAGES else 0)
        self._shm.control[0]["taps"] |= np.uint64(bits)
        return {"tap": number, "serial": int(row["serial"])}

    def close(self, number: int, serial: int) -> None:
        """Close a tap, if it is still that one; what it has taken can still be read."""
        if number not in self._open or int(self._shm.taps[number]["serial"]) != serial:
            return
        bits = np.uint64(1 << number | 1 << TAPS_MAX + number)
        self._shm.control[0]["taps"] &= ~bits
        for worker in self._workers:
            worker.call(lambda: None)
        self._shm.taps[number]["serial"] = 0
        self._closed_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        rested = self._open.pop(number)
        if rested and not any(self._open.values()):
            self._table.resume()

    def turn(self) -> None:
        """Close the taps that nobody has read for LEASE_NS; give memory back when none is open."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        for number in list(self._open):
            row = self._shm.taps[number]
            if now - int(row["lease_ns"]) > LEASE_NS:
                self.close(number, int(row["serial"]))
        if not self._open and self._closed_ns and now - self._closed_ns > LEASE_NS:
            self._shm.clear("tap_space")
            self._closed_ns = 0


def _read(wanted: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return row, program, and whether it wants packets that are forwarded."""
    row = np.zeros((), DTYPE["tap"])
    points, snap = int(wanted["points"]), int(wanted.get("snap") or SNAP_MOST)
    port = wanted.get("port")
    if not 0 < points < 8 or not points & 3:
        raise ValueError(f"points {points}: 1 as packets came, 2 as they left, 4 with stages")
    if not 0 < snap <= SNAP_MOST:
        raise ValueError(f"snap {snap}: must be 1 to {SNAP_MOST} bytes")
    if port is not None and not 0 <= int(port) < PORTS_MAX:
        raise ValueError(f"port {port}: must be below {PORTS_MAX}")
    raw = bytes.fromhex(wanted.get("program") or "")
    if len(raw) % 8 or len(raw) // 8 > CONST["TAP_INSTRUCTIONS_MAX"]:
        limit = CONST["TAP_INSTRUCTIONS_MAX"]
        raise ValueError(f"program of {len(raw)} bytes: 8 an instruction, {limit} at most")
    program = np.frombuffer(raw, DTYPE["tap_instruction"])
    check(program)
    reasons = wanted.get("reasons")
    numbers = range(256) if reasons is None else [int(n) for n in reasons]
    if any(not 0 <= n < 256 for n in numbers):
        raise ValueError(f"reasons {list(numbers)}: must be 0 to 255")
    bits = sum(1 << n for n in set(numbers))
    row["reasons"] = [bits >> 64 * n & (1 << 64) - 1 for n in range(4)]
    row["points"], row["snap"], row["instructions"] = points, snap, len(program)
    row["port"] = PORTS_MAX if port is None else int(port)
    row["identity"] = int(wanted.get("identity") or 0)
    return row, program, any(n < DROPS for n in numbers)
