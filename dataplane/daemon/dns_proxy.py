"""The DNS proxy's process: DNS over TCP of pods whose names count.

Rule: it needs nothing but the tables in shared memory and its own namespace; neither the agent nor
the forwarder is asked, and each may be replaced while it runs.

Theory. At its start it waits for the tables, enters its namespace (dnsproxy/place.py) and listens.
While no policy has rules.dns no connection is led to it, and it sleeps. What is called to compile
the kernels is counted in scratch tables: no pod has sent it.
"""

import asyncio
import contextlib
import signal
import tempfile
from collections import Counter
from pathlib import Path

from dataplane.control.config import Config
from dataplane.daemon.log import get_logger
from dataplane.dnsproxy import place
from dataplane.dnsproxy.server import CONNECTIONS_MOST, OF_A_POD, Server
from dataplane.engine.judge import Judge
from dataplane.tables.errors import NotRunningError, TableError
from dataplane.tables.shm import Shm

WAIT_S = 0.1
LIMIT_S = 60.0  # so often at most a limit is told of

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
    log.info("listening", connections_most=CONNECTIONS_MOST)
    told: Counter[str] = Counter()
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), LIMIT_S)
        warn(server.counts, told)
    await server.stop()
    log.info("stopped", **server.counts)


def warn(counts: Counter[str], told: Counter[str]) -> None:
    """Say what a limit has refused since then. told: what was said, brought up to date."""
    if more := counts["crowded"] - told["crowded"]:
        log.warning(
            "too many DNS connections: some were refused",
            refused=more, of_a_pod_most=OF_A_POD, in_all_most=CONNECTIONS_MOST,
        )  # fmt: skip
    told.update(counts - told)


def _compile(run_dir: Path) -> None:
    """Compile what is called later; without room for scratch tables the first message does it."""
    with (
        contextlib.suppress(TableError),
        tempfile.TemporaryDirectory(prefix="dnsproxy-", dir=run_dir) as folder,
        Shm.create(Path(folder)) as scratch,
    ):
        Judge(scratch).compile()


def main(config: Config) -> int:
    """Run until SIGTERM; return the exit status."""
    shm = asyncio.run(_wait_for_tables(config))
    _compile(config.run_dir)
    judge = Judge(shm)
    node = shm.node[0]
    gateway = bytes(node["gateway_mac"]).hex(":")
    place.enter(config.run_dir, max(1, int(node["workers"])), gateway)
    asyncio.run(_serve(judge))
    return 0
