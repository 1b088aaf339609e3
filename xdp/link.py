"""Programs on devices.

Rule: a bpf_link ends with the process that holds it; an attachment by netlink stays until somebody
detaches it. Uplinks get the first, pods the second.

Theory. Native XDP (in the driver) is tried first, then generic (on skbs, any driver). A netlink
attachment replaces an older one in one step, so a new forwarder takes a pod over without a gap in
which packets would pass. Both modes cannot stand side by side (EEXIST), so a takeover keeps the
mode of what it replaces.
"""

import errno
import os
import socket
from dataclasses import dataclass

from xdp.errors import KernelError
from xdp.libbpf import ffi, lib
from xdp.object import Program

BPF_XDP = 37  # enum bpf_attach_type
FLAG_GENERIC = 1 << 1  # XDP_FLAGS_SKB_MODE
FLAG_NATIVE = 1 << 2  # XDP_FLAGS_DRV_MODE
# What a driver answers that has no XDP, too large an MTU (ERANGE) or too few queues (veth: ENOSPC),
# and the kernel where the other mode stands already (EEXIST).
_TRY_NEXT = {errno.EOPNOTSUPP, errno.EINVAL, errno.ERANGE, errno.ENOSPC, errno.EEXIST}


@dataclass(frozen=True)
class Attached:
    """What is attached to a device."""

    program_id: int
    native: bool


class Link:
    """A bpf_link: detaches when it is closed or the process ends."""

    def __init__(self, fd: int, ifindex: int, native: bool) -> None:
        """fd: of the link; owned from now on."""
        self.fd = fd
        self.ifindex = ifindex
        self.native = native

    def replace(self, program: Program) -> None:
        """Put a program in the place of what is attached, in one step. Raises KernelError.

        ENOLINK: the device of the link is gone.
        """
        code = lib.bpf_link_update(self.fd, program.fd, ffi.NULL)
        if code < 0:
            raise _refusal("bpf_link_update", program, self.ifindex, code)

    def detach(self) -> None:
        """Detach whoever else holds the link, and close it."""
        lib.bpf_link_detach(self.fd)
        self.close()

    def close(self) -> None:
        """Detach, unless somebody else holds the link as well; twice is fine."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def attach_link(program: Program, ifindex: int, native: bool = True) -> Link:
    """Attach by bpf_link; falls back from native to generic. EBUSY: another program is there."""
    options = ffi.new("struct bpf_link_create_opts *")
    options.sz = ffi.sizeof("struct bpf_link_create_opts")
    code = -errno.EOPNOTSUPP
    for mode in (FLAG_NATIVE, FLAG_GENERIC) if native else (FLAG_GENERIC,):
        options.flags = mode
        code = lib.bpf_link_create(program.fd, ifindex, BPF_XDP, options)
        if code >= 0:
            return Link(code, ifindex, mode == FLAG_NATIVE)
        if -code not in _TRY_NEXT:
            break
    raise _refusal("bpf_link_create", program, ifindex, code)


def attach_netlink(program: Program, ifindex: int, native: bool = True) -> Attached:
    """Attach by netlink, in the place of what is there; falls back from native to generic."""
    code = -errno.EOPNOTSUPP
    for mode in (FLAG_NATIVE, FLAG_GENERIC) if native else (FLAG_GENERIC, FLAG_NATIVE):
        code = lib.bpf_xdp_attach(ifindex, program.fd, mode, ffi.NULL)
        if code == 0:
            found = query(ifindex)
            return Attached(found.program_id if found else 0, mode == FLAG_NATIVE)
        if -code not in _TRY_NEXT:
            break
    raise _refusal("bpf_xdp_attach", program, ifindex, code)


def _refusal(call: str, program: Program, ifindex: int, code: int) -> KernelError:
    try:
        name = socket.if_indextoname(ifindex)
    except OSError:  # the kernel calls a missing device an invalid argument
        name, code = "no device", -errno.ENODEV
    return KernelError(f"{call}({program.name}, ifindex {ifindex}: {name})", code)


def detach_netlink(ifindex: int) -> None:
    """Detach whatever was attached by netlink; nothing there, or no device, is fine."""
    found = query(ifindex)
    if found is None:
        return
    flags = FLAG_NATIVE if found.native else FLAG_GENERIC
    code = lib.bpf_xdp_detach(ifindex, flags, ffi.NULL)
    if code < 0:
        raise KernelError(f"detaching XDP from ifindex {ifindex}", code)


def query(ifindex: int) -> Attached | None:
    """Return what is attached to a device, None for nothing and for no device."""
    options = ffi.new("struct bpf_xdp_query_opts *")
    options.sz = ffi.sizeof("struct bpf_xdp_query_opts")
    code = lib.bpf_xdp_query(ifindex, 0, options)
    if code < 0:
        raise KernelError(f"asking for XDP on ifindex {ifindex}", code)
    if options.drv_prog_id:
        return Attached(options.drv_prog_id, True)
    if options.skb_prog_id:
        return Attached(options.skb_prog_id, False)
    return None
