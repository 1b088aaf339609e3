"""The tables about names, as one NamedTuple of Rows, and the buckets that two of them are found by.

Rule: the agent writes `setting`, `patterns` and `pattern_slots`; all else is the workers' own,
shared by them through shared memory, and outlives them. `scratch` is this worker's alone.

Theory. Names and learned addresses are found alike: word i of an index leads to row i. A bucket is
eight words, one cache line; what does not fit goes on in the next, up to BUCKETS_MOST. The upper
half of a word is a tag (the upper half of the hash, never 0), the lower half is the owner's. A row
is taken by making its word CLAIMED, filled, and published by its word. A word that is taken out of
a full bucket stays DELETED, so that what lies behind is found. A row may become another's while
somebody still holds its number, so who comes back to a row later compares tags.
"""

from typing import Any, NamedTuple

import numpy as np

from dataplane.kernels.dns_message import ADDRESS, LABELS_MOST
from dataplane.kernels.house import (
    inline,
    load64,
    match8,
    outline,
    store64_release,
    swap64,
)
from dataplane.kernels.rows import Rows
from xdp.abi import CONST

BUCKET = 64  # bytes
WAYS = CONST["NAME_WAYS"]
BUCKETS_MOST = 4  # that a lookup may touch
EMPTY, CLAIMED, DELETED = 0, 1, 2
NOWHERE = -1
TEXT = CONST["DNS_TEXT"] + 8  # names are read eight bytes at a time
ADDRESSES_MOST = 4096  # of one answer: 64 KiB have no more
SHIFT = np.uint64(32)
LOWER = 0xFFFFFFFF

SCRATCH = np.dtype(
    [
        ("name", "u1", (TEXT,)),
        ("offsets", "u1", (LABELS_MOST,)),
        ("hashes", "<u8", (LABELS_MOST + 1,)),
        ("selectors", "<u2", (CONST["NAME_SELECTORS"],)),
        ("found", ADDRESS, (ADDRESSES_MOST,)),
    ]
)
"""Room for one name, its labels, its hashes, its selectors, and where it leads."""


def _place(field: str) -> int:
    assert SCRATCH.fields is not None
    return int(SCRATCH.fields[field][1])


S_NAME, S_OFFSETS, S_HASHES = _place("name"), _place("offsets"), _place("hashes")
S_SELECTORS, S_FOUND = _place("selectors"), _place("found")


class Naming(NamedTuple):
    """What kernels know of names. Shapes and dtypes are those of xdp/abi.h."""

    setting: Rows  # naming[1]
    patterns: Rows  # name_pattern[NAME_PATTERNS_MAX]
    pattern_slots: Rows  # name_slot[NAME_PATTERN_SLOTS]
    names: Rows  # name[NAMES_MAX]
    name_index: Rows  # uint64[NAMES_MAX]
    learned: Rows  # learned[LEARNED_MAX]
    learned_index: Rows  # uint64[LEARNED_MAX]
    queries: Rows  # dns_query[QUERIES_MAX]
    scratch: Rows  # SCRATCH[1]
    found: Rows  # ADDRESS[ADDRESSES_MOST]: its last part


def make_naming(shm: Any) -> Naming:
    """Return a worker's Naming over the arrays of shared memory (tables/shm.py)."""
    scratch = np.zeros(1, SCRATCH)
    arrays = (
        shm.naming, shm.name_patterns, shm.name_pattern_slots, shm.names, shm.name_index,
        shm.learned, shm.learned_index, shm.dns_queries, scratch, scratch[0]["found"],
    )  # fmt: skip
    return Naming(*map(Rows, arrays))


@inline
def tag_of(hashed):
    """Tag of a hash (uint64), as int64; never 0."""
    return np.int64(hashed >> SHIFT) | 1


@inline
def bucket_at(index, mask, hashed, n):
    """Memory address of the n-th bucket of a hash, and the number of its first word."""
    first = ((np.int64(hashed & np.uint64(LOWER)) + n) * WAYS) & mask
    return index + first * 8, first


@outline
def take_word(index, mask, hashed):
    """Make a free word of a hash's buckets CLAIMED; its number, NOWHERE when they are full."""
    for n in range(BUCKETS_MOST):
        at, first = bucket_at(index, mask, hashed, n)
        for way in range(WAYS):
            word = load64(at + way * 8)
            if (word == EMPTY or word == DELETED) and swap64(at + way * 8, word, CLAIMED):
                return first + way
    return np.int64(NOWHERE)


@inline
def give_word(index, number):
    """Make a word free again that nobody else changes."""
    at = index + (number & ~(WAYS - 1)) * 8
    has_empty = match8(at, 0) >> 8 != 0
    store64_release(index + number * 8, EMPTY if has_empty else DELETED)
