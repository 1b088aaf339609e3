"""DNS of pods: queries are allowed or refused, answers teach, both are counted.

Rule: nothing is decided from an answer that fits no query, and what an answer teaches is in force
before the pod has the answer.

Theory. `track` and `connect` put the packets of DNS connections on a list, so other packets cost
nothing here. A connection's verdict word says how its messages are treated: POLICY_NAMES, its rules
have rules.dns: answers teach, and what cannot be read is not let through; POLICY_NAMES_ONLY, only
names that these rules list may be asked for; neither, messages are counted and pass. An answer is
believed when it comes on the connection of a query (so from the server that was asked, back through
NAT), with its id and question; it is then taken off the list of queries, and a second one is none.
Over TCP the proxy does all this, with the same kernels; here its connections are only led to it. A
query in fragments cannot be read and is dropped where names count, an answer is truncated
(dns_answer.py). Runs after `route`, since it may change where a packet goes.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.batch import (
    FLAG_AUDITED,
    FLAG_FRAGMENT,
    FLAG_LATER_FRAGMENT,
    KIND_IP4,
    VERDICT_PENDING,
    WAY_ORIGINAL,
)
from dataplane.kernels.connections import LINE, LIVE, OWNER, RECORD, TICK, WORD
from dataplane.kernels.dns_answer import refuse_query, shorten_answer
from dataplane.kernels.dns_judge import DROP, END_SHIFT, PASS_AUDITED, RCODE_SHIFT, judge_query
from dataplane.kernels.dns_judge import REFUSE as REFUSE_QUERY
from dataplane.kernels.dns_teach import SHORTEN, UNASKED, judge_answer
from dataplane.kernels.house import inline, kernel, load16be, load32_acquire, load64
from dataplane.kernels.parse import drop
from dataplane.kernels.policy import NAMES
from dataplane.kernels.route import lookup
from xdp.abi import CONST, value

TO_PROXY, FROM_PROXY = CONST["CONNECTION_TO_PROXY"], CONST["CONNECTION_FROM_PROXY"]
PORT_PROXY = value("PORT_PROXY")
INVALID_PACKET = value("REASON_INVALID_PACKET")
INVALID_SOURCE = value("REASON_INVALID_SOURCE_IP")
INSERTION_FAILED = value("REASON_CT_INSERTION_FAILED")
FRAGMENT_UNSUPPORTED = value("REASON_FRAGMENT_UNSUPPORTED")
DNS_UNASKED = value("REASON_DNS_UNASKED")
ZERO = np.uint64(0)


@inline
def is_still(b, i, record, way):
    """Whether a record still is that of packet i: a later packet's may have taken its place."""
    line = record + way * LINE
    if load32_acquire(record + OWNER) != LIVE or np.uint64(load64(line + WORD)) != b.word[i]:
        return False
    hi, lo = np.uint64(load64(line)), np.uint64(load64(line + 8))
    return hi == b.source_hi[i] and lo == b.source_lo[i]


@inline
def _lead(b, t, i, names):
    """Lead a packet of a proxied connection to the proxy, where it has to go there."""
    from_proxy = t.ports[b.ingress[i]].kind == PORT_PROXY
    original = b.way[i] == WAY_ORIGINAL
    if names & FROM_PROXY and original and not from_proxy:
        drop(b, i, INVALID_SOURCE)  # a pod that speaks in the proxy's place
    elif original if names & TO_PROXY else not original:
        setting = t.naming.setting[0]
        if b.kind[i] == KIND_IP4:
            b.adjacency[i] = lookup(t, b.kind[i], ZERO, setting.proxy4)
        else:
            b.adjacency[i] = lookup(t, b.kind[i], setting.proxy6_hi, setting.proxy6_lo)


@inline
def _size(b, i):
    """Bytes of packet i's message that lie in its first segment, and whether these are all."""
    size = load16be(b.address[i] + b.l4[i] + wire.UDP_LENGTH_FIELD) - wire.UDP_LENGTH
    there = b.length[i] - b.l4[i] - wire.UDP_LENGTH
    whole = size <= there and not b.flags[i] & FLAG_FRAGMENT
    if b.flags[i] & FLAG_FRAGMENT:
        inside = b.l3[i] + b.ip_length[i] - b.l4[i] - wire.UDP_LENGTH
        there = inside if inside < there else there
    return size if size < there else there, whole


@inline
def _query(b, t, k, c, i, names):
    size, whole = _size(b, i)
    if not whole:
        if names:
            drop(b, i, FRAGMENT_UNSUPPORTED)
        return
    message = b.address[i] + b.l4[i] + wire.UDP_LENGTH
    done = judge_query(t, c, b.connection[i], message, size, b.now_ns[0], k.words[TICK])
    action = done & 0xFF
    if action == REFUSE_QUERY:
        b.refusal[i] = np.int64(t.connections[b.connection[i]].egress_rule)
        refuse_query(b, t, i, size, done >> END_SHIFT, (done >> RCODE_SHIFT) & 0xFF)
    elif action == DROP:
        drop(b, i, INVALID_PACKET)
    elif action == PASS_AUDITED:
        b.flags[i] |= FLAG_AUDITED


@inline
def _answer(b, t, k, c, i, names):
    size, whole = _size(b, i)
    message = b.address[i] + b.l4[i] + wire.UDP_LENGTH
    done = judge_answer(t, c, b.connection[i], message, size, whole, b.now_ns[0], k.words[TICK])
    action = done & 0xFF
    if action == UNASKED:
        if names:
            drop(b, i, DNS_UNASKED)
    elif action == SHORTEN:
        shorten_answer(b, i, done >> END_SHIFT)


@inline
def _one(b, t, k, c, i):
    record = t.connections.address + b.connection[i] * RECORD
    if not is_still(b, i, record, b.way[i]):
        drop(b, i, INSERTION_FAILED)
        return
    con = t.connections[b.connection[i]]
    if con.names:
        _lead(b, t, i, con.names)
        return
    if b.protocol[i] != wire.UDP:
        return
    names = con.egress_rule & NAMES
    if b.flags[i] & FLAG_LATER_FRAGMENT:
        if names:
            drop(b, i, FRAGMENT_UNSUPPORTED)
    elif b.way[i] == WAY_ORIGINAL:
        _query(b, t, k, c, i, names)
    else:
        _answer(b, t, k, c, i, names)


@kernel
def names(b, t, k, c):
    """Deal with every packet of the list `dns`. About 200 ns a message. k: Tracker, c: Counters."""
    for n in range(b.dns_count[0]):
        i = b.dns[n]
        if b.verdict[i] == VERDICT_PENDING:
            _one(b, t, k, c, i)
