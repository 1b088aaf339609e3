"""How a packet is refused: silently, by an ICMP error, or by a TCP reset.

Rule: a refusal notes what is to be answered; `answer` writes it.

Theory. A router tells the source why it drops (RFC 1812 4.3, RFC 4443 2.4), but never about an ICMP
error, a multicast, or a fragment other than the first, which could multiply traffic. What a policy
denies is answered only when the policy asks for it: silence is the default, as Cilium's, and an
answer saves the client its time-out.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.batch import (
    FLAG_ANSWER,
    FLAG_FRAGMENT,
    FLAG_ICMP_ERROR,
    FLAG_L2_MULTICAST,
    FLAG_LATER_FRAGMENT,
    FLAG_MULTICAST,
    FLAG_RESET,
    FLAG_SERVED,
    KIND_IP4,
)
from dataplane.kernels.house import inline, load8
from dataplane.kernels.parse import drop
from xdp.abi import CONST, value

SILENT = FLAG_ICMP_ERROR | FLAG_MULTICAST | FLAG_LATER_FRAGMENT | FLAG_L2_MULTICAST
ANSWER_SHIFT = CONST["POLICY_ANSWER_SHIFT"]
REFUSAL_DROP, REFUSAL_RESET = value("REFUSAL_DROP"), value("REFUSAL_RESET")
PROHIBITED4, PROHIBITED6 = 13, 1  # RFC 1812 5.2.7.1, RFC 4443 3.1
PORT4, PORT6 = 3, 4  # port unreachable
ZERO = np.uint64(0)


@inline
def refuse(b, i, reason, type4, code4, type6, code6, rest):
    """Note the reason, and the ICMP error to send if the packet may be answered."""
    unnamed = b.source_hi[i] == ZERO and b.source_lo[i] == ZERO
    if b.flags[i] & SILENT or unnamed:
        drop(b, i, reason)
        return
    b.reason[i] = reason
    b.flags[i] |= FLAG_ANSWER
    b.answer_type[i] = type4 if b.kind[i] == KIND_IP4 else type6
    b.answer_code[i] = code4 if b.kind[i] == KIND_IP4 else code6
    b.answer_value[i] = rest


@inline
def _reset(b, i, reason):
    """Note that a TCP packet is to be reset; a reset itself is dropped (RFC 9293 3.5.2)."""
    if b.flags[i] & FLAG_FRAGMENT or load8(b.address[i] + b.l4[i] + wire.TCP_FLAGS) & wire.TCP_RST:
        drop(b, i, reason)
        return
    b.reason[i] = reason
    b.flags[i] |= FLAG_ANSWER | FLAG_RESET


@inline
def served(b, i, service, hi, lo, port):
    """Note that packet i is refused on its way through a service: where that would have led."""
    b.flags[i] |= FLAG_SERVED
    b.service[i] = service
    b.nat_target_hi[i], b.nat_target_lo[i] = hi, lo
    b.nat_ports[i] = port


@inline
def deny(b, i, reason, word):
    """Refuse packet i by a policy's verdict word, in the way that it asks for."""
    b.refusal[i] = word
    how = (word >> ANSWER_SHIFT) & 3
    if how == REFUSAL_DROP:
        drop(b, i, reason)
    elif how == REFUSAL_RESET and b.protocol[i] == wire.TCP:
        _reset(b, i, reason)
    else:
        prohibit(b, i, reason)


@inline
def prohibit(b, i, reason):
    """Refuse packet i with "administratively prohibited"."""
    refuse(
        b, i, reason,
        wire.ICMP_UNREACHABLE, PROHIBITED4, wire.ICMP6_UNREACHABLE, PROHIBITED6, 0,
    )  # fmt: skip


@inline
def reject(b, i, reason):
    """Refuse packet i as a host without a listener does: reset, or port unreachable."""
    if b.protocol[i] == wire.TCP:
        _reset(b, i, reason)
    else:
        refuse(
            b, i, reason,
            wire.ICMP_UNREACHABLE, PORT4, wire.ICMP6_UNREACHABLE, PORT6, 0,
        )  # fmt: skip
