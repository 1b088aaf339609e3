"""Flags of `penstock observe`: they are Hubble's, and what cannot be says what can."""

import time
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from click.testing import CliRunner

from dataplane.cli.main import main
from dataplane.cli.observe import _request, observe
from dataplane.observe import moments
from dataplane.observe.filters import FilterError


def shown(*words: str) -> str:
    """The question that flags make, as text."""
    made = observe.make_context("observe", list(words))
    return " ".join(str(_request(made.params)).split())


def test_flags_about_either_end_are_two_filters():
    assert shown("--pod", "shop/web", "--verdict", "DROPPED") == (
        'number: 20 whitelist { source_pod: "shop/web" verdict: DROPPED } '
        'whitelist { destination_pod: "shop/web" verdict: DROPPED }'
    )
    one_end = shown("--from-pod", "shop/web", "--to-port", "80", "--last", "5")
    assert one_end == ('number: 5 whitelist { source_pod: "shop/web" destination_port: "80" }')
    assert 'source_pod: "shop/web"' in shown("--namespace", "shop", "--pod", "web")
    assert 'source_pod: "shop/"' in shown("--namespace", "shop")


def test_not_is_about_the_flag_behind_it():
    text = shown("--not", "--protocol", "udp", "--protocol", "tcp", "--not", "-t", "drop")
    assert 'blacklist { event_type { type: 1 } protocol: "udp" }' in text
    assert 'whitelist { protocol: "tcp" }' in text


def test_how_many_by_default():
    assert shown() == shown("--last", "0") == "number: 20"
    assert shown("-f") == "follow: true"
    assert "number" not in shown("--since", "5m")
    assert shown("--first", "3") == "number: 3 first: true"
    assert shown("--all").startswith("number: 9223372036854775807")
    assert shown("-6") == "number: 20 whitelist { ip_version: IPv6 }"
    assert shown("--type", "trace:to-endpoint").endswith("{ event_type { type: 4 match_sub_type: "
                                                         "true } }")  # fmt: skip
    world = shown("--from-identity", "world")
    assert "source_identity: 2 source_identity: 9 source_identity: 10" in world
    assert "tcp_flags { SYN: true ACK: true }" in shown("--tcp-flags", "SYN,ACK")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--verdict", "NO"), "FORWARDED"),
        (("--drop-reason-desc", "NO"), "POLICY_DENIED"),
        (("--identity", "nobody"), "world"),
        (("--type", "what"), "policy-verdict"),
        (("--type", "drop:what"), "sub-type"),
        (("--ip", "10.0"), "10.0"),
        (("--since", "tomorrow"), "tomorrow"),
        (("--tcp-flags", "SIN"), "SYN"),
        (("--not",), "a flag must follow"),
        (("--not", "--not", "--pod", "a"), "a flag must follow"),
        (("--pod", "a", "--from-pod", "b"), "exclude each other"),
        (("-n", "shop", "--pod", "ops/web"), "not in namespace shop"),
        (("-n", "shop", "-A"), "exclude each other"),
        (("--first", "1", "--last", "1"), "exclude each other"),
        (("--all", "--last", "1"), "exclude each other"),
        (("-f", "-o", "table"), "it comes whole"),
        (("--field-mask", "verdict"), "-o json"),
        (("--ip-version", "5"), "v4 or v6"),
        (("--http-header", "a"), "KEY:VALUE"),
        (("--ip-trace-id", "0"), "above 0"),
        (("--allowlist", "{"), "no flow.FlowFilter"),
        (("--denylist", '{"nope": 1}'), "nope"),
    ],
)
def test_values_that_cannot_be_say_what_can(words, named):
    found = CliRunner().invoke(main, ["observe", *words])
    assert found.exit_code == 2
    assert named in found.output


def test_flags_that_people_know_from_hubble():
    assert 'source_pod: "shop/"' in shown("-n", "shop")
    assert 'source_pod: "/"' in shown("-A")
    assert 'destination_pod: "/"' in shown("--to-all-namespaces")
    both = shown("-n", "shop", "--service", "db")
    assert both == (
        'number: 20 whitelist { source_service: "shop/db" } '
        'whitelist { destination_service: "shop/db" }'
    )
    assert 'source_label: "app=web"' in shown("-l", "app=web")
    for words in (("-4",), ("--ipv4",), ("--ip-version", "v4"), ("--ip-version", "IPv4")):
        assert shown(*words) == "number: 20 whitelist { ip_version: IPv4 }", words
    assert "blacklist { ip_version: IPv6 }" in shown("--not", "-6")
    assert "encrypted: false" in shown("--unencrypted")
    assert 'http_header { key: "a" value: "b:c" }' in shown("--http-header", "a:b:c")
    assert "ip_trace_id: 7" in shown("--ip-trace-id", "7")
    assert 'cel_expression: "true"' in shown("--cel-expression", "true")
    raw = '{"source_pod": ["shop/web"]} {"verdict": ["DROPPED"]}'
    two = 'whitelist { source_pod: "shop/web" } whitelist { verdict: DROPPED }'
    assert two in shown("--allowlist", raw)
    assert "blacklist { verdict: DROPPED }" in shown("--denylist", '{"verdict": [2]}')
    assert "until" not in shown("-f", "--until", "1h")
    assert 'paths: "time" paths: "verdict"' in shown("-o", "json", "--field-mask", "time,verdict")


def test_filters_that_are_printed_can_be_given_again():
    words = ("--pod", "shop/web", "--verdict", "DROPPED", "--not", "-t", "l7")
    found = CliRunner().invoke(main, ["observe", "--print-raw-filters", *words])
    lists = yaml.safe_load(found.stdout)
    again = [word for name, some in lists.items() for one in some for word in (f"--{name}", one)]
    assert shown(*again) == shown(*words)


def test_moments():
    now = datetime(2026, 11, 25, 12, tzinfo=UTC)
    assert moments.moment("1h30m", now) == now - timedelta(minutes=90)
    assert moments.moment("250ms", now) == now - timedelta(milliseconds=250)
    assert moments.moment("2026-11-25T10:00:00Z") == datetime(2026, 11, 25, 10, tzinfo=UTC)
    for name, spell in moments.FORMATS.items():  # what is printed can be asked for
        at = datetime(2026, 11, 25, 10, 30, 5, 123456, UTC)
        read = moments.moment(spell(at, 123456000), now)
        assert abs(read - at) < timedelta(days=1), name
        if "Year" not in name:
            assert abs(read - at) < timedelta(seconds=1), name
    assert moments.moment("Dec 31 23:00:00.000", now).year == 2025, "the last one"
    assert moments.moment("2026-11-25") == datetime(2026, 11, 25, tzinfo=UTC)
    for bad in ("5 minutes ago", "99999999999d", "", "5"):
        with pytest.raises(FilterError):
            moments.moment(bad)


def test_times_are_spelt_as_go_spells_the_layouts_of_hubble(monkeypatch):
    line = '{"flow": {"IP": {"source": "10.0.0.1"}}, "time": "2026-01-05T09:03:04.120005Z"}\n'
    wanted = {
        "StampMilli": "Jan  5 09:03:04.120", "YearMonthDay": "2026-01-05",
        "YearMonthDayHour": "2026-01-05T09Z", "YearMonthDayHourMinute": "2026-01-05T09:03Z",
        "RFC3339": "2026-01-05T09:03:04Z", "RFC3339Milli": "2026-01-05T09:03:04.12Z",
        "RFC3339Micro": "2026-01-05T09:03:04.120005Z",
        "RFC3339Nano": "2026-01-05T09:03:04.120005Z",
        "RFC1123Z": "Mon, 05 Jan 2026 09:03:04 +0000",
    }  # fmt: skip
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        for name, text in wanted.items():
            for spelt in (name, name.lower()):
                words = ["observe", "--input", "-", "--time-format", spelt]
                found = CliRunner().invoke(main, words, input=line)
                assert found.stdout.startswith(f"{text}: 10.0.0.1 "), found.output
        assert moments.moment("Jan  5 09:03:04.120", datetime(2026, 2, 1, tzinfo=UTC)) == (
            datetime(2026, 1, 5, 9, 3, 4, 120000, UTC)
        )
    finally:
        monkeypatch.undo()
        time.tzset()
    found = CliRunner().invoke(main, ["observe", "--input", "-"], input='{"flow": {}}\n')
    assert found.stdout.startswith("N/A: ")
