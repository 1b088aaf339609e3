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
from xdp.abi import CONST, value

VECTOR_MAX = CONST["VECTOR_MAX"]
SEGMENTS_MAX = CONST["SEGMENTS_MAX"]

# Batch.verdict: enum verdict.
VERDICT_PENDING = value("VERDICT_PENDING")
VERDICT_DROP = value("VERDICT_DROP")
VERDICT_SEND = value("VERDICT_SEND")
VERDICT_HOLD = value("VERDICT_HOLD")

# Batch.kind: what the packet is, as far as the stages care.
KIND_OTHER = 0  # not classified (yet)
KIND_ARP = 1
KIND_IP4 = 4
KIND_IP6 = 6

# Batch.flags: enum packet_flag, which says what they mean.
FLAG_FRAGMENT = value("PACKET_FRAGMENT")
FLAG_LATER_FRAGMENT = value("PACKET_LATER_FRAGMENT")
FLAG_DF = value("PACKET_DF")
FLAG_MULTICAST = value("PACKET_MULTICAST")
FLAG_ICMP_ERROR = value("PACKET_ICMP_ERROR")
FLAG_OPTIONS = value("PACKET_OPTIONS")
FLAG_DECAPSULATED = value("PACKET_DECAPSULATED")
FLAG_LOCAL = value("PACKET_LOCAL")
FLAG_L2_MULTICAST = value("PACKET_L2_MULTICAST")
FLAG_ANSWER = value("PACKET_ANSWER")
FLAG_RESET = value("PACKET_RESET")
FLAG_ECHO = value("PACKET_ECHO")
FLAG_OUTSIDE = value("PACKET_OUTSIDE")
FLAG_NAT = value("PACKET_NAT")
FLAG_RELATED = value("PACKET_RELATED")
FLAG_AUDITED = value("PACKET_AUDITED")
FLAG_NAT_SOURCE = value("PACKET_NAT_SOURCE")
FLAG_ADMITTED = value("PACKET_ADMITTED")
FLAG_WORTH = value("PACKET_WORTH")
FLAG_SERVED = value("PACKET_SERVED")
FLAG_NOTED = value("PACKET_NOTED")

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
    "dns": NUMBER,  # packets of DNS connections, for `names`
    "dns_count": SINGLE,
    "hashes": WIDE,  # hash of the tuple, ports included
    "ahead": NUMBER,  # of packets in `todo`: what kernels/ahead.py has come to
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
