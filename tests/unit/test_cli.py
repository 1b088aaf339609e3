"""The command line: help at once, one clear line for an error, JSON that parses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dataplane.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


def penstock(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "dataplane.cli.main", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **options,
    )  # fmt: skip


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from dataplane.cli.main import main; "
        "main(['--help'], standalone_mode=False); "
        "print([m for m in ('numpy', 'numba', 'pydantic', 'rich', 'pyroute2') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    for name in COMMANDS:
        assert f"  {name}" in done.stdout


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command):
    done = penstock(command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    node = {"name": "n", "run_dir": str(tmp_path / "run"), "state_dir": str(tmp_path / "state")}
    path.write_text(yaml.safe_dump({"node": node}))
    return path


def test_status_without_a_daemon_is_degraded_and_says_so(config):
    done = penstock("status", "--config", str(config), "-o", "json")
    assert done.returncode == 3
    state = json.loads(done.stdout)
    assert state["ready"] is False
    assert "penstock run" in state["errors"][0]


@pytest.mark.parametrize("command", ["counters", "flows", "port", "ipam list", "route list"])
def test_without_state_there_is_one_clear_line(config, command):
    done = penstock(*command.split(), "--config", str(config))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "run here" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_broken_configuration_ends_with_78(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("network: {mode: magic}")
    for command in ("run", "agent", "forwarder", "status"):
        done = penstock(command, "--config", str(path))
        assert done.returncode == 78
        assert "network.mode" in done.stderr


def test_doctor_prints_findings(config):
    done = penstock("doctor", "--config", str(config), "-o", "json")
    findings = {row["what"]: row for row in json.loads(done.stdout)}
    assert findings["privilege"]["state"] in ("ok", "missing")
    assert findings["CNI plugin"]["state"] in ("ok", "missing")
    assert all(row["fix"] for row in findings.values() if row["state"] in ("slow", "missing"))


def test_config_default_is_yaml_that_checks(tmp_path):
    text = penstock("config", "default").stdout
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert penstock("config", "check", "--config", str(path)).returncode == 0
    shown = yaml.safe_load(penstock("config", "show", "--config", str(path)).stdout)
    assert shown["network"]["tunnel"] == "vxlan"


def test_node_cidrs_are_carved_once_and_taken_back(tmp_path):
    path = tmp_path / "c.yaml"
    pools = [{"cidr": "10.0.0.0/22", "mask_size": 24}, {"cidr": "fd00::/56", "mask_size": 64}]
    document = {"node": {"state_dir": str(tmp_path / "state")}, "network": {"pools": pools}}
    path.write_text(yaml.safe_dump(document))

    def ipam(*words):
        done = penstock("ipam", *words, "--config", str(path), "-o", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first = ipam("carve", "a", "b")
    assert [row["podCIDRs"] for row in first] == [
        ["10.0.0.0/24", "fd00::/64"],
        ["10.0.1.0/24", "fd00:0:0:1::/64"],
    ]
    assert ipam("carve", "b", "a") == first[::-1]
    assert ipam("reclaim", "a") == first[:1]
    assert [row["node"] for row in ipam("cluster")["nodes"]] == ["b"]
    assert [row["used"] for row in ipam("cluster")["pools"]] == [1, 1]
    ipam("carve", "c", "d", "e")
    full = penstock("ipam", "carve", "f", "--config", str(path))
    assert full.returncode == 1
    assert "10.0.0.0/22 is exhausted" in full.stderr


def test_run_dir_may_be_given(tmp_path):
    done = penstock("counters", "--run-dir", str(tmp_path / "elsewhere"))
    assert done.returncode == 1
    assert str(tmp_path / "elsewhere") in done.stderr


def test_a_wrong_address_is_wrong_usage(tmp_path):
    done = penstock("route", "get", "10.0.0.256", "--run-dir", str(tmp_path))
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "10.0.0.256" in done.stderr
