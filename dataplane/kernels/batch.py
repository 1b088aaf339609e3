"""The vector of packets that every stage works on, as columns.

Rule: one packet is one index; what a stage learns goes into a column, never into an object.

Theory. A step of a worker takes up to VECTOR_MAX packets from its rings. The first segment of a
packet lies in `address`/`length`; a packet that came in several segments (XDP multi-buffer) has
the others in the `segment_*` columns. All headers are within the first segment, or the packet is
dropped as invalid. Each stage is one pass over 0..count-1 and skips packets whose `verdict` is
already final. Columns are int64 (uint64 for address halves and hashes): see house.py.
"""

from typing import NamedTuple

import numpy as np

from xdp.abi import CONST

VECTOR_MAX = CONST["VECTOR_MAX"]
SEGMENTS_MAX = CONST["SEGMENTS_MAX"]

# Batch.verdict: what is to be done with a packet.
VERDICT_PENDING = 0  # goes on through the stages
VERDICT_DROP = 1  # Batch.reason says why; the frame returns to the free list
VERDICT_SEND = 2  # complete: transmit on Batch.egress as it stands
VERDICT_HOLD = 3  # a fragment that waits for its first one: the engine keeps the frame

# Batch.kind: what the packet is, as far as the stages care.
KIND_OTHER = 0  # not classified (yet)
KIND_ARP = 1
KIND_IP4 = 4
KIND_IP6 = 6

# Batch.flags
FLAG_FRAGMENT = 1  # IPv4 or IPv6 fragment, first or later
FLAG_LATER_FRAGMENT = 2  # offset > 0: no ports
FLAG_DF = 4  # IPv4 don't fragment, or IPv6
FLAG_MULTICAST = 8  # IP destination is multicast or broadcast
FLAG_ICMP_ERROR = 16  # carries an ICMP or ICMPv6 error: must not be answered by one
FLAG_OPTIONS = 32  # IPv4 options or IPv6 extension headers present
FLAG_DECAPSULATED = 64  # came through the tunnel
FLAG_LOCAL = 128  # made by this node: its TTL is not decremented
FLAG_L2_MULTICAST = 256  # Ethernet destination is multicast or broadcast
FLAG_ANSWER = 512  # to be answered by an ICMP error (`answer_type`/`answer_code`)
FLAG_RESET = 1024  # to be answered by a TCP reset, with FLAG_ANSWER
FLAG_ECHO = 2048  # an echo request to a service's address: to be answered
FLAG_OUTSIDE = 4096  # came in on an uplink, not through the tunnel
FLAG_NAT = 8192  # addresses or ports are to be rewritten: `nat_*`
FLAG_RELATED = 16384  # an ICMP error about connection `connection`
FLAG_AUDITED = 32768  # passes by policy audit only
FLAG_NAT_SOURCE = 65536  # its source was made one of this node's own
FLAG_ADMITTED = 131072  # was held as a fragment: `admit` has seen it

WAY_ORIGINAL = 0  # Batch.way: as the connection's first packet
WAY_REPLY = 1


class Batch(NamedTuple):
    """Columns of a vector; each has VECTOR_MAX entries of int64 unless said otherwise."""

    count: np.ndarray  # int64[1]: packets in this vector
    now_ns: np.ndarray  # int64[1]: CLOCK_MONOTONIC at the start of the step
    area: np.ndarray  # int64[1]: memory address that `frame` and `segment_frame` count from
    address: np.ndarray  # memory address of the first byte (Ethernet header)
    frame: np.ndarray  # UMEM chunk base of the first segment, offset from the start of the area
    length: np.ndarray  # bytes in the first segment
    total: np.ndarray  # bytes of the whole packet
    segments: np.ndarray  # segments beyond the first
    segment_first: np.ndarray  # index of the second segment in the segment columns
    segment_frame: np.ndarray  # int64[SEGMENTS_MAX]: UMEM chunk base of a continuation
    segment_offset: np.ndarray  # int64[SEGMENTS_MAX]: start of its data, from the chunk base
    segment_length: np.ndarray  # int64[SEGMENTS_MAX]
    ingress: np.ndarray  # port index
    egress: np.ndarray  # port index, valid once VERDICT_SEND
    verdict: np.ndarray
    reason: np.ndarray  # enum reason
    kind: np.ndarray
    flags: np.ndarray
    l3: np.ndarray  # offset of the IP or ARP header from address
    l4: np.ndarray  # offset of the transport header (after IPv6 extension headers)
    ip_length: np.ndarray  # total length of the IP packet, header included
    protocol: np.ndarray  # last next-header / IPv4 protocol
    word: np.ndarray  # uint64: source port << 48 | target port << 32 | protocol << 8 | family
    fragment: np.ndarray  # identification of a fragment
    source_hi: np.ndarray  # uint64
    source_lo: np.ndarray  # uint64
    target_hi: np.ndarray  # uint64: destination address
    target_lo: np.ndarray  # uint64
    source_port: np.ndarray  # TCP, UDP, SCTP; identifier of an ICMP query; else 0
    target_port: np.ndarray  # TCP, UDP, SCTP; identifier of an ICMP query's reply; else 0
    ttl: np.ndarray  # TTL / hop limit
    tos: np.ndarray  # TOS / traffic class
    hash: np.ndarray  # uint64: flow hash (addresses, protocol, ports)
    adjacency: np.ndarray  # row of the adjacency table, 0: none
    remote_hi: np.ndarray  # uint64: outer source address of a decapsulated packet
    remote_lo: np.ndarray  # uint64
    answer_type: np.ndarray  # ICMP type of the error to send, with FLAG_ANSWER
    answer_code: np.ndarray
    answer_value: np.ndarray  # rest-of-header word: next-hop MTU for too-big
    identity: np.ndarray  # of the source as the tunnel's VNI says, 0: it does not
    connection: np.ndarray  # record of the connection, -1: none
    way: np.ndarray  # WAY_*
    refusal: np.ndarray  # verdict word of the policy that dropped it
    source_identity: np.ndarray  # where a policy was asked
    target_identity: np.ndarray
    nat_source_hi: np.ndarray  # uint64: with FLAG_NAT, what the addresses and ports become
    nat_source_lo: np.ndarray  # uint64
    nat_target_hi: np.ndarray  # uint64
    nat_target_lo: np.ndarray  # uint64
    nat_ports: np.ndarray  # source port << 16 | target port
    todo: np.ndarray  # packets that `connect` has to look at
    todo_count: np.ndarray  # int64[1]
    hashes: np.ndarray  # uint64: hash of the tuple, ports included


_UNSIGNED = {
    f"{name}_{half}"
    for name in ("source", "target", "remote", "nat_source", "nat_target")
    for half in ("hi", "lo")
} | {"hash", "hashes", "word"}
_SEGMENTS = {"segment_frame", "segment_offset", "segment_length"}
_SINGLE = {"count", "now_ns", "area", "todo_count"}


def make_batch() -> Batch:
    """Return an empty Batch with its columns allocated."""
    columns = {}
    for name in Batch._fields:
        size = 1 if name in _SINGLE else SEGMENTS_MAX if name in _SEGMENTS else VECTOR_MAX
        columns[name] = np.zeros(size, np.uint64 if name in _UNSIGNED else np.int64)
    return Batch(**columns)
