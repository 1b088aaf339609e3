"""Least privilege with real programs: the genai_backend story, and what becomes of live traffic."""

import copy
import subprocess
import sys

import pytest

from bench import checks
from bench.lab import Lab, LabError, eventually
from bench.penstock import Cluster, PodSpec
from tests.netns.manifests import cilium_policy, namespace, network_policy, service, slices

pytestmark = [pytest.mark.root, pytest.mark.net]

DNS = {4: "10.96.0.53", 6: "fd00:96::53"}
STORE = {4: "11.2.0.1", 6: "2001:db8:2::1"}  # the one destination that is allowed
NAME = "myblobstorage.com"
GENAI = {"app": "genai_backend"}
ALLOWED = [{"cidr": f"{STORE[4]}/32"}, {"cidr": f"{STORE[6]}/128"}]
KUBE_DNS = {
    "toEndpoints": [
        {"matchLabels": {"k8s:io.kubernetes.pod.namespace": "kube-system", "k8s-app": "kube-dns"}}
    ],
    "toPorts": [{"ports": [{"port": "53", "protocol": "ANY"}]}],
}


def story(**more) -> dict:
    """A pod labelled app: genai_backend reaches the store and kube-dns, and nothing else."""
    egress = [{"toCIDRSet": ALLOWED}, KUBE_DNS]
    return cilium_policy("genai", endpointSelector={"matchLabels": GENAI}, egress=egress, **more)


@pytest.fixture(scope="module")
def world():
    with Lab() as lab:
        cluster = Cluster(lab).start(nodes=1)
        cluster.join()
        one, two = cluster.nodes
        cluster.far = cluster.outside()
        _store(cluster)
        cluster.apply("namespaces", namespace("default"), namespace("kube-system"))
        labels = {"k8s-app": "kube-dns"}
        cluster.dns = two.pod("coredns", PodSpec("kube-system", labels))
        cluster.genai = one.pod("genai", PodSpec(labels=GENAI))
        cluster.free = one.pod("free", PodSpec(labels={"app": "free"}))
        _resolver(cluster)
        cluster.servers = checks.serve(cluster.far.namespace)
        cluster.apply("policy-genai", story())
        eventually(lambda: not _fetches(cluster.genai, cluster.far.addresses[4]), "the policy")
        yield cluster


def _store(cluster) -> None:
    for family, bits in ((4, 32), (6, 128)):
        cluster.far.namespace.ip(f"addr add {STORE[family]}/{bits} dev lo")
        for node in cluster.nodes:
            way = f"via {cluster.far.underlay[family]} dev eth0"
            node.namespace.ip(f"route add {STORE[family]}/{bits} {way}")


def _resolver(cluster) -> None:
    records = [f"--address=/{NAME}/{address}" for address in STORE.values()]
    cluster.dns.namespace.spawn(
        "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null",
        "--pid-file", "--user=root", "--log-facility=-", "--bind-dynamic", *records,
    )  # fmt: skip
    ports = [(53, 53)]
    found = [("node2", cluster.dns.addresses)]
    cluster.apply(
        "dns",
        *(
            entry
            for protocol in ("UDP", "TCP")
            for entry in (
                service(f"dns-{protocol.lower()}", list(DNS.values()), ports, protocol,
                        "kube-system"),
                *slices(f"dns-{protocol.lower()}", ports, found, protocol, "kube-system"),
            )
        ),
    )  # fmt: skip


def _fetches(pod, address: str, seconds: str = "2") -> bool:
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{checks.HTTP_PORT}/"
    try:
        pod.namespace.run("curl", "-sS", "-g", "-o", "/dev/null", "-m", seconds, url)
    except LabError:
        return False
    return True


def _drops(node, text: str) -> int:
    rows = node.ask("counters")["reasons"]
    return sum(row["packets"] for row in rows if row["text"] == text)


@pytest.mark.parametrize("family", [4, 6])
def test_the_pod_reaches_its_store_and_its_resolver(world, family):
    for transport in ("+notcp", "+tcp"):
        words = ["dig", f"@{DNS[family]}", "+short", "+time=3", "+tries=1", transport]
        answer = world.genai.namespace.run(*words, NAME, {4: "A", 6: "AAAA"}[family])
        assert answer.strip() == STORE[family]
    assert _fetches(world.genai, STORE[family], "10")


@pytest.mark.parametrize("family", [4, 6])
def test_the_pod_reaches_nothing_else(world, family):
    node = world.nodes[0]
    before = _drops(node, "Policy denied")
    assert not _fetches(world.genai, world.far.addresses[family])
    assert not _fetches(world.genai, world.free.addresses[family])
    assert not _fetches(world.genai, node.addresses[family])
    with pytest.raises(LabError):
        checks.ping(world.genai.namespace, world.free.addresses[family], 1, wait=1)
    assert _drops(node, "Policy denied") > before
    assert _fetches(world.free, world.far.addresses[family], "10"), "others are not concerned"


def test_every_denied_packet_is_explained(world):
    target = world.far.addresses[4]
    assert not _fetches(world.genai, target)
    flows = world.nodes[0].ask("flows", "--last", "200")
    mine = [flow for flow in flows if flow["destination"] == target and flow["refusal"]]
    assert mine
    assert mine[0]["source"] == world.genai.addresses[4]
    assert mine[0]["verdict"] == "DROPPED"
    assert "default/genai" in mine[0]["policy"], mine[0]


@pytest.mark.parametrize("answer", ["icmp", "reset"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_policy_may_answer_what_it_denies(world, family, answer):
    """The client learns at once: reset, or prohibited by ICMP (which Linux calls unreachable)."""
    code = (
        "import errno, socket\n"
        "try: socket.create_connection((%r, 1), 3)\n"
        "except OSError as error: print(errno.errorcode.get(error.errno))\n"
    )
    wanted = {"reset": {"ECONNREFUSED"}, "icmp": {"EHOSTUNREACH", "EACCES"}}[answer]
    world.apply("policy-genai", story(annotations={"penstock.io/deny-response": answer}))
    try:
        words = ["python3", "-c", code % world.far.addresses[family]]
        eventually(lambda: world.genai.namespace.run(*words).strip() in wanted, answer, 20)
    finally:
        world.apply("policy-genai", story())


ECHO = (
    "import socket, threading\n"
    "s = socket.create_server(('::', 9000), family=socket.AF_INET6, dualstack_ipv6=True)\n"
    "def echo(peer):\n"
    "    while data := peer.recv(4096): peer.sendall(data)\n"
    "while True: threading.Thread(target=echo, args=(s.accept()[0],), daemon=True).start()\n"
)
TALK = (
    "import socket, sys\n"
    "s = socket.create_connection((sys.argv[1], 9000)); s.settimeout(1)\n"
    "for number, _ in enumerate(sys.stdin):\n"
    "    s.sendall(b'%08d' % number); heard = b''\n"
    "    try:\n"  # answers to what was sent while the connection was cut come first
    "        while not heard.endswith(b'%08d' % number): heard = heard[-8:] + s.recv(4096)\n"
    "        print(True, flush=True)\n"
    "    except OSError: print(False, flush=True)\n"
)


@pytest.mark.parametrize("family", [4, 6])
def test_a_change_of_policy_cuts_a_live_connection_and_lets_it_live_again(world, family):
    server = world.free.namespace.spawn(sys.executable, "-c", ECHO, log=f"live{family}")
    address = world.free.addresses[family]
    other = world.nodes[1].pod(f"reader{family}")
    deny = network_policy(
        "cut", podSelector={"matchLabels": {"app": "free"}}, policyTypes=["Ingress"]
    )
    words = other.namespace.wrap([sys.executable, "-u", "-c", TALK, address])
    eventually(lambda: _connects(other, address), "the server")
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as client:  # fmt: skip

        def alive() -> bool:
            client.stdin.write("?\n")
            client.stdin.flush()
            return client.stdout.readline().strip() == "True"

        try:
            assert alive()
            world.apply("policy-cut", deny)
            eventually(lambda: not _connects(other, address), "the policy", 10)
            assert not alive()
            world.remove("policy-cut")
            eventually(alive, "the connection lives again", 30)
        finally:
            world.remove("policy-cut")
            client.stdin.close()
            server.stop()
    other.delete()


def _connects(pod, address: str) -> bool:
    code = f"import socket; socket.create_connection(({address!r}, 9000), 1)"
    try:
        pod.namespace.run(sys.executable, "-c", code)
    except LabError:
        return False
    return True


def test_a_new_pod_is_isolated_from_its_first_packet(world):
    """A policy that already selects it: nothing of the pod ever reaches the world."""
    far = world.far
    log = far.namespace.lab.folder / f"{far.namespace.short}-http.log"
    for number in range(4):
        pod = world.nodes[0].pod(f"fresh{number}", PodSpec(labels=GENAI))
        assert not _fetches(pod, far.addresses[4], "1")
        assert _fetches(pod, STORE[4], "10")
        pod.delete()
    assert not [line for line in log.read_text().splitlines() if far.addresses[4] in line]
    denied = [f for f in world.nodes[0].ask("flows", "--last", "500") if f["verdict"] == "DROPPED"]
    assert any(flow["destination"] == far.addresses[4] for flow in denied)


def test_an_invalid_policy_is_refused_whole_and_the_last_good_one_stays(world):
    bad = copy.deepcopy(story())
    bad["spec"]["egress"][0]["toCIDRSet"][0]["cidr"] = "11.2.0.300/32"
    world.apply("policy-genai", bad)
    try:
        node = world.nodes[0]
        eventually(
            lambda: [e for e in node.ask("status")["errors"] if "11.2.0.300" in e], "the refusal"
        )
        error = next(e for e in node.ask("status")["errors"] if "11.2.0.300" in e)
        assert "policy-genai.yaml:" in error, error
        node.kill_agent()
        node.wait(60)
        assert not _fetches(world.genai, world.far.addresses[4])
        assert _fetches(world.genai, STORE[4], "10")
    finally:
        world.apply("policy-genai", story())


def test_the_agent_is_not_needed_to_enforce(world):
    node = world.nodes[0]
    node.kill_agent()
    assert not _fetches(world.genai, world.far.addresses[4])
    assert _fetches(world.genai, STORE[4], "10")
    node.wait(60)
    assert not _fetches(world.genai, world.far.addresses[4])


def test_policies_survive_the_forwarder(world):
    node = world.nodes[0]
    node.kill_forwarder()
    eventually(lambda: _fetches(world.genai, STORE[4]), "the forwarder is back", 60)
    assert not _fetches(world.genai, world.far.addresses[4])
