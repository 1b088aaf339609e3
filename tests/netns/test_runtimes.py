"""Container runtimes that we did not write attach containers with the plugin, and detach them."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bench import checks
from bench.lab import Lab, LabError, eventually, sh
from bench.penstock import Cluster, Node
from xdp.artifacts import find

pytestmark = [pytest.mark.root, pytest.mark.net]

IMAGE = "localhost/busybox:latest"
APPLETS = ("sh", "ip", "ping", "sleep")
# Resource limits cannot be raised everywhere, so containers do with small ones.
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")


def enter(node: Node, *command: str) -> list[str]:
    """Run in the node's network namespace; mounts, of runtimes' namespaces, stay shared."""
    return ["nsenter", f"--net={node.namespace.path}", *command]


class Podman:
    """podman with everything of its own in one folder."""

    def __init__(self, node: Node, folder: Path) -> None:
        self.node = node
        self.folder = folder
        folder.mkdir()
        (folder / "containers.conf").write_text(
            "[network]\n"
            'network_backend = "cni"\n'
            f'cni_plugin_dirs = ["{find("penstock-cni").parent}"]\n'
            f'network_config_dir = "{node.conf_dir}"\n'
        )
        self.environment = {
            **os.environ,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "TMPDIR": str(folder),
        }

    def __call__(self, *words: str) -> str:
        options = [f"--{name}={self.folder / name}" for name in ("root", "runroot", "tmpdir")]
        runtime = [f"--runtime={shutil.which('runc')}", "--cgroup-manager=cgroupfs"]
        done = subprocess.run(
            enter(self.node, "podman", *runtime, "--storage-driver=vfs", *options, *words),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise LabError(f"podman {words}: {done.stdout}{done.stderr}\n{self.node.log()}")
        return done.stdout

    def run(self, *words: str) -> str:
        network = self.node.cluster.network
        return self("run", *LIMITS, f"--network={network}", *words)


class Ctr:
    """containerd and its own client, with everything of theirs in one folder."""

    # ctr has no options for CNI's folders: it sees ours in a mount namespace of its own.
    SCRIPT = (
        "mkdir -p /etc/cni/net.d /var/lib/cni /opt && mount --bind {conf} /etc/cni/net.d "
        "&& mount -t tmpfs none /var/lib/cni && mount -t tmpfs none /opt "
        '&& mkdir -p /opt/cni && ln -s {bin} /opt/cni/bin && exec "$@"'
    )

    def __init__(self, node: Node, folder: Path) -> None:
        self.node = node
        self.socket = folder / "containerd.sock"
        folder.mkdir()
        (folder / "config.toml").write_text(
            "version = 2\n"
            f'root = "{folder}/root"\n'
            f'state = "{folder}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{self.socket}"\n'
        )
        command = enter(node, "containerd", "-c", str(folder / "config.toml"))
        with (folder / "log").open("w") as log:
            self.daemon = subprocess.Popen(command, stdout=log, stderr=log)

    def __call__(self, *words: str) -> str:
        return sh(["ctr", "--address", str(self.socket), *words], 120)

    def run(self, name: str, *words: str) -> str:
        script = self.SCRIPT.format(conf=self.node.conf_dir, bin=find("penstock-cni").parent)
        ctr = ["ctr", "--address", str(self.socket), "run", "--rm", "--cni"]
        command = [*ctr, "--snapshotter", "native", IMAGE, name, *words]
        return sh(enter(self.node, "unshare", "-m", "sh", "-c", script, "sh", *command), 120)

    def close(self) -> None:
        self.daemon.terminate()
        self.daemon.wait(60)


def image(folder: Path) -> Path:
    """A root file system of busybox alone, as a tarball."""
    root = folder / "image"
    (root / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin/busybox")
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    sh(["tar", "-C", str(root), "-cf", str(folder / "image.tar"), "."])
    return folder / "image.tar"


@pytest.fixture(scope="module")
def cluster():
    for program in ("podman", "containerd", "ctr", "runc", "busybox"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}: `make test` installs it")
    with Lab() as lab:
        cluster = Cluster(lab).start(2)
        cluster.network = json.loads(next(cluster.nodes[0].conf_dir.iterdir()).read_text())["name"]
        for node in cluster.nodes:
            node.pod(f"{node.name}peer")
        yield cluster


@pytest.fixture(scope="module")
def podman(cluster):
    podman = Podman(cluster.nodes[0], cluster.lab.folder / "podman")
    podman("import", str(image(podman.folder)), IMAGE)
    try:
        yield podman
    finally:
        podman("rm", "--all", "--force", "--time=0")


@pytest.fixture(scope="module")
def ctr(cluster, podman):
    archive = cluster.lab.folder / "oci.tar"
    podman("save", "--format=oci-archive", f"--output={archive}", IMAGE)
    ctr = Ctr(cluster.nodes[0], cluster.lab.folder / "containerd")
    try:
        eventually(ctr.socket.exists, "containerd listens", 60)
        ctr("image", "import", "--snapshotter=native", str(archive))
        yield ctr
    finally:
        ctr.close()


def endpoints(node: Node) -> int:
    return len(node.ask("endpoint", "list"))


def peer(cluster: Cluster, where: str, family: int) -> str:
    return cluster.nodes[0 if where == "same node" else 1].pods[0].addresses[family]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("where", ["same node", "across"])
def test_a_container_of_podman_reaches_pods(cluster, podman, where, family):
    before = endpoints(podman.node)
    told = podman.run("--rm", IMAGE, "ping", "-c", "2", "-W", "20", peer(cluster, where, family))
    assert " 0% packet loss" in told
    assert endpoints(podman.node) == before


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("where", ["same node", "across"])
def test_a_container_of_containerd_reaches_pods(cluster, ctr, where, family):
    before = endpoints(ctr.node)
    address = peer(cluster, where, family)
    told = ctr.run(f"c{family}{where[0]}", "ping", "-c", "2", "-W", "20", address)
    assert " 0% packet loss" in told
    assert endpoints(ctr.node) == before


def test_pods_reach_a_container_of_podman_until_it_is_removed(cluster, podman):
    before = endpoints(podman.node)
    container = podman.run("--detach", IMAGE, "sleep", "1000").strip()
    try:
        mine = next(
            row
            for row in podman.node.ask("endpoint", "list")
            if row["container"].startswith(container[:12])
        )
        for node in cluster.nodes:
            for family in ("ipv4", "ipv6"):
                checks.ping(node.pods[0].namespace, mine[family])
    finally:
        podman("rm", "--force", "--time=0", container)
    assert endpoints(podman.node) == before
    assert podman.node.namespace.link(mine["host_ifname"]) is None


def test_ports_that_podman_publishes_reach_the_record(cluster, podman):
    ports = ["--publish", "8080:80", "--publish", "192.0.2.1:5300:53/udp"]
    container = podman.run("--detach", *ports, IMAGE, "sleep", "1000").strip()
    try:
        folder = podman.node.folder / "state/endpoints"
        records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        mine = next(one for one in records if one["container_id"] == container)
        mappings = {(m["hostPort"], m["containerPort"], m["protocol"]): m["hostIP"]
                    for m in mine["port_mappings"]}  # fmt: skip
        assert mappings == {(8080, 80, "tcp"): "", (5300, 53, "udp"): "192.0.2.1"}
    finally:
        podman("rm", "--force", "--time=0", container)
