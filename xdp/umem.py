"""The memory that all packets lie in.

Rule: one area, mapped once; a frame is the number of its chunk.

Theory. Huge pages when the system has some reserved (they save TLB misses and are needed by
zero-copy devices in unaligned mode), else ordinary pages that are populated at once and offered to
transparent huge pages. Chunks are FRAME_STRIDE apart (decision 3).
"""

import numpy as np

from xdp import libc
from xdp.abi import CONST
from xdp.errors import KernelError

HUGE = 2 << 20
STRIDE = CONST["FRAME_STRIDE"]
FRAMES_LEAST = 64
FRAMES_MOST = 1 << 22


class Umem:
    """An area of `frame_count` chunks."""

    def __init__(self, frame_count: int, huge: bool | None = None) -> None:
        """huge: True demands huge pages, False refuses them, None takes them when there are any."""
        if not FRAMES_LEAST <= frame_count <= FRAMES_MOST:
            raise ValueError(f"{frame_count} frames: must be {FRAMES_LEAST}..{FRAMES_MOST}")
        self.frame_count = frame_count
        self.size = -(-(frame_count * STRIDE + 4096) // HUGE) * HUGE
        self.huge = False
        flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_POPULATE
        if huge is not False:
            try:
                self.address = libc.mmap(self.size, flags | libc.MAP_HUGETLB)
                self.huge = True
            except KernelError as error:
                if huge:
                    pages = self.size // HUGE
                    raise KernelError(
                        f"{pages} huge pages for {frame_count} frames",
                        error.errno,
                        f"reserve them: sysctl vm.nr_hugepages={pages}",
                    ) from error
        if not self.huge:
            self.address = libc.mmap(self.size, flags)
            libc.lib.madvise(libc.ffi.cast("void *", self.address), self.size, libc.MADV_HUGEPAGE)
        memory = libc.ffi.buffer(libc.ffi.cast("char *", self.address), self.size)
        self.area = np.frombuffer(memory, np.uint8)

    def close(self) -> None:
        """Unmap; sockets over it must be closed and `area` no longer used."""
        if self.address:
            libc.munmap(self.address, self.size)
            self.address = 0
