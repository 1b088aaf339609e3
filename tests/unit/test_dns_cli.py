"""`penstock dns` and `fqdn`: orders that mean something, and questions that are none."""

import json

import pytest
from click.testing import CliRunner

from dataplane.cli.dns import _plain
from dataplane.cli.main import main
from dataplane.tables.shm import Shm


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with Shm.create(folder) as shm:
        for row, (used, queries, errors) in enumerate([(1, 1, 0), (8, 9, 1), (9, 5, 4)]):
            one = shm.dns_pods[0, row]
            one["used"], one["queries"] = used, queries
            one["rcodes"][0], one["rcodes"][2] = queries - errors, errors
            one["answers"] = queries
        yield folder


def ask(run_dir, *words: str):
    return CliRunner().invoke(main, [*words, "--run-dir", str(run_dir)])


def test_pods_by_errors_and_those_without_a_row(run_dir):
    found = json.loads(
        ask(run_dir, "dns", "top", "--by", "pod", "--sort", "failures", "-o", "json").stdout
    )
    assert [(row["pod"], row["failures"]) for row in found] == [("8", 4), ("7", 1), ("others", 0)]
    assert ask(run_dir, "dns", "top", "-n", "-1").exit_code == 2
    table = ask(run_dir, "dns", "top", "--by", "pod", "-n", "1").stdout
    assert "NOERROR:8 SERVFAIL:1" in table


def test_a_query_has_no_rcode_and_no_latency_yet():
    rows = [
        {"kind": kind, "rcode": "NOERROR", "latency_ms": 1.0}
        for kind in ("query", "answer", "missing", "refused")
    ]
    shown = [(row["rcode"], row["latency_ms"]) for row in _plain(rows, "table")]
    assert shown == [("", ""), ("NOERROR", "1.00"), ("", "1.00"), ("NOERROR", "")]
    assert _plain(rows, "json") == rows


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("11.2.0.1", "--pod", "shop/web"), "`penstock policy why shop/web 11.2.0.1 443/tcp`"),
        (("", "--pod", "shop/web"), "empty"),
        ((".", "--pod", "shop/web"), "empty"),
        (("a.example", "--port", "http"), "'http' is not PORT/PROTOCOL"),
        (("a.example", "--port", "99999/tcp"), "not PORT/PROTOCOL"),
        (("a.example", "--pod", "web"), "named NAMESPACE/POD"),
    ],
)
def test_what_is_no_question_says_what_is_one(run_dir, words, said):
    found = ask(run_dir, "fqdn", "why", *words)
    assert found.exit_code == 2
    assert said in " ".join(found.stderr.split())
