"""A flow as Hubble's message.

Rule: what is not known is left out; a member that a field mask leaves out is not even looked up.

Theory. Names come from the directory (pods) and the book (everything else). `Summary` says in words
what has no member of its own; the counts of a connection are in `extensions`, as
penstock.Statistics, since Hubble's message has no bytes. Reasons that Cilium has no number for are
DROP_REASON_UNKNOWN with their text there.
"""

import functools
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import numpy as np

from dataplane.observe import dns, views
from dataplane.observe.book import Book
from dataplane.observe.columns import AUDITED, CHANGE, DENIED, DROP, END, NEW, Columns
from dataplane.observe.directory import Directory
from dataplane.observe.protocol import VERSION, enum, message, names
from dataplane.tables.connection_view import PROTOCOLS, STATES, TICK_NS
from xdp.abi import CONST, ENUM, reason_text

EVENTS = {
    number: name.removeprefix("EVENT_").lower() for name, number in ENUM["flow_event"].items()
}
PORT_TAKEN, HAIRPIN = CONST["CONNECTION_FLAG_PORT_TAKEN"], CONST["CONNECTION_FLAG_HAIRPIN"]
TCP_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")
SHOWN_FLAGS = ("SYN", "ACK", "RST", "FIN", "PSH", "URG", "ECE", "CWR")
CLUSTER = "default"
ACTION, ALLOW = CONST["POLICY_ACTION_MASK"], CONST["POLICY_ALLOW"]
_POINT_NAMES = {
    views.TO_ENDPOINT: "TO_ENDPOINT", views.TO_STACK: "TO_STACK",
    views.TO_OVERLAY: "TO_OVERLAY", views.TO_NETWORK: "TO_NETWORK",
}  # fmt: skip
_ICMP4 = {0: "EchoReply", 3: "DestinationUnreachable", 8: "EchoRequest", 11: "TimeExceeded"}
_ICMP6 = {
    1: "DestinationUnreachable", 2: "PacketTooBig", 3: "TimeExceeded", 128: "EchoRequest",
    129: "EchoReply", 135: "NeighborSolicitation", 136: "NeighborAdvertisement",
}  # fmt: skip
MATCH_NONE, MATCH_ALL = 0, 4  # policy_match_type where no rule says it
_PIECES = {
    "time": "_time", "uuid": "_identity", "verdict": "_verdict", "drop_reason": "_verdict",
    "drop_reason_desc": "_verdict", "IP": "_ip", "l4": "_l4", "source": "_source",
    "destination": "_destination", "Type": "_kind", "node_name": "_node", "emitter": "_node",
    "source_names": "_dns", "destination_names": "_dns", "event_type": "_kind",
    "source_service": "_services", "destination_service": "_services",
    "traffic_direction": "_kind", "policy_match_type": "_policies",
    "trace_observation_point": "_kind", "trace_reason": "_kind", "is_reply": "_kind",
    "reply": "_kind", "interface": "_interface", "egress_allowed_by": "_policies",
    "ingress_allowed_by": "_policies", "egress_denied_by": "_policies",
    "ingress_denied_by": "_policies", "policy_log": "_policies", "Summary": "_summary",
    "extensions": "_statistics", "l7": "_l7",
}  # fmt: skip
"""Member of flow.Flow -> the method that fills it."""


@functools.lru_cache(1 << 16)
def address(family: int, hi: int, lo: int) -> str:
    """Return an address as text; empty for what is no IP packet."""
    if family == 4:
        return str(IPv4Address(lo))
    return str(IPv6Address(hi << 64 | lo)) if family == 6 else ""


class Flows:
    """Makes messages of flows."""

    def __init__(self, directory: Directory, book: Book, node: str, epoch: int) -> None:
        """node: this node's name; epoch: of the rings (tables/events.py)."""
        self.directory, self.book, self.node, self.epoch = directory, book, node, epoch
        self._flow = message("flow.Flow")
        self._response = message("observer.GetFlowsResponse")
        self._verdicts, self._reasons = enum("flow.Verdict"), names("flow.DropReason")

    def make(self, flows: Columns, shown: np.ndarray, mask: Any = None) -> Iterable[Any]:
        """Yield GetFlowsResponses. shown: number of each flow's view, int64[n]; mask: FieldMask."""
        here = self.directory.here()
        said = views.views_of(flows, here).views
        points = views.points(flows, here, self.directory.direct)
        kinds, ways = (np.choose(shown, [view[n] for view in said]).tolist() for n in (1, 2))
        pieces = self._pieces(mask)
        for row, kind, way, point in zip(flows.rows(), kinds, ways, points.tolist(), strict=True):
            row["type"], row["way"], row["point"] = kind, way, point
            flow = self._flow()
            for piece in pieces:
                piece(flow, row)
            if mask is not None and any("." in path for path in mask.paths):
                masked = self._flow()
                mask.MergeMessage(flow, masked)
                flow = masked
            response = self._response(flow=flow, node_name=self.node)
            response.time.FromNanoseconds(row["wall_ns"])
            yield response

    def _pieces(self, mask: Any) -> list[Callable[[Any, dict[str, int]], None]]:
        wanted = _PIECES if mask is None else {path.partition(".")[0] for path in mask.paths}
        methods = dict.fromkeys(_PIECES[name] for name in wanted if name in _PIECES)
        return [getattr(self, method) for method in methods]

    # --- pieces -----------------------------------------------------------------------------------

    def _time(self, flow: Any, row: dict[str, int]) -> None:
        flow.time.FromNanoseconds(row["wall_ns"])

    def _identity(self, flow: Any, row: dict[str, int]) -> None:
        ring, position = row["ring"], row["position"]
        rest = f"{position >> 48 & 0xFFFF:04x}-{position & 0xFFFFFFFFFFFF:012x}"
        flow.uuid = f"{self.epoch:08x}-{ring >> 16:04x}-{ring & 0xFFFF:04x}-{rest}"

    def _node(self, flow: Any, row: dict[str, int]) -> None:
        flow.node_name = self.node
        flow.emitter.name, flow.emitter.version = "Penstock", VERSION

    def _verdict(self, flow: Any, row: dict[str, int]) -> None:
        if row["kind"] == dns.DNS:
            refused = row["reason"] == dns.REASON
            flow.verdict = self._verdicts["DROPPED" if refused else "FORWARDED"]
        elif row["kind"] == DROP:
            flow.verdict = self._verdicts["DROPPED"]
            flow.drop_reason = row["reason"]
            flow.drop_reason_desc = row["reason"] if row["reason"] in self._reasons else 0
        elif row["kind"] == NEW and row["flags"] & AUDITED:
            flow.verdict = self._verdicts["AUDIT"]
        else:
            flow.verdict = self._verdicts["FORWARDED"]

    def _kind(self, flow: Any, row: dict[str, int]) -> None:
        flow.Type = 2 if row["kind"] == dns.DNS else 1  # L7, L3_L4
        flow.event_type.type, flow.traffic_direction = row["type"], row["way"]
        reply = bool(row["flags"] & CONST["EVENT_REPLY"])
        if row["kind"] != DROP:
            flow.is_reply.value = flow.reply = reply
        if row["type"] == views.TYPE_DROP:
            flow.event_type.sub_type = row["reason"]
        elif row["type"] == views.TYPE_TRACE:
            flow.event_type.sub_type = row["point"]
            point = enum("flow.TraceObservationPoint")[_POINT_NAMES[row["point"]]]
            flow.trace_observation_point = point
            said = "NEW" if row["kind"] == NEW else "REPLY" if reply else "ESTABLISHED"
            flow.trace_reason = enum("flow.TraceReason")[said]

    def _ip(self, flow: Any, row: dict[str, int]) -> None:
        family = row["family"]
        if not family:
            return
        ip = flow.IP
        ip.source = address(family, row["source_hi"], row["source_lo"])
        ip.destination = address(family, row["target_hi"], row["target_lo"])
        ip.ipVersion = 1 if family == 4 else 2
        fresh = address(family, row["new_source_hi"], row["new_source_lo"])
        if fresh != ip.source and row["flags"] & (PORT_TAKEN | HAIRPIN):
            ip.source_xlated = fresh

    def _l4(self, flow: Any, row: dict[str, int]) -> None:
        protocol = PROTOCOLS.get(row["protocol"])
        if not row["family"] or protocol is None:
            return
        if protocol in ("icmp", "icmp6"):
            part = flow.l4.ICMPv4 if protocol == "icmp" else flow.l4.ICMPv6
            part.type, part.code = row["target_port"] >> 8, row["target_port"] & 0xFF
            part.SetInParent()
            return
        part = getattr(flow.l4, protocol.upper())
        part.source_port, part.destination_port = row["source_port"], row["target_port"]
        part.SetInParent()
        if protocol == "tcp" and row["tcp"]:
            for name in _flags(row["tcp"]):
                setattr(part.flags, name, True)

    def _source(self, flow: Any, row: dict[str, int]) -> None:
        self._endpoint(flow.source, row["source_end"], row["source_identity"])

    def _destination(self, flow: Any, row: dict[str, int]) -> None:
        self._endpoint(flow.destination, row["target_end"], row["target_identity"])

    def _endpoint(self, one: Any, number: int, identity: int) -> None:
        one.identity = identity
        one.labels.extend(self.book.labels(identity))
        end = self.directory.end(number)
        if end is None:
            return
        one.ID, one.namespace, one.pod_name = end.number, end.namespace, end.name
        one.cluster_name = CLUSTER
        if end.workload:
            one.workloads.add(name=end.workload, kind=end.kind)

    def _dns(self, flow: Any, row: dict[str, int]) -> None:
        family = row["family"]
        for side, named in (("source", flow.source_names), ("target", flow.destination_names)):
            named.extend(self.book.dns(family, row[f"{side}_hi"], row[f"{side}_lo"]))

    def _services(self, flow: Any, row: dict[str, int]) -> None:
        namespace, name = self.book.service(row["service"]) if row["service"] else ("", "")
        if name:
            turned = row["kind"] == CHANGE and row["flags"] & CONST["EVENT_REPLY"]
            one = flow.source_service if turned else flow.destination_service
            one.namespace, one.name = namespace, name

    def _interface(self, flow: Any, row: dict[str, int]) -> None:
        index, name = self.book.device(row["port"])
        if index:
            flow.interface.index, flow.interface.name = index, name

    def _policies(self, flow: Any, row: dict[str, int]) -> None:
        kind = row["kind"]
        if kind not in (NEW, DROP, dns.DNS):
            return
        refused = kind == DROP or row["reason"] == dns.REASON
        matches = []
        for member, way in (("egress_rule", "egress"), ("ingress_rule", "ingress")):
            about = self.book.rule(row[member]) if row[member] else None
            if about is None:
                continue
            way = about.get("direction", way) if refused else way
            denies = refused or row[member] & ACTION != ALLOW  # it would, but for audit
            listed = getattr(flow, f"{way}_{'denied' if denies else 'allowed'}_by")
            matches.append(_tell(listed, about))
            if about.get("log"):
                flow.policy_log.append(about["log"])
        if row["type"] == views.TYPE_VERDICT:
            both = len(matches) > 1 and row["way"] == views.INGRESS
            flow.policy_match_type = matches[-1 if both else 0] if matches else MATCH_NONE

    def _summary(self, flow: Any, row: dict[str, int]) -> None:
        if row["kind"] == dns.DNS:
            flow.Summary = dns.summary(row, self.book.message(row["position"]))
        else:
            flow.Summary = summary(row)

    def _l7(self, flow: Any, row: dict[str, int]) -> None:
        if row["kind"] == dns.DNS:
            dns.tell(flow, row, self.book.message(row["position"]))

    def _statistics(self, flow: Any, row: dict[str, int]) -> None:
        if row["kind"] == dns.DNS:
            return
        known = row["reason"] in self._reasons or row["kind"] != DROP
        flow.extensions.Pack(
            message("penstock.Statistics")(
                event=EVENTS.get(row["kind"], ""),
                packets=row["packets"],
                bytes=row["bytes"],
                reply_packets=row["reply_packets"],
                reply_bytes=row["reply_bytes"],
                duration_ns=row["lasted"] * TICK_NS,
                state="" if row["kind"] == DROP else STATES.get(row["state"], ""),
                reason="" if known else reason_text(row["reason"]),
            )
        )


def _tell(listed: Any, about: dict[str, Any]) -> int:
    """Add the policies that an attribution names; return how its rule matches (Cilium's number)."""
    named = about.get("policies", [about])
    for one in named:
        if one.get("name"):
            place = {
                "name": one["name"],
                "namespace": one.get("namespace", ""),
                "kind": one["kind"],
            }
            listed.add(**place)
    return int(about.get("match", MATCH_NONE if "policies" in about else MATCH_ALL))


def _flags(bits: int) -> list[str]:
    return [name for bit, name in enumerate(TCP_FLAGS) if bits >> bit & 1]


def summary(row: dict[str, int]) -> str:
    """Return a flow's last column: what kind of packet, and what became of a connection."""
    protocol = PROTOCOLS.get(row["protocol"], str(row["protocol"]))
    if not row["family"]:
        text = "not IP"
    elif protocol == "tcp":
        shown = _flags(row["tcp"] | (row["tcp_reply"] if row["kind"] == END else 0))
        text = "TCP Flags: " + ", ".join(name for name in SHOWN_FLAGS if name in shown)
    elif protocol in ("icmp", "icmp6"):
        known, version = (_ICMP4, "ICMPv4") if protocol == "icmp" else (_ICMP6, "ICMPv6")
        number, code = divmod(row["target_port"], 256)
        text = f"{version} {known.get(number) or f'type {number} code {code}'}"
    else:
        text = protocol.upper() if protocol in ("udp", "sctp") else f"IP protocol {protocol}"
    return text + _fate(row)


def _fate(row: dict[str, int]) -> str:
    if row["kind"] == DROP:
        reason = "" if row["reason"] in names("flow.DropReason") else reason_text(row["reason"])
        many = f"{row['packets']} packets" if row["packets"] > 1 else ""
        return "".join(f"; {part}" for part in (reason, many) if part)
    if row["kind"] != END:
        return ""
    cut = ", cut by policy" if row["flags"] & DENIED else ""
    there, back = (
        f"{row[f'{way}packets']} packets {row[f'{way}bytes']} bytes" for way in ("", "reply_")
    )
    lasted = row["lasted"] * TICK_NS / 1e9
    return f"; ended{cut} after {lasted:.1f} s, {there} there, {back} back"
