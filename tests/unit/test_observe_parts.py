"""Parts of observing: flags, selectors, lines, files, the store; each by itself."""

import json
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from google.protobuf import json_format

from dataplane.cli.main import main
from dataplane.observe import history, selectors
from dataplane.observe import lines as text
from dataplane.observe.columns import FIELDS, NOBODY, Columns, joined
from dataplane.observe.directory import Directory, End
from dataplane.observe.filters import Filter
from dataplane.observe.history import History, HistoryError, Origin, Past, PastBook
from dataplane.observe.past import answers
from dataplane.observe.printer import Printer
from dataplane.observe.protocol import message
from dataplane.observe.query import Question, search
from dataplane.observe.store import CHUNK, Store
from xdp.abi import CONST, value

NEW, DROP, CHANGE, END = (value(f"EVENT_{name}") for name in ("NEW", "DROP", "CHANGE", "END"))
BOOK = PastBook(
    {
        "labels": {"70001": ["k8s:app=web"]},
        "rules": {"9": {"kind": "NetworkPolicy", "namespace": "shop", "name": "db"}},
        "services": {"3": ["shop", "database"]},
        "devices": {"1": [11, "pst1"]},
    }
)
WHO = Directory()
WEB = WHO.number(End("shop", "web", number=1, node="n1"))
DB = WHO.number(End("shop", "db", node="n2"))


def flows(*rows: dict) -> Columns:
    """Columns of flows from shop/web to shop/db."""
    arrays = {name: np.zeros(len(rows), dtype) for name, dtype in FIELDS.items()}
    for at, row in enumerate(rows):
        base = {"family": 4, "protocol": 6, "kind": NEW, "source_lo": 0x0A010002, "packets": 1,
                "target_lo": 0x0A010102, "source_port": 40000, "target_port": 80, "tcp": 2,
                "source_end": WEB, "target_end": DB, "source_identity": 70001, "port": 1,
                "target_identity": 70002, "wall_ns": 1_700_000_000_000_000_000 + at,
                "position": at}  # fmt: skip
        for name, number in (base | row).items():
            arrays[name][at] = number
    return Columns(arrays, len(rows))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "flows"


def writer(folder, most_bytes=1 << 30, most_s=3600.0) -> History:
    return History(folder, most_bytes, most_s, Origin(WHO, BOOK, "n1", 7))


# --- files ----------------------------------------------------------------------------------------


def test_a_file_holds_all_that_its_flows_mean(folder):
    some = flows({"egress_rule": 9 << 8 | 1, "service": 3}, {"kind": DROP, "target_end": NOBODY})
    made = writer(folder)
    made.add(some)
    made.flush()
    (path,) = history.files(folder)
    past = Past(path)
    assert past.flows.count == 2
    for name in FIELDS:
        if name not in ("source_end", "target_end"):
            assert (getattr(past.flows, name) == getattr(some, name)).all(), name
    assert past.directory.end(int(past.flows.source_end[0])) == WHO.end(WEB)
    assert int(past.flows.target_end[1]) == NOBODY
    assert past.book.labels(70001) == ["k8s:app=web"]
    assert past.book.rule(9 << 8 | 1)["name"] == "db"
    assert past.book.service(3) == ("shop", "database")
    assert past.book.device(1) == (11, "pst1")
    assert (past.node, past.epoch) == ("n1", 7)
    assert pq.read_table(path)["source_end"].to_pylist() == ["shop/web", "shop/web"]


def test_files_rotate_by_size_and_by_age(folder):
    made = writer(folder)
    for n in range(5):
        made.add(flows({"wall_ns": (n + 1) * 1000, "position": n}))
        made.flush()
    size = history.files(folder)[0].stat().st_size
    assert len(history.files(folder)) == 5
    made = writer(folder, most_bytes=size * 3 + size // 2)
    made.add(flows({"wall_ns": 9000, "position": 5}))
    made.flush()
    assert [path.name[:26] for path in history.files(folder)] == [
        f"flows-{n:020}" for n in (4000, 5000, 9000)
    ]
    made = writer(folder, most_s=0.0)
    time.sleep(0.01)
    made.add(flows({"position": 6}))
    made.flush()
    assert not list(folder.glob(history.PATTERN))


def test_a_crash_leaves_no_half_file_and_a_full_disk_loses_nothing(folder, monkeypatch):
    folder.mkdir()
    (folder / ".flows-1.parquet").write_bytes(b"half")
    made = writer(folder)
    assert not list(folder.iterdir())

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(history.pq, "write_table", full)
    made.add(flows({}, {}))
    made.flush()
    assert "No space left" in made.problem
    monkeypatch.undo()
    made.flush()
    assert not made.problem
    assert Past(history.files(folder)[0]).flows.count == 2


def test_an_observer_that_starts_again_writes_nothing_twice(folder):
    """It reads again what the rings hold; of another epoch they are other rings."""
    rows = [{"position": n, "ring": n % 2} for n in range(6)]

    def on_disk() -> list[int]:
        paths = history.files(folder)
        return sorted(int(n) for path in paths for n in Past(path).flows.position)

    for count in (4, 6, 6):
        made = writer(folder)
        made.add(flows(*rows[:count]))
        made.flush()
        assert on_disk() == list(range(count))
    made.add(flows({"position": 1, "ring": 2}))
    made.flush()
    assert on_disk() == [0, 1, 1, 2, 3, 4, 5], "another ring"
    made = writer(folder)
    made.add(flows({"position": 9, "ring": 0, "wall_ns": 9001}, {"position": 7, "ring": 1}))
    assert made.dropped == 4 + 1, "nobody has read these before they were overwritten"
    fresh = History(folder, 1 << 30, 3600.0, Origin(WHO, BOOK, "n1", 8))
    fresh.add(flows({**rows[0], "wall_ns": 9000}))
    fresh.flush()
    assert on_disk() == [0, 0, 1, 1, 2, 3, 4, 5], "another epoch"


def test_what_waits_for_a_disk_is_bounded_and_counted(folder, monkeypatch):
    monkeypatch.setattr(history, "WAIT_MOST", 5)
    made = writer(folder)
    for _ in range(4):
        made.add(flows({}, {}))
    assert made.dropped == 4
    made.flush()
    assert Past(history.files(folder)[0]).flows.count == 4


def test_what_is_no_file_of_flows_is_named(folder, tmp_path):
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"no")
    with pytest.raises(HistoryError, match=r"bad\.parquet"):
        Past(bad)
    with pytest.raises(HistoryError, match="no such"):
        history.files(tmp_path / "none")
    folder.mkdir()
    with pytest.raises(HistoryError, match=r"no flows-\*"):
        history.files(folder)


@pytest.mark.parametrize(
    ("asked", "numbers"),
    [
        ({"number": 2}, [8, 9]),
        ({"number": 7}, [3, 4, 5, 6, 7, 8, 9]),
        ({"number": 2, "first": True}, [0, 1]),
        ({}, list(range(10))),
        ({"since": 6}, [6, 7, 8, 9]),
        ({"since": 3, "until": 5}, [3, 4, 5]),
        ({"number": 1, "until": 4}, [4]),
        ({"number": 99, "since": 8}, [8, 9]),
    ],
)
def test_questions_over_several_files(folder, asked, numbers):
    made = writer(folder)
    for part in ((0, 4), (4, 5), (5, 10)):
        made.add(flows(*({"wall_ns": 1000 + n, "target_port": n} for n in range(*part))))
        made.flush()
    request = message("observer.GetFlowsRequest")(
        number=asked.get("number", 0), first=asked.get("first", False)
    )
    for name in ("since", "until"):
        if name in asked:
            getattr(request, name).FromNanoseconds(1000 + asked[name])
    found = [one.flow.l4.TCP.destination_port for one in answers(folder, request)]
    assert found == numbers


# --- the store ------------------------------------------------------------------------------------


def test_the_store_keeps_the_newest_and_numbers_them_for_ever():
    store = Store(2 * CHUNK)
    some = joined([flows(*({} for _ in range(1000)))])
    for _ in range(100):
        store.append(some)
    assert store.head == 100_000
    assert store.capacity <= len(store) <= store.capacity + CHUNK
    assert sum(part.count for part in store.oldest(store.tail)) == len(store)
    assert sum(part.count for part in store.newest(99_000)) == len(store) - 1000
    assert next(iter(store.oldest(90_000))).first == 90_000


def test_the_last_that_fit_are_found_over_chunks():
    store = Store(4 * CHUNK)
    for n in range(5):
        store.append(flows(*({"target_port": 100 + n if at == 7 else 80} for at in range(20000))))
    fits = Filter([message("flow.FlowFilter")(destination_port=[f"{100 + n}" for n in range(5)])],
                  [], WHO, BOOK, "n1")  # fmt: skip
    found = [
        int(port)
        for part in search(store, Question(number=3), fits, store.head)
        for port in part.flows.target_port[part.indexes]
    ]
    assert found == [102, 103, 104]


# --- selectors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "labels", "fits"),
    [
        ("app=web", ["k8s:app=web"], True),
        ("k8s:app=web", ["k8s:app=web"], True),
        ("any:app", ["k8s:app=web"], True),
        ("app!=web", ["k8s:tier=x"], True),
        ("app notin (web, db)", ["k8s:app=web"], False),
        ("!app,tier=x", ["k8s:tier=x"], True),
        ("reserved:world", ["reserved:world"], True),
        ("app==web,tier in (x)", ["k8s:app=web"], False),
        ("", ["k8s:app=web"], True),
    ],
)
def test_label_selectors(text, labels, fits):
    assert selectors.parse(text)(labels) is fits


# --- lines ----------------------------------------------------------------------------------------


def lines(folder, form: str, *rows: dict, **options) -> list[str]:
    made = writer(folder)
    made.add(flows(*rows))
    made.flush()
    request = message("observer.GetFlowsRequest")()
    return list(Printer(form, "RFC3339Milli", **options).lines(answers(folder, request)))


ROWS = (
    {"ingress_rule": 9 << 8 | 1},
    {"kind": CHANGE, "flags": CONST["EVENT_REPLY"], "tcp": 18, "source_end": DB, "target_end": WEB,
     "source_port": 80, "target_port": 40000},
    {"kind": DROP, "reason": value("REASON_POLICY_DENIED"), "egress_rule": 9 << 8, "packets": 4},
    {"kind": END, "tcp": 2, "reply_packets": 2, "protocol": 17},
)  # fmt: skip


def test_compact_lines(folder):
    new, reply, drop, end = (
        line.partition(": ")[2] for line in lines(folder, "compact", *ROWS, policies=True)
    )
    assert new == (
        "shop/web:40000 (ID:70001) -> shop/db:80 (ID:70002) policy-verdict:all INGRESS ALLOWED "
        "(TCP Flags: SYN) INGRESS ALLOWED BY NetworkPolicy shop/db"
    )
    assert reply.startswith("shop/web:40000 (ID:70002) <- shop/db:80 (ID:70001) to-")
    assert drop == (
        "shop/web:40000 (ID:70001) <> shop/db:80 (ID:70002) Policy denied DROPPED "
        "(TCP Flags: SYN; 4 packets) EGRESS DENIED BY NetworkPolicy shop/db"
    )
    assert "to-overlay FORWARDED (UDP; ended after 0.0 s, 1 packets 0 bytes there" in end


def test_an_audited_verdict_names_who_would_deny(folder):
    rows = {"egress_rule": 9 << 8 | 1, "ingress_rule": 9 << 8 | 2,
            "flags": CONST["CONNECTION_FLAG_AUDITED"]}  # fmt: skip
    (line,) = lines(folder, "compact", rows, policies=True)
    assert "AUDITED (TCP Flags: SYN) EGRESS ALLOWED BY NetworkPolicy shop/db" in line
    assert line.endswith("INGRESS DENIED BY NetworkPolicy shop/db")


@pytest.mark.parametrize(("direct", "point"), [(False, "to-overlay"), (True, "to-network")])
def test_where_packets_for_another_node_go(folder, monkeypatch, direct, point):
    monkeypatch.setattr(WHO, "direct", direct)
    (line,) = lines(folder, "compact", {"kind": END})
    assert f" {point} FORWARDED " in line


def test_colors_are_for_terminals(folder):
    (line,) = lines(folder, "compact", ROWS[2], color=True)
    assert "\x1b[31mDROPPED\x1b[0m" in line
    assert "\x1b[" not in lines(folder, "json", ROWS[2], color=True)[0]


FILTERS: list[dict] = [
    {"source_pod": ["shop/we"]},
    {"destination_pod": ["shop/", "ops/x"]},
    {"source_ip": ["10.1.0.0/24"]},
    {"destination_ip": ["10.1.1.2", "::1"]},
    {"source_label": ["app=web"]},
    {"destination_label": ["!app"]},
    {"source_identity": [70001]},
    {"destination_port": ["80"]},
    {"destination_service": ["shop/data"]},
    {"source_service": ["shop/data"]},
    {"verdict": ["DROPPED"]},
    {"drop_reason_desc": ["POLICY_DENIED"]},
    {"protocol": ["TCP"]},
    {"protocol": ["udp", "icmp"]},
    {"tcp_flags": [{"SYN": True}, {"RST": True}]},
    {"tcp_flags": [{"SYN": True, "ACK": True}]},
    {"ip_version": ["IPv6"]},
    {"reply": [True]},
    {"reply": [False]},
    {"encrypted": [False]},
    {"node_name": ["default/n*"]},
    {"interface": [{"name": "pst1"}]},
    {"http_method": ["GET"]},
    {"source_cluster_name": ["default"]},
    {"source_pod": ["shop/web"], "verdict": ["FORWARDED"], "protocol": ["tcp"]},
]


@pytest.mark.parametrize("asked", FILTERS, ids=str)
def test_lines_of_json_are_filtered_as_columns_are(folder, asked):
    """Two ways to read the same flows: neither knows of the other."""
    rows = (*ROWS, {"family": 6, "protocol": 58, "service": 3, "target_port": 128 << 8})
    made = writer(folder)
    made.add(flows(*rows))
    made.flush()
    printer = Printer("jsonpb")
    saved = list(printer.lines(answers(folder, message("observer.GetFlowsRequest")())))
    for name in ("whitelist", "blacklist"):
        request = message("observer.GetFlowsRequest")()
        json_format.ParseDict({name: [asked]}, request)
        wanted = list(printer.lines(answers(folder, request)))
        assert list(printer.lines(text.answers(saved, request))) == wanted


def test_what_was_saved_is_read_again(folder, tmp_path):
    saved = lines(folder, "jsonpb", *ROWS)
    file = tmp_path / "flows.json"
    file.write_text("\n".join(saved) + "\n")

    def ask(*words: str, piped: str | None = None):
        return CliRunner().invoke(main, ["observe", "-o", "jsonpb", *words], input=piped)

    assert ask("--input-file", str(file)).stdout.splitlines() == saved
    assert ask("--input-file", "-", piped=file.read_text()).stdout.splitlines() == saved
    assert ask("--input", str(file), "--last", "1").stdout.splitlines() == saved[-1:]
    assert ask("--input", str(file), "--first", "2").stdout.splitlines() == saved[:2]
    assert not ask("--input", str(file), "--since", "1h").stdout
    broken = ask("--input", "-", piped=f"{saved[0]}\n{{oops\n")
    assert broken.exit_code == 1
    assert "line 2 is no flow in JSON" in broken.stderr


def test_other_forms(folder):
    (one,) = lines(folder, "json", ROWS[2])
    flow = json.loads(one)["flow"]
    assert flow["drop_reason_desc"] == "POLICY_DENIED"
    assert flow["l4"]["TCP"]["flags"] == {"SYN": True}
    assert flow["egress_denied_by"] == [
        {"name": "db", "namespace": "shop", "kind": "NetworkPolicy"}
    ]
    assert flow["extensions"]["packets"] == "4"
    block = lines(folder, "dict", ROWS[0], node=True)
    assert [line.partition(":")[0].strip() for line in block[:7]] == [
        "TIMESTAMP", "NODE", "SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY",
    ]  # fmt: skip
    head, *_ = lines(folder, "table", ROWS[0])
    assert head.split() == ["TIMESTAMP", "SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY"]
    addresses = lines(folder, "compact", ROWS[0], translate=False)[-1]
    assert "10.1.0.2:40000" in addresses
