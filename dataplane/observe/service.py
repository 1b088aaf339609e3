"""Hubble's API over gRPC: Observer, Peer, health.

Rule: a request that cannot be answered as asked is refused with what is wrong; nothing is guessed.

Theory. Handlers are plain methods by the names of the protocol (protocol.handler). A question that
follows holds one thread of the pool until its client goes; CLIENTS_MOST bounds them. The socket
file is for root; TCP is as the configuration says, with the certificate that it names.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from dataplane.observe import protocol
from dataplane.observe.book import LiveBook
from dataplane.observe.collector import Collector, Loss
from dataplane.observe.filters import Filter, FilterError
from dataplane.observe.message import CLUSTER, Flows
from dataplane.observe.protocol import HEALTH, OBSERVER, PEER, VERSION, message
from dataplane.observe.query import ask, field_mask, question

CLIENTS_MOST = 32
REFRESH_S = 1.0
PEERS_S = 1.0


class Observer:
    """The six calls about flows."""

    def __init__(self, source: Collector, book: LiveBook, node: str) -> None:
        """node: this node's name."""
        self._source, self._book, self._node = source, book, node
        self._flows = Flows(source.directory, book, node, source.epoch)
        self._refreshed = 0.0

    def _refresh(self) -> None:
        if time.monotonic() - self._refreshed > REFRESH_S:
            self._refreshed = time.monotonic()
            self._book.refresh()

    def GetFlows(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        """Flows that fit, then with `follow` those that come."""
        self._refresh()
        try:
            wanted, mask = question(request), field_mask(request)
            fits = Filter(
                request.whitelist, request.blacklist, self._source.directory, self._book, self._node
            )
        except FilterError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            return
        for found in ask(self._source, wanted, fits, context.is_active):
            self._refresh()
            if isinstance(found, Loss):
                yield self._lost(found)
            else:
                yield from self._flows.make(found.flows.take(found.indexes), found.views, mask)

    def _lost(self, loss: Loss) -> Any:
        answer = message("observer.GetFlowsResponse")(node_name=self._node)
        wall = loss.wall_ns or time.time_ns()
        answer.time.FromNanoseconds(wall)
        lost = answer.lost_events
        source = "PERF_EVENT_RING_BUFFER" if loss.ring >= 0 else "HUBBLE_RING_BUFFER"
        lost.source = protocol.enum("flow.LostEventSource")[source]
        lost.num_events_lost = loss.count
        if loss.ring >= 0:
            lost.cpu.value = loss.ring
        lost.last.FromNanoseconds(wall)
        return answer

    def GetAgentEvents(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        """Return none: the agent's log has them."""
        yield from self._nothing(request, context)

    def GetDebugEvents(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        """Return none: there are none."""
        yield from self._nothing(request, context)

    def _nothing(self, request: Any, context: Any) -> Iterator[Any]:
        while request.follow and context.is_active() and not self._source.stopped:
            time.sleep(PEERS_S)
        yield from ()

    def GetNodes(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return this node; those of others a relay puts together."""
        status = self.ServerStatus(None, None)
        answer = message("observer.GetNodesResponse")()
        answer.nodes.add(
            name=f"{CLUSTER}/{self._node}",
            version=status.version,
            state=protocol.enum("relay.NodeState")["NODE_CONNECTED"],
            uptime_ns=status.uptime_ns,
            num_flows=status.num_flows,
            max_flows=status.max_flows,
            seen_flows=status.seen_flows,
        )
        return answer

    def GetNamespaces(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return the namespaces of the pods that are known."""
        answer = message("observer.GetNamespacesResponse")()
        for name in self._source.directory.namespaces():
            answer.namespaces.add(cluster=CLUSTER, namespace=name)
        return answer

    def ServerStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return how many flows are kept, and were seen."""
        store = self._source.store
        answer = message("observer.ServerStatusResponse")(
            num_flows=min(len(store), store.capacity),
            max_flows=store.capacity,
            seen_flows=store.head,
            uptime_ns=time.time_ns() - self._source.started_ns,
            version=f"penstock (Hubble API {VERSION})",
            flows_rate=self._source.rate,
        )
        answer.num_connected_nodes.value = 1
        answer.num_unavailable_nodes.value = 0
        return answer


class Peer:
    """Who else serves flows."""

    def __init__(self, peers: Callable[[], dict[str, str]], alive: Callable[[], bool]) -> None:
        """peers: returns address by name; alive: whether the server goes on."""
        self._peers, self._alive = peers, alive

    def Notify(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        """All peers as added, then what changes."""
        made, kinds = (
            message("peer.ChangeNotification"),
            protocol.enum("peer.ChangeNotificationType"),
        )
        known: dict[str, str] = {}
        while context.is_active() and self._alive():
            now = dict(self._peers())
            for name in known.keys() - now.keys():
                yield made(name=name, address=known[name], type=kinds["PEER_DELETED"])
            for name, address in now.items():
                if known.get(name) != address:
                    kind = "PEER_UPDATED" if name in known else "PEER_ADDED"
                    yield made(name=name, address=address, type=kinds[kind])
            known = now
            time.sleep(PEERS_S)


class Server:
    """A gRPC server over a unix socket, and TCP where that is asked for."""

    def __init__(self, observer: Observer, peer: Peer) -> None:
        """Listen nowhere yet."""
        self._server = grpc.server(
            ThreadPoolExecutor(CLIENTS_MOST, "grpc"), maximum_concurrent_rpcs=CLIENTS_MOST
        )
        found = health.HealthServicer()
        for name in ("", HEALTH, OBSERVER, PEER):
            found.set(name, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(found, self._server)
        handlers = (protocol.handler(OBSERVER, observer), protocol.handler(PEER, peer))
        self._server.add_generic_rpc_handlers(handlers)

    def listen_unix(self, path: Path) -> None:
        """Listen on a socket file that only root may use; an older one is replaced."""
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        finally:
            os.umask(mask)

    def listen_tcp(self, address: str, credentials: Any = None) -> int:
        """Listen on host:port; return the port. Raises RuntimeError when it is taken.

        credentials: of grpc.ssl_server_credentials; None: plain text.
        """
        if credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, credentials)

    def start(self) -> None:
        """Serve."""
        self._server.start()

    def stop(self) -> None:
        """End all calls."""
        self._server.stop(0.5).wait()


def credentials(certificate: Path, key: Path, client_ca: Path | None) -> Any:
    """Return credentials of a TLS server; client_ca: clients must have one of its certificates."""
    asked = client_ca.read_bytes() if client_ca else None
    pair = (key.read_bytes(), certificate.read_bytes())
    return grpc.ssl_server_credentials([pair], asked, require_client_auth=asked is not None)
