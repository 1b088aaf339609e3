"""Policies and services, driven by the agent's turns.

Rule: before a turn writes a port, the policy of its pod stands; a turn that fails in an engine
leaves what stood.

Theory. Each engine computes differences from whole snapshots and writes them to shared memory
itself (dataplane/policy, dataplane/services). They run on one thread beside the event loop, since
the first turn of a large cluster takes seconds; the turn waits for them. What the first turn made
lives as long as the agent, so the garbage collector need not look at it again: with a million
objects it would stop everything for more than half a second. Health check node ports follow the
services; the bitmap of the node's own ports is refreshed by a task.
"""

import asyncio
import gc
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_network
from typing import Any

from dataplane.cni.endpoints import Endpoint
from dataplane.cni.portmap import host_ports
from dataplane.control.config import Config
from dataplane.control.kernel import sockets
from dataplane.control.model import Cidr, Desired
from dataplane.objects.collect import Objects
from dataplane.policy.engine import PolicyEngine
from dataplane.policy.options import LocalEndpoint, LocalView, PolicyOptions
from dataplane.services.engine import ServiceEngine
from dataplane.services.health import HealthServer
from dataplane.services.model import ServiceOptions
from dataplane.tables.model import PROXY_ADDRESSES
from dataplane.tables.names import NamingOptions
from dataplane.tables.policies import PolicyWriter
from dataplane.tables.services import ServiceWriter
from dataplane.tables.shm import Shm
from xdp.abi import value

PORT_PROXY = value("PORT_PROXY")
SILENT_NS = 5_000_000_000  # an idle worker wakes once a second
RULES, NAMES = "rules.db", "services.json"


class Engines:
    """The policy and the service engine of one agent."""

    def __init__(self, config: Config, shm: Shm, endpoints: Iterable[Endpoint]) -> None:
        """endpoints: a live view of the pods attached here."""
        self._config, self._shm, self._endpoints = config, shm, endpoints
        policy, services = config.policy, config.services
        self.policy = PolicyEngine(
            PolicyWriter(shm),
            PolicyOptions(
                enforcement=policy.enforcement,
                cidr_match=policy.cidr_match,
                audit=policy.audit,
                deny_response=policy.deny_response,
                entries_max=policy.entries_max,
            ),
            shm.folder / RULES,
        )
        dns = config.dns
        self.policy.names.configure(
            NamingOptions(
                nxdomain=dns.name_error == "nxdomain",
                by_identity=dns.learned_by == "identity",
                least_s=dns.least_ttl_s,
                grace_s=dns.grace_s,
                addresses_most=dns.addresses_max,
                domain=dns.cluster_domain,
            )
        )
        self.services = ServiceEngine(
            ServiceWriter(shm),
            ServiceOptions(
                algorithm=services.algorithm,
                maglev_size=services.maglev_size,
                maglev_seed=services.maglev_seed,
                node_port_addresses=tuple(map(ip_network, services.node_port_addresses)),
            ),
            shm.folder / NAMES,
        )
        self.health = HealthServer(self._forwards)
        self._settled = False
        self._thread = ThreadPoolExecutor(1, "engines")

    async def update(self, objects: Objects, wanted: Desired) -> list[str]:
        """Bring policies and services in force; return what is wrong with them."""
        loop = asyncio.get_running_loop()
        problems = await loop.run_in_executor(self._thread, self._update, objects, wanted)
        port = self._config.services.healthz_port
        await self.health.follow(self.services.health_checks(), port)
        if not self._settled:
            self._settled = True
            gc.collect()
            gc.freeze()
        return [*problems, *self.health.problems]

    def _update(self, objects: Objects, wanted: Desired) -> list[str]:
        ends = list(self._endpoints)
        stands = any(port.kind == PORT_PROXY for port in wanted.tables.ports.values())
        self.policy.names.set_proxy(PROXY_ADDRESSES if stands else {})
        problems = self.policy.update(objects, self._view(objects, wanted, ends))
        return problems + self.services.update(
            objects, self._config.node.name, sorted(wanted.reachable, key=str), host_ports(ends)
        )

    def _view(self, objects: Objects, wanted: Desired, ends: list[Endpoint]) -> LocalView:
        """This node as policies see it."""
        ports = {port.endpoint: index for index, port in wanted.tables.ports.items()}
        local = tuple(
            LocalEndpoint(
                ports[end.number],
                end.pod_namespace,
                end.pod_name,
                tuple(at for at in (end.address4, end.address6) if at is not None),
            )
            for end in ends
            if end.number in ports
        )
        keep: list[Cidr] = [ip_network(text) for text in self._config.masquerade.exclude]
        keep += [ip_network(at) for node in objects.nodes.values() for at in node.internal_ips]
        return LocalView(
            node=self._config.node.name,
            addresses=wanted.own,
            endpoints=local,
            clusters=tuple(self._config.network.clusters),
            keep_source=tuple(keep),
            host_port=int(wanted.tables.node["host_port"]),
        )

    def _forwards(self) -> bool:
        """Whether a worker has given a sign of life lately: what health checks are told."""
        newest = int(self._shm.worker_stats["heartbeat_ns"].max())
        return time.clock_gettime_ns(time.CLOCK_MONOTONIC) - newest < SILENT_NS

    async def follow_ports(self, stop: asyncio.Event) -> None:
        """Keep the bitmap of the node's own ports in line."""
        await sockets.follow(self._shm.node_ports, stop)

    async def why(self, source: str, target: str, port: str) -> dict[str, Any]:
        """Return why one may talk to another, or not; between turns. Raises Unknown."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.policy.why, source, target, port)

    def usage(self) -> dict[str, tuple[int, int]]:
        """Return (in use, limit) of every table of policies and services."""
        return self.policy.usage() | self.services.usage()

    async def close(self) -> None:
        """Write what waits, and stop listening."""
        self.services.flush()
        await self.health.close()
        self._thread.shutdown()
