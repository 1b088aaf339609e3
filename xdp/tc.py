"""Programs at tc ingress of a device.

Rule: an attachment stays until somebody detaches it, as XDP's by netlink (link.py) does.

Theory. tc-bpf(8), direct action, on the clsact qdisc, which is made where there is none and left:
others may use it. Ours is the filter with PRIORITY and HANDLE; attaching replaces what stands there
in one step, so a new forwarder takes a pod over without a gap in which packets would pass.
"""

import errno
from typing import Any

from xdp.errors import KernelError
from xdp.libbpf import ffi, lib
from xdp.object import Program

INGRESS = 1  # enum bpf_tc_attach_point
REPLACE = 1  # BPF_TC_F_REPLACE
HANDLE, PRIORITY = 1, 1
_GONE = {errno.ENOENT, errno.ENODEV, errno.EINVAL}  # no filter, no device, no qdisc


def _hook(ifindex: int) -> Any:
    hook = ffi.new("struct bpf_tc_hook *")
    hook.sz, hook.ifindex, hook.attach_point = ffi.sizeof("struct bpf_tc_hook"), ifindex, INGRESS
    return hook


def _options() -> Any:
    options = ffi.new("struct bpf_tc_opts *")
    options.sz = ffi.sizeof("struct bpf_tc_opts")
    options.handle, options.priority = HANDLE, PRIORITY
    return options


def attach_ingress(program: Program, ifindex: int) -> None:
    """Attach a program, in the place of what is there. Raises KernelError."""
    hook = _hook(ifindex)
    code = lib.bpf_tc_hook_create(hook)
    if code < 0 and code != -errno.EEXIST:
        raise KernelError(f"making clsact on ifindex {ifindex}", code)
    options = _options()
    options.prog_fd, options.flags = program.fd, REPLACE
    code = lib.bpf_tc_attach(hook, options)
    if code < 0:
        raise KernelError(f"bpf_tc_attach({program.name}, ifindex {ifindex})", code)


def detach_ingress(ifindex: int) -> None:
    """Detach what attach_ingress attached; nothing there, or no device, is fine."""
    code = lib.bpf_tc_detach(_hook(ifindex), _options())
    if code < 0 and -code not in _GONE:
        raise KernelError(f"detaching tc's program from ifindex {ifindex}", code)


def query_ingress(ifindex: int) -> int | None:
    """Return the number of the program that is attached, None for nothing and for no device."""
    options = _options()
    code = lib.bpf_tc_query(_hook(ifindex), options)
    if code < 0 and -code not in _GONE:
        raise KernelError(f"asking for tc's program on ifindex {ifindex}", code)
    return None if code < 0 else int(options.prog_id)
