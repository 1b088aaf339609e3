"""Ports of Cilium's rules: toPorts with rules.dns, icmps.

Rule: an element of toPorts that restricts names is a rule of its own; what Cilium's checks refuse
is refused here, with the field's name.

Theory. pkg/policy/api, l4.go, l7.go and rule_validation.go. Names can be restricted where a rule
allows egress, over TCP and UDP, at ports that are numbers or names but neither 0 nor a range, since
somebody has to listen there. An empty list of names would allow none; Cilium's versions differ
about it, so it is refused.
"""

import re
from collections.abc import Mapping
from typing import Any

from dataplane.objects.cilium_words import (
    ICMP4_TYPES,
    ICMP6_TYPES,
    PROTOCOLS,
    UNSUPPORTED,
    WITHOUT_PORTS,
)
from dataplane.objects.core import PORT_MOST
from dataplane.objects.manifest import (
    Place,
    choice,
    integer,
    items,
    refuse,
    section,
    sections,
    text,
)
from dataplane.objects.names import NamePattern, name_pattern
from dataplane.objects.policies import PortMatch, port_name
from dataplane.objects.selectors import known

PORTS_MOST = 40  # of one element, also ICMP fields: pkg/policy/api, rule_validation.go
NAMED_OVER = (6, 17)  # protocols whose DNS can be looked into

Ports = tuple[tuple[PortMatch, ...] | None, tuple[NamePattern, ...]]
"""Ports (None: any) and the names that may be asked for there (empty: anything)."""


def check(value: Mapping[str, Any], place: Place, fields: tuple[str, ...]) -> None:
    """Raise ManifestError for a field that we do not do, or nobody knows."""
    for name, one in value.items():
        if name in UNSUPPORTED and name not in fields and one is not None:
            raise refuse((*place, name), UNSUPPORTED[name])
    known(value, place, (*fields, *UNSUPPORTED))


def ports_of(rule: Mapping[str, Any], place: Place, may_name: bool) -> list[Ports]:
    """Read toPorts and icmps of a rule: at least one element. may_name: it allows egress."""
    ports, icmps = items(rule.get("toPorts"), place), items(rule.get("icmps"), place)
    if ports and icmps:
        raise refuse((*place, "icmps"), "cannot stand beside toPorts: use two elements")
    plain: list[PortMatch] = []
    found: list[Ports] = []
    for n, one in enumerate(sections(rule.get("toPorts"), (*place, "toPorts"))):
        at: Place = (*place, "toPorts", n)
        check(one, at, ("ports", "rules") if may_name else ("ports",))
        given = sections(one.get("ports"), (*at, "ports"))
        _few(given, (*at, "ports"))
        names = _names(one.get("rules"), (*at, "rules"))
        some = [
            match
            for m, port in enumerate(given)
            for match in _port(port, (*at, "ports", m), bool(names))
        ]
        if not names:
            plain += some
            continue
        if not some:
            raise refuse((*at, "ports"), "is missing: rules.dns needs ports, such as 53")
        found.append((tuple(some), names))
    for n, one in enumerate(sections(rule.get("icmps"), (*place, "icmps"))):
        at = (*place, "icmps", n)
        known(one, at, ("fields",))
        given = sections(one.get("fields"), (*at, "fields"))
        _few(given, (*at, "fields"))
        plain += [_icmp(field, (*at, "fields", m)) for m, field in enumerate(given)]
    if plain or not found:
        found.insert(0, (tuple(plain) if ports or icmps else None, ()))
    return found


def _names(given: object, place: Place) -> tuple[NamePattern, ...]:
    """Read rules.dns."""
    rules = section(given, place)
    check(rules, place, ("dns",))
    if rules.get("dns") is None:
        return ()
    at: Place = (*place, "dns")
    found = [name_pattern(one, (*at, n)) for n, one in enumerate(sections(rules["dns"], at))]
    if not found:
        raise refuse(at, 'is empty: write matchPattern: "*" for every name, or leave rules out')
    return tuple(dict.fromkeys(found))


def _few(given: list[Any], place: Place) -> None:
    if len(given) > PORTS_MOST:
        raise refuse(place, f"{len(given)} elements, limit {PORTS_MOST}: use two elements")


def _port(port: Mapping[str, Any], place: Place, names: bool) -> list[PortMatch]:
    """Read a port. names: rules.dns stands beside it."""
    known(port, place, ("port", "endPort", "protocol"))
    at: Place = (*place, "protocol")
    name = text(port.get("protocol"), at).upper() or "ANY"
    protocols = PROTOCOLS[choice(name, at, tuple(PROTOCOLS))]
    given, end = port.get("port"), port.get("endPort")
    if isinstance(given, int) and not isinstance(given, bool):  # kubectl would want a string
        given = str(given)
    one = text(given, (*place, "port"))
    if names:
        protocols = tuple(number for number in protocols if number in NAMED_OVER)
        if not protocols:
            raise refuse(at, f"rules.dns needs UDP, TCP or ANY, not {name}")
        if end or one == "0":
            raise refuse((*place, "port"), "rules.dns needs one port, neither 0 nor a range")
    if protocols[0] in WITHOUT_PORTS:
        if one not in ("", "0"):
            raise refuse((*place, "port"), f"protocol {name} has no ports: leave it out")
        return [PortMatch(protocol) for protocol in protocols]
    if not one:
        raise refuse((*place, "port"), "is missing")
    if re.search(r"[a-zA-Z]", one):
        if end:
            raise refuse((*place, "endPort"), "needs a numeric port beside it, not a name")
        found = port_name(one.lower(), (*place, "port"))
        return [PortMatch(protocol, name=found) for protocol in protocols]
    first = integer(int(one) if one.isdecimal() else one, (*place, "port"), 0, PORT_MOST)
    last = integer(end or first, (*place, "endPort"), 0, PORT_MOST)
    if last < first:
        raise refuse((*place, "endPort"), f"{last} is less than port {first}")
    if not first:
        last = PORT_MOST
    return [PortMatch(protocol, first, last) for protocol in protocols]


def _icmp(field: Mapping[str, Any], place: Place) -> PortMatch:
    known(field, place, ("family", "type"))
    family = choice(field.get("family"), (*place, "family"), ("IPv4", "IPv6"), "IPv4")
    names = ICMP4_TYPES if family == "IPv4" else ICMP6_TYPES
    given = field.get("type")
    if isinstance(given, str):
        given = int(given) if given.isdecimal() else names.get(given, given)
    number = integer(given, (*place, "type"), 0, 255)
    return PortMatch(1 if family == "IPv4" else 58, number, number)
