"""DNS through all stages of a worker: what is refused, what teaches, what a policy makes of it."""

import random
import struct

import dns.message
import dns.rcode
import pytest

from dataplane.metrics.messages import families
from dataplane.tables.names import NamingOptions
from tests import worlds as w
from tests.dns_world import (
    ELSEWHERE,
    NAME,
    OTHER,
    SERVER,
    STORE,
    STORY,
    DnsWorld,
    message_of,
    question,
    response,
)
from tests.fuzz.fuzz_dns import mutate, valid
from tests.segments import Ends, ethernet, packet, tcp
from xdp.abi import value

POLICY_DENIED, UNASKED = value("REASON_POLICY_DENIED"), value("REASON_DNS_UNASKED")
ANSWERED = value("REASON_ANSWERED_DNS")
FAMILIES = pytest.mark.parametrize(("family", "kind"), [(4, "A"), (6, "AAAA")])


@pytest.fixture
def node(world):
    made = DnsWorld(world)
    yield made
    made.engine.close()


@pytest.fixture
def story(node):
    node.apply(STORY)
    return node


@FAMILIES
def test_an_answer_opens_the_way_before_the_pod_has_it(story, family, kind):
    assert not story.reaches(STORE[family])
    story.learn(NAME, f"{kind} {STORE[family]}", kind=kind, family=family)
    assert story.reaches(STORE[family], source=40001)
    assert not story.reaches(STORE[family], port=80, source=40002), "another port"
    assert not story.reaches(ELSEWHERE[family], source=40003)
    assert story.reader.addresses_of(NAME) == [STORE[family]]


@FAMILIES
def test_a_name_that_no_rule_allows_is_refused_at_once(story, family, kind):
    result = story.ask("example.org", kind, family=family, identifier=99)
    assert result.sent
    assert (result.reason, result.egress) == (ANSWERED, w.POD_A)
    message = message_of(result.frame)
    assert (message.id, message.rcode()) == (99, dns.rcode.REFUSED)
    assert message.question[0].name.to_text() == "example.org."
    at = 14 + (12 if family == 4 else 8)
    size = 4 if family == 4 else 16
    assert result.frame[at : at + size] == SERVER[family].packed
    ports = struct.unpack_from(">HH", result.frame, 14 + (20 if family == 4 else 40))
    assert ports == (53, 5000)
    event = story.reader.events()[0][-1]
    assert (event["kind"], event["name"], event["rcode"]) == ("refused", "example.org.", "REFUSED")
    about = story.engine.book.about(event["verdict"] >> 8)
    assert (about["name"], about["section"], about["index"]) == ("genai", "egress", 1)


def test_a_refusal_keeps_edns(story):
    result = story.query(question("example.org", use_edns=0, payload=4096, want_dnssec=True))
    message = message_of(result.frame)
    assert (message.edns, message.ednsflags) == (0, 0x8000)


def test_the_configuration_may_say_that_a_name_does_not_exist(story):
    story.engine.names.configure(NamingOptions(nxdomain=True))
    result = story.ask("example.org")
    assert message_of(result.frame).rcode() == dns.rcode.NXDOMAIN


@pytest.mark.parametrize("search", ["default.svc.", "svc.", ""])
def test_a_search_domain_does_not_end_the_search(story, search):
    result = story.ask(f"{NAME}.{search}cluster.local")
    assert message_of(result.frame).rcode() == dns.rcode.NXDOMAIN
    result = story.ask(f"example.org.{search}cluster.local")
    assert message_of(result.frame).rcode() == dns.rcode.REFUSED


def test_case_does_not_matter(story):
    assert story.ask("MyBlobStorage.COM").sent
    assert story.tell("mYbLOBstorage.com", f"A {STORE[4]}").sent
    assert story.reaches(STORE[4])


def test_a_chain_of_names_leads_to_the_name_that_was_asked_for(story):
    story.learn(NAME, "CNAME a.cdn.test.", f"a.cdn.test A {STORE[4]}")
    assert story.reaches(STORE[4])
    assert story.reader.names_of(STORE[4]) == [f"{NAME}."]


def test_what_is_no_answer_to_a_query_teaches_nothing(story):
    record = f"A {ELSEWHERE[4]}"
    story.tell(NAME, record)  # nobody has asked: any datagram, the pod's ingress is open
    assert story.ask(NAME).sent
    for spoofed in (
        story.tell(NAME, record, identifier=8),
        story.tell("x.cdn.example", record),
        story.tell(NAME, record, kind="AAAA"),
        story.tell(NAME, record, port=5001),
        story.tell(NAME, record, server=OTHER[4]),
        story.tell(NAME, record, server_port=54),
        story.answer(question(NAME)),
        story.answer(response(NAME, record)[:-20]),
        story.answer(b""),
    ):
        assert not spoofed.sent or not story.reader.names_of(ELSEWHERE[4])
    assert not story.reaches(ELSEWHERE[4])
    assert list(story.reader.mappings()) == []


def test_an_answer_counts_once(story):
    story.learn(NAME, f"A {STORE[4]}")
    again = story.tell(NAME, f"A {ELSEWHERE[4]}")
    assert (again.dropped, again.reason) == (True, UNASKED)
    assert not story.reaches(ELSEWHERE[4])


def test_an_error_teaches_nothing(story):
    story.learn(NAME, f"A {STORE[4]}", rcode=2)
    assert not story.reaches(STORE[4])
    assert story.reader.name(NAME)["failures"] == 1


def test_time_ends_an_address_and_a_live_connection_keeps_it(story):
    story.learn(NAME, f"A {STORE[4]}", ttl=30)
    story.learn(NAME, f"A {ELSEWHERE[4]}", ttl=30)
    assert story.reaches(STORE[4], source=40001)
    answer = Ends(STORE[4], 443, w.POD4[1], 40001)
    assert story.world.one(w.UPLINK, tcp(answer, 0x12)).sent
    for _ in range(20):
        story.wait(10)
        story.sweep()
    assert story.reader.addresses_of(NAME) == [STORE[4]]
    assert story.reaches(STORE[4], source=40002), "it is in use"
    assert not story.reaches(ELSEWHERE[4], source=40003)
    assert story.reader.notes()["expired"] == 1


def test_the_least_time_to_live_holds(story):
    story.engine.names.configure(NamingOptions(least_s=600, grace_s=0))
    story.learn(NAME, f"A {STORE[4]}", ttl=0)
    story.wait(590)
    assert story.reaches(STORE[4], source=40001)


def test_names_are_the_nodes_or_the_identitys(story):
    also = STORY.replace("genai", "free")
    story.apply(also, "free")
    story.learn(NAME, f"A {STORE[4]}")
    assert story.reaches(STORE[4], pod=w.POD_B)
    story.engine.names.configure(NamingOptions(by_identity=True))
    story.learn("a.cdn.example", f"A {ELSEWHERE[4]}")
    assert story.reaches(ELSEWHERE[4])
    assert not story.reaches(ELSEWHERE[4], pod=w.POD_B)


def test_a_pod_without_rules_is_seen_and_teaches_nobody(story):
    assert story.ask("example.org", pod=w.POD_B).sent
    assert story.tell("example.org", "A 192.0.2.9", pod=w.POD_B).sent
    assert story.ask(NAME, pod=w.POD_B).sent
    assert story.tell(NAME, f"A {ELSEWHERE[4]}", pod=w.POD_B).sent
    assert not story.reaches(ELSEWHERE[4]), "who has a server of his own could open any address"
    counted = story.reader.pods()[2]
    assert (counted["queries"], counted["answers"]) == (2, 2)
    assert story.reader.name("example.org")["queries"] == 1


def test_a_policy_that_comes_later_finds_what_was_learned(story):
    story.learn(NAME, f"A {STORE[4]}")
    story.apply(STORY.replace("443", "8443"))
    assert not story.reaches(STORE[4], source=40001)
    assert story.reaches(STORE[4], port=8443, source=40002)
    story.remove()
    story.apply(STORY.replace("myblobstorage.com}, {matchPattern", "no.example}, {matchPattern"))
    assert not story.reaches(STORE[4], source=40003)


def test_a_change_of_policy_cuts_a_live_connection(story):
    story.learn(NAME, f"A {STORE[4]}")
    assert story.reaches(STORE[4], source=40001)
    story.apply(STORY.replace("matchName: myblobstorage.com}, {matchPattern: \"*.cdn.example\"}]\n"
                              "  toPorts", "matchName: no.example}]\n  toPorts"))  # fmt: skip
    assert not story.reaches(STORE[4], source=40001)


def test_a_new_agent_finds_names_and_rules_as_they_are(story):
    story.learn(NAME, f"A {STORE[4]}")
    before = story.shm.policy_entries.copy()
    story.restart()
    assert (story.shm.policy_entries == before).all()
    assert story.reaches(STORE[4])
    assert story.ask("example.org").reason == ANSWERED


def test_deny_beats_a_name(story):
    story.learn(NAME, f"A {STORE[4]}")
    deny = f'egressDeny: [{{toCIDR: ["{STORE[4]}/32"]}}]'
    story.apply(f"endpointSelector: {{}}\n{deny}", "deny")
    assert not story.reaches(STORE[4], source=40001)


def test_a_name_does_not_lead_into_the_cluster(story):
    """Who answers DNS could else open any pod: labels decide there."""
    story.learn(NAME, f"A {w.POD4[w.POD_B]}")
    story.learn("a.cdn.example", f"A {OTHER[4]}")
    assert not story.reaches(w.POD4[w.POD_B])
    assert not story.reaches(OTHER[4])


def test_a_rule_without_names_beside_allows_any_name_and_still_teaches(story):
    story.apply(
        "endpointSelector: {matchLabels: {app: genai}}\n"
        "egress: [{toPorts: [{ports: [{port: '53', protocol: UDP}]}]}]", "any",
    )  # fmt: skip
    assert story.ask("example.org").egress == w.UPLINK
    story.learn(NAME, f"A {STORE[4]}", identifier=8)
    assert story.reaches(STORE[4])


def test_names_are_bound_to_their_rules_server(story):
    result = story.query(question(NAME), server=OTHER[4])
    assert (result.dropped, result.reason) == (True, POLICY_DENIED)


def test_what_cannot_be_read_is_not_let_through(story):
    assert message_of(story.query(b"\0\7" + bytes(10)).frame).rcode() == dns.rcode.FORMERR
    assert story.query(b"\0").dropped
    assert story.query(question(NAME)[:-3]).reason == ANSWERED
    looping = bytearray(question(NAME))
    looping[12:14] = b"\xc0\x0c"
    assert story.query(bytes(looping)).reason == ANSWERED
    assert story.reader.pods()[1]["malformed"] == 4


def test_a_query_in_fragments_is_dropped_and_an_answer_shortened(story):
    data = question(NAME)
    segment = struct.pack(">HHHH", 5000, 53, 8 + len(data), 0) + data
    whole = bytearray(packet(Ends(w.POD4[1], 5000, SERVER[4], 53), 17, segment))
    whole[6] |= 0x20  # more fragments
    whole[10:12] = bytes(2)
    from tests.naive.rewrite import completed

    first = ethernet(completed(bytes(whole), 20, 0))
    assert story.world.one(w.POD_A, first).dropped


def test_a_tcp_connection_whose_names_count_needs_the_proxy(story):
    result = story.world.one(w.POD_A, tcp(Ends(w.POD4[1], 5000, SERVER[4], 53)))
    assert (result.dropped, result.reason) == (True, value("REASON_PROXY_UNSUPPORTED"))
    assert story.world.one(w.POD_B, tcp(Ends(w.POD4[2], 5000, SERVER[4], 53))).sent


def test_missing_answers_and_retries_are_counted(story):
    assert story.ask(NAME).sent
    story.wait(1)
    assert story.ask(NAME).sent
    story.wait(6)
    story.sweep()
    story.sweep()
    counted = story.reader.pods()[1]
    assert (counted["queries"], counted["retries"], counted["missing"]) == (2, 1, 1)
    (server,) = story.reader.servers()
    assert (server["server"], server["missing"]) == (str(SERVER[4]), 1)
    event = story.reader.events()[0][-1]
    assert (event["kind"], event["name"], event["client"]) == ("missing", f"{NAME}.", "10.1.1.2")
    assert story.tell(NAME, f"A {STORE[4]}").sent, "a late answer still fits"
    assert story.reaches(STORE[4])
    assert story.reader.name(NAME)["missing"] == 1


def test_messages_are_counted_by_kind_as_hubble_has_them(story):
    story.learn(NAME, f"A {STORE[4]}", f"A {ELSEWHERE[4]}")
    story.ask(NAME, "AAAA", 8)
    story.tell(NAME, f"CNAME a.{NAME}.", f"a.{NAME}. AAAA {STORE[6]}", kind="AAAA", identifier=8)
    story.ask(NAME, "AAAA", 9)
    story.tell(NAME, kind="AAAA", identifier=9, rcode=3)
    story.ask("example.org", identifier=10)
    found = {
        (metric.name.removeprefix("hubble_dns_"), *sample.labels.values()): sample.value
        for metric in families({"genai": story.reader.kinds()[1]})
        for sample in metric.samples
    }
    assert found == {  # source, destination, rcode or type of records, type, number of addresses
        ("queries", "genai", "", "", "A", "0"): 1,
        ("queries", "genai", "", "", "AAAA", "0"): 2,
        ("queries", "genai", "", "Policy denied", "A", "0"): 1,
        ("responses", "", "genai", "No Error", "A", "2"): 1,
        ("responses", "", "genai", "No Error", "AAAA", "1"): 1,
        ("responses", "", "genai", "Non-Existent Domain", "AAAA", "0"): 1,
        ("response_types", "", "genai", "A", "A"): 2,
        ("response_types", "", "genai", "AAAA", "AAAA"): 1,
        ("response_types", "", "genai", "CNAME", "AAAA"): 1,
    }


def test_latency_is_counted_for_pod_and_server(story):
    for n in range(100):
        assert story.ask(NAME, identifier=n).sent
        story.world.now += 1_000_000 if n < 90 else 50_000_000
        assert story.tell(NAME, f"A {STORE[4]}", identifier=n).sent
    counted = story.reader.pods()[1]
    assert counted["rcodes"] == {"NOERROR": 100}
    assert 0.9 < counted["p50_ms"] < 1.3
    assert 45 < counted["p99_ms"] < 65
    (server,) = story.reader.servers()
    assert server["answers"] == 100


def test_addresses_beyond_the_cap_are_counted_not_learned(story):
    story.engine.names.configure(NamingOptions(addresses_most=3))
    records = [f"A 198.51.100.{n}" for n in range(10, 16)]
    story.learn(NAME, *records)
    assert len(story.reader.addresses_of(NAME)) == 3
    assert story.reader.notes()["name_capped"] == 3
    assert story.reader.name(NAME)["capped"] == 3
    story.wait(200)
    story.sweep()
    story.learn(NAME, *records[3:], identifier=8)
    assert [str(a) for a in story.reader.addresses_of(NAME)] == [
        f"198.51.100.{n}" for n in range(13, 16)
    ], "room that has become free is used again"


def test_an_audited_policy_lets_names_pass_and_says_so(node):
    node.apply(STORY)
    node.policies["genai"]["metadata"]["annotations"] = {"penstock.io/audit": "true"}
    assert node.update() == []
    assert node.ask("example.org").egress == w.UPLINK
    assert "audited" in node.reader.events()[0][-1]["flags"]


def test_thousands_of_addresses_of_one_name_are_one_selector(story):
    entries = int((story.shm.policy_entries["key"] != 0).sum())
    story.engine.names.configure(NamingOptions(addresses_most=5000))
    for part in range(40):
        records = [f"A 198.51.{part}.{n}" for n in range(1, 51)]
        story.learn(NAME, *records, identifier=part)
    assert len(story.reader.addresses_of(NAME)) == 2000
    assert int((story.shm.policy_entries["key"] != 0).sum()) == entries
    assert story.reader.notes()["learned"] == 2000


def test_any_message_ends_somewhere_and_only_a_good_answer_teaches(story):
    """Thousands of bad messages, as queries and as answers, through all stages."""
    r = random.Random(7)
    pool = [valid(r) for _ in range(300)]
    asked = [question(NAME, identifier=7), question("a.cdn.example", "AAAA", 7)]
    learned = 0
    for _ in range(1500):
        data = mutate(r, r.choice(pool), r.choice(pool))
        if r.random() < 0.5:
            assert story.query(r.choice(asked)).sent
            data = mutate(r, response(NAME, f"A {STORE[4]}"), r.choice(pool))
            result = story.answer(data)
        else:
            result = story.query(data)
        assert result.sent or result.dropped
        if learned != (learned := story.reader.notes()["learned"]):
            told = dns.message.from_wire(data, ignore_trailing=True, raise_on_truncation=False)
            assert (told.id, str(told.question[0].name).lower()) == (7, f"{NAME}.")
    names = {one.name for one in story.reader.mappings()}
    assert names <= {f"{NAME}.", "a.cdn.example."}
