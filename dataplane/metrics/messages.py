"""DNS messages as Hubble counts them: by type, rcode and number of addresses.

Rule: counts are the forwarder's, so none is missing, however many there are and whoever was away.

Theory. Hubble's metrics have type, rcode and records of a message together. Workers count messages
that are alike by one 64-bit key (struct dns_kind, kernels/dns_count.py); a scrape takes the keys
apart. A pod has DNS_KINDS of them, the last ones for all others.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, Metric

from dataplane.tables.names_view import rcode_name, type_name
from xdp.abi import CONST, value

QUERY, ANSWER, REFUSED = (value(f"DNS_EVENT_{kind}") for kind in ("QUERY", "ANSWER", "REFUSED"))
FIELDS = tuple(
    (CONST[f"DNS_KIND_{name}"], (1 << bits) - 1)
    for name, bits in (
        ("TYPE", 16), ("RCODE", 8), ("EVENT", 8), ("ADDRESSES", 8), ("CNAMES", 8), ("SIX", 1),
    )
)  # fmt: skip
OTHER = "other"  # as a type, in Hubble's metrics: of the messages that are counted together
RCODES = {
    "NOERROR": "No Error", "FORMERR": "Format Error", "SERVFAIL": "Server Failure",
    "NXDOMAIN": "Non-Existent Domain", "NOTIMP": "Not Implemented", "REFUSED": "Query Refused",
    "YXDOMAIN": "Name Exists when it should not", "YXRRSET": "RR Set Exists when it should not",
    "NXRRSET": "RR Set that should exist does not", "NOTAUTH": "Not Authorized",
    "NOTZONE": "Name not contained in zone",
}  # fmt: skip
"""How Hubble's metrics call rcodes: IANA's descriptions (DNS parameters, RCODEs)."""
DENIED = "Policy denied"  # as a query's rcode, in Hubble's metrics


def families(kinds: Mapping[str, Mapping[int, int]]) -> Iterator[Metric]:
    """Yield Hubble's metrics of DNS. kinds: by pod, counts by the key of struct dns_kind."""
    queries: Counter[tuple[str, ...]] = Counter()
    answers: Counter[tuple[str, ...]] = Counter()
    records: Counter[tuple[str, ...]] = Counter()
    for pod, counts in kinds.items():
        for key, count in counts.items():
            kind, rcode, event, addresses, cnames, six = (key >> at & most for at, most in FIELDS)
            asked = OTHER if key & CONST["DNS_KIND_OTHER"] else type_name(kind)
            if event in (QUERY, REFUSED):
                said = DENIED if event == REFUSED else ""
                queries[pod, "", said, asked, "0"] += count
            elif event == ANSWER:
                said = "" if asked == OTHER else rcode_name(rcode)
                answers["", pod, RCODES.get(said, said), asked, str(addresses)] += count
                for name, some in (("AAAA" if six else "A", addresses), ("CNAME", cnames)):
                    if some:
                        records["", pod, name, asked] += count * some
    ends = ["source", "destination"]
    for name, text, labels, found in (
        ("queries", "DNS queries", ["rcode", "qtypes", "ips_returned"], queries),
        ("responses", "DNS answers", ["rcode", "qtypes", "ips_returned"], answers),
        ("response_types", "Records of DNS answers", ["type", "qtypes"], records),
    ):
        family = CounterMetricFamily(f"hubble_dns_{name}", text, labels=[*ends, *labels])
        for values, count in found.items():
            family.add_metric(list(values), count)
        yield family
