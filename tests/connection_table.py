"""A table of connections by itself, whose tuples and hashes a test makes up.

Rule: no packets and no shared memory; the kernels work on it as on the real one.

Theory. A connection is a number: it stands in the low half of its source, and 2**40 above in its
reply's. So buckets overflow and tags collide when a test wants it.
"""

from typing import NamedTuple

import numpy as np

from dataplane.kernels import connections as c
from dataplane.kernels.flows import make_flows, places_of
from dataplane.kernels.house import kernel
from dataplane.kernels.rows import Rows
from xdp.abi import CONST, DTYPE, value

RECORDS = 256
BUCKETS = RECORDS * 4 // c.WAYS
FREE, CLAIMED, LIVE = (value(f"RECORD_{name}") for name in ("FREE", "CLAIMED", "LIVE"))
STATES = ("CLOSED", "SYN_SENT", "INIT", "UNREPLIED", "ICMP", "SYN_RECEIVED", "CLOSING", "REPLIED",
          "ESTABLISHED")  # fmt: skip
SECOND = 1_000_000_000
MINUTE = -(-60 * SECOND >> c.TICK_SHIFT)
REPLY = 6 << 8  # word of a reply's tuple, without a port
TAKEN = CONST["CONNECTION_FLAG_PORT_TAKEN"]


@kernel
def find_in(t, mask, lo, word, hashed):
    zero = np.uint64(0)
    return c.find(t.index.address, t.records.address, mask, zero, lo, zero, zero, word, hashed)


@kernel
def hash_of(lo, word):
    zero = np.uint64(0)
    return c.mix(zero, lo, zero, zero, word)


@kernel
def publish_in(t, mask, number, hashed, reply):
    return c.publish(t.index.address, t.records.address, mask, number, hashed, reply)


@kernel
def allocate_in(t, k):
    index, records, places = t.index.address, t.records.address, k.places.address
    return c.allocate(index, records, k.words.address, places, k.counters.address)


@kernel
def remove_from(t, k, number):
    index, records, places = t.index.address, t.records.address, k.places.address
    return c.remove(index, records, k.words.address, places, number)


class Arrays(NamedTuple):
    """What kernels get."""

    records: Rows
    index: Rows


class Table:
    """Records, index, and one or more trackers; a connection is a number in source_lo."""

    def __init__(self, records: int = RECORDS, workers: int = 1, limit: int | None = None) -> None:
        self.records = aligned(records, DTYPE["connection"])
        self.index = aligned(records * 4, np.dtype("<u8"))
        self.t = Arrays(Rows(self.records), Rows(self.index))
        self.ports = np.zeros(4 << 16, np.uint32)
        self.flows = make_flows()
        self.places = places_of(self.ports, self.flows)
        self.trackers = [
            c.make_tracker(np.zeros(1, DTYPE["track_counter"]), np.zeros(1, DTYPE["exhausted"]),
                           self.ports, self.places, records, n, workers)
            for n in range(workers)
        ]  # fmt: skip
        self.k = self.trackers[0]
        if limit:
            self.k.words[c.LIMIT] = limit
        self.mask = int(self.k.words[c.MASK])
        self.tick(100_000)

    def tick(self, now: int) -> None:
        self.now = now
        for tracker in self.trackers:
            tracker.words[c.TICK] = now

    def fill(self, number: int, lo: int, state: str = "UNREPLIED", idle: int = 0, port: int = 0):
        """Write a CLAIMED record: its tuple is (lo), its reply's (lo + 2**40)."""
        row = self.records[number]
        row["source_lo"], row["reply_source_lo"] = lo, lo + (1 << 40)
        row["state"], row["created"] = value(f"CONNECTION_{state}"), 1
        row["last_original"] = row["last_reply"] = (self.now - idle) % (1 << 32)
        row["flags"], row["reply_word"] = TAKEN * bool(port), port << 32 | REPLY
        if port:
            self.ports[port] += 1

    def make(self, lo: int, hashed: int | None = None, k=None, **fields) -> int:
        """Make a connection; return its record, -1 where there is no room."""
        number = allocate_in(self.t, k or self.k)
        if number < 0:
            return -1
        assert self.records[number]["owner"] == CLAIMED
        self.fill(number, lo, **fields)
        first, reply = self.hashes(lo, hashed)
        if not publish_in(self.t, self.mask, number, np.uint64(first), np.uint64(reply)):
            self.records[number]["owner"] = FREE
            return -1
        return number

    @staticmethod
    def hashes(lo: int, hashed: int | None = None) -> tuple[int, int]:
        if hashed is not None:
            return hashed, (hashed + (1 << 63)) % (1 << 64) ^ 0x5A
        return (lo * 0x9E3779B97F4A7C15) % (1 << 64), (lo * 0xC2B2AE3D27D4EB4F + 1) % (1 << 64)

    def find(self, lo: int, hashed: int | None = None, back: bool = False) -> int:
        """Record << 1 | way of a tuple, or of its reply's; -1: none."""
        number = np.uint64(self.hashes(lo, hashed)[back])
        key, word = np.uint64(lo + (back << 40)), np.uint64(REPLY if back else 0)
        return int(find_in(self.t, self.mask, key, word, number))

    def live(self) -> set[int]:
        return set(np.flatnonzero(self.records["owner"] == LIVE).tolist())

    def words(self) -> int:
        return int(np.count_nonzero(self.index > 1))


def aligned(count: int, dtype: np.dtype) -> np.ndarray:
    """Zeros that start with a cache line, as shared memory does."""
    memory = np.zeros(count * dtype.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + count * dtype.itemsize].view(dtype)
