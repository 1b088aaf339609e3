"""BPF maps: entries by system call, arrays also as plain memory.

Rule: a Map does not own its object; it lives as long as the BpfObject does.

Theory. Keys and values are bytes of the sizes that the map declares; an int is taken as a
little-endian number of that size. An array made with BPF_F_MMAPABLE is mapped once and read and
written as numpy: no system call, and the program sees a store at once.
"""

import errno
from collections.abc import Iterator

import numpy as np

from xdp import libc
from xdp.errors import KernelError
from xdp.libbpf import ffi, lib

Bytes = bytes | int


class Map:
    """One map of a loaded object."""

    def __init__(self, name: str, fd: int, key_size: int, value_size: int, entries: int) -> None:
        """Sizes in bytes, as the map declares them."""
        self.name = name
        self.fd = fd
        self.key_size = key_size
        self.value_size = value_size
        self.max_entries = entries
        self._mapped: tuple[int, int] | None = None

    def _bytes(self, value: Bytes, size: int, what: str) -> bytes:
        raw = value.to_bytes(size, "little") if isinstance(value, int) else bytes(value)
        if len(raw) != size:
            raise ValueError(f"map {self.name}: {what} of {len(raw)} bytes, must be {size}")
        return raw

    def update(self, key: Bytes, value: Bytes) -> None:
        """Set an entry. Raises KernelError: E2BIG when the map is full."""
        raw_key = self._bytes(key, self.key_size, "key")
        raw = self._bytes(value, self.value_size, "value")
        code = lib.bpf_map_update_elem(self.fd, raw_key, raw, 0)
        if code < 0:
            detail = f"limit {self.max_entries} entries" if code == -errno.E2BIG else ""
            raise KernelError(f"update of map {self.name}", code, detail)

    def lookup(self, key: Bytes) -> bytes | None:
        """Return the value of a key, None when there is none."""
        buffer = ffi.new("char[]", self.value_size)
        raw_key = self._bytes(key, self.key_size, "key")
        code = lib.bpf_map_lookup_elem(self.fd, raw_key, buffer)
        if code == -errno.ENOENT:
            return None
        if code < 0:
            raise KernelError(f"lookup in map {self.name}", code)
        return bytes(ffi.buffer(buffer, self.value_size))

    def lookup_per_cpu(self, key: Bytes, dtype: np.dtype) -> np.ndarray:
        """Return the values of all CPUs of a per-CPU map, dtype[cpus]."""
        cpus = lib.libbpf_num_possible_cpus()
        stride = -(-self.value_size // 8) * 8
        buffer = ffi.new("char[]", stride * cpus)
        raw_key = self._bytes(key, self.key_size, "key")
        code = lib.bpf_map_lookup_elem(self.fd, raw_key, buffer)
        if code < 0:
            raise KernelError(f"lookup in map {self.name}", code)
        return np.frombuffer(bytes(ffi.buffer(buffer)), dtype)[:cpus]

    def delete(self, key: Bytes) -> bool:
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
            raise ValueError(f"map {self.name}: {dtype.itemsize} bytes a value, must be {stride}")
        size = -(-stride * self.max_entries // 4096) * 4096
        address = libc.mmap(size, libc.MAP_SHARED, self.fd)
        self._mapped = (address, size)
        memory = libc.ffi.buffer(libc.ffi.cast("char *", address), stride * self.max_entries)
        return np.frombuffer(memory, dtype)

    def unmap(self) -> None:
        """Undo mmap; arrays from it must not be used afterwards."""
        if self._mapped:
            libc.munmap(*self._mapped)
            self._mapped = None
