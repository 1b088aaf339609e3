"""The configuration file: defaults, refusals that name option and limit, documented defaults."""

import pytest
import yaml

from dataplane.control.config import Config, ConfigError, describe, load


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_the_documented_default_is_the_default():
    assert Config.model_validate(yaml.safe_load(describe())) == Config()


def test_every_option_is_documented():
    for line in describe().splitlines():
        assert "#" in line
        assert not line.rstrip().endswith("None"), line


def test_tunnel_ports_are_those_of_cilium(tmp_path):
    assert Config().network.tunnel_port == 8472
    geneve = load(write(tmp_path, "network: {tunnel: geneve}"))
    assert geneve.network.tunnel_port == 6081
    assert load(write(tmp_path, "network: {port: 4789}")).network.tunnel_port == 4789


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("network: {tunel: vxlan}", ["network.tunel", "not permitted"]),
        ("network: {mode: magic}", ["network.mode", "overlay", "magic"]),
        ("network: {vni: 99999999}", ["network.vni", "16777216"]),
        ("network: {mtu: 600}", ["1280"]),
        ("network: {cluster_cidrs: [10.0.0.1/8]}", ["host bits"]),
        ("forwarder: {frames: 5}", ["forwarder.frames", "1024"]),
        ("services: {node_ports: 32767-30000}", ["services", "FIRST <= LAST"]),
        ("services: {node_ports: 1-70000}", ["services", "65535"]),
        ("services: {maglev_seed: AAAA}", ["maglev_seed", "12 bytes"]),
        ("services: {maglev_size: 100}", ["services.maglev_size", "16381"]),
        ("services: {loopback: [169.254.42.1, 169.254.42.2]}", ["one address a family"]),
        ("services: {cidrs: [10.96.0.1/12]}", ["host bits"]),
        ("masquerade: {ports: 30000-40000}", ["masquerade.ports", "services.node_ports"]),
        ("- a list", ["must be a mapping"]),
        ("network: {", ["config.yaml"]),
        ("date: 2026-13-45", ["not YAML", "month"]),
        ("[" * 5000, ["not YAML"]),
    ],
)
def test_a_refusal_names_option_and_limit(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("node: {}\n\nnetwork:\n  mode: overlay\n  tunel: vxlan\n", 5),
        ("network:\n  pools:\n  - cidr: 10.0.0.0/16\n    mask_size: x\n", 4),
        ("network:\n  pools:\n  - cidr: 10.0.0.0/16\n", 3),
        ("\nnetwork: 7\n", 2),
        ("network:\n  mtu: 600\n", 1),
    ],
)
def test_a_refusal_names_the_line(tmp_path, text, line):
    with pytest.raises(ConfigError, match=f"config.yaml:{line}: network"):
        load(write(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"node: \xff")
    with pytest.raises(ConfigError, match="byte 6"):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.yaml")
