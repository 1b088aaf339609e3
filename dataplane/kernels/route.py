"""Longest prefix match: address -> row of the adjacency table, or of the peer table.

Rule: a lookup reads one or two words for IPv4, and one run of slots a prefix length for IPv6; it
returns 0 when there is no route.

Theory. IPv4 is DIR-24-8 (Gupta, Lin, McKeown 1998; as rte_lpm): a word for each /24, and groups
of 256 words behind those that hold longer prefixes. IPv6 is a hash table whose key is (prefix,
length); the lengths in use stand in a bitmap and are tried from the longest. A node has few
distinct lengths (128 of its own pods, 64 of the nodes, 0), so few probes. Words are published
last by the writer (dataplane/tables), so a reader sees the old route or the new.
"""

import numpy as np

from dataplane.kernels.batch import (
    FLAG_MULTICAST,
    KIND_IP4,
    KIND_IP6,
    VERDICT_PENDING,
)
from dataplane.kernels.house import highest_bit, inline, kernel, prefetch
from xdp.abi import CONST

FIB6_MASK = np.uint64(CONST["FIB6_SLOTS"] - 1)
IPCACHE6_MASK = np.uint64(CONST["IPCACHE6_SLOTS"] - 1)
FIB6_PROBES_MAX = CONST["FIB6_PROBES_MAX"]
WIDE_MASK = np.uint64(CONST["FIB4_WIDE"] - 1)
AHEAD = 32  # packets: what the memory answers in the time that as many lookups take
INDEX_MASK = 0xFFFFFF
EXTENDED = 1 << 31

MIX_A = np.uint64(0x9E3779B97F4A7C15)
MIX_B = np.uint64(0xC2B2AE3D27D4EB4F)
MIX_C = np.uint64(0xD6E8FEB86659FD93)
ONES = np.uint64(0xFFFFFFFFFFFFFFFF)
ZERO = np.uint64(0)
ONE = np.uint64(1)


@inline
def _longest4(wide, deep, address):
    """Index of the longest prefix over an IPv4 address (int64), 0: none."""
    word = np.int64(wide[address >> 8])
    if word & EXTENDED:
        word = np.int64(deep[((word & INDEX_MASK) << 8) + (address & 255)])
    return word & INDEX_MASK


@inline
def slot6(hi, lo, depth, mask):
    """First slot of a prefix of `depth` - 1 bits; the table's writer uses the same mix."""
    h = (hi * MIX_A) ^ ((lo + np.uint64(depth)) * MIX_B)
    h ^= h >> np.uint64(32)
    h *= MIX_C
    h ^= h >> np.uint64(29)
    return np.int64(h & mask)


@inline
def _find6(entries, mask, hi, lo, depth):
    slot = slot6(hi, lo, depth, mask)
    for n in range(FIB6_PROBES_MAX):
        at = (slot + n) & np.int64(mask)
        found = entries[at].depth
        if found == 0:
            return -1
        if found == depth and entries[at].hi == hi and entries[at].lo == lo:
            return np.int64(entries[at].index)
    return -1


@inline
def _longest6(entries, lengths, mask, hi, lo):
    """Index of the longest prefix over an IPv6 address (two uint64 halves), 0: none."""
    for step in range(3):
        word = 2 - step
        bits = lengths[word]
        while bits != ZERO:
            bit = highest_bit(bits)
            bits ^= ONE << np.uint64(bit)
            length = word * 64 + bit
            if length >= 128:
                found = _find6(entries, mask, hi, lo, length + 1)
            elif length > 64:
                found = _find6(
                    entries, mask, hi, lo & (ONES << np.uint64(128 - length)), length + 1
                )
            elif length == 64:
                found = _find6(entries, mask, hi, ZERO, length + 1)
            elif length > 0:
                found = _find6(
                    entries, mask, hi & (ONES << np.uint64(64 - length)), ZERO, length + 1
                )
            else:
                found = _find6(entries, mask, ZERO, ZERO, 1)
            if found >= 0:
                return found
    return 0


@inline
def lookup(t, kind, hi, lo):
    """Adjacency of an address of family KIND_IP4 or KIND_IP6, 0: no route."""
    if kind == KIND_IP4:
        return _longest4(t.fib4_wide, t.fib4_deep, np.int64(lo))
    return _longest6(t.fib6, t.fib6_lengths, FIB6_MASK, hi, lo)


@inline
def peer_of(t, kind, hi, lo):
    """Row of the peer table of an address of family KIND_IP4 or KIND_IP6, 0: not known."""
    if kind == KIND_IP4:
        return _longest4(t.ipcache4_wide, t.ipcache4_deep, np.int64(lo))
    return _longest6(t.ipcache6, t.ipcache6_lengths, IPCACHE6_MASK, hi, lo)


@inline
def ask4(wide, lo):
    """Ask for the word of a wide table (memory address) where an IPv4 address is looked up.

    Whatever stands in lo: what is no IPv4 address asks for some word in vain.
    """
    prefetch(wide + np.int64((lo >> np.uint64(8)) & WIDE_MASK) * 4)


@kernel
def route(b, t):
    """Fill Batch.adjacency of pending IP packets. About 2 ns a packet for IPv4."""
    count = b.count[0]
    wide = t.fib4_wide.address
    for i in range(min(AHEAD, count)):
        ask4(wide, b.target_lo[i])
    for i in range(count):
        if i + AHEAD < count:
            ask4(wide, b.target_lo[i + AHEAD])
        if b.verdict[i] != VERDICT_PENDING:
            continue
        if b.kind[i] == KIND_IP4 or b.kind[i] == KIND_IP6:
            if b.flags[i] & FLAG_MULTICAST:
                # Neighbour solicitations are multicast: `answer` wants them; they have no route.
                b.adjacency[i] = 0
            else:
                b.adjacency[i] = lookup(t, b.kind[i], b.target_hi[i], b.target_lo[i])
