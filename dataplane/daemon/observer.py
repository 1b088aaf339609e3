"""The observer process: keeps flows, writes them to disk, serves Hubble's API.

Rule: wiring only; it may be killed at any time, and neither agent nor forwarder notices.

Theory. A process of its own, because numpy and gRPC hold the interpreter for milliseconds, which
the agent's CNI answers must not wait for. What it needs is in shared memory and files; only the
names of pods come from the agent, asked for by a thread of its own, so that an agent that is slow
or away never keeps rings from being read.
"""

import signal
import threading
from typing import Any

import structlog

from dataplane.control.config import Config
from dataplane.control.jsonl import RemoteError, Unreachable, call
from dataplane.daemon.engines import NAMES, RULES
from dataplane.daemon.lock import hold
from dataplane.observe import report
from dataplane.observe.book import LiveBook
from dataplane.observe.collector import Collector
from dataplane.observe.history import FOLDER, History, Origin
from dataplane.observe.names import KnownNames
from dataplane.observe.protocol import SOCKET
from dataplane.observe.service import Observer, Peer, Server, credentials
from dataplane.tables.events import epoch
from dataplane.tables.shm import Shm
from xdp.sched import defer

ASK_S, AWAY_S, LOOK_S = 0.1, 2.0, 1.0
NEWS_S = 1.0  # so long the agent waits for news before it answers that there are none

log = structlog.get_logger(subsys="observer")


class Roster:
    """Asks the agent who is who, and shared memory what DNS says."""

    def __init__(self, config: Config, names: KnownNames) -> None:
        """Nobody is known yet. names: to be brought up to date, too."""
        self._names = names
        self._path = config.run_dir / "api.sock"
        self._version: Any = None
        self._news: list[dict[str, Any]] | None = None
        self.peers: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="roster", daemon=True)
        self._port = config.observe.listen.rpartition(":")[2]

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def close(self) -> None:
        """Stop asking."""
        self._stop.set()

    def take(self) -> list[dict[str, Any]] | None:
        """Return all pods when there is news, else None."""
        news, self._news = self._news, None
        return news

    def _run(self) -> None:
        while not self._stop.wait(ASK_S):
            self._names.turn()
            try:
                answer = call(self._path, "pods", known=self._version, wait=NEWS_S)
                if answer:
                    self._version, self._news = answer["version"], answer["pods"]
                    self.peers = self._find_peers()
            except (Unreachable, RemoteError, ValueError):
                self._stop.wait(AWAY_S)

    def _find_peers(self) -> dict[str, str]:
        if not self._port:
            return {}
        nodes = call(self._path, "nodes")
        return {
            node["name"]: f"{node['internal_ips'][0]}:{self._port}"
            for node in nodes
            if node["internal_ips"]
        }


def _open(config: Config, stop: threading.Event) -> Shm | None:
    """Wait until there are tables."""
    while not stop.is_set():
        try:
            return Shm.open(config.run_dir)
        except (OSError, ValueError):
            stop.wait(LOOK_S)
    return None


def main(config: Config) -> int:
    """Run until SIGTERM; return the exit status."""
    stop = threading.Event()
    defer()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with hold(config.run_dir / "observer.lock"):
        while (shm := _open(config, stop)) is not None:
            _serve(config, shm, stop)  # until the end, or until there are other tables
            shm.close()
    return 0


def _serve(config: Config, shm: Shm, stop: threading.Event) -> None:
    options = config.observe
    names = KnownNames(shm)
    roster = Roster(config, names)
    source = Collector(shm, options.flows, roster.take, options.dns, options.dns_rate)
    book = LiveBook(shm, shm.folder / RULES, shm.folder / NAMES)
    book.names, book.messages = names.of, source.messages.get
    observer = Observer(source, book, config.node.name)
    server = Server(observer, Peer(lambda: roster.peers, lambda: not source.stopped))
    history = _history(config, Origin(source.directory, book, config.node.name, source.epoch))
    if history is not None:
        source.sinks.append(history.add)
    server.listen_unix(config.run_dir / SOCKET)
    if options.listen:
        _listen(config, server)
    for part in (roster, source, server):
        part.start()
    log.info("keeps flows", most=source.store.capacity, socket=str(config.run_dir / SOCKET))
    _watch(config, shm, source, history, stop)
    roster.close()
    source.close()
    if history is not None:
        history.flush()
    server.stop()


def _watch(
    config: Config, shm: Shm, source: Collector, history: History | None, stop: threading.Event
) -> None:
    """Write history and report, and log losses, until the end or until there are other tables."""
    told, problem = 0, ""
    while epoch(shm) == source.epoch:
        if source.lost != told:
            log.warning("events lost", lost=source.lost - told, since_start=source.lost)
            told = source.lost
        if history is not None:
            history.turn()
            if history.problem not in (problem, ""):
                log.error("no history", error=history.problem)
            problem = history.problem
        report.write(config.run_dir / report.FILE, source, history)
        if stop.wait(LOOK_S):
            break


def _history(config: Config, origin: Origin) -> History | None:
    options, folder = config.observe, config.state_dir / FOLDER
    if not options.history_mb:
        return None
    try:
        return History(folder, options.history_mb << 20, options.history_hours * 3600, origin)
    except OSError as error:
        log.error("no history", folder=str(folder), error=str(error))
        return None


def _listen(config: Config, server: Server) -> None:
    options = config.observe
    try:
        made = None
        if options.tls_cert and options.tls_key:
            made = credentials(options.tls_cert, options.tls_key, options.tls_client_ca)
        server.listen_tcp(options.listen, made)
    except (OSError, RuntimeError) as error:  # flows are still kept, and served over the file
        log.error("observe.listen does not work", address=options.listen, error=str(error))
