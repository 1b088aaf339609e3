"""The table of connections as a test sees it.

Rule: what stands in shared memory is read here field by field, and checked against itself.

Theory. `audit` holds after every vector and sweep: an index word leads to a live record whose tuple
has its tag, each live record is found both ways in at most BUCKETS buckets without a gap before it,
and the NAT ports are those that the live records have.
"""

from collections import Counter

import numpy as np

from tests.naive.forward import mix
from tests.naive.packets import Tuple, address
from tests.setting import PORT_ROWS
from tests.worlds import World
from xdp.abi import CONST, ENUM, value

LIVE = value("RECORD_LIVE")
WAYS, BUCKETS = CONST["INDEX_WAYS"], 4
STATES = {number: name[len("CONNECTION_") :] for name, number in ENUM["connection_state"].items()}
FLAG = "CONNECTION_FLAG_"
FLAGS = {name[len(FLAG) :]: bit for name, bit in CONST.items() if name.startswith(FLAG)}
MASK32 = (1 << 32) - 1


def live(world: World) -> dict[int, np.void]:
    """Live records by number."""
    rows = world.shm.connections[: world.conntrack.records]
    return {int(n): rows[n] for n in np.flatnonzero(rows["owner"] == LIVE)}


def sides(row: np.void) -> tuple[Tuple, Tuple]:
    """The tuple of the first packet as it came, and of a reply as it will come."""
    return _side(row, ""), _side(row, "reply_")


def _side(row: np.void, prefix: str) -> Tuple:
    word = int(row[f"{prefix}word"])
    ends = [int(row[f"{prefix}{end}_hi"]) << 64 | int(row[f"{prefix}{end}_lo"]) for end in ENDS]
    source, target = (address(word & 0xFF, end) for end in ends)
    return Tuple(source, word >> 48, target, word >> 32 & 0xFFFF, word >> 8 & 0xFF)


ENDS = ("source", "target")


def state(row: np.void) -> str:
    """Name of a connection's state."""
    return STATES[int(row["state"])]


def flags(row: np.void) -> set[str]:
    """Names of a connection's flags."""
    return {name for name, bit in FLAGS.items() if int(row["flags"]) & bit}


def of(world: World, side: Tuple) -> np.void | None:
    """The record of a tuple, either way."""
    found = [row for row in live(world).values() if side in sides(row)]
    assert len(found) < 2, f"{side} has two records"
    return found[0] if found else None


def hashed(side: Tuple) -> int:
    """Hash of a tuple."""
    return mix(int(side.source), int(side.target), side.word)


def audit(world: World, strict: bool = True) -> None:
    """Raise AssertionError where index, records and NAT ports do not fit together.

    strict: no tuple stands twice (two workers that race may leave that).
    """
    rows = live(world)
    index = world.shm.connection_index[: world.conntrack.records * 4].reshape(-1, WAYS)
    words = {int(word) for word in index[index > 1]}
    expected, taken, tuples = set(), Counter(), []
    for number, row in rows.items():
        for way, side in enumerate(sides(row)):
            word = hashed(side) >> 32 << 32 | (number << 1 | way) + 2
            expected.add(word)
            assert _reached(index, hashed(side), word), f"{side} is not found"
        tuples += set(sides(row))  # who talks to itself from one port has one
        if "PORT_TAKEN" in flags(row):
            side = sides(row)[1]
            taken[PORT_ROWS.get(side.protocol, 3), side.target_port] += 1
    assert words == expected, "an index word leads nowhere, or is missing"
    assert np.count_nonzero(index > 1) == len(expected), "a word stands twice"
    twice = [side for side, count in Counter(tuples).items() if count > 1]
    assert not strict or not twice, f"stand twice: {twice}"
    ports = world.nat_ports.reshape(-1, 65536)
    assert {(int(r), int(p)): int(ports[r, p]) for r, p in np.argwhere(ports)} == taken


def _reached(index: np.ndarray, number: int, word: int) -> bool:
    bucket = (number & MASK32) % len(index)
    for n in range(BUCKETS):
        here = index[(bucket + n) % len(index)]
        if word in here.tolist():
            return True
        if 0 in here.tolist():
            return False
    return False
