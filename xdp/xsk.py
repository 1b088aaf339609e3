"""AF_XDP sockets: one (device, queue), four rings, over memory that all share.

Rule: this module sets sockets up and tears them down; packets are moved by whoever has the rings'
addresses.

Theory. Documentation/networking/af_xdp.rst, net/xdp/xsk.c. Every socket registers the same area
as its own UMEM (decision 2). Binding asks for zero-copy where the device may have it, multi-
buffer and need-wakeup, and gives up one after the other: what was reached stands in `zero_copy`,
`sg`, `need_wakeup`, `tx_budget`, `busy_poll`. Receiving and transmitting are two sockets over one
pool (decision 5): `fd` is waited on, `tx_fd` never. Copy-mode transmit takes one skb a descriptor,
charged to the socket, 32 a call: so the send buffer and the budget are raised to a whole ring. The
kernel frees a closed socket's queue a little later (xp_release_deferred), so EBUSY is waited out.
"""

import errno
import socket
import struct
import time
from dataclasses import dataclass

from xdp import libc
from xdp.abi import CONST
from xdp.errors import KernelError
from xdp.umem import Umem

AF_XDP = 44
SOL_XDP = 283
MMAP_OFFSETS, RX_RING, TX_RING, UMEM_REG, FILL_RING, COMPLETION_RING = 1, 2, 3, 4, 5, 6
STATISTICS = 7
MAX_TX_SKB_BUDGET = 9  # since 6.17
UNALIGNED = 1  # XDP_UMEM_UNALIGNED_CHUNK_FLAG
BIND_SHARED, BIND_COPY, BIND_ZEROCOPY, BIND_NEED_WAKEUP, BIND_SG = 1, 2, 4, 8, 16
PAGE_OFFSETS = {
    "rx": 0,
    "tx": 0x80000000,
    "fill": 0x100000000,
    "completion": 0x180000000,
}
SO_SNDBUFFORCE = 32
SO_BUSY_POLL, SO_PREFER_BUSY_POLL, SO_BUSY_POLL_BUDGET = 46, 69, 70
SEND_BUFFER = 64 << 20
RING_MOST = 1 << 20
BUSY_S = 3.0  # how long a queue may stay busy after its socket was closed
STATISTIC_NAMES = (
    "rx_dropped",
    "rx_invalid_descs",
    "tx_invalid_descs",
    "rx_ring_full",
    "rx_fill_ring_empty_descs",
    "tx_ring_empty_descs",
)


@dataclass(frozen=True)
class Ring:
    """Memory addresses of a ring's words and descriptors, and its size in descriptors."""

    producer: int
    consumer: int
    flags: int
    descriptors: int
    size: int


class Xsk:
    """A bound pair of AF_XDP sockets: `fd` receives and is waited on, `tx_fd` transmits."""

    def __init__(
        self,
        umem: Umem,
        ifindex: int,
        queue: int,
        *,
        ring_size: int = 2048,
        fill_size: int = 4096,
        zero_copy: bool | None = None,
        need_wakeup: bool = True,
        sg: bool = True,
        busy_poll_us: int = 0,
    ) -> None:
        """Open and bind. zero_copy None tries and falls back. Raises KernelError."""
        for size in (ring_size, fill_size):
            if size & (size - 1) or not 0 < size <= RING_MOST:
                raise ValueError(f"ring of {size} descriptors: a power of two up to {RING_MOST}")
        self.ifindex, self.queue = ifindex, queue
        self.zero_copy = self.sg = self.need_wakeup = False
        self._sockets: list[socket.socket] = []
        self._mapped: list[tuple[int, int]] = []
        self._where = f"AF_XDP socket on ifindex {ifindex} queue {queue}"
        tries = [True, False] if zero_copy is None else [zero_copy]
        combinations = [(z, s) for z in tries for s in ((True, False) if sg else (False,))]
        try:
            self._open(umem, ring_size, fill_size)
            self._bind_best(combinations, need_wakeup)
            self._bind(self.tx_fd, BIND_SHARED, self.fd, "transmit")
            self._tune(ring_size, busy_poll_us)
        except BaseException:
            self.close()
            raise

    def _open(self, umem: Umem, ring_size: int, fill_size: int) -> None:
        self.fd, self.tx_fd = self._socket(), self._socket()
        # struct xdp_umem_reg: address, length, chunk_size, headroom, flags, tx_metadata_len
        reg = struct.pack("=QQIIII", umem.address, umem.size, CONST["FRAME_SIZE"], 0, UNALIGNED, 0)
        call = f"{self._where}: XDP_UMEM_REG({umem.size} bytes)"
        libc.set_option(self.fd, SOL_XDP, UMEM_REG, reg, call)
        self.rx, self.fill, self.completion, self.tx = (
            self._ring("rx", self.fd, RX_RING, ring_size),
            self._ring("fill", self.fd, FILL_RING, fill_size),
            self._ring("completion", self.fd, COMPLETION_RING, ring_size),
            self._ring("tx", self.tx_fd, TX_RING, ring_size),
        )

    def _socket(self) -> int:
        try:
            made = socket.socket(AF_XDP, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        except OSError as error:
            raise KernelError("socket(AF_XDP)", error.errno or errno.EPERM) from error
        self._sockets.append(made)
        return made.fileno()

    def _ring(self, name: str, fd: int, option: int, size: int) -> Ring:
        call = f"{self._where}: {name} ring of {size}"
        libc.set_option(fd, SOL_XDP, option, struct.pack("=I", size), call)
        raw = libc.get_option(fd, SOL_XDP, MMAP_OFFSETS, 128, f"{self._where}: offsets")
        offsets = struct.unpack("=16Q", raw)  # rx, tx, fill, completion; each four words
        first = list(PAGE_OFFSETS).index(name) * 4
        return self._map(name, fd, size, offsets[first : first + 4])

    def _map(self, name: str, fd: int, size: int, offsets: tuple[int, ...]) -> Ring:
        producer, consumer, descriptors, flags = offsets
        width = 16 if name in ("rx", "tx") else 8
        length = descriptors + size * width
        where = libc.mmap(length, libc.MAP_SHARED | libc.MAP_POPULATE, fd, PAGE_OFFSETS[name])
        self._mapped.append((where, length))
        return Ring(where + producer, where + consumer, where + flags, where + descriptors, size)

    def _bind_best(self, combinations: list[tuple[bool, bool]], need_wakeup: bool) -> None:
        """Bind with the first of (zero-copy, multi-buffer) that the device takes."""
        deadline = time.monotonic() + BUSY_S
        left = list(combinations)
        while True:
            zero_copy, sg = left[0]
            flags = BIND_ZEROCOPY if zero_copy else BIND_COPY
            flags |= (BIND_SG if sg else 0) | (BIND_NEED_WAKEUP if need_wakeup else 0)
            try:
                self._bind(self.fd, flags, 0, "zero-copy" if zero_copy else "copy")
                self.zero_copy, self.sg, self.need_wakeup = zero_copy, sg, need_wakeup
                return
            except KernelError as error:
                if error.errno == errno.EBUSY and time.monotonic() < deadline:
                    time.sleep(0.002)
                elif error.errno in (errno.EOPNOTSUPP, errno.EINVAL) and len(left) > 1:
                    left.pop(0)
                else:
                    raise

    def _bind(self, fd: int, flags: int, shared_fd: int, mode: str) -> None:
        # struct sockaddr_xdp: family, flags, ifindex, queue, shared fd
        address = struct.pack("=HHIII", AF_XDP, flags, self.ifindex, self.queue, shared_fd)
        libc.check(libc.lib.bind(fd, address, len(address)), f"{self._where}: bind ({mode})")

    def _tune(self, ring_size: int, busy_poll_us: int) -> None:
        """Options that only make it faster: a kernel without one goes on without."""
        wanted = [
            (self.tx_fd, socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER),
            (self.tx_fd, SOL_XDP, MAX_TX_SKB_BUDGET, ring_size),
        ]
        if busy_poll_us:
            wanted += [
                (self.fd, socket.SOL_SOCKET, SO_PREFER_BUSY_POLL, 1),
                (self.fd, socket.SOL_SOCKET, SO_BUSY_POLL, busy_poll_us),
                (self.fd, socket.SOL_SOCKET, SO_BUSY_POLL_BUDGET, 64),
            ]
        self.tx_budget, self.busy_poll = 32, busy_poll_us > 0
        for fd, level, name, number in wanted:
            try:
                libc.set_option(fd, level, name, struct.pack("=i", number), "tune")
            except KernelError:
                self.busy_poll &= name in (SO_SNDBUFFORCE, MAX_TX_SKB_BUDGET)
                continue
            if name == MAX_TX_SKB_BUDGET:
                self.tx_budget = number

    def statistics(self) -> dict[str, int]:
        """Return the kernel's counters of both sockets (struct xdp_statistics)."""
        found = {}
        for fd, mine in ((self.fd, "rx"), (self.tx_fd, "tx")):
            raw = libc.get_option(fd, SOL_XDP, STATISTICS, 48, f"{self._where}: statistics")
            counts = zip(STATISTIC_NAMES, struct.unpack(f"={len(raw) // 8}Q", raw), strict=False)
            found.update({name: count for name, count in counts if name.startswith(mine)})
        return found

    def close(self) -> None:
        """Unmap the rings and close the sockets; twice is fine."""
        for address, length in self._mapped:
            libc.munmap(address, length)
        self._mapped.clear()
        for one in reversed(self._sockets):
            one.close()
        self._sockets.clear()
