"""The few libc calls that Python does not offer with the arguments that AF_XDP needs.

Rule: a failure becomes a KernelError that names the call.

Theory. Ring memory is mapped by mmap64 itself, because the kernel's offsets for AF_XDP rings are
beyond what the mmap module accepts on a socket; socket options carry structures.
"""

from typing import Any

import cffi

from xdp.errors import KernelError

ffi: Any = cffi.FFI()
ffi.cdef(
    """
    void *mmap64(void *addr, size_t length, int prot, int flags, int fd, int64_t offset);
    int munmap(void *addr, size_t length);
    int setsockopt(int fd, int level, int name, const void *value, uint32_t size);
    int getsockopt(int fd, int level, int name, void *value, uint32_t *size);
    int bind(int fd, const void *address, uint32_t size);
    int unshare(int flags);
    long syscall(long number, ...);
    int fallocate(int fd, int mode, int64_t offset, int64_t length);
    """
)
lib: Any = ffi.dlopen(None)

PROT_READ_WRITE = 3
MAP_SHARED = 0x01
MAP_POPULATE = 0x8000
KEEP_SIZE_PUNCH_HOLE = 3  # FALLOC_FL_*


def check(result: int, call: str, detail: str = "") -> int:
    """Return the result of a call, or raise KernelError with errno when it is negative."""
    if result < 0:
        raise KernelError(call, ffi.errno, detail)
    return result


def mmap(length: int, flags: int, fd: int, offset: int) -> int:
    """Map a file's memory for reading and writing; return its address."""
    address = lib.mmap64(ffi.NULL, length, PROT_READ_WRITE, flags, fd, offset)
    value = int(ffi.cast("intptr_t", address))
    if value == -1:
        raise KernelError(f"mmap({length} bytes, fd {fd})", ffi.errno)
    return value


def munmap(address: int, length: int) -> None:
    """Unmap memory; errors at the end of a life do not matter."""
    lib.munmap(ffi.cast("void *", address), length)


def call(number: int, first: int, structure: bytes, last: int) -> int:
    """Make a system call of a number, a structure and a number."""
    numbers = [ffi.cast("long", one) for one in (first, last)]
    done = lib.syscall(number, numbers[0], ffi.from_buffer(structure), numbers[1])
    return check(int(done), f"system call {number}")


def punch_hole(fd: int, length: int) -> None:
    """Make a file's bytes zeros and give their memory back; its size and mappings stay."""
    check(lib.fallocate(fd, KEEP_SIZE_PUNCH_HOLE, 0, length), f"fallocate({length} bytes)")


def set_option(fd: int, level: int, name: int, value: bytes, call: str) -> None:
    """setsockopt with a structure."""
    check(lib.setsockopt(fd, level, name, value, len(value)), call)


def get_option(fd: int, level: int, name: int, size: int, call: str) -> bytes:
    """getsockopt of a structure of at most `size` bytes."""
    buffer = ffi.new("char[]", size)
    length = ffi.new("uint32_t *", size)
    check(lib.getsockopt(fd, level, name, buffer, length), call)
    return bytes(ffi.buffer(buffer, length[0]))
