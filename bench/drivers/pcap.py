"""The driver `pcap`: the frames of a file, or of the case, out of the client by AF_PACKET.

Rule: a frame leaves as the file has it, but for its MAC addresses, which are those of the path.

Theory. These packets are skbs, as those of programs are, and may be of any size that the MTU
allows; live frames end at a page. Without a file one is made of the case: as many frames as it has
flows, in the case's order, up to FRAMES_MOST. A file of somebody else's carries no mark, so all
that arrives at the far end is counted. Times of single packets are not taken.
"""

import contextlib
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from bench import traffic
from bench.drivers import Trial
from bench.drivers.frames import WARM_S, answer
from bench.lab import LabError, Process, eventually
from bench.scenario import Case
from bench.sink import Sink, sink
from bench.subjects.base import DEVICE, GENERATOR_CPU, Subject
from bench.usage import between, moment
from xdp.artifacts import find

FRAMES_MOST = 1 << 16
BYTES_MOST = 1 << 28
FILE = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1)
MAGICS = {0xA1B2C3D4: "<", 0xA1B23C4D: "<", 0xD4C3B2A1: ">", 0x4D3CB2A1: ">"}
SENT, NS, LEFT_OUT, DONE = range(4)


def of_case(path: traffic.Path, sent: traffic.Traffic) -> list[bytes]:
    """Return the frames of a case, in its order."""
    sizes = traffic.sizes(sent.size, path.family)
    order = traffic.sequence(sent)
    count = min(max(sent.flows, len(sizes)), FRAMES_MOST)
    flows = order[:count].tolist() if len(order) else range(count)
    found = []
    for n, flow in enumerate(flows):
        one = bytearray(traffic.frame(path, sizes[n % len(sizes)]))
        at = traffic.HEADERS[path.family] - 8
        source = traffic.SOURCE_PORT + (flow & (1 << sent.source_bits) - 1)
        target = path.target_port + (flow >> sent.source_bits) % traffic.PORTS_MOST
        if path.family == 6:  # the checksum follows: RFC 1624, from the frame of flow 0
            old, new = (
                traffic.total(bytes(one[at : at + 4])),
                traffic.total(struct.pack(">HH", source, target)),
            )
            check = struct.unpack_from(">H", one, at + 6)[0]
            sum_ = (0xFFFF - check) + (0xFFFF - old) + new
            sum_ = (sum_ & 0xFFFF) + (sum_ >> 16)
            sum_ = (sum_ & 0xFFFF) + (sum_ >> 16)
            struct.pack_into(">H", one, at + 6, (0xFFFF - sum_) or 0xFFFF)
        struct.pack_into(">HH", one, at, source, target)
        found.append(bytes(one))
    return found


def write(path: Path, frames: list[bytes]) -> None:
    """Write a classic pcap file."""
    parts = [FILE]
    for frame in frames:
        parts += [struct.pack("<IIII", 0, 0, len(frame), len(frame)), frame]
    path.write_bytes(b"".join(parts))


def read(path: Path) -> list[bytes]:
    """Read a classic pcap file of Ethernet. Raises LabError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LabError(f"{path}: {error.strerror}") from error
    order = MAGICS.get(struct.unpack_from("<I", data)[0] if len(data) >= len(FILE) else 0)
    if order is None or struct.unpack_from(f"{order}I", data, 20)[0] & 0xFFFF != 1:
        raise LabError(f"{path}: not a classic pcap file of Ethernet")
    if len(data) > BYTES_MOST:
        raise LabError(f"{path}: {len(data)} bytes, at most {BYTES_MOST}")
    found, at = [], len(FILE)
    while at + 16 <= len(data):
        length = struct.unpack_from(f"{order}I", data, at + 8)[0]
        found.append(data[at + 16 : at + 16 + length])
        at += 16 + length
    if at != len(data) or not found:
        raise LabError(f"{path}: ends in the middle of a packet, or holds none")
    return found


class Replay:
    """A session."""

    def __init__(self, subject: Subject, file: Path, far: Sink, marked: bool) -> None:
        """file: what is sent; marked: only frames with our mark count."""
        self._subject, self._file, self._far, self._marked = subject, file, far, marked
        self._counter = np.memmap(file.with_suffix(".count"), np.uint64, "w+", shape=(512,))

    def _arrived(self) -> int:
        found = self._far.arrived()
        return found.frames if self._marked else found.frames + found.others

    def _begin(self, *options: str) -> Process:
        self._counter[:] = 0
        command = [str(find("penstock-replay")), str(self._file), DEVICE]
        command += [str(self._file.with_suffix(".count")), *options]
        process = self._subject.client.namespace.spawn(*command, cpus=frozenset({GENERATOR_CPU}))
        eventually(lambda: self._moving(process), "penstock-replay", every=0.001)
        return process

    def _moving(self, process: Process) -> bool:
        if not process.alive and not self._counter[DONE]:
            raise LabError(f"penstock-replay has ended: {process.output()[-300:]}")
        return bool(self._counter[SENT])

    def flood(self, seconds: float) -> Trial:
        """Send as fast as possible; counts are of a window in the middle."""
        own, process = list(self._subject.pids()), self._begin()
        try:
            time.sleep(WARM_S)
            before = moment(own, process.pid)
            start = time.perf_counter(), self._arrived(), int(self._counter[SENT])
            time.sleep(seconds)
            end = time.perf_counter(), self._arrived(), int(self._counter[SENT])
            after = moment(own, process.pid)
        finally:
            process.stop()
        passed, arrived, sent = (b - a for a, b in zip(start, end, strict=True))
        return Trial(0.0, int(sent), int(arrived), passed, usage=between(before, after))

    def trial(self, rate: float, seconds: float, stamp: bool = False) -> Trial:
        """Send at a rate for a time and wait for the last frame."""
        if stamp:
            raise LabError("the driver pcap takes no times: use frames")
        return self._counted(rate, seconds, "-r", str(rate), "-t", str(seconds))

    def burst(self, frames: int) -> Trial:
        """Send frames back to back and wait for the last one."""
        return self._counted(0.0, frames / 10_000, "-n", str(frames))

    def _counted(self, rate: float, seconds: float, *options: str) -> Trial:
        self._far.settle()
        first = self._arrived()
        self._begin(*options).wait(seconds + 30)
        self._far.settle()
        sent, ns, left_out, _ = (int(n) for n in self._counter[:4])
        return Trial(rate, sent, self._arrived() - first, ns / 1e9, left_out)


@contextlib.contextmanager
def open_session(subject: Subject, case: Case, options: Mapping[str, str]) -> Iterator[Replay]:
    """Prepare a case; LabError for a file that cannot be sent."""
    if case.directions == 2:
        raise LabError("the driver pcap sends in one direction: use frames")
    given = options.get("pcap")
    path = subject.path()
    frames = read(Path(given)) if given else of_case(path, case.traffic)
    macs = bytes.fromhex((path.target_mac + path.source_mac).replace(":", ""))
    file = subject.lab.folder / "frames.pcap"
    write(file, [macs + frame[12:] for frame in frames])
    if not given:
        answer(subject, case)
    with sink(subject.server.namespace, DEVICE) as far:
        yield Replay(subject, file, far, not given)
