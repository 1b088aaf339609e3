"""Flows that were saved as lines of JSON (`observe -o jsonpb`, Hubble's exporter), asked again.

Rule: a filter means for a message what it means for columns (filters.py); a line that is none is
an error with its number.

Theory. A line is a GetFlowsResponse in the protocol's JSON. Flows are taken in the order in which
they stand, as from a server that has just these; nothing is sorted. Members of the public protocol
that we do not know are passed over, so files of other programs can be read.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from dataplane.observe import selectors
from dataplane.observe.expressions import compiled
from dataplane.observe.filters import FilterError, fqdn_pattern, named, node_pattern
from dataplane.observe.message import CLUSTER
from dataplane.observe.protocol import message, pool
from dataplane.observe.query import ALL_NS, question

Test = Callable[[Any], bool]
_L4 = {"icmp": ("ICMPv4", "ICMPv6"), "icmpv4": ("ICMPv4",), "icmpv6": ("ICMPv6",),
       "tcp": ("TCP",), "udp": ("UDP",), "sctp": ("SCTP",), "vrrp": ("VRRP",),
       "igmp": ("IGMP",), "dns": (), "http": (), "kafka": ()}  # fmt: skip
FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR", "NS")


def is_text(path: Path) -> bool:
    """Return whether a file begins as a line of JSON does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def answers(lines: Iterable[str], request: Any) -> Iterator[Any]:
    """Yield the GetFlowsResponses that fit. Raises FilterError, ValueError for a line."""
    wanted = question(request)
    white, black = ([_all(one) for one in some] for some in (request.whitelist, request.blacklist))
    fits = _chosen(_read(lines), white, black, wanted.since_ns, wanted.until_ns)
    if wanted.number and not wanted.first:
        yield from deque(fits, maxlen=min(wanted.number, 1 << 31))
        return
    for count, answer in enumerate(fits, 1):
        yield answer
        if wanted.first and count >= wanted.number:
            return


def _read(lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            read, made = json.loads(line), message("observer.GetFlowsResponse")()
            yield json_format.ParseDict(
                read, made, ignore_unknown_fields=True, descriptor_pool=pool()
            )
        except (ValueError, TypeError, json_format.ParseError) as error:
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"line {number} is no flow in JSON: {said}") from error


def _chosen(
    answers: Iterator[Any], white: list[Test], black: list[Test], since_ns: int, until_ns: int
) -> Iterator[Any]:
    for answer in answers:
        if not answer.HasField("flow"):
            if answer.HasField("lost_events"):
                yield answer
            continue
        flow, at = answer.flow, answer.time.ToNanoseconds()
        if (since_ns, until_ns) != ALL_NS and not since_ns <= at <= until_ns:
            continue
        if white and not any(test(flow) for test in white):
            continue
        if not any(test(flow) for test in black):
            yield answer


def _all(one: Any) -> Test:
    """Return a filter as a test: its members are ANDed. Raises FilterError."""
    tests = [_test(member.name, value) for member, value in one.ListFields()]
    return lambda flow: all(test(flow) for test in tests)


def _test(member: str, value: Any) -> Test:
    """Return the test of one member: its values are ORed."""
    side, _, what = member.partition("_")
    if side in ("source", "destination") and what in _ENDS:
        return _ENDS[what](side, value)
    if member in _OTHERS:
        return _OTHERS[member](value)
    if member.startswith(("http_", "trace_id", "ip_trace_id")):
        return lambda flow: False  # flows have none of these here
    raise FilterError(f"filter {member}: not for flows from a file")


# --- one end --------------------------------------------------------------------------------------


def _ip(side: str, value: Any) -> Test:
    return _address(lambda flow: getattr(flow.IP, side), value)


def _address(text_of: Callable[[Any], str], value: Any) -> Test:
    try:
        nets = [ip_network(text, strict=False) for text in value]
    except ValueError as error:
        raise FilterError(f"invalid IP address or prefix in filter: {error}") from error

    def test(flow: Any) -> bool:
        text = text_of(flow)
        return bool(text) and any(ip_address(text) in net for net in nets)

    return test


def _pod(side: str, value: Any) -> Test:
    fits = named(value)
    return lambda flow: fits(getattr(flow, side).namespace, getattr(flow, side).pod_name)


def _service(side: str, value: Any) -> Test:
    fits = named(value)

    def test(flow: Any) -> bool:
        one = getattr(flow, f"{side}_service")
        return fits(one.namespace, one.name)

    return test


def _fqdn(side: str, value: Any) -> Test:
    pattern = fqdn_pattern(value)
    return lambda flow: any(map(pattern.fullmatch, getattr(flow, f"{side}_names")))


def _label(side: str, value: Any) -> Test:
    try:
        some = [selectors.parse(text) for text in value]
    except ValueError as error:
        raise FilterError(str(error)) from error
    return lambda flow: any(fits(list(getattr(flow, side).labels)) for fits in some)


def _port(side: str, value: Any) -> Test:
    for text in value:
        if not text.isdecimal() or int(text) > 65535:
            raise FilterError(f"invalid port {text!r}: must be 0-65535")
    wanted = {int(text) for text in value}

    def test(flow: Any) -> bool:
        layer = flow.l4.WhichOneof("protocol")
        if layer not in ("TCP", "UDP", "SCTP"):
            return False
        return getattr(getattr(flow.l4, layer), f"{side}_port") in wanted

    return test


def _identity(side: str, value: Any) -> Test:
    wanted = set(value)
    return lambda flow: getattr(flow, side).identity in wanted


def _workload(side: str, value: Any) -> Test:
    return lambda flow: any(
        one.name in ("", has.name) and one.kind in ("", has.kind)
        for one in value
        for has in getattr(flow, side).workloads
    )


def _cluster(side: str, value: Any) -> Test:
    wanted = set(value)
    return lambda flow: getattr(flow, side).cluster_name in wanted


_ENDS: dict[str, Callable[[str, Any], Test]] = {
    "ip": _ip, "pod": _pod, "service": _service, "fqdn": _fqdn, "label": _label, "port": _port,
    "identity": _identity, "workload": _workload, "cluster_name": _cluster,
    "ip_xlated": lambda side, value: _address(lambda flow: flow.IP.source_xlated, value),
}  # fmt: skip


# --- the flow -------------------------------------------------------------------------------------


def _member(name: str) -> Callable[[Any], Test]:
    """Return who makes a test of a member with one value."""

    def make(value: Any) -> Test:
        wanted = set(value)
        return lambda flow: getattr(flow, name) in wanted

    return make


def _reason(value: Any) -> Test:
    wanted = set(value)
    dropped = message("flow.Flow").DESCRIPTOR.fields_by_name["verdict"].enum_type
    number = dropped.values_by_name["DROPPED"].number
    return lambda flow: flow.verdict == number and flow.drop_reason_desc in wanted


def _protocol(value: Any) -> Test:
    words = [text.lower() for text in value]
    for word in words:
        if word not in _L4:
            raise FilterError(f"unknown protocol: {word!r}")
    layers = {layer for word in words for layer in _L4[word]}
    return lambda flow: (
        flow.l4.WhichOneof("protocol") in layers or (flow.l7.WhichOneof("record") or "") in words
    )


def _flags(value: Any) -> Test:
    def test(flow: Any) -> bool:
        if not flow.l4.TCP.HasField("flags"):
            return False
        has = flow.l4.TCP.flags
        return any(all(getattr(has, name) for name in FLAGS if getattr(one, name)) for one in value)

    return test


def _types(value: Any) -> Test:
    def test(flow: Any) -> bool:
        kind, below = flow.event_type.type, flow.event_type.sub_type
        return any(
            one.type in (0, kind) and (not one.match_sub_type or one.sub_type == below)
            for one in value
        )

    return test


def _node(value: Any) -> Test:
    some = [node_pattern(text) for text in value]

    def test(flow: Any) -> bool:
        name = flow.node_name if "/" in flow.node_name else f"{CLUSTER}/{flow.node_name}"
        return any(one.fullmatch(name) for one in some)

    return test


def _node_labels(value: Any) -> Test:
    some = [selectors.parse(text) for text in value]
    return lambda flow: any(fits(list(flow.node_labels)) for fits in some)


def _interface(value: Any) -> Test:
    return lambda flow: (
        flow.HasField("interface")
        and any(
            one.index in (0, flow.interface.index) and one.name in ("", flow.interface.name)
            for one in value
        )
    )


def _query(value: Any) -> Test:
    some = [compiled("dns_query", text) for text in value]
    return lambda flow: (
        flow.l7.HasField("dns") and any(one.search(flow.l7.dns.query) for one in some)
    )


_OTHERS: dict[str, Callable[[Any], Test]] = {
    "verdict": _member("verdict"),
    "uuid": _member("uuid"),
    "traffic_direction": _member("traffic_direction"),
    "drop_reason_desc": _reason,
    "protocol": _protocol,
    "tcp_flags": _flags,
    "event_type": _types,
    "node_name": _node,
    "node_labels": _node_labels,
    "interface": _interface,
    "dns_query": _query,
    "reply": lambda value: lambda flow: flow.is_reply.value in set(value),
    "encrypted": lambda value: lambda flow: flow.IP.encrypted in set(value),
    "ip_version": lambda value: lambda flow: flow.IP.ipVersion in set(value),
}
