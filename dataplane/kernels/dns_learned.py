"""Addresses that names have led to: written when an answer passes, asked when a policy is.

Rule: an address is a name's for as long as the answer said, and for as long as a connection that
was opened by it lives; nobody but the owner of a row (`owner` CLAIMED) changes its names.

Theory. Cilium keeps name -> addresses and makes identities of addresses; here an address keeps the
rows of its names, and their selectors are read when a policy asks, so a policy that comes later
finds what was learned before it, and nothing is said twice. Only a connection that would be denied
comes here, with its first packet. A pair of name and address is valid until its time is over, or
as long as `used` is young: the sweeper sets that for addresses with live connections (Cilium's
zombies). Where a row has no room for a name, one goes that no policy asks for, then the one that
would go first. An address may be learned for one identity only (`scope`): the switch is
NAMING_BY_IDENTITY.
"""

import numpy as np

from dataplane.kernels.connections import CLAIMED, FREE, LIVE, LOWER, since
from dataplane.kernels.dns_names import refresh
from dataplane.kernels.house import (
    add32,
    inline,
    load32_acquire,
    lowest_bit,
    match8,
    outline,
    store32_release,
    store64_release,
    swap32,
)
from dataplane.kernels.naming import (
    BUCKETS_MOST,
    NOWHERE,
    bucket_at,
    give_word,
    tag_of,
    take_word,
)
from dataplane.kernels.parse import mix
from dataplane.kernels.policy import ACTION, ALLOW, NAMES, NAMES_ONLY, both, chain
from xdp.abi import CONST, DTYPE

LEARNED = DTYPE["learned"].itemsize
_fields = DTYPE["learned"].fields
assert _fields is not None
OWNER = int(_fields["owner"][1])
_name_fields = DTYPE["name"].fields
assert _name_fields is not None
NAME = DTYPE["name"].itemsize
NAME_ADDRESSES, NAME_CAPPED = int(_name_fields["addresses"][1]), int(_name_fields["capped"][1])
LEARNED_MASK = CONST["LEARNED_MAX"] - 1
NAMES_MOST = CONST["LEARNED_NAMES"]
SELECTORS = CONST["NAME_SELECTORS"]
GROUP_FIRST = CONST["FQDN_GROUP_FIRST"]
LEARNED_WORD = CONST["POLICY_LEARNED"]
BY_IDENTITY = CONST["NAMING_BY_IDENTITY"]
TICK_SHIFT = CONST["TICK_SHIFT"]
USED_TICKS = (60_000_000_000 >> TICK_SHIFT) + 1  # an address that was of use so lately stays
WAITS_MOST = 4096  # looks at a row that another worker has
EGRESS = 1
SHIFT = np.uint64(32)

# What became of a pair of name and address.
NEW, RENEWED, ADDRESSES_FULL, NAMES_FULL, NAME_CAPPED_NOW, CONTENDED = 0, 1, 2, 3, 4, 5


@inline
def _hash(family, hi, lo, scope):
    return mix(hi, lo, np.uint64(scope), np.uint64(0), np.uint64(family))


@outline
def find_address(n, family, hi, lo, scope):
    """Row of an address (two uint64) for a scope, NOWHERE when it has none."""
    hashed = _hash(family, hi, lo, scope)
    tag = tag_of(hashed)
    for k in range(BUCKETS_MOST):
        at, first = bucket_at(n.learned_index.address, LEARNED_MASK, hashed, k)
        found = match8(at, tag)
        hits = found & 0xFF
        while hits:
            way = lowest_bit(hits)
            hits &= hits - 1
            row = n.learned[first + way]
            if row.lo == lo and row.hi == hi and row.scope == scope and row.family == family:
                return first + way
        if found >> 8:
            break
    return np.int64(NOWHERE)


@inline
def _make(n, family, hi, lo, scope):
    """Row of a new address, NOWHERE when there is no room for it."""
    hashed = _hash(family, hi, lo, scope)
    index = n.learned_index.address
    number = take_word(index, LEARNED_MASK, hashed)
    if number < 0:
        return np.int64(NOWHERE)
    row = n.learned[number]
    row.hi, row.lo, row.scope, row.family = hi, lo, scope, family
    row.used = row.until = 0
    for k in range(NAMES_MOST):
        n.learned[number].tags[k] = 0
    row.owner = LIVE
    store64_release(index + number * 8, tag_of(hashed) << 32)
    first = find_address(n, family, hi, lo, scope)
    if first != number and first >= 0:  # another worker made it too, and is found before
        row.owner = FREE
        give_word(index, number)
        return first
    return number


@inline
def _own(n, number):
    """Take hold of a row; False when another worker does not let go of it."""
    owner = n.learned.address + number * LEARNED + OWNER
    for _ in range(WAITS_MOST):
        if load32_acquire(owner) == LIVE and swap32(owner, LIVE, CLAIMED):
            return True
    return False


@inline
def is_valid(n, number, k, tick):
    """Whether pair k of a row still holds."""
    row = n.learned[number]
    if since(tick, np.int64(row.expiry[k])) < 0:
        return True
    return row.used != 0 and since(tick, np.int64(row.used)) < USED_TICKS


@inline
def _is_of(n, name, tag):
    """Whether a row of names still is what it was when its tag was noted."""
    return tag_of(n.names[name].hash) == tag


@inline
def forget_pair(n, number, k):
    """Forget a name of a row that is ours."""
    tag, name = np.int64(n.learned[number].tags[k]), np.int64(n.learned[number].names[k])
    n.learned[number].tags[k] = 0
    if tag and _is_of(n, name, tag):
        add32(n.names.address + name * NAME + NAME_ADDRESSES, -1)


@inline
def _room(n, number, tick):
    """Pair of a row that may be taken, and whether it still was of use to a policy."""
    chosen, least = np.int64(0), np.int64(1) << 62
    for k in range(NAMES_MOST):
        tag, name = np.int64(n.learned[number].tags[k]), np.int64(n.learned[number].names[k])
        if tag == 0 or not _is_of(n, name, tag) or not is_valid(n, number, k, tick):
            return k, False
        left = -since(tick, np.int64(n.learned[number].expiry[k]))
        if refresh(n, name):
            left += np.int64(1) << 40
        if left < least:
            least, chosen = left, np.int64(k)
    return chosen, least >= np.int64(1) << 40


@inline
def _note(n, number, name, tag, expiry, tick):
    """Note a name in a row that is ours."""
    for k in range(NAMES_MOST):
        row = n.learned[number]
        if row.names[k] == name and row.tags[k] == tag:
            if since(expiry, np.int64(row.expiry[k])) > 0:
                n.learned[number].expiry[k] = expiry
            return np.int64(RENEWED)
    most = np.int64(n.setting[0].addresses_most)
    if most and np.int64(n.names[name].addresses) >= most:
        add32(n.names.address + name * NAME + NAME_CAPPED, 1)
        return np.int64(NAME_CAPPED_NOW)
    k, lost = _room(n, number, tick)
    forget_pair(n, number, k)  # nobody may see one name with another's time
    n.learned[number].expiry[k] = expiry
    n.learned[number].names[k] = name
    store32_release(_tag_at(n, number, k), tag)
    add32(n.names.address + name * NAME + NAME_ADDRESSES, 1)
    return np.int64(NAMES_FULL if lost else NEW)


_TAGS = int(_fields["tags"][1])


@inline
def _tag_at(n, number, k):
    return n.learned.address + number * LEARNED + _TAGS + k * 4


@outline
def learn(n, name, family, hi, lo, scope, tick, expiry):
    """Note that a name (row) leads to an address until the tick `expiry`; return what became."""
    result = np.int64(CONTENDED)
    for _ in range(2):  # the sweeper may have taken the row away between finding and owning
        number = find_address(n, family, hi, lo, scope)
        if number < 0:
            number = _make(n, family, hi, lo, scope)
            if number < 0:
                return np.int64(ADDRESSES_FULL)
        if not _own(n, number):
            continue
        row = n.learned[number]
        if row.lo == lo and row.hi == hi and row.scope == scope and row.family == family:
            result = _note(n, number, name, tag_of(n.names[name].hash), expiry & LOWER, tick)
            if row.until == 0 or since(expiry, np.int64(row.until)) > 0:
                row.until = expiry | 1
        store32_release(n.learned.address + number * LEARNED + OWNER, LIVE)
        if result != CONTENDED:
            break
    return result


@inline
def scope_of(n, identity):
    """For whom an identity's pod learns and asks."""
    return identity if n.setting[0].flags & BY_IDENTITY else np.int64(0)


@outline
def ask_names(n, entries, family, hi, lo, scope, row, protocol, port, depths, selector, tick):
    """Verdict word of policy `row` for an address by the names that led to it, 0: none allows it.

    selector: 0, or of a name that is to be asked for there (rules.dns).
    """
    number = find_address(n, family, hi, lo, scope)
    word = np.int64(0)
    if number < 0:
        return word
    for k in range(NAMES_MOST):
        tag, name = np.int64(n.learned[number].tags[k]), np.int64(n.learned[number].names[k])
        if tag == 0 or not is_valid(n, number, k, tick) or not _is_of(n, name, tag):
            continue
        count = refresh(n, name)
        for s in range(min(count, SELECTORS)):
            group = GROUP_FIRST + np.int64(n.names[name].selectors[s])
            found = chain(entries, row, group, EGRESS, protocol, port, depths, selector)
            if found & ACTION == ALLOW:
                word = both(word, found | LEARNED_WORD)
                if not word & (NAMES | NAMES_ONLY):
                    n.learned[number].used = tick | 1
                    return word
    if word:
        n.learned[number].used = tick | 1
    return word
