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
FLAG_ANSWER = 512  # judge: to be answered (ICMP error `answer_type`/`answer_code`)


class Batch(NamedTuple):
    """Columns of a vector; each has VECTOR_MAX entries of int64 unless said otherwise."""

    count: np.ndarray  # int64[1]: packets in this vector
    now_ns: np.ndarray  # int64[1]: CLOCK_MONOTONIC at the start of the step
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
    source_hi: np.ndarray  # uint64
    source_lo: np.ndarray  # uint64
    target_hi: np.ndarray  # uint64: destination address
    target_lo: np.ndarray  # uint64
    source_port: np.ndarray  # TCP, UDP, SCTP port; ICMP identifier for echo; else 0
    target_port: np.ndarray
    ttl: np.ndarray  # TTL / hop limit
    tos: np.ndarray  # TOS / traffic class
    hash: np.ndarray  # uint64: flow hash (addresses, protocol, ports)
    adjacency: np.ndarray  # row of the adjacency table, 0: none
    remote_hi: np.ndarray  # uint64: outer source address of a decapsulated packet
    remote_lo: np.ndarray  # uint64
    answer_type: np.ndarray  # ICMP type of the error to send, with FLAG_ANSWER
    answer_code: np.ndarray
    answer_value: np.ndarray  # rest-of-header word: next-hop MTU for too-big


_UNSIGNED = {"source_hi", "source_lo", "target_hi", "target_lo", "hash", "remote_hi", "remote_lo"}
_SEGMENTS = {"segment_frame", "segment_offset", "segment_length"}
_SINGLE = {"count", "now_ns"}


def make_batch() -> Batch:
    """Return an empty Batch with its columns allocated."""
    columns = {}
    for name in Batch._fields:
        size = 1 if name in _SINGLE else SEGMENTS_MAX if name in _SEGMENTS else VECTOR_MAX
        columns[name] = np.zeros(size, np.uint64 if name in _UNSIGNED else np.int64)
    return Batch(**columns)
