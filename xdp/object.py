"""BPF objects: a file as it is (ObjectSpec), and loaded into the kernel (BpfObject).

Rule: a spec depends on nothing but the file; whatever depends on the running kernel happens when an
object is made from it.

Theory. libbpf does relocation and BTF. It loads without a log first and, when the verifier refuses,
once more with a log into our buffer: so a good program costs no log, and a refusal comes back as an
error with its last useful lines rather than as pages on stderr.
"""

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from xdp.errors import KernelError, VerifierError, XdpError
from xdp.libbpf import ffi, lib, text
from xdp.maps import Map

LOG_BYTES = 1 << 20


@dataclass(frozen=True)
class ObjectSpec:
    """An ELF file with BPF programs."""

    path: Path

    @classmethod
    def load(cls, path: Path | str) -> "ObjectSpec":
        """Read nothing yet but that the file is there; FileNotFoundError otherwise."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: run `make build`")
        return cls(path)


@dataclass
class Program:
    """A loaded program; its fd is -1 once the object is closed, so that no other is meant by it."""

    name: str
    fd: int

    @property
    def verified(self) -> int:
        """Instructions that the verifier walked through to accept it; 0: the kernel says nothing.

        Source: verified_insns of the descriptor's fdinfo (Linux 5.16).
        """
        lines = Path(f"/proc/self/fdinfo/{self.fd}").read_text().splitlines()
        found = [line.split()[1] for line in lines if line.startswith("verified_insns:")]
        return int(found[0]) if found else 0


class Maps(dict[str, Map]):
    """The maps of an object, by name; who asks for one that it has not is told why."""

    def __init__(self, path: Path, maps: Mapping[str, Map]) -> None:
        """path: of the file."""
        super().__init__(maps)
        self._path = path

    def __missing__(self, name: str) -> Map:
        """Raise XdpError."""
        raise XdpError(f"{self._path} has no map {name}: it is of other sources: run `make build`")


class BpfObject:
    """A loaded object: owner of its programs and maps until `close`."""

    def __init__(
        self,
        spec: ObjectSpec,
        sizes: Mapping[str, int] | None = None,
        taken: Mapping[str, int] | None = None,
    ) -> None:
        """Load into the kernel. Raises VerifierError or KernelError.

        sizes: max_entries of some maps, instead of the file's; taken: file descriptors of maps
        that stand already and are used in the place of new ones.
        """
        self._log = ffi.new("char[]", LOG_BYTES)
        options = ffi.new("struct bpf_object_open_opts *")
        options.sz = ffi.sizeof("struct bpf_object_open_opts")
        options.kernel_log_buf = self._log
        options.kernel_log_size = LOG_BYTES
        self._object = lib.bpf_object__open_file(str(spec.path).encode(), options)
        if self._object == ffi.NULL:
            raise KernelError(f"opening {spec.path}", ffi.errno or errno.EINVAL)
        code = self._settle(sizes or {}, taken or {}) or lib.bpf_object__load(self._object)
        if code < 0:
            log = ffi.string(self._log).decode(errors="replace")
            lib.bpf_object__close(self._object)
            self._object = ffi.NULL
            if log.strip():
                raise VerifierError(spec.path.name, code, log)
            raise KernelError(f"loading {spec.path}", code)
        self.programs = {program.name: program for program in self._programs()}
        self.maps = Maps(spec.path, {entry.name: entry for entry in self._maps()})

    def _settle(self, sizes: Mapping[str, int], taken: Mapping[str, int]) -> int:
        """Say of some maps how large they are, or that they are there; a negative errno: no."""
        item = lib.bpf_object__next_map(self._object, ffi.NULL)
        code = 0
        while item != ffi.NULL and code == 0:
            name = text(lib.bpf_map__name(item))
            if name in taken:
                code = lib.bpf_map__reuse_fd(item, taken[name])
            elif name in sizes:
                code = lib.bpf_map__set_max_entries(item, sizes[name])
            item = lib.bpf_object__next_map(self._object, item)
        return code

    def _programs(self):
        item = lib.bpf_object__next_program(self._object, ffi.NULL)
        while item != ffi.NULL:
            yield Program(text(lib.bpf_program__name(item)), lib.bpf_program__fd(item))
            item = lib.bpf_object__next_program(self._object, item)

    def _maps(self):
        item = lib.bpf_object__next_map(self._object, ffi.NULL)
        while item != ffi.NULL:
            yield Map(
                text(lib.bpf_map__name(item)),
                lib.bpf_map__fd(item),
                lib.bpf_map__key_size(item),
                lib.bpf_map__value_size(item),
                lib.bpf_map__max_entries(item),
                lib.bpf_map__type(item),
            )
            item = lib.bpf_object__next_map(self._object, item)

    def close(self) -> None:
        """Give programs and maps back; what is attached by netlink stays attached."""
        if self._object != ffi.NULL:
            lib.bpf_object__close(self._object)
            self._object = ffi.NULL
            for owned in (*self.maps.values(), *self.programs.values()):
                owned.fd = -1

    def __enter__(self) -> "BpfObject":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
