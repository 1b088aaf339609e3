"""What a node shows of itself, with real programs: Prometheus, tshark, tcpdump, a browser."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from bench import checks
from bench.lab import Lab, LabError, eventually
from bench.penstock import Cluster, PodSpec
from tests.netns.manifests import cilium_policy, namespace

pytestmark = [pytest.mark.root, pytest.mark.net]

NAME = "shop.example"
ROOT = Path(__file__).resolve().parents[2]
DENY = cilium_policy(
    "closed",
    endpointSelector={"matchLabels": {"app": "closed"}},
    ingress=[{"fromEndpoints": [{"matchLabels": {"app": "friend"}}]}],
)


@pytest.fixture(scope="module")
def world():
    with Lab() as lab:
        cluster = Cluster(lab).start()
        one, two = cluster.nodes
        cluster.apply("namespaces", namespace("default"))
        cluster.apply("policy", DENY)
        cluster.client = one.pod("client", PodSpec(labels={"app": "client"}))
        cluster.server = one.pod("server", PodSpec(labels={"app": "server"}))
        cluster.closed = one.pod("closed", PodSpec(labels={"app": "closed"}))
        cluster.friend = one.pod("friend", PodSpec(labels={"app": "friend"}))
        cluster.far = two.pod("far", PodSpec(labels={"app": "far"}))
        for pod in (cluster.server, cluster.closed, cluster.far):
            cluster.servers = checks.serve(pod.namespace)
        cluster.server.namespace.spawn(
            "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts",
            "--conf-file=/dev/null", "--pid-file", "--user=root", "--log-facility=-",
            "--bind-dynamic", f"--address=/{NAME}/192.0.2.99",
        )  # fmt: skip
        eventually(lambda: not fetches(cluster, cluster.closed), "the policy")
        yield cluster


def fetches(cluster, pod, family=4, client=None) -> bool:
    address = pod.addresses[family]
    host = f"[{address}]" if family == 6 else address
    url = f"http://{host}:{checks.HTTP_PORT}/"
    try:
        (client or cluster.client).namespace.run(
            "curl", "-sS", "-g", "-o", "/dev/null", "-m", "1", url
        )
    except LabError:
        return False
    return True


def asks(cluster) -> str:
    """The client's question for NAME, at the server's resolver."""
    server = f"@{cluster.server.addresses[4]}"
    return cluster.client.namespace.run("dig", "+short", "+time=2", "+tries=2", server, NAME)


class Capture:
    """`penstock capture` beside the body of a with."""

    def __init__(self, node, path, *words):
        self.node, self.path, self.words = node, path, words

    def __enter__(self):
        python = str(ROOT / ".venv" / "bin" / "python")
        words = (python, "-m", "dataplane.cli.main", "capture", "--config", str(self.node.config))
        env = {"PYTHONPATH": str(ROOT)}
        self.process = self.node.namespace.spawn(
            *words, "-w", str(self.path), *self.words, env=env, log=self.path.name
        )
        before = len(self._open())
        eventually(lambda: len(self._open()) > before or self._started(), "the capture")
        return self

    def _open(self):
        return [None] * self.node.ask("status")["forwarder"]["captures"]

    def _started(self):
        return self.path.exists() and bool(self._open())

    def __exit__(self, *_):
        time.sleep(0.2)  # what is on its way
        self.status = self.process.stop()
        self.said = self.process.output()


FIELDS = (
    "frame.interface_name", "frame.interface_description", "frame.comment", "ip.src", "ip.dst",
    "tcp.dstport", "frame.packet_flags_direction", "udp.dstport",
)  # fmt: skip


def rows(path) -> list[dict[str, str]]:
    """Packets of a file as tshark reads them."""
    fields = [word for field in FIELDS for word in ("-e", field)]
    done = subprocess.run(
        ["tshark", "-r", path, "-T", "fields", "-E", "separator=|", "-E", "occurrence=f", *fields],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [
        dict(zip(FIELDS, line.split("|"), strict=True)) for line in done.stdout.splitlines() if line
    ]


def test_a_denied_packet_is_captured_with_the_rule_that_denied_it(world, tmp_path):
    node = world.nodes[0]
    with Capture(node, tmp_path / "d.pcapng", "--verdict", "dropped", "tcp") as capture:
        assert fetches(world, world.server)
        assert not fetches(world, world.closed)
    assert "lost" in capture.said
    found = rows(tmp_path / "d.pcapng")
    assert found
    assert {row["ip.dst"] for row in found} == {world.closed.addresses[4]}
    assert all(row["frame.interface_description"] == "default/client" for row in found)
    assert "Policy denied" in found[0]["frame.comment"]
    assert "default/closed" in found[0]["frame.comment"]


def test_lines_name_the_rule_that_lets_a_packet_pass(world):
    node = world.nodes[0]
    python = str(ROOT / ".venv" / "bin" / "python")
    lines = node.namespace.spawn(
        python, "-m", "dataplane.cli.main", "capture", "--config", str(node.config), "-c", "2",
        "--seconds", "20", "--pod", world.closed.addresses[6], "tcp", env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    eventually(lambda: node.ask("status")["forwarder"]["captures"], "the capture")
    assert fetches(world, world.closed, 6, world.friend)
    first, second, last = lines.wait().splitlines()
    assert " out default/closed (" in first
    assert f"-> [{world.closed.addresses[6]}]:{checks.HTTP_PORT} tcp" in first
    assert "Forwarded from default/friend" in first
    assert "ingress by CiliumNetworkPolicy default/closed" in first
    assert " in  default/closed" in second
    assert "reply" in second
    assert last == "2 packets captured, 0 lost"


def test_a_pod_has_what_crosses_its_device_both_ways(world, tmp_path):
    node = world.nodes[0]
    with Capture(node, tmp_path / "p.pcapng", "--pod", "default/server"):
        assert fetches(world, world.server)
        assert not fetches(world, world.closed)
    found = rows(tmp_path / "p.pcapng")
    ends = {world.client.addresses[4], world.server.addresses[4]}
    assert {row["frame.interface_description"] for row in found} == {"default/server"}
    mine = [row for row in found if row["tcp.dstport"]]
    assert {row["ip.src"] for row in mine} == ends
    directions = {row["ip.src"]: int(row["frame.packet_flags_direction"], 16) for row in mine}
    assert directions == {world.server.addresses[4]: 1, world.client.addresses[4]: 2}


def test_an_established_flow_is_seen_and_goes_back_to_xdp(world, tmp_path):
    """The flow table rests while a capture wants what is forwarded."""
    node = world.nodes[0]
    table = lambda: node.ask("status")["forwarder"]["flow_table"]  # noqa: E731
    flow = world.client.namespace.spawn(
        "iperf3", "-c", world.server.addresses[4], "-u", "-b", "2M", "-l", "500", "-t", "30"
    )
    eventually(lambda: table()["on"] and table()["entries"] > 0, "an entry")
    with Capture(node, tmp_path / "f.pcapng", "udp", "and", "dst", "host",
                 world.server.addresses[4], "-s", "100"):  # fmt: skip
        assert not table()["on"]
        time.sleep(1)
    assert len(rows(tmp_path / "f.pcapng")) > 300  # of 500 a second
    assert table()["on"]
    before = table()["packets"]
    eventually(lambda: table()["packets"] > before, "XDP forwards again")
    flow.stop()


def test_filters_find_the_inner_packet_on_the_uplink(world, tmp_path):
    node = world.nodes[0]
    words = ("--pod", "eth0", "tcp", "and", "host", world.far.addresses[4])
    with Capture(node, tmp_path / "u.pcapng", *words):
        assert fetches(world, world.far)
    found = rows(tmp_path / "u.pcapng")
    assert {row["udp.dstport"] for row in found} == {"8472"}
    assert {row["frame.packet_flags_direction"][-1] for row in found} == {"1", "2"}


def test_a_reader_that_is_killed_leaves_no_capture(world, tmp_path):
    node = world.nodes[0]
    with Capture(node, tmp_path / "k.pcapng") as capture:
        capture.process.stop(9)
        eventually(lambda: node.ask("status")["forwarder"]["captures"] == 0, "its end", 15)
    assert node.ask("status")["forwarder"]["flow_table"]["on"]


def test_trace_shows_every_stage(world):
    node = world.nodes[0]
    python = str(ROOT / ".venv" / "bin" / "python")
    trace = node.namespace.spawn(
        python, "-m", "dataplane.cli.main", "trace", "--config", str(node.config), "-o", "json",
        "-c", "1", "--seconds", "20", "tcp", "and", "dst", "host", world.closed.addresses[4],
        env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    eventually(lambda: node.ask("status")["forwarder"]["captures"], "the trace")
    assert not fetches(world, world.closed)
    told = json.loads(trace.wait())
    names = [row["stage"] for row in told["stages"]]
    assert names[:4] == ["parse", "admit", "track", "connect"]
    assert all(row["ns"] >= 0 for row in told["stages"])
    assert "drop, Policy denied" in {r["stage"]: r["after"] for r in told["stages"]}["connect"]
    assert "default/closed" in told["end"]


def test_wireshark_finds_the_pods(world, tmp_path):
    node = world.nodes[0]
    listed = node.command("extcap", "--extcap-interfaces")
    assert "{display=Penstock: default/client}" in listed
    device = next(
        row["host_ifname"] for row in node.ask("endpoint", "list") if row["pod"] == "default/client"
    )
    name = f"penstock-{device}"
    assert "EN10MB" in node.command("extcap", "--extcap-interface", name, "--extcap-dlts")
    wrong = ("extcap", "--extcap-interface", name, "--extcap-capture-filter", "host and")
    assert "syntax error" in node.command(*wrong)
    fifo = tmp_path / "fifo"
    subprocess.run(["mkfifo", fifo], check=True)
    python = str(ROOT / ".venv" / "bin" / "python")
    reader = subprocess.Popen(
        ["tshark", "-r", fifo, "-c", "3", "-T", "fields", "-e", "ip.src"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    capture = node.namespace.spawn(
        python, "-m", "dataplane.cli.main", "extcap", "--config", str(node.config), "--capture",
        "--extcap-interface", name, "--fifo", str(fifo), "--extcap-capture-filter", "tcp",
        env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    eventually(lambda: node.ask("status")["forwarder"]["captures"], "the capture")
    assert fetches(world, world.server)
    said, _ = reader.communicate(timeout=20)
    assert world.client.addresses[4] in said
    assert capture.stop() == 0


# --- Prometheus, and the page ---------------------------------------------------------------------

PROMETHEUS = ROOT / "build" / "prometheus" / "usr" / "bin" / "prometheus"
BOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
RULES = ROOT / "deploy" / "prometheus" / "alerts.yaml"
EMPTY = {  # what a quiet node has nothing to say about
    "TCP resets", "To the world", "Dropped, by pod that was to receive",
}  # fmt: skip


def expressions():
    """Every query of every panel, as Prometheus gets it from Grafana."""
    for board in BOARDS:
        for panel in json.loads(board.read_text())["panels"]:
            for one in panel["targets"]:
                text = one["expr"].replace("$__rate_interval", "10s")
                yield panel["title"], text.replace("$instance", ".*").replace("$pod", ".*")


@pytest.fixture(scope="module")
def prometheus(world, tmp_path_factory):
    """A function that asks a real Prometheus, which scrapes node 1 every second."""
    if not PROMETHEUS.exists():
        pytest.skip("Prometheus is not unpacked: make build/prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    scrape = {"job_name": "penstock", "static_configs": [{"targets": ["127.0.0.1:9962"]}]}
    config = {"global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
              "scrape_configs": [scrape], "rule_files": [str(RULES)]}  # fmt: skip
    (folder / "prometheus.yml").write_text(json.dumps(config))
    space = world.nodes[0].namespace
    process = space.spawn(
        str(PROMETHEUS), f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data", "--web.listen-address=127.0.0.1:9090",
    )  # fmt: skip

    def ask(path, **arguments):
        words = [w for k, v in arguments.items() for w in ("--data-urlencode", f"{k}={v}")]
        url = f"http://127.0.0.1:9090/api/v1/{path}"
        answer = json.loads(space.run("curl", "-sS", "-m", "10", "-G", url, *words))
        assert answer["status"] == "success", (arguments, answer)
        return answer["data"]

    def up():
        try:
            return ask("query", query="up == 1")["result"]
        except (LabError, ValueError):  # it does not listen yet, or says "Service Unavailable"
            return False

    eventually(up, "the first scrape")
    yield ask
    process.stop()


def test_alert_rules_are_good():
    if not PROMETHEUS.exists():
        pytest.skip("Prometheus is not unpacked: make build/prometheus")
    subprocess.run([PROMETHEUS.with_name("promtool"), "check", "rules", RULES], check=True)


def test_every_panel_has_something_to_show(world, prometheus):
    assert fetches(world, world.server)
    assert fetches(world, world.far)
    assert not fetches(world, world.closed)
    assert "192.0.2.99" in asks(world)
    missing = set()

    def all_there():
        fetches(world, world.closed)
        asks(world)
        missing.clear()
        missing.update(
            (title, text)
            for title, text in expressions()
            if not prometheus("query", query=text)["result"] and title not in EMPTY
        )
        return not missing

    try:
        eventually(all_there, "data", 25)
    except LabError:
        assert not missing
    rules = prometheus("rules")["groups"][0]["rules"]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def test_metrics_say_what_counters_say(world, prometheus):
    query = 'hubble_drop_total{source="default/client",reason="POLICY_DENIED"}'

    def value(text):
        found = prometheus("query", query=text)["result"]
        return float(found[0]["value"][1]) if found else 0.0

    before = value(query)
    assert not fetches(world, world.closed)
    eventually(lambda: value(query) > before, "the drop is counted")
    total = 'sum(cilium_drop_count_total{reason="Policy denied"})'
    denied = [row for row in world.nodes[0].ask("counters")["reasons"] if row["reason"] == 133]
    eventually(lambda: value(total) >= sum(row["packets"] for row in denied), "and as a reason")


def test_the_page_in_a_browser(world, tmp_path):
    """Chromium draws it: the map has the pods, drops name the policy, names are listed."""
    assert "192.0.2.99" in asks(world)
    assert fetches(world, world.server)
    assert not fetches(world, world.closed)
    done = world.nodes[0].namespace.run(
        "chromium-headless-shell", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=3000", "--dump-dom", "http://127.0.0.1:9962/", timeout=60,
    )  # fmt: skip
    assert 'data-shown="yes"' in done
    text = done.split("<body", 1)[1]
    for name in ("default/client", "default/server", "default/closed"):
        assert f">{name}</text>" in text
    assert "Policy denied" in text
    assert "CiliumNetworkPolicy default/closed" in text
    assert text.count('class="edge"') >= 2
    assert f">{NAME}.</td>" in text
    assert ">connections</td>" in text
