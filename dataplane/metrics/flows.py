"""Events of the forwarder as Hubble's metrics.

Rule: what is counted and what was lost are together all that was written; a record is looked at
once, with its whole batch.

Theory. Names and labels are those of Hubble's handlers (cilium/cilium: pkg/hubble/metrics), with
the contexts that ACNS sets: `source` is the pod that sent, `destination` the pod of this node that
it came to from elsewhere, the other one is empty, so that series grow with pods and not with pairs.
A record becomes one 64-bit key; numpy counts equal keys, and only distinct ones reach Python: 2.4 M
records a second on one core. A drop counts its packets, all else once:
Hubble sees each dropped packet, and a connection when it begins, changes and ends. Policies'
verdicts are counted in verdicts.py. What Hubble leaves out is left out: TCP flags of what is
dropped, and drops towards the world that no policy has made.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from prometheus_client.core import CounterMetricFamily, Metric

from dataplane.metrics.facts import Owner
from dataplane.metrics.verdicts import VerdictCounter
from dataplane.tables.events import EventReader
from dataplane.tables.shm import Shm
from dataplane.tables.verdicts import RULE_SHIFT
from xdp.abi import CONST, REASON_TEXT, value

PART = 32768  # records of a ring that are looked at together
ROUNDS = CONST["EVENTS_MAX"] // PART + 1
PORTS_KEPT = 1000  # distinct destination ports; others are counted as one
PORTS_MAX = CONST["PORTS_MAX"]
NOBODY = PORTS_MAX
AUDITED, REPLY = CONST["CONNECTION_FLAG_AUDITED"], CONST["EVENT_REPLY"]
NEW, DROP = value("EVENT_NEW"), value("EVENT_DROP")
CHANGE, END = value("EVENT_CHANGE"), value("EVENT_END")
DENIED = value("REASON_POLICY_DENIED")
PORT_POD, TUNNEL_NONE = value("PORT_POD"), value("TUNNEL_NONE")
HOST, REMOTE_NODE = value("IDENTITY_HOST"), value("IDENTITY_REMOTE_NODE")
POINTS = ("to-endpoint", "to-overlay", "to-network", "to-stack")
"""Subtypes of traces, as observe/views.py tells them; numbers of the key's field `point`."""
WORLD = [value(f"IDENTITY_WORLD{family}") for family in ("", "_IPV4", "_IPV6")]
CIDR_FIRST = value("IDENTITY_CIDR_FIRST")
PROTOCOLS = {1: "ICMPv4", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}
ICMP, ICMP6, TCP, UDP, SCTP = 1, 58, 6, 17, 132
REPLIES = {8: 0, 128: 129}  # type of an ICMP query -> of its answer
FIN, SYN, RST, ACK = 1, 2, 4, 16
# Where the name in flow.proto is not the text in upper case.
PROTO_NAMES = {
    value("REASON_FRAGMENTATION_NEEDED"): "CT_MISSING_TCP_ACK_FLAG",
    value("REASON_NO_TUNNEL"): "NO_TUNNEL_OR_ENCAPSULATION_ENDPOINT",
    value("REASON_POLICY_DENIED_BY_RULE"): "POLICY_DENY",
    value("REASON_VLAN"): "VLAN_FILTERED",
    value("REASON_WRONG_VNI"): "INVALID_VNI",
    value("REASON_INVALID_PACKET"): "INVALID_PACKET_DROPPED",
    value("REASON_RATE_LIMITED"): "DROP_RATE_LIMITED",
    value("REASON_ENDPOINT_NOT_READY"): "DROP_EP_NOT_READY",
}
# Bits of a key, from the lowest.
FIELDS = (
    ("kind", 3), ("six", 1), ("protocol", 8), ("reason", 8), ("source", 11), ("target", 11),
    ("tcp", 8), ("audited", 1), ("ruled", 1), ("world", 1), ("point", 2),
)  # fmt: skip


def reason_name(number: int) -> str:
    """Return a drop reason as flow.proto names it."""
    text = REASON_TEXT.get(number, f"reason {number}")
    return PROTO_NAMES.get(number) or re.sub(r"[^A-Z0-9]+", "_", text.upper()).strip("_")


class FlowCollector:
    """Counts events from the moment it is made."""

    def __init__(self, shm: Shm) -> None:
        """shm: the tables; read only."""
        self._shm, self._reader = shm, EventReader(shm, behind=0)
        self.owners: Mapping[str, Owner] = {}  # by the device's name
        self._flows: Counter[tuple[str, ...]] = Counter()
        self._drops: Counter[tuple[str, ...]] = Counter()
        self._flags: Counter[tuple[str, ...]] = Counter()
        self._world: Counter[tuple[str, ...]] = Counter()
        self._ports: Counter[tuple[int, int]] = Counter()
        self._icmp: Counter[tuple[str, str]] = Counter()
        self.verdicts = VerdictCounter(shm)
        self.messages: Callable[[], Mapping[tuple[str, ...], int]] = dict  # flows of layer 7

    def take(self) -> int:
        """Count what is new, at most what the rings hold; return how much that was."""
        hashes, indices = self._pods()
        total = 0
        for _ in range(ROUNDS):
            batches = self._reader.read(PART)
            for batch in batches:
                self._count(batch.records, hashes, indices)
                total += len(batch.records)
            if not batches:
                break
        return total

    def _pods(self) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of local pods, hashed and in order, with the port of each."""
        rows = self._shm.ports
        here = np.flatnonzero((rows["kind"] == PORT_POD) & (rows["state"] != 0))
        four = rows["address4"][here].astype(np.uint64)
        six = _mixed(rows["address6_hi"][here], rows["address6_lo"][here])
        hashes, indices = np.concatenate((four, six)), np.concatenate((here, here))
        order = np.argsort(hashes)
        return hashes[order], indices[order]

    def _count(self, rows: np.ndarray, hashes: np.ndarray, indices: np.ndarray) -> None:
        ends = _ends(rows, self._shm.ports["kind"], hashes, indices)
        self.verdicts.take(rows, *ends[:2], self._owner)
        keys = _keys(rows, *ends, int(self._shm.node[0]["tunnel_kind"]) == TUNNEL_NONE)
        distinct, inverse = np.unique(keys, return_inverse=True)
        weights = np.where(rows["kind"] == DROP, rows["packets"], 1)
        counts = np.bincount(inverse, weights, len(distinct))
        for key, count in zip(distinct.tolist(), counts.tolist(), strict=True):
            self._add(_fields(key), int(count))
        begun = rows[rows["kind"] == NEW]
        named = np.isin(begun["protocol"], (TCP, UDP, SCTP))
        ports = begun["protocol"].astype(np.int64) << 16 | begun["target_port"]
        for word, count in zip(*_unique(ports[named]), strict=True):
            place = (word >> 16, word & 0xFFFF)
            full = len(self._ports) >= PORTS_KEPT and place not in self._ports
            self._ports[(place[0], -1) if full else place] += count
        self._count_icmp(rows[(rows["kind"] == END) & np.isin(rows["protocol"], (ICMP, ICMP6))])

    def _count_icmp(self, ended: np.ndarray) -> None:
        """Count requests and replies once both are known: their difference is what is missing."""
        six = ended["protocol"] == ICMP6
        kind = ended["target_port"] >> 8
        for word in np.unique(six.astype(np.int64) << 8 | kind).tolist():
            mine = ended[(six == bool(word >> 8)) & (kind == word & 0xFF)]
            family = "IPv6" if word >> 8 else "IPv4"
            self._icmp[family, _icmp_name(family, word & 0xFF)] += int(mine["packets"].sum())
            back = REPLIES.get(word & 0xFF)
            if back is not None:
                self._icmp[family, _icmp_name(family, back)] += int(mine["reply_packets"].sum())

    def _add(self, key: dict[str, int], count: int) -> None:
        ends = (self._owner(key["source"]), self._owner(key["target"]))
        protocol = PROTOCOLS.get(key["protocol"], "Unknown")
        if key["kind"] == DROP:
            kind, subtype, verdict = "Drop", "", "DROPPED"
            self._drops[(*ends, protocol, reason_name(key["reason"]))] += count
        else:
            kind = "PolicyVerdict" if key["kind"] == NEW and key["ruled"] else "Trace"
            subtype = "" if kind == "PolicyVerdict" else POINTS[key["point"]]
            verdict = "AUDIT" if key["audited"] else "FORWARDED"
        self._flows[(*ends, protocol, kind, subtype, verdict)] += count
        if key["world"] and (key["kind"] == NEW or key["reason"] == DENIED):
            self._world[(*ends, protocol, verdict)] += count
        if key["protocol"] == TCP and key["kind"] != END and verdict == "FORWARDED":
            for flag in _flag_names(key["tcp"]):
                self._flags[(*ends, "IPv6" if key["six"] else "IPv4", flag)] += count

    def _owner(self, port: int) -> str:
        if port == NOBODY:
            return ""
        return str(self.owners.get(self._shm.ports[port]["name"].decode(), ""))

    def collect(self) -> Iterator[Metric]:
        """Yield the families of one scrape."""
        ends = ["source", "destination"]
        yield _family(
            "flows_processed",
            "Flows",
            [*ends, "protocol", "type", "subtype", "verdict"],
            {**self._flows, **self.messages()},
        )
        yield _family("drop", "Dropped packets", [*ends, "protocol", "reason"], self._drops)
        yield _family("tcp_flags", "TCP flags", [*ends, "family", "flag"], self._flags)
        yield _family(
            "flows_to_world",
            "Flows out of the cluster",
            [*ends, "protocol", "verdict"],
            self._world,
        )
        yield _family("icmp", "ICMP messages", ["family", "type"], self._icmp)
        ports = {
            (PROTOCOLS[protocol], str(port) if port >= 0 else "other"): count
            for (protocol, port), count in self._ports.items()
        }
        yield _family("port_distribution", "Connections by port", ["protocol", "port"], ports)
        lost = {("perf_event_ring_buffer",): sum(self._reader.lost)}
        yield _family("lost_events", "Events that nobody could read in time", ["source"], lost)
        labels = [*ends, "direction", "match", "action"]
        yield _family("policy_verdicts", "Verdicts of policies", labels, self.verdicts.counts)


def _family(name: str, text: str, labels: list[str], counts: Any) -> Metric:
    family = CounterMetricFamily(f"hubble_{name}", text, labels=labels)
    for values, count in list(counts.items()):
        family.add_metric(list(values), count)
    return family


def _mixed(hi: np.ndarray, lo: np.ndarray) -> np.ndarray:
    """An address as one number; an IPv4 address is itself."""
    return hi.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ lo.astype(np.uint64)


def _unique(words: np.ndarray) -> tuple[list[int], list[int]]:
    distinct, counts = np.unique(words, return_counts=True)
    return distinct.tolist(), counts.tolist()


def _ends(
    rows: np.ndarray, kinds: np.ndarray, hashes: np.ndarray, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ports of the pods of this node at both ends, or NOBODY: int64[n] each; is the receiver one?

    The sender's, if it is here; else the receiver's. A reply's sender is the connection's target.
    """
    begun = np.where(
        kinds[np.minimum(rows["port"], PORTS_MAX - 1)] == PORT_POD, rows["port"], NOBODY
    )
    other = np.full(len(rows), NOBODY)
    if len(hashes):
        wanted = _mixed(rows["target_hi"], rows["target_lo"])
        at = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
        other = np.where(hashes[at] == wanted, indices[at], NOBODY)
    turned = _turned(rows)
    source, target = np.where(turned, other, begun), np.where(turned, begun, other)
    return source, np.where(source == NOBODY, target, NOBODY), target != NOBODY


def _turned(rows: np.ndarray) -> np.ndarray:
    """Whether the packet went against the direction that the record has: bool[n]."""
    return (rows["kind"] == CHANGE) & (rows["flags"] & REPLY != 0)


def _keys(
    rows: np.ndarray, source: np.ndarray, target: np.ndarray, arrives: np.ndarray, direct: bool
) -> np.ndarray:
    """One number a record, of FIELDS. source, target, arrives: as _ends; direct: no tunnel."""
    identity = np.where(_turned(rows), rows["source_identity"], rows["target_identity"])
    world = np.isin(identity, WORLD) | (identity >= CIDR_FIRST)
    outside = world | (identity == REMOTE_NODE) | direct
    point = np.where(identity == HOST, 3, np.where(outside, 2, 1))
    point[arrives] = 0
    columns = {
        "kind": rows["kind"],
        "six": rows["family"] == 6,
        "protocol": rows["protocol"],
        "reason": np.where(rows["kind"] == DROP, rows["reason"], 0),
        "source": source,
        "target": target,
        "tcp": rows["tcp"] & (FIN | SYN | RST | ACK),
        "audited": (rows["flags"] & AUDITED) != 0,
        "ruled": ((rows["egress_rule"] | rows["ingress_rule"]) >> RULE_SHIFT) != 0,
        "world": world,
        "point": point,
    }
    keys = np.zeros(len(rows), np.int64)
    shift = 0
    for name, bits in FIELDS:
        keys |= columns[name].astype(np.int64) << shift
        shift += bits
    return keys


def _fields(key: int) -> dict[str, int]:
    found = {}
    for name, bits in FIELDS:
        found[name] = key & (1 << bits) - 1
        key >>= bits
    return found


def _flag_names(flags: int) -> list[str]:
    names = []
    if flags & SYN:
        names.append("SYN-ACK" if flags & ACK else "SYN")
    return names + [name for bit, name in ((FIN, "FIN"), (RST, "RST")) if flags & bit]


def _icmp_name(family: str, kind: int) -> str:
    names = {
        "IPv4": {8: "EchoRequest", 0: "EchoReply"},
        "IPv6": {128: "EchoRequest", 129: "EchoReply"},
    }
    return names[family].get(kind, str(kind))
