"""What stands of names in shared memory: over a reboot, at its limits, as people read it."""

import json
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.engine.names import FILE, Names
from dataplane.engine.worker import make_tables
from dataplane.kernels.dns_count import count_kind, kind_of, latency_bucket
from dataplane.kernels.house import kernel
from dataplane.kernels.rows import Rows
from dataplane.objects.policies import EGRESS, PortMatch
from dataplane.policy.chains import (
    DENY,
    LOG,
    NAMES,
    NAMES_ONLY,
    chain,
    codes,
    everything,
    naming,
    word,
)
from dataplane.tables.names import NameWriter, wire
from dataplane.tables.names_view import ENDS, NameReader, percentile
from dataplane.tables.shm import Shm
from xdp.abi import CONST, DTYPE, value

ALLOWED = word(False, 0, False, 7)
RESTRICTED = ALLOWED | NAMES | NAMES_ONLY
DNS_PORT = PortMatch(17, 53, 53)


@kernel
def _bucket(nanoseconds):
    return latency_bucket(nanoseconds)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 45))
def test_a_time_falls_into_the_bucket_that_ends_behind_it(nanoseconds):
    bucket = _bucket(nanoseconds)
    last = len(ENDS) - 1
    assert nanoseconds < ENDS[bucket] or bucket == last
    assert bucket == 0 or nanoseconds >= ENDS[bucket - 1]


@kernel
def _kind(kinds, pod, event, asked, rcode, addresses, cnames, six):
    count_kind(kinds, pod, kind_of(event, asked, rcode, addresses, cnames, six))


EVENTS = [value(f"DNS_EVENT_{kind}") for kind in ("QUERY", "ANSWER", "REFUSED")]
KINDS = st.tuples(
    st.sampled_from(EVENTS), st.integers(0, 40), st.integers(0, 15), st.sampled_from([0, 1, 255]),
    st.sampled_from([0, 255]), st.integers(0, 1),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), KINDS), max_size=300))
def test_no_message_is_missing_in_the_counts_of_its_kind(messages):
    """A kind has its own row and the right count, or is counted with all others of its event."""
    table = np.zeros(2 * CONST["DNS_KINDS"], DTYPE["dns_kind"])
    wanted = [Counter(), Counter()]
    for pod, (event, asked, rcode, addresses, cnames, six) in messages:
        _kind(Rows(table), pod, event, asked, rcode, addresses, cnames, six)
        words = ((asked, 0), (rcode, 16), (event, 24), (addresses, 32), (cnames, 40), (six, 48))
        wanted[pod][sum(number << shift for number, shift in words)] += 1
    for mine, rows in zip(wanted, table.reshape(2, -1), strict=True):
        found = {key: count for key, count in rows.tolist() if key}
        assert len(found) == np.count_nonzero(rows["key"]), "a key has one row"
        left = Counter({key: n - found.pop(key, 0) for key, n in mine.items()})
        assert all(n == 0 or n == mine[key] for key, n in left.items()), "all of a kind or none"
        unnamed = Counter()
        for key, n in left.items():
            unnamed[CONST["DNS_KIND_OTHER"] | key & 0xFF << 24] += n
        assert +unnamed == Counter(found)


def test_percentiles_are_ends_of_buckets():
    buckets = np.zeros(len(ENDS), np.uint32)
    buckets[10], buckets[50] = 98, 2
    assert percentile(buckets, 0.5) == ENDS[10]
    assert percentile(buckets, 0.99) == ENDS[50]
    assert percentile(buckets * 0, 0.5) == 0


@pytest.fixture
def place(tmp_path):
    """Tables, and the folder of the node's state."""
    with Shm.create(tmp_path / "run") as shm:
        NameWriter(shm)
        yield shm, tmp_path / "state"


def _names(shm, state) -> Names:
    return Names(shm, make_tables(shm), [], state)


def test_names_outlive_a_reboot(place, tmp_path):
    shm, state = place
    state.mkdir()
    now = time.time()
    lines = [
        ["a.example.", "192.0.2.1", 0, now + 100],
        ["b.example.", "2001:db8::1", 4711, now + 1000],
        ["old.example.", "192.0.2.2", 0, now - 1],
        ["x" * 64 + ".example.", "192.0.2.3", 0, now + 100],
        ["bad.example.", "192.0.2.300", 0, now + 100],
    ]
    text = "\n".join(map(json.dumps, lines)) + "\nnot json\n[1]\n"
    (state / FILE).write_text(text)
    assert _names(shm, state).restored == 2
    found = {one.name: one for one in NameReader(shm).mappings()}
    assert set(found) == {"a.example.", "b.example."}
    assert str(found["b.example."].address) == "2001:db8::1"
    assert found["b.example."].scope == 4711
    assert 90 < found["a.example."].expires_s <= 101
    again = _names(shm, state)
    assert again.restored == 0, "what stands is newer than any snapshot"
    again.save()
    with Shm.create(tmp_path / "second") as second:
        NameWriter(second)
        assert _names(second, state).restored == 2


def test_what_is_full_is_told_by_its_limit(place):
    shm, state = place
    names = _names(shm, state)
    assert names.sweep() == []
    shm.dns_notes[3]["addresses_full"] += 5
    shm.dns_notes[0]["name_capped"] += 1
    told = names.sweep()
    assert len(told) == 2
    assert "LEARNED_MAX" in told[0]
    assert "5 times" in told[0]
    assert "dns.addresses_max" in told[1]
    assert names.sweep() == []


def test_events_that_were_overwritten_are_counted(place):
    shm, _ = place
    reader, seen = NameReader(shm), {}
    assert reader.events(seen) == ([], 0)
    most = CONST["DNS_EVENTS_MAX"]
    for number in range(most + 10):
        shm.dns_events[2, number % most]["sequence"] = number + 1
    shm.dns_notes[2]["events"] = most + 10
    events, lost = reader.events(seen)
    assert (len(events), lost) == (most, 10)
    assert reader.events(seen) == ([], 0)
    shm.dns_events[2, 10]["sequence"] = 0  # one that is being written
    shm.dns_notes[2]["events"] += 1
    assert reader.events(seen) == ([], 1)


def test_names_are_restricted_where_all_rules_do_and_looked_at_where_one_does():
    port = codes(DNS_PORT, EGRESS)
    some = [*port, *naming(port, (5, 6))]
    made = chain([(some, RESTRICTED)])
    assert len(made) == 3
    assert set(made.verdicts) == {RESTRICTED}
    made = chain([(some, RESTRICTED), (port, ALLOWED)])
    assert dict(zip(made.codes, made.verdicts, strict=True))[port[0]] == ALLOWED | NAMES


def test_a_wider_rule_lifts_the_restriction_of_a_narrower_one():
    port = codes(DNS_PORT, EGRESS)
    some = [*port, *naming(port, (5,))]
    made = chain([(some, RESTRICTED), (everything(EGRESS), ALLOWED)])
    found = dict(zip(made.codes, made.verdicts, strict=True))
    assert found[port[0]] == ALLOWED | NAMES
    assert found[everything(EGRESS)[0]] == ALLOWED
    wide = codes(PortMatch(17, 0, 1023), EGRESS)
    made = chain([(some, RESTRICTED), (wide, ALLOWED | LOG)])
    assert dict(zip(made.codes, made.verdicts, strict=True))[port[0]] == ALLOWED | NAMES | LOG


def test_a_deny_takes_the_names_of_its_ports_with_it():
    port = codes(DNS_PORT, EGRESS)
    denied = word(True, 0, False, 9)
    made = chain([([*port, *naming(port, (5,))], RESTRICTED), (everything(EGRESS), denied)])
    found = dict(zip(made.codes, made.verdicts, strict=True))
    assert port[0] not in found, "the deny behind it says it"
    assert found[everything(EGRESS)[0]] & 3 == DENY


def test_mappings_are_what_a_slow_reading_says(place):
    shm, _ = place
    r, count, now = np.random.default_rng(1), 300, 10**12
    tick = now >> CONST["TICK_SHIFT"]
    text = np.frombuffer(wire(["a", "example"]) + b"\0", np.uint8)
    shm.names["hash"][:count] = r.integers(1, 1 << 62, count)
    shm.names["length"][:count] = len(text)
    shm.names["text"][:count, : len(text)] = text
    rows = shm.learned[:count]
    for k in range(2):
        rows["names"][:, k] = chosen = r.integers(0, count, count)
        rows["tags"][:, k] = shm.names["hash"][chosen] >> np.uint64(32) | np.uint64(1)
        rows["expiry"][:, k] = tick + r.integers(-100, 100, count)
    rows["tags"][:50, 0] += 2  # of names that are others' by now
    rows["family"], rows["lo"] = 4, np.arange(count)
    rows["owner"] = np.where(np.arange(count) == 7, value("RECORD_CLAIMED"), value("RECORD_LIVE"))
    rows["used"] = np.where(r.random(count) < 0.3, tick - 5, 0)
    shm.learned_index[:count] = 5
    wanted = []
    for number, row in enumerate(rows):
        for k in range(2):
            fits = (int(shm.names[row["names"][k]]["hash"]) >> 32 | 1) == int(row["tags"][k])
            left = int(row["expiry"][k]) - tick
            if number != 7 and fits and (left > 0 or row["used"]):
                wanted.append((number, left <= 0))
    found = list(NameReader(shm, lambda: now).mappings())
    assert [(int(one.address), one.kept) for one in found] == wanted
    assert {one.name for one in found} == {"a.example."}
