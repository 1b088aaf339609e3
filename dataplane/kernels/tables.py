"""The tables that kernels read, as one NamedTuple of Rows.

Rule: kernels read what the agent writes and never write it; affinities and connections are the
workers' own, shared by all of them, and `buckets` is this worker's alone.

Theory. The agent writes the tables in shared memory (dataplane/tables) while workers read them. A
route word or a row's state byte is stored last, so that a reader sees the old or the new, and rows
that are in use are not changed. A row is a record of its ABI struct;
tables of several dimensions are one row after the other.
"""

from typing import NamedTuple

from dataplane.kernels.naming import Naming
from dataplane.kernels.rows import Rows

BUCKET_TOKENS = 0  # tokens left, in units of 1/1000 of a packet
BUCKET_TIME = 1  # time of the last refill, ns
BUCKET_DENIED = 2  # answers withheld since the start


class Tables(NamedTuple):
    """What the stages look things up in. Shapes and dtypes are those of xdp/abi.h."""

    node: Rows  # node[1]
    ports: Rows  # port[PORTS_MAX]
    adjacencies: Rows  # adjacency[ADJACENCIES_MAX]
    rewrites: Rows  # uint8[ADJACENCIES_MAX, HEADER_MAX]: the templates
    fib4_wide: Rows  # uint32[FIB4_WIDE]
    fib4_deep: Rows  # uint32[FIB4_GROUPS * 256]
    fib6: Rows  # fib6_entry[FIB6_SLOTS]
    fib6_lengths: Rows  # uint64[4]: bit n%64 of word n//64 is set when length n is in use
    control: Rows  # control[1]
    peers: Rows  # peer[PEERS_MAX]
    ipcache4_wide: Rows  # uint32[FIB4_WIDE]: as fib4_wide, to rows of peers
    ipcache4_deep: Rows  # uint32[IPCACHE4_GROUPS * 256]
    ipcache6: Rows  # fib6_entry[IPCACHE6_SLOTS]
    ipcache6_lengths: Rows  # uint64[4]
    identity_peers: Rows  # uint32[IDENTITIES_MAX]: rows of peers
    subjects: Rows  # subject[PORTS_MAX]
    policies: Rows  # policy[POLICIES_MAX]
    policy_entries: Rows  # policy_entry[POLICY_SLOTS]
    frontends: Rows  # frontend[FRONTEND_SLOTS]
    services: Rows  # service[SERVICES_MAX]
    backends: Rows  # backend[BACKENDS_MAX]
    backend_lists: Rows  # uint32[BACKEND_LISTS]
    maglev: Rows  # uint32[MAGLEV_WORDS]
    source_ranges: Rows  # source_range[SOURCE_RANGES_MAX]
    node_ports: Rows  # uint8[NAT_PROTOCOLS, 8192]: bitmaps
    affinities: Rows  # affinity[AFFINITY_SLOTS]: written by workers
    connections: Rows  # connection[CONNECTIONS_MOST]: written by workers
    connection_index: Rows  # uint64[CONNECTION_SLOTS]: written by workers
    naming: Naming  # the tables about names
    buckets: Rows  # int64[4]: token bucket of this worker's own answers
