"""The sink: what arrives at a device is counted and dropped before it becomes an skb.

Rule: delivered means counted here, at the far end; what a generator offered is not a result.

Theory. `count_drop` (xdp/bpf/pass.bpf.c) counts per CPU. It is attached native, which also gives
the veth NAPI, without which redirected frames vanish (drivers/net/veth.c, veth_xdp_xmit).
"""

import contextlib
import socket
import time
from collections.abc import Iterator

import numpy as np

from bench.lab import Namespace
from xdp.artifacts import find
from xdp.link import attach_netlink, detach_netlink
from xdp.object import BpfObject, ObjectSpec

COUNT = np.dtype([("packets", np.uint64), ("bytes", np.uint64)])


class Sink:
    """A counter on a device."""

    def __init__(self, bpf: BpfObject) -> None:
        """bpf: the loaded pass.bpf.o."""
        self._map = bpf.maps["counters"]

    def packets(self) -> int:
        """Packets so far."""
        return int(self._map.lookup_per_cpu(0, COUNT)["packets"].sum())

    def rate(self, seconds: float) -> float:
        """Packets a second over the next `seconds`."""
        before, start = self.packets(), time.perf_counter()
        time.sleep(seconds)
        after, end = self.packets(), time.perf_counter()
        return (after - before) / (end - start)


@contextlib.contextmanager
def sink(namespace: Namespace, device: str) -> Iterator[Sink]:
    """Count and drop at a device for the body."""
    with namespace.inside(), BpfObject(ObjectSpec.load(find("pass.bpf.o"))) as bpf:
        ifindex = socket.if_nametoindex(device)
        attach_netlink(bpf.programs["count_drop"], ifindex)
        try:
            yield Sink(bpf)
        finally:
            detach_netlink(ifindex)
