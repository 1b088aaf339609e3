"""DNS answers that the forwarder writes itself, over the packet that asks for them.

Rule: what is written is the question that came, with another header; nothing is longer than before.

Theory. A refusal goes back to its pod from the address that the pod has asked (RFC 1035 4.1.1:
REFUSED, or NXDOMAIN where the configuration says so). A query with EDNS gets an OPT record back
(RFC 6891 7), which fits in its own place. An answer too large to be looked into (it came as a
fragment, or in several segments) becomes a truncated one, so that the client asks again over TCP
(RFC 7766 5), where the proxy reads it whole; it goes on its way as any other packet, and later
fragments are dropped. IP options, extension headers and fragment headers are left out. The UDP
checksum is made anew.
"""

import numpy as np

from dataplane.kernels import dns_message as m
from dataplane.kernels import wire
from dataplane.kernels.answer import TTL, return_to_source
from dataplane.kernels.batch import (
    FLAG_FRAGMENT,
    FLAG_LATER_FRAGMENT,
    FLAG_OPTIONS,
    KIND_IP4,
)
from dataplane.kernels.house import (
    fold16,
    inline,
    load8,
    load16be,
    load32be,
    load64be,
    store16be,
    store32be,
    store64be,
    sum16,
)
from xdp.abi import value

ANSWERED_DNS = value("REASON_ANSWERED_DNS")
OPT_LENGTH = 11  # root, type, class, TTL, length of data
OPT_SIZE = 1232  # what we say that we take: DNS flag day 2020
OPT_DO = 0x8000
ZERO = np.uint64(0)


@inline
def _options_of(message, size, end):
    """Offset of the OPT record of a query whose question ends at `end`, 0: it has none.

    Only where it is looked for: first behind the question, as clients send it.
    """
    sections = load16be(message + m.ANSWERS) + load16be(message + m.AUTHORITIES)
    if sections or load16be(message + m.ADDITIONALS) == 0 or end + OPT_LENGTH > size:
        return np.int64(0)
    if load8(message + end) == 0 and load16be(message + end + 1) == m.OPT:
        return end
    return np.int64(0)


@inline
def write_message(message, size, end, rcode):
    """Make an answer of a query; end: behind its question, HEADER: there is none. Return length."""
    options = _options_of(message, size, end) if end > m.HEADER else np.int64(0)
    flags = load16be(message + m.FLAGS)
    store16be(message + m.FLAGS, m.QR | (flags & (m.OPCODE | m.RD | m.CD)) | m.RA | rcode)
    store16be(message + m.QUESTIONS, 1 if end > m.HEADER else 0)
    store32be(message + m.ANSWERS, 0)
    store16be(message + m.ADDITIONALS, 1 if options else 0)
    if not options:
        return end
    wanted = load16be(message + options + 7) & OPT_DO
    store16be(message + options + 3, OPT_SIZE)
    store32be(message + options + 5, wanted)  # extended rcode and version are 0
    store16be(message + options + 9, 0)
    return end + OPT_LENGTH


@inline
def _finish(b, i, udp, length, source_hi, source_lo, target_hi, target_lo, ttl):
    """Write IP header and UDP lengths around a message of `length` bytes; set the columns."""
    four = b.kind[i] == KIND_IP4
    size = wire.UDP_LENGTH + length
    store16be(udp + wire.UDP_LENGTH_FIELD, size)
    store16be(udp + wire.UDP_CHECKSUM, 0)
    if four:
        at = udp - wire.IP4_LENGTH
        store32be(at, (0x45 << 24) | (b.tos[i] << 16) | (wire.IP4_LENGTH + size))
        store32be(at + wire.IP4_ID, wire.IP4_DF)
        store32be(at + wire.IP4_TTL, (ttl << 24) | (wire.UDP << 16))
        store32be(at + wire.IP4_SOURCE, np.int64(source_lo))
        store32be(at + wire.IP4_TARGET, np.int64(target_lo))
        store16be(at + wire.IP4_CHECKSUM, ~fold16(sum16(at, wire.IP4_LENGTH)) & 0xFFFF)
        pseudo = sum16(at + wire.IP4_SOURCE, 8)
    else:
        at = udp - wire.IP6_LENGTH
        store32be(at, (6 << 28) | (b.tos[i] << 20))
        store32be(at + wire.IP6_PAYLOAD, (size << 16) | (wire.UDP << 8) | ttl)
        store64be(at + wire.IP6_SOURCE, source_hi)
        store64be(at + wire.IP6_SOURCE + 8, source_lo)
        store64be(at + wire.IP6_TARGET, target_hi)
        store64be(at + wire.IP6_TARGET + 8, target_lo)
        pseudo = sum16(at + wire.IP6_SOURCE, 32)
    check = ~fold16(pseudo + size + wire.UDP + sum16(udp, size)) & 0xFFFF
    store16be(udp + wire.UDP_CHECKSUM, check if check else 0xFFFF)
    b.address[i] = at - wire.ETHER_LENGTH
    b.l3[i] = wire.ETHER_LENGTH
    b.l4[i] = wire.ETHER_LENGTH + (wire.IP4_LENGTH if four else wire.IP6_LENGTH)
    b.ip_length[i] = b.l4[i] - wire.ETHER_LENGTH + size
    b.total[i] = b.length[i] = b.l4[i] + size
    b.flags[i] &= ~(FLAG_FRAGMENT | FLAG_LATER_FRAGMENT | FLAG_OPTIONS)


@inline
def refuse_query(b, t, i, size, end, rcode):
    """Answer the query of packet i, whose message has `size` bytes, with an rcode.

    end: offset behind its question; HEADER: it has none that can be read.
    """
    at, udp = b.address[i] + b.l3[i], b.address[i] + b.l4[i]
    if b.kind[i] == KIND_IP4:
        asked_hi, asked_lo = ZERO, np.uint64(load32be(at + wire.IP4_TARGET))
    else:
        asked_hi, asked_lo = load64be(at + wire.IP6_TARGET), load64be(at + wire.IP6_TARGET + 8)
    length = write_message(udp + wire.UDP_LENGTH, size, end, rcode)
    ports = load32be(udp)
    store32be(udp, ((ports & 0xFFFF) << 16) | (ports >> 16))
    _finish(b, i, udp, length, asked_hi, asked_lo, b.source_hi[i], b.source_lo[i], np.int64(TTL))
    b.source_port[i], b.target_port[i] = ports & 0xFFFF, ports >> 16
    b.reason[i] = ANSWERED_DNS
    return_to_source(b, t, i, asked_hi, asked_lo)


@inline
def shorten_answer(b, i, end):
    """Make a truncated answer of packet i, whose question ends at `end`."""
    at, udp = b.address[i] + b.l3[i], b.address[i] + b.l4[i]
    message = udp + wire.UDP_LENGTH
    store16be(message + m.FLAGS, load16be(message + m.FLAGS) | m.TC)
    store32be(message + m.ANSWERS, 0)
    store16be(message + m.ADDITIONALS, 0)
    if b.kind[i] == KIND_IP4:
        source_hi, source_lo = ZERO, np.uint64(load32be(at + wire.IP4_SOURCE))
        target_hi, target_lo = ZERO, np.uint64(load32be(at + wire.IP4_TARGET))
    else:
        source_hi, source_lo = load64be(at + wire.IP6_SOURCE), load64be(at + wire.IP6_SOURCE + 8)
        target_hi, target_lo = load64be(at + wire.IP6_TARGET), load64be(at + wire.IP6_TARGET + 8)
    _finish(b, i, udp, end, source_hi, source_lo, target_hi, target_lo, b.ttl[i])
