"""The DNS proxy's process: DNS over TCP of pods whose names count.

Rule: it needs nothing but the tables in shared memory and its own namespace; neither the agent nor
the forwarder is asked, and each may be replaced while it runs.

Theory. At its start it waits for the tables, enters its namespace (dnsproxy/place.py) and listens.
While no policy has rules.dns no connection is led to it, and it sleeps.
"""

import asyncio
import signal

from dataplane.control.config import Config
from dataplane.daemon.log import get_logger
from dataplane.dnsproxy import place
from dataplane.dnsproxy.server import Server
from dataplane.engine.judge import Judge
from dataplane.tables.errors import NotRunningError
from dataplane.tables.shm import Shm

WAIT_S = 0.1

log = get_logger("dnsproxy")


async def _wait_for_tables(config: Config) -> Shm:
    """Map the tables once the agent has published them for the first time."""
    while True:
        try:
            shm = Shm.open(config.run_dir, writable=True)
        except NotRunningError:
            shm = None
        if shm is not None and int(shm.node[0]["workers"]) > 0:
            return shm
        await asyncio.sleep(WAIT_S)


async def _serve(judge: Judge) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = Server(judge)
    await server.start()
    log.info("listening", connections_most=4096)
    await stop.wait()
    await server.stop()
    log.info("stopped", **server.counts)


def main(config: Config) -> int:
    """Run until SIGTERM; return the exit status."""
    shm = asyncio.run(_wait_for_tables(config))
    judge = Judge(shm)
    judge.compile()
    node = shm.node[0]
    gateway = bytes(node["gateway_mac"]).hex(":")
    place.enter(config.run_dir, max(1, int(node["workers"])), gateway)
    asyncio.run(_serve(judge))
    return 0
