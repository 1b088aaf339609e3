"""penstock lb: decoded from shared memory, with and without names, as table and as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dataplane.services import names
from tests.services_world import (
    LB4,
    NODE4,
    THERE,
    VIP4,
    VIP6,
    Services,
    end,
    leaving,
    part,
    service,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    made = Services(tmp_path_factory.mktemp("run"), maglev_size=251)
    lb = service(
        type="LoadBalancer", vips=(VIP4, VIP6), load_balancer_ips=(LB4,), affinity_s=60,
        source_ranges=("192.0.2.0/24",), external_local=True,
        annotations={"penstock.io/lb-algorithm": "maglev"},
    )  # fmt: skip
    ends = [end("10.1.0.1"), end("10.1.0.2"), leaving("10.1.0.3"), end("10.2.0.1", THERE)]
    made.update(lb, part(*ends), part(end("fd00:1::1")), service("empty", ("10.96.0.11",)))
    made.engine.flush()
    yield made
    made.close()


def lb(there, *words):
    return subprocess.run(
        [sys.executable, "-m", "dataplane.cli.main", "lb", "list",
         "--run-dir", str(there.folder), *words],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def rows(there, *words):
    done = lb(there, *words, "-o", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_frontend_with_its_service_and_backends(there):
    found = {row["frontend"]: row for row in rows(there)}
    assert set(found) == {
        f"{VIP4}:80/tcp", f"[{VIP6}]:80/tcp", f"{NODE4}:30080/tcp", "[2001:db8::1]:30080/tcp",
        f"{LB4}:80/tcp", "10.96.0.11:80/tcp", VIP4, VIP6, LB4, "10.96.0.11",
    }  # fmt: skip
    one = found[f"{LB4}:80/tcp"]
    assert (one["service"], one["kind"]) == ("shop/web:http", "balancer")
    assert [b["address"] for b in one["inside_backends"]] == ["10.1.0.1", "10.1.0.2", "10.2.0.1"]
    assert [b["address"] for b in one["outside_backends"]] == ["10.1.0.1", "10.1.0.2"]
    assert {b["state"] for b in one["inside_backends"]} == {"active"}
    assert one["sources"] == ["192.0.2.0/24"]
    assert (one["affinity_s"], one["inside_maglev"], one["outside_maglev"]) == (60, 251, 251)
    assert one["flags"] == ["keep source"]
    assert found[VIP4]["kind"] == "address"
    assert found["10.96.0.11:80/tcp"]["inside_backends"] == []


def test_the_table_is_for_people(there):
    told = lb(there).stdout
    assert "shop/web:http" in told
    assert f"[{VIP6}]:80/tcp" in told
    assert "none" in told
    assert "row" not in told


def test_frontends_and_backends(there):
    fronts = {(row["address"], row["port"]): row for row in rows(there, "--frontends")}
    assert fronts[VIP4, 80]["inside"] == 3
    assert fronts[NODE4, 30080]["outside"] == 2
    assert fronts[VIP4, 80]["flags"] == ["cluster ip"]
    ends = {row["address"]: row for row in rows(there, "--backends")}
    assert ends["10.1.0.3"]["state"] == "terminating"
    assert ends["10.1.0.3"]["services"] == []
    assert ends["10.1.0.1"]["services"] == ["shop/web:http"]
    assert ends["10.1.0.1"]["port"] == 8080
    for words in (["--frontends"], ["--backends"]):
        assert lb(there, *words).returncode == 0


def test_maglev_tables(there):
    found = rows(there, "--maglev", "shop/web")
    assert {row["size"] for row in found} == {251}
    balancer = [row for row in found if (row["kind"], row["side"]) == ("balancer", "outside")]
    assert sorted(row["entries"] for row in balancer) == [125, 126]
    assert rows(there, "--maglev", "shop/web:http") == found
    assert "share" in lb(there, "--maglev", "shop/web").stdout.lower()
    for name, words in (("shop/empty", "has no Maglev table"), ("shop/x", "is not known")):
        done = lb(there, "--maglev", name)
        assert done.returncode == 1
        assert words in done.stderr


def test_without_names_rows_are_shown_by_number(there):
    path = there.shm.folder / names.FILE
    text = path.read_text()
    path.unlink()
    try:
        assert rows(there)[0]["service"].startswith("row ")
    finally:
        path.write_text(text)


def test_without_tables_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dataplane.cli.main", "lb", "list", "--run-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "penstock run" in done.stderr
