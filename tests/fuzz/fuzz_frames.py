"""Millions of bad frames through all stages: `python -m tests.fuzz.fuzz_frames --frames 10000000`.

Rule: whatever comes in, each packet ends as sent, held or dropped with a known reason, inside its
frame, and nothing outside its frame is written.

Theory. The vector is built by numpy from a corpus of valid frames (corpus.py) and random bytes:
each frame is cut to a random length and has random bytes overwritten, mostly in its headers; of
some only a first segment is in the frame. Most come in where they belong, else they would not be
opened or tracked. All stages run (loop.process), with policies that change, services, masquerading
and a small table of connections. Between vectors the invariants are checked with numpy, so that ten
million frames take minutes; of a few vectors the translated packets are summed anew, and the table
of connections is audited (tests/records.py). A failure prints the seed and the frame.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dataplane.kernels.batch import (
    FLAG_FRAGMENT,
    FLAG_NAT,
    VERDICT_DROP,
    VERDICT_HOLD,
    VERDICT_SEND,
)
from tests import records
from tests.fuzz.corpus import LONGEST, corpus
from tests.naive.headers import Refused
from tests.naive.packets import read
from tests.naive.rewrite import is_right
from tests.places import PEERS, SERVICES, read_in
from tests.setting import ALLOW, DENY, Agent, Entry, Policy, Setting, word
from tests.worlds import FILL, HEADROOM, POD_A, POD_B, STRIDE, World
from xdp.abi import CONST, REASON_TEXT, value

VECTOR = CONST["VECTOR_MAX"]
PORTS_USED = 4
RATE = 100_000  # answers a second; a vector takes a millisecond, so some are refused
RECORDS = 1024
CHANGE, SUM, AUDIT = 64, 32, 1024  # vectors between changes, sums, audits

SETTINGS = [
    Setting(peers=PEERS, services=SERVICES, masquerade=True),
    Setting(
        peers=PEERS,
        policies={
            POD_A: Policy(egress=(Entry(word(DENY, 1, "RESET"), 2, 6, 80, 16),)),
            POD_B: Policy(
                ingress=(Entry(word(ALLOW, 2), 1), Entry(word(DENY, 3), 0, 17)),
                ingress_otherwise=word(DENY, 4, "ICMP"),
            ),
        },
        services=SERVICES[: len(SERVICES) // 2],
        masquerade=True,
        nat=(41000, 2),
    ),
    Setting(
        peers=PEERS,
        policies={
            POD_A: Policy(egress_otherwise=word(DENY, 5), flags=CONST["POLICY_AUDIT"]),
            POD_B: None,
        },
        services=SERVICES,
        flags=CONST["NODE_POLICY_HAIRPIN"],
    ),
]


class Fuzzer:
    """One world and its generator of vectors."""

    def __init__(self, world: World, seed: int) -> None:
        """seed: of numpy's generator; the same seed gives the same frames."""
        self.world, self.agent = world, Agent(world)
        self.random = np.random.default_rng(seed)
        self.agent.write(SETTINGS[0])
        frames = corpus(world)
        world.forget()
        self.homes = np.array([port for port, _ in frames])
        self.frames = np.zeros((len(frames), LONGEST), np.uint8)
        self.lengths = np.array([len(frame) for _, frame in frames])
        for row, (_, frame) in zip(self.frames, frames, strict=True):
            row[: len(frame)] = np.frombuffer(frame, np.uint8)
        self.area = world.area.reshape(VECTOR, STRIDE)
        self.reasons: dict[int, int] = {}
        self.summed = 0

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
        b.area[0] = self.world.area.ctypes.data
        self.world.now += 1_000_000
        b.now_ns[0] = self.world.now
        b.frame[:VECTOR] = base
        b.address[:VECTOR] = self.world.area.ctypes.data + base + HEADROOM
        b.length[:VECTOR] = lengths
        b.total[:VECTOR] = np.maximum(lengths, totals)
        b.segments[:] = b.total > b.length
        b.segment_length[:VECTOR] = (b.total - b.length)[:VECTOR]  # a continuation's bytes: its own
        b.segment_first[:VECTOR] = np.arange(VECTOR)
        b.segment_frame[:VECTOR], b.segment_offset[:VECTOR] = base, HEADROOM + LONGEST
        ports = random.integers(0, PORTS_USED, VECTOR)
        at_home = (self.homes[chosen] >= 0) & (random.random(VECTOR) < 0.95)
        b.ingress[:VECTOR] = np.where(at_home, self.homes[chosen], ports)
        b.egress[:] = -1
        for column in (b.verdict, b.reason, b.kind, b.flags, b.adjacency, b.identity, b.refusal):
            column[:] = 0
        return lengths

    def check(self, lengths: np.ndarray) -> None:
        """Raise AssertionError when an invariant does not hold."""
        b = self.world.batch
        verdict, reason = b.verdict[:VECTOR], b.reason[:VECTOR]
        sent, held = verdict == VERDICT_SEND, verdict == VERDICT_HOLD
        self._all(sent | held | (verdict == VERDICT_DROP), "a packet without a verdict")
        self._all(np.isin(reason, list(REASON_TEXT)), "a reason that abi.h does not name")
        egress = b.egress[:VECTOR]
        self._all(~sent | ((egress >= 0) & (egress < PORTS_USED)), "an egress that is no port")
        dropped = reason >= value("REASON_INVALID_SOURCE_IP")
        self._all(sent | held | dropped, "a drop whose reason is none")
        self._all(held == (reason == value("REASON_HELD")), "held without that reason, or not held")
        start = (b.address[:VECTOR] - self.world.area.ctypes.data) - np.arange(VECTOR) * STRIDE
        self._all(start >= HEADROOM - 128, "a packet that starts before its headroom")
        length = b.length[:VECTOR]
        self._all(~sent | (start + length <= STRIDE), "a packet that ends behind its frame")
        self._all(~sent | (length >= 14), "a packet without a header")
        after = np.maximum(lengths, 128)[:, None] + HEADROOM <= np.arange(STRIDE)[None, :]
        self._all(((self.area == FILL) | ~after).all(axis=1), "a write behind a frame")
        self._all((self.area[:, : HEADROOM - 128] == FILL).all(axis=1), "a write before a frame")
        for number, count in zip(*np.unique(reason, return_counts=True), strict=True):
            self.reasons[int(number)] = self.reasons.get(int(number), 0) + int(count)

    def _all(self, holds: np.ndarray, what: str) -> None:
        for i in np.flatnonzero(~holds):
            raise AssertionError(f"{what}: packet {i}: {self.area[i, :512].tobytes().hex()}")

    def sums(self, before: np.ndarray, lengths: np.ndarray, ports: np.ndarray) -> None:
        """Check that translated packets whose checksums were right still have right ones."""
        b = self.world.batch
        whole = (b.total == b.length)[:VECTOR] & ((b.flags & FLAG_FRAGMENT) == 0)[:VECTOR]
        sent = (b.verdict == VERDICT_SEND)[:VECTOR] & ((b.flags & FLAG_NAT) != 0)[:VECTOR]
        for i in np.flatnonzero(whole & sent):
            came = before[i, : lengths[i]].tobytes()
            start = int(b.address[i]) - self.world.area.ctypes.data
            left = self.world.area[start : start + int(b.length[i])].tobytes()
            if len(left) > LONGEST + 100 or not self._right(read_in, int(ports[i]), came):
                continue
            ip = left[14:] if int(b.l3[i]) == 14 else left
            inner = left[len(left) - int(b.ip_length[i]) :]
            assert self._right(lambda port, data: read(port, data), 0, inner), (
                f"a wrong checksum: packet {i}: {came.hex()} -> {ip.hex()}"
            )
            self.summed += 1

    @staticmethod
    def _right(reader, port: int, data: bytes) -> bool:
        try:
            packet = reader(port, data)
        except (Refused, IndexError):
            return False
        whole = packet.data[: packet.found["ip_length"]]
        return is_right(whole, packet.at, packet.tuple.protocol)

    def audit(self) -> None:
        """Check the table of connections, after a sweep."""
        self.world.sweep()
        records.audit(self.world)
        assert len(records.live(self.world)) <= RECORDS

    def run(self, frames: int) -> None:
        """Send at least so many frames."""
        world = self.world
        for number in range(-(-frames // VECTOR)):
            if number % CHANGE == CHANGE - 1:
                self.agent.write(SETTINGS[number // CHANGE % len(SETTINGS)])
                world.now += 10_000_000_000
            lengths = self.vector()
            summed = number % SUM == 0
            if summed:
                before = self.area[:, HEADROOM : HEADROOM + LONGEST].copy()
                ports = world.batch.ingress[:VECTOR].copy()
            world.process()
            world.tally()
            world.fragments.waiting["state"] = 0  # the engine would receive them again
            world.fragments.waiting_count[0] = 0
            if number % 8 == 0 or frames <= 1_000_000:
                self.check(lengths)
            if summed:
                self.sums(before, lengths, ports)
            if number % AUDIT == AUDIT - 1:
                self.audit()
        self.audit()


def main(arguments: list[str] | None = None) -> int:
    """Fuzz all tunnels; print the reasons seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args(arguments)
    worlds = [("TUNNEL_VXLAN", 4), ("TUNNEL_GENEVE", 4), ("TUNNEL_VXLAN", 6), ("TUNNEL_NONE", 4)]
    start = time.monotonic()
    seen: dict[int, int] = {}
    summed = 0
    for number, (tunnel, underlay) in enumerate(worlds):
        with tempfile.TemporaryDirectory(prefix="penstock-fuzz-") as folder:
            world = World(Path(folder), tunnel, underlay, RATE, 1, RECORDS)
            fuzzer = Fuzzer(world, options.seed + number)
            try:
                fuzzer.run(options.frames // len(worlds))
            except AssertionError as error:
                print(f"seed {options.seed}, {tunnel} over IPv{underlay}: {error}", file=sys.stderr)
                return 1
            summed += fuzzer.summed
            for reason, count in fuzzer.reasons.items():
                seen[reason] = seen.get(reason, 0) + count
    for reason, count in sorted(seen.items(), key=lambda item: -item[1]):
        print(f"{count:>12,}  {reason:>3}  {REASON_TEXT[reason]}")
    passed = time.monotonic() - start
    print(f"{summed:,} translated packets summed anew")
    print(f"{options.frames:,} frames in {passed:.0f} s, seed {options.seed}: no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
