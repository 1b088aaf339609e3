"""One port for who watches: /metrics for Prometheus, a page for people.

Rule: only reads; a port that cannot be had is a problem to be told, never the agent's end.

Theory. aiohttp on the agent's loop; collecting and encoding run on a thread of their own, so that
a scrape of many pods delays nothing. The page is one static file that asks /view.json: no build
step, nothing from elsewhere, so it works on a node without a way out. By default only the node
itself is answered; to let Prometheus in, give the address it comes to. No request changes anything.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

from aiohttp import web
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from dataplane.metrics.datapath import DatapathCollector
from dataplane.metrics.facts import Facts
from dataplane.metrics.picture import picture
from dataplane.tables.shm import Shm

HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
CLOSE_S = 1.0
PAGE = files("dataplane.metrics").joinpath("page.html")


class Sight:
    """Metrics and page of one node."""

    def __init__(self, shm: Shm, facts: Callable[[], Awaitable[Facts]]) -> None:
        """facts: the agent as it is now."""
        self._shm, self._facts = shm, facts
        self.problem = ""
        self.datapath = DatapathCollector(shm)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self.datapath)
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

    async def _metrics(self, request: web.Request) -> web.Response:
        facts = await self._facts()
        encode, kind = choose_encoder(request.headers.get("Accept", ""))

        def answer() -> bytes:
            self.datapath.facts = facts
            return encode(self.registry)

        body = await asyncio.get_running_loop().run_in_executor(self._thread, answer)
        return web.Response(body=body, headers={**HEADERS, "Content-Type": kind})

    async def _view(self, request: web.Request) -> web.Response:
        facts = await self._facts()

        def answer() -> dict:
            self.datapath.facts = facts
            return picture(self._shm, facts, self.datapath.pressure())

        found = await asyncio.get_running_loop().run_in_executor(self._thread, answer)
        return web.json_response(found, headers=HEADERS)

    async def _page(self, request: web.Request) -> web.Response:
        return web.Response(text=PAGE.read_text(), content_type="text/html", headers=HEADERS)
