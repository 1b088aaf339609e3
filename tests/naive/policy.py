"""The kernel's policy lookup in plain Python, over the arrays of shared memory, as abi.h has it."""

from ipaddress import ip_address

from xdp.abi import CONST

MASK64 = (1 << 64) - 1
ALLOW, DENY = CONST["POLICY_ALLOW"], CONST["POLICY_DENY"]
INGRESS, EGRESS = 0, 1


def peer_of(shm, address) -> int:
    """Row of `peers` of an address: the value of its longest prefix."""
    number = int(ip_address(address))
    if ip_address(address).version == 4:
        word = int(shm.ipcache4_wide[number >> 8])
        if word >> 31:
            word = int(shm.ipcache4_deep[(word & 0xFFFFFF) * 256 + (number & 255)])
        return word & 0xFFFFFF
    for length in range(128, -1, -1):
        if int(shm.ipcache6_lengths[length // 64]) >> (length % 64) & 1:
            found = _find6(shm, number >> (128 - length) << (128 - length), length + 1)
            if found >= 0:
                return found
    return 0


def _find6(shm, prefix: int, depth: int) -> int:
    hi, lo = prefix >> 64, prefix & MASK64
    h = (hi * 0x9E3779B97F4A7C15 ^ (lo + depth) * 0xC2B2AE3D27D4EB4F) & MASK64
    h ^= h >> 32
    h = h * 0xD6E8FEB86659FD93 & MASK64
    h ^= h >> 29
    for n in range(CONST["FIB6_PROBES_MAX"]):
        row = shm.ipcache6[(h + n) % CONST["IPCACHE6_SLOTS"]]
        if row["depth"] == 0:
            return -1
        if (int(row["hi"]), int(row["lo"]), int(row["depth"])) == (hi, lo, depth):
            return int(row["index"])
    return -1


def entry(shm, key: int, match: int) -> int:
    """Verdict word of an entry, 0 when there is none."""
    h = (key * 0x9E3779B97F4A7C15 ^ match * 0xC2B2AE3D27D4EB4F) & MASK64
    h ^= h >> 32
    h = h * 0xD6E8FEB86659FD93 & MASK64
    h ^= h >> 29
    for n in range(CONST["POLICY_PROBES_MAX"]):
        row = shm.policy_entries[(h + n) % CONST["POLICY_SLOTS"]]
        if row["match"] == 0:
            return 0
        if int(row["match"]) == match and int(row["key"]) == key:
            return int(row["verdict"])
    return 0


def chain(shm, row: int, group: int, direction: int, protocol: int, port: int, kind="") -> int:
    """Verdict word of one chain, 0 when it says nothing. kind: wide_, any_ or nothing."""
    depths = int(shm.policies[row][("ingress_", "egress_")[direction] + kind + "depths"])
    for depth in range(16, -1, -1):
        if depths >> depth & 1:
            masked = port >> (16 - depth) << (16 - depth)
            key = row << 48 | group << 16 | masked
            word = entry(shm, key, protocol << 8 | direction << 7 | depth + 1)
            if word:
                return word
    if depths >> CONST["POLICY_DEPTH_ANY"] & 1:
        match = CONST["POLICY_ANY_PROTOCOL"] << 8 | direction << 7 | 1
        return entry(shm, row << 48 | group << 16, match)
    return 0


def groups_of(shm, peer) -> tuple[int, int]:
    """Group and wide group of an address."""
    word = int(shm.peers[peer_of(shm, peer)]["groups"])
    return word & 0xFFFFFFFF, word >> 32


def verdict(shm, port_index: int, peer, direction: int, protocol: int, port: int) -> int:
    """Verdict word of what the pod at a port receives from, or sends to, an address."""
    row = int(shm.subjects[port_index]["policy"])
    return ask(shm, row, groups_of(shm, peer), direction, protocol, port)


def ask(shm, row: int, groups: tuple[int, int], direction: int, protocol: int, port: int) -> int:
    """Verdict word of a policy row about a peer of these groups."""
    words = []
    for group, kind in zip(groups, ("", "wide_"), strict=True):
        if group:
            words.append(chain(shm, row, group, direction, protocol, port, kind))
    words.append(chain(shm, row, 0, direction, protocol, port, "any_"))
    for action in (DENY, ALLOW):
        for word in words:
            if word & 3 == action:
                return word
    return int(shm.policies[row][("ingress_otherwise", "egress_otherwise")[direction]])


def allows(word: int) -> bool:
    """Whether a verdict word lets a connection pass; 0, what a closed row says, does not."""
    return word & 3 == ALLOW
