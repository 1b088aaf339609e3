"""Maglev: a table of backends that changes little when they do.

Rule: the same backends, weights, size and seed give the same table on every node, in whatever order
they came.

Theory. Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016),
3.4: each backend prefers the entries of the table in an order of its own, offset + j * skip modulo
a prime size, and in turns each takes the first entry of its preference that is free. Weights, as
Cilium's and Envoy's, decide how often a backend has its turn: its k-th is at time k / weight, so
in each round all have the first turn and then shares are proportional; equal weights are the
paper's round robin. Offset and skip come from BLAKE2b of the backend's name, keyed with the seed.

The turns are sequential, but almost all of what a turn does is passing over entries that are
taken. Preferences are made in chunks from which numpy strikes out what is taken by then, and a
C-level filter passes over the rest.
"""

import base64
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

SIZES = (251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071)  # Cilium's, all prime
SEED_BYTES = 12
CHUNK_LEAST = 64
FREE = 1


def seed_bytes(text: str) -> bytes:
    """Decode a seed. Raises ValueError unless it is 12 bytes in base64."""
    try:
        seed = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"Maglev seed {text!r} is not base64: {error}") from None
    if len(seed) != SEED_BYTES:
        raise ValueError(f"Maglev seed {text!r} is {len(seed)} bytes, it must be {SEED_BYTES}")
    return seed


def table(
    names: Sequence[bytes], size: int, seed: bytes, weights: Sequence[int] = ()
) -> np.ndarray:
    """Return the table, uint32[size]: positions in `names`.

    names: distinct, at least one. weights: positive, one for each name; none: all equal. Costs
    about 4 ms for 16381 entries.
    """
    order = sorted(range(len(names)), key=names.__getitem__)
    free = bytearray([FREE]) * size
    entries = np.zeros(size, np.uint32)
    chunk = max(CHUNK_LEAST, 2 * size // len(names))
    preferences = [_preferences(names[n], size, seed, free, chunk) for n in order]
    turns = _turns([weights[n] for n in order], size) if weights else None
    taken = _take(preferences, size, free, turns)
    owners = np.resize(np.arange(len(order), dtype=np.uint32), size) if turns is None else turns
    entries[taken] = np.array(order, np.uint32)[owners]
    return entries


def _take(
    preferences: list[Iterator[int]], size: int, free: bytearray, turns: np.ndarray | None
) -> list[int]:
    """Give each turn the first free entry of its backend's preference; return them by turn."""
    taken: list[int] = []
    if turns is not None:
        for n in turns.tolist():
            entry = next(preferences[n])
            free[entry] = 0
            taken.append(entry)
        return taken
    while True:
        for preference in preferences:
            entry = next(preference)
            free[entry] = 0
            taken.append(entry)
            if len(taken) == size:
                return taken


def _preferences(name: bytes, size: int, seed: bytes, free: bytearray, chunk: int) -> Iterator[int]:
    """Yield the entries that a backend prefers and that are free when they are asked for."""
    digest = hashlib.blake2b(name, digest_size=16, key=seed).digest()
    offset = int.from_bytes(digest[:8], "little") % size
    skip = int.from_bytes(digest[8:], "little") % (size - 1) + 1
    is_free = np.frombuffer(free, np.uint8)
    for first in range(0, size, chunk):
        steps = np.arange(first, min(first + chunk, size), dtype=np.uint64)
        entries = (np.uint64(offset) + steps * np.uint64(skip)) % np.uint64(size)
        entries = entries[is_free[entries] == FREE]
        yield from filter(free.__getitem__, entries.tolist())


def _turns(weights: Sequence[int], size: int) -> np.ndarray:
    """Return whose turn it is, uint32[size]: positions in `weights`."""
    share = np.array(weights, np.float64)
    most = np.minimum(np.ceil(size * share / share.sum()).astype(np.int64) + 1, size)
    owner = np.repeat(np.arange(len(weights), dtype=np.uint32), most)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(most) - most, most)
    at = nth / share[owner]
    return owner[np.lexsort((owner, at))[:size]]
