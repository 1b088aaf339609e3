"""Loops over a table's lookup, for bench/tables.py: kernels of the forwarder, many packets a call.

Rule: the lookups are the forwarder's own; nothing is specialised for the benchmark.

Theory. Vectors of 256, with the prefetch that the stages do before they look, as the forwarder has.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.ahead import ask_place, ask_policies
from dataplane.kernels.batch import KIND_IP4
from dataplane.kernels.house import kernel, prefetch
from dataplane.kernels.route import lookup
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
        for i in range(first, end):
            prefetch(wide + np.int64(addresses[i] >> np.uint64(8)) * 4)  # type: ignore[call-arg]
        for i in range(first, end):
            total += lookup(t, KIND_IP4, ZERO, addresses[i])
    return total


@kernel
def verdict_all(t, sources, targets, ports):
    """Judge TCP connections between IPv4 addresses (uint64) to ports (int64); return who may."""
    allowed = np.int64(0)
    for first in range(0, len(sources), VECTOR):
        end = min(first + VECTOR, len(sources))
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
