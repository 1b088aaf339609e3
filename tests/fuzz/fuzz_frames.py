"""Millions of bad frames through all stages: `python -m tests.fuzz.fuzz_frames --frames 10000000`.

Rule: whatever comes in, each packet ends as sent or dropped with a known reason, inside its
frame, and nothing outside its frame is written.

Theory. The vector is built by numpy from a corpus of valid frames (tests/strategies.py, and what
the node answers) and random bytes: each frame is cut to a random length and has random bytes
overwritten, mostly in its headers; of some only a first segment is in the frame. Tunnel packets
come mostly from the uplink, else they would not be opened. All stages run (loop.process). Between
vectors the invariants are checked with numpy, so that ten million frames take minutes. A failure
prints the seed and the frame.
"""

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from scapy.all import ARP, ICMP, IP, TCP, UDP, Ether, IPv6, Raw, raw
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr

from dataplane.engine import loop
from dataplane.kernels.batch import VERDICT_DROP, VERDICT_SEND
from tests.worlds import (
    FAR4,
    FAR6,
    FILL,
    GATEWAY_MAC,
    HEADROOM,
    POD4,
    POD6,
    POD_A,
    POD_MACS,
    ROUTER4,
    ROUTER6,
    STRIDE,
    UPLINK,
    World,
)
from xdp.abi import CONST, REASON_TEXT, value

VECTOR = CONST["VECTOR_MAX"]
LONGEST = 256
PORTS_USED = 4
L2 = Ether(src=POD_MACS[POD_A].hex(":"), dst=GATEWAY_MAC.hex(":"))
RATE = 100_000  # answers a second; a vector takes a millisecond, so some are refused


def corpus(world: World) -> tuple[list[bytes], list[bytes]]:
    """Return valid frames of every kind, and tunnel packets that node 2 sends."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from tests.strategies import valid

    found: list[bytes] = []

    @seed(1)
    @settings(
        max_examples=400,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(valid)
    def gather(frame: bytes) -> None:
        found.append(frame[:LONGEST])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gather()
    return found + _controls(), _tunnelled(world) if world.tunnel else []


def _controls() -> list[bytes]:
    """Return what the node answers: ARP, neighbour solicitations, pings; often, to be chosen."""
    four = IP(src=str(POD4[POD_A]), dst=str(ROUTER4))
    six = IPv6(src=str(POD6[POD_A]), dst=str(ROUTER6))
    packets = [
        ARP(hwsrc=L2.src, psrc=four.src, pdst=four.dst),
        six / ICMPv6ND_NS(tgt=six.dst) / ICMPv6NDOptSrcLLAddr(lladdr=L2.src),
        four / ICMP(id=1) / Raw(bytes(range(56))),
        six / ICMPv6EchoRequest(data=bytes(range(56))),
    ]
    return [raw(L2 / packet) for packet in packets] * 10


def _tunnelled(world: World) -> list[bytes]:
    """Return what node 2 sends through the tunnel to pod A; often, to be chosen."""
    found = []
    for ip in (
        IP(src=str(POD4[POD_A]), dst=str(FAR4[9])),
        IPv6(src=str(POD6[POD_A]), dst=str(FAR6[9])),
    ):
        for packet in (UDP(sport=9, dport=53), TCP(sport=9, dport=80), ICMP(), Raw(bytes(40))):
            result = world.one(POD_A, raw(L2 / ip / packet / Raw(b"data")))
            assert result.sent
            found.append(_returned(result.frame))
    return found * 20


def _swapped(frame: bytes, at: int) -> bytes:
    """Exchange the addresses of the IP packet at `at`; checksums stay right."""
    first, size = (at + 12, 4) if frame[at] >> 4 == 4 else (at + 8, 16)
    second, end = first + size, first + 2 * size
    return frame[:first] + frame[second:end] + frame[first:second] + frame[end:]


def _returned(frame: bytes) -> bytes:
    """A tunnel packet of ours as node 2 would send it back."""
    inner = 14 + (20 if frame[14] >> 4 == 4 else 40) + 8 + 8 + 14
    return _swapped(_swapped(frame, 14), inner)


class Fuzzer:
    """One world and its generator of vectors."""

    def __init__(self, world: World, seed: int) -> None:
        """seed: of numpy's generator; the same seed gives the same frames."""
        self.world = world
        self.random = np.random.default_rng(seed)
        plain, tunnelled = corpus(world)
        frames = plain + tunnelled
        self.from_uplink = np.arange(len(frames)) >= len(plain)
        self.frames = np.zeros((len(frames), LONGEST), np.uint8)
        self.lengths = np.array([len(frame) for frame in frames])
        for row, frame in zip(self.frames, frames, strict=True):
            row[: len(frame)] = np.frombuffer(frame, np.uint8)
        self.area = world.area.reshape(VECTOR, STRIDE)
        self.reasons: dict[int, int] = {}

    def vector(self) -> np.ndarray:
        """Fill the area with a vector of mutated frames; return their lengths."""
        random = self.random
        chosen = random.integers(0, len(self.frames), VECTOR)
        data, lengths = self.frames[chosen], self.lengths[chosen].copy()
        noise = random.integers(0, 256, (VECTOR, LONGEST), dtype=np.uint8)
        where = random.random((VECTOR, LONGEST)) < random.choice([0.0, 0.005, 0.05, 1.0])
        where[:, 64:] &= random.random() < 0.3
        data = np.where(where, noise, data)
        totals = np.where(random.random(VECTOR) < 0.15, lengths, 0)
        cut = (random.random(VECTOR) < 0.3) | (totals > 0)
        lengths[cut] = random.integers(0, LONGEST + 1, int(cut.sum()))
        self.area[:] = FILL
        body = self.area[:, HEADROOM : HEADROOM + LONGEST]
        inside = np.arange(LONGEST)[None, :] < lengths[:, None]
        body[inside] = data[inside]
        b = self.world.batch
        base = np.arange(VECTOR) * STRIDE
        b.count[0] = VECTOR
        self.world.now += 1_000_000
        b.now_ns[0] = self.world.now
        b.frame[:] = base
        b.address[:] = self.world.area.ctypes.data + base + HEADROOM
        b.length[:] = lengths
        b.total[:] = np.maximum(lengths, totals)
        b.segments[:] = b.total > b.length
        ports = random.integers(0, PORTS_USED, VECTOR)
        outside = self.from_uplink[chosen] & (random.random(VECTOR) < 0.9)
        b.ingress[:] = np.where(outside, UPLINK, ports)
        b.egress[:] = -1
        for column in (b.verdict, b.reason, b.kind, b.flags, b.adjacency):
            column[:] = 0
        return lengths

    def check(self, lengths: np.ndarray) -> None:
        """Raise AssertionError when an invariant does not hold."""
        b = self.world.batch
        done = (b.verdict == VERDICT_SEND) | (b.verdict == VERDICT_DROP)
        self._all(done, "a packet without a verdict")
        self._all(np.isin(b.reason, list(REASON_TEXT)), "a reason that abi.h does not name")
        sent = b.verdict == VERDICT_SEND
        self._all(~sent | ((b.egress >= 0) & (b.egress < PORTS_USED)), "an egress that is no port")
        dropped = b.reason >= value("REASON_INVALID_SOURCE_IP")
        self._all(sent | dropped, "a drop whose reason is none")
        start = b.address - self.world.area.ctypes.data - np.arange(VECTOR) * STRIDE
        self._all(start >= HEADROOM - 128, "a packet that starts before its headroom")
        self._all(~sent | (start + b.length <= STRIDE), "a packet that ends behind its frame")
        self._all(~sent | (b.length >= 14), "a packet without a header")
        after = np.maximum(lengths, 128)[:, None] + HEADROOM <= np.arange(STRIDE)[None, :]
        self._all(((self.area == FILL) | ~after).all(axis=1), "a write behind a frame")
        self._all((self.area[:, : HEADROOM - 128] == FILL).all(axis=1), "a write before a frame")
        for reason, count in zip(*np.unique(b.reason, return_counts=True), strict=True):
            self.reasons[int(reason)] = self.reasons.get(int(reason), 0) + int(count)

    def _all(self, holds: np.ndarray, what: str) -> None:
        for i in np.flatnonzero(~holds):
            raise AssertionError(f"{what}: packet {i}: {self.area[i, :512].tobytes().hex()}")

    def run(self, frames: int) -> None:
        """Send at least so many frames."""
        world = self.world
        for number in range(-(-frames // VECTOR)):
            lengths = self.vector()
            loop.process(world.batch, world.tables, world.counters)
            loop.tally(world.batch, world.tables, world.counters)
            if number % 8 == 0 or frames <= 1_000_000:
                self.check(lengths)


def main(arguments: list[str] | None = None) -> int:
    """Fuzz all tunnels; print the reasons seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args(arguments)
    worlds = [("TUNNEL_VXLAN", 4), ("TUNNEL_GENEVE", 4), ("TUNNEL_VXLAN", 6), ("TUNNEL_NONE", 4)]
    start = time.monotonic()
    seen: dict[int, int] = {}
    for number, (tunnel, underlay) in enumerate(worlds):
        with tempfile.TemporaryDirectory(prefix="penstock-fuzz-") as folder:
            fuzzer = Fuzzer(World(Path(folder), tunnel, underlay, RATE), options.seed + number)
            try:
                fuzzer.run(options.frames // len(worlds))
            except AssertionError as error:
                print(f"seed {options.seed}, {tunnel} over IPv{underlay}: {error}", file=sys.stderr)
                return 1
            for reason, count in fuzzer.reasons.items():
                seen[reason] = seen.get(reason, 0) + count
    for reason, count in sorted(seen.items(), key=lambda item: -item[1]):
        print(f"{count:>12,}  {reason:>3}  {REASON_TEXT[reason]}")
    passed = time.monotonic() - start
    print(f"{options.frames:,} frames in {passed:.0f} s, seed {options.seed}: no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
