"""One port for who watches: /metrics for Prometheus, a page for people.

Rule: only reads; a port that cannot be had is a problem to be told, never the agent's end.

Theory. aiohttp on the agent's loop; collecting and encoding run on a thread of their own, so that
a scrape of many pods delays nothing. The page is one static file that asks /view.json: no build
step, nothing from elsewhere, so it works on a node without a way out. By default only the node
itself is answered; to let Prometheus in, give the address it comes to. No request changes anything.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from aiohttp import web
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from dataplane.metrics.datapath import DatapathCollector
from dataplane.metrics.facts import Facts, Owner
from dataplane.metrics.flows import FlowCollector
from dataplane.metrics.names import NamesCollector
from dataplane.metrics.picture import picture
from dataplane.tables.shm import Shm
from xdp.abi import CONST

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'",
}
CLOSE_S = 1.0
TURN_S = 1.0
BUSY, BUSY_S = (
    CONST["EVENTS_MAX"] // 16,
    0.03,
)  # events: look again before the rings are round
T = TypeVar("T")
PAGE = files("dataplane.metrics").joinpath("page.html")


class Sight:
    """Metrics and page of one node."""

    def __init__(
        self,
        shm: Shm,
        facts: Callable[[], Awaitable[Facts]],
        owners: Callable[[], Mapping[str, Owner]] = dict,
        rules: Path | None = None,
    ) -> None:
        """facts: the agent as it is now; owners: whose devices are, which is cheap to know.

        rules: the book of rules (policy/rulebook.py).
        """
        self._shm, self._facts, self._owners = shm, facts, owners
        self.problem = ""
        self.datapath, self.flows = DatapathCollector(shm), FlowCollector(shm)
        self.names = NamesCollector(shm)
        self.flows.verdicts.rules, self.flows.messages = rules, self.names.flows
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self.datapath)
        self.registry.register(self.flows)
        self.registry.register(self.names)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._thread = ThreadPoolExecutor(1, "sight")
        self._runner: web.AppRunner | None = None

    async def open(self, address: str, port: int) -> None:
        """Listen; port 0: do not. What goes wrong is in `problem`."""
        if not port:
            return
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/view.json", self._view)
        app.router.add_get("/", self._page)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSE_S)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, address, port).start()
        except OSError as error:
            self.problem = (
                f"metrics.listen {address}, port {port}: {error.strerror}: choose another port, "
                "or 0 for none"
            )

    async def close(self) -> None:
        """Give the port back."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self._thread.shutdown(wait=False)

    async def follow(self) -> None:
        """Count events as they come, for ever: the rings hold a moment only."""
        while True:
            busy = await self._take() > BUSY
            await asyncio.sleep(BUSY_S if busy else TURN_S)

    async def _take(self) -> int:
        self.flows.owners = self._owners()
        return await self._aside(self.flows.take)

    async def _look(self) -> Facts:
        facts = await self._facts()
        self.datapath.facts, self.names.pods = facts, facts.endpoints
        self.flows.verdicts.forget()
        return facts

    async def _aside(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _metrics(self, request: web.Request) -> web.Response:
        await self._look()
        await self._take()
        encode, kind = choose_encoder(request.headers.get("Accept", ""))

        body = await self._aside(lambda: encode(self.registry))
        return web.Response(body=body, headers={**HEADERS, "Content-Type": kind})

    async def _view(self, request: web.Request) -> web.Response:
        facts = await self._look()

        def answer() -> dict:
            return picture(self._shm, facts, self.datapath.pressure(), self.names.top())

        found = await self._aside(answer)
        return web.json_response(found, headers=HEADERS)

    async def _page(self, request: web.Request) -> web.Response:
        return web.Response(text=PAGE.read_text(), content_type="text/html", headers=HEADERS)
