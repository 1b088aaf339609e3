"""The sink: the generator's frames are counted where they arrive, before they become an skb.

Rule: delivered means counted here, at the far end; what a generator offered is not a result.

Theory. `collect` (xdp/bpf/sink.bpf.c) knows the generator's frames by their mark, counts and drops
them, and lets all others pass; `reflect` sends them back to where they came from. Both are attached
native, which also gives the veth NAPI, without which redirected frames vanish (drivers/net/veth.c,
veth_xdp_xmit). Times go into a log-linear histogram a CPU.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bench.histogram import Histogram
from bench.lab import LabError, Namespace
from bench.layout import LAYOUT, LIMITS
from xdp.artifacts import find
from xdp.link import attach_netlink, detach_netlink
from xdp.object import BpfObject, ObjectSpec

SUB_BITS = 7  # of sink.bpf.c's buckets
QUIET_S = 0.03  # nothing arrived for so long: nothing is under way
SETTLE_S = 3.0


@dataclass(frozen=True)
class Arrived:
    """What has arrived so far."""

    frames: int
    bytes: int
    others: int
    by_template: tuple[int, ...]

    def __sub__(self, earlier: "Arrived") -> "Arrived":
        pairs = zip(self.by_template, earlier.by_template, strict=True)
        return Arrived(
            self.frames - earlier.frames,
            self.bytes - earlier.bytes,
            self.others - earlier.others,
            tuple(after - before for after, before in pairs),
        )


class Sink:
    """A counter on a device."""

    def __init__(self, bpf: BpfObject) -> None:
        """bpf: the loaded sink.bpf.o."""
        self._counts, self._buckets = bpf.maps["counts"], bpf.maps["buckets"]
        self._before = np.zeros(LIMITS["BUCKETS_MAX"], np.uint64)

    def arrived(self) -> Arrived:
        """Frames so far."""
        rows = self._counts.lookup_per_cpu(0, LAYOUT["sink_count"])
        return Arrived(
            int(rows["packets"].sum()),
            int(rows["bytes"].sum()),
            int(rows["others"].sum()),
            tuple(int(n) for n in rows["by_template"].sum(axis=0)),
        )

    def packets(self) -> int:
        """Frames so far, as a number."""
        return self.arrived().frames

    def rate(self, seconds: float) -> float:
        """Frames a second over the next `seconds`."""
        before, start = self.packets(), time.perf_counter()
        time.sleep(seconds)
        after, end = self.packets(), time.perf_counter()
        return (after - before) / (end - start)

    def settle(self) -> Arrived:
        """Wait until nothing has arrived for a while; return what has."""
        found, since = self.arrived(), time.monotonic()
        deadline = since + SETTLE_S
        while time.monotonic() < deadline and time.monotonic() - since < QUIET_S:
            time.sleep(QUIET_S / 6)
            now = self.arrived()
            if now.frames != found.frames:
                found, since = now, time.monotonic()
        return found

    def times(self) -> Histogram:
        """Return the histogram of the stamped frames since the last call, in ns."""
        now = np.zeros(LIMITS["BUCKETS_MAX"], np.uint64)
        for bucket in range(LIMITS["BUCKETS_MAX"]):
            now[bucket] = self._buckets.lookup_per_cpu(bucket, np.dtype("<u8")).sum()
        fresh, self._before = now - self._before, now
        return Histogram.of_buckets(fresh, SUB_BITS)


@contextlib.contextmanager
def sink(namespace: Namespace, device: str, program: str = "collect") -> Iterator[Sink]:
    """Count at a device for the body. program: collect (and drop), or reflect (send back)."""
    link = namespace.link(device)
    if link is None:
        raise LabError(f"{namespace.name} has no {device}")
    ifindex = int(link["ifindex"])
    with BpfObject(ObjectSpec.load(find("sink.bpf.o"))) as bpf:
        with namespace.inside():
            bpf.maps["self"].update(0, ifindex)
            attach_netlink(bpf.programs[program], ifindex)
        try:
            yield Sink(bpf)
        finally:
            with namespace.inside():
                detach_netlink(ifindex)
