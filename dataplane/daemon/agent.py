"""The agent process: everything that decides, nothing that forwards.

Rule: wiring only; each part could be tested without this file. numba is never imported here.

Theory. Started, killed and upgraded at any time: what it owns is on disk (leases, endpoints) or
in shared memory (tables). On start it takes up what stands, computes what should stand, and
serves: CNI requests, questions of the command line. The conflist is written when the node can
take pods and removed when it certainly cannot any more (cleanup), not when the agent merely
restarts.
"""

import asyncio
import contextlib
import os
import signal
import time
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import structlog

from dataplane.cni import conflist
from dataplane.cni.backend import Backend
from dataplane.cni.deletes import Deletes
from dataplane.cni.endpoints import Endpoint, Endpoints
from dataplane.cni.errors import CniError, Code
from dataplane.cni.model import NodeAddressing
from dataplane.cni.server import CniServer
from dataplane.control.config import Config
from dataplane.control.folder import FolderSource
from dataplane.control.jsonl import RemoteError, Unreachable, acall, serve
from dataplane.control.model import EndpointView
from dataplane.control.reconcile import Reconciler
from dataplane.control.source import Source
from dataplane.daemon import views
from dataplane.daemon.engines import RULES, Engines
from dataplane.daemon.lock import hold
from dataplane.daemon.sight import Witness
from dataplane.metrics.server import Sight
from dataplane.objects.collect import Objects
from dataplane.tables.shm import Shm
from dataplane.tables.writer import TableWriter
from ipam.errors import IpamError
from ipam.service import Ipam
from xdp.abi import value

HOOKS = {"xdp": value("HOOK_XDP"), "tc": value("HOOK_TC")}
READY_S = 20.0  # an ADD waits so long for the forwarder to take its port
SWEEP_S = 60.0  # how often leases of pods that are gone are looked for
FORWARDER_S = 5.0
NEWS_S = 0.25  # how often is looked for news while somebody waits for them

log = structlog.get_logger(subsys="agent")


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _view(endpoint: Endpoint) -> EndpointView:
    return EndpointView(
        number=endpoint.number,
        host_ifname=endpoint.host_ifname,
        ifindex=endpoint.host_ifindex,
        mac=_mac(endpoint.host_mac),
        peer_mac=_mac(endpoint.mac),
        mtu=endpoint.mtu,
        queue_count=endpoint.queue_count,
        address4=endpoint.address4,
        address6=endpoint.address6,
        hook=HOOKS[endpoint.hook],
    )


class Agent:
    """The parts of an agent and how they meet."""

    def __init__(self, config: Config) -> None:
        """Open state and tables. Raises on damage that needs a person."""
        self.config = config
        config.state_dir.mkdir(parents=True, exist_ok=True)
        self.started = time.time()
        self.shm = Shm.create(config.run_dir)
        self.ipam = Ipam.open(config.state_dir / "ipam.db")
        self.endpoints = Endpoints(config.state_dir)
        self.source: Source = FolderSource(config.source.folder, config.state_dir / "manifests.db")
        self.objects = Objects()
        self.engines = Engines(config, self.shm, self.endpoints)
        self.reconciler = Reconciler(
            config,
            lambda: self.objects,
            lambda: [_view(endpoint) for endpoint in self.endpoints],
            TableWriter(self.shm),
            self._sync_forwarder,
            self.engines.update,
        )
        self.backend = Backend(
            self.ipam,
            self.endpoints,
            self._addressing,
            self._ready,
            1,
            Deletes(config.run_dir / "deletes"),
        )
        self.cni_socket = config.run_dir / "cni.sock"
        self.cni = CniServer(self.cni_socket, self.backend)
        self.endpoints.on_change(lambda: self.reconciler.trigger("endpoints"))
        witness = Witness(self)
        self.sight = Sight(self.shm, witness.facts, witness.owners, self.shm.folder / RULES)
        self.stop = asyncio.Event()
        self._pools: dict[int, Any] = {}
        self._pool_error = ""
        self._serving = False
        self._port_errors: dict[str, str] = {}
        self._pods_seen: tuple[Any, ...] = ()
        self._pods_version = 0

    # --- what the parts ask of each other ---------------------------------------------------------

    def _addressing(self) -> NodeAddressing | None:
        """The node as its pods see it; None until it can take pods."""
        wanted = self.reconciler.desired
        if wanted is None or not self.reconciler.status()["ready"]:
            return None
        if not self._pools or self._pool_error:
            return None
        node = self.objects.nodes.get(self.config.node.name)
        if node is None:
            return None
        routers = [address for address, _ in wanted.host_addresses]
        return NodeAddressing(
            router4=next((at for at in routers if isinstance(at, IPv4Address)), None),
            router6=next((at for at in routers if isinstance(at, IPv6Address)), None),
            local_cidrs=node.pod_cidrs,
            path_mtu=int(wanted.view["path_mtu"]),
            gateway_mac=wanted.gateway_mac.hex(":"),
            hook=self.config.forwarder.pod_hook,
        )

    async def _sync_forwarder(self) -> None:
        """Make the forwarder follow; a forwarder that is away follows by itself when it comes."""
        path = self.config.run_dir / "forwarder.sock"
        try:
            answer = await acall(path, "sync", FORWARDER_S)
        except (Unreachable, RemoteError) as error:
            raise OSError(f"the forwarder does not follow: {error}") from error
        self._port_errors = {p["name"]: p["error"] for p in answer["ports"] if p["error"]}
        if self._port_errors:
            log.warning("ports with errors", errors=list(self._port_errors.values()))

    async def _ready(self, endpoint: Endpoint) -> None:
        """Wait until packets of the endpoint are taken. Raises TimeoutError or CniError."""
        await self.reconciler.settled(endpoint.number, READY_S)
        if error := self._port_errors.get(endpoint.host_ifname):
            raise CniError(Code.TRY_LATER, f"the forwarder cannot open its port: {error}")

    # --- the tasks --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run all parts until a signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop.set)
        api = await serve(self.config.run_dir / "api.sock", self._answer)
        await self.sight.open(self.config.metrics.listen, self.config.metrics.port)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.reconciler.run(self.stop)),
                group.create_task(self._follow_source()),
                group.create_task(self._follow_node()),
                group.create_task(self._sweep()),
                group.create_task(self.engines.follow_ports(self.stop)),
                group.create_task(self.sight.follow()),
            ]
            await self.stop.wait()
            for task in tasks[1:]:
                task.cancel()
        api.close()
        await self.cni.stop()
        await self.engines.close()
        await self.sight.close()
        log.info("stopped")

    async def _follow_source(self) -> None:
        async for objects in self.source.changes():
            self.objects = objects
            for where, error in self.source.errors.items():
                log.warning("manifest refused", where=where, error=error)
            self.reconciler.trigger("objects")

    async def _follow_node(self) -> None:
        """Once the node stands: pools, CNI server, conflist; then keep the pools in line."""
        turn = 0
        while True:
            turn = await self.reconciler.turned(turn)
            wanted = self.reconciler.desired
            node = self.objects.nodes.get(self.config.node.name)
            if wanted is None or node is None or not self.reconciler.status()["ready"]:
                continue
            self._set_pools(node.pod_cidrs, [address for address, _ in wanted.host_addresses])
            self.backend.queue_count = wanted.queues
            if not self._serving:
                await self.cni.start()
                self._serving = True
            if self._pool_error:
                continue
            cni = self.config.node.cni
            deletes = self.config.run_dir / "deletes"
            if conflist.write(cni.conf_dir, self.cni_socket, deletes, cni.name):
                log.info("ready for pods", conflist=str(cni.conf_dir / conflist.FILE))

    def _set_pools(self, cidrs: Any, routers: Any) -> None:
        pools = {cidr.version: cidr for cidr in cidrs}
        if pools != self._pools or self._pool_error:
            try:
                self.ipam.set_node_pools(pools, reserved=list(routers))
                self._pools, self._pool_error = pools, ""
            except IpamError as error:  # such as a pool without room for its leases
                if str(error) != self._pool_error:
                    log.error("pools refused", error=str(error))
                self._pool_error = str(error)

    async def _sweep(self) -> None:
        """Return the leases of pods that are truly gone."""
        while True:
            await asyncio.sleep(SWEEP_S if self._pools else 1)
            if self._pools:
                for lease in self.ipam.sweep(self._is_alive):
                    log.warning("leaked lease returned", lease=str(lease))

    def _is_alive(self, lease: Any) -> bool:
        return self.endpoints.get(lease.key) is not None

    # --- questions --------------------------------------------------------------------------------

    async def _answer(self, op: str, args: dict[str, Any]) -> Any:
        match op:
            case "status":
                return await self.status()
            case "endpoints":
                return [views.endpoint(endpoint) for endpoint in self.endpoints]
            case "nodes":
                return [views.node(node) for node in self.objects.nodes.values()]
            case "pods":
                return await self._pods(args.get("known"), args.get("wait", 0))
            case "plan":
                return [str(action) for action in await self.reconciler.plan_only()]
            case "why":
                return await self.engines.why(args["source"], args["target"], args["port"])
            case "ipam":
                return {
                    "usage": self.ipam.usage(),
                    "leases": [views.lease(lease) for lease in self.ipam.leases()],
                }
        raise ValueError(f"unknown operation {op!r}")

    async def _pods(self, known: Any, wait: float) -> dict[str, Any] | None:
        """Return pods with addresses; None when they are the `known` ones for `wait` seconds."""
        until = time.monotonic() + wait
        while (found := self._pods_now(known)) is None and time.monotonic() < until:
            await asyncio.sleep(NEWS_S)
        return found

    def _pods_now(self, known: Any) -> dict[str, Any] | None:
        attached = tuple(self.endpoints)
        if (self.objects.pods, attached) != self._pods_seen:
            self._pods_seen = (self.objects.pods, attached)
            self._pods_version = time.time_ns()
        if known == self._pods_version:
            return None
        return {"version": self._pods_version, "pods": views.pods(self.objects, attached)}

    async def status(self) -> dict[str, Any]:
        """Return what `penstock status` shows."""
        try:
            forwarder = await acall(self.config.run_dir / "forwarder.sock", "status", 2.0)
            error = ""
        except (Unreachable, RemoteError) as problem:
            forwarder, error = None, str(problem)
        state = self.reconciler.status()
        failed = [p["error"] for p in (forwarder or {}).get("ports", ()) if p["error"]]
        errors = [state["error"], error, self._pool_error, *state["problems"], *failed]
        errors.append(self.sight.problem)
        errors += [f"{where}: {text}" for where, text in self.source.errors.items()]
        serving = self._serving and not self._pool_error
        return {
            "ready": bool(state["ready"]) and forwarder is not None and serving,
            "agent": {"pid": os.getpid(), "started": self.started},
            "forwarder": forwarder,
            "node": {k: v for k, v in state.items() if k not in ("ready", "error", "problems")},
            "endpoints": len(self.endpoints),
            "errors": [text for text in errors if text],
        }


def main(config: Config) -> int:
    """Run the agent until SIGTERM; return the exit status."""
    with hold(config.run_dir / "agent.lock"), contextlib.suppress(asyncio.CancelledError):
        asyncio.run(_main(config))
    return 0


async def _main(config: Config) -> None:
    await Agent(config).run()
