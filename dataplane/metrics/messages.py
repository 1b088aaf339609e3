"""DNS messages as Hubble counts them: by type, rcode and number of addresses.

Rule: what is counted was read from the workers' rings; what was overwritten before is counted as
lost, so a rate that is too low can be told from a server that is silent.

Theory. Workers count types and rcodes apart, which is exact; Hubble's metrics have them together
with what an answer has, which only the events know. A message becomes one 64-bit key; numpy counts
equal keys. penstock_dns_* have the exact counts.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from prometheus_client.core import CounterMetricFamily, Metric

from dataplane.tables.dns_events import DnsEvents
from dataplane.tables.names_view import rcode_name, type_name
from dataplane.tables.shm import Shm
from xdp.abi import value

QUERY, ANSWER, REFUSED = (value(f"DNS_EVENT_{kind}") for kind in ("QUERY", "ANSWER", "REFUSED"))
BITS = (11, 16, 8, 4, 8, 8, 1)  # of a key: port, type, rcode, kind, addresses, CNAMEs, IPv6
RCODES = {
    "NOERROR": "No Error", "FORMERR": "Format Error", "SERVFAIL": "Server Failure",
    "NXDOMAIN": "Non-Existent Domain", "NOTIMP": "Not Implemented", "REFUSED": "Query Refused",
    "YXDOMAIN": "Name Exists when it should not", "YXRRSET": "RR Set Exists when it should not",
    "NXRRSET": "RR Set that should exist does not", "NOTAUTH": "Not Authorized",
    "NOTZONE": "Name not contained in zone",
}  # fmt: skip
"""How Hubble's metrics call rcodes: IANA's descriptions (DNS parameters, RCODEs)."""
DENIED = "Policy denied"  # as a query's rcode, in Hubble's metrics


class MessageCounter:
    """Counts messages from the moment it is made."""

    def __init__(self, shm: Shm) -> None:
        """shm: the tables; read only."""
        self._events = DnsEvents(shm, behind=0)
        self._queries: Counter[tuple[str, ...]] = Counter()
        self._answers: Counter[tuple[str, ...]] = Counter()
        self._records: Counter[tuple[str, ...]] = Counter()

    @property
    def lost(self) -> int:
        """Messages that nobody could count."""
        return self._events.lost

    def take(self, owner: Callable[[int], str]) -> int:
        """Count what is new; return how much that was. owner: of a port."""
        rows = self._events.read()
        some = rows["address_count"] > 0
        six = some & ((rows["hi"][:, 0] != 0) | (rows["lo"][:, 0] >> np.uint64(32) != 0))
        columns = (
            rows["port"], rows["type"], rows["rcode"], rows["kind"], rows["address_count"],
            rows["cnames"], six,
        )  # fmt: skip
        keys, shift = np.zeros(len(rows), np.int64), 0
        for column, bits in zip(columns, BITS, strict=True):
            keys |= column.astype(np.int64) << shift
            shift += bits
        for key, count in zip(*np.unique(keys, return_counts=True), strict=True):
            self._add(int(key), int(count), owner)
        return len(rows)

    def _add(self, key: int, count: int, owner: Callable[[int], str]) -> None:
        fields = []
        for bits in BITS:
            fields.append(key & (1 << bits) - 1)
            key >>= bits
        port, kind, rcode, event, addresses, cnames, six = fields
        pod, asked = owner(port), type_name(kind)
        if event in (QUERY, REFUSED):
            said = DENIED if event == REFUSED else ""
            self._queries[pod, "", said, asked, "0"] += count
        elif event == ANSWER:
            said = rcode_name(rcode)
            self._answers["", pod, RCODES.get(said, said), asked, str(addresses)] += count
            for name, records in (("AAAA" if six else "A", addresses), ("CNAME", cnames)):
                if records:
                    self._records["", pod, name, asked] += count * records

    def collect(self) -> Iterator[Metric]:
        """Yield the families of one scrape."""
        ends = ["source", "destination"]
        for name, text, labels, counts in (
            ("queries", "DNS queries", ["rcode", "qtypes", "ips_returned"], self._queries),
            ("responses", "DNS answers", ["rcode", "qtypes", "ips_returned"], self._answers),
            ("response_types", "Records of DNS answers", ["type", "qtypes"], self._records),
        ):
            family = CounterMetricFamily(f"hubble_dns_{name}", text, labels=[*ends, *labels])
            for key, count in list(counts.items()):
                family.add_metric(list(key), count)
            yield family
