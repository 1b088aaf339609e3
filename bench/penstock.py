"""Penstock itself in a laboratory: nodes that run the daemon, pods attached by the CNI plugin.

Rule: nothing is reached around the product: configuration, manifests, `penstock run`, and the
plugin's binary are all that this file uses.

Theory. A node is a namespace with an underlay address in both families. All nodes read one folder
of manifests, so a node joins by one more Node object in it. A pod is an empty namespace that the
plugin is asked to attach, with the configuration that the node itself put into its conf_dir.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any

import yaml

from bench.lab import ROOT, UNDERLAY4, UNDERLAY6, Lab, LabError, Namespace, Process, eventually
from xdp.artifacts import find

START_S = 240.0  # a cold start compiles the kernels, perhaps beside other work
TUNNEL_PORT = {"vxlan": 8472, "geneve": 6081}
CLUSTER = {4: "10.244.0.0/16", 6: "fd00:244::/48"}


@dataclass(frozen=True)
class Settings:
    """What differs between clusters."""

    mode: str = "overlay"
    tunnel: str = "vxlan"
    underlay_family: int = 4
    mtu: int = 1500  # of the underlay
    offload: bool = False  # underlay devices keep transmit offloads (faster than any wire)
    cpus: frozenset[int] = frozenset()  # where the daemons may run, empty: anywhere
    network: dict[str, Any] = field(default_factory=dict)  # more of the section `network`
    forwarder: dict[str, Any] = field(default_factory=dict)  # more of the section `forwarder`
    more: dict[str, Any] = field(default_factory=dict)  # further sections


@dataclass(frozen=True)
class PodSpec:
    """What a Pod object says. ports: containerPort entries."""

    namespace: str = "default"
    labels: dict[str, str] = field(default_factory=dict)
    ports: tuple[dict[str, Any], ...] = ()


class Pod:
    """A namespace with an eth0 from Penstock, and its Pod object."""

    def __init__(self, node: "Node", name: str, spec: "PodSpec") -> None:
        """Make object and namespace, run ADD; LabError with the plugin's answer when it fails.

        As in a cluster the object is there before the pod, and its addresses come after.
        """
        self.node = node
        self.name = name
        self.spec = spec
        self.container = secrets.token_hex(16)
        self.addresses: dict[int, str] = {}
        self.announce()
        self.namespace = node.cluster.lab.namespace(name)
        self.result = node.cni("ADD", self)
        interfaces = [ip_interface(row["address"]) for row in self.result["ips"]]
        self.addresses = {one.version: str(one.ip) for one in interfaces}
        self.announce()

    def announce(self, labels: dict[str, str] | None = None) -> None:
        """Write the Pod object; labels: new ones."""
        if labels is not None:
            self.spec = dataclasses.replace(self.spec, labels=labels)
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name,
                "namespace": self.spec.namespace,
                "labels": self.spec.labels,
            },
            "spec": {
                "nodeName": self.node.name,
                "containers": [{"name": "main", "ports": list(self.spec.ports)}],
            },
            "status": {"podIPs": [{"ip": address} for address in self.addresses.values()]},
        }
        self.node.cluster.apply(f"pod-{self.spec.namespace}-{self.name}", pod)

    def delete(self) -> None:
        """Run DEL, remove the namespace and the object."""
        self.node.cni("DEL", self)
        self.node.pods.remove(self)
        self.node.cluster.remove(f"pod-{self.spec.namespace}-{self.name}")
        self.node.cluster.lab.delete(self.namespace)


class Node:
    """A namespace that runs `penstock run`."""

    def __init__(self, cluster: "Cluster", namespace: Namespace, number: int) -> None:
        """number: 1.. in the underlay; also the number of its pod CIDRs."""
        self.cluster = cluster
        self.namespace = namespace
        self.name = namespace.short
        self.number = number
        self.folder = cluster.lab.folder / self.name
        self.run_dir = self.folder / "run"
        self.conf_dir = self.folder / "net.d"
        self.config = self.folder / "config.yaml"
        self.folder.mkdir()
        self.config.write_text(yaml.safe_dump(self._config()))
        self.addresses: dict[int, str] = {
            4: str(UNDERLAY4 + number),
            6: str(UNDERLAY6 + number),
        }
        self.process: Process | None = None
        self.pods: list[Pod] = []

    def _config(self) -> dict[str, Any]:
        settings = self.cluster.settings
        return {
            "node": {
                "name": self.name,
                "run_dir": str(self.run_dir),
                "state_dir": str(self.folder / "state"),
                "cni": {
                    "bin_dir": str(find("penstock-cni").parent),
                    "conf_dir": str(self.conf_dir),
                },
            },
            "network": {
                "mode": settings.mode,
                "tunnel": settings.tunnel,
                "underlay_family": settings.underlay_family,
                "cluster_cidrs": list(CLUSTER.values()),
                **settings.network,
            },
            "source": {"folder": str(self.cluster.manifests)},
            "forwarder": settings.forwarder,
            **settings.more,
        }

    # --- the daemon -------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the daemon; `wait` says when it is ready."""
        self.process = self.namespace.spawn(
            *_penstock("run", "--config", str(self.config)),
            cpus=self.cluster.settings.cpus,
            env={"PYTHONPATH": str(ROOT), "PENSTOCK_CACHE_DIR": cache_dir()},
            log=f"{self.name}-penstock",
        )

    def wait(self, seconds: float = START_S) -> None:
        """Wait until the node takes pods; LabError with the daemon's log otherwise."""
        try:
            eventually(self._ready, f"{self.name} ready", seconds)
        except LabError as error:
            raise LabError(f"{error}\n{self.log()}") from error

    def _ready(self) -> bool:
        if self.process is None or not self.process.alive:
            raise LabError(f"`penstock run` on {self.name} has ended")
        if not list(self.conf_dir.glob("*.conflist")):
            return False
        with contextlib.suppress(LabError):
            return bool(self.ask("status").get("ready"))
        return False

    def log(self, characters: int = 4000) -> str:
        """The last of what the daemon said."""
        return self.process.output()[-characters:] if self.process else ""

    def ask(self, *words: str) -> Any:
        """What `penstock WORDS -o json` says on this node, decoded."""
        return json.loads(self.command(*words, "-o", "json"))

    def command(self, *words: str) -> str:
        """Run `penstock WORDS --config ...` on this node and return its stdout."""
        return self.namespace.run(*self.words(*words))

    def words(self, *words: str) -> Sequence[str]:
        """What `penstock WORDS` is on this node, to be run in its namespace."""
        return _penstock(*words, "--config", str(self.config))

    def pid(self, part: str) -> int:
        """The process `agent` or `forwarder` of this node, 0 when there is none."""
        return next(iter(self.pids(part)), 0)

    def pids(self, part: str) -> list[int]:
        """All of them: a next one may stand by."""
        found = []
        for pid in self.namespace.pids():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                if part.encode() in words and state != "Z":
                    found.append(pid)
        return found

    def kill(self, *parts: str) -> None:
        """kill -9 of `agent`, `forwarder` or `run` (the supervisor)."""
        for part in parts:
            if pid := self.pid(part):
                os.kill(pid, signal.SIGKILL)

    def kill_agent(self) -> int:
        """kill -9 of the agent; returns the pid it had."""
        pid = self.pid("agent")
        self.kill("agent")
        return pid

    def kill_forwarder(self) -> int:
        """kill -9 of the forwarder; returns the pid it had."""
        pid = self.pid("forwarder")
        self.kill("forwarder")
        return pid

    def stop(self) -> int:
        """SIGTERM to the daemon; returns its exit status."""
        return self.process.stop() if self.process else 0

    # --- pods -------------------------------------------------------------------------------------

    def pod(self, name: str, spec: PodSpec | None = None) -> Pod:
        """Attach a new pod."""
        pod = Pod(self, name, spec or PodSpec())
        self.pods.append(pod)
        return pod

    def cni(self, command: str, pod: Pod, **more: Any) -> Any:
        """Run the plugin as a runtime does; returns its decoded answer, None for an empty one."""
        path = sorted(self.conf_dir.glob("*.conflist"))[0]
        conflist = json.loads(path.read_text())
        conf = {
            **conflist["plugins"][0],
            "name": conflist["name"],
            "cniVersion": max(conflist.get("cniVersions", [conflist["cniVersion"]])),
            **more,
        }
        env = {
            **os.environ,
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod.container,
            "CNI_NETNS": str(pod.namespace.path),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(find("penstock-cni").parent),
            "CNI_ARGS": f"K8S_POD_NAMESPACE={pod.spec.namespace};K8S_POD_NAME={pod.name}",
        }
        done = subprocess.run(
            [find("penstock-cni")],
            input=json.dumps(conf),
            env=env,
            capture_output=True,
            text=True,
            timeout=70,
            check=False,
        )
        if done.returncode:
            raise LabError(
                f"{command} of {pod.name} on {self.name}: {done.stdout}{done.stderr}\n{self.log()}"
            )
        return json.loads(done.stdout) if done.stdout.strip() else None


class Outside:
    """A host of the world: on the underlay, with addresses of its own behind it."""

    def __init__(self, cluster: "Cluster", namespace: Namespace, number: int) -> None:
        """number: of its address in the underlay."""
        self.namespace = namespace
        self.number = number
        self.underlay = {4: str(UNDERLAY4 + number), 6: str(UNDERLAY6 + number)}
        self.addresses = {4: f"11.0.{number}.1", 6: f"2001:db8:ffff:{number:x}::1"}
        bits = {4: 32, 6: 128}
        for family, address in self.addresses.items():
            nodad = " nodad" if family == 6 else ""
            namespace.ip(f"addr add {address}/{bits[family]} dev lo{nodad}")
            for node in cluster.nodes:
                way = f"via {self.underlay[family]} dev eth0"
                node.namespace.ip(f"route add {address}/{bits[family]} {way}")

    def reach(self, address: str, node: Node) -> None:
        """Route an address, such as a load balancer's, to a node."""
        version = ip_address(address).version
        bits = 32 if version == 4 else 128
        self.namespace.ip(f"route replace {address}/{bits} via {node.addresses[version]} dev eth0")


class Cluster:
    """Nodes on one underlay and their folder of manifests."""

    def __init__(self, lab: Lab, settings: Settings | None = None) -> None:
        """settings: defaults are VXLAN over IPv4."""
        self.lab = lab
        self.settings = settings or Settings()
        self.manifests = lab.folder / "manifests"
        self.manifests.mkdir()
        self.nodes: list[Node] = []

    def start(self, nodes: int = 2) -> "Cluster":
        """Make nodes back to back (two) or on a bridge, start their daemons, wait; returns self."""
        settings = self.settings
        spaces = [self.lab.namespace(f"node{number}") for number in range(1, nodes + 1)]
        if nodes == 2:
            self.lab.pair(spaces[0], spaces[1], settings.mtu, settings.offload)
        for number, space in enumerate(spaces, 1):
            if nodes != 2:
                self.lab.connect(space, settings.mtu, settings.offload)
            self.nodes.append(Node(self, space, number))
            self.announce(space.short, number)
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            node.wait()
        return self

    def start_beside(self, name: str = "world") -> "Outside":
        """Start one node, back to back with a host that is not in the cluster; returns the host."""
        settings = self.settings
        space, host = self.lab.namespace("node1"), self.lab.namespace(name)
        self.lab.pair(space, host, settings.mtu, settings.offload)
        self.nodes.append(Node(self, space, 1))
        self.announce(space.short, 1)
        self.nodes[0].start()
        self.nodes[0].wait()
        return Outside(self, host, 2)

    def join(self) -> Node:
        """Add one more node to a bridged cluster and wait for it."""
        space = self.lab.namespace(f"node{len(self.nodes) + 1}")
        number = self.lab.connect(space, self.settings.mtu, self.settings.offload)
        node = Node(self, space, number)
        self.nodes.append(node)
        self.announce(space.short, number)
        node.start()
        node.wait()
        return node

    def announce(self, name: str, number: int, annotations: dict[str, str] | None = None) -> None:
        """Write a Node object, as the API server would show it."""
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "annotations": annotations or {}},
            "spec": {
                "podCIDR": f"10.244.{number}.0/24",
                "podCIDRs": [f"10.244.{number}.0/24", f"fd00:244:0:{number:x}::/64"],
            },
            "status": {
                "addresses": [
                    {"type": "InternalIP", "address": str(UNDERLAY4 + number)},
                    {"type": "InternalIP", "address": str(UNDERLAY6 + number)},
                    {"type": "Hostname", "address": name},
                ],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }
        self.apply(f"node-{name}", node)

    def withdraw(self, name: str) -> None:
        """Delete a Node object."""
        self.remove(f"node-{name}")

    def apply(self, file: str, *manifests: dict[str, Any]) -> None:
        """Write objects as one file of the folder, in the place of what it held."""
        # Beside and renamed: a watcher must not see half a file.
        beside = self.manifests / f".{file}"
        beside.write_text(yaml.safe_dump_all(manifests))
        beside.rename(self.manifests / f"{file}.yaml")

    def remove(self, file: str) -> None:
        """Delete a file of objects."""
        (self.manifests / f"{file}.yaml").unlink(missing_ok=True)

    def outside(self, name: str = "outside") -> "Outside":
        """Add a host that is not in the cluster, on the underlay; nodes have a way to it."""
        space = self.lab.namespace(name)
        return Outside(self, space, self.lab.connect(space, self.settings.mtu))

    def stop(self) -> list[int]:
        """Stop all daemons; returns their exit statuses."""
        return [node.stop() for node in self.nodes]


def cache_dir() -> str:
    """Where compiled kernels are kept, for every daemon alike."""
    return os.environ.get("PENSTOCK_CACHE_DIR", str(ROOT / "build" / "cache"))


def _penstock(*words: str) -> Sequence[str]:
    return (sys.executable, "-m", "dataplane.cli.main", *words)
