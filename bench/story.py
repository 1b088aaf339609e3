"""What `make run` shows of services, policies and names: a story of a few steps.

Rule: a step says what is done, what is wanted and what was seen; it passes when these agree.

Theory. Pods "a" of both nodes are the shop's web servers behind a ClusterIP, the first node's pod
"b" is its client and the second's a stranger. A policy lets the client alone in; what happens then
to the stranger is explained by the product itself, by `penstock policy why`.
"""

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml
from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bench import names
from bench.lab import LabError, eventually
from bench.penstock import Cluster, Pod

ADDRESSES = {4: "10.96.0.80", 6: "fd00:96::80"}
SERVED, REFUSED = "answered", "no answer"
SECONDS = 2  # curl's patience
FORCE_S = 10.0  # a change of objects is in force long before

SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  type: ClusterIP
  clusterIP: 10.96.0.80
  clusterIPs: [10.96.0.80, "fd00:96::80"]
  ipFamilies: [IPv4, IPv6]
  ports: [{name: http, port: 80, targetPort: 8080, protocol: TCP}]
"""
SLICE = """
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: default, labels: {kubernetes.io/service-name: web}}
ports: [{name: http, port: 8080, protocol: TCP}]
"""
POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web-for-clients, namespace: default}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {role: client}}}]
    ports: [{port: 8080, protocol: TCP}]
"""


@dataclass(frozen=True)
class Step:
    """One line of the story."""

    what: str
    command: str
    wanted: str
    seen: str

    @property
    def passed(self) -> bool:
        """Whether what was wanted was seen."""
        return self.wanted == self.seen


class Story:
    """The shop of a cluster with two nodes of two pods each."""

    length = 25  # steps

    def __init__(self, cluster: Cluster) -> None:
        """Label the pods; nothing else is changed yet."""
        self.cluster = cluster
        (web1, self.client), (web2, self.stranger) = (node.pods for node in cluster.nodes)
        self.web = (web1, web2)
        self.steps: list[Step] = []
        self.explained = self.refused = self.observed = ""
        for pod in self.web:
            pod.announce({"app": "web"})
        self.client.announce({"role": "client"})
        self.stranger.announce({"role": "stranger"})

    def tell(self) -> Iterator[Step]:
        """Go through the story, step by step; the policy is lifted at its end."""
        for chapter in (self.service, self.policy, self.explanation, self.names):
            for step in chapter():
                self.steps.append(step)
                yield step
        self.cluster.remove("web-for-clients")

    def errors(self) -> list[str]:
        """What did not go as wanted, one line each."""
        return [
            f"{s.command}: wanted {s.wanted}, seen {s.seen}" for s in self.steps if not s.passed
        ]

    def show(self) -> RenderableType:
        """The steps as a table, and the explanation below it."""
        found = Table(
            title="a service, a policy, a denied packet explained, a pod that may reach one name",
            title_justify="left",
            box=SIMPLE_HEAD,
        )
        for heading in ("what", "command", "seen", "result"):
            found.add_column(heading)
        for step in self.steps:
            result = Text("ok", "green") if step.passed else Text("failed", "red")
            found.add_row(*map(Text, (step.what, step.command, step.seen)), result)
        said = {
            "penstock policy why": self.explained,
            "penstock fqdn why": self.refused,
            "penstock observe": self.observed,
        }
        panels = [
            Panel(Text(text), title=title, title_align="left", box=ROUNDED)
            for title, text in said.items()
        ]
        return Group(found, *panels)

    def service(self) -> Iterator[Step]:
        """A ClusterIP in both families."""
        objects = [yaml.safe_load(SERVICE)]
        for family in ADDRESSES:
            one: dict[str, Any] = yaml.safe_load(SLICE)
            one["metadata"]["name"] = f"web-v{family}"
            one["addressType"] = f"IPv{family}"
            one["endpoints"] = [
                {"addresses": [pod.addresses[family]], "nodeName": pod.node.name}
                for pod in self.web
            ]
            objects.append(one)
        self.cluster.apply("web", *objects)
        for pod in (self.client, self.stranger):
            yield from self._fetch(pod, SERVED, "service, ClusterIP")

    def policy(self) -> Iterator[Step]:
        """Only clients may speak to the web servers."""
        self.cluster.apply("web-for-clients", yaml.safe_load(POLICY))
        yield from self._fetch(self.stranger, REFUSED, "only clients may")
        yield from self._fetch(self.client, SERVED, "only clients may")

    def explanation(self) -> Iterator[Step]:
        """The product says why a packet was dropped, and counts it."""
        words = ("policy", "why", "default/" + self.stranger.name, "default/web", "80/tcp")
        node = self.web[0].node
        done = _run(node.namespace.wrap(node.words(*words)))
        self.explained = f"{done.stdout}{done.stderr}".strip()
        told = {0: "allowed", 1: "denied"}.get(done.returncode, f"status {done.returncode}")
        if told == "denied" and "web-for-clients" not in self.explained:
            told = "denied without naming the policy"
        yield Step("why denied", f"penstock {' '.join(words)}", "denied", told)
        drops = [
            flow
            for one in self.web
            for flow in one.node.ask("flows", "--last", "500")
            if flow["verdict"] == "DROPPED" and flow["source"] in self.stranger.addresses.values()
        ]
        seen = drops[0]["reason"] if drops else "no such drop"
        yield Step("dropped flow", "penstock flows", "Policy denied", seen)

    def names(self) -> Iterator[Step]:
        """A pod that may reach one name; the agent dies meanwhile."""
        there = names.Names(self.cluster)
        try:
            for step in names.chapter(there):
                yield Step(*step)
            self.refused, self.observed = there.why(), "\n".join(there.shown)
        finally:
            there.close()

    def _fetch(self, pod: Pod, wanted: str, what: str) -> Iterator[Step]:
        for family, address in ADDRESSES.items():
            url = f"http://{f'[{address}]' if family == 6 else address}/"
            check = partial(self._seen, pod, url, wanted)
            try:
                seen = eventually(check, wanted, FORCE_S)
            except LabError:
                seen = self._curl(pod, url)
            yield Step(what, f"{pod.name}$ curl {url}", wanted, seen)

    def _seen(self, pod: Pod, url: str, wanted: str) -> str:
        seen = self._curl(pod, url)
        return seen if seen == wanted else ""

    def _curl(self, pod: Pod, url: str) -> str:
        words = ["curl", "-sS", "-g", "-o", "/dev/null", "-m", str(SECONDS)]
        done = _run(pod.namespace.wrap([*words, "-w", "%{http_code}", url]))
        if done.returncode == 28:  # curl's time-out
            return REFUSED
        return SERVED if done.stdout == "200" else f"{done.stdout} {done.stderr}".strip()


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
