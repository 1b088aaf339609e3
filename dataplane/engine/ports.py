"""Ports: sockets and XDP programs that follow the port table.

Rule: a packet of a pod goes to our sockets or nowhere; a packet of the node on an uplink goes to
the kernel unless it is steered to a socket that works.

Theory. `sync` compares the rows of the port table with what is open and closes, then opens. For a
pod or the host port the program is attached by netlink, so it stays when the forwarder dies: the
pod's packets are dropped until the next forwarder takes over (fail closed), which attaches its own
program in the place of the old. On an uplink it is a bpf_link, which the supervisor keeps for the
next forwarder (xdp/handover.py) and which vanishes with it. The order when opening is sockets, then
map entries, then program; when closing, the reverse. Both are mostly waiting for the kernel, so
many ports are opened or closed side by side.
"""

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from dataplane.engine.flowtable import FlowTable
from dataplane.engine.worker import Worker
from xdp.abi import CONST, DTYPE, value
from xdp.device import tags_inline
from xdp.errors import KernelError, XdpError
from xdp.handover import Handover
from xdp.link import Link, attach_link, attach_netlink, detach_netlink, query
from xdp.object import BpfObject, Program
from xdp.tc import attach_ingress, detach_ingress
from xdp.umem import Umem
from xdp.xsk import Xsk

PORT_UPLINK = value("PORT_UPLINK")
PORT_HOST = value("PORT_HOST")
PORT_ACTIVE = value("PORT_ACTIVE")
HOOK_TC = value("HOOK_TC")
QUEUES_MAX = CONST["QUEUES_MAX"]
AT_ONCE = 16  # ports that are opened or closed
UPLINK = "uplink:"  # and the ifindex: name of a link in the handover


@dataclass
class OpenPort:
    """A port as it stands in the forwarder."""

    index: int
    name: str
    kind: int
    ifindex: int
    queue_count: int
    hook: int = 0
    peer_ifindex: int = 0
    sockets: list[tuple[Xsk, Worker, int]] = field(default_factory=list)
    link: Link | None = None
    native: bool = False
    base: int = -1  # key of queue 0 in the XSKMAP
    error: str = ""

    def view(self) -> dict[str, Any]:
        """Return the port as plain data for the forwarder's socket."""
        xsks = [xsk for xsk, _, _ in self.sockets]
        return {
            "index": self.index,
            "name": self.name,
            "ifindex": self.ifindex,
            "ready": bool(xsks) and not self.error,
            "mode": "tc" if self.hook == HOOK_TC else "native" if self.native else "generic",
            "zero_copy": bool(xsks) and all(xsk.zero_copy for xsk in xsks),
            "sg": bool(xsks) and all(xsk.sg for xsk in xsks),
            "error": self.error,
        }


class Ports:
    """All open ports of a forwarder."""

    def __init__(
        self,
        rows: np.ndarray,
        umem: Umem,
        bpf: BpfObject,
        workers: list[Worker],
        table: FlowTable,
        handover: Handover,
    ) -> None:
        """rows: the port table, port[PORTS_MAX]; handover: where uplinks' links are kept."""
        self._table = table
        self._handover = handover
        self._rows = rows
        self._umem = umem
        self._bpf = bpf
        self._workers = workers
        self._open: dict[int, OpenPort] = {}
        self._trunk = 0  # ifindex over which packets of ports at tc come, 0: it does not stand

    def view(self) -> list[dict[str, Any]]:
        """Return every port that is open or could not be opened."""
        return [port.view() for _, port in sorted(self._open.items())]

    def sync(self) -> None:
        """Close and open ports until they are those of the table; errors stay in `view`."""
        wanted = {
            int(index): self._rows[index].copy()
            for index in np.flatnonzero(self._rows["state"] == PORT_ACTIVE)
        }
        for index, port in list(self._open.items()):
            row = wanted.get(index)
            if row is None or port.error or _identity(row) != _identity_of(port):
                self._close(port)
        fresh = [
            self._enter(OpenPort(index, *_identity(row)))
            for index, row in wanted.items()
            if index not in self._open
        ]
        _side_by_side(partial(self._step, self._open_sockets), fresh)
        self._say_trunk()
        _side_by_side(partial(self._step, self._attach), fresh)  # now packets come, for all
        for name in [name for name in self._handover.kept if name.startswith(UPLINK)]:
            self._kept(name).detach()  # nobody's uplink any more
            self._handover.drop(name)
        self._follow()

    def check(self) -> list[str]:
        """Close the ports whose device has died (nobody is told); return their names."""
        present = {ifindex for ifindex, _ in socket.if_nameindex()}
        names = []
        for index, port in list(self._open.items()):
            if port.ifindex in present or port.error:
                continue
            names.append(port.name)
            self._close(port)
            port.error = f"device {port.name} (ifindex {port.ifindex}) is gone"
            self._open[index] = port
        self._follow()
        return names

    def _follow(self) -> None:
        """A device may begin or cease to take redirected frames at any moment."""
        self._table.follow({n: port.ifindex for n, port in self._open.items() if not port.error})

    def close(self, keep_pods: bool) -> None:
        """Close all. With keep_pods the pods' programs stay attached: what is not in the flow
        table drops (fail closed); and the uplinks' where another process keeps them."""
        _side_by_side(partial(self._close, detach=not keep_pods), list(self._open.values()))

    def _enter(self, port: OpenPort) -> OpenPort:
        """Give a port its place in the XSKMAP."""
        workers = len(self._workers)
        try:
            if not workers <= port.queue_count <= QUEUES_MAX:
                raise RuntimeError(
                    f"{port.queue_count} queues for {workers} workers, at most {QUEUES_MAX}: "
                    f"set forwarder.workers to {max(1, min(port.queue_count, QUEUES_MAX))} "
                    f"or change the queues (ethtool -L {port.name} combined {workers})"
                )
            port.base = self._reserve(port)
        except RuntimeError as error:
            port.error = f"port {port.name}: {error}"
        self._open[port.index] = port
        return port

    def _step(self, step: Callable[[OpenPort], None], port: OpenPort) -> None:
        """Do a step of opening, unless an earlier one has failed; an error stays in the port."""
        if port.error:
            return
        try:
            step(port)
        except (XdpError, OSError, RuntimeError) as error:
            self._close(port)
            port.error = f"port {port.name}: {error}"
            self._open[port.index] = port

    def _open_sockets(self, port: OpenPort) -> None:
        workers = len(self._workers)
        receives, trunk = port.hook != HOOK_TC, port.kind == PORT_HOST
        for queue in range(port.queue_count):
            worker = self._workers[queue % workers]
            xsk = Xsk(self._umem, port.ifindex, queue)
            try:
                slot = worker.call(partial(worker.add, xsk, port.index, receives, trunk))
            except BaseException:
                xsk.close()
                raise
            port.sockets.append((xsk, worker, slot))
            self._bpf.maps["xsks"].update(port.base + queue, xsk.fd)
        if trunk:
            tags_inline(socket.if_indextoname(port.peer_ifindex))
        self._say(port)

    def _say(self, port: OpenPort) -> None:
        """Tell the programs where a port's packets go."""
        entry = np.zeros((), DTYPE["xdp_port"])
        entry["socket_base"] = port.base
        entry["queue_count"] = port.queue_count
        entry["trunk"] = self._trunk if port.hook == HOOK_TC else 0
        entry["index"] = port.index
        self._bpf.maps["xdp_ports"].update(port.ifindex, entry.tobytes())

    def _say_trunk(self) -> None:
        """Tell the programs at tc which device the trunk is now: it is opened like any port."""
        standing = [port for port in self._open.values() if not port.error]
        trunk = next((port.peer_ifindex for port in standing if port.kind == PORT_HOST), 0)
        if trunk == self._trunk:
            return
        self._trunk = trunk
        for port in standing:
            if port.hook == HOOK_TC:
                self._say(port)

    def _reserve(self, port: OpenPort) -> int:
        """Return the first key of a free run of queue_count keys in the XSKMAP."""
        taken = np.zeros(CONST["SOCKETS_MAX"], bool)
        for other in self._open.values():
            if other.base >= 0:
                taken[other.base : other.base + other.queue_count] = True
        run = 0
        for key in range(len(taken)):
            run = 0 if taken[key] else run + 1
            if run == port.queue_count:
                return key - run + 1
        raise RuntimeError(
            f"{port.queue_count} more sockets than the {len(taken)} of SOCKETS_MAX: "
            f"set forwarder.workers lower"
        )

    def _attach(self, port: OpenPort) -> None:
        if port.kind == PORT_UPLINK:
            port.link = self._link(self._bpf.programs["uplink_rx"], port.ifindex)
            port.native = port.link.native
        elif port.hook == HOOK_TC:
            attach_ingress(self._bpf.programs["pod_tc"], port.ifindex)
        else:
            attached = attach_netlink(self._bpf.programs["pod_rx"], port.ifindex)
            port.native = attached.native

    def _link(self, program: Program, ifindex: int) -> Link:
        """Take the predecessor's place on an uplink in one step, or attach."""
        name = f"{UPLINK}{ifindex}"
        if name in self._handover.kept:
            link = self._kept(name)
            try:
                link.replace(program)
                return link
            except KernelError:  # of a device that was made anew
                link.close()
        link = attach_link(program, ifindex)
        self._handover.keep(name, link.fd)
        return link

    def _kept(self, name: str) -> Link:
        fd, ifindex = self._handover.kept.pop(name), int(name.removeprefix(UPLINK))
        found = query(ifindex)
        return Link(fd, ifindex, found is None or found.native)

    def _close(self, port: OpenPort, detach: bool = True) -> None:
        self._open.pop(port.index, None)
        if detach:
            self._table.close(port.index)
        if port.link:
            if detach or not self._handover.kept_by_another:
                port.link.detach()
                self._handover.drop(f"{UPLINK}{port.ifindex}")
            port.link.close()
            port.link = None
        elif detach and port.hook == HOOK_TC:
            _ignore(partial(detach_ingress, port.ifindex))
        elif detach and port.kind != PORT_UPLINK:
            _ignore(partial(detach_netlink, port.ifindex))
        _ignore(partial(self._bpf.maps["xdp_ports"].delete, port.ifindex))
        for queue, (xsk, worker, slot) in enumerate(port.sockets):
            _ignore(partial(self._bpf.maps["xsks"].delete, port.base + queue))
            worker.call(partial(worker.remove, slot))
            xsk.close()
            worker.call(partial(worker.reclaim, slot))
        port.sockets.clear()
        port.base = -1


_IDENTITY = ("kind", "ifindex", "queue_count", "hook", "peer_ifindex")


def _identity(row: np.void) -> tuple[str, int, int, int, int, int]:
    kind, ifindex, queues, hook, peer = (int(row[name]) for name in _IDENTITY)
    return row["name"].decode(), kind, ifindex, queues, hook, peer


def _identity_of(port: OpenPort) -> tuple[str, int, int, int, int, int]:
    return (port.name, *(getattr(port, name) for name in _IDENTITY))


def _side_by_side(action: Callable[[OpenPort], None], ports: list[OpenPort]) -> None:
    """Do the same for many ports: each waits for the kernel (RCU) for some ten milliseconds."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(action, ports))


def _ignore(action: Any) -> None:
    """Run a clean-up step whose object may already be gone with its device."""
    try:
        action()
    except (XdpError, OSError):
        pass
