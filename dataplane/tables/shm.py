"""Tables and counters in files that the agent and the forwarder map.

Rule: shared memory is arrays of the types of xdp/abi.h and nothing else; what does not match in
version or size is not mapped.

Theory. Each array is a sparse file in RUN_DIR/shm, so an empty route table of 256 MiB takes no
memory, and a process that dies leaves it to the next one. The file `layout` says what the others
hold; it is written last. Files of another layout are unlinked, not overwritten: a process that
still maps them keeps its own. RUN_DIR belongs on tmpfs (on ext4 the dirty-page bookkeeping costs a
busy forwarder about 70 ns a packet). A hole is read through the file, never through the mapping: a
touched page of a mapping is a page taken. Counters have a row a worker; the last one is the flow
table's, where there is one.
"""

import contextlib
import json
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from dataplane.tables.errors import LayoutError, NotRunningError, TableError
from xdp import libc
from xdp.abi import CONST, DTYPE

LAYOUT = "layout"
FREE_LEAST = 96 << 20  # bytes: the counters, and a default route in fib4_wide

_WORKERS = CONST["WORKERS_MAX"]
_LANES = CONST["DNS_LANES"]
_ADJACENCIES = CONST["ADJACENCIES_MAX"]
_TAPS = CONST["TAPS_MAX"]
_TAP_RECORDS = CONST["TAP_RING_BYTES"] // DTYPE["tap_record"].itemsize

ARRAYS = MappingProxyType(
    {
        "node": (DTYPE["node"], (1,)),
        "ports": (DTYPE["port"], (CONST["PORTS_MAX"],)),
        "adjacencies": (DTYPE["adjacency"], (_ADJACENCIES,)),
        "rewrites": (np.dtype("u1"), (_ADJACENCIES, CONST["HEADER_MAX"])),
        "fib4_wide": (np.dtype("<u4"), (CONST["FIB4_WIDE"],)),
        "fib4_deep": (np.dtype("<u4"), (CONST["FIB4_GROUPS"] * 256,)),
        "fib6": (DTYPE["fib6_entry"], (CONST["FIB6_SLOTS"],)),
        "fib6_lengths": (np.dtype("<u8"), (4,)),
        "control": (DTYPE["control"], (1,)),
        "peers": (DTYPE["peer"], (CONST["PEERS_MAX"],)),
        "ipcache4_wide": (np.dtype("<u4"), (CONST["FIB4_WIDE"],)),
        "ipcache4_deep": (np.dtype("<u4"), (CONST["IPCACHE4_GROUPS"] * 256,)),
        "ipcache6": (DTYPE["fib6_entry"], (CONST["IPCACHE6_SLOTS"],)),
        "ipcache6_lengths": (np.dtype("<u8"), (4,)),
        "identity_peers": (np.dtype("<u4"), (CONST["IDENTITIES_MAX"],)),
        "subjects": (DTYPE["subject"], (CONST["PORTS_MAX"],)),
        "policies": (DTYPE["policy"], (CONST["POLICIES_MAX"],)),
        "policy_entries": (DTYPE["policy_entry"], (CONST["POLICY_SLOTS"],)),
        "frontends": (DTYPE["frontend"], (CONST["FRONTEND_SLOTS"],)),
        "services": (DTYPE["service"], (CONST["SERVICES_MAX"],)),
        "backends": (DTYPE["backend"], (CONST["BACKENDS_MAX"],)),
        "backend_lists": (np.dtype("<u4"), (CONST["BACKEND_LISTS"],)),
        "maglev": (np.dtype("<u4"), (CONST["MAGLEV_WORDS"],)),
        "source_ranges": (DTYPE["source_range"], (CONST["SOURCE_RANGES_MAX"],)),
        "node_ports": (np.dtype("u1"), (CONST["NAT_PROTOCOLS"], 8192)),
        "affinities": (DTYPE["affinity"], (CONST["AFFINITY_SLOTS"],)),
        "connections": (DTYPE["connection"], (CONST["CONNECTIONS_MOST"],)),
        "connection_index": (np.dtype("<u8"), (CONST["CONNECTION_SLOTS"],)),
        "track_counters": (DTYPE["track_counter"], (_WORKERS + 1,)),
        "exhausted": (DTYPE["exhausted"], (_WORKERS, CONST["EXHAUSTED_MAX"])),
        "flow_seen": (DTYPE["flow_seen"], (CONST["FLOW_SLOTS_MOST"],)),
        "reasons": (DTYPE["reason_counter"], (_WORKERS + 1, 2, CONST["REASONS_MAX"])),
        "port_counters": (DTYPE["port_counter"], (_WORKERS + 1, CONST["PORTS_MAX"])),
        "naming": (DTYPE["naming"], (1,)),
        "name_patterns": (DTYPE["name_pattern"], (CONST["NAME_PATTERNS_MAX"],)),
        "name_pattern_slots": (DTYPE["name_slot"], (CONST["NAME_PATTERN_SLOTS"],)),
        "names": (DTYPE["name"], (CONST["NAMES_MAX"],)),
        "name_index": (np.dtype("<u8"), (CONST["NAMES_MAX"],)),
        "learned": (DTYPE["learned"], (CONST["LEARNED_MAX"],)),
        "learned_index": (np.dtype("<u8"), (CONST["LEARNED_MAX"],)),
        "dns_queries": (DTYPE["dns_query"], (CONST["QUERIES_MAX"],)),
        "dns_pods": (DTYPE["dns_counter"], (_LANES, CONST["PORTS_MAX"])),
        "dns_kinds": (DTYPE["dns_kind"], (_LANES, CONST["PORTS_MAX"], CONST["DNS_KINDS"])),
        "dns_servers": (DTYPE["dns_counter"], (_LANES, CONST["DNS_SERVERS_MAX"])),
        "dns_events": (DTYPE["dns_event"], (_LANES, CONST["DNS_EVENTS_MAX"])),
        "dns_notes": (DTYPE["naming_counter"], (_LANES,)),
        "worker_stats": (DTYPE["worker_stats"], (_WORKERS,)),
        "flow_records": (DTYPE["flow_record"], (_WORKERS + 1, CONST["EVENTS_MAX"])),
        "event_rings": (DTYPE["event_ring"], (_WORKERS + 1,)),
        "taps": (DTYPE["tap"], (_TAPS,)),
        "tap_programs": (DTYPE["tap_instruction"], (_TAPS, CONST["TAP_INSTRUCTIONS_MAX"])),
        "tap_rings": (DTYPE["tap_ring"], (_WORKERS, _TAPS)),
        "tap_space": (DTYPE["tap_record"], (_WORKERS, _TAPS, _TAP_RECORDS)),
    }
)
"""File -> dtype and shape of its array."""


def _size(name: str) -> int:
    dtype, shape = ARRAYS[name]
    return dtype.itemsize * math.prod(shape)


def _layout() -> dict[str, Any]:
    files = {name: [dtype.itemsize, *shape] for name, (dtype, shape) in ARRAYS.items()}
    return {"abi_version": CONST["ABI_VERSION"], "files": files}


class Shm:
    """The arrays of one node; dtypes and shapes are those of ARRAYS. A context manager."""

    node: np.ndarray
    ports: np.ndarray
    adjacencies: np.ndarray
    rewrites: np.ndarray
    fib4_wide: np.ndarray
    fib4_deep: np.ndarray
    fib6: np.ndarray
    fib6_lengths: np.ndarray
    control: np.ndarray
    peers: np.ndarray
    ipcache4_wide: np.ndarray
    ipcache4_deep: np.ndarray
    ipcache6: np.ndarray
    ipcache6_lengths: np.ndarray
    identity_peers: np.ndarray
    subjects: np.ndarray
    policies: np.ndarray
    policy_entries: np.ndarray
    frontends: np.ndarray
    services: np.ndarray
    backends: np.ndarray
    backend_lists: np.ndarray
    maglev: np.ndarray
    source_ranges: np.ndarray
    node_ports: np.ndarray
    affinities: np.ndarray
    connections: np.ndarray
    connection_index: np.ndarray
    track_counters: np.ndarray
    exhausted: np.ndarray
    flow_seen: np.ndarray
    naming: np.ndarray
    name_patterns: np.ndarray
    name_pattern_slots: np.ndarray
    names: np.ndarray
    name_index: np.ndarray
    learned: np.ndarray
    learned_index: np.ndarray
    dns_queries: np.ndarray
    dns_pods: np.ndarray
    dns_kinds: np.ndarray
    dns_servers: np.ndarray
    dns_events: np.ndarray
    dns_notes: np.ndarray
    reasons: np.ndarray
    port_counters: np.ndarray
    worker_stats: np.ndarray
    flow_records: np.ndarray
    event_rings: np.ndarray
    taps: np.ndarray
    tap_programs: np.ndarray
    tap_rings: np.ndarray
    tap_space: np.ndarray

    def __init__(self, folder: Path, writable: bool) -> None:
        """Map files whose layout has been checked; use create() or open()."""
        self.folder = folder
        self.writable = writable
        for name, (dtype, shape) in ARRAYS.items():
            with (folder / name).open("r+b" if writable else "rb") as file:
                access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
                mapped = mmap.mmap(file.fileno(), _size(name), access=access)
            setattr(self, name, np.frombuffer(mapped, dtype).reshape(shape))

    @classmethod
    def create(cls, run_dir: Path) -> "Shm":
        """Map RUN_DIR/shm for writing, made anew only when it is missing or of another layout.

        Raises TableError when there is no room, OSError when the folder cannot be made.
        """
        folder = Path(run_dir) / "shm"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _problem(folder):
            _make(folder)
        return cls(folder, writable=True)

    @classmethod
    def open(cls, run_dir: Path, writable: bool = False) -> "Shm":
        """Map what create() made. Raises NotRunningError when nothing is there, or LayoutError."""
        folder = Path(run_dir) / "shm"
        if not (folder / LAYOUT).exists():
            raise NotRunningError(
                f"{folder} has no tables: the daemon has not run here; start `penstock run`, or "
                "name its configuration with --config"
            )
        problem = _problem(folder)
        if problem:
            raise LayoutError(f"{problem}; restart `penstock run`, which makes the tables anew")
        return cls(folder, writable)

    @property
    def on_tmpfs(self) -> bool:
        """Whether the files are memory; False: they are on a disk, which slows the forwarder."""
        return _filesystem(self.folder) in ("tmpfs", "devtmpfs")

    def extents(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield the (first, end) rows of an array's file that are not holes, in order."""
        itemsize = ARRAYS[name][0].itemsize
        with (self.folder / name).open("rb") as file, contextlib.suppress(OSError):
            end = 0
            while True:  # ENXIO at the last hole ends it
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                yield start // itemsize, -(-end // itemsize)

    def clear(self, name: str) -> None:
        """Make an array all zeros and give its memory back, for everybody who maps it."""
        with (self.folder / name).open("r+b") as file:
            libc.punch_hole(file.fileno(), _size(name))

    def close(self) -> None:
        """Let go of the arrays; memory is unmapped when nobody else holds a view of it."""
        for name in ARRAYS:
            self.__dict__.pop(name, None)

    def __enter__(self) -> "Shm":
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def _problem(folder: Path) -> str:
    """Return what is wrong with the files, in words; empty when they can be mapped."""
    try:
        found = json.loads((folder / LAYOUT).read_text())
        sizes = {name: (folder / name).stat().st_size for name in ARRAYS}
    except (OSError, ValueError) as error:
        return f"{folder} cannot be read ({error})"
    if found != _layout():
        version = found.get("abi_version") if isinstance(found, dict) else None
        return f"{folder} has ABI version {version}, this program {CONST['ABI_VERSION']}"
    for name, size in sizes.items():
        if size != _size(name):
            return f"{folder / name} has {size} bytes instead of {_size(name)}"
    return ""


def _make(folder: Path) -> None:
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    if free < FREE_LEAST:
        raise TableError(
            f"{folder} has {free >> 20} MiB free, the tables need {FREE_LEAST >> 20} MiB or more: "
            "enlarge the tmpfs (mount -o remount,size=...) or set node.run_dir to a larger one"
        )
    (folder / LAYOUT).unlink(missing_ok=True)
    for name in ARRAYS:
        path = folder / name
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, _size(name))
        finally:
            os.close(fd)
    beside = folder / f".{LAYOUT}"
    beside.write_text(json.dumps(_layout()))
    beside.rename(folder / LAYOUT)


def _filesystem(path: Path) -> str:
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return ""
