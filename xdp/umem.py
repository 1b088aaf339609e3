"""The memory that all packets lie in.

Rule: one area, mapped once; a frame is the number of its chunk.

Theory. Huge pages when the system has some reserved (they save TLB misses and are needed by
zero-copy devices in unaligned mode), else ordinary pages that are populated at once and offered to
transparent huge pages. Chunks are FRAME_STRIDE apart (decision 3). The offer comes before the
pages: memory that is there already would stay in small ones.
"""

import contextlib
import errno
import mmap

import numpy as np

from xdp.abi import CONST
from xdp.errors import KernelError

HUGE = 2 << 20
MAP_HUGETLB = 0x40000
MADV_POPULATE_WRITE = 23  # since 5.14
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
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if huge is not False:
            try:
                memory = mmap.mmap(-1, self.size, flags | MAP_HUGETLB | mmap.MAP_POPULATE)
                self.huge = True
            except OSError as error:
                if huge:
                    pages = self.size // HUGE
                    raise KernelError(
                        f"{pages} huge pages for {frame_count} frames",
                        error.errno or errno.ENOMEM,
                        f"reserve them: sysctl vm.nr_hugepages={pages}",
                    ) from error
        if not self.huge:
            memory = self._small(flags)
        self.area = np.frombuffer(memory, np.uint8)
        self.address = self.area.ctypes.data

    def _small(self, flags: int) -> mmap.mmap:
        """Map ordinary pages, in transparent huge pages where the system grants them."""
        try:
            memory = mmap.mmap(-1, self.size, flags)
        except OSError as error:
            code = error.errno or errno.ENOMEM
            raise KernelError(f"{self.size} bytes for {self.frame_count} frames", code) from error
        for advice in (mmap.MADV_HUGEPAGE, MADV_POPULATE_WRITE):
            with contextlib.suppress(OSError):  # an older kernel gives pages on first touch
                memory.madvise(advice)
        return memory

    def close(self) -> None:
        """Let go of the memory; sockets over it must be closed. Other views keep it mapped."""
        self.area = np.empty(0, np.uint8)
        self.address = 0
