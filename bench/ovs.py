"""Open vSwitch's userspace datapath in a namespace, without installing it.

Rule: nothing of it outlives the lab: its database, sockets and logs lie in the lab's folder.

Theory. Debian's package would start a service and enable it for ever, so the Makefile only unpacks
it into build/ovs; an installed one is used as well. Two programs are run by hand, as its own start
script does: ovsdb-server and ovs-vswitchd, told by environment where everything lies. Ports are of
type afxdp (copy mode on veth), the datapath is netdev with one polling thread on a core of its own.
"""

import shutil
from pathlib import Path

from bench.lab import ROOT, LabError, Namespace, Process, eventually, sh

UNPACKED = ROOT / "build" / "ovs"


def find(name: str) -> str:
    """Return the path of a program of Open vSwitch; LabError where there is none."""
    for folder in ("usr/bin", "usr/sbin", "usr/lib/openvswitch-switch"):
        for root in (UNPACKED, Path("/")):
            if (root / folder / name).is_file():
                return str(root / folder / name)
    if found := shutil.which(name):
        return found
    raise LabError(f"{name} is not there: make bench unpacks Open vSwitch into {UNPACKED}")


def share() -> Path:
    """Return the folder of its schema."""
    unpacked = UNPACKED / "usr/share/openvswitch"
    return unpacked if unpacked.is_dir() else Path("/usr/share/openvswitch")


class Switch:
    """ovsdb-server and ovs-vswitchd of one namespace, with one bridge br0."""

    def __init__(self, node: Namespace, cpu: int) -> None:
        """Start both. cpu: where its thread polls."""
        self.node, self.cpu = node, cpu
        self.folder = node.lab.folder / f"ovs-{node.short}"
        self.folder.mkdir()
        self.database = f"unix:{self.folder}/db.sock"
        names = ("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR")
        self._env = dict.fromkeys(names, str(self.folder)) | {"OVS_PKGDATADIR": str(share())}
        schema = str(share() / "vswitch.ovsschema")
        sh(self._command("ovsdb-tool", "create", f"{self.folder}/conf.db", schema))
        remote = f"--remote=p{self.database}"
        self._start("ovsdb-server", f"{self.folder}/conf.db", remote)
        eventually((self.folder / "db.sock").exists, "ovsdb-server")
        self.vsctl("--no-wait", "init")
        mask = f"other_config:pmd-cpu-mask={1 << cpu:#x}"
        self.vsctl("--no-wait", "set", "Open_vSwitch", ".", mask)
        self.daemon = self._start("ovs-vswitchd", self.database)
        self.bridge("br0")

    def _command(self, name: str, *words: str) -> list[str]:
        return ["env", *(f"{key}={value}" for key, value in self._env.items()), find(name), *words]

    def _start(self, name: str, *words: str) -> Process:
        log = f"{self.node.short}-{name}"
        return self.node.spawn(find(name), *words, "--no-chdir", env=self._env, log=log)

    def vsctl(self, *words: str) -> str:
        """Run ovs-vsctl; it waits until the daemon has done it."""
        command = self._command("ovs-vsctl", "--timeout=30", f"--db={self.database}", *words)
        return self.node.run(*command)

    def bridge(self, name: str) -> None:
        """Add a further bridge."""
        self.vsctl("add-br", name, "--", "set", "bridge", name, "datapath_type=netdev")

    def port(
        self, device: str, number: int, kind: str = "afxdp", bridge: str = "br0", **options: str
    ) -> None:
        """Add a port with an OpenFlow number."""
        words = [f"options:{key}={value}" for key, value in options.items()]
        if kind == "afxdp":
            words += ["options:n_rxq=1", "options:xdp-mode=native"]
        words = ["set", "interface", device, f"type={kind}", f"ofport_request={number}", *words]
        self.vsctl("add-port", bridge, device, "--", *words)
        error = self.vsctl("get", "interface", device, "error").strip()
        if error != "[]":
            raise LabError(f"Open vSwitch, {device}: {error}; {self.daemon.output()[-500:]}")

    def flows(self, lines: list[str], bridge: str = "br0") -> None:
        """Replace all OpenFlow rules of a bridge."""
        target = f"unix:{self.folder}/{bridge}.mgmt"
        command = self._command("ovs-ofctl", "-O", "OpenFlow14", "replace-flows", target, "-")
        self.node.run(*command, stdin="\n".join([*lines, ""]))

    def appctl(self, *words: str) -> str:
        """Ask the daemon."""
        socket = next(self.folder.glob("ovs-vswitchd.*.ctl"))
        return self.node.run(*self._command("ovs-appctl", "-t", str(socket), *words))

    @property
    def pid(self) -> int:
        """Of the daemon."""
        return self.daemon.pid
