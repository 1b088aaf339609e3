"""DNS messages as flows of layer 7: read from the forwarder's rings of DNS events.

Rule: a message is one flow, shown as Hubble shows what Cilium's DNS proxy logs; what is kept is
bounded, and what nobody could read any more is counted.

Theory. A query and its answer are two flows, the answer turned round; a query that policy refuses
is a dropped request. Reading takes a core's time from those who ask, so only so many messages a
second become flows; refused ones always do, and the others are counted. In columns a message is a
row like any other, of kind DNS; what has no column (name, addresses, rcode) is the event itself, of
which the last KEPT are here, by `position`. Missing answers are no messages: `penstock dns` shows
them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dataplane.observe.columns import FIELDS, NOBODY, REPLY, Columns
from dataplane.observe.expressions import compiled
from dataplane.tables.connection_view import NUMBERS
from dataplane.tables.dns_events import ALL, RAW, DnsEvents, span
from dataplane.tables.names import spelled
from dataplane.tables.names_view import FLAGS, address_of, family_of, rcode_name, type_name
from dataplane.tables.shm import Shm
from dataplane.tables.verdicts import identity_of
from xdp.abi import CONST, DTYPE, value

DNS = 64  # as a column's kind: behind those of enum flow_event
RING = 255  # as a column's ring
KEPT = 1 << 15
IDENTITIES_S = 10  # how long a server's identity is taken for granted
SOURCE = "proxy"  # who has seen it, in Hubble's words: who enforces names
QUERY, ANSWER, REFUSED = (value(f"DNS_EVENT_{kind}") for kind in ("QUERY", "ANSWER", "REFUSED"))
REASON = value("REASON_ANSWERED_DNS")
MISSING = value("DNS_EVENT_MISSING")
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Messages:
    """DNS events of a Shm, from the oldest that is still there on."""

    def __init__(self, shm: Shm, clock: Callable[[], float], rate: int = 0) -> None:
        """Nothing is read yet. clock: seconds; rate: messages a second, 0: no limit."""
        self._shm, self._clock, self._rate = shm, clock, rate
        self._room, self._room_at = float(rate), -1.0
        self._events = DnsEvents(shm)
        self._kept = np.zeros(KEPT, DTYPE["dns_event"])
        self.head = 0
        self._identities: dict[tuple[int, int, int], int] = {}
        self._read_at = -float(IDENTITIES_S)

    def read(self, wall_minus_monotonic_ns: int) -> Columns | None:
        """Return what is new as columns whose ends are not known yet, None: nothing is."""
        rows = self._events.read(self._allowed(), REFUSED)
        self._room = max(0.0, self._room - len(rows))
        shown = rows["kind"] != MISSING
        rows = rows if shown.all() else rows[shown]
        if not len(rows):
            return None
        positions = np.arange(self.head, self.head + len(rows))
        self.head += len(rows)
        self._keep(rows[-KEPT:])
        return self._columns(rows, positions, wall_minus_monotonic_ns)

    def _allowed(self) -> int:
        """Return how many messages may be read now; at the beginning what is there."""
        now, before = self._clock(), self._room_at
        self._room_at = now
        if not self._rate or before < 0:
            return ALL
        self._room = min(self._room + (now - before) * self._rate, float(self._rate))
        return int(self._room)

    def _keep(self, rows: np.ndarray) -> None:
        at = 0
        for place in span(self._kept.view(RAW), self.head - len(rows), self.head):
            place[:] = rows[at : at + len(place)].view(RAW)
            at += len(place)

    @property
    def lost(self) -> int:
        """Messages that nobody could read."""
        return self._events.lost

    @property
    def left_out(self) -> int:
        """Messages beyond the rate."""
        return self._events.left_out

    def _columns(self, rows: np.ndarray, positions: np.ndarray, offset: int) -> Columns:
        made = {name: np.zeros(len(rows), dtype) for name, dtype in FIELDS.items()}
        for name in ("source_end", "target_end"):
            made[name][:] = NOBODY
        answer = rows["kind"] == ANSWER
        sides = (("source", "client", "server"), ("target", "server", "client"))
        for side, mine, other in sides:
            for half in ("hi", "lo", "port"):
                made[f"{side}_{half}"] = np.where(
                    answer, rows[f"{other}_{half}"], rows[f"{mine}_{half}"]
                )
        for half in ("hi", "lo", "port"):
            made[f"new_source_{half}"] = made[f"source_{half}"].copy()
        servers = self._servers(rows)
        made["source_identity"] = np.where(answer, servers, rows["identity"])
        made["target_identity"] = np.where(answer, rows["identity"], servers)
        made["egress_rule"], made["port"] = rows["verdict"].copy(), rows["port"].copy()
        made["family"] = rows["family"].copy()
        tcp = rows["flags"] & FLAGS["tcp"] != 0
        made["protocol"] = np.where(tcp, NUMBERS["tcp"], NUMBERS["udp"])
        made["kind"][:], made["ring"][:], made["packets"][:] = DNS, RING, 1
        made["flags"] = np.where(answer, REPLY, 0)
        made["reason"] = np.where(rows["kind"] == REFUSED, REASON, 0)
        made["position"] = positions
        made["wall_ns"] = rows["time_ns"].astype(np.int64) + offset
        arrays = {name: made[name].astype(dtype, copy=False) for name, dtype in FIELDS.items()}
        return Columns(arrays, len(rows))

    def _servers(self, rows: np.ndarray) -> np.ndarray:
        """Return the identities of the servers, each looked up once: int64[n]."""
        if self._clock() - self._read_at > IDENTITIES_S:
            self._identities.clear()
            self._read_at = self._clock()
        mixed = rows["server_hi"] * _MIX ^ rows["server_lo"]
        _, first, which = np.unique(mixed, return_index=True, return_inverse=True)
        numbers = []
        for n in first.tolist():
            row = rows[n]
            key = int(row["family"]), int(row["server_hi"]), int(row["server_lo"])
            if key not in self._identities:
                self._identities[key] = identity_of(self._shm, *key)
            numbers.append(self._identities[key])
        return np.array(numbers, np.int64)[which.reshape(-1)]

    def get(self, position: int) -> dict[str, Any] | None:
        """Return a message: query, qtype, rcode, ips, ttl, latency_ns; None: not kept any more."""
        if not self.head - KEPT <= position < self.head:
            return None
        row = self._kept[position % KEPT]
        count = min(int(row["address_count"]), CONST["DNS_EVENT_ADDRESSES"])
        pairs = zip(row["hi"][:count].tolist(), row["lo"][:count].tolist(), strict=True)
        return {
            "query": spelled(row["text"].tobytes()[: int(row["length"])]),
            "qtype": type_name(int(row["type"])),
            "rcode": int(row["rcode"]),
            "ips": [str(address_of(family_of(hi, lo), hi, lo)) for hi, lo in pairs],
            "ttl": int(row["ttl"]),
            "latency_ns": int(row["latency_ns"]),
        }


def tell(flow: Any, row: dict[str, int], said: dict[str, Any] | None) -> None:
    """Fill a flow's l7 of a row of kind DNS; said: the message, if it is still kept."""
    answer = bool(row["flags"] & REPLY)
    flow.l7.type = 2 if answer else 1  # RESPONSE, REQUEST
    dns = flow.l7.dns
    dns.observation_source = SOURCE
    if said is None:
        return
    dns.query = said["query"]
    dns.qtypes.append(said["qtype"])
    if answer:
        flow.l7.latency_ns = said["latency_ns"]
        dns.rcode, dns.ttl = said["rcode"], said["ttl"]
        dns.ips.extend(said["ips"])
        dns.rrtypes.extend(sorted({"AAAA" if ":" in one else "A" for one in said["ips"]}))
    elif row["reason"] == REASON:
        dns.rcode = said["rcode"]


def summary(row: dict[str, int], said: dict[str, Any] | None) -> str:
    """Return a message in Hubble's words."""
    if said is None:
        return "DNS, no longer kept"
    asked = f"{said['query']} {said['qtype']}"
    if not row["flags"] & REPLY:
        refused = f"; {rcode_name(said['rcode'])}" if row["reason"] == REASON else ""
        return f"DNS Query {asked}{refused}"
    answer = f"RCode: {_long(said['rcode'])}" if said["rcode"] else ""
    if said["ips"]:
        answer = f'"{",".join(said["ips"])}"'
    return f"DNS Answer {answer} TTL: {said['ttl']} (Proxy {asked})"


_LONG = {1: "Format Error", 2: "Server Failure", 3: "Non-Existent Domain", 4: "Not Implemented",
         5: "Query Refused"}  # fmt: skip


def _long(rcode: int) -> str:
    return _LONG.get(rcode) or rcode_name(rcode)


def queries(
    patterns: Sequence[str], get: Callable[[int], dict[str, Any] | None]
) -> Callable[[Columns], np.ndarray]:
    """Return a test for messages whose name one of the expressions finds. Raises FilterError."""
    some = [compiled("dns_query", text) for text in patterns]

    def test(flows: Columns) -> np.ndarray:
        good = np.zeros(flows.count, bool)
        known: dict[str, bool] = {}  # many messages have the same name
        for n in np.flatnonzero(flows.kind == DNS).tolist():
            said = get(int(flows.position[n]))
            if said is None:
                continue
            name = said["query"]
            if name not in known:
                known[name] = any(one.search(name) for one in some)
            good[n] = known[name]
        return good

    return test
