"""Maglev's published properties: balance, little disruption, agreement, weights."""

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.services.maglev import SIZES, seed_bytes, table

SEED = seed_bytes("JLfvgnHc2kaSUFaI")


def names(count: int, first: int = 0) -> list[bytes]:
    return [b"10.1.%d.%d 8080 6" % divmod(n, 256) for n in range(first, first + count)]


def by_name(who: list[bytes], positions: np.ndarray) -> np.ndarray:
    return np.array(who)[positions]


def naive(who: list[bytes], size: int, weights: list[int] | None = None) -> list[bytes]:
    """The paper's algorithm, an entry at a time."""
    preferences, turns = {}, []
    for n, name in enumerate(sorted(who)):
        digest = hashlib.blake2b(name, digest_size=16, key=SEED).digest()
        offset = int.from_bytes(digest[:8], "little") % size
        skip = int.from_bytes(digest[8:], "little") % (size - 1) + 1
        preferences[name] = iter([(offset + j * skip) % size for j in range(size)])
        weight = weights[who.index(name)] if weights else 1
        turns += [(k / weight, n, name) for k in range(size)]
    entries: dict[int, bytes] = {}
    for _, _, name in sorted(turns)[:size]:
        entry = next(entry for entry in preferences[name] if entry not in entries)
        entries[entry] = name
    return [entries[n] for n in range(size)]


def is_prime(number: int) -> bool:
    return number > 1 and all(number % n for n in range(2, int(number**0.5) + 1))


def test_sizes_are_primes():
    assert all(is_prime(size) for size in SIZES)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 30), seed=st.integers(0, 1000), weighted=st.booleans())
def test_it_is_the_papers_table(count, seed, weighted):
    who = names(count, seed)
    rng = random.Random(seed)
    rng.shuffle(who)
    weights = [rng.choice([1, 2, 3, 50, 65535]) for _ in who] if weighted else []
    found = by_name(who, table(who, 251, SEED, weights))
    assert found.tolist() == naive(who, 251, weights or None)


@pytest.mark.parametrize(("size", "count"), [(1021, 10), (16381, 163), (65521, 100), (131071, 7)])
def test_shares_are_equal_within_one_entry(size, count):
    shares = np.bincount(table(names(count), size, SEED), minlength=count)
    assert shares.max() - shares.min() <= 1
    assert shares.max() / (size / count) <= 1.01, "1 % at size >= 100 backends (NSDI'16, 5.3)"


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 40), order=st.randoms())
def test_all_nodes_agree_whatever_came_first(count, order):
    who = names(count)
    other = list(who)
    order.shuffle(other)
    weights = {name: 1 + n % 3 for n, name in enumerate(who)}
    for given_weights in (False, True):
        one = table(who, 1021, SEED, [weights[n] for n in who] if given_weights else [])
        two = table(other, 1021, SEED, [weights[n] for n in other] if given_weights else [])
        assert (by_name(who, one) == by_name(other, two)).all()


@pytest.mark.parametrize("count", [10, 100])
def test_little_else_moves_when_a_backend_goes(count):
    size = 16381
    who = names(count)
    before = by_name(who, table(who, size, SEED))
    for gone in (0, count // 2, count - 1):
        left = [name for n, name in enumerate(who) if n != gone]
        after = by_name(left, table(left, size, SEED))
        stayed = before != who[gone]
        assert np.mean(before[stayed] != after[stayed]) < 0.02


def test_a_backend_more_takes_its_share_and_little_else_moves():
    size, who = 16381, names(50)
    before = by_name(who, table(who, size, SEED))
    more = [*who, *names(1, 999)]
    after = by_name(more, table(more, size, SEED))
    moved = before != after
    assert abs(np.mean(after == more[-1]) - 1 / 51) < 1 / 16381 * 2
    assert np.mean(moved) < 1 / 51 + 0.02


def test_shares_follow_weights():
    who, weights, size = names(20), [1 + n % 5 for n in range(20)], 16381
    shares = np.bincount(table(who, size, SEED, weights), minlength=20)
    wanted = size * np.array(weights) / sum(weights)
    assert np.abs(shares / wanted - 1).max() < 0.01


def test_a_weight_that_is_nothing_beside_others_is_still_one_entry():
    shares = np.bincount(table(names(3), 251, SEED, [1, 65535, 65535]), minlength=3)
    assert shares[0] == 1


def test_equal_weights_are_none():
    who = names(9)
    assert (table(who, 251, SEED, [7] * 9) == table(who, 251, SEED)).all()


def test_another_seed_is_another_table():
    who = names(9)
    other = seed_bytes("AAAAAAAAAAAAAAAA")
    assert np.mean(table(who, 1021, SEED) != table(who, 1021, other)) > 0.5


@pytest.mark.parametrize("text", ["", "AAAA", "!" * 16, "JLfvgnHc2kaSUFaIAAAA"])
def test_a_seed_is_12_bytes(text):
    with pytest.raises(ValueError, match="seed"):
        seed_bytes(text)
