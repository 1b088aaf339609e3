"""What load balancers ask nodes: does this one have endpoints of the service.

Rule: a port that cannot be had is a problem to be told and tried again, never the agent's end.

Theory. A Service with externalTrafficPolicy Local has a healthCheckNodePort; whoever balances load
over nodes asks there, by HTTP, and sends only to nodes that answer 200. Body and headers are
kube-proxy's (pkg/proxy/healthcheck/service_health.go): any path, JSON, the number of local
endpoints also as X-Load-Balancing-Endpoint-Weight (kubernetes/kubernetes #118999). 503 also while
the forwarder does not work, whatever endpoints there are. Another port may answer for the node as
a whole, as kube-proxy's /healthz does: that is what load balancers ask for externalTrafficPolicy
Cluster. One server has all ports and finds out by which one it was asked.
"""

import errno
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from aiohttp import web

from dataplane.services.model import HealthCheck

ANY_ADDRESS = ("0.0.0.0", "::")
NO_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # a node without IPv6
KEEP_ALIVE_S = 15.0
CLOSE_S = 1.0
HEADERS = {"X-Content-Type-Options": "nosniff"}


class HealthServer:
    """Listens on the ports of health checks. Used from one event loop."""

    def __init__(
        self, healthy: Callable[[], bool] = lambda: True, clock: Callable[[], float] = time.time
    ) -> None:
        """healthy: whether packets are forwarded; asked with every request."""
        self._healthy, self._clock = healthy, clock
        self._checks: dict[int, HealthCheck] = {}
        self._node_port = 0
        self._healthy_at = clock()
        self._sites: dict[int, list[web.TCPSite]] = {}
        self._runner: web.ServerRunner | None = None
        self._problems: dict[int, str] = {}

    @property
    def problems(self) -> list[str]:
        """Ports that could not be had."""
        return [text for _, text in sorted(self._problems.items())]

    async def follow(self, checks: Mapping[int, HealthCheck], node_port: int = 0) -> None:
        """Answer these checks, by port, and no others.

        node_port: answers for the node as a whole, 0: none. Refused ports are tried again.
        """
        if self._runner is None:
            self._runner = web.ServerRunner(
                web.Server(self._answer, access_log=None, keepalive_timeout=KEEP_ALIVE_S),
                shutdown_timeout=CLOSE_S,
            )
            await self._runner.setup()
        self._checks, self._node_port = dict(checks), node_port
        wanted = {*checks, node_port} - {0}
        for port in self._sites.keys() - wanted:
            for site in self._sites.pop(port):
                await site.stop()
        self._problems = {}
        for port in sorted(wanted - self._sites.keys()):
            await self._open(self._runner, port)

    async def close(self) -> None:
        """Give all ports back."""
        self._sites.clear()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _open(self, runner: web.ServerRunner, port: int) -> None:
        sites: list[web.TCPSite] = []
        for address in ANY_ADDRESS:
            site = web.TCPSite(runner, address, port)
            try:
                await site.start()
            except OSError as error:
                if sites and error.errno in NO_FAMILY:
                    continue
                for opened in sites:
                    await opened.stop()
                self._problems[port] = f"{self._called(port)}: port {port}: {error.strerror}"
                return
            sites.append(site)
        self._sites[port] = sites

    def _called(self, port: int) -> str:
        check = self._checks.get(port)
        if check is None:
            return "services.healthz_port"
        return f"health checks of Service {check.namespace}/{check.name}"

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        name = request.transport.get_extra_info("sockname") if request.transport else None
        port = name[1] if name else 0
        healthy = self._healthy()
        if port == self._node_port:
            return self._answer_for_node(healthy)
        check = self._checks.get(port)
        if check is None:
            return web.Response(status=503)  # asked while it was taken away
        body = {
            "service": {"namespace": check.namespace, "name": check.name},
            "localEndpoints": check.local_endpoints,
            "serviceProxyHealthy": healthy,
        }
        weight = {"X-Load-Balancing-Endpoint-Weight": str(check.local_endpoints)}
        status = 200 if healthy and check.local_endpoints else 503
        return web.json_response(body, status=status, headers=HEADERS | weight)

    def _answer_for_node(self, healthy: bool) -> web.Response:
        now = self._clock()
        if healthy:
            self._healthy_at = now
        body = {
            "lastUpdated": _shown(self._healthy_at),
            "currentTime": _shown(now),
            "nodeEligible": True,
        }
        return web.json_response(body, status=200 if healthy else 503, headers=HEADERS)


def _shown(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
