"""Tables and counters in files that the agent and the forwarder both map.

Rule: the files outlive both processes; whoever maps them checks that the layout is its own.

Theory. RUN_DIR/shm holds one sparse file an array, each with the dtype of xdp/abi.h and no header;
`layout` names the version and sizes. On tmpfs a page costs memory once it is written, so the 64 MiB
of the IPv4 table cost what its routes touch. On a disk file system each store may dirty a page to
be written back (about 70 ns a packet): `on_tmpfs` tells.
"""

import json
import mmap
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

import numpy as np

from xdp.abi import CONST, DTYPE

_U32, _U64, _U8 = np.dtype("<u4"), np.dtype("<u8"), np.dtype("u1")
ARRAYS: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
    "control": (DTYPE["control"], (1,)),
    "node": (DTYPE["node"], (1,)),
    "ports": (DTYPE["port"], (CONST["PORTS_MAX"],)),
    "adjacencies": (DTYPE["adjacency"], (CONST["ADJACENCIES_MAX"],)),
    "rewrites": (_U8, (CONST["ADJACENCIES_MAX"], CONST["HEADER_MAX"])),
    "fib4_wide": (_U32, (CONST["FIB4_WIDE"],)),
    "fib4_deep": (_U32, (CONST["FIB4_GROUPS"] * 256,)),
    "fib6": (DTYPE["fib6_entry"], (CONST["FIB6_SLOTS"],)),
    "fib6_lengths": (_U64, (4,)),
    "reasons": (DTYPE["reason_counter"], (CONST["WORKERS_MAX"], 2, CONST["REASONS_MAX"])),
    "port_counters": (DTYPE["port_counter"], (CONST["WORKERS_MAX"], CONST["PORTS_MAX"])),
    "worker_stats": (DTYPE["worker_stats"], (CONST["WORKERS_MAX"],)),
    "flows": (DTYPE["flow"], (CONST["WORKERS_MAX"], CONST["FLOWS_MAX"])),
}
"""Name of each array -> dtype, shape."""


class LayoutError(Exception):
    """The files were made by another version."""


def _layout() -> dict[str, object]:
    sizes = {name: [dtype.itemsize, list(shape)] for name, (dtype, shape) in ARRAYS.items()}
    return {"abi": CONST["ABI_VERSION"], "arrays": sizes}


class Shm:
    """The mapped arrays, by name as attributes."""

    control: np.ndarray
    node: np.ndarray
    ports: np.ndarray
    adjacencies: np.ndarray
    rewrites: np.ndarray
    fib4_wide: np.ndarray
    fib4_deep: np.ndarray
    fib6: np.ndarray
    fib6_lengths: np.ndarray
    reasons: np.ndarray
    port_counters: np.ndarray
    worker_stats: np.ndarray
    flows: np.ndarray

    def __init__(self, folder: Path, writable: bool) -> None:
        """Use `create` or `open`."""
        self.folder = folder
        self._maps: list[mmap.mmap] = []
        for name, (dtype, shape) in ARRAYS.items():
            size = dtype.itemsize * int(np.prod(shape))
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            with (folder / name).open("r+b" if writable else "rb") as file:
                mapped = mmap.mmap(file.fileno(), size, access=access)
            self._maps.append(mapped)
            setattr(self, name, np.frombuffer(mapped, dtype).reshape(shape))

    @classmethod
    def create(cls, run_dir: Path) -> "Shm":
        """Map for writing; make the files, or keep them when their layout is ours."""
        folder = Path(run_dir) / "shm"
        layout = folder / "layout"
        if folder.exists() and _read(layout) != _layout():
            shutil.rmtree(folder)
        if not folder.exists():
            fresh = folder.with_name(f"shm.{os.getpid()}")
            fresh.mkdir(parents=True)
            for name, (dtype, shape) in ARRAYS.items():
                with (fresh / name).open("wb") as file:
                    file.truncate(dtype.itemsize * int(np.prod(shape)))
            (fresh / "layout").write_text(json.dumps(_layout()))
            fresh.rename(folder)
        return cls(folder, writable=True)

    @classmethod
    def open(cls, run_dir: Path, writable: bool = False) -> "Shm":
        """Map what is there. FileNotFoundError: no daemon has run here; LayoutError: another version."""
        folder = Path(run_dir) / "shm"
        found = _read(folder / "layout")
        if found is None:
            raise FileNotFoundError(
                f"no tables in {folder}: Penstock has not run here; start it with `penstock run`"
            )
        if found != _layout():
            raise LayoutError(
                f"{folder} has layout version {found.get('abi')}, this is version "
                f"{CONST['ABI_VERSION']}: restart the agent and the forwarder together"
            )
        return cls(folder, writable)

    @property
    def on_tmpfs(self) -> bool:
        """True when the files cost no disk."""
        command = ["stat", "-f", "-c", "%T", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() in ("tmpfs", "ramfs", "hugetlbfs")

    def close(self) -> None:
        """Forget the arrays; memory goes once nobody else holds a view."""
        for name in ARRAYS:
            if hasattr(self, name):
                delattr(self, name)
        for mapped in self._maps:
            try:
                mapped.close()
            except BufferError:
                continue  # a view is still alive: it keeps its mapping
        self._maps.clear()

    def __enter__(self) -> "Shm":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _read(layout: Path) -> dict | None:
    try:
        return json.loads(layout.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
