"""The tables that kernels read, as one NamedTuple of arrays.

Rule: kernels read tables and never write them; `buckets` alone is the worker's own state.

Theory. The agent writes the tables in shared memory (dataplane/tables) while workers read them. A
route word or a row's state byte is stored last, so that a reader sees the old or the new, and rows
that are in use are not changed. Structured arrays are passed as numba records (one per ABI struct).
"""

from typing import NamedTuple

import numpy as np

BUCKET_TOKENS = 0  # tokens left, in units of 1/1000 of a packet
BUCKET_TIME = 1  # time of the last refill, ns
BUCKET_DENIED = 2  # answers withheld since the start


class Tables(NamedTuple):
    """What the stages look things up in. Shapes and dtypes are those of xdp/abi.h."""

    node: np.ndarray  # node[1]
    ports: np.ndarray  # port[PORTS_MAX]
    adjacencies: np.ndarray  # adjacency[ADJACENCIES_MAX]
    rewrites: np.ndarray  # uint8[ADJACENCIES_MAX, HEADER_MAX]: the templates
    fib4_wide: np.ndarray  # uint32[FIB4_WIDE]
    fib4_deep: np.ndarray  # uint32[FIB4_GROUPS * 256]
    fib6: np.ndarray  # fib6_entry[FIB6_SLOTS]
    fib6_lengths: np.ndarray  # uint64[4]: bit n%64 of word n//64 is set when length n is in use
    buckets: np.ndarray  # int64[4]: token bucket of this worker's own answers
