"""The state file: parallel processes, kill -9, damage."""

import multiprocessing
import os
import random
import signal
import sqlite3
import time
from ipaddress import ip_network
from pathlib import Path

import pytest

from ipam.errors import StateDamaged, StateUnavailable
from ipam.service import Ipam

POOLS = {4: ip_network("10.9.0.0/22"), 6: ip_network("fd09::/64")}
SPAWN = multiprocessing.get_context("spawn")
DEADLINE_S = 60


def _allocate_many(path: Path, number: int, count: int) -> list[tuple[str, str]]:
    ipam = Ipam.open(path)
    ipam.set_node_pools(POOLS)
    found = []
    for turn in range(count):
        lease = ipam.allocate("n", f"{number}-{turn}", "eth0")
        found.append((str(lease.addresses[4]), str(lease.addresses[6])))
        if turn % 3 == 0:
            ipam.allocate("n", "shared", "eth0")
    ipam.close()
    return found


def test_processes_in_parallel_never_share_an_address(tmp_path):
    path = tmp_path / "state" / "ipam.db"  # made by whoever is first
    with SPAWN.Pool(4) as pool:
        jobs = [pool.apply_async(_allocate_many, (path, number, 40)) for number in range(4)]
        found = [pair for job in jobs for pair in job.get(DEADLINE_S)]
    assert len({four for four, _ in found}) == len({six for _, six in found}) == 160
    ipam = Ipam.open(path)
    assert len(ipam.leases()) == 161
    assert ipam._store.problems() == []
    ipam.close()
    leftovers = {file.name for file in path.parent.iterdir()} - {"ipam.db"}
    assert leftovers <= {"ipam.db-wal", "ipam.db-shm"}


def _churn(path: Path, seed: int, answers: Path) -> None:
    """Allocate and release until killed; note each answer as the runtime would see it."""
    ipam = Ipam.open(path, rest_s=0.0)
    ipam.set_node_pools(POOLS)
    choose = random.Random(seed)
    with answers.open("a", buffering=1) as log:
        while True:
            key = ("n", f"c{choose.randrange(40)}", "eth0")
            if choose.random() < 0.6:
                log.write(f"{key[1]} {ipam.allocate(*key).addresses[4]}\n")
            else:
                log.write(f"{key[1]} -\n")  # from here on it may be gone
                ipam.release(key)


def test_kill_at_any_moment_leaves_a_whole_state(tmp_path):
    path, answers = tmp_path / "ipam.db", tmp_path / "answers"
    choose = random.Random(1)
    for seed in range(8):
        child = SPAWN.Process(target=_churn, args=(path, seed, answers))
        child.start()
        size = answers.stat().st_size if answers.exists() else 0
        wanted = size + choose.randrange(1, 4000)
        deadline = time.monotonic() + DEADLINE_S
        while not answers.exists() or answers.stat().st_size < wanted:
            assert child.is_alive(), "the child failed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
        child.join(DEADLINE_S)
        ipam = Ipam.open(path)
        assert ipam._store.problems() == []
        leases = {lease.key[1]: str(lease.addresses[4]) for lease in ipam.leases()}
        assert all(len(lease.addresses) == 2 for lease in ipam.leases())
        assert len(set(leases.values())) == len(leases)
        last = dict(line.split() for line in answers.read_text().splitlines() if " " in line)
        for name, address in last.items():
            if address not in ("-", ""):
                assert leases[name] == address, "an answered allocation is lost"
        ipam.close()


def _make(path: Path) -> None:
    ipam = Ipam.open(path)
    ipam.set_node_pools(POOLS)
    for number in range(50):
        ipam.allocate("n", f"c{number}", "eth0")
    ipam.close()


def _truncate(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("addresses, once\n" * 1000)


def _holes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    path.write_bytes(data)


def _only_the_log(path: Path) -> None:
    path.unlink()
    path.with_name("ipam.db-wal").write_bytes(b"x" * 4096)


def _another_database(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE pets (name TEXT)")


@pytest.mark.parametrize("harm", [_truncate, _text, _holes, _only_the_log, _another_database])
def test_damage_is_reported_and_left_alone(tmp_path, harm):
    path = tmp_path / "ipam.db"
    _make(path)
    harm(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(StateDamaged, match=r"ipam\.db.*restore it, or drain"):
        Ipam.open(path)
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert after.get("ipam.db") == before.get("ipam.db")


def test_a_newer_version_is_not_called_damage(tmp_path):
    path = tmp_path / "ipam.db"
    _make(path)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StateUnavailable, match="version 99"):
        Ipam.open(path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateUnavailable, match="cannot be used"):
        Ipam.open(tmp_path / "file" / "ipam.db")


def test_a_failure_within_a_change_rolls_back(tmp_path):
    path = tmp_path / "ipam.db"
    _make(path)
    ipam = Ipam.open(path)

    def fail():
        with ipam._store.change() as db:
            db.execute("DELETE FROM pool")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert len(ipam.usage()) == 2
    ipam.close()
