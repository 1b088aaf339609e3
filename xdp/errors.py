"""What can go wrong at the kernel's edge.

Rule: a message names the call, the value, and what to do; the errno is kept.

Theory. Callers tell apart what the kernel refused (KernelError), what its verifier refused
(VerifierError, which shows the last useful lines of a long log) and what it does not have
(UnsupportedError).
"""

import errno
import os

_FIXES = {
    errno.EPERM: "run as root or with CAP_NET_ADMIN, CAP_BPF and CAP_NET_RAW",
    errno.EACCES: "run as root or with CAP_NET_ADMIN, CAP_BPF and CAP_NET_RAW",
    errno.ENOMEM: "free memory, or raise the memory lock limit (ulimit -l unlimited)",
    errno.ENOBUFS: "raise the memory lock limit (ulimit -l unlimited)",
    errno.EBUSY: "another program or socket holds it; `penstock cleanup` removes ours",
    errno.ENODEV: "the device is gone",
    errno.ENXIO: "the device is gone or its ring is missing",
}


class XdpError(Exception):
    """Anything that this package raises on purpose."""


class KernelError(XdpError):
    """A system call that failed; `errno` says how."""

    def __init__(self, call: str, code: int, detail: str = "") -> None:
        """call: what was tried, with its values; code: errno; detail: the fix, if not the usual."""
        self.errno = abs(code)
        hint = detail or _FIXES.get(self.errno, "")
        super().__init__(f"{call}: {os.strerror(self.errno)}" + (f"; {hint}" if hint else ""))


class VerifierError(XdpError):
    """A program that the kernel's verifier refused; `log` is all it said."""

    LINES = 8

    def __init__(self, program: str, code: int, log: str) -> None:
        """log: the verifier's or libbpf's output."""
        self.errno = abs(code)
        self.log = log
        useful = [line for line in log.splitlines() if line.strip()]
        useful = [line for line in useful if not line.startswith(("processed", "--", "max_states"))]
        last = "\n  ".join(useful[-self.LINES :])
        super().__init__(f"{program}: {os.strerror(self.errno)}\n  {last}")


class UnsupportedError(XdpError):
    """A feature that this kernel or device does not have."""
