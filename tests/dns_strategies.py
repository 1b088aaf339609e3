"""DNS messages for hypothesis: valid ones made by dnspython, and what goes wrong with them."""

import ipaddress

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from hypothesis import strategies as st

LABELS = [b"www", b"MyBlobStorage", b"com", b"a", b"b-c", b"_tcp", b"x" * 63, b"Cluster", b"local"]
TYPES = ["A", "AAAA", "CNAME", "TXT", "MX", "SRV", "ANY", "HTTPS"]


def names(extra: bool = True) -> st.SearchStrategy[dns.name.Name]:
    """Names of few distinct labels; extra: with bytes of any kind."""
    label = st.sampled_from(LABELS)
    if extra:
        label |= st.binary(min_size=1, max_size=12)
    some = st.lists(label, max_size=5).filter(lambda labels: sum(map(len, labels)) < 240)
    return some.map(lambda labels: dns.name.Name([*labels, b""]))


@st.composite
def queries(draw) -> bytes:
    """A query, with EDNS or without."""
    kind = draw(st.sampled_from(TYPES))
    message = dns.message.make_query(draw(names()), kind, use_edns=draw(st.sampled_from([-1, 0])))
    message.id = draw(st.integers(0, 65535))
    return message.to_wire(max_size=65535)


def _rdata(kind: str, text: str) -> dns.rdata.Rdata:
    return dns.rdata.from_text("IN", kind, text)


@st.composite
def answers(draw) -> bytes:
    """An answer: a chain of names with addresses at its end, other records among them."""
    asked = draw(names())
    query = dns.message.make_query(asked, draw(st.sampled_from(["A", "AAAA"])))
    message = dns.message.make_response(query)
    message.id = draw(st.integers(0, 65535))
    message.set_rcode(draw(st.sampled_from([0, 0, 0, 0, 2, 3, 5])))
    pieces, owner = [], asked
    for _ in range(draw(st.integers(0, 4))):
        target = draw(names())
        pieces.append(_one(draw, owner, "CNAME", target.to_text()))
        owner = target
    for _ in range(draw(st.integers(0, 4))):
        where = draw(st.sampled_from([owner] * 6 + [asked, dns.name.from_text("evil.example.")]))
        if draw(st.booleans()):
            pieces.append(_one(draw, where, "A", str(draw(st.ip_addresses(v=4)))))
        else:
            pieces.append(_one(draw, where, "AAAA", str(draw(st.ip_addresses(v=6)))))
    if draw(st.booleans()):
        pieces.append(_one(draw, owner, "TXT", '"text"'))
    if draw(st.integers(0, 3)) == 0:
        pieces = draw(st.permutations(pieces))
    message.answer = pieces
    message.additional = [_one(draw, draw(names()), "A", "192.0.2.66")] * draw(st.integers(0, 1))
    return message.to_wire(max_size=65535)


def _one(draw, owner: dns.name.Name, kind: str, text: str) -> dns.rrset.RRset:
    ttl = draw(st.sampled_from([0, 1, 5, 300, 86400, 2**31 - 1]))
    found = dns.rrset.RRset(owner, dns.rdataclass.IN, dns.rdatatype.from_text(kind))
    found.add(_rdata(kind, text), ttl)
    return found


@st.composite
def mutated(draw, messages: st.SearchStrategy[bytes]) -> bytes:
    """A message with some bytes overwritten, cut, or pointing somewhere."""
    data = bytearray(draw(messages))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data) - 1))
        data[at] = draw(st.sampled_from([0, 1, 63, 64, 0xC0, 0xC0, 0xFF]) | st.integers(0, 255))
        if data[at] == 0xC0 and at + 1 < len(data):
            data[at + 1] = draw(st.integers(0, min(255, len(data))))
    return bytes(data[: draw(st.just(len(data)) | st.integers(0, len(data)))])


def anything() -> st.SearchStrategy[bytes]:
    """Messages of every kind."""
    valid = queries() | answers()
    return mutated(valid) | valid | st.binary(max_size=80)


def oracle(data: bytes) -> tuple[list[tuple[int, int]], int, int] | None:
    """Where dnspython says an answer leads: addresses in any order, CNAMEs, TTL; None: nowhere.

    None also for what its author would not call valid: several CNAMEs of one name, a loop.
    """
    message = dns.message.from_wire(data, one_rr_per_rrset=True)
    asked = message.question[0].name
    found, ttl, owner, seen = [], 2**31 - 1, asked, set()
    while owner not in seen:
        seen.add(owner)
        mine = [one for one in message.answer if one.name == owner and one.rdclass == 1]
        ttl = min([ttl, *(one.ttl for one in mine if one.rdtype in (1, 5, 28))])
        addresses = [one for one in mine if one.rdtype in (1, 28)]
        cnames = [one for one in mine if one.rdtype == 5]
        if len(cnames) > 1 or (cnames and addresses):
            return None
        for one in addresses:
            value = ipaddress.ip_address(one[0].address)
            found.append((value.version, int(value)))
        if not cnames:
            return found, len(seen) - 1, ttl
        owner = cnames[0][0].target
    return None
