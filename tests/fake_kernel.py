"""The kernel's side of AF_XDP rings, in plain memory.

Rule: it moves ring indices exactly as net/xdp/xsk_queue.h does, and owns what it was given.

Theory. A socket's four rings are numpy arrays; the worker sees their addresses. The fake consumes
fill entries when it delivers packets, and answers transmitted descriptors with completions. So the
ring code is tested without root and without a device, one frame at a time.
"""

from dataclasses import dataclass, field

import numpy as np

from xdp.xsk import STATISTIC_NAMES

BASE_MASK = (1 << 48) - 1
HEADROOM = 256


@dataclass
class FakeRing:
    """Producer and consumer words, flags and descriptors of one ring."""

    size: int
    width: int  # bytes a descriptor
    words: np.ndarray = field(default_factory=lambda: np.zeros(3, np.uint32))

    def __post_init__(self) -> None:
        self.memory = np.zeros(self.size * self.width // 8, np.uint64)

    @property
    def producer(self) -> int:
        return self.words.ctypes.data

    @property
    def consumer(self) -> int:
        return self.words.ctypes.data + 4

    @property
    def flags(self) -> int:
        return self.words.ctypes.data + 8

    @property
    def descriptors(self) -> int:
        return self.memory.ctypes.data

    def level(self) -> int:
        return (int(self.words[0]) - int(self.words[1])) & 0xFFFFFFFF


class FakeXsk:
    """One socket whose kernel side the test plays."""

    zero_copy = False
    sg = True

    def __init__(self, area: np.ndarray, fd: int, size: int = 64) -> None:
        self.area = area
        self.fd = self.tx_fd = fd
        self.rx, self.tx = FakeRing(size, 16), FakeRing(size, 16)
        self.fill, self.completion = FakeRing(size, 8), FakeRing(size, 8)
        self.lost = dict.fromkeys(STATISTIC_NAMES, 0)

    def statistics(self) -> dict[str, int]:
        """What the kernel has lost, as the test says."""
        return dict(self.lost)

    def deliver(self, payload: bytes, segment: int = 3840) -> bool:
        """Put a packet into frames from the fill ring; False when the ring has too few."""
        parts = [payload[at : at + segment] for at in range(0, len(payload), segment)] or [b""]
        if self.fill.level() < len(parts):
            return False
        for number, part in enumerate(parts):
            slot = int(self.fill.words[1]) % self.fill.size
            base = int(self.fill.memory[slot])
            self.fill.words[1] += 1
            self.area[base + HEADROOM : base + HEADROOM + len(part)] = np.frombuffer(part, np.uint8)
            at = int(self.rx.words[0]) % self.rx.size * 2
            self.rx.memory[at] = base | HEADROOM << 48
            more = number + 1 < len(parts)
            self.rx.memory[at + 1] = len(part) | (int(more) << 32)
            self.rx.words[0] += 1
        return True

    def sent(self) -> list[bytes]:
        """Take what waits in the transmit ring, complete it, return the packets."""
        packets: list[bytes] = []
        current = b""
        while self.tx.level():
            at = int(self.tx.words[1]) % self.tx.size * 2
            address, rest = int(self.tx.memory[at]), int(self.tx.memory[at + 1])
            start = (address & BASE_MASK) + (address >> 48)
            length = rest & 0xFFFFFFFF
            current += self.area[start : start + length].tobytes()
            self.tx.words[1] += 1
            slot = int(self.completion.words[0]) % self.completion.size
            self.completion.memory[slot] = address
            self.completion.words[0] += 1
            if not rest >> 32 & 1:
                packets.append(current)
                current = b""
        return packets
