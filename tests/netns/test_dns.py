"""The story by name: a pod may reach myblobstorage.com, by a real resolver, and nothing else."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from bench import checks
from bench.lab import Lab, LabError, eventually
from bench.penstock import Cluster, PodSpec
from bench.resolver import ADDRESSES, Resolver, publish
from tests.netns.manifests import cilium_policy, namespace

pytestmark = [pytest.mark.root, pytest.mark.net]

NAME = "myblobstorage.com"
STORE = {4: ("11.2.0.1", "11.2.0.2"), 6: ("2001:db8:2::1", "2001:db8:2::2")}
OTHER = {4: "11.2.0.9", 6: "2001:db8:2::9"}  # where another name leads
TCP_ONLY = {4: "11.2.0.4", 6: "2001:db8:2::4"}  # where tcp.NAME leads
GENAI = {"app": "genai_backend"}
ZONES = {
    NAME: f"@ A {STORE[4][0]}\n@ AAAA {STORE[6][0]}\nwww CNAME store.cdn.test.\n"
    f"tcp A {TCP_ONLY[4]}\ntcp AAAA {TCP_ONLY[6]}\n"
    + "".join(f"big A 11.2.1.{n}\n" for n in range(60)),
    "cdn.test": f"store CNAME edge.cdn.test.\nedge A {STORE[4][1]}\nedge AAAA {STORE[6][1]}\n",
    "example.org": f"@ A {OTHER[4]}\n@ AAAA {OTHER[6]}\n",
}


def story(**more) -> dict:
    """app: genai_backend asks kube-dns for the store and reaches what it is told; nothing else."""
    names = [{"matchName": NAME}, {"matchPattern": f"*.{NAME}"}]
    labels = {"k8s:io.kubernetes.pod.namespace": "kube-system", "k8s-app": "kube-dns"}
    ports = {"ports": [{"port": "53", "protocol": "ANY"}], "rules": {"dns": names}}
    egress = [
        {"toFQDNs": names, "toPorts": [{"ports": [{"port": str(checks.HTTP_PORT)}]}]},
        {"toEndpoints": [{"matchLabels": labels}], "toPorts": [ports]},
    ]
    return cilium_policy("genai", endpointSelector={"matchLabels": GENAI}, egress=egress, **more)


@pytest.fixture(scope="module")
def world():
    with Lab() as lab:
        cluster = Cluster(lab).start(nodes=1)
        cluster.join()
        one, two = cluster.nodes
        cluster.far = cluster.outside()
        for family, bits in ((4, 32), (6, 128)):
            for address in (*STORE[family], OTHER[family], TCP_ONLY[family]):
                cluster.far.namespace.ip(f"addr add {address}/{bits} dev lo")
                for node in cluster.nodes:
                    way = f"via {cluster.far.underlay[family]} dev eth0"
                    node.namespace.ip(f"route add {address}/{bits} {way}")
        cluster.apply("namespaces", namespace("default"), namespace("kube-system"))
        cluster.dns = two.pod("dns", PodSpec("kube-system", {"k8s-app": "kube-dns"}))
        cluster.genai = one.pod("genai", PodSpec(labels=GENAI))
        cluster.free = one.pod("free", PodSpec(labels={"app": "free"}))
        cluster.resolver = Resolver(cluster.dns.namespace, ZONES)
        publish(cluster, cluster.dns)
        cluster.servers = checks.serve(cluster.far.namespace)
        folders = [_resolv_conf(pod) for pod in (cluster.genai, cluster.free)]
        cluster.apply("policy-genai", story())
        eventually(lambda: _dig(cluster.genai, "example.org")[0] == "REFUSED", "the policy", 30)
        yield cluster
        for folder in folders:
            shutil.rmtree(folder)


def _resolv_conf(pod) -> Path:
    """What `ip netns exec` puts in the place of /etc/resolv.conf."""
    folder = Path("/etc/netns") / pod.namespace.name
    folder.mkdir(parents=True)
    lines = [f"nameserver {address}" for address in ADDRESSES.values()]
    search = "search default.svc.cluster.local svc.cluster.local cluster.local"
    (folder / "resolv.conf").write_text("\n".join([*lines, search, "options ndots:5 timeout:2\n"]))
    return folder


def _dig(pod, name: str, kind: str = "A", *words: str, family: int = 4) -> tuple[str, list[str]]:
    """Status and answers."""
    options = ("+time=2", "+tries=2", "+noall", "+comments", "+answer", *words)
    try:
        text = pod.namespace.run("dig", f"@{ADDRESSES[family]}", *options, name, kind)
    except LabError as error:
        text = str(error)
    status = re.search(r"status: (\w+)", text)
    found = [line.split()[-1] for line in text.splitlines() if line and line[0] != ";"]
    return status[1] if status else "", found


def _fetches(pod, host: str, family: int, seconds: str = "5") -> bool:
    url = f"http://{host}:{checks.HTTP_PORT}/"
    words = ["curl", "-sS", "-g", f"-{family}", "-o", "/dev/null", "-m", seconds, url]
    try:
        pod.namespace.run(*words)
    except LabError:
        return False
    return True


@pytest.mark.parametrize("family", [4, 6])
def test_curl_reaches_the_store_by_its_name(world, family):
    """Through the search list of a pod's resolv.conf, a service's address, CNAMEs."""
    assert _fetches(world.genai, NAME, family, "10")
    assert _fetches(world.genai, f"www.{NAME}", family, "10")
    rows = world.nodes[0].ask("fqdn", "list")
    assert {STORE[family][0], STORE[family][1]} <= {row["address"] for row in rows}
    assert {row["name"] for row in rows} == {f"{NAME}.", f"www.{NAME}."}


@pytest.mark.parametrize("family", [4, 6])
def test_every_other_name_and_address_is_denied_and_says_by_whom(world, family):
    status, found = _dig(world.genai, "example.org", {4: "A", 6: "AAAA"}[family], family=family)
    assert (status, found) == ("REFUSED", [])
    host = OTHER[family] if family == 4 else f"[{OTHER[family]}]"
    assert not _fetches(world.genai, host, family, "2")
    flows = world.nodes[0].ask("flows", "--last", "200")
    mine = [flow for flow in flows if flow["destination"] == OTHER[family] and flow["refusal"]]
    assert mine
    assert "default/genai" in mine[0]["policy"], mine[0]
    assert _dig(world.free, "example.org")[0] == "NOERROR", "others are not concerned"


def test_addresses_that_rotate_are_followed(world):
    """The zone gets another address; the pod that asks again reaches it at once."""
    fresh = {4: "11.2.0.3", 6: "2001:db8:2::3"}
    for family, bits in ((4, 32), (6, 128)):
        world.far.namespace.ip(f"addr add {fresh[family]}/{bits} dev lo")
        for node in world.nodes:
            way = f"via {world.far.underlay[family]} dev eth0"
            node.namespace.ip(f"route add {fresh[family]}/{bits} {way}")
    world.resolver.change("cdn.test", f"store A {fresh[4]}\nstore AAAA {fresh[6]}")
    try:
        for family in (4, 6):
            assert not _fetches(
                world.genai, fresh[4] if family == 4 else f"[{fresh[6]}]", family, "1"
            )
        wanted = lambda: _dig(world.genai, f"www.{NAME}")[1][-1:] == [fresh[4]]  # noqa: E731
        eventually(wanted, "the new address", 20)
        for family in (4, 6):
            assert _fetches(world.genai, f"www.{NAME}", family, "10")
    finally:
        world.resolver.change("cdn.test", ZONES["cdn.test"])


@pytest.mark.parametrize("family", [4, 6])
def test_names_count_over_tcp_too(world, family):
    """The proxy speaks to both sides under the other's address, and what it hears teaches."""
    kind = {4: "A", 6: "AAAA"}[family]
    status, found = _dig(world.genai, f"tcp.{NAME}", kind, "+tcp", family=family)
    assert (status, found) == ("NOERROR", [TCP_ONLY[family]])
    assert _fetches(world.genai, TCP_ONLY[family] if family == 4 else f"[{TCP_ONLY[6]}]", family)
    assert _dig(world.genai, "example.org", kind, "+tcp", family=family)[0] == "REFUSED"
    assert _dig(world.free, "example.org", kind, "+tcp", family=family)[0] == "NOERROR"


def test_an_answer_too_large_for_udp_is_fetched_over_tcp(world):
    status, found = _dig(world.genai, f"big.{NAME}", "A", "+bufsize=512")
    assert (status, len(found)) == ("NOERROR", 60)
    rows = world.nodes[0].ask("fqdn", "list")
    assert sum(row["name"] == f"big.{NAME}." for row in rows) == 60


def test_the_command_line_knows_what_was_asked(world):
    node = world.nodes[0]
    assert _dig(world.genai, "refused.example")[0] == "REFUSED"
    top = {row["name"]: row for row in node.ask("dns", "top", "-n", "100")}
    assert top["refused.example."]["refused"] > 0
    assert top[f"{NAME}."]["answers"] > 0
    pods = {row["pod"]: row for row in node.ask("dns", "top", "--by", "pod")}
    assert pods["default/genai"]["refused"] > 0
    assert pods["default/genai"]["rcodes"]["NOERROR"] > 0
    assert [name for name, row in pods.items() if row["malformed"]] == [], "nobody has sent any"
    servers = {row["server"]: row for row in node.ask("dns", "slow")["servers"]}
    assert 0 < servers[world.dns.addresses[4]]["p50_ms"] < 1000
    with pytest.raises(LabError, match="may not ask"):
        node.command("fqdn", "why", "refused.example", "--pod", "default/genai")
    assert "leads to" in node.command("fqdn", "why", NAME, "--pod", "default/genai")
    flows = node.command("observe", "--pod", "default/genai", "--type", "l7", "--protocol", "dns",
                         "--last", "200", "--print-policy-names")  # fmt: skip
    asked = next(line for line in flows.splitlines() if "refused.example" in line)
    assert "dns-request proxy DROPPED (DNS Query refused.example. A; REFUSED)" in asked
    assert "EGRESS DENIED BY CiliumNetworkPolicy default/genai" in asked
    assert f'DNS Answer "{STORE[4][0]}" TTL: 5 (Proxy {NAME}. A)' in flows
    entries = node.ask("policy", "get", "default/genai")[0]["policy"]["entries"]
    assert f"the name {NAME}" in {entry["peers"] for entry in entries}


def _flood(pod, folder: Path, seconds: int, rate: int = 2000, waiting: int = 500, family: int = 4):
    """Start dnsperf, which pauses while so many queries wait for their answers.

    One socket's buffer (net.core.rmem_max) holds some 270 answers, and more of them come at once
    when dnsperf has waited for a core: so it asks as 20 clients.
    """
    names = folder / f"{pod.name}-queries"
    names.write_text(f"{NAME} A\nwww.{NAME} AAAA\n{NAME} AAAA\nwww.{NAME} A\n")
    return pod.namespace.spawn(
        "dnsperf", "-s", ADDRESSES[family], "-d", str(names), "-l", str(seconds), "-Q", str(rate),
        "-q", str(waiting), "-c", "20", "-t", "3", log=f"{pod.name}-dnsperf-{seconds}-{family}",
    )  # fmt: skip


def _lost(text: str) -> tuple[int, int]:
    """Queries sent, and those without an answer, as dnsperf says."""
    sent = re.search(r"Queries sent:\s+(\d+)", text)
    completed = re.search(r"Queries completed:\s+(\d+)", text)
    assert sent, text
    assert completed, text
    return int(sent[1]), int(sent[1]) - int(completed[1])


def test_killing_the_agent_loses_no_query_and_opens_nothing(world):
    """kill -9 under 2000 queries a second; it is restarted in the meantime."""
    node = world.nodes[0]
    flood = _flood(world.genai, Path(world.lab.folder), 8)
    eventually(lambda: node.pid("agent"), "an agent")
    node.kill_agent()
    assert _fetches(world.genai, NAME, 4, "10")
    assert _dig(world.genai, "example.org")[0] == "REFUSED"
    assert not _fetches(world.genai, OTHER[4], 4, "1")
    assert _dig(world.genai, NAME, "A", "+tcp")[0] == "NOERROR"
    sent, lost = _lost(flood.wait(60))
    assert sent > 5000
    assert lost == 0
    node.wait(60)
    assert _fetches(world.genai, NAME, 4, "10")


def test_an_upgrade_loses_no_query_that_a_client_asks_again(world):
    """Every process is replaced under 2000 queries a second; what is denied stays so."""
    node = world.nodes[0]
    parts = ("agent", "forwarder", "observer", "dnsproxy")
    before = {part: node.pid(part) for part in parts}
    flood = _flood(world.genai, Path(world.lab.folder), 300, waiting=20000)
    eventually(lambda: _dig(world.genai, NAME)[0] == "NOERROR", "an answer")
    os.kill(node.process.pid, signal.SIGHUP)
    asked, opened, left = [], [], time.monotonic() + 120
    while any(node.pid(part) in (0, before[part]) for part in parts):
        asked.append(_dig(world.genai, NAME, "A", "+time=1", "+tries=3")[0])
        asked.append(_dig(world.genai, "example.org", "A", "+time=1", "+tries=3")[0])
        opened.append(_fetches(world.genai, OTHER[4], 4, "0.2"))
        assert time.monotonic() < left, node.log()
    flood.popen.send_signal(signal.SIGINT)
    sent, lost = _lost(flood.wait(60))
    assert asked == ["NOERROR", "REFUSED"] * (len(asked) // 2)
    assert not any(opened)
    assert lost < sent / 2, "the forwarder's successor was not prepared"
    node.wait(60)
    assert _fetches(world.genai, NAME, 4, "10")


def _notes(node) -> dict[str, int]:
    return node.ask("status")["forwarder"]["names"]


def _asked(node, pod: str) -> int:
    """Queries of a pod that were counted, and answered."""
    rows = {row["pod"]: row for row in node.ask("dns", "top", "--by", "pod")}
    assert rows[pod]["queries"] == rows[pod]["answers"] + rows[pod]["retries"]
    return rows[pod]["queries"]


@pytest.mark.parametrize("family", [4, 6])
def test_without_names_in_its_policies_a_pods_dns_needs_no_forwarder(world, family):
    """kill -9 under dnsperf: no query is lost, and none goes uncounted though nobody was there."""
    node = world.nodes[0]
    assert _dig(world.free, NAME)[0] == "NOERROR"
    before, notes = _asked(node, "default/free"), _notes(node)
    rate = 1000  # the ring holds 15 s of it, and a forwarder is back in 5
    flood = _flood(world.free, Path(world.lab.folder), 8, rate, family=family)
    eventually(lambda: _notes(node)["copies"] > notes["copies"] + 1000, "copies", 10)
    node.kill_forwarder()
    sent, lost = _lost(flood.wait(60))
    assert sent > 5 * rate
    assert lost == 0
    eventually(lambda: _asked(node, "default/free") == before + sent, "every query", 30)
    assert _notes(node)["copies_lost"] == notes["copies_lost"]


def test_names_survive_the_forwarder(world):
    node = world.nodes[0]
    assert _fetches(world.genai, NAME, 4, "10")
    node.kill_forwarder()
    host = STORE[4][0]
    eventually(lambda: _fetches(world.genai, host, 4, "1"), "by an address learned before", 60)
    assert not _fetches(world.genai, OTHER[4], 4, "1")
