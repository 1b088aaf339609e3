"""A laboratory of network namespaces: nodes, pods, wires and processes that vanish together.

Rule: whatever a Lab makes carries its tag and is gone after `close`, whatever happened before.

Theory. Namespaces are named pst-TAG-NAME and files lie in /dev/shm/penstock-lab-TAG, so labs do not
meet each other or anything else. Children die with their parent (PR_SET_PDEATHSIG); what a killed
lab leaves behind is found by the owner's pid in its folder and removed by the next lab. An underlay
device is made to behave as a wire: transmit offloads off, so that packets have complete checksums
and wire size, as they would behind a network card.
"""

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Self, TypeVar

HOME = Path("/dev/shm")
PREFIX = "penstock-lab-"
ROOT = Path(__file__).resolve().parents[1]
UNDERLAY4 = IPv4Address("192.0.2.0")  # TEST-NET-1, RFC 5737
UNDERLAY6 = IPv6Address("2001:db8::")  # RFC 3849
CLONE_NEWNET = 0x40000000
YOUNG_S = 60.0  # a folder without an owner may still be in the making
PR_SET_PDEATHSIG = 1

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """A command failed or something did not happen in time; the message holds its output."""


def eventually(check: Callable[[], T], what: str, seconds: float = 30.0, every: float = 0.02) -> T:
    """Return the first true value of check(); LabError names `what` after the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        if found := check():
            return found
        if time.monotonic() > deadline:
            raise LabError(f"not within {seconds:g} s: {what}")
        time.sleep(every)


def sh(command: Sequence[str], timeout: float = 60.0, stdin: str | None = None) -> str:
    """Run a command and return its stdout; LabError with all its output when it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, input=stdin, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{' '.join(command)}: not done within {timeout:g} s") from error
    if done.returncode:
        output = f"{done.stdout}{done.stderr}".strip()
        raise LabError(f"{' '.join(command)}: exit {done.returncode}: {output}")
    return done.stdout


def _child(cpus: frozenset[int]) -> Callable[[], None]:
    def settle() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if cpus:
            os.sched_setaffinity(0, cpus)

    return settle


class Process:
    """A child with its output in a file."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        cpus: frozenset[int] = frozenset(),
        env: dict[str, str] | None = None,
        fds: Sequence[int] = (),
    ) -> None:
        """cpus: where it may run, empty: anywhere; env: added to ours; fds: inherited."""
        self.command = list(command)
        self.log = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                pass_fds=fds,
                preexec_fn=_child(cpus),
            )

    @property
    def pid(self) -> int:
        """Of the command itself: the wrappers that enter a namespace exec."""
        return self.popen.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.popen.poll() is None

    def output(self) -> str:
        """Everything it has said."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 30.0) -> str:
        """Wait for a good end and return the output; LabError otherwise."""
        try:
            code = self.popen.wait(seconds)
        except subprocess.TimeoutExpired as error:
            self.stop(signal.SIGKILL)
            raise LabError(f"{' '.join(self.command)}: not done in {seconds:g} s") from error
        if code:
            raise LabError(f"{' '.join(self.command)}: exit {code}: {self.output()[-2000:]}")
        return self.output()

    def stop(self, how: int = signal.SIGTERM, seconds: float = 20.0) -> int:
        """Signal it, kill it if it stays; returns the exit code. Twice is fine."""
        if self.alive:
            self.popen.send_signal(how)
            try:
                self.popen.wait(seconds)
            except subprocess.TimeoutExpired:
                self.popen.kill()
        return self.popen.wait()


class Namespace:
    """A network namespace, with IPv6 on and duplicate address detection off."""

    def __init__(self, lab: "Lab", name: str) -> None:
        """name: unique in the lab."""
        self.lab = lab
        self.short = name
        self.name = f"pst-{lab.tag}-{name}"
        self.path = Path("/run/netns") / self.name
        sh(["ip", "netns", "add", self.name])
        self.ip("link set lo up")
        self.sysctl({f"net.ipv6.conf.{kind}.accept_dad": 0 for kind in ("all", "default")})
        self.sysctl({f"net.ipv6.conf.{kind}.disable_ipv6": 0 for kind in ("all", "default")})

    def ip(self, *lines: str) -> None:
        """Run lines of `ip -batch`; the first failure is a LabError."""
        batch = "\n".join(lines) + "\n"
        try:
            sh(["ip", "-n", self.name, "-batch", "-"], stdin=batch)
        except LabError as error:
            raise LabError(f"{error}\nin {self.name}:\n{batch}") from error

    def show(self, *words: str) -> list[dict]:
        """What `ip -j -d WORDS` says, decoded."""
        text = sh(["ip", "-n", self.name, "-j", "-d", *words])
        return [row for row in json.loads(text or "[]") if row]

    def link(self, device: str) -> dict | None:
        """The device as `ip -j link` shows it, None when there is none."""
        return next((row for row in self.show("link") if row["ifname"] == device), None)

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command that runs a command in here."""
        return ["ip", "netns", "exec", self.name, *command]

    def run(self, *command: str, timeout: float = 60.0, stdin: str | None = None) -> str:
        """Run a command in here and return its stdout; LabError when it fails."""
        return sh(self.wrap(command), timeout, stdin)

    def spawn(
        self,
        *command: str,
        cpus: frozenset[int] = frozenset(),
        env: dict[str, str] | None = None,
        log: str = "",
        fds: Sequence[int] = (),
    ) -> Process:
        """Start a command in here; the lab stops it at the latest. fds: that it inherits."""
        name = log or f"{self.short}-{Path(command[0]).name}-{secrets.token_hex(2)}"
        process = Process(self.wrap(command), self.lab.folder / f"{name}.log", cpus, env, fds)
        self.lab.processes.append(process)
        return process

    def sysctl(self, values: dict[str, int | str]) -> None:
        """Write values under /proc/sys; only those of the network are this namespace's own."""
        with self.inside():
            for name, value in values.items():
                Path("/proc/sys", *name.split(".")).write_text(str(value))

    def offload_off(self, device: str) -> None:
        """Let packets leave the device as on a wire: checksums complete, no larger than the MTU."""
        self.run("ethtool", "-K", device, "tx", "off", "tso", "off", "gso", "off")

    def pids(self) -> list[int]:
        """Processes that are in here."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False
        )
        return [int(word) for word in found.stdout.split() if int(word) != os.getpid()]

    def inside(self) -> AbstractContextManager[None]:
        """Take the calling thread into the namespace for the body; threads made there stay."""
        return inside(self.path)

    def delete(self) -> None:
        """Kill what runs in here and delete it."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, check=False)


@contextlib.contextmanager
def inside(path: Path | None) -> Iterator[None]:
    """Take the calling thread into a network namespace for the body; None: it stays."""
    if path is None:
        yield
        return
    with open("/proc/thread-self/ns/net") as home, path.open() as there:
        _setns(there.fileno())
        try:
            yield
        finally:
            _setns(home.fileno())


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET):
        raise LabError(f"setns: {os.strerror(ctypes.get_errno())}; run as root")


class Lab:
    """Namespaces, wires and processes with one tag; a context manager."""

    def __init__(self) -> None:
        """Make the folder; remove what dead labs left behind."""
        sweep()
        self.tag = secrets.token_hex(3)
        self.folder = HOME / f"{PREFIX}{self.tag}"
        self.folder.mkdir(mode=0o700)
        (self.folder / "owner").write_text(_identity(os.getpid()))
        self.namespaces: dict[str, Namespace] = {}
        self.processes: list[Process] = []
        self._members: list[Namespace] = []
        self._bridge: Namespace | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def namespace(self, name: str) -> Namespace:
        """Make a namespace; it is deleted with the lab at the latest."""
        self.namespaces[name] = made = Namespace(self, name)
        return made

    def process(self, command: Sequence[str], name: str) -> Process:
        """Start a command outside all namespaces; the lab stops it at the latest."""
        process = Process(command, self.folder / f"{name}-{secrets.token_hex(2)}.log")
        self.processes.append(process)
        return process

    def delete(self, namespace: Namespace) -> None:
        """Delete a namespace before the lab ends."""
        self.namespaces.pop(namespace.short, None)
        namespace.delete()

    def wire(self, one: Namespace, two: Namespace, names: tuple[str, str], mtu: int = 1500) -> None:
        """Join two namespaces by a veth pair; both ends up."""
        first, second = names
        one.ip(
            f"link add {first} mtu {mtu} type veth peer name {second} netns {two.name} mtu {mtu}"
        )
        one.ip(f"link set {first} up")
        two.ip(f"link set {second} up")

    def connect(self, node: Namespace, mtu: int = 1500, offload: bool = False) -> int:
        """Join a node to the underlay as eth0 and return its number n.

        Its addresses are 192.0.2.n/24 and 2001:db8::n/64. The first two nodes share a plain veth
        pair if `pair` joined them; any other set is joined by a bridge in a namespace of its own.
        """
        if self._bridge is None:
            self._bridge = self.namespace("underlay")
            self._bridge.ip("link add br0 type bridge forward_delay 0 mcast_snooping 0")
            self._bridge.ip(f"link set br0 mtu {mtu} up")
        self._members.append(node)
        number = len(self._members)
        self.wire(node, self._bridge, ("eth0", f"port{number}"), mtu)
        self._bridge.ip(f"link set port{number} master br0")
        if not offload:
            self._bridge.offload_off(f"port{number}")
        self._settle(node, number, offload)
        return number

    def pair(self, one: Namespace, two: Namespace, mtu: int = 1500, offload: bool = False) -> None:
        """Join two nodes back to back: 192.0.2.1 and .2, 2001:db8::1 and ::2, on eth0."""
        self.wire(one, two, ("eth0", "eth0"), mtu)
        for number, node in enumerate((one, two), 1):
            self._settle(node, number, offload)

    def _settle(self, node: Namespace, number: int, offload: bool) -> None:
        node.ip(
            f"addr add {UNDERLAY4 + number}/24 dev eth0",
            f"addr add {UNDERLAY6 + number}/64 dev eth0 nodad",
        )
        if not offload:
            node.offload_off("eth0")

    def close(self) -> None:
        """Stop the processes, newest first, delete namespaces and files. Twice is fine."""
        for process in reversed(self.processes):
            if process.alive:
                process.popen.send_signal(signal.SIGTERM)
        for process in reversed(self.processes):
            process.stop()
        self.processes.clear()
        for namespace in reversed(self.namespaces.values()):
            namespace.delete()
        self.namespaces.clear()
        _remove(self.folder)


def _identity(pid: int) -> str:
    """The pid and the start time of a process: pids are used again; empty when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return f"{pid} {stat.rpartition(')')[2].split()[19]}"


def sweep() -> list[str]:
    """Remove what labs of dead processes left; returns their tags."""
    removed = []
    for folder in HOME.glob(f"{PREFIX}*"):
        try:
            owner = (folder / "owner").read_text()
            alive = _identity(int(owner.split()[0])) == owner
        except (OSError, ValueError, IndexError):
            alive = _age(folder) < YOUNG_S  # being made, or left half removed
        if alive:
            continue
        tag = folder.name.removeprefix(PREFIX)
        for path in Path("/run/netns").glob(f"pst-{tag}-*"):
            pids = sh(["ip", "netns", "pids", path.name]).split()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", path.name], capture_output=True, check=False)
        _remove(folder)
        removed.append(tag)
    return removed


def _age(folder: Path) -> float:
    try:
        return time.time() - folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove(folder: Path) -> None:
    """Delete a lab's files; what a container runtime mounted among them goes first."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        target = line.split()[1]
        if Path(target).is_relative_to(folder):
            subprocess.run(["umount", "-l", target], capture_output=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)
