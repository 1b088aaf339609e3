"""A node's network namespace with an agent that serves CNI, and the shim as a runtime calls it."""

import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ipam.service import Ipam

ROOT = Path(__file__).parents[1]
SHIM = ROOT / "build/bin/penstock-cni"


def command(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"{words}: {done.stderr}"
    return done.stdout


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@dataclass
class Namespaces:
    made: list[str] = field(default_factory=list)

    def new(self, purpose: str) -> str:
        name = f"pst-{purpose}-{uuid.uuid4().hex[:8]}"
        command("ip", "netns", "add", name)
        self.made.append(name)
        return name

    def close(self, keep: str = "") -> None:
        for name in self.made:
            if name != keep:
                command("ip", "netns", "del", name, check=False)
        self.made = [name for name in self.made if name == keep]


@dataclass
class Node:
    """A node's namespace, its agent and the shim."""

    name: str
    folder: Path
    namespaces: Namespaces
    agent: subprocess.Popen | None = None

    def start(self) -> None:
        (self.folder / "agent.ready").unlink(missing_ok=True)
        words = ["ip", "netns", "exec", self.name, sys.executable, "-m", "tests.cni_agent"]
        log = (self.folder / "agent.log").open("a")
        self.agent = subprocess.Popen([*words, str(self.folder)], cwd=ROOT, stdout=log, stderr=log)
        wait_until(lambda: (self.folder / "agent.ready").exists() or self.agent.poll() is not None)
        assert self.agent.poll() is None, (self.folder / "agent.log").read_text()

    def kill(self) -> None:
        if self.agent is not None:
            self.agent.send_signal(signal.SIGKILL)
            self.agent.wait()
            self.agent = None

    def shim(
        self, verb: str, container: str, netns: str, version: str = "1.1.0", **config
    ) -> subprocess.Popen:
        """A running shim, its configuration written."""
        environment = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": container,
            "CNI_NETNS": netns and f"/run/netns/{netns}",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(SHIM.parent),
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={container}",
        }
        conf = {
            "cniVersion": version,
            "name": "penstock",
            "type": "penstock-cni",
            "socket": str(self.folder / "cni.sock"),
            "deletes": str(self.folder / "deletes"),
            **config,
        }
        running = subprocess.Popen(
            [SHIM],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.stdin.write(json.dumps(conf))
        running.stdin.close()
        running.stdin = None
        return running

    def cni(self, *arguments, **config) -> tuple[int, dict | None]:
        """Exit status and what the shim printed."""
        running = self.shim(*arguments, **config)
        out, _ = running.communicate(timeout=120)
        return running.returncode, json.loads(out) if out else None

    def host_ends(self) -> list[str]:
        links = json.loads(command("ip", "-n", self.name, "-j", "link"))
        return sorted(link["ifname"] for link in links if link["ifname"].startswith("pst"))

    def endpoints(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "endpoints").glob("*"))

    def leases(self) -> list:
        ipam = Ipam.open(self.folder / "ipam.db")
        try:
            return ipam.leases()
        finally:
            ipam.close()

    def assert_clean(self) -> None:
        assert self.host_ends() == []
        assert self.endpoints() == []
        assert self.leases() == []
