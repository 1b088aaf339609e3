"""Shared memory: what is mapped, what is refused, what is kept."""

import json
import tempfile
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import numpy as np
import pytest

from dataplane.tables.errors import LayoutError, NotRunningError, TableError
from dataplane.tables.model import Adjacency, Port, Tunnel
from dataplane.tables.shm import ARRAYS, Shm
from xdp.abi import CONST, value


def test_arrays_have_the_declared_shapes_and_are_zero(tmp_path):
    with Shm.create(tmp_path) as shm:
        for name, (dtype, shape) in ARRAYS.items():
            array = getattr(shm, name)
            assert array.dtype == dtype
            assert array.shape == shape
            assert array.flags.writeable
            assert array.flags.aligned
        assert int(shm.control[0]["generation"]) == 0
        assert shm.reasons.shape == (CONST["WORKERS_MAX"] + 1, 2, CONST["REASONS_MAX"])


def test_files_are_sparse(tmp_path):
    with Shm.create(tmp_path):
        taken = sum(path.stat().st_blocks for path in (tmp_path / "shm").iterdir()) * 512
    assert taken < 1 << 20


def test_two_processes_see_one_memory_and_create_keeps_it(tmp_path):
    with Shm.create(tmp_path) as writer, Shm.open(tmp_path) as reader:
        writer.node[0]["vni"] = 77
        assert int(reader.node[0]["vni"]) == 77
        with pytest.raises(ValueError):
            reader.node[0]["vni"] = 1
    with Shm.create(tmp_path) as again:
        assert int(again.node[0]["vni"]) == 77


def test_views_outlive_close(tmp_path):
    shm = Shm.create(tmp_path)
    view = shm.node
    shm.close()
    shm.close()
    view[0]["vni"] = 5
    with Shm.open(tmp_path) as again:
        assert int(again.node[0]["vni"]) == 5


def test_a_daemon_that_never_ran_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="has not run here"):
        Shm.open(tmp_path)
    with pytest.raises(NotRunningError):
        Shm.open(tmp_path / "no" / "such")


def _other_version(folder: Path) -> None:
    layout = json.loads((folder / "layout").read_text())
    layout["abi_version"] += 1
    (folder / "layout").write_text(json.dumps(layout))


def _short_file(folder: Path) -> None:
    (folder / "node").write_bytes(b"")


def _no_file(folder: Path) -> None:
    (folder / "fib6").unlink()


def _nonsense(folder: Path) -> None:
    (folder / "layout").write_bytes(b"\xff\x00[")


def _not_an_object(folder: Path) -> None:
    (folder / "layout").write_text("[1]")


@pytest.mark.parametrize("harm", [_other_version, _short_file, _no_file, _nonsense, _not_an_object])
def test_another_layout_is_refused_and_made_anew(tmp_path, harm):
    old = Shm.create(tmp_path)
    old.node[0]["vni"] = 77
    if harm is _short_file:
        old.close()
    harm(tmp_path / "shm")
    with pytest.raises(LayoutError, match="restart"):
        Shm.open(tmp_path)
    with Shm.create(tmp_path) as new:
        assert int(new.node[0]["vni"]) == 0
        if harm is not _short_file:  # who still maps the old files keeps them whole
            assert int(old.node[0]["vni"]) == 77
    old.close()


def test_extents_are_the_written_rows(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, Shm.create(Path(folder)) as shm:
        assert list(shm.extents("fib4_wide")) == []
        shm.fib4_wide[1_000_000] = 1
        shm.fib4_wide[-1] = 1
        found = list(shm.extents("fib4_wide"))
        assert any(first <= 1_000_000 < end for first, end in found)
        assert found[-1][1] == CONST["FIB4_WIDE"]
        covered = np.concatenate([shm.fib4_wide[first:end] for first, end in found])
        assert int(covered.sum()) == 2
        assert len(covered) < 2_000_000


def test_tmpfs_is_known():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, Shm.create(Path(folder)) as shm:
        assert shm.on_tmpfs


def test_no_room_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("dataplane.tables.shm.FREE_LEAST", 1 << 60)
    with pytest.raises(TableError, match="enlarge"):
        Shm.create(tmp_path)
    assert list((tmp_path / "shm").iterdir()) == []


POD = value("ADJACENCY_POD")
PORT = {"kind": value("PORT_POD"), "name": "pst1", "ifindex": 3, "mtu": 1500, "queue_count": 1}
TUNNEL = {
    "kind": value("TUNNEL_VXLAN"), "local": IPv4Address(1), "remote": IPv4Address(2), "port": 8472,
    "vni": 1, "inner_source_mac": bytes(6), "inner_destination_mac": bytes(6),
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "base", "wrong", "says"),
    [
        (Port, PORT, {"kind": 9}, "PORT_POD"),
        (Port, PORT, {"name": "a" * 16}, "1..15 bytes"),
        (Port, PORT, {"name": ""}, "1..15 bytes"),
        (Port, PORT, {"queue_count": 17}, "1..16"),
        (Port, PORT, {"mac": b"12345"}, "6 bytes"),
        (Port, PORT, {"mtu": 10}, "mtu"),
        (Tunnel, TUNNEL, {"vni": 1 << 24}, "VNI"),
        (Tunnel, TUNNEL, {"remote": IPv6Address(1)}, "one family"),
        (Tunnel, TUNNEL, {"kind": 0}, "TUNNEL_NONE"),
        (Tunnel, TUNNEL, {"port": 0}, "UDP port"),
        (Adjacency, {"kind": POD}, {"port": 1024}, "0..1023"),
        (Adjacency, {"kind": POD}, {"kind": 0}, "delete the route"),
        (Adjacency, {"kind": POD}, {"tunnel": Tunnel(**TUNNEL)}, "has a tunnel"),
        (Adjacency, {"kind": POD}, {"kind": value("ADJACENCY_TUNNEL")}, "lacks a tunnel"),
    ],
)
def test_what_no_row_can_hold_is_refused(make, base, wrong, says):
    make(**base)
    with pytest.raises(TableError, match=says):
        make(**{**base, **wrong})
