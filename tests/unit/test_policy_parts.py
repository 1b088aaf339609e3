"""The small parts of the policy engine: matching, labels, chains, prefixes, the book of rules."""

import itertools
from ipaddress import ip_address, ip_network
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.objects.core import Namespace, Pod
from dataplane.objects.policies import ANY_PROTOCOL, INGRESS, PortMatch, Rule
from dataplane.objects.selectors import ABSENT, EXISTS, IN, NOT_IN, Requirement, selector
from dataplane.policy import parts, rulebook
from dataplane.policy.chains import ALLOW, DENY, LOG, chain, codes, prefixes
from dataplane.policy.labels import hashed, namespace_labels, pod_labels, relevant
from dataplane.policy.match import LabelIndex, SelectorIndex, certain, holds, possible
from dataplane.policy.prefixes import Family, address_of, key, number_of
from dataplane.policy.rulebook import Rulebook

KEYS = ("k8s:app", "k8s:io.kubernetes.pod.namespace", "k8s:io.cilium.k8s.namespace.labels.t")
VALUES = ("a", "b", "c")

requirements = st.one_of(
    st.builds(lambda k, v, o: Requirement(k, o, tuple(sorted(v))), st.sampled_from(KEYS),
              st.sets(st.sampled_from(VALUES), min_size=1), st.sampled_from([IN, NOT_IN])),
    st.builds(lambda k, o: Requirement(k, o), st.sampled_from(KEYS),
              st.sampled_from([EXISTS, ABSENT])),
)  # fmt: skip
selectors = st.lists(requirements, max_size=3).map(selector)
labels = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES))


@settings(max_examples=200)
@given(st.lists(selectors, max_size=8), st.lists(labels, max_size=8))
def test_indexes_find_exactly_what_fits(some, sets):
    by_selector: SelectorIndex = SelectorIndex()
    by_labels: LabelIndex = LabelIndex()
    for n, one in enumerate(some):
        by_selector.add(one, n)
    for n, one in enumerate(sets):
        by_labels.add(one, n)
    for one in sets:
        met = list(by_selector.candidates(one))
        assert len(met) == len(set(met))
        fitting = {n for n, other in enumerate(some) if holds(other, one)}
        assert fitting <= set(met)
    for one in some:
        found = by_labels.find(one)
        assert sorted(found) == [n for n, other in enumerate(sets) if holds(one, other)]
    for n, _ in enumerate(some):
        by_selector.remove(n)
    assert not any(list(by_selector.candidates(one)) for one in sets)


@settings(max_examples=200)
@given(selectors, labels)
def test_an_unknown_pod_fits_certainly_possibly_or_not(one, of_pod):
    """Whatever its own label turns out to be."""
    known = {k: v for k, v in of_pod.items() if k != "k8s:app"}
    outcomes = {holds(one, {**known, "k8s:app": v}) for v in (*VALUES, "z")} | {holds(one, known)}
    if certain(one, known):
        assert outcomes == {True}
    if not possible(one, known):
        assert outcomes == {False}
    index: SelectorIndex = SelectorIndex()
    index.add(one, 1)
    if possible(one, known):
        assert list(index.candidates_of_unknown(known)) == [1]


def test_labels_that_a_pod_cannot_choose():
    given_ = namespace_labels("x", Namespace("x", {"t": "a"}))
    pod = Pod("x", "p", {"app": "a", "io.kubernetes.pod.namespace": "kube-system",
                         "io.cilium.k8s.namespace.labels.t": "b"})  # fmt: skip
    found = pod_labels(pod, given_)
    assert found["k8s:io.kubernetes.pod.namespace"] == "x"
    assert found["k8s:io.cilium.k8s.namespace.labels.t"] == "a"
    assert found["k8s:app"] == "a"
    assert namespace_labels("y", None)[
        "k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name"
    ] == "y"  # fmt: skip


@pytest.mark.parametrize(
    ("key_", "counts"),
    [
        ("k8s:app", True),
        ("k8s:app.kubernetes.io/name", True),
        ("k8s:io.kubernetes.pod.namespace", True),
        ("k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name", True),
        ("k8s:pod-template-hash", False),
        ("k8s:controller-revision-hash", False),
        ("k8s:statefulset.kubernetes.io/pod-name", False),
        ("k8s:kubernetes.io/arch", False),
        ("k8s:failure-domain.beta.kubernetes.io/zone", False),
        ("reserved:host", True),
    ],
)
def test_labels_that_make_the_number(key_, counts):
    assert (key_ in relevant({key_: "x"})) == counts


def test_the_number_is_the_same_everywhere_for_ever():
    assert hashed({"k8s:app": "a", "k8s:b": "c"}) == hashed({"k8s:b": "c", "k8s:app": "a"})
    assert hashed({"k8s:app": "a"}) == 11639998, "nodes of another version must agree"
    assert all(65536 <= hashed({"k8s:n": str(n)}) < 1 << 24 for n in range(1000))


# --- chains ---------------------------------------------------------------------------------------


def test_every_range_is_cut_into_few_prefixes():
    r = Random(1)
    ranges = [sorted(r.sample(range(65536), 2)) for _ in range(50)]
    ranges += [[0, 65535], [1, 65535], [0, 0], [65535, 65535], [1, 65534]]
    for first, last in ranges:
        found = prefixes(first, last)
        assert len(found) <= 30
        ports = itertools.chain(*(range(port, port + (1 << 16 - depth)) for port, depth in found))
        assert list(ports) == list(range(first, last + 1))
        assert all(port % (1 << 16 - depth) == 0 for port, depth in found)


def look_up(made, protocol: int, port: int, direction: int) -> int:
    """The kernel's order over a chain."""
    said = dict(zip(made.codes, made.verdicts, strict=True)) if made else {}
    turn = direction << 23
    for depth in range(16, -1, -1):
        masked = port >> 16 - depth << 16 - depth
        word = said.get(protocol << 24 | (depth + 1) << 16 | turn | masked)
        if word:
            assert made.depths >> depth & 1
            return word
    return said.get(255 << 24 | 1 << 16 | turn, 0)


matches = st.one_of(
    st.just(PortMatch(255)),
    st.builds(lambda p: PortMatch(p), st.sampled_from([6, 17])),
    st.builds(lambda p, a, n: PortMatch(p, a, a + n), st.sampled_from([6, 17]),
              st.integers(0, 40), st.integers(0, 40)),
)  # fmt: skip


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(st.lists(matches, min_size=1, max_size=3), st.booleans(), st.booleans()),
        max_size=5,
    ),
    st.sampled_from([0, 1]),
)
def test_the_first_hit_says_what_all_rules_say(rules, direction):
    parts = []
    for n, (ports, deny, log) in enumerate(rules, 1):
        some = [code for port in ports for code in codes(port, direction)]
        parts.append((some, (DENY if deny else ALLOW) | LOG * log | n << 8))
    made = chain(parts)
    for protocol, port in itertools.product((6, 17, 132), (0, 1, 7, 8, 20, 39, 40, 60, 80, 500)):
        fitting = [
            (deny, log, n)
            for n, (ports, deny, log) in enumerate(rules, 1)
            if any(one.covers(protocol, port) for one in ports)
        ]
        word = look_up(made, protocol, port, direction)
        if not fitting:
            assert word == 0
            continue
        denies = any(deny for deny, _, _ in fitting)
        assert word & 3 == (DENY if denies else ALLOW)
        assert word >> 8 in {n for deny, _, n in fitting if deny == denies}, "a rule that fits"
        if not denies and any(log for _, log, _ in fitting):
            assert word & LOG


# --- prefixes -------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 255), st.integers(24, 32)), max_size=12))
def test_the_tree_of_prefixes_is_that_of_ipaddress(some):
    family = Family(4)
    networks = {ip_network("0.0.0.0/0")}
    for last, length in some:
        network = ip_network((0x0A000000 | last, length), strict=False)
        if network not in networks:
            networks.add(network)
            family.add(*key(network))
    for last in range(0, 256, 5):
        address = ip_address(0x0A000000 | last)
        longest = max((n for n in networks if address in n), key=lambda n: n.prefixlen)
        assert family.find(int(address)).cidr == longest
        family.hold(int(address), str(address))
    for network in networks:
        inside = {node.cidr for node in family.subtree(*key(network))}
        assert inside == {n for n in networks if n.subnet_of(network)}
        held = family.inside(*key(network))
        assert held == [n for n in sorted(family.holders) if ip_address(n) in network]
    family.unhold(0x0A000000)
    assert family.inside(0x0A000000, 32) == []


def test_addresses_there_and_back():
    for text in ("10.0.0.1", "::", "::ffff:1", "fd00::1", "0.0.0.0"):
        assert address_of(*number_of(ip_address(text))) == ip_address(text)


# --- the book -------------------------------------------------------------------------------------


def test_numbers_are_kept_told_and_given_back(tmp_path):
    path = tmp_path / "rules"
    book = Rulebook(path, kept=2)
    first, second = book.number("a", '{"name": "a"}'), book.number("b", '{"name": "b"}')
    assert (first, second) == (1, 2)
    assert book.number("a", '{"name": "a"}') == 1
    book.number("a", '{"name": "other"}')
    book.identity(300, {"k8s:app": "x"})
    assert book.about(1) == {"name": "other"}
    again = Rulebook(path, kept=2)
    assert (again.number("b", '{"name": "b"}'), again.number("c", '{"name": "c"}')) == (2, 3)
    again.release(2)
    assert again.about(2) == {"name": "b"}, "flows may still name it"
    assert again.number("b", '{"name": "b"}') == 2, "it is back"
    for name in "def":
        again.number(name, "{}")
    again.release_all_but([1])
    again.flush()
    assert len(again) == 1
    assert again.about(2) is None, "only the last ones that went are kept"
    assert again.number("new", "{}") in (2, 3, 4)
    again.close()
    reader = rulebook.read(path)
    assert rulebook.attributions(reader, [1, 99]) == {1: {"name": "other"}}
    assert rulebook.labels(reader, [300]) == {300: {"k8s:app": "x"}}
    assert rulebook.attributions(rulebook.read(tmp_path / "none"), [1]) == {}


def test_a_damaged_book_is_made_anew(tmp_path):
    path = tmp_path / "rules"
    path.write_bytes(b"this is no database" * 100)
    book = Rulebook(path)
    assert book.number("a", "{}") == 1
    assert book.about(1) == {}


def test_numbers_come_to_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(rulebook, "NUMBER_MOST", 2)
    book = Rulebook(tmp_path / "rules")
    book.number("a", "{}"), book.number("b", "{}")
    with pytest.raises(OverflowError, match="2 rules have numbers"):
        book.number("c", "{}")


@pytest.mark.parametrize(
    ("peers", "ports", "cilium"),
    [
        (None, None, "ALL"),
        ((), None, "L3_ONLY"),
        ((), (PortMatch(6, 80, 80),), "L3_L4"),
        (None, (PortMatch(6, 80, 80),), "L4_ONLY"),
        (None, (PortMatch(6, name="http"),), "L4_ONLY"),
        ((), (PortMatch(6),), "L3_PROTO"),
        (None, (PortMatch(17), PortMatch(6)), "PROTO_ONLY"),
        ((), (PortMatch(ANY_PROTOCOL),), "L3_ONLY"),
    ],
)
def test_by_what_a_rule_fits_in_ciliums_numbers(peers, ports, cilium):
    rule = Rule(INGRESS, "ingress", 0, False, peers, ports)
    assert parts.match_type(rule) == getattr(parts, cilium)
