"""The verdict of a policy: may this peer use this port of that protocol?

Rule: a constant number of probes, whatever the number of rules; what is not known is denied.

Theory. As Cilium's policy map (bpf/lib/policy.h), with groups in the place of identities: addresses
that no rule tells apart have one group, so a rule about ten thousand pods is one entry. Three
chains are asked, the peer's group, its wide group (of selectors that fit many peers) and "any peer"
(0); in each the longest port prefix that is there counts, and the compiler has folded shorter ones
into it. A deny of any chain wins, then an allow, then what the policy says of the rest. A row of
zeros says nothing, which is a deny: a new pod is closed until its policy is written. The verdict
word carries the rule's number (xdp/abi.h). DNS names that may be asked for (rules.dns) have chains
of their own beside those of addresses: the number of a name's selector is part of the entry.
"""

import numpy as np

from dataplane.kernels.house import highest_bit, inline, load64, outline, prefetch
from xdp.abi import CONST, DTYPE

SLOTS_MASK = CONST["POLICY_SLOTS"] - 1
PROBES_MAX = CONST["POLICY_PROBES_MAX"]
ANY_PROTOCOL = CONST["POLICY_ANY_PROTOCOL"]
ALLOW, DENY = CONST["POLICY_ALLOW"], CONST["POLICY_DENY"]
ACTION = CONST["POLICY_ACTION_MASK"]
NAMES, NAMES_ONLY = CONST["POLICY_NAMES"], CONST["POLICY_NAMES_ONLY"]
ANY_BIT = 1 << CONST["POLICY_DEPTH_ANY"]
EXACT = 16
ENTRY = DTYPE["policy_entry"].itemsize
ENTRY_MATCH = 8  # match in the lower half of the second word, verdict in the upper

LOW = np.uint64(0xFFFFFFFF)
MIX_A = np.uint64(0x9E3779B97F4A7C15)
MIX_B = np.uint64(0xC2B2AE3D27D4EB4F)
MIX_C = np.uint64(0xD6E8FEB86659FD93)


@inline
def slot_of(key, match):
    """First slot of an entry; the table's writer uses the same mix. key, match: uint64."""
    h = (key * MIX_A) ^ (match * MIX_B)
    h ^= h >> np.uint64(32)
    h *= MIX_C
    h ^= h >> np.uint64(29)
    return np.int64(h) & SLOTS_MASK


@inline
def _entry(entries, key, match):
    """Verdict word of an entry, 0 when there is none."""
    slot = slot_of(np.uint64(key), np.uint64(match))
    for n in range(PROBES_MAX):
        at = entries + ((slot + n) & SLOTS_MASK) * ENTRY
        second = load64(at + ENTRY_MATCH)
        found = second & 0xFFFFFFFF
        if found == 0:
            return np.int64(0)
        if found == match and load64(at) == key:
            return (second >> 32) & 0xFFFFFFFF
    return np.int64(0)


@inline
def chain(entries, row, group, direction, protocol, port, depths, selector):
    """Verdict word of one chain, 0 when it says nothing. selector: of a name, 0: of addresses."""
    base = (row << 48) | (group << 16)
    kind = (selector << 16) | (direction << 7)
    bits = depths & 0x1FFFF
    while bits:
        depth = highest_bit(np.uint64(bits))
        bits ^= 1 << depth
        shift = EXACT - depth
        key = base | ((port >> shift) << shift)
        word = _entry(entries, key, kind | (protocol << 8) | (depth + 1))
        if word:
            return word
    if depths & ANY_BIT:
        return _entry(entries, base, kind | (ANY_PROTOCOL << 8) | 1)
    return np.int64(0)


@inline
def _chain_ahead(entries, row, group, direction, protocol, port, depths):
    """Ask for the entries that `chain` may look at."""
    base = (row << 48) | (group << 16)
    kind = direction << 7
    bits = depths & 0x1FFFF
    while bits:
        depth = highest_bit(np.uint64(bits))
        bits ^= 1 << depth
        shift = EXACT - depth
        key = np.uint64(base | ((port >> shift) << shift))
        prefetch(entries + slot_of(key, np.uint64(kind | (protocol << 8) | (depth + 1))) * ENTRY)
    if depths & ANY_BIT:
        match = np.uint64(kind | (ANY_PROTOCOL << 8) | 1)
        prefetch(entries + slot_of(np.uint64(base), match) * ENTRY)


@inline
def both(one, other):
    """What two chains say together that both allow, or of which one says nothing.

    Names are looked at where one of them asks for it, and restricted where both do.
    """
    if one == 0 or other == 0:
        return one | other
    return (one | (other & NAMES)) & ~(NAMES_ONLY & ~other)


@inline
def group_of(groups):
    """The group of a peer; groups: of its row."""
    return np.int64(groups & LOW)


@inline
def wide_of(groups):
    """The wide group of a peer; groups: of its row."""
    return np.int64(groups >> np.uint64(32))


@outline
def ask(
    entries, row, groups, direction, protocol, port, depths, wide_depths, any_depths, otherwise
):  # fmt: skip
    """Verdict word for a peer's groups, protocol and port (ICMP: type); 0: not known, a deny.

    entries: memory address of policy_entry[]; groups: of the peer's row; the last four: of the
    policy's row.
    """
    none = mine = many = any_peer = np.int64(0)
    group, wide = group_of(groups), wide_of(groups)
    if group and depths:
        mine = chain(entries, row, group, direction, protocol, port, depths, none)
        if mine & ACTION == DENY:
            return mine
    if wide and wide_depths:
        many = chain(entries, row, wide, direction, protocol, port, wide_depths, none)
        if many & ACTION == DENY:
            return many
    if any_depths:
        any_peer = chain(entries, row, none, direction, protocol, port, any_depths, none)
        if any_peer & ACTION == DENY:
            return any_peer
    word = both(both(mine, many), any_peer)
    return word if word else np.int64(otherwise)


@inline
def egress(t, row, groups, protocol, port):
    """Verdict word of policy `row` for what its pod sends to a peer."""
    policy = t.policies[row]
    return ask(
        t.policy_entries.address,
        row, groups, 1, protocol, port, np.int64(policy.egress_depths),
        np.int64(policy.egress_wide_depths), np.int64(policy.egress_any_depths),
        np.int64(policy.egress_otherwise),
    )  # fmt: skip


@inline
def ingress(t, row, groups, protocol, port):
    """Verdict word of policy `row` for what its pod receives from a peer."""
    policy = t.policies[row]
    return ask(
        t.policy_entries.address,
        row, groups, 0, protocol, port, np.int64(policy.ingress_depths),
        np.int64(policy.ingress_wide_depths), np.int64(policy.ingress_any_depths),
        np.int64(policy.ingress_otherwise),
    )  # fmt: skip


@inline
def _ahead(
    entries, row, groups, direction, protocol, port, depths, wide_depths, any_depths
):  # fmt: skip
    none, group, wide = np.int64(0), group_of(groups), wide_of(groups)
    if group:
        _chain_ahead(entries, row, group, direction, protocol, port, depths)
    if wide:
        _chain_ahead(entries, row, wide, direction, protocol, port, wide_depths)
    _chain_ahead(entries, row, none, direction, protocol, port, any_depths)


@inline
def egress_ahead(t, row, groups, protocol, port):
    """Ask for the entries that `egress` will look at."""
    policy = t.policies[row]
    _ahead(
        t.policy_entries.address, row, groups, 1, protocol, port, np.int64(policy.egress_depths),
        np.int64(policy.egress_wide_depths), np.int64(policy.egress_any_depths),
    )  # fmt: skip


@inline
def ingress_ahead(t, row, groups, protocol, port):
    """Ask for the entries that `ingress` will look at."""
    policy = t.policies[row]
    _ahead(
        t.policy_entries.address, row, groups, 0, protocol, port, np.int64(policy.ingress_depths),
        np.int64(policy.ingress_wide_depths), np.int64(policy.ingress_any_depths),
    )  # fmt: skip


@inline
def allows(word):
    """Whether a verdict word lets a connection pass."""
    return word & ACTION == ALLOW
