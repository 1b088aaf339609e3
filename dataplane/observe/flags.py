"""Flags of `hubble observe` that choose flows, and the filters that they make.

Rule: a flag means what it means there; a value that cannot be is refused with what can.

Theory. A flag such as --pod is about either end, so the whitelist is two filters that are ORed,
left (as source) and right (as destination); a flag such as --verdict or --from-pod is in both. What
stands behind --not goes to two others, of the blacklist. --pod with --from-pod would be in one
filter with it, and mean what nobody thinks of: such pairs are refused.
"""

import json
from collections.abc import Iterable, Sequence
from ipaddress import ip_network
from typing import Any

from google.protobuf import json_format

from dataplane.observe.filters import FilterError
from dataplane.observe.protocol import enum, message
from dataplane.tables.verdicts import RESERVED

TYPES = {"drop": 1, "debug": 2, "capture": 3, "trace": 4, "policy-verdict": 5, "trace-sock": 7,
         "l7": 129, "agent": 130}  # fmt: skip
EITHER = {
    "pod": "pod", "namespace": "pod", "ip": "ip", "fqdn": "fqdn", "label": "label",
    "service": "service", "port": "port", "workload": "workload", "identity": "identity",
    "cluster": "cluster_name",
}  # fmt: skip
"""Flag about either end -> member of FlowFilter behind source_ or destination_."""
BOTH = {
    "verdict": "verdict", "drop-reason-desc": "drop_reason_desc", "protocol": "protocol",
    "tcp-flags": "tcp_flags", "type": "event_type", "traffic-direction": "traffic_direction",
    "node-name": "node_name", "node-label": "node_labels", "uuid": "uuid",
    "ip-version": "ip_version", "snat-ip": "source_ip_xlated", "interface": "interface",
    "http-status": "http_status_code", "http-method": "http_method", "http-path": "http_path",
    "http-url": "http_url", "http-header": "http_header", "trace-id": "trace_id",
    "ip-trace-id": "ip_trace_id", "cel-expression": "experimental",
}  # fmt: skip
WAYS = ("", "from-", "to-")
SWITCHES = (*(f"{way}all-namespaces" for way in WAYS), "ipv4", "ipv6", "encrypted", "unencrypted")
"""Flags without a value; that of one that is given is any text."""
FLAGS = (*(f"{way}{name}" for way in WAYS for name in EITHER), *BOTH, *SWITCHES)
_VERSIONS = {
    "none": "IP_NOT_USED",
    **{f"{word}{n}": f"IPv{n}" for word in ("", "v", "ip", "ipv") for n in (4, 6)},
}


def filters(chosen: dict[str, Sequence[str]]) -> list[Any]:
    """Return flow.FlowFilters of flags and their values. Raises FilterError."""
    if not any(chosen.values()):
        return []
    left, right = message("flow.FlowFilter")(), message("flow.FlowFilter")()
    _check(chosen)
    chosen = _qualified(chosen)
    for flag, values in chosen.items():
        for value in values:
            _add(left, right, flag, value)
    return [left] if left == right else [left, right]


def raw(texts: Iterable[str]) -> list[Any]:
    """Return flow.FlowFilters that are given as JSON objects. Raises FilterError."""
    found = []
    for text in texts:
        rest = text.strip()
        while rest:
            try:
                one, end = json.JSONDecoder().raw_decode(rest)
                found.append(json_format.ParseDict(one, message("flow.FlowFilter")()))
            except (ValueError, json_format.ParseError) as error:
                raise FilterError(f"{text!r} is no flow.FlowFilter in JSON: {error}") from error
            rest = rest[end:].strip()
    return found


def _check(chosen: dict[str, Sequence[str]]) -> None:
    """Refuse flags that exclude each other."""
    pairs = [(name, f"{way}{name}") for way in WAYS[1:] for name in (*EITHER, "all-namespaces")]
    for spaces in ("namespace", "all-namespaces"):
        pairs += [(spaces, f"{way}{name}") for way in WAYS[1:] for name in ("pod", "service")]
    pairs += [(f"{way}namespace", f"{way}all-namespaces") for way in WAYS]
    pairs.append(("encrypted", "unencrypted"))
    for one, other in pairs:
        if chosen.get(one) and chosen.get(other):
            raise FilterError(f"--{one} and --{other} exclude each other")


def _qualified(chosen: dict[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Put namespaces in front of pods and services that have none; by themselves: of all pods."""
    found = dict(chosen)
    for way in WAYS:
        spaces = list(found.pop(f"{way}namespace", ()))
        spaces += [""] * bool(found.pop(f"{way}all-namespaces", ()))
        some = [f"{way}{name}" for name in ("pod", "service") if found.get(f"{way}{name}")]
        if not spaces:
            continue
        for flag in some:
            found[flag] = [full for name in found[flag] for full in _within(spaces, flag, name)]
        if not some:
            found[f"{way}pod"] = [f"{space}/" for space in spaces]
    return found


def _within(spaces: Sequence[str], flag: str, name: str) -> list[str]:
    space, slash, _ = name.partition("/")
    if not slash:
        return [f"{one}/{name}" for one in spaces]
    if any(space != one for one in spaces if one):
        raise FilterError(f"--{flag} {name} is not in namespace {', '.join(spaces)}")
    return [name]


def _add(left: Any, right: Any, flag: str, value: str) -> None:
    way, _, bare = flag.partition("-")
    if flag in SWITCHES:
        for one in (left, right):
            _switch(one, flag)
    elif flag in BOTH:
        for one in (left, right):
            _put(one, BOTH[flag], flag, value)
    elif way in ("from", "to") and bare in EITHER:
        side = "source" if way == "from" else "destination"
        for one in (left, right):
            _put(one, f"{side}_{EITHER[bare]}", bare, value)
    else:
        _put(left, f"source_{EITHER[flag]}", flag, value)
        _put(right, f"destination_{EITHER[flag]}", flag, value)


def _switch(one: Any, flag: str) -> None:
    if flag in ("encrypted", "unencrypted"):
        one.encrypted.append(flag == "encrypted")
    else:
        one.ip_version.append(_member("flow.IPVersion", _VERSIONS[flag], flag))


def _put(one: Any, member: str, flag: str, value: str) -> None:
    listed = getattr(one, member)
    match flag:
        case "identity":
            listed.extend(_identities(value))
        case "workload":
            kind, slash, name = value.rpartition("/")
            listed.add(kind=kind if slash else "", name=name)
        case "verdict":
            listed.append(_member("flow.Verdict", value.upper(), flag))
        case "drop-reason-desc":
            listed.append(_member("flow.DropReason", value.upper(), flag))
        case "traffic-direction":
            listed.append(_member("flow.TrafficDirection", value.upper(), flag))
        case "ip-version":
            if value.lower() not in _VERSIONS:
                raise FilterError(f"--{flag} {value}: must be none, v4 or v6")
            listed.append(_member("flow.IPVersion", _VERSIONS[value.lower()], flag))
        case "http-header":
            key, colon, text = value.partition(":")
            if not colon:
                raise FilterError(f"--{flag} {value}: must be KEY:VALUE")
            listed.add(key=key, value=text)
        case "ip-trace-id":
            if not value.isdecimal() or not 0 < int(value) < 1 << 64:
                raise FilterError(f"--{flag} {value}: must be a number above 0")
            listed.append(int(value))
        case "cel-expression":
            listed.cel_expression.append(value)
        case "tcp-flags":
            names = value.upper().split(",")
            try:
                listed.add(**dict.fromkeys(names, True))
            except ValueError as error:
                raise FilterError(f"--tcp-flags {value}: FIN, SYN, RST, PSH, ACK, ...") from error
        case "type":
            _event_type(listed, value)
        case "interface":
            listed.add(name=value)
        case "ip" | "snat-ip":
            try:
                ip_network(value, strict=False)
            except ValueError as error:
                raise FilterError(f"--{flag} {value}: no address or network") from error
            listed.append(value)
        case _:
            listed.append(value)


def _member(name: str, value: str, flag: str) -> int:
    numbers = enum(name)
    if value not in numbers:
        raise FilterError(f"--{flag} {value}: must be one of {', '.join(numbers)}")
    return numbers[value]


def _identities(value: str) -> list[int]:
    """Return the identities of a name; the world is that of either family, too."""
    found = [
        number
        for number, label in RESERVED.items()
        if value in (label, label.partition(":")[2])
        or (value in ("world", "reserved:world") and label.startswith("reserved:world-"))
    ]
    if found:
        return sorted(found)
    if not value.isdecimal() or int(value) >= 1 << 32:
        names = ", ".join(label.partition(":")[2] for label in RESERVED.values())
        raise FilterError(f"--identity {value}: must be a number or one of {names}")
    return [int(value)]


def _event_type(listed: Any, value: str) -> None:
    name, colon, below = value.partition(":")
    if name not in TYPES and not name.isdecimal():
        raise FilterError(f"--type {value}: must be one of {', '.join(TYPES)}, with :SUBTYPE")
    made = listed.add(type=TYPES.get(name) or int(name))
    if not colon:
        return
    made.match_sub_type = True
    points = enum("flow.TraceObservationPoint")
    word = below.upper().replace("-", "_")
    if below.isdecimal():
        made.sub_type = int(below)
    elif word in points and made.type == TYPES["trace"]:
        made.sub_type = points[word] if word != "TO_ENDPOINT" else 0
    elif word in enum("flow.DropReason") and made.type == TYPES["drop"]:
        made.sub_type = enum("flow.DropReason")[word]
    else:
        raise FilterError(f"--type {value}: {below} is no sub-type of {name}")
