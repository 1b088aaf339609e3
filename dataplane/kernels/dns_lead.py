"""Which connections are DNS, and which of them the proxy takes.

Rule: where a connection's rules have rules.dns, its messages are read: over UDP here, over TCP by
the proxy; over anything else they cannot be, and the connection is refused.

Theory. A pod's UDP connection is DNS if it asks port 53, if its service leads to port 53, or if its
rules have rules.dns for the port that it asks; so kube-dns may listen at any port. A TCP connection
is taken by the proxy only where names count, so without rules.dns nothing stands between a pod and
its server. The record of such a connection leads to the proxy under the very addresses that the
pod has used; the backend that the policy has seen is kept in it. The proxy speaks to the server in
a connection of its own, from the pod's address, which begins at the service again.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.batch import KIND_IP4
from dataplane.kernels.house import inline
from dataplane.kernels.policy import NAMES
from xdp.abi import CONST, value

DNS = CONST["CONNECTION_FLAG_DNS"]
TO_PROXY, FROM_PROXY = CONST["CONNECTION_TO_PROXY"], CONST["CONNECTION_FROM_PROXY"]
PORT_POD, PORT_PROXY = value("PORT_POD"), value("PORT_PROXY")
PORT = 53
REFUSED = -1
ZERO = np.uint64(0)


@inline
def _listens(t, kind, port):
    """Whether the proxy takes connections of a family to a port."""
    setting = t.naming.setting[0]
    if kind == KIND_IP4:
        if setting.proxy4 == ZERO:
            return False
    elif setting.proxy6_hi == ZERO and setting.proxy6_lo == ZERO:
        return False
    if port == PORT:
        return True
    for n in range(len(setting.ports)):
        if port != 0 and setting.ports[n] == port:
            return True
    return False


@inline
def lead(b, t, i, word, backend_port):
    """How packet i's new connection is treated: DNS, with TO_PROXY or FROM_PROXY << 8; REFUSED.

    word: verdict word of its sender's policy.
    """
    kind = t.ports[b.ingress[i]].kind
    if kind == PORT_PROXY:
        return np.int64(DNS | FROM_PROXY << 8)
    if kind != PORT_POD:
        return np.int64(0)
    protocol, port = b.protocol[i], b.target_port[i]
    if protocol == wire.UDP:
        return np.int64(DNS if port == PORT or backend_port == PORT or word & NAMES else 0)
    if not word & NAMES:
        return np.int64(0)
    if protocol == wire.TCP and _listens(t, b.kind[i], port):
        return np.int64(DNS | TO_PROXY << 8)
    return np.int64(REFUSED)


@inline
def is_led_right(t, number, word):
    """Whether a live connection is still treated as its new verdict word asks for."""
    con = t.connections[number]
    if not word & NAMES or t.ports[con.port].kind != PORT_POD:
        return True
    protocol = np.int64(con.word >> np.uint64(8)) & 0xFF
    return con.names & TO_PROXY != 0 if protocol != wire.UDP else con.flags & DNS != 0


@inline
def server_of(t, number):
    """Address and port of the server that a connection leads to, as policy sees it."""
    con = t.connections[number]
    if con.names & TO_PROXY and con.service:
        row = t.backends[con.backend]
        return row.hi, row.lo, np.int64(row.port)
    return con.reply_source_hi, con.reply_source_lo, np.int64(con.reply_word >> np.uint64(48))
