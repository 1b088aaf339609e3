"""The vector of packets that every stage works on, as columns.

Rule: one packet is one index; what a stage learns goes into a column, never into an object.

Theory. A step of a worker takes up to VECTOR_MAX packets from its rings. The first segment of a
packet lies in `address`/`length`; a packet that came in several segments (XDP multi-buffer) has
the others in the `segment_*` columns. All headers are within the first segment, or the packet is
dropped as invalid. Each stage is one pass over 0..count-1 and skips packets whose `verdict` is
already final. Columns are int64 (uint64 for address halves and hashes): see house.py.
"""

import numpy as np

from dataplane.kernels.rows import columns
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
FLAG_WORTH = 262144  # its direction is worth an entry of the flow table
FLAG_NOTED = 1048576  # its drop has been told
FLAG_SERVED = 524288  # refused on its way through `service`; `nat_target` and `nat_ports` say where

WAY_ORIGINAL = 0  # Batch.way: as the connection's first packet
WAY_REPLY = 1


NUMBER, WIDE = ("i8", VECTOR_MAX), ("u8", VECTOR_MAX)  # an entry a packet
SEGMENT, SINGLE = ("i8", SEGMENTS_MAX), ("i8", 1)

COLUMNS = {
    "count": SINGLE,  # packets in this vector
    "now_ns": SINGLE,  # CLOCK_MONOTONIC at the start of the step
    "flow_generation": SINGLE,  # of the flow table, from before the first decision; 0: off
    "area": SINGLE,  # memory address that `frame` and `segment_frame` count from
    "address": NUMBER,  # memory address of the first byte (Ethernet header)
    "frame": NUMBER,  # UMEM chunk base of the first segment, offset from the start of the area
    "length": NUMBER,  # bytes in the first segment
    "total": NUMBER,  # bytes of the whole packet
    "segments": NUMBER,  # segments beyond the first
    "segment_first": NUMBER,  # index of the second segment in the segment columns
    "segment_frame": SEGMENT,  # UMEM chunk base of a continuation
    "segment_offset": SEGMENT,  # start of its data, from the chunk base
    "segment_length": SEGMENT,
    "ingress": NUMBER,  # port index
    "egress": NUMBER,  # port index, valid once VERDICT_SEND
    "verdict": NUMBER,
    "reason": NUMBER,  # enum reason
    "kind": NUMBER,
    "flags": NUMBER,
    "l3": NUMBER,  # offset of the IP or ARP header from address
    "l4": NUMBER,  # offset of the transport header (after IPv6 extension headers)
    "ip_length": NUMBER,  # total length of the IP packet, header included
    "protocol": NUMBER,  # last next-header / IPv4 protocol
    "word": WIDE,  # source port << 48 | target port << 32 | protocol << 8 | family
    "fragment": NUMBER,  # identification of a fragment
    "source_hi": WIDE,
    "source_lo": WIDE,
    "target_hi": WIDE,  # destination address
    "target_lo": WIDE,
    "first_target_hi": WIDE,  # with FLAG_NAT, the destination as it was received
    "first_target_lo": WIDE,
    "source_port": NUMBER,  # TCP, UDP, SCTP; identifier of an ICMP query; else 0
    "target_port": NUMBER,  # TCP, UDP, SCTP; identifier of an ICMP query's reply; else 0
    "ttl": NUMBER,  # TTL / hop limit
    "tos": NUMBER,  # TOS / traffic class
    "hash": WIDE,  # flow hash (addresses, protocol, ports)
    "adjacency": NUMBER,  # row of the adjacency table, 0: none
    "remote_hi": WIDE,  # outer source address of a decapsulated packet
    "remote_lo": WIDE,
    "answer_type": NUMBER,  # ICMP type of the error to send, with FLAG_ANSWER
    "answer_code": NUMBER,
    "answer_value": NUMBER,  # rest-of-header word: next-hop MTU for too-big
    "identity": NUMBER,  # of the source as the tunnel's VNI says, 0: it does not
    "connection": NUMBER,  # record of the connection, -1: none
    "way": NUMBER,  # WAY_*
    "refusal": NUMBER,  # verdict word of the policy that dropped it
    "service": NUMBER,  # with FLAG_SERVED, row of the service
    "source_identity": NUMBER,  # where a policy was asked
    "target_identity": NUMBER,
    "nat_source_hi": WIDE,  # with FLAG_NAT, what the addresses and ports become
    "nat_source_lo": WIDE,
    "nat_target_hi": WIDE,
    "nat_target_lo": WIDE,
    "nat_ports": NUMBER,  # source port << 16 | target port
    "todo": NUMBER,  # packets that `connect` has to look at
    "todo_count": SINGLE,  # int64[1]
    "hashes": WIDE,  # hash of the tuple, ports included
}
"""Name -> dtype and length of a column."""


class Batch(np.record):
    """A record of COLUMNS: `b.length[i]` is the length of packet i, in Python as in kernels."""

    @property
    def flags(self) -> np.ndarray:
        """The column, not what numpy calls the flags of a record."""
        return self["flags"]


def make_batch() -> Batch:
    """Return an empty vector."""
    return np.zeros(1, np.dtype((Batch, columns(COLUMNS))))[0]
