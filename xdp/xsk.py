"""AF_XDP sockets: one (device, queue), four rings, over memory that all share.

Rule: this module sets sockets up and tears them down; packets are moved by whoever has the rings'
addresses.

Theory. Documentation/networking/af_xdp.rst, net/xdp/xsk.c. Every socket registers the same area
as its own UMEM (decision 2). Binding asks for zero-copy where the device may have it, multi-
buffer and need-wakeup, and gives up one after the other: what was reached stands in `zero_copy`,
`sg`, `need_wakeup`, `tx_budget`, `busy_poll`. Copy-mode transmit takes one skb a descriptor,
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
BIND_COPY, BIND_ZEROCOPY, BIND_NEED_WAKEUP, BIND_SG = 2, 4, 8, 16
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
    """A bound AF_XDP socket."""

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
        self._socket: socket.socket | None = None
        self._mapped: list[tuple[int, int]] = []
        self._where = f"AF_XDP socket on ifindex {ifindex} queue {queue}"
        tries = [True, False] if zero_copy is None else [zero_copy]
        combinations = [(z, s) for z in tries for s in ((True, False) if sg else (False,))]
        try:
            self._open(umem, ring_size, fill_size)
            self._bind_best(combinations, need_wakeup)
            self._tune(ring_size, busy_poll_us)
        except BaseException:
            self.close()
            raise

    def _open(self, umem: Umem, ring_size: int, fill_size: int) -> None:
        try:
            self._socket = socket.socket(AF_XDP, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        except OSError as error:
            raise KernelError("socket(AF_XDP)", error.errno or errno.EPERM) from error
        self.fd = self._socket.fileno()
        # struct xdp_umem_reg: address, length, chunk_size, headroom, flags, tx_metadata_len
        reg = struct.pack("=QQIIII", umem.address, umem.size, CONST["FRAME_SIZE"], 0, UNALIGNED, 0)
        call = f"{self._where}: XDP_UMEM_REG({umem.size} bytes)"
        libc.set_option(self.fd, SOL_XDP, UMEM_REG, reg, call)
        sizes = {"rx": ring_size, "tx": ring_size, "fill": fill_size, "completion": ring_size}
        options = {"rx": RX_RING, "tx": TX_RING, "fill": FILL_RING, "completion": COMPLETION_RING}
        for name, size in sizes.items():
            call = f"{self._where}: {name} ring of {size}"
            libc.set_option(self.fd, SOL_XDP, options[name], struct.pack("=I", size), call)
        raw = libc.get_option(self.fd, SOL_XDP, MMAP_OFFSETS, 128, f"{self._where}: offsets")
        offsets = struct.unpack("=16Q", raw)  # rx, tx, fill, completion; each four words
        places = dict(zip(("rx", "tx", "fill", "completion"), range(0, 16, 4), strict=True))
        self.rx, self.tx, self.fill, self.completion = (
            self._map(name, sizes[name], offsets[places[name] : places[name] + 4])
            for name in ("rx", "tx", "fill", "completion")
        )

    def _map(self, name: str, size: int, offsets: tuple[int, ...]) -> Ring:
        producer, consumer, descriptors, flags = offsets
        width = 16 if name in ("rx", "tx") else 8
        length = descriptors + size * width
        where = libc.mmap(length, libc.MAP_SHARED | libc.MAP_POPULATE, self.fd, PAGE_OFFSETS[name])
        self._mapped.append((where, length))
        return Ring(where + producer, where + consumer, where + flags, where + descriptors, size)

    def _bind_best(self, combinations: list[tuple[bool, bool]], need_wakeup: bool) -> None:
        """Bind with the first of (zero-copy, multi-buffer) that the device takes."""
        deadline = time.monotonic() + BUSY_S
        left = list(combinations)
        while True:
            try:
                return self._bind(*left[0], need_wakeup)
            except KernelError as error:
                if error.errno == errno.EBUSY and time.monotonic() < deadline:
                    time.sleep(0.002)
                elif error.errno in (errno.EOPNOTSUPP, errno.EINVAL) and len(left) > 1:
                    left.pop(0)
                else:
                    raise

    def _bind(self, zero_copy: bool, sg: bool, need_wakeup: bool) -> None:
        flags = BIND_ZEROCOPY if zero_copy else BIND_COPY
        flags |= (BIND_SG if sg else 0) | (BIND_NEED_WAKEUP if need_wakeup else 0)
        # struct sockaddr_xdp: family, flags, ifindex, queue, shared fd
        address = struct.pack("=HHIII", AF_XDP, flags, self.ifindex, self.queue, 0)
        mode = "zero-copy" if zero_copy else "copy"
        libc.check(libc.lib.bind(self.fd, address, len(address)), f"{self._where}: bind ({mode})")
        self.zero_copy, self.sg, self.need_wakeup = zero_copy, sg, need_wakeup

    def _tune(self, ring_size: int, busy_poll_us: int) -> None:
        """Options that only make it faster: a kernel without one goes on without."""
        wanted = [
            (socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER),
            (SOL_XDP, MAX_TX_SKB_BUDGET, ring_size),
        ]
        if busy_poll_us:
            wanted += [
                (socket.SOL_SOCKET, SO_PREFER_BUSY_POLL, 1),
                (socket.SOL_SOCKET, SO_BUSY_POLL, busy_poll_us),
                (socket.SOL_SOCKET, SO_BUSY_POLL_BUDGET, 64),
            ]
        self.tx_budget, self.busy_poll = 32, busy_poll_us > 0
        for level, name, number in wanted:
            try:
                libc.set_option(self.fd, level, name, struct.pack("=i", number), "tune")
            except KernelError:
                self.busy_poll &= name in (SO_SNDBUFFORCE, MAX_TX_SKB_BUDGET)
                continue
            if name == MAX_TX_SKB_BUDGET:
                self.tx_budget = number

    def statistics(self) -> dict[str, int]:
        """Return the kernel's counters of this socket (struct xdp_statistics)."""
        raw = libc.get_option(self.fd, SOL_XDP, STATISTICS, 48, f"{self._where}: statistics")
        return dict(zip(STATISTIC_NAMES, struct.unpack(f"={len(raw) // 8}Q", raw), strict=False))

    def close(self) -> None:
        """Unmap the rings and close the socket; twice is fine."""
        for address, length in self._mapped:
            libc.munmap(address, length)
        self._mapped.clear()
        if self._socket is not None:
            self._socket.close()
