"""What this kernel has of what the dataplane can use, found by trying.

Rule: nothing is concluded from a version number; each feature is used once, where nobody sees it.

Theory. A probe runs in a thread that moves into a network namespace of its own, which is gone with
the thread: there it loads programs of two instructions, attaches one to the loopback device, opens
an AF_XDP socket on it, and sends itself one live frame. Distributions backport and leave out, so
the version that a feature came in (`since`) is a hint for the reader, not the test.
"""

import contextlib
import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from xdp import libc
from xdp.errors import KernelError, XdpError
from xdp.libbpf import ffi, lib
from xdp.link import attach_link
from xdp.maps import Map
from xdp.object import Program
from xdp.run import live_frames
from xdp.umem import Umem
from xdp.xsk import Xsk

CLONE_NEWNET = 0x40000000
LOOPBACK = 1  # ifindex of lo in every network namespace
FRAMES = 64
PROGRAM_XDP, MAP_ARRAY, MAP_XSKMAP = 6, 2, 17  # enum bpf_prog_type, enum bpf_map_type
HAS_FRAGS = 1 << 5  # BPF_F_XDP_HAS_FRAGS
MMAPABLE = 1 << 10  # BPF_F_MMAPABLE
DROP = struct.pack("<QQ", 0x1_0000_00B7, 0x95)  # r0 = XDP_DROP; exit
DENIED = {errno.EPERM, errno.EACCES}

State = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class Feature:
    """One feature: `since` is the Linux version it came in; `fix` is empty where state is yes."""

    name: str
    state: State
    since: str
    detail: str
    fix: str


@dataclass(frozen=True)
class _Probe:
    name: str
    since: str
    test: Callable[[], str]  # returns a detail; raises XdpError where the kernel has it not
    fix: str


def probe_all() -> list[Feature]:
    """Return every feature, always the same names in the same order. Never raises XdpError."""
    found: list[Feature] = []

    def inside() -> None:
        alone = libc.lib.unshare(CLONE_NEWNET) == 0
        found.extend(_try(probe) if alone else _denied(probe) for probe in PROBES)

    thread = threading.Thread(target=inside, name="probe")
    thread.start()
    thread.join()
    return found


def _denied(probe: _Probe) -> Feature:
    fix = "run as root or with CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_BPF"
    return Feature(probe.name, "unknown", probe.since, "may not make a network namespace", fix)


def _try(probe: _Probe) -> Feature:
    try:
        return Feature(probe.name, "yes", probe.since, probe.test(), "")
    except XdpError as error:
        denied = isinstance(error, KernelError) and error.errno in DENIED
        state: State = "unknown" if denied else "no"
        return Feature(probe.name, state, probe.since, str(error), probe.fix)


@contextlib.contextmanager
def _program(flags: int = 0) -> Iterator[Program]:
    """A program that drops, without a file."""
    options = ffi.new("struct bpf_prog_load_opts *")
    options.sz = ffi.sizeof("struct bpf_prog_load_opts")
    options.prog_flags = flags
    fd = lib.bpf_prog_load(PROGRAM_XDP, b"probe", b"GPL", DROP, len(DROP) // 8, options)
    if fd < 0:
        raise KernelError("loading an XDP program", fd)
    try:
        yield Program("probe", fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _map(kind: int, value_size: int, flags: int = 0) -> Iterator[Map]:
    options = ffi.new("struct bpf_map_create_opts *")
    options.sz = ffi.sizeof("struct bpf_map_create_opts")
    options.map_flags = flags
    fd = lib.bpf_map_create(kind, b"probe", 4, value_size, 1, options)
    if fd < 0:
        raise KernelError(f"creating a map of type {kind}", fd)
    try:
        yield Map("probe", fd, 4, value_size, 1, kind)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _socket(sg: bool = True, wakeup: bool = True, busy_poll_us: int = 0) -> Iterator[Xsk]:
    umem = Umem(FRAMES, huge=False)
    try:
        xsk = Xsk(
            umem, LOOPBACK, 0, ring_size=64, fill_size=64, zero_copy=False,
            sg=sg, need_wakeup=wakeup, busy_poll_us=busy_poll_us,
        )  # fmt: skip
        try:
            yield xsk
        finally:
            xsk.close()
    finally:
        umem.close()


def _loads() -> str:
    with _program():
        return "a program loads"


def _frags() -> str:
    with _program(HAS_FRAGS):
        return "a program that takes frames of several buffers loads"


def _links() -> str:
    with _program() as program:
        attach_link(program, LOOPBACK, native=False).close()
    return "attaches, and detaches with its owner"


def _mmapable() -> str:
    with _map(MAP_ARRAY, 8, MMAPABLE) as array:
        array.mmap(np.dtype(np.uint64))[0] = 1
    return "arrays are written without system calls"


def _xskmap() -> str:
    with _map(MAP_XSKMAP, 4):
        return "redirects to sockets"


def _live() -> str:
    with _program(HAS_FRAGS) as program:
        live_frames(program, bytes(64), LOOPBACK, 1)
    return "the generator of `make bench` works"


def _sockets() -> str:
    with _socket(sg=False, wakeup=False):
        return "unaligned chunks, copy mode"


def _wakeup() -> str:
    with _socket(sg=False):
        return "the kernel says when it must be woken"


def _sg() -> str:
    with _socket() as xsk:
        if not xsk.sg:
            raise KernelError("bind with XDP_USE_SG", errno.EINVAL)
    return "large packets arrive as several frames"


def _budget() -> str:
    with _socket(sg=False) as xsk:
        if xsk.tx_budget != xsk.tx.size:
            raise KernelError("XDP_MAX_TX_SKB_BUDGET", errno.ENOPROTOOPT)
    return "one system call sends a whole ring"


def _busy_poll() -> str:
    with _socket(sg=False, busy_poll_us=20) as xsk:
        if not xsk.busy_poll:
            raise KernelError("SO_PREFER_BUSY_POLL", errno.ENOPROTOOPT)
    return "receive work can run in the worker"


def _huge() -> str:
    Umem(FRAMES, huge=True).close()
    return "frames lie in huge pages"


_NEWER = "use a newer kernel"
PROBES = (
    _Probe("XDP programs", "4.8", _loads, "use a kernel with CONFIG_BPF_SYSCALL"),
    _Probe("XDP multi-buffer", "5.18", _frags, "use a newer kernel, or pods' MTU up to 3498"),
    _Probe("XDP links", "5.9", _links, _NEWER + ": a crash would leave programs on uplinks"),
    _Probe("mmapped maps", "5.5", _mmapable, _NEWER),
    _Probe("XSKMAP", "4.18", _xskmap, "use a kernel with CONFIG_XDP_SOCKETS"),
    _Probe("AF_XDP", "5.4", _sockets, "use a kernel with CONFIG_XDP_SOCKETS"),
    _Probe("AF_XDP need-wakeup", "5.4", _wakeup, _NEWER),
    _Probe("AF_XDP multi-buffer", "6.6", _sg, "use a newer kernel, or pods' MTU up to 3498"),
    _Probe("AF_XDP transmit budget", "6.17", _budget, _NEWER + ": sending takes more calls"),
    _Probe("AF_XDP busy polling", "5.11", _busy_poll, _NEWER + ": it works without"),
    _Probe("live frames", "5.18", _live, _NEWER + ": only the benchmark needs it"),
    _Probe("huge pages", "2.6", _huge, "sysctl vm.nr_hugepages=N; small pages work, in copy mode"),
)
