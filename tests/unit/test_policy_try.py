"""penstock policy try: proposed policies over recorded flows, judged by an oracle, too."""

import json
from ipaddress import ip_address
from itertools import product
from random import Random

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from dataplane.cli.main import main
from dataplane.cni.endpoints import Endpoint, Endpoints
from dataplane.engine.trial import Trial
from dataplane.observe.columns import FIELDS, NOBODY, Columns
from dataplane.observe.directory import Directory, End
from dataplane.observe.history import History, Origin, PastBook
from tests.policy_strategies import PORTS, WORLD, change, fill
from tests.policy_world import OWN, PolicyWorld, addresses, namespace, node, pod, policy
from xdp.abi import value

PODS = [ip for place in range(9) for ip in addresses(place % 2 + 1, 2 + place)]
ENDS = [*PODS, *WORLD, "192.0.2.2", OWN[0], OWN[1]]
MASK64 = (1 << 64) - 1
NEW, DROP = value("EVENT_NEW"), value("EVENT_DROP")


def columns(rows: list[dict]) -> dict[str, np.ndarray]:
    """Columns of flows that say source, target, protocol, port."""
    made = {name: np.zeros(len(rows), dtype) for name, dtype in FIELDS.items()}
    for at, row in enumerate(rows):
        for side in ("source", "target"):
            number = int(ip_address(row[side]))
            made[f"{side}_hi"][at], made[f"{side}_lo"][at] = number >> 64, number & MASK64
        made["family"][at] = ip_address(row["source"]).version
        made["protocol"][at] = row["protocol"]
        icmp = row["protocol"] in (1, 58)
        made["target_port"][at] = row["port"] << 8 if icmp else row["port"]
        for name in made.keys() & row.keys():
            made[name][at] = row[name]
    return made


@pytest.mark.parametrize("seed", range(4))
def test_a_trial_says_what_the_manifests_say(tmp_path, seed):
    """Flows between everybody: each is as an independent reading of the policies has it."""
    rng = Random(seed)
    world = PolicyWorld(tmp_path / "world")
    fill(rng, world)
    for _ in range(6):
        change(rng, world)
    trial = Trial(tmp_path / "trial", world.objects(), world.local(), world.options, 0)
    oracle = world.oracle()
    at = {ip: port for port, (_, _, ips) in world.endpoints.items() for ip in ips}
    rows = [
        {"source": a, "target": b, "protocol": protocol, "port": number}
        for a, b in product(ENDS, ENDS)
        if a != b and ip_address(a).version == ip_address(b).version
        if a in at or b in at
        if not (a in at and at.get(a) == at.get(b))
        for protocol, number in rng.sample(PORTS, min(4, len(PORTS)))
    ]
    judged = trial.judge(columns(rows))
    wanted = []
    for row in rows:
        a, b, what = row["source"], row["target"], (row["protocol"], row["port"])
        out = a not in at or oracle.allowed(at[a], "egress", b, *what)
        into = b not in at or oracle.allowed(at[b], "ingress", a, *what)
        wanted.append(out and into)
    assert ((judged.reasons == 0) == np.array(wanted)).all()
    assert 0 < sum(wanted) < len(wanted)
    trial.close()
    world.shm.close()


# --- the command ----------------------------------------------------------------------------------

WEB, DB, FAR = (pod("shop", name, number, host, app=name) for name, number, host in
                (("web", 2, 1), ("db", 3, 1), ("far", 4, 2)))  # fmt: skip
ALLOW_WEB = policy(
    "shop",
    "db",
    {
        "podSelector": {"matchLabels": {"app": "db"}},
        "policyTypes": ["Ingress"],
        "ingress": [
            {
                "from": [{"podSelector": {"matchLabels": {"app": "web"}}}],
                "ports": [{"port": 5432}],
            }
        ],
    },
)
IP = {name: addresses(host, number)[0] for name, number, host in
      (("web", 2, 1), ("db", 3, 1), ("far", 4, 2))}  # fmt: skip


@pytest.fixture
def site(tmp_path):
    """A node without a daemon: manifests, endpoint records, recorded flows. Gives the arguments."""
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    objects = [node(1), node(2), namespace("shop"), WEB, DB, FAR]
    (manifests / "all.yaml").write_text(yaml.safe_dump_all(objects))
    state = tmp_path / "state"
    state.mkdir()
    ends = Endpoints(state)
    directory = Directory()
    numbers = {}
    for number, one in enumerate((WEB, DB), 1):
        name = one["metadata"]["name"]
        four, six = (ip_address(ip["ip"]) for ip in one["status"]["podIPs"])
        macs = ("0a:00:00:00:00:01", "0a:00:00:00:00:02")
        device = (f"pst{number}", number, *macs, 1500, 1)
        ends.save(
            Endpoint(number, "n", f"c{number}", "eth0", "/n", *device, four, six, "shop", name)
        )
        numbers[name] = directory.number(End("shop", name, number=number, node="n1"))
    numbers["far"] = directory.number(End("shop", "far", node="n2"))
    numbers["old"] = directory.number(End("shop", "old", number=9, node="n1"))

    def flow(source, target, port, kind=NEW, **more):
        return {"source": IP[source], "target": IP[target], "protocol": 6, "port": port,
                "source_end": numbers[source], "target_end": numbers[target], "kind": kind,
                "wall_ns": 5, **more}  # fmt: skip

    rows = [
        *[flow("web", "db", 5432)] * 5,
        *[flow("far", "db", 5432, wall_ns=9)] * 3,
        flow("web", "far", 80),
        flow("web", "db", 22),
        flow("web", "db", 23, DROP, reason=value("REASON_POLICY_DENIED")),
        flow("web", "db", 24, DROP, reason=value("REASON_TTL_EXCEEDED")),
        {**flow("web", "db", 25), "target_end": numbers["old"]},
        {**flow("web", "db", 26), "target": "198.51.100.7", "target_end": NOBODY},
    ]
    said = PastBook({"labels": {}, "rules": {}, "services": {}, "devices": {}})
    history = History(state / "flows", 1 << 30, 3600, Origin(directory, said, "n1", 7))
    history.add(Columns(columns(rows), len(rows)))
    history.flush()
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "node": {"name": "n1", "state_dir": str(state), "run_dir": str(tmp_path / "run")},
                "source": {"folder": str(manifests)},
            }
        )
    )
    return ["policy", "try", "--config", str(config)], tmp_path


def ask(site, *words: str, status: int):
    found = CliRunner().invoke(main, [*site[0], *words], catch_exceptions=False)
    assert found.exit_code == status, found.output
    return found


def test_what_a_policy_would_change(site):
    file = site[1] / "policy.yaml"
    file.write_text(yaml.safe_dump(ALLOW_WEB))
    found = json.loads(ask(site, str(file), "-o", "json", status=1).stdout)
    assert (found["judged"], found["changed"]) == (12, 5)
    assert found["gone"] == 1, "the pod of one flow has another address now"
    assert found["otherwise"] == 1, "one was denied by a policy that is no more"
    named = [
        (row["source"], row["destination"], row["port"], row["flows"], row["was"], row["becomes"])
        for row in found["changes"]
    ]
    assert named == [
        ("shop/far", "shop/db", "5432", 3, "allowed", "denied"),
        ("shop/web", "shop/db", "22", 1, "allowed", "denied"),
        ("shop/web", "shop/db", "23", 1, "allowed", "denied"),
    ]
    assert all("shop/db" in row["by"] for row in found["changes"])
    table = ask(site, str(file), status=1).stdout
    assert "12 flows judged, 5 would change" in table


def test_taking_a_policy_away_and_since(site):
    (site[1] / "manifests" / "policy.yaml").write_text(yaml.safe_dump(ALLOW_WEB))
    found = json.loads(ask(site, "--without", "shop/db", "-o", "json", status=0).stdout)
    assert {(row["was"], row["becomes"]) for row in found["changes"]} == {("denied", "allowed")}
    assert found["changed"] == 5
    later = ask(site, "--without", "shop/db", "--since", "1970-01-02", "-o", "json", status=0)
    assert json.loads(later.stdout)["judged"] == 0


def test_what_cannot_be_tried_is_refused(site):
    file = site[1] / "pod.yaml"
    file.write_text(yaml.safe_dump(WEB))
    assert "Pod is no policy" in ask(site, str(file), status=1).stderr
    assert "no such policy" in ask(site, "--without", "shop/none", status=1).stderr
    assert "nothing to try" in ask(site, status=2).stderr
    file.write_text("a: [")
    broken = ask(site, str(file), status=1).stderr
    assert f"{file} is no YAML" in broken
    assert broken.count("\n") == 1
    file.write_text("# nothing\n---\n")
    assert "has no policy in it" in ask(site, str(file), status=1).stderr
    bad = site[1] / "none"
    file.write_text(yaml.safe_dump(ALLOW_WEB))
    assert str(bad) in ask(site, str(file), "--input", str(bad), status=1).stderr
