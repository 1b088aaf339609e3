"""The story's chapter of names: a pod may reach myblobstorage.com, by its DNS, and nothing else.

Rule: real programs only: unbound is kube-dns, curl and dig ask, dnsperf does while the agent dies
and while the node is upgraded.

Theory. The store is outside the cluster: addresses that are on the second node's loopback device
and that no object knows. Its name is an alias of an alias, as names of object stores are, and leads
to other addresses later on. The pod's policy has the name and kube-dns; all else is refused where
it is asked for, or denied on its way.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bench import checks, resolver
from bench.lab import LabError, eventually
from bench.penstock import Cluster, Pod, PodSpec

NAME, OTHER_NAME = "myblobstorage.com", "example.org"
STORE = {4: "11.2.0.1", 6: "2001:db8:2::1"}
MOVED = {4: "11.2.0.2", 6: "2001:db8:2::2"}  # where the store is later on
CDN, ALIAS = "cdn.test", "myblobstorage CNAME store.cdn.test."  # in the zone com
OTHER = {4: "11.2.0.9", 6: "2001:db8:2::9"}
QUERIES = 2000  # a second
SECONDS = 2
UPGRADE_S = 120
DENIED = "Policy denied by CiliumNetworkPolicy default/genai"
PARTS = ("agent", "forwarder", "observer", "dnsproxy")

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: genai, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: genai_backend}}
  egress:
  - toFQDNs: [{matchName: myblobstorage.com}]
  - toEndpoints:
    - matchLabels: {"k8s:io.kubernetes.pod.namespace": kube-system, k8s-app: kube-dns}
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules: {dns: [{matchName: myblobstorage.com}]}
"""


class Names:
    """The pod, its DNS, and the world of the chapter."""

    def __init__(self, cluster: Cluster) -> None:
        """Make pods, resolver, store and policy; LabError when one of them does not come."""
        self.cluster = cluster
        self.node, world = cluster.nodes
        for family, bits in ((4, 32), (6, 128)):
            for address in (STORE[family], MOVED[family], OTHER[family]):
                world.namespace.ip(f"addr add {address}/{bits} dev lo")
                way = f"via {world.addresses[family]} dev eth0"
                self.node.namespace.ip(f"route add {address}/{bits} {way}")
        checks.serve(world.namespace)
        self.pod = self.node.pod("genai", PodSpec(labels={"app": "genai_backend"}))
        self.dns = world.pod("dns", PodSpec("kube-system", {"k8s-app": "kube-dns"}))
        zones = {"com": ALIAS, CDN: _store(STORE), OTHER_NAME: _both("@", OTHER)}
        self.resolver = resolver.Resolver(self.dns.namespace, zones)
        resolver.publish(cluster, self.dns)
        cluster.apply("genai", yaml.safe_load(POLICY))
        self.files = self._resolv_conf()
        self.shown: list[str] = []  # what `penstock observe` said of the denied packets

    def _resolv_conf(self) -> Path:
        """What `ip netns exec` puts in the place of /etc/resolv.conf."""
        folder = Path("/etc/netns") / self.pod.namespace.name
        folder.mkdir(parents=True)
        lines = [f"nameserver {address}" for address in resolver.ADDRESSES.values()]
        (folder / "resolv.conf").write_text("\n".join([*lines, "options timeout:2", ""]))
        return folder

    def close(self) -> None:
        """Lift the policy, remove the file."""
        self.cluster.remove("genai")
        shutil.rmtree(self.files)
        with contextlib.suppress(OSError):  # others are there as well
            self.files.parent.rmdir()

    # --- what is tried ----------------------------------------------------------------------------

    def curl(self, pod: Pod, target: str, family: int) -> str:
        """Return "answered by ADDRESS", "no answer", or what curl says."""
        url = f"http://{f'[{target}]' if ':' in target else target}:{checks.HTTP_PORT}/"
        words = ["curl", "-sS", "-g", f"-{family}", "-o", "/dev/null", "-m", str(SECONDS)]
        done = _run(pod.namespace.wrap([*words, "-w", "%{http_code} %{remote_ip}", url]))
        if done.returncode == 28:
            return "no answer"
        code, _, address = done.stdout.partition(" ")
        return f"answered by {address}" if code == "200" else f"{done.stdout} {done.stderr}".strip()

    def dig(self, name: str, kind: str) -> str:
        """Return the status of kube-dns' answer."""
        words = ["dig", f"@{resolver.ADDRESSES[4]}", "+time=1", "+tries=3", "+noall", "+comments"]
        done = _run(self.pod.namespace.wrap([*words, name, kind]))
        found = re.search(r"status: (\w+)", done.stdout)
        return found[1] if found else "no answer"

    def why(self) -> str:
        """Return what the product says of the name that is refused."""
        words = self.node.words("fqdn", "why", OTHER_NAME, "--pod", "default/genai")
        done = _run(self.node.namespace.wrap(words))
        return f"{done.stdout}{done.stderr}".strip()

    def killed(self) -> str:
        """Ask all the time while the agent is killed; return how many queries were lost."""
        with self._load(100) as found:
            killed = self.node.kill_agent()
            eventually(lambda: self.node.pid("agent") not in (0, killed), "another agent", 30)
            time.sleep(SECONDS)
        return "none lost" if found["lost"] == 0 else f"{found['lost']} of {found['sent']} lost"

    def upgraded(self) -> tuple[str, str]:
        """Ask all the time while every process is started anew.

        Return what clients that ask again have met, and what dnsperf, which asks once, has lost.
        """
        before = {part: self.node.pid(part) for part in PARTS}
        failed: set[str] = set()
        with self._load(20_000) as found:
            os.kill(self.node.process.pid, signal.SIGHUP)  # type: ignore[union-attr]
            left = time.monotonic() + UPGRADE_S
            while any(self.node.pid(part) in (0, before[part]) for part in PARTS):
                for name, wanted in ((NAME, "NOERROR"), (OTHER_NAME, "REFUSED")):
                    status = self.dig(name, "A")
                    failed |= {f"{name}: {status}"} - {f"{name}: {wanted}"}
                if time.monotonic() > left:
                    failed.add(f"not done in {UPGRADE_S} s")
                    break
            time.sleep(SECONDS)
        once = f"{found['lost']} of {found['sent']} lost"
        return ", ".join(sorted(failed)) or "none failed", once

    @contextlib.contextmanager
    def _load(self, waiting: int) -> Iterator[dict[str, int]]:
        """dnsperf at QUERIES a second for the body; afterwards the counts of sent and lost.

        waiting: it pauses while so many have no answer; a server's buffer holds a few hundred.
        """
        queries = self.node.folder / "queries"
        queries.write_text(f"{NAME} A\n{NAME} AAAA\n" * 50)
        words = ["dnsperf", "-s", resolver.ADDRESSES[4], "-d", str(queries), "-Q", str(QUERIES)]
        words += ["-q", str(waiting)]
        words += ["-t", "1"]  # seconds: what has no answer then is lost, and seen before the end
        asking = subprocess.Popen(
            self.pod.namespace.wrap([*words, "-l", "300"]), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        found: dict[str, int] = {}
        try:
            time.sleep(SECONDS)
            yield found
        finally:
            asking.send_signal(signal.SIGINT)  # it waits for answers, then says what it has seen
            said, _ = asking.communicate(timeout=60)
        for word in ("sent", "lost"):
            count = re.search(rf"Queries {word}:\s+(\d+)", said)
            if count is None:
                raise LabError(f"dnsperf has not counted: {said[-400:]}")
            found[word] = int(count[1])
        if not re.search(r"Response codes:\s+NOERROR \d+ \(100\.00%\)", said):
            raise LabError(f"dnsperf got other answers than NOERROR: {said[-400:]}")

    def move(self) -> None:
        """Give the store other addresses, and wait until unbound has read the zone again."""
        self.resolver.change(CDN, _store(MOVED))
        words = ("dig", "@127.0.0.1", "+short", NAME, "A")
        eventually(lambda: MOVED[4] in self.dns.namespace.run(*words), "the other addresses", 20)

    def denied(self, address: str) -> str:
        """Return why the pod's last packet to an address was dropped, and by whom."""
        line = self._observed("--to-ip", address)
        found = re.search(r"(Policy denied) DROPPED .* EGRESS DENIED BY (.*)", line)
        if found is None:
            return line or "no such flow"
        self.shown.append(line)
        return f"{found[1]} by {found[2]}"

    def refused(self) -> str:
        """Return how the product shows the last question of the pod that was refused."""
        return self._observed("--protocol", "dns")

    def _observed(self, *which: str) -> str:
        pod = f"{self.pod.spec.namespace}/{self.pod.name}"
        words = ("--from-pod", pod, "--verdict", "DROPPED", *which, "--last", "1")
        return self.node.command("observe", *words, "--print-policy-names").strip()


def chapter(names: Names) -> Iterator[tuple[str, str, str, str]]:
    """Yield (what, command, wanted, seen) of each step."""
    who = f"{names.pod.name}$"
    for family, kind in ((4, "A"), (6, "AAAA")):
        wanted = f"answered by {STORE[family]}"
        seen = _until(partial(names.curl, names.pod, NAME, family), wanted)
        yield f"by its name, a CNAME, IPv{family}", f"{who} curl -{family} {NAME}", wanted, seen
        seen = _until(partial(names.dig, OTHER_NAME, kind), "REFUSED")
        yield "another name", f"{who} dig {OTHER_NAME} {kind}", "REFUSED", seen
        for what, address in (("another address", OTHER), ("not yet its address", MOVED)):
            seen = names.curl(names.pod, address[family], family)
            yield what, f"{who} curl {address[family]}", "no answer", seen
        seen = _until(partial(names.denied, OTHER[family]), DENIED)
        yield "why denied", f"penstock observe --to-ip {OTHER[family]}", DENIED, seen
    names.shown.append(names.refused())
    names.move()
    for family in MOVED:
        wanted = f"answered by {MOVED[family]}"
        seen = names.curl(names.pod, NAME, family)  # once: the next question is enough
        yield "its zone has other addresses", f"{who} curl -{family} {NAME}", wanted, seen
    said = names.why()
    seen = "may not ask" if f"the pod may not ask for {OTHER_NAME}" in said else said
    yield "why refused", f"penstock fqdn why {OTHER_NAME}", "may not ask", seen
    command = f"{who} dnsperf -Q {QUERIES}; kill -9 AGENT"
    yield "the agent dies under load", command, "none lost", names.killed()
    seen, once = names.upgraded()
    command = f"{who} dig; kill -HUP SUPERVISOR (dnsperf asks once: {once})"
    yield "upgraded under load", command, "none failed", seen


def _until(look: Any, wanted: str) -> str:
    try:
        return str(eventually(lambda: look() == wanted and wanted, wanted, 15))
    except LabError:
        return str(look())


def _both(name: str, addresses: dict[int, str]) -> str:
    return f"{name} A {addresses[4]}\n{name} AAAA {addresses[6]}"


def _store(addresses: dict[int, str]) -> str:
    """Return the zone CDN."""
    return "store CNAME edge\n" + _both("edge", addresses)


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
