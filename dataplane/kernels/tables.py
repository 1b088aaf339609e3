"""The tables that kernels read, as one NamedTuple of arrays.

Rule: kernels read what the agent writes and never write it; affinities and connections are the
workers' own, shared by all of them, and `buckets` is this worker's alone.

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
    control: np.ndarray  # control[1]
    peers: np.ndarray  # peer[PEERS_MAX]
    ipcache4_wide: np.ndarray  # uint32[FIB4_WIDE]: as fib4_wide, to rows of peers
    ipcache4_deep: np.ndarray  # uint32[IPCACHE4_GROUPS * 256]
    ipcache6: np.ndarray  # fib6_entry[IPCACHE6_SLOTS]
    ipcache6_lengths: np.ndarray  # uint64[4]
    identity_peers: np.ndarray  # uint32[IDENTITIES_MAX]: rows of peers
    subjects: np.ndarray  # subject[PORTS_MAX]
    policies: np.ndarray  # policy[POLICIES_MAX]
    policy_entries: np.ndarray  # policy_entry[POLICY_SLOTS]
    frontends: np.ndarray  # frontend[FRONTEND_SLOTS]
    services: np.ndarray  # service[SERVICES_MAX]
    backends: np.ndarray  # backend[BACKENDS_MAX]
    backend_lists: np.ndarray  # uint32[BACKEND_LISTS]
    maglev: np.ndarray  # uint32[MAGLEV_WORDS]
    source_ranges: np.ndarray  # source_range[SOURCE_RANGES_MAX]
    node_ports: np.ndarray  # uint8[NAT_PROTOCOLS, 8192]: bitmaps
    affinities: np.ndarray  # affinity[AFFINITY_SLOTS]: written by workers
    connections: np.ndarray  # connection[CONNECTIONS_MOST]: written by workers
    connection_index: np.ndarray  # uint64[CONNECTION_SLOTS]: written by workers
    buckets: np.ndarray  # int64[4]: token bucket of this worker's own answers
