"""penstock policy, identity, ip: decoded from shared memory; why and lint over manifests."""

import json
from ipaddress import IPv4Address, IPv6Address

import pytest
import yaml
from click.testing import CliRunner

from dataplane.cli.main import main
from dataplane.daemon.engines import RULES
from dataplane.tables.model import Port
from dataplane.tables.writer import TableWriter
from tests.policy_node import ALLOW_C, CNP, begin, write
from tests.policy_world import PolicyWorld
from xdp.abi import value


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """A node with a policy in force, and its configuration; the agent is away."""
    base = tmp_path_factory.mktemp("node")
    world = begin(PolicyWorld(base / "run"))
    world.rules = world.shm.folder / RULES
    write(world, "p", ALLOW_C)
    write(world, "q", "{endpointSelector: {matchLabels: {app: a}}, ingressDeny: [{fromEntities: "
          "[world], toPorts: [{ports: [{port: '8000', endPort: 8191, protocol: TCP}]}]}]}", CNP,
          deny_response="icmp")  # fmt: skip
    world.start()
    assert world.update() == []
    writer = TableWriter(world.shm)
    for port, number in ((2, 10), (3, 11)):
        writer.set_port(
            port,
            Port(
                value("PORT_POD"), f"pod{port}", 10 + port, 1500, 1,
                address4=IPv4Address(f"10.244.1.{number}"),
                address6=IPv6Address(f"fd00:244:0:1::{number:x}"),
            ),
        )  # fmt: skip
    manifests = base / "manifests"
    manifests.mkdir()
    documents = list(world.manifests.values())
    (manifests / "all.yaml").write_text(yaml.safe_dump_all(documents))
    config = base / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "node": {
                    "name": "n1",
                    "run_dir": str(base / "run"),
                    "state_dir": str(base / "state"),
                },
                "source": {"folder": str(manifests)},
            }
        )
    )
    yield config
    world.shm.close()


def penstock(node, *words, status: int = 0):
    done = CliRunner().invoke(main, [*words, "--config", str(node)])
    assert done.exit_code == status, done.output + done.stderr
    return done


def data(node, *words, status: int = 0):
    return json.loads(penstock(node, *words, "-o", "json", status=status).stdout)


def test_policies_in_force_are_decoded(node):
    rows = {one["port"]: one for one in data(node, "policy", "get")}
    assert set(rows) == {2, 3}
    assert rows[2]["addresses"] == ["10.244.1.10", "fd00:244:0:1::a"]
    policy = rows[2]["policy"]
    assert policy["state"] == "policy" and not policy["audit"]
    rest = policy["otherwise"]["ingress"]
    assert (rest["action"], rest["by"]) == (
        "deny", "default deny: CiliumNetworkPolicy x/q, NetworkPolicy x/p"
    )  # fmt: skip
    assert policy["otherwise"]["egress"]["action"] == "allow"
    entries = {(e["peers"], e["protocol"], e["ports"]): e for e in policy["entries"]}
    allow = entries["y k8s:app=c", "any", "any"]
    assert (allow["action"], allow["by"]) == ("allow", "NetworkPolicy x/p ingress[0]")
    deny = next(e for e in policy["entries"] if e["action"] == "deny")
    assert (deny["answer"], deny["by"]) == ("icmp", "CiliumNetworkPolicy x/q ingressDeny[0]")
    ports = [e["ports"] for e in policy["entries"] if e["protocol"] == "tcp"]
    assert {"8000-8063", "8064-8191"} <= set(ports)


def test_policies_for_people(node):
    text = penstock(node, "policy", "get").stdout
    assert "policy" in text and "10.244.1.11" in text
    text = penstock(node, "policy", "get", "10.244.1.10").stdout
    assert "ingress: the rest is denied by default deny" in text
    assert "NetworkPolicy x/p ingress[0]" in text
    penstock(node, "policy", "get", "x/nobody", status=1)


def test_identities_and_addresses(node):
    (found,) = data(node, "ip", "get", "10.244.2.12")
    assert found["prefix"] == "10.244.2.12/32"
    assert "k8s:app=c" in found["labels"] and "pod" in found["flags"]
    identities = {one["identity"]: one for one in data(node, "identity", "list")}
    assert identities[1]["labels"] == ["reserved:host"]
    assert identities[found["identity"]]["prefixes"] == 2
    prefixes = {one["prefix"]: one for one in data(node, "ip", "list")}
    assert prefixes["::/0"]["labels"] == ["reserved:world-ipv6"]
    assert prefixes["10.0.0.0/8"]["flags"] == ["keep-source"]
    assert data(node, "ip", "get", "8.8.8.8")[0]["prefix"] == "0.0.0.0/0"
    text = penstock(node, "identity").stdout
    assert str(found["identity"]) in text, "a number, not an amount"
    penstock(node, "ip", "get", "nonsense", status=2)


def test_why_says_also_what_is_in_force(node):
    answer = data(node, "policy", "why", "y/c", "x/a", "80/tcp")
    assert answer["allowed"]
    assert answer["ingress"]["in_force"]["by"] == "NetworkPolicy x/p ingress[0]"
    done = penstock(node, "policy", "why", "8.8.8.8", "10.244.1.10", "8080/tcp", status=1)
    assert "the agent is away" in done.stderr
    for words in ("DENIED", "a deny rule", "CiliumNetworkPolicy x/q ingressDeny[0]",
                  "in force on this node: denied by CiliumNetworkPolicy x/q ingressDeny[0], "
                  "answered by icmp", "an allow rule cannot help"):  # fmt: skip
        assert words in done.stdout


def test_why_over_a_folder_alone(node, tmp_path):
    (tmp_path / "one.yaml").write_text(
        "kind: Pod\nmetadata: {name: p, namespace: s}\nstatus: {podIPs: [{ip: 10.244.1.10}]}\n"
    )
    answer = data(node, "policy", "why", "s/p", "8.8.8.8", "1/udp", "--manifests", str(tmp_path))
    assert answer["allowed"] and "in_force" not in answer["egress"]
    done = penstock(node, "policy", "why", "s/p", "nobody", "1/udp", status=1)
    assert "no pod s/p" in done.stderr


def test_lint_of_the_source_and_of_a_folder(node, tmp_path):
    assert data(node, "policy", "lint") == []
    (tmp_path / "p.yaml").write_text(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: s}\n"
        "spec: {podSelector: {}}\n---\nkind: Pod\nmetadata: {name: 7}\n"
    )
    done = penstock(node, "policy", "lint", str(tmp_path), status=1)
    assert "warning: NetworkPolicy s/p: selects no pod" in done.stdout
    assert f"{tmp_path / 'p.yaml'}:7: Pod: metadata.name: is missing" in done.stderr
