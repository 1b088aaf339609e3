"""Code that runs inside a pod's network namespace.

Rule: only a thread that lives for one call ever changes its namespace.

Theory. setns(2) moves the calling thread alone. The agent has other threads, and a pool's thread
that failed to come back would run later work in a pod; so each call gets a thread of its own, which
ends in the pod's namespace and takes the change with it. Sockets made there stay there, and
/proc/sys/net shows the namespace of the thread that opens it. Python 3.11 has no os.setns.
"""

import ctypes
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from dataplane.cni.errors import CniError, Code

_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703  # _IO(NSIO, 0x3), linux/nsfs.h
_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


@contextmanager
def opened(path: str) -> Iterator[int]:
    """A descriptor of the network namespace at path.

    Raises CniError INVALID_ENVIRONMENT when nothing is there, or something else, or the node's own
    namespace. Not UNKNOWN_CONTAINER: that would tell the runtime that no DEL is needed.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"CNI_NETNS={path!r} cannot be opened: {reason}"
        raise CniError(Code.INVALID_ENVIRONMENT, message) from None
    try:
        if not _is_network(fd):
            message = f"CNI_NETNS={path!r} is not a network namespace"
            raise CniError(Code.INVALID_ENVIRONMENT, message)
        if os.path.samestat(os.fstat(fd), os.stat("/proc/thread-self/ns/net")):
            message = f"CNI_NETNS={path!r} is the node's own namespace, not a pod's"
            raise CniError(Code.INVALID_ENVIRONMENT, message)
        yield fd
    finally:
        os.close(fd)


def call_in(fd: int, function: Callable[[], T]) -> T:
    """function() in the network namespace of descriptor fd; its result or exception."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            if _libc.setns(fd, _CLONE_NEWNET) != 0:
                number = ctypes.get_errno()
                raise OSError(number, f"setns: {os.strerror(number)}")
            result.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, name="netns", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _is_network(fd: int) -> bool:
    try:
        return fcntl.ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET
    except OSError:
        return False
