"""Flags of `hubble observe` that choose flows, and the filters that they make.

Rule: a flag means what it means there; a value that cannot be is refused with what can.

Theory. A flag such as --pod is about either end, so the whitelist is two filters that are ORed,
left (as source) and right (as destination); a flag such as --verdict or --from-pod is in both. What
stands behind --not goes to two others, of the blacklist.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Any

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
    "http-url": "http_url", "trace-id": "trace_id",
}  # fmt: skip
FLAGS = tuple(
    f"{way}{name}" for way in ("", "from-", "to-") for name in EITHER
) + tuple(BOTH)  # fmt: skip
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def filters(chosen: dict[str, Sequence[str]]) -> list[Any]:
    """Return flow.FlowFilters of flags and their values. Raises FilterError."""
    if not any(chosen.values()):
        return []
    left, right = message("flow.FlowFilter")(), message("flow.FlowFilter")()
    chosen = _qualified(chosen)
    for flag, values in chosen.items():
        for value in values:
            _add(left, right, flag, value)
    return [left] if left == right else [left, right]


def _qualified(chosen: dict[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Put namespaces in front of pods that have none, where both are given."""
    found = dict(chosen)
    for way in ("", "from-", "to-"):
        spaces, pods = found.get(f"{way}namespace", ()), found.get(f"{way}pod", ())
        if spaces and pods:
            found[f"{way}pod"] = [
                name
                for pod in pods
                for name in ([pod] if "/" in pod else [f"{space}/{pod}" for space in spaces])
            ]
            found[f"{way}namespace"] = ()
    return found


def _add(left: Any, right: Any, flag: str, value: str) -> None:
    way, _, bare = flag.partition("-")
    if flag in BOTH:
        for one in (left, right):
            _put(one, BOTH[flag], flag, value)
    elif way in ("from", "to") and bare in EITHER:
        side = "source" if way == "from" else "destination"
        for one in (left, right):
            _put(one, f"{side}_{EITHER[bare]}", bare, value)
    else:
        _put(left, f"source_{EITHER[flag]}", flag, value)
        _put(right, f"destination_{EITHER[flag]}", flag, value)


def _put(one: Any, member: str, flag: str, value: str) -> None:
    listed = getattr(one, member)
    match flag:
        case "namespace":
            listed.append(f"{value}/")
        case "identity":
            listed.append(_identity(value))
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
            listed.append(_member("flow.IPVersion", {"4": "IPv4", "6": "IPv6"}[value], flag))
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


def _identity(value: str) -> int:
    for number, label in RESERVED.items():
        if value in (label, label.partition(":")[2]):
            return number
    if not value.isdecimal():
        names = ", ".join(label.partition(":")[2] for label in RESERVED.values())
        raise FilterError(f"--identity {value}: must be a number or one of {names}")
    return int(value)


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


def moment(text: str, now: datetime | None = None) -> datetime:
    """Return the time of "5m" (ago), "2026-11-25" or an RFC 3339 time. Raises FilterError."""
    now = now or datetime.now(UTC)
    parts = _DURATION.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return now - timedelta(seconds=sum(float(number) * _UNITS[unit] for number, unit in parts))
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise FilterError(f"{text!r} is no time: 5m, 2026-11-25T10:00:00Z") from error
    return at if at.tzinfo else at.astimezone()
