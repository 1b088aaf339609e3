"""Names against patterns: kernel, regular expressions of Cilium's making, hashes of both sides."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels import dns_message, dns_names
from dataplane.kernels.house import kernel
from dataplane.kernels.naming import S_HASHES, S_NAME, S_OFFSETS, make_naming
from dataplane.objects.names import pattern, regexp
from dataplane.tables.names import NameWriter, hash_labels, spelled, wire
from dataplane.tables.shm import Shm
from xdp.abi import CONST

EXAMPLES = 500
SELECTORS = CONST["NAME_SELECTORS"]


@kernel
def _name_of(n, length, labels, odd, tick):
    return dns_names.name_of(n, length, labels, odd, tick)


@kernel
def _refresh(n, row):
    return dns_names.refresh(n, row)


@kernel
def _glob(pattern, length, text, count):
    return dns_names.glob(pattern, length, text, count)


class Node:
    """The tables about names, a writer, a worker's Naming."""

    def __init__(self, shm: Shm) -> None:
        self.shm, self.now = shm, 1000.0
        self.writer = NameWriter(shm, lambda: self.now)
        self.naming = make_naming(shm)
        self.tick = 5

    def hold(self, *texts: str) -> None:
        """Have these patterns and no others."""
        wanted = [pattern(text).text for text in texts]
        self.writer.keep(wanted)
        for one in wanted:
            self.writer.take(one)
        self.writer.publish()

    def row(self, labels: list[bytes]) -> int:
        """The row of a name, as a query for it would find or make it."""
        text = b"".join(bytes([len(label)]) + label.lower() for label in labels) + b"\0"
        message = b"\0" * 12 + text
        data = np.frombuffer(message + b"\0" * 8, np.uint8)
        at = self.naming.scratch.address
        packed = _read(data.ctypes.data, len(message), at + S_NAME, at + S_OFFSETS)
        length = packed >> dns_message.LENGTH_SHIFT & 0xFFFF
        odd = packed >> dns_message.ODD_SHIFT
        return _name_of(self.naming, length, len(labels), odd, self.tick)

    def fitting(self, name: str | list[bytes]) -> set[str]:
        """The patterns that a name fits."""
        row = self.row(name if isinstance(name, list) else _labels(name))
        count = _refresh(self.naming, row)
        chosen = self.shm.names[row]["selectors"][: min(count, SELECTORS)].tolist()
        texts = {number: one for one, number in self.writer.rows.items()}
        return {texts[number] for number in chosen}


@kernel
def _read(message, size, name, offsets):
    return dns_message.read_name(message, size, 12, name, offsets)


def _labels(name: str) -> list[bytes]:
    return [label.encode() for label in name.rstrip(".").split(".") if label]


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    with Shm.create(tmp_path_factory.mktemp("names")) as shm:
        yield Node(shm)


TABLE = [  # shared/reference/features.md 2.3; pkg/fqdn/matchpattern
    ("*.cilium.io", ["www.cilium.io"], ["cilium.io", "a.b.cilium.io", "www.cilium.com"]),
    ("*cilium.io", ["cilium.io", "subcilium.io"], ["www.cilium.io", "cilium.io.evil"]),
    ("sub*.cilium.io", ["sub.cilium.io", "subx.cilium.io"], ["x.sub.cilium.io", "cilium.io"]),
    ("**.cilium.io", ["a.cilium.io", "a.b.cilium.io"], ["cilium.io", "acilium.io"]),
    ("*", [".", "io", "a.b.c.d"], []),
    ("**.", ["io", "a.b"], []),
    ("*.*.svc.cluster.local", ["a.b.svc.cluster.local"], ["a.svc.cluster.local"]),
    ("**.ci*.io", ["a.cilium.io", "a.b.ci.io"], ["cilium.io", "a.b.io"]),
    ("**.*.io", ["a.b.io", "a.b.c.io"], ["b.io", "io"]),
    ("a.*.c", ["a.b.c", "a.xyz.c"], ["a.c", "a.b.b.c", "x.b.c"]),
    ("MyBlobStorage.com.", ["myblobstorage.com"], ["www.myblobstorage.com", "com"]),
    ("_foobar._tcp.cilium.io", ["_foobar._tcp.cilium.io"], ["_tcp.cilium.io"]),
    ("a**b.com", ["ab.com", "axxb.com"], ["a.b.com"]),
]


@pytest.mark.parametrize(("text", "fits", "not_fits"), TABLE, ids=[row[0] for row in TABLE])
def test_a_pattern_fits_what_cilium_says(node, text, fits, not_fits):
    node.hold(text)
    one = pattern(text)
    meant = re.compile(regexp(one))
    for name in fits:
        assert node.fitting(name) == {one.text}, name
        assert meant.fullmatch(name.rstrip(".") + ".")
    for name in not_fits:
        assert node.fitting(name) == set(), name
        assert not meant.fullmatch(name + ".")


LABELS = ["a", "b", "ab", "aab", "com", "x-y", "_z", "abab"]
STARRED = [*LABELS, "*", "a*", "*b", "a*b", "*a*b*", "**"]
names = st.lists(st.sampled_from(LABELS), max_size=5).map(".".join)


@st.composite
def patterns(draw) -> str:
    """Patterns over the same labels, so that names fit them."""
    labels = draw(st.lists(st.sampled_from(STARRED), min_size=1, max_size=4))
    literal = draw(st.lists(st.sampled_from(LABELS), max_size=3))
    deep = draw(st.sampled_from(["", "", "**.", "***."]))
    return deep + ".".join([*labels, *literal])


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(patterns(), min_size=1, max_size=12), st.lists(names, min_size=1, max_size=6))
def test_patterns_fit_as_their_regular_expressions_do(node, texts, asked):
    node.hold(*texts)
    for name in asked:
        dotted = name + "."
        expected = {one.text for one in map(pattern, texts) if re.fullmatch(regexp(one), dotted)}
        assert len(expected) <= SELECTORS
        assert node.fitting(name) == expected, (texts, name)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.text("ab*", max_size=10), st.text("ab", max_size=12))
def test_globs(text, subject):
    expected = re.fullmatch(text.replace("*", ".*"), subject) is not None
    one, other = (np.frombuffer(t.encode() + b"\0", np.uint8) for t in (text, subject))
    assert _glob(one.ctypes.data, len(text), other.ctypes.data, len(subject)) == expected


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6))
def test_both_sides_hash_alike(node, labels):
    labels = [label.lower() for label in labels]
    row = node.row(labels)
    seed = int(node.shm.naming[0]["seed"])
    assert int(node.shm.names[row]["hash"]) == hash_labels(labels, seed)
    at = node.naming.scratch.address
    hashes = np.frombuffer(
        (np.ctypeslib.as_array((np.ctypeslib.ctypes.c_ubyte * 2048).from_address(at + S_HASHES))),
        "<u8",
    )
    for n in range(len(labels) + 1):
        assert int(hashes[n]) == hash_labels(labels[n:], seed)


@pytest.mark.parametrize("label", [b"a b", b"caf\xc3\xa9", b"a.b", b"x" + bytes([0])])
def test_a_name_with_other_bytes_fits_nothing(node, label):
    node.hold("*", "*.com", "**.com")
    assert node.fitting([label, b"com"]) == set()
    assert node.fitting([b"ok", b"com"]) == {"*", "*.com", "**.com"}


def test_a_change_of_patterns_is_seen_by_names_that_stand(node):
    node.hold("a.com")
    assert node.fitting("a.com") == {"a.com"}
    node.hold("*.com")
    assert node.fitting("a.com") == {"*.com"}
    node.hold()
    assert node.fitting("a.com") == set()


def test_a_writer_that_starts_finds_the_patterns_that_stand(node):
    node.hold("a.com", "*.b.com", "**.c*.com", "*")
    again = NameWriter(node.shm)
    assert again.rows == node.writer.rows
    assert again.take("*.b.com") == node.writer.rows["*.b.com"]
    assert not again.publish()


def test_a_row_rests_before_it_is_another_patterns(node):
    node.hold("rest.com")
    row = node.writer.rows["rest.com"]
    node.hold("other.com")
    assert node.writer.rows["other.com"] != row
    node.now += 10
    node.hold("third.com", "other.com")
    assert node.writer.rows["third.com"] < node.writer.rows["other.com"]


def test_more_selectors_than_a_name_keeps_are_counted(node):
    many = [f"{'*' * (n % 2)}aaaa{'*' if n else ''}.com" for n in range(3)]
    many += [f"{'a' * n}*.com" for n in range(1, 4)] + [f"*{'a' * n}.com" for n in range(1, 4)]
    many += [f"a*{'a' * n}.com" for n in range(1, 4)] + [f"aa*{'a' * n}.com" for n in range(1, 3)]
    many += ["*.com", "**.com", "*", "*a*.com", "*aa*.com"]
    node.hold(*many)
    row = node.row([b"aaaa", b"com"])
    expected = [one for one in map(pattern, many) if re.fullmatch(regexp(one), "aaaa.com.")]
    assert _refresh(node.naming, row) == len(set(expected)) > SELECTORS


def test_an_old_name_gives_way_unless_an_address_needs_it(tmp_path):
    with Shm.create(tmp_path) as shm:
        node = Node(shm)
        node.hold("*")
        rows = {}
        for n in range(CONST["NAMES_MAX"] * 2):
            node.tick = n + 1
            label = f"n{n}".encode()
            row = node.row([label, b"com"])
            assert row >= 0
            if n % 64 == 0:
                shm.names[row]["pinned_until"] = 1 << 30
                rows[label] = row
        for label, row in rows.items():
            assert shm.names[row]["text"][1 : 1 + len(label)].tobytes() == label


def test_names_are_spelled_as_zone_files_spell_them():
    assert spelled(wire(["www", "example", "com"]) + b"\0") == "www.example.com."
    assert spelled(b"\0") == "."
    assert spelled(b"\x03a.b\x02\xff \0") == r"a\.b.\255\032."
