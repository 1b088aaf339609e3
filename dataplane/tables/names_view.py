"""DNS as shared memory has it, decoded: names, addresses that they lead to, counters, events.

Rule: reads only; works while no daemon runs. What was lost is said.

Theory. Workers, sweeper and proxy count in lanes of their own; here they are added up. Latency is
kept in buckets, four an octave, so a percentile is the upper end of the bucket that it falls into.
A row of names or of learned addresses may change while it is read: what does not fit together any
more is left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from time import monotonic_ns
from typing import Any

import numpy as np

from dataplane.tables.names import pattern_of, spelled
from dataplane.tables.shm import Shm
from xdp.abi import CONST, ENUM, value

Address = IPv4Address | IPv6Address
RCODES = (
    "NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED", "YXDOMAIN", "YXRRSET",
    "NXRRSET", "NOTAUTH", "NOTZONE",
)  # fmt: skip
TYPES = {n: name.removeprefix("DNS_TYPE_") for name, n in ENUM["dns_type"].items()}
QTYPES = {
    1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 12: "PTR", 15: "MX", 16: "TXT", 28: "AAAA", 33: "SRV",
    64: "SVCB", 65: "HTTPS", 255: "ANY",
}  # fmt: skip
KINDS = {n: name.removeprefix("DNS_EVENT_").lower() for name, n in ENUM["dns_event_kind"].items()}
LIVE = value("RECORD_LIVE")
TICK_NS = 1 << CONST["TICK_SHIFT"]
USED_TICKS = (60_000_000_000 >> CONST["TICK_SHIFT"]) + 1  # as kernels/dns_learned.py
COUNTS = (
    "queries", "retries", "answers", "refused", "unasked", "malformed", "truncated", "shortened",
    "missing", "latency_ns",
)  # fmt: skip
NOTES = (
    "learned", "renewed", "names_full", "addresses_full", "address_names_full", "name_capped",
    "selectors_full", "queries_displaced", "contended", "expired", "kept",
    "copies", "copies_lost",
)  # fmt: skip
_32, _1 = np.uint64(32), np.uint64(1)
FLAGS = {
    name.removeprefix("EVENT_").lower(): CONST[name]
    for name in ("EVENT_TRUNCATED", "EVENT_TCP", "EVENT_LEARNED", "EVENT_AUDITED")
}


def rcode_name(number: int) -> str:
    """Return the name of an rcode (RFC 6895 2.3)."""
    return RCODES[number] if number < len(RCODES) else f"RCODE{number}"


def type_name(number: int) -> str:
    """Return the name of a type of records."""
    return QTYPES.get(number, f"TYPE{number}")


def address_of(family: int, hi: int, lo: int) -> Address:
    """Return an address of two halves."""
    return IPv4Address(lo) if family == 4 else IPv6Address(hi << 64 | lo)


def family_of(hi: int, lo: int) -> int:
    """Return the family of an address that stands alone: IPv4 addresses have 32 bits."""
    return 6 if hi or lo >> 32 else 4


def bucket_end(bucket: int) -> int:
    """Return the first time, in nanoseconds, that is beyond a bucket of latency."""
    if bucket < 4:
        return (bucket + 1) << 10
    octave, part = bucket // 4 + 1, bucket % 4
    return (5 + part) << (octave - 2) << 10


ENDS = [bucket_end(bucket) for bucket in range(CONST["DNS_LATENCY_BUCKETS"])]
"""First time beyond each bucket of latency, in nanoseconds."""


def percentile(buckets: np.ndarray, share: float) -> int:
    """Return the latency, in nanoseconds, that so many answers (0..1) were not slower than."""
    total = int(buckets.sum())
    if not total:
        return 0
    return ENDS[int(np.searchsorted(np.cumsum(buckets), share * total))]


@dataclass(frozen=True, slots=True)
class Mapping:
    """A name that leads to an address. scope: identity that may use it, 0: all of the node.

    expires_s: until its time is over; kept: it is over, and connections still use the address.
    """

    name: str
    address: Address
    scope: int
    expires_s: float
    kept: bool
    selectors: tuple[str, ...]


def copy_names(source: Shm, target: Shm) -> None:
    """Copy where names lead, to be matched with the patterns that the target will have."""
    for name in ("seed", "flags"):
        target.naming[0][name] = source.naming[0][name]
    target.naming[0]["generation"] = 1
    for index, rows in (("name_index", "names"), ("learned_index", "learned")):
        used = np.flatnonzero(getattr(source, index))
        getattr(target, index)[used] = getattr(source, index)[used]
        getattr(target, rows)[used] = getattr(source, rows)[used]
    target.names["generation"][np.flatnonzero(target.name_index)] = 0


class NameReader:
    """Names and DNS of a Shm."""

    def __init__(self, shm: Shm, clock: Callable[[], int] = monotonic_ns) -> None:
        """Nothing is read yet. clock: CLOCK_MONOTONIC in nanoseconds."""
        self.shm, self._clock = shm, clock

    def patterns(self) -> dict[int, str]:
        """Return the patterns that policies ask for, by number."""
        table = self.shm.name_patterns
        used = np.flatnonzero(table["state"] == value("SLOT_USED"))
        return {row: pattern_of(table[row]) for row in used.tolist()}

    # --- where names lead -------------------------------------------------------------------------

    def mappings(self) -> Iterator[Mapping]:
        """Yield every name that leads to an address now."""
        tick = self._clock() >> CONST["TICK_SHIFT"]
        patterns, names = self.patterns(), self.shm.names
        learned = self.shm.learned[np.flatnonzero(self.shm.learned_index)]
        learned = learned[learned["owner"] == LIVE]
        at, place = np.nonzero(learned["tags"])
        rows = learned["names"][at, place].astype(np.int64)
        same = (names["hash"][rows] >> _32 | _1) == learned["tags"][at, place]
        left = -_since(tick, learned["expiry"][at, place].astype(np.int64))
        used = learned["used"].astype(np.int64)
        in_use = (used != 0) & (_since(tick, used) < USED_TICKS)
        known: dict[int, tuple[str, tuple[str, ...]]] = {}
        columns = (learned[name].tolist() for name in ("family", "hi", "lo", "scope"))
        families, highs, lows, scopes = columns
        for n in np.flatnonzero(same & ((left > 0) | in_use[at])).tolist():
            which, row, ticks = int(at[n]), int(rows[n]), int(left[n])
            if row not in known:
                name = names[row]
                some = name["selectors"][: min(int(name["selector_count"]), 16)].tolist()
                known[row] = _text(name), tuple(patterns[k] for k in some if k in patterns)
            text, selectors = known[row]
            address = address_of(families[which], highs[which], lows[which])
            expires = max(ticks, 0) * TICK_NS / 1e9
            yield Mapping(text, address, scopes[which], expires, ticks <= 0, selectors)

    def names_of(self, address: Address) -> list[str]:
        """Return the names that lead to an address."""
        return sorted({one.name for one in self.mappings() if one.address == address})

    def addresses_of(self, name: str) -> list[Address]:
        """Return the addresses that a name leads to; a dot at its end may be missing."""
        wanted = name.lower().rstrip(".") + "."
        found = {one.address for one in self.mappings() if one.name == wanted}
        return sorted(found, key=lambda address: (address.version, int(address)))

    # --- counters ---------------------------------------------------------------------------------

    def names(self, most: int | None = None, least: int = 0) -> list[dict[str, Any]]:
        """Return what is counted of each name that pods of this node have asked for.

        most: only so many, those that were asked for most, in that order; least: so often at least.
        """
        rows = np.flatnonzero(self.shm.name_index)
        if most is not None or least:
            asked = self.shm.names["queries"][rows] + self.shm.names["refused"][rows]
            order = np.argsort(-asked.astype(np.int64), kind="stable")
            rows = rows[order[asked[order] >= least][:most]]
        found = []
        for row in rows.tolist():
            one = self.shm.names[row]
            if not int(one["length"]):
                continue
            answers = int(one["answers"])
            counts = ("queries", "answers", "refused", "failures", "missing", "addresses", "capped")
            found.append(
                {
                    "name": _text(one),
                    **{name: int(one[name]) for name in counts},
                    "latency_ms": int(one["latency_ns"]) / answers / 1e6 if answers else 0.0,
                }
            )
        return found

    def name(self, text: str) -> dict[str, Any] | None:
        """Return what is counted of a name, None: nobody has asked for it lately."""
        wanted = text.lower().rstrip(".") + "."
        return next((one for one in self.names() if one["name"] == wanted), None)

    def pods(self) -> dict[int, dict[str, Any]]:
        """Return what is counted of pods, by the number of their endpoint."""
        found: dict[int, np.void] = {}
        table = self.shm.dns_pods
        for lane, row in np.argwhere(table["used"] != 0).tolist():
            _add(found, int(table[lane, row]["used"]) - 1, table[lane, row])
        return {endpoint: _counter(one) for endpoint, one in found.items()}

    def kinds(self) -> dict[int, dict[int, int]]:
        """Return how many messages are alike: by endpoint, by the key of struct dns_kind."""
        found: dict[int, dict[int, int]] = {}
        for lane, row in np.argwhere(self.shm.dns_pods["used"] != 0).tolist():
            mine = self.shm.dns_kinds[lane, row]
            mine = mine[mine["key"] != 0]
            one = found.setdefault(int(self.shm.dns_pods[lane, row]["used"]) - 1, {})
            for key, count in mine.tolist():
                one[key] = one.get(key, 0) + count
        return found

    def servers(self) -> list[dict[str, Any]]:
        """Return what is counted of each server; the address of all that have no row is empty."""
        found: dict[str, np.void] = {}
        table = self.shm.dns_servers
        for lane, row in np.argwhere(table["used"] != 0).tolist():
            one = table[lane, row]
            hi, lo = int(one["hi"]), int(one["lo"])
            other = row == CONST["DNS_SERVERS_MAX"] - 1
            _add(found, "" if other else str(address_of(family_of(hi, lo), hi, lo)), one)
        return [{"server": address, **_counter(one)} for address, one in found.items()]

    def notes(self) -> dict[str, int]:
        """Return what was learned, and what was not, and why."""
        table = self.shm.dns_notes
        return {name: int(table[name].sum()) for name in NOTES}

    # --- events -----------------------------------------------------------------------------------

    def events(self, after: dict[int, int] | None = None) -> tuple[list[dict[str, Any]], int]:
        """Return the events of all lanes in order of time, and how many were overwritten unseen.

        after: by lane, the number of the next event to read; it is brought up to date.
        """
        most = CONST["DNS_EVENTS_MAX"]
        next_of = after if after is not None else {}
        found: list[dict[str, Any]] = []
        lost = 0
        for lane in range(CONST["DNS_LANES"]):
            end = int(self.shm.dns_notes[lane]["events"])
            first = max(next_of.get(lane, 0), end - most)
            if after is not None and lane in after:
                lost += first - after[lane]
            for number in range(first, end):
                row = self.shm.dns_events[lane, number % most].copy()
                if int(row["sequence"]) == number + 1:
                    found.append(_event(row))
                else:
                    lost += after is not None
            next_of[lane] = end
        return sorted(found, key=lambda one: one["time_ns"]), lost


def _since(tick: int, then: Any) -> Any:
    """Return ticks since then (an int or int64[]): the lower 32 bits of a clock that wraps."""
    passed = (tick - then) & 0xFFFFFFFF
    return passed - (passed >> 31 << 32)


def _text(row: np.void) -> str:
    return spelled(row["text"].tobytes()[: int(row["length"])])


def _add(found: dict[Any, np.void], key: Any, row: np.void) -> None:
    """Add a row of counters to those of a key."""
    known = found.get(key)
    if known is None:
        found[key] = row.copy()
        return
    for name in (*COUNTS, "types", "rcodes", "latency"):
        known[name] += row[name]


def _counter(row: np.void) -> dict[str, Any]:
    counts = {name: int(row[name]) for name in COUNTS}
    answers, latency = counts["answers"], counts.pop("latency_ns")
    return {
        **counts,
        "types": {TYPES[n]: int(count) for n, count in enumerate(row["types"]) if count},
        "rcodes": {rcode_name(n): int(count) for n, count in enumerate(row["rcodes"]) if count},
        "latency_ms": latency / answers / 1e6 if answers else 0.0,
        **{
            f"p{name}_ms": percentile(row["latency"], share) / 1e6
            for name, share in (("50", 0.5), ("90", 0.9), ("99", 0.99), ("99_9", 0.999))
        },
        "buckets": row["latency"].tolist(),
    }


def _event(row: np.void) -> dict[str, Any]:
    family = int(row["family"])
    count = min(int(row["address_count"]), CONST["DNS_EVENT_ADDRESSES"])
    return {
        "time_ns": int(row["time_ns"]),
        "kind": KINDS.get(int(row["kind"]), "?"),
        "name": _text(row),
        "type": type_name(int(row["type"])),
        "rcode": rcode_name(int(row["rcode"])),
        "client": str(address_of(family, int(row["client_hi"]), int(row["client_lo"]))),
        "client_port": int(row["client_port"]),
        "server": str(address_of(family, int(row["server_hi"]), int(row["server_lo"]))),
        "server_port": int(row["server_port"]),
        "latency_ms": int(row["latency_ns"]) / 1e6,
        "ttl": int(row["ttl"]),
        "id": int(row["id"]),
        "identity": int(row["identity"]),
        "endpoint": int(row["endpoint"]),
        "port": int(row["port"]),
        "verdict": int(row["verdict"]),
        "cnames": int(row["cnames"]),
        "address_count": int(row["address_count"]),
        "addresses": [
            str(address_of(family_of(int(hi), int(lo)), int(hi), int(lo)))
            for hi, lo in zip(row["hi"][:count], row["lo"][:count], strict=True)
        ],
        "flags": [name for name, bit in FLAGS.items() if int(row["flags"]) & bit],
    }
