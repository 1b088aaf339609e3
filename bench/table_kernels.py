"""Loops over a table's lookup, for bench/tables.py: kernels of the forwarder, many packets a call.

Rule: the lookups are the forwarder's own; nothing is specialised for the benchmark.

Theory. Vectors as the forwarder has them, with the prefetch that its stages do before they look.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.ahead import CHUNK, ask_place, ask_policies
from dataplane.kernels.batch import KIND_IP4
from dataplane.kernels.house import kernel
from dataplane.kernels.route import AHEAD, ask4, lookup
from dataplane.kernels.verdict import judge_both
from xdp.abi import CONST

VECTOR = CONST["VECTOR_MAX"]
ZERO = np.uint64(0)


@kernel
def route_all(t, addresses):
    """Look up IPv4 addresses (uint64); return a sum of what was found, so that it is done."""
    wide = t.fib4_wide.address
    total = np.int64(0)
    for first in range(0, len(addresses), VECTOR):
        end = min(first + VECTOR, len(addresses))
        for i in range(first, min(first + AHEAD, end)):
            ask4(wide, addresses[i])
        for i in range(first, end):
            if i + AHEAD < end:
                ask4(wide, addresses[i + AHEAD])
            total += lookup(t, KIND_IP4, ZERO, addresses[i])
    return total


@kernel
def verdict_all(t, sources, targets, ports):
    """Judge TCP connections between IPv4 addresses (uint64) to ports (int64); return who may."""
    allowed = np.int64(0)
    for first in range(0, len(sources), CHUNK):
        end = min(first + CHUNK, len(sources))
        for i in range(first, end):
            ask_place(t, KIND_IP4, ZERO, sources[i])
            ask_place(t, KIND_IP4, ZERO, targets[i])
        for i in range(first, end):
            ask_policies(t, KIND_IP4, ZERO, sources[i], ZERO, targets[i], wire.TCP, ports[i])
        for i in range(first, end):
            verdict = judge_both(
                t, KIND_IP4, ZERO, sources[i], ZERO, targets[i], wire.TCP, ports[i], 0, 1
            )  # fmt: skip
            allowed += verdict.reason == 0
    return allowed
