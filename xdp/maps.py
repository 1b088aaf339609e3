"""BPF maps: entries by system call, arrays and rings also as plain memory.

Rule: a Map does not own its object: its calls work as long as the BpfObject does. Memory from
`mmap` is different: it keeps the kernel's map alive until the last array over it is gone.

Theory. Keys and values are bytes of the sizes that the map declares; an int is taken as a
little-endian number of that size, a numpy record as its bytes. An array made with BPF_F_MMAPABLE
is mapped once and read and written as numpy: no system call, and the program sees a store at once.
A ring is a page with the reader's position, one with the writers', and the records, mapped twice in
a row so that none is cut (Documentation/bpf/ringbuf.rst).
"""

import errno
import mmap
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from xdp.errors import KernelError
from xdp.libbpf import ffi, lib, text

Entry = bytes | int | np.integer | np.void
BOTH = mmap.PROT_READ | mmap.PROT_WRITE
PER_CPU_TYPES = {5, 6, 10, 21}  # BPF_MAP_TYPE_{,LRU_}PERCPU_HASH, _ARRAY, _CGROUP_STORAGE


class RingMemory(NamedTuple):
    """A BPF ring as its reader sees it."""

    consumer: np.ndarray  # uint64[page]: bytes read, ours to write
    producer: np.ndarray  # uint64[page]: bytes written
    records: np.ndarray  # uint8[2 * max_entries]: the same bytes twice


def open_by_id(number: int) -> int:
    """Return a new file descriptor of the map with the kernel's number. Raises KernelError."""
    fd = lib.bpf_map_get_fd_by_id(number)
    if fd < 0:
        raise KernelError(f"opening map {number}", fd)
    return fd


def _info(fd: int) -> Any:
    info, length = ffi.new("struct bpf_map_info *"), ffi.new("uint32_t *")
    length[0] = ffi.sizeof("struct bpf_map_info")
    code = lib.bpf_obj_get_info_by_fd(fd, info, length)
    if code < 0:
        raise KernelError(f"asking what map fd {fd} is", code)
    return info


def _memory(of: "Map", size: int, offset: int, protection: int) -> mmap.mmap:
    """Map so many bytes of a map. Raises KernelError."""
    if of.fd < 0:  # Python would give anonymous memory
        raise KernelError(f"mmap of map {of.name}", errno.EBADF)
    try:
        return mmap.mmap(of.fd, size, mmap.MAP_SHARED, protection, offset=offset)
    except OSError as error:
        raise KernelError(f"mmap of map {of.name}", error.errno or errno.EINVAL) from error


class Map:
    """One map of a loaded object."""

    def __init__(
        self, name: str, fd: int, key_size: int, value_size: int, entries: int, kind: int = 0
    ) -> None:
        """Sizes in bytes, as the map declares them; kind: enum bpf_map_type."""
        self.name = name
        self.fd = fd
        self.key_size = key_size
        self.value_size = value_size
        self.max_entries = entries
        self.per_cpu = kind in PER_CPU_TYPES

    @classmethod
    def taken(cls, fd: int) -> "Map":
        """Return the map of a file descriptor, which stays the caller's. Raises KernelError."""
        info = _info(fd)
        return cls(text(info.name), fd, info.key_size, info.value_size, info.max_entries, info.type)

    @property
    def id(self) -> int:
        """The kernel's number of the map. Raises KernelError."""
        return int(_info(self.fd).id)

    def _bytes(self, value: Entry, size: int, what: str) -> bytes:
        if isinstance(value, int | np.integer):
            number = int(value)
            if not 0 <= number < 1 << 8 * size:
                raise ValueError(f"map {self.name}: {what} {number}, must be {size} bytes unsigned")
            return number.to_bytes(size, "little")
        raw = value.tobytes() if isinstance(value, np.void) else bytes(value)
        if len(raw) != size:
            raise ValueError(f"map {self.name}: {what} of {len(raw)} bytes, must be {size}")
        return raw

    def _single(self) -> None:
        """A per-CPU map copies a value a CPU: our buffers of one value must not meet it."""
        if self.per_cpu:
            raise ValueError(f"map {self.name} has a value for each CPU: use lookup_per_cpu")

    def update(self, key: Entry, value: Entry) -> None:
        """Set an entry. Raises KernelError: E2BIG when the map is full."""
        self._single()
        raw_key = self._bytes(key, self.key_size, "key")
        raw = self._bytes(value, self.value_size, "value")
        code = lib.bpf_map_update_elem(self.fd, raw_key, raw, 0)
        if code < 0:
            detail = f"limit {self.max_entries} entries" if code == -errno.E2BIG else ""
            raise KernelError(f"update of map {self.name}", code, detail)

    def lookup(self, key: Entry) -> bytes | None:
        """Return the value of a key, None when there is none."""
        self._single()
        buffer = ffi.new("char[]", self.value_size)
        raw_key = self._bytes(key, self.key_size, "key")
        code = lib.bpf_map_lookup_elem(self.fd, raw_key, buffer)
        if code == -errno.ENOENT:
            return None
        if code < 0:
            raise KernelError(f"lookup in map {self.name}", code)
        return bytes(ffi.buffer(buffer, self.value_size))

    def lookup_per_cpu(self, key: Entry, dtype: np.dtype) -> np.ndarray:
        """Return the values of all CPUs of a per-CPU map, dtype[cpus]."""
        if not self.per_cpu:
            raise ValueError(f"map {self.name} has one value for all CPUs: use lookup")
        stride = -(-self.value_size // 8) * 8
        if dtype.itemsize != stride:
            raise ValueError(f"map {self.name}: {dtype.itemsize} bytes a value, must be {stride}")
        cpus = lib.libbpf_num_possible_cpus()
        buffer = ffi.new("char[]", stride * cpus)
        raw_key = self._bytes(key, self.key_size, "key")
        code = lib.bpf_map_lookup_elem(self.fd, raw_key, buffer)
        if code < 0:
            raise KernelError(f"lookup in map {self.name}", code)
        return np.frombuffer(bytes(ffi.buffer(buffer)), dtype)

    def delete(self, key: Entry) -> bool:
        """Delete an entry; False when there was none."""
        code = lib.bpf_map_delete_elem(self.fd, self._bytes(key, self.key_size, "key"))
        if code == -errno.ENOENT:
            return False
        if code < 0:
            raise KernelError(f"delete in map {self.name}", code)
        return True

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Iterate over keys and values; entries that go meanwhile are left out."""
        key = ffi.NULL
        following = ffi.new("char[]", self.key_size)
        while lib.bpf_map_get_next_key(self.fd, key, following) == 0:
            raw = bytes(ffi.buffer(following, self.key_size))
            value = self.lookup(raw)
            if value is not None:
                yield raw, value
            key = ffi.new("char[]", raw)

    def mmap(self, dtype: np.dtype) -> np.ndarray:
        """Return the array's memory as dtype[max_entries]; the map must be BPF_F_MMAPABLE."""
        stride = -(-self.value_size // 8) * 8
        if dtype.itemsize != stride:
            raise ValueError(
                f"map {self.name} has {stride} bytes a value, {dtype.itemsize} are expected: its "
                "BPF object is of other sources: run `make build`"
            )
        size = -(-stride * self.max_entries // 4096) * 4096
        return np.frombuffer(_memory(self, size, 0, BOTH), dtype, self.max_entries)

    def ring(self) -> RingMemory:
        """Return the memory of a BPF_MAP_TYPE_RINGBUF."""
        page = mmap.PAGESIZE
        consumer = np.frombuffer(_memory(self, page, 0, BOTH), np.uint64)
        rest = np.frombuffer(
            _memory(self, page + 2 * self.max_entries, page, mmap.PROT_READ), np.uint8
        )
        return RingMemory(consumer, rest[:page].view(np.uint64), rest[page:])
