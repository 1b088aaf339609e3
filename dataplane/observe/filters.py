"""Which flows a question is about: Hubble's filters over columns.

Rule: a filter gives for columns what Cilium's would give for each flow alone (pkg/hubble/filters);
one that cannot be read, or that this server does not know, is an error with its name.

Theory. Members of a filter are ANDed, values of one member are ORed, filters of a list are ORed;
what is shown is whitelist less blacklist. Each member becomes a test that takes columns and gives
booleans. Tests of names are done once for each pod or identity that is known, not for each flow.
Event types and directions are tests of a view (views.py), all others of the flow.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address, ip_network
from typing import Any

import numpy as np

from dataplane.observe import selectors, views
from dataplane.observe.book import Book
from dataplane.observe.columns import AUDITED, DROP, NEW, Columns
from dataplane.observe.directory import Directory, End
from dataplane.observe.dns import DNS, queries
from dataplane.observe.dns import REASON as REFUSED
from dataplane.observe.expressions import MOST, FilterError, compiled
from dataplane.observe.message import CLUSTER, TCP_FLAGS
from dataplane.observe.protocol import enum
from dataplane.tables.connection_view import MASK64, NUMBERS

Test = Callable[[Columns], np.ndarray]
ViewTest = Callable[[np.ndarray, np.ndarray, Columns], np.ndarray]  # type, direction
PORTS = (NUMBERS["tcp"], NUMBERS["udp"], NUMBERS["sctp"])
_ABSENT = (
    "http_status_code", "http_method", "http_path", "http_url", "http_header", "trace_id",
    "ip_trace_id",
)  # fmt: skip
"""Members about what our flows never have: nothing fits them."""


class Filter:
    """Whitelist and blacklist of a question, over this node's names."""

    def __init__(
        self, white: Iterable[Any], black: Iterable[Any], who: Directory, book: Book, node: str
    ) -> None:
        """white, black: flow.FlowFilters. Raises FilterError."""
        self._who, self._book, self._node = who, book, node
        white, black = list(white), list(black)
        asked = sum(len(one.dns_query) for one in (*white, *black))
        if asked > MOST:
            raise FilterError(f"dns_query: {asked} expressions, at most {MOST}: join some by |")
        self._white = [self._read(one) for one in white]
        self._black = [self._read(one) for one in black]

    def choose(self, flows: Columns) -> np.ndarray:
        """Return for each flow the number of the view to show, -1: it does not fit. int64[n]"""
        if not any(of_view for _, of_view in (*self._white, *self._black)):
            return self._first_view(flows)
        shown = views.views_of(flows, self._who.here())
        fits = [np.ones(flows.count, bool) for _ in shown.views]
        if self._white:
            fits = self._any(self._white, flows, shown)
        if self._black:
            gone = self._any(self._black, flows, shown)
            fits = [good & ~bad for good, bad in zip(fits, gone, strict=True)]
        return shown.first(fits)

    def _first_view(self, flows: Columns) -> np.ndarray:
        """As choose, where nobody asks for views."""
        fits = _any_of(self._white, flows) if self._white else np.ones(flows.count, bool)
        if self._black:
            fits &= ~_any_of(self._black, flows)
        return np.where(fits, 0, -1)

    def _any(self, some: list[Any], flows: Columns, shown: views.Views) -> list[np.ndarray]:
        """Return for each view which flows one of the filters fits."""
        found = [np.zeros(flows.count, bool) for _ in shown.views]
        for tests, of_view in some:
            good = np.ones(flows.count, bool)
            for test in tests:
                good &= test(flows)
            for number, (_, kind, way) in enumerate(shown.views):
                mine = good
                for test in of_view:
                    mine = mine & test(kind, way, flows)
                found[number] |= mine
        return found

    def _read(self, one: Any) -> tuple[list[Test], list[ViewTest]]:
        """Return a filter's tests."""
        tests: list[Test] = []
        for member, value in one.ListFields():
            make = getattr(self, f"_{member.name}", None)
            if make is not None:
                tests.append(make(value))
            elif member.name in _ABSENT:
                tests.append(lambda flows: np.zeros(flows.count, bool))
            elif member.name.startswith(("source_", "destination_")):
                tests.append(self._side(member.name, value))
            elif member.name not in ("event_type", "traffic_direction"):
                raise FilterError(f"filter {member.name}: not supported by this server")
        of_view: list[ViewTest] = []
        if one.event_type:
            of_view.append(_event_type(list(one.event_type), self._who))
        if one.traffic_direction:
            wanted = list(one.traffic_direction)
            of_view.append(lambda kind, way, flows: np.isin(way, wanted))
        return tests, of_view

    def _side(self, member: str, value: Any) -> Test:
        side, _, what = member.partition("_")
        make = getattr(self, f"_of_{what}", None)
        if make is None:
            raise FilterError(f"filter {member}: not supported by this server")
        return make("source" if side == "source" else "target", value)

    # --- one end ----------------------------------------------------------------------------------

    def _of_ip(self, side: str, value: Sequence[str]) -> Test:
        return _addresses(side, value)

    def _of_ip_xlated(self, side: str, value: Sequence[str]) -> Test:
        test = _addresses(f"new_{side}", value)
        return lambda flows: test(flows) & (flows.new_source_lo != flows.source_lo)

    def _of_port(self, side: str, value: Sequence[str]) -> Test:
        for text in value:
            if not text.isdecimal() or int(text) > 65535:
                raise FilterError(f"invalid port {text!r}: must be 0-65535")
        wanted = [int(text) for text in value]
        return lambda flows: (
            np.isin(flows.arrays[f"{side}_port"][: flows.count], wanted)
            & np.isin(flows.protocol, PORTS)
        )

    def _of_identity(self, side: str, value: Sequence[int]) -> Test:
        wanted = np.array(list(value), np.uint32)
        return lambda flows: np.isin(getattr(flows, f"{side}_identity"), wanted)

    def _of_pod(self, side: str, value: Sequence[str]) -> Test:
        fits = named(value)
        return self._ends(side, lambda end: fits(end.namespace, end.name))

    def _of_workload(self, side: str, value: Sequence[Any]) -> Test:
        def fits(end: End) -> bool:
            return bool(end.workload) and any(
                one.name in ("", end.workload) and one.kind in ("", end.kind) for one in value
            )

        return self._ends(side, fits)

    def _of_cluster_name(self, side: str, value: Sequence[str]) -> Test:
        if "" in value:
            raise FilterError("invalid cluster name: must not be empty")
        wanted = CLUSTER in value
        return self._ends(side, lambda end: wanted)

    def _of_service(self, side: str, value: Sequence[str]) -> Test:
        fits, book = named(value), self._book

        def test(flows: Columns) -> np.ndarray:
            turned = views.is_reply(flows) == 1
            mine = flows.service != 0
            mine &= turned if side == "source" else ~turned
            rows = np.unique(flows.service[mine])
            good = [row for row in rows.tolist() if fits(*book.service(row))]
            return mine & np.isin(flows.service, good)

        return test

    def _of_label(self, side: str, value: Sequence[str]) -> Test:
        try:
            some = [selectors.parse(text) for text in value]
        except ValueError as error:
            raise FilterError(str(error)) from error
        book = self._book

        def test(flows: Columns) -> np.ndarray:
            column = getattr(flows, f"{side}_identity")
            numbers = np.unique(column).tolist()
            known = {number: book.labels(number) for number in numbers}
            good = [n for n in numbers if any(fits(known[n]) for fits in some)]
            return np.isin(column, good)

        return test

    def _of_fqdn(self, side: str, value: Sequence[str]) -> Test:
        pattern, book = fqdn_pattern(value), self._book

        def test(flows: Columns) -> np.ndarray:
            family, hi, lo = (
                flows.family, getattr(flows, f"{side}_hi"), getattr(flows, f"{side}_lo")
            )  # fmt: skip
            rows = np.stack((family.astype(np.uint64), hi, lo), axis=1)
            some, which = np.unique(rows, axis=0, return_inverse=True)
            good = [any(map(pattern.fullmatch, book.dns(*row))) for row in some.tolist()]
            return np.array(good, bool)[which.reshape(-1)]

        return test

    def _ends(self, side: str, fits: Callable[[End], bool]) -> Test:
        """Test the pod of an end, each pod once."""
        kept: tuple[int, np.ndarray] = (-1, np.zeros(1, bool))

        def test(flows: Columns) -> np.ndarray:
            nonlocal kept
            if kept[0] != self._who.version:
                kept = self._who.version, self._who.who(fits)
            return kept[1][getattr(flows, f"{side}_end")]

        return test

    # --- the flow ---------------------------------------------------------------------------------

    def _verdict(self, value: Sequence[int]) -> Test:
        verdicts, wanted = enum("flow.Verdict"), set(value)
        dropped, audited, forwarded = (
            verdicts[name] in wanted for name in ("DROPPED", "AUDIT", "FORWARDED")
        )

        def test(flows: Columns) -> np.ndarray:
            drop = (flows.kind == DROP) | ((flows.kind == DNS) & (flows.reason == REFUSED))
            audit = (flows.kind == NEW) & (flows.flags & AUDITED != 0)
            return np.where(drop, dropped, np.where(audit, audited, forwarded))

        return test

    def _drop_reason_desc(self, value: Sequence[int]) -> Test:
        return lambda flows: (flows.kind == DROP) & np.isin(flows.reason, list(value))

    def _reply(self, value: Sequence[bool]) -> Test:
        wanted = {int(one) for one in value}
        wanted |= {-1} if 0 in wanted else set()  # a drop is taken for no reply
        return lambda flows: np.isin(views.is_reply(flows), list(wanted))

    def _encrypted(self, value: Sequence[bool]) -> Test:
        return lambda flows: np.full(flows.count, False in value)

    def _protocol(self, value: Sequence[str]) -> Test:
        wanted: list[int] = []
        dns = False
        for text in value:
            match text.lower():
                case "icmp":
                    wanted += [NUMBERS["icmp"], NUMBERS["icmp6"]]
                case "icmpv4":
                    wanted.append(NUMBERS["icmp"])
                case "icmpv6":
                    wanted.append(NUMBERS["icmp6"])
                case "tcp" | "udp" | "sctp" as name:
                    wanted.append(NUMBERS[name])
                case "dns":
                    dns = True
                case "vrrp" | "igmp" | "http" | "kafka":
                    pass  # known, and never seen here
                case _:
                    raise FilterError(f"unknown protocol: {text!r}")
        return lambda flows: (
            np.isin(flows.protocol, wanted) & (flows.family != 0) | (flows.kind == DNS) & dns
        )

    def _dns_query(self, value: Sequence[str]) -> Test:
        return queries(value, self._book.message)

    def _tcp_flags(self, value: Sequence[Any]) -> Test:
        some = [
            sum(1 << bit for bit, name in enumerate(TCP_FLAGS) if getattr(one, name))
            for one in value
            if not one.NS
        ]

        def test(flows: Columns) -> np.ndarray:
            good = np.zeros(flows.count, bool)
            for bits in some:
                good |= flows.tcp & bits == bits
            return good & (flows.protocol == NUMBERS["tcp"]) & (flows.tcp != 0)

        return test

    def _ip_version(self, value: Sequence[int]) -> Test:
        wanted = [{1: 4, 2: 6}.get(one, 0) for one in value]
        return lambda flows: np.isin(flows.family, wanted)

    def _interface(self, value: Sequence[Any]) -> Test:
        def test(flows: Columns) -> np.ndarray:
            good = []
            for port in np.unique(flows.port).tolist():
                index, name = self._book.device(port)
                if index and any(
                    one.index in (0, index) and one.name in ("", name) for one in value
                ):
                    good.append(port)
            return np.isin(flows.port, good)

        return test

    def _node_name(self, value: Sequence[str]) -> Test:
        good = any(node_pattern(text).fullmatch(f"{CLUSTER}/{self._node}") for text in value)
        return lambda flows: np.full(flows.count, good)

    def _node_labels(self, value: Sequence[str]) -> Test:
        try:
            good = any(selectors.parse(text)(()) for text in value)
        except ValueError as error:
            raise FilterError(str(error)) from error
        return lambda flows: np.full(flows.count, good)

    def _uuid(self, value: Sequence[str]) -> Test:
        wanted = set()
        for text in value:
            bare = text.replace("-", "")
            if re.fullmatch(r"[0-9a-fA-F]{32}", bare):
                number = int(bare, 16)
                wanted.add((number >> 64 & 0xFF, number & MASK64))

        def test(flows: Columns) -> np.ndarray:
            good = np.zeros(flows.count, bool)
            for ring, position in wanted:
                good |= (flows.ring == ring) & (flows.position == position)
            return good

        return test


def _any_of(some: list[Any], flows: Columns) -> np.ndarray:
    """Return which flows fit one of the filters."""
    found = np.zeros(flows.count, bool)
    for tests, _ in some:
        good = np.ones(flows.count, bool)
        for test in tests:
            good &= test(flows)
        found |= good
    return found


def _event_type(wanted: list[Any], who: Directory) -> ViewTest:
    def test(kind: np.ndarray, way: np.ndarray, flows: Columns) -> np.ndarray:
        points = views.points(flows, who.here(), who.direct)
        below = np.where(
            kind == views.TYPE_DROP, flows.reason, np.where(kind == views.TYPE_TRACE, points, 0)
        )
        good = np.zeros(flows.count, bool)
        for one in wanted:
            mine = np.ones(flows.count, bool) if not one.type else kind == one.type
            if one.match_sub_type:
                mine &= below == one.sub_type
            good |= mine
        return good

    return test


def _addresses(side: str, value: Sequence[str]) -> Test:
    """Test an address for being one of these, or in one of these networks."""
    spans = []
    for text in value:
        try:
            if "/" in text:
                network = ip_network(text, strict=False)
                first, last = int(network.network_address), int(network.broadcast_address)
                spans.append((network.version, first, last))
            else:
                one = ip_address(text)
                spans.append((one.version, int(one), int(one)))
        except ValueError as error:
            raise FilterError(f"invalid IP address or prefix {text!r} in filter") from error

    def test(flows: Columns) -> np.ndarray:
        hi, lo = (flows.arrays[f"{side}_{half}"][: flows.count] for half in ("hi", "lo"))
        good = np.zeros(flows.count, bool)
        for version, first, last in spans:
            above = (hi > first >> 64) | ((hi == first >> 64) & (lo >= first & MASK64))
            below = (hi < last >> 64) | ((hi == last >> 64) & (lo <= last & MASK64))
            good |= (flows.family == version) & above & below
        return good

    return test


def named(value: Sequence[str]) -> Callable[[str, str], bool]:
    """Return a test of (namespace, name) by "name", "namespace/prefix", "namespace/"."""
    wanted = []
    for text in value:
        if not text:
            raise FilterError("invalid filter, name must not be empty")
        namespace, slash, prefix = text.partition("/")
        wanted.append((namespace, prefix) if slash else ("default", namespace))

    def fits(namespace: str, name: str) -> bool:
        if not namespace and not name:
            return False
        return any(
            (not prefix or name.startswith(prefix)) and space in ("", namespace)
            for space, prefix in wanted
        )

    return fits


def _pattern(text: str) -> str:
    """Return the expression of a DNS name in which * stands for any characters."""
    bare = text.strip().removesuffix(".").lower()
    if not bare or bare.endswith(".") or not re.fullmatch(r"[-.*_0-9a-z]+", bare):
        raise FilterError(f"invalid name pattern {text!r}: letters, digits, - _ . and * only")
    return re.escape(bare).replace(r"\*", "[-.0-9a-z]*")


def fqdn_pattern(value: Sequence[str]) -> Any:
    return compiled("fqdn", "|".join(f"(?:{_pattern(text)})" for text in value))


def node_pattern(text: str) -> Any:
    """Return the expression of [cluster/]node."""
    cluster, _, node = text.rpartition("/")
    if not text or "/" in cluster:
        raise FilterError(f"invalid node name pattern {text!r}: must be [cluster/]node")
    any_name = "[-.0-9a-z]*"
    parts = (_pattern(cluster) if cluster else any_name, _pattern(node) if node else any_name)
    return compiled("node_name", "/".join(parts))
