"""Services of shared memory as plain data: frontends, backends, Maglev tables.

Rule: reads only, and follows the words as the kernel does; works while no daemon runs.

Theory. The command line shows this; tests and benchmarks compare it, because row numbers and the
place of a part depend on history, while what a packet meets does not.
"""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import numpy as np

from dataplane.tables.shm import Shm
from xdp.abi import CONST, ENUM, value

USED = value("SLOT_USED")
COUNT_MASK = (1 << 32) - 1
PROTOCOLS = {0: "any", 6: "tcp", 17: "udp", 132: "sctp"}
FLAGS = {
    CONST[name]: name.removeprefix("SERVICE_").lower().replace("_", " ")
    for name in (
        "SERVICE_CLUSTER_IP",
        "SERVICE_KEEP_SOURCE",
        "SERVICE_ADDRESS",
        "SERVICE_HOST_PORT",
    )
}
SIDES = ("inside", "outside")
TABLES = ("inside_table", "outside_table")
STATES = {
    number: name.removeprefix("BACKEND_").lower() for name, number in ENUM["backend_state"].items()
}


def address_of(hi: int, lo: int) -> IPv4Address | IPv6Address:
    """Return the address of two halves; below 2**32 it is IPv4."""
    return IPv4Address(lo) if hi == 0 and lo < 1 << 32 else IPv6Address(hi << 64 | lo)


def part(words: np.ndarray, word: int) -> np.ndarray:
    """Return the part of an array that a word names; empty for 0."""
    first = word >> 32
    return words[first : first + (word & COUNT_MASK)]


def used(shm: Shm, name: str, state: int | None = None) -> Iterator[int]:
    """Yield the rows of a table whose state is this one, or any but 0."""
    for first, end in shm.extents(name):
        states = getattr(shm, name)["state"][first:end]
        yield from (first + np.flatnonzero(states == state if state else states)).tolist()


def flags_of(flags: int) -> list[str]:
    """Return flags in words."""
    return [text for bit, text in FLAGS.items() if flags & bit]


def frontends(shm: Shm) -> list[dict[str, Any]]:
    """Return every frontend with what its service row says, in the order of addresses."""
    found = []
    rows: dict[int, dict[str, Any]] = {}
    for at in used(shm, "frontends", USED):
        hi, lo, port, protocol, _, service, _ = shm.frontends[at].tolist()
        if service not in rows:
            rows[service] = _service(shm, service)
        entry = {
            "address": str(address_of(hi, lo)),
            "port": port,
            "protocol": PROTOCOLS.get(protocol, str(protocol)),
            "service": service,
            **rows[service],
        }
        found.append(((hi, lo, port, protocol), entry))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


def _service(shm: Shm, row: int) -> dict[str, Any]:
    service = shm.services[row]
    ranges = part(shm.source_ranges, int(service["sources"]))
    return {
        "flags": flags_of(int(service["flags"])),
        "affinity_s": int(service["affinity_s"]),
        "sources": [str(_network(one)) for one in ranges],
        **{
            f"{side}{what}": int(service[name]) & COUNT_MASK
            for side in SIDES
            for what, name in (("", side), ("_maglev", f"{side}_table"))
        },
    }


def _network(row: np.void) -> IPv4Network | IPv6Network | str:
    hi, lo, mask_hi, mask_lo = (int(row[name]) for name in ("hi", "lo", "mask_hi", "mask_lo"))
    if not mask_hi and not mask_lo and lo:
        return "nobody"
    length = mask_hi.bit_count() + mask_lo.bit_count()
    if not mask_hi and not hi:
        return IPv4Network((lo, length))
    return IPv6Network((hi << 64 | lo, length))


def backend(shm: Shm, row: int) -> dict[str, Any]:
    """Return one backend."""
    hi, lo, port, protocol, state, *_ = shm.backends[row].tolist()
    return {
        "backend": row,
        "address": str(address_of(hi, lo)),
        "port": port,
        "protocol": PROTOCOLS.get(protocol, str(protocol)),
        "state": STATES.get(state, str(state)),
    }


def listed(shm: Shm, service: int, side: str) -> list[dict[str, Any]]:
    """Return the backends of one side's list, each once, in its order."""
    words = part(shm.backend_lists, int(shm.services[service][side]))
    return [backend(shm, row) for row in dict.fromkeys(words.tolist())]


def backends(shm: Shm) -> list[dict[str, Any]]:
    """Return every backend, in the order of rows, with the services whose lists name it."""
    users: dict[int, set[int]] = {}
    led = {int(shm.frontends[at]["service"]) for at in used(shm, "frontends", USED)}
    for service in sorted(led):
        for side in SIDES:
            for row in set(part(shm.backend_lists, int(shm.services[service][side])).tolist()):
                users.setdefault(row, set()).add(service)
    return [
        {**backend(shm, row), "services": sorted(users.get(row, ()))}
        for row in used(shm, "backends")
    ]


def maglev(shm: Shm, service: int) -> list[dict[str, Any]]:
    """Return how a service's tables divide among its backends, by side."""
    found = []
    for side in SIDES:
        table = part(shm.maglev, int(shm.services[service][f"{side}_table"]))
        for row, count in zip(*np.unique(table, return_counts=True), strict=True):
            found.append(
                {
                    "side": side,
                    **backend(shm, int(row)),
                    "entries": int(count),
                    "size": len(table),
                    "share": round(int(count) / len(table), 5),
                }
            )
    return found


def decoded(shm: Shm) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Return what a packet to each frontend meets, without row numbers.

    Lists are those of the table in their order; a Maglev table is the bytes of its backends.
    """
    names: dict[int, tuple] = {
        row: tuple(shm.backends[row].tolist()[:5]) for row in used(shm, "backends")
    }
    rows: dict[int, dict[str, Any]] = {}
    found = {}
    for entry in frontends(shm):
        number = entry["service"]
        if number not in rows:
            service = shm.services[number]
            rows[number] = {
                **{name: entry[name] for name in ("flags", "affinity_s", "sources")},
                **{side: _named(shm.backend_lists, service[side], names) for side in SIDES},
                **{name: _named(shm.maglev, service[name], names) for name in TABLES},
            }
        found[entry["address"], entry["port"], entry["protocol"]] = rows[number]
    return found


def _named(words: np.ndarray, word: np.uint64, names: dict[int, tuple]) -> tuple:
    return tuple(names.get(row, row) for row in part(words, int(word)).tolist())
