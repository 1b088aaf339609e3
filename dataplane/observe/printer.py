"""Flows as text, in the forms of `hubble observe`: compact, dict, json, jsonpb, table.

Rule: one answer of the server is one line (dict: one block); JSON is the protocol's own mapping.

Theory. Words and their order are those that people and scripts know: a reply is turned round and
its arrow, too; a direction that is not known is `<>`. Times are UTC. json and jsonpb are the same,
as there.
"""

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from google.protobuf import json_format

from dataplane.observe import moments, views
from dataplane.observe.protocol import enum, names, pool
from dataplane.tables.verdicts import RESERVED
from xdp.abi import reason_text

FORMS = ("compact", "dict", "json", "jsonpb", "table")
_WORDS = ("SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY")
_MATCHES = {1: "L3-Only", 2: "L3-L4", 3: "L4-Only", 4: "all", 5: "L3-Proto", 6: "Proto-Only"}
_COLORS = {"host": 36, "port": 33, "identity": 35, "FORWARDED": 32, "ALLOWED": 32, "DROPPED": 31,
           "DENIED": 31, "ERROR": 31, "AUDIT": 33, "AUDITED": 33, "TRACED": 33,
           "TRANSLATED": 33}  # fmt: skip
"""SGR parameters (ECMA-48), as Hubble chooses them."""


class Printer:
    """Makes lines of GetFlowsResponses."""

    def __init__(
        self,
        form: str = "compact",
        time_format: str = "StampMilli",
        node: bool = False,
        translate: bool = True,
        policies: bool = False,
        color: bool = False,
    ) -> None:
        """node: show its name; translate: names instead of addresses; policies: their names."""
        self._form, self._node, self._translate = form, node, translate
        self._policies, self._color = policies, color and form in ("compact", "dict")
        self._time = moments.FORMATS[time_format]

    def lines(self, answers: Iterable[Any]) -> Iterator[str]:
        """Yield lines; a table comes whole at the end."""
        if self._form == "table":
            lost: list[str] = []
            rows = []
            for one in answers:
                if one.HasField("lost_events"):
                    lost.append(_lost(one))
                else:
                    rows.append(self._cells(one))
            yield from _table(rows, self._node)
            yield from lost
            return
        first = True
        for answer in answers:
            if self._form in ("json", "jsonpb"):
                yield to_json(answer)
            elif self._form == "dict":
                if not first:
                    yield "------------"
                yield from self._block(answer)
                first = False
            else:
                yield self._line(answer)

    def _when(self, answer: Any) -> str:
        if not answer.HasField("time"):
            return "N/A"
        stamp = answer.time
        at = datetime.fromtimestamp(stamp.seconds, UTC)
        return self._time(at.replace(microsecond=stamp.nanos // 1000), stamp.nanos)

    def _paint(self, what: str, text: str) -> str:
        return f"\x1b[{_COLORS[what]}m{text}\x1b[0m" if self._color and what in _COLORS else text

    def _line(self, answer: Any) -> str:
        if answer.HasField("lost_events"):
            return _lost(answer)
        flow = answer.flow
        when, node, source, target, kind, verdict, summary = self._cells(answer)
        known = flow.HasField("is_reply")
        ends = [
            f"{name} {self._paint('identity', identity(end))}"
            for name, end in ((source, flow.source), (target, flow.destination))
        ]
        arrow = "->" if known else "<>"
        if known and flow.is_reply.value:
            ends.reverse()
            arrow = "<-"
        where = f" [{node}]" if self._node else ""
        text = f"{when}{where}: {ends[0]} {arrow} {ends[1]} {kind} {verdict} ({summary})"
        return text + (self._named(flow) if self._policies else "")

    def _block(self, answer: Any) -> Iterator[str]:
        if answer.HasField("lost_events"):
            yield _lost(answer)
            return
        when, node, *rest = self._cells(answer)
        pairs = [("TIMESTAMP", when), *([("NODE", node)] if self._node else [])]
        pairs += zip(_WORDS, rest, strict=True)
        for name, text in pairs:
            yield f"{name:>11}: {text}"
        if self._policies and (text := self._named(answer.flow)):
            yield f"{'POLICIES':>11}: {text.strip()}"

    def _cells(self, answer: Any) -> list[str]:
        flow, said = answer.flow, verdict(answer.flow)
        return [
            self._when(answer),
            answer.node_name,
            *self._ends(flow),
            flow_type(flow),
            self._paint(said, said),
            flow.Summary,
        ]

    def _ends(self, flow: Any) -> tuple[str, str]:
        layer = flow.l4.WhichOneof("protocol")
        part = getattr(flow.l4, layer) if layer in ("TCP", "UDP", "SCTP") else None
        ports = (part.source_port, part.destination_port) if part else (0, 0)
        source = self._name(
            flow.IP.source, ports[0], flow.source, flow.source_service, flow.source_names
        )
        target = self._name(
            flow.IP.destination, ports[1], flow.destination, flow.destination_service,
            flow.destination_names,
        )  # fmt: skip
        return source, target

    def _name(self, address: str, port: int, end: Any, service: Any, known: Any) -> str:
        host = f"[{address}]" if ":" in address and port else address or "<>"
        if self._translate:
            if end.pod_name:
                host = f"{end.namespace}/{end.pod_name}"
            elif service.name:
                host = f"{service.namespace}/{service.name}"
            elif known:
                host = ",".join(known)
        host = self._paint("host", host)
        return f"{host}:{self._paint('port', str(port))}" if port else host

    @staticmethod
    def _named(flow: Any) -> str:
        texts = []
        for way in ("egress", "ingress"):
            for fate in ("allowed", "denied"):
                some = getattr(flow, f"{way}_{fate}_by")
                if some:
                    text = ", ".join(
                        f"{one.kind} {one.namespace}/{one.name}".replace(" /", " ") for one in some
                    )
                    texts.append(f" {way.upper()} {fate.upper()} BY {text}")
        return "".join(texts)


def to_json(answer: Any) -> str:
    """Return an answer as one line of JSON, in the protocol's own mapping."""
    made = json_format.MessageToDict(
        answer, preserving_proto_field_name=True, descriptor_pool=pool()
    )
    return json.dumps(made, separators=(",", ":"))


def identity(end: Any) -> str:
    """Return an end's identity as people know it."""
    label = RESERVED.get(end.identity)
    return f"({label.partition(':')[2]})" if label else f"(ID:{end.identity})"


def flow_type(flow: Any) -> str:
    """Return what kind of event a flow is."""
    kind, below = flow.event_type.type, flow.event_type.sub_type
    if kind == views.TYPE_TRACE:
        point = names("flow.TraceObservationPoint").get(flow.trace_observation_point, "")
        return point.lower().replace("_", "-")
    if kind == views.TYPE_DROP:
        return reason_text(below)
    if kind == views.TYPE_L7:
        record = flow.l7.WhichOneof("record") or "l7"
        said = names("flow.L7FlowType").get(flow.l7.type, "").lower()
        seen = f" {flow.l7.dns.observation_source}" if record == "dns" else ""
        return f"{record}-{said}{seen}"
    if kind == views.TYPE_VERDICT:
        way = names("flow.TrafficDirection").get(flow.traffic_direction, "")
        return f"policy-verdict:{_MATCHES.get(flow.policy_match_type, 'none')} {way}"
    return "UNKNOWN"


def verdict(flow: Any) -> str:
    """Return a flow's verdict; of a policy: ALLOWED, DENIED, AUDITED."""
    name = names("flow.Verdict").get(flow.verdict, str(flow.verdict))
    if flow.event_type.type == views.TYPE_VERDICT:
        words = {"FORWARDED": "ALLOWED", "DROPPED": "DENIED", "AUDIT": "AUDITED"}
        return words.get(name, name)
    return name


def _lost(answer: Any) -> str:
    lost = answer.lost_events
    source = {number: name for name, number in enum("flow.LostEventSource").items()}[lost.source]
    ring = f" CPU({lost.cpu.value})" if lost.HasField("cpu") else ""
    return f"EVENTS LOST: {source}{ring} {lost.num_events_lost}"


def _table(rows: list[list[str]], node: bool) -> Iterator[str]:
    head = ["TIMESTAMP", "NODE", *_WORDS]
    shown = [row if node else [row[0], *row[2:]] for row in [head, *rows]]
    wide = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        padded = (f"{text:<{size}}" for text, size in zip(row, wide, strict=True))
        yield "   ".join(padded).rstrip()
