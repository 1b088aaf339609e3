"""Alert rules as a file: what may become full has one, and each asks for metrics that exist."""

import re
from pathlib import Path

import yaml

from dataplane.engine.names import LIMITS

ROOT = Path(__file__).resolve().parents[2]
RULES = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}


def test_each_limit_of_names_raises_an_alert():
    chosen = [
        pattern
        for rule in ALERTS.values()
        for pattern in re.findall(r'penstock_names_total\{what=~?"([^"]+)"\}', rule["expr"])
    ]
    missing = {name for name in LIMITS if not any(re.fullmatch(one, name) for one in chosen)}
    assert missing == set()


def test_alerts_ask_for_documented_metrics_and_say_what_to_do():
    documented = (ROOT / "docs" / "metrics.md").read_text()
    for name, rule in ALERTS.items():
        for metric in re.findall(r"\b(?:penstock|cilium|hubble)_[a-z_]+", rule["expr"]):
            assert f"`{metric}`" in documented, (name, metric)
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), name
        assert set(rule["annotations"]) == {"summary", "description"}, name
