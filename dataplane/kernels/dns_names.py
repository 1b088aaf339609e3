"""Names: their hashes, the patterns that they fit, and the table of those that were asked for.

Rule: a name's selectors are those of the present patterns; whoever finds older ones finds new ones.

Theory. A pattern ends in whole labels without a star, its literal end, and is found by the hash of
that end; so a name asks once for each of its own ends that is as long as some pattern's, `depths`
says which, and compares only what it finds, label by label. An exact name is a pattern that is all
end. A star never matches a dot, so a pattern has as many labels as the name, or fewer where `**.`
stands before it. Semantics are Cilium's (pkg/fqdn/matchpattern, from 1.19 on). The hash goes from
the root to the first label, eight bytes a step, so the hash of a name has those of all its ends on
the way. Rows of names that an address was learned by are pinned; of the others the one that nobody
asked for longest gives way to a new name.
"""

import numpy as np

from dataplane.kernels.connections import since
from dataplane.kernels.house import (
    inline,
    load8,
    load64,
    lowest_bit,
    match8,
    outline,
    store8,
    store32,
    store64,
    store64_release,
    swap64,
)
from dataplane.kernels.naming import (
    BUCKETS_MOST,
    CLAIMED,
    LOWER,
    NOWHERE,
    S_HASHES,
    S_NAME,
    S_OFFSETS,
    WAYS,
    bucket_at,
    tag_of,
    take_word,
)
from xdp.abi import CONST, DTYPE, value

NAME = DTYPE["name"].itemsize
PATTERN = DTYPE["name_pattern"].itemsize
SELECTORS = CONST["NAME_SELECTORS"]
SLOTS_MASK = CONST["NAME_PATTERN_SLOTS"] - 1
PROBES_MAX = CONST["NAME_PROBES_MAX"]
NAMES_MASK = CONST["NAMES_MAX"] - 1
DEEP, ANY, ODD = CONST["PATTERN_DEEP"], CONST["PATTERN_ANY"], CONST["NAME_ODD"]
SLOT_EMPTY, SLOT_USED = value("SLOT_EMPTY"), value("SLOT_USED")
STAR = 0x2A
GENERATION_MASK = np.uint64(0xFFFFFFFF)
ZERO, ONE = np.uint64(0), np.uint64(1)
MIX = np.uint64(0x9E3779B97F4A7C15)
SHIFT = np.uint64(32)


def _text(struct: str) -> int:
    fields = DTYPE[struct].fields
    assert fields is not None
    return int(fields["text"][1])


NAME_TEXT, PATTERN_TEXT = _text("name"), _text("name_pattern")


@inline
def _mix_label(hashed, at):
    """Hash of the label at a memory address and what is behind it. hashed: of that, uint64."""
    left = load8(at) + 1
    while left > 0:
        word = np.uint64(load64(at))
        if left < 8:
            word &= (ONE << np.uint64(left * 8)) - ONE
        hashed = (hashed ^ word) * MIX
        hashed ^= hashed >> SHIFT
        at += 8
        left -= 8
    return hashed


@outline
def hash_ends(name, offsets, labels, seed, hashes):
    """Hash a name and all its ends: hashes[k] is that of label k and what follows; return [0].

    name, offsets: memory addresses as of read_name; hashes: of uint64[LABELS_MOST + 1].
    """
    hashed = seed
    store64(hashes + labels * 8, np.int64(hashed))
    for n in range(labels - 1, -1, -1):
        hashed = _mix_label(hashed, name + load8(offsets + n))
        store64(hashes + n * 8, np.int64(hashed))
    return hashed


@outline
def glob(pattern, length, text, count):
    """Whether `count` characters at `text` fit a pattern in which a star is any characters."""
    i = j = np.int64(0)
    star = np.int64(-1)
    mark = np.int64(0)
    while i < count:
        wanted = load8(pattern + j) if j < length else np.int64(-1)
        if wanted == STAR:
            star, mark = j, i
            j += 1
        elif wanted == load8(text + i):
            i += 1
            j += 1
        elif star >= 0:
            j = star + 1
            mark += 1
            i = mark
        else:
            return False
    while j < length and load8(pattern + j) == STAR:
        j += 1
    return j == length


@inline
def _fits(n, row, name, offsets, labels, depth):
    """Whether a name fits the pattern of a row, found by an end of `depth` labels."""
    pattern = n.patterns[row]
    if pattern.state != SLOT_USED or pattern.literal != depth:
        return False
    if pattern.flags & ANY:
        return True
    skip = labels - np.int64(pattern.labels)
    if skip < 1 if pattern.flags & DEEP else skip != 0:
        return False
    at = n.patterns.address + np.int64(row) * PATTERN + PATTERN_TEXT
    for k in range(skip, labels):
        label = name + load8(offsets + k)
        length = load8(at)
        if not glob(at + 1, length, label + 1, load8(label)):
            return False
        at += 1 + length
    return True


@outline
def select(n, name, offsets, labels, hashes):
    """Note the selectors of a name that is not odd in n.scratch; return how many fit.

    n: Naming; others: memory addresses, as of hash_ends. The first NAME_SELECTORS are noted.
    """
    count = np.int64(0)
    for depth in range(labels + 1):
        if not n.setting[0].depths[depth >> 6] >> np.uint64(depth & 63) & ONE:
            continue
        hashed = np.uint64(load64(hashes + (labels - depth) * 8))
        slot = np.int64(hashed & np.uint64(SLOTS_MASK))
        for probe in range(PROBES_MAX):
            found = n.pattern_slots[(slot + probe) & SLOTS_MASK]
            if found.state == SLOT_EMPTY:
                break
            if found.state != SLOT_USED or found.hash != hashed:
                continue
            row = np.int64(found.row)
            if _fits(n, row, name, offsets, labels, depth):
                if count < SELECTORS:
                    n.scratch[0].selectors[count] = row
                count += 1
    return count


@outline
def refresh(n, row):
    """Bring the selectors of a row of names up to date; return how many there are.

    More than NAME_SELECTORS: some are left out.
    """
    name = n.names[row]
    generation = n.setting[0].generation & GENERATION_MASK
    if name.generation == generation:
        return np.int64(name.selector_count)
    count = np.int64(0)
    if not name.flags & ODD:
        text = n.names.address + np.int64(row) * NAME + NAME_TEXT
        scratch = n.scratch.address
        offsets, hashes = scratch + S_OFFSETS, scratch + S_HASHES
        labels, at = np.int64(name.labels), np.int64(0)
        for k in range(labels):
            store8(offsets + k, at)
            at += 1 + load8(text + at)
        hash_ends(text, offsets, labels, n.setting[0].seed, hashes)
        count = select(n, text, offsets, labels, hashes)
        for k in range(min(count, SELECTORS)):
            n.names[row].selectors[k] = n.scratch[0].selectors[k]
    name.selector_count = count if count < 255 else 255
    name.generation = generation
    return count


@inline
def _same_text(n, row, name, length):
    """Whether a row of names is of this name. Both are followed by room for eight bytes."""
    text = n.names.address + row * NAME + NAME_TEXT
    left = length
    while left > 0:
        differ = np.uint64(load64(text)) ^ np.uint64(load64(name))
        if left < 8:
            differ &= (ONE << np.uint64(left * 8)) - ONE
        if differ != ZERO:
            return False
        text += 8
        name += 8
        left -= 8
    return True


@outline
def find_name(n, name, length, hashed, tick):
    """Row of a name (memory address, as of read_name), NOWHERE when it has none."""
    tag = tag_of(hashed)
    for k in range(BUCKETS_MOST):
        at, first = bucket_at(n.name_index.address, NAMES_MASK, hashed, k)
        found = match8(at, tag)
        hits = found & 0xFF
        while hits:
            way = lowest_bit(hits)
            hits &= hits - 1
            row = n.names[first + way]
            if row.hash == hashed and row.length == length:
                if _same_text(n, first + way, name, length):
                    store32(at + way * 8, tick)
                    return first + way
        if found >> 8:
            break
    return np.int64(NOWHERE)


@inline
def _give_way(n, hashed, tick):
    """Number of the word whose name gives way, NOWHERE when all are pinned."""
    oldest, chosen = np.int64(-1), np.int64(NOWHERE)
    for k in range(BUCKETS_MOST):
        at, first = bucket_at(n.name_index.address, NAMES_MASK, hashed, k)
        for way in range(WAYS):
            word = load64(at + way * 8)
            pinned = np.int64(n.names[first + way].pinned_until)
            if word == CLAIMED or (pinned and since(tick, pinned) <= 0):
                continue
            age = since(tick, word & LOWER)
            if age > oldest:
                oldest, chosen = age, first + way
    return chosen


@outline
def make_name(n, name, length, labels, odd, hashed, tick):
    """Row of a new name, NOWHERE when there is no room for it."""
    index = n.name_index.address
    number = take_word(index, NAMES_MASK, hashed)
    if number < 0:
        number = _give_way(n, hashed, tick)
        if number < 0:
            return np.int64(NOWHERE)
        old = load64(index + number * 8)
        if old == CLAIMED or not swap64(index + number * 8, old, CLAIMED):
            return np.int64(NOWHERE)  # another worker was faster; the next packet has better luck
    row = n.names[number]
    row.hash = ZERO
    row.generation = row.selector_count = 0
    row.length, row.labels, row.flags = length, labels, ODD if odd else 0
    row.pinned_until = row.addresses = row.capped = 0
    row.queries = row.answers = row.refused = row.failures = row.missing = 0
    row.latency_ns = ZERO
    text = n.names.address + number * NAME + NAME_TEXT
    for at in range(0, length, 8):
        store64(text + at, load64(name + at))
    row.hash = hashed
    store64_release(index + number * 8, (tag_of(hashed) << 32) | (tick & LOWER))
    return number


@outline
def name_of(n, length, labels, odd, tick):
    """Row of the name that stands in n.scratch, made where it is missing; NOWHERE: no room."""
    scratch = n.scratch.address
    name, offsets = scratch + S_NAME, scratch + S_OFFSETS
    hashed = hash_ends(name, offsets, labels, n.setting[0].seed, scratch + S_HASHES)
    row = find_name(n, name, length, hashed, tick)
    if row < 0:
        row = make_name(n, name, length, labels, odd, hashed, tick)
    return row
