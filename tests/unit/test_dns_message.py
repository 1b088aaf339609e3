"""The DNS parser: against dnspython where a message is valid, against its twin where it is not."""

import struct

import dns.message
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels import dns_message as d
from dataplane.kernels.house import kernel
from dataplane.kernels.rows import Rows
from tests import dns_strategies
from tests.fuzz.fuzz_dns import fuzz
from tests.naive import dns as twin

EXAMPLES = 600
MOST = 512


@kernel
def _read(message, size, at, name, offsets):
    return d.read_name(message, size, at, name, offsets)


@kernel
def _addresses(message, size, at, records, question, found, most):
    return d.addresses(message, size, at, records, question, found, most)


class Parser:
    """The kernels over buffers that are just long enough."""

    def __init__(self) -> None:
        self.name, self.offsets = np.zeros(264, np.uint8), np.zeros(128, np.uint8)
        self.found = np.zeros(MOST, d.ADDRESS)

    def read(self, data: bytes, at: int = 12):
        """(wire, labels, odd, end), None when it is malformed."""
        message = np.frombuffer(data + b"\xa5" * 8, np.uint8)
        packed = _read(message.ctypes.data, len(data), at, self.name.ctypes.data,
                       self.offsets.ctypes.data)  # fmt: skip
        if packed < 0:
            return None
        length = packed >> d.LENGTH_SHIFT & 0xFFFF
        labels = packed >> d.LABELS_SHIFT & 0xFF
        offsets = self.offsets[:labels].tolist()
        starts = list(_starts(self.name[:length].tobytes()))[:-1]
        assert offsets == starts
        odd = bool(packed >> d.ODD_SHIFT)
        return self.name[:length].tobytes(), labels, odd, packed & d.END_MASK

    def addresses(self, data: bytes, at: int, records: int):
        """(addresses, cnames, ttl), None when it is malformed."""
        message = np.frombuffer(data + b"\xa5" * 8, np.uint8)
        packed = _addresses(message.ctypes.data, len(data), at, records, 12, Rows(self.found), MOST)
        if packed < 0:
            return None
        count = packed & d.FOUND_MASK
        found = [
            (int(one["family"]), int(one["hi"]) << 64 | int(one["lo"]))
            for one in self.found[:count]
        ]
        return found, packed >> d.CNAMES_SHIFT & 0xFF, packed >> d.TTL_SHIFT


def _starts(wire: bytes):
    at = 0
    while at < len(wire):
        yield at
        at += 1 + wire[at]


@pytest.fixture(scope="module")
def parser():
    return Parser()


@settings(max_examples=EXAMPLES, deadline=None)
@given(dns_strategies.queries() | dns_strategies.answers())
def test_a_valid_question_is_read_as_dnspython_reads_it(parser, data):
    asked = dns.message.from_wire(data).question[0]
    wire, labels, _, end = parser.read(data)
    assert wire == asked.name.canonicalize().to_wire()
    assert labels == len(asked.name.labels) - 1
    assert struct.unpack_from(">H", data, end)[0] == asked.rdtype


@settings(max_examples=EXAMPLES, deadline=None)
@given(dns_strategies.answers())
def test_a_valid_answer_leads_where_dnspython_says(parser, data):
    expected = dns_strategies.oracle(data)
    asked = twin.question(data)
    found = parser.addresses(data, asked.end, asked.records)
    if expected is not None:
        addresses, cnames, ttl = found
        assert sorted(addresses) == sorted(expected[0])
        if addresses:
            assert (cnames, ttl) == expected[1:]


@settings(max_examples=EXAMPLES * 4, deadline=None)
@given(dns_strategies.anything())
def test_any_message_is_read_as_its_twin_reads_it(parser, data):
    check(parser, data)


def check(parser: Parser, data: bytes) -> None:
    """Compare parser and twin."""
    try:
        asked = twin.question(data)
    except twin.Malformed:
        read = parser.read(data) if len(data) >= 12 else None
        assert read is None or read[3] + 4 > len(data) or data[4:6] != b"\0\1"
        return
    assert parser.read(data) == (
        asked.name.wire, len(asked.name.labels), asked.name.odd, asked.end - 4
    )  # fmt: skip
    try:
        expected = twin.leads_to(data, asked)
    except twin.Malformed:
        assert parser.addresses(data, asked.end, asked.records) is None
        return
    found = parser.addresses(data, asked.end, asked.records)
    assert found == (expected.addresses, expected.cnames, expected.ttl)


def _message(records: int, body: bytes) -> bytes:
    return struct.pack(">6H", 1, 0x8180, 1, records, 0, 0) + body


NAME = b"\x01a\x01b\x00"
QUESTION = NAME + b"\0\x01\0\x01"


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("a pointer to itself", _message(0, b"\xc0\x0c\0\1\0\1")),
        ("a pointer ahead", _message(0, b"\xc0\x20\0\1\0\1" + b"\0" * 40)),
        ("a pointer into the header", _message(0, b"\1a\xc0\x04\0\1\0\1")),
        ("two that point at each other", _message(0, b"\1a\xc0\x10\1b\xc0\x0c\0\1\0\1")),
        ("a label of 64", _message(0, b"\x40" + b"a" * 64 + b"\0\0\1\0\1")),
        ("the name of a kind that never was", _message(0, b"\x80a\0\0\1\0\1")),
        ("no end", _message(0, b"\1a\1b")),
        ("256 bytes", _message(0, (b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1")),
    ],
)
def test_a_bad_name_is_malformed(parser, what, data):
    assert parser.read(data) is None, what
    check(parser, data)


def test_a_name_of_255_bytes_is_good(parser):
    body = (b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"b" * 61 + b"\0\0\1\0\1"
    assert parser.read(_message(0, body))[0] == body[:-4]
    body = b"\1a" * 127 + b"\0\0\1\0\1"
    assert parser.read(_message(0, body))[1] == 127


def _record(owner: bytes, kind: int, data: bytes, ttl: int = 60, klass: int = 1) -> bytes:
    return owner + struct.pack(">HHIH", kind, klass, ttl, len(data)) + data


CHAIN = [_record(b"\xc0\x0c", 5, b"\x01c\x00"), _record(b"\x01c\x00", 1, bytes([192, 0, 2, 1]))]
LOOP = [_record(b"\xc0\x0c", 5, b"\x01c\x00"), _record(b"\x01C\x00", 5, b"\xc0\x0c")]


def _leads(parser: Parser, records: list[bytes]):
    data = _message(len(records), QUESTION + b"".join(records))
    check(parser, data)
    return parser.addresses(data, 12 + len(QUESTION), len(records))


def test_the_order_of_a_chain_does_not_matter(parser):
    assert _leads(parser, CHAIN) == ([(4, 0xC0000201)], 1, 60)
    assert _leads(parser, CHAIN[::-1]) == ([(4, 0xC0000201)], 1, 60)


def test_a_loop_of_cnames_leads_nowhere(parser):
    assert _leads(parser, LOOP)[0] == []
    assert _leads(parser, LOOP[::-1])[0] == []
    assert _leads(parser, [_record(b"\xc0\x0c", 5, b"\xc0\x0c")])[0] == []


def test_a_chain_has_an_end(parser):
    names = [b"\xc0\x0c", *(bytes([1, 97 + n, 0]) for n in range(20))]
    chain = [_record(names[n], 5, names[n + 1]) for n in range(17)]
    assert _leads(parser, chain[:16]) == ([], 16, 60)
    assert _leads(parser, chain) is None


def test_what_is_not_of_the_chain_does_not_count(parser):
    other = _record(b"\x04evil\x00", 1, bytes([6, 6, 6, 6]))
    assert _leads(parser, [other]) == ([], 0, 2**31 - 1)
    assert _leads(parser, [other, *CHAIN])[0] == [(4, 0xC0000201)]
    chaos = _record(b"\xc0\x0c", 1, bytes([6, 6, 6, 6]), klass=3)
    assert _leads(parser, [chaos])[0] == []


def test_an_address_of_the_wrong_length_spoils_the_answer(parser):
    assert _leads(parser, [*CHAIN, _record(b"\xc0\x0c", 1, b"\1\2\3")]) is None
    assert _leads(parser, [*CHAIN, _record(b"\xc0\x0c", 28, b"\1\2\3\4")]) is None


def test_more_records_than_there_are_spoil_the_answer(parser):
    data = _message(3, QUESTION + b"".join(CHAIN))
    check(parser, data)
    assert parser.addresses(data, 12 + len(QUESTION), 3) is None


def test_a_time_to_live_with_the_highest_bit_is_none(parser):
    assert _leads(parser, [_record(b"\xc0\x0c", 1, b"\1\2\3\4", ttl=1 << 31)])[2] == 0


def test_a_large_answer_is_counted_beyond_what_is_noted(parser):
    records = [_record(b"\xc0\x0c", 1, struct.pack(">I", n)) for n in range(MOST + 88)]
    data = _message(len(records), QUESTION + b"".join(records))
    message = np.frombuffer(data, np.uint8)
    packed = _addresses(
        message.ctypes.data, len(data), 12 + len(QUESTION), len(records), 12, Rows(parser.found),
        MOST,
    )  # fmt: skip
    assert packed & d.FOUND_MASK == MOST + 88
    assert parser.found["lo"].tolist() == list(range(MOST))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_nothing_is_read_behind_a_message(parser, data):
    """The same bytes at the very end of a mapped page, with nothing behind it."""
    page = np.frombuffer(_guarded(), np.uint8)
    place = page[4096 - len(data) : 4096]
    place[:] = np.frombuffer(data, np.uint8)
    at = place.ctypes.data if data else page.ctypes.data + 4096
    name, offsets = parser.name.ctypes.data, parser.offsets.ctypes.data
    _read(at, len(data), min(12, len(data)), name, offsets)
    _addresses(at, len(data), min(12, len(data)), 5, 0, Rows(parser.found), MOST)


def _guarded():
    import mmap

    return _PAGES[0] if _PAGES else _PAGES.append(_map(mmap)) or _PAGES[0]


def _map(mmap):
    import ctypes

    pages = mmap.mmap(-1, 8192)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + 4096), 4096, 0)
    return pages


_PAGES: list = []


def test_a_few_thousand_of_the_fuzzers_messages():
    """`make fuzz` has ten million."""
    assert fuzz(4000, seed=11) > 2000
