"""DNS over TCP: what the proxy process asks the kernels.

Rule: a message is judged by the same code as a packet's, for the connection of the pod.

Theory. The proxy (dataplane/dnsproxy) speaks TCP and knows only messages; whose they are says the
record of the connection between pod and proxy, found by its tuple. Its lane of counters is its own.
Where an answer is to be written here, it is: a refusal is made in the place of the query.
"""

import numpy as np

from dataplane.kernels import dns_message as m
from dataplane.kernels import wire
from dataplane.kernels.connections import find
from dataplane.kernels.dns_answer import write_message
from dataplane.kernels.dns_judge import DROP, END_SHIFT, RCODE_SHIFT, REFUSE, judge_query
from dataplane.kernels.dns_lead import TO_PROXY
from dataplane.kernels.dns_teach import judge_answer
from dataplane.kernels.house import kernel
from dataplane.kernels.parse import mix, tuple_word

GO_ON, CLOSE = 0, -1  # what is to be done with a query; more than 0: bytes of our own answer


@kernel
def connection_of(t, mask, family, source_hi, source_lo, target_hi, target_lo, ports):
    """Record of a pod's TCP connection that leads to the proxy, -1: there is none.

    mask: buckets of the index - 1; ports: source << 16 | target.
    """
    word = tuple_word(ports >> 16, ports & 0xFFFF, wire.TCP, family)
    hashed = mix(source_hi, source_lo, target_hi, target_lo, word)
    found = find(
        t.connection_index.address, t.connections.address, mask,
        source_hi, source_lo, target_hi, target_lo, word, hashed,
    )  # fmt: skip
    if found < 0 or found & 1 or not t.connections[found >> 1].names & TO_PROXY:
        return np.int64(-1)
    return found >> 1


@kernel
def ask(t, c, number, message, size, now, tick):
    """Judge a query of a connection (record): GO_ON, CLOSE, or the size of the answer over it."""
    done = judge_query(t, c, number, message, size, now, tick)
    action = done & 0xFF
    if action == REFUSE:
        end = done >> END_SHIFT
        return write_message(message, size, end, (done >> RCODE_SHIFT) & 0xFF)
    return np.int64(CLOSE if action == DROP else GO_ON)


@kernel
def answer(t, c, number, message, size, now, tick):
    """Learn from a whole answer; whether it fits a query."""
    done = judge_answer(t, c, number, message, size, True, now, tick)
    return done & 0xFF == 0 and size >= m.HEADER
