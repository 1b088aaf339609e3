"""When a thread gets its core, beside others that want it.

Rule: this asks for time soon, or lets others go first; never for more than `nice` says. Who is
refused goes on as before.

Theory. Linux' scheduler (EEVDF, since 6.6) runs the thread whose deadline is next, which is a slice
ahead of its share. With a short slice (sched_setattr(2), since 6.12) a thread that wakes does not
wait for the end of other threads' long ones; with a long one it is what others need not wait for:
whoever wakes has a shorter one and gets the core at once, and the share stays what it was. What the
kernel forwards by itself needs none of this: it runs in the sender's or the interrupt's time.
"""

import os
import platform
import struct
from contextlib import suppress

from xdp import libc
from xdp.errors import KernelError

SET_ATTR = {"x86_64": 314, "aarch64": 274}  # number of the system call
SLICE_NS, DEFERRED_NS = 100_000, 100_000_000  # the least and the most that the kernel grants
SIZE = 48  # struct sched_attr, first version
DEFERRED = 5  # nice


def defer() -> None:
    """Let others go first: for a thread that counts and tells what has passed already.

    Who wakes takes its core at once, it takes nobody's when it wakes (SCHED_BATCH), and it has a
    small share where all cores are busy.
    """
    _ask(os.SCHED_BATCH, max(DEFERRED, os.getpriority(os.PRIO_PROCESS, 0)), DEFERRED_NS)


def hasten(nice: int) -> bool:
    """Ask for short slices and a nice value (-20..19) for this thread; return whether granted."""
    return _ask(os.SCHED_OTHER, nice, SLICE_NS)


def _ask(policy: int, nice: int, slice_ns: int) -> bool:
    number = SET_ATTR.get(platform.machine())
    if number is None:
        return False
    # size, policy, flags, nice, priority, runtime, deadline, period
    attributes = struct.pack("=IIQiIQQQ", SIZE, policy, 0, nice, 0, slice_ns, 0, 0)
    with suppress(KernelError):
        libc.call(number, 0, attributes, 0)
        return True
    return False
