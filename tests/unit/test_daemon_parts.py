"""What the processes share: one lock a run directory, systemd's channel, logs, views."""

import json
import os
import signal
import socket
import subprocess
import sys
from ipaddress import ip_address, ip_network

import pytest

from dataplane.daemon import log, views
from dataplane.daemon.lock import AlreadyRunning, hold
from dataplane.daemon.notify import notify
from dataplane.objects.core import Node


class Listener:
    """Stands in for systemd at NOTIFY_SOCKET."""

    def __init__(self, folder, monkeypatch, address: str = "") -> None:
        address = address or str(folder / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(30)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        monkeypatch.setenv("NOTIFY_SOCKET", address)

    def heard(self) -> list[str]:
        return self.socket.recv(4096).decode().split("\n")


def test_the_lock_is_one_holders_and_names_it(tmp_path):
    path = tmp_path / "run" / "x.lock"
    held = f"process {os.getpid()}: stop it first"
    with hold(path), pytest.raises(AlreadyRunning, match=held):
        hold(path).__enter__()
    with hold(path):
        pass


def test_a_killed_holder_lets_go(tmp_path):
    path = tmp_path / "x.lock"
    code = (
        "import sys, time; from pathlib import Path; from dataplane.daemon.lock import hold\n"
        "with hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(AlreadyRunning, match=str(holder.pid)):
            hold(path).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with hold(path):
            pass


def test_notify_without_systemd_does_nothing(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")


@pytest.mark.parametrize("abstract", [False, True])
def test_notify_reaches_either_kind_of_socket(tmp_path, monkeypatch, abstract):
    name = f"@penstock-test-{os.getpid()}" if abstract else ""
    listener = Listener(tmp_path, monkeypatch, name)
    assert notify("READY=1", "STATUS=forwarding")
    assert listener.heard() == ["READY=1", "STATUS=forwarding"]


def test_a_systemd_that_went_away_harms_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not notify("WATCHDOG=1")


def test_a_listener_that_never_reads_harms_nobody(tmp_path, monkeypatch):
    listener = Listener(tmp_path, monkeypatch)
    monkeypatch.setattr("dataplane.daemon.notify.SEND_S", 0.01)
    queue = 4096  # far more than net.unix.max_dgram_qlen
    assert not all(notify("WATCHDOG=1") for _ in range(queue))
    assert listener.heard() == ["WATCHDOG=1"]


def test_logs_are_json_lines_with_the_usual_fields():
    code = (
        "from dataplane.daemon.log import get_logger, setup\n"
        "setup('warning'); log = get_logger('test')\n"
        "log.info('unseen'); log.warning('seen', count=3)\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: log.exception('failed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    seen, failed = [json.loads(line) for line in done.stderr.splitlines()]
    assert seen.pop("ts").endswith("Z")
    assert seen == {"subsys": "test", "count": 3, "level": "warning", "msg": "seen"}
    assert "ZeroDivisionError" in failed["exception"]


def test_views_are_plain_data():
    node = Node("n", (ip_address("192.0.2.1"),), (ip_network("10.0.0.0/24"),))
    assert json.loads(json.dumps(views.node(node))) == {
        "name": "n",
        "internal_ips": ["192.0.2.1"],
        "pod_cidrs": ["10.0.0.0/24"],
    }


def test_every_level_can_be_set():
    for level in ("debug", "info", "warning", "error"):
        log.setup(level)
