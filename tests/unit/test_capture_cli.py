"""penstock capture, trace, extcap as a person meets them: wrong input gets one clear line."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dataplane.cli.capture import _reasons
from dataplane.tables.shm import Shm
from xdp.abi import value

ROOT = Path(__file__).resolve().parents[2]


def penstock(*words):
    return subprocess.run(
        [sys.executable, "-m", "dataplane.cli.main", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    node = {"name": "n", "run_dir": str(tmp_path / "run"), "state_dir": str(tmp_path / "state")}
    path.write_text(yaml.safe_dump({"node": node}))
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("capture", "host", "and"), "syntax error"),
        (("capture", "--reason", "bad luck"), "'bad luck' is no reason; known: "),
        (("capture",), "run here"),
        (("trace", "--pod", "default/web"), "run here"),
        (("extcap",), "--extcap-interfaces"),
        (("extcap", "--capture", "--extcap-interface", "penstock"), "--fifo"),
    ],
)
def test_wrong_input_gets_a_line(config, words, said):
    done = penstock(*words, "--config", str(config))
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pod_that_is_not_here_is_named(config, tmp_path):
    Shm.create(tmp_path / "run").close()
    done = penstock("capture", "--pod", "default/web", "--config", str(config))
    assert done.returncode == 2
    assert "no pod or device 'default/web' on this node" in done.stderr


def test_a_forwarder_that_is_away_is_said(config, tmp_path):
    Shm.create(tmp_path / "run").close()
    done = penstock("capture", "--config", str(config))
    assert done.returncode == 1
    assert "forwarder.sock" in done.stderr


def test_wireshark_gets_no_interfaces_without_a_daemon_and_no_complaint(config):
    done = penstock("extcap", "--extcap-interfaces", "--config", str(config))
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["extcap {version=1.0}{display=Penstock}"]
    assert done.stderr == ""
    options = penstock("extcap", "--extcap-interface", "x", "--extcap-config").stdout
    assert all(line.startswith(("arg {", "value {")) for line in options.splitlines())


def test_reasons_by_number_text_and_verdict():
    assert _reasons("any", ()) is None
    assert _reasons("any", ("133", "ttl exceeded", "POLICY_DENIED")) == [
        133, value("REASON_TTL_EXCEEDED"), 133,
    ]  # fmt: skip
    assert min(_reasons("dropped", ())) == 130
    assert 133 not in _reasons("forwarded", ())
