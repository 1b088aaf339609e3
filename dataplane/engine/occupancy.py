"""How full the rings are, as a worker sees them.

Rule: reads ring words, changes nothing.

Theory. What still waits in the receive rings behind a full vector says that the worker is late;
what waits in the transmit rings says that the kernel is. Both are read in the sampled steps only,
since the words are the kernel's cache lines.
"""

from dataplane.kernels.house import inline, load32, load32_acquire


@inline
def received(r):
    """Descriptors that wait in all receive rings."""
    total = 0
    for n in range(r.active_count[0]):
        sock = r.socks[r.active[n]]
        total += (load32_acquire(sock.rx_producer) - load32(sock.rx_consumer)) & 0xFFFFFFFF
    return total


@inline
def unsent(r):
    """Descriptors that the kernel has not yet taken out of all transmit rings."""
    total = 0
    for n in range(r.active_count[0]):
        sock = r.socks[r.active[n]]
        total += (sock.tx_head - load32_acquire(sock.tx_consumer)) & 0xFFFFFFFF
    return total
