"""Live connections under new policies, and those whose backend has gone.

Rule: the present policies judge a connection by what its first packet was; answers need no rule.

Theory. An increment of control.judgement makes every connection's verdict old; its next packet,
either way, has it judged again. One that may no longer pass keeps its record, so that its packets
are refused at once and a later change lets it live again. What can still move is made anew without
a backend that is gone: a TCP connection that was answered cannot (kube-proxy deletes the kernel's
UDP entries likewise).
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.connections import JUDGEMENT, TICK
from dataplane.kernels.dns_lead import TO_PROXY, is_led_right, server_of
from dataplane.kernels.house import inline
from dataplane.kernels.states import SYN_SENT
from dataplane.kernels.verdict import judge_both
from xdp.abi import CONST, value

BACKEND_EMPTY = value("BACKEND_EMPTY")
DENIED = CONST["CONNECTION_FLAG_DENIED"]
AUDITED = CONST["CONNECTION_FLAG_AUDITED"]


@inline
def _backend_is_gone(t, number):
    """Whether a connection that can still move has lost the backend that it was given."""
    c = t.connections[number]
    if c.service == 0 or c.names & TO_PROXY:
        return False
    protocol = np.int64(c.word >> np.uint64(8)) & 0xFF
    if protocol == wire.TCP and c.state != SYN_SENT:
        return False
    row = t.backends[c.backend]
    port = np.int64(c.reply_word >> np.uint64(48))
    same = row.hi == c.reply_source_hi and row.lo == c.reply_source_lo and row.port == port
    return row.state == BACKEND_EMPTY or not same


@inline
def judge_again(t, k, number):
    """Judge a live connection by the present policies; False when it has to be made anew."""
    if _backend_is_gone(t, number):
        return False
    c = t.connections[number]
    protocol = np.int64(c.word >> np.uint64(8)) & 0xFF
    kind = np.int64(c.word & np.uint64(0xFF))
    target_hi, target_lo, port = server_of(t, number)
    if protocol == wire.ICMP or protocol == wire.ICMP6:
        port = np.int64(c.icmp_type)
    verdict = judge_both(
        t, kind, c.source_hi, c.source_lo, target_hi, target_lo,
        protocol, port, np.int64(c.source_identity), k.words[TICK],
    )  # fmt: skip
    if not is_led_right(t, number, verdict.egress):
        return False
    k.counters[0].rejudged += np.uint64(1)
    flags = np.int64(c.flags) & ~(DENIED | AUDITED)
    if verdict.reason:
        if not c.flags & DENIED:
            k.counters[0].cut += np.uint64(1)
        flags |= DENIED
        c.reason, c.refusal = verdict.reason, verdict.word
    if verdict.audited:
        flags |= AUDITED
    c.egress_rule, c.ingress_rule = verdict.egress, verdict.ingress
    c.source_identity = t.peers[verdict.source].identity
    c.target_identity = t.peers[verdict.target].identity
    c.flags = flags
    c.generation = k.words[JUDGEMENT]
    return True
