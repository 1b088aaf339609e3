"""The generator: 64-byte UDP frames as fast as one core can make them, out of a pod's own eth0.

Rule: one BPF_PROG_RUN call without end; counters are read in its middle; a signal ends it.

Theory. With BPF_F_TEST_XDP_LIVE_FRAMES the kernel runs `generate` (xdp/bpf/generator.bpf.c) on
recycled pages and carries out its redirect into the pod's veth, as fast as a dedicated generator
and on any machine. A call costs tens of milliseconds before its first frame, so short calls
measure their own dead time. The program walks the UDP source port through the flows. It runs in a
process of its own, pinned to a core: `python -m bench.generator` inside the pod's namespace. RFC
2544 names the frame sizes; a size counts the frame check sequence, as there: 64 is 60 bytes of
memory.
"""

import argparse
import contextlib
import json
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from ipaddress import IPv4Address

from bench.lab import LabError, Namespace, Process, eventually
from xdp.artifacts import find
from xdp.object import BpfObject, ObjectSpec
from xdp.run import live_frames

REPEAT = (1 << 31) - 1  # half an hour at a million a second; the signal comes first
PORT = 9  # discard, RFC 863
FCS = 4
HEADERS = 14 + 20 + 8
READY = "generating"


@dataclass(frozen=True)
class Flow:
    """What the frames carry. MACs "0a:..", size in bytes with frame check sequence."""

    source_mac: str
    target_mac: str
    source: str
    target: str
    size: int = 64

    def frame(self) -> bytes:
        """One frame: Ethernet, IPv4 (RFC 791), UDP without checksum (RFC 768)."""
        payload = self.size - FCS - HEADERS
        if payload < 0:
            raise LabError(f"frame size {self.size}: at least {HEADERS + FCS}")
        macs = bytes.fromhex((self.target_mac + self.source_mac).replace(":", ""))
        addresses = IPv4Address(self.source).packed + IPv4Address(self.target).packed
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 28 + payload, 0, 0x4000, 64, 17, 0) + addresses
        total = sum(struct.unpack(">10H", ip))
        total = (total & 0xFFFF) + (total >> 16)
        ip = ip[:10] + struct.pack(">H", 0xFFFF - total) + ip[12:]
        udp = struct.pack(">HHHH", 1024, PORT, 8 + payload, 0)
        return macs + b"\x08\x00" + ip + udp + bytes(payload)


def start(pod: Namespace, device: str, flow: Flow, flows: int, cpu: int) -> Process:
    """Generate `flows` (a power of two) flows from a pod on a core until stopped."""
    words = [sys.executable, "-m", "bench.generator", "--device", device, "--flows", str(flows)]
    words += ["--flow", json.dumps(vars(flow))]
    process = pod.spawn(*words, cpus=frozenset({cpu}))
    eventually(lambda: _started(process), f"a generator in {pod.name}")
    return process


def _started(process: Process) -> bool:
    if not process.alive:
        raise LabError(f"the generator has ended: {process.output()}")
    return READY in process.output()


def main() -> int:
    """Generate until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", required=True)
    parser.add_argument("--flow", required=True, type=json.loads)
    parser.add_argument("--flows", required=True, type=int)
    options = parser.parse_args()
    if options.flows & (options.flows - 1) or not 1 <= options.flows <= 32768:
        parser.error(f"--flows {options.flows}: must be a power of two, at most 32768")
    frame = Flow(**options.flow).frame()
    ifindex = socket.if_nametoindex(options.device)
    with BpfObject(ObjectSpec.load(find("generator.bpf.o"))) as bpf, contextlib.suppress(Stopped):
        bpf.maps["devices"].update(0, ifindex)
        headers = struct.pack("QQ48s", options.flows - 1, 0, frame[:HEADERS])
        bpf.maps["templates"].update(0, headers)
        signal.signal(signal.SIGTERM, _stop)
        print(READY, flush=True)
        live_frames(bpf.programs["generate"], frame, ifindex, REPEAT)
    return 0


class Stopped(BaseException):
    """SIGTERM came."""


def _stop(*_: object) -> None:
    raise Stopped


if __name__ == "__main__":
    sys.exit(main())
