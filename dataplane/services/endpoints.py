"""Endpoints of a service's port: which ones there are, and which may be chosen.

Rule: the rules are kube-proxy's (pkg/proxy/topology.go), for one port and family at a time.

Theory. Several slices may name the same endpoint, while the controller moves it from one to
another: then it is as ready as in the best of them, and local if one says so. Chosen are ready
endpoints; where none is ready, those that still serve while they terminate. Hints narrow the
choice for the Cluster policy only if every ready endpoint has one and one of them is for this node
or zone. What is known but not chosen drains: connections that have it keep it, except UDP once it
no longer serves, for nothing would ever end these (kubernetes/kubernetes: pkg/proxy/conntrack).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dataplane.objects.services import EndpointSlice
from dataplane.services.model import PROTOCOLS, Here, halves
from dataplane.tables.frontends import Key

UDP = PROTOCOLS["UDP"]


@dataclass(slots=True)
class Known:
    """An endpoint, merged from all slices that name it."""

    key: Key
    ready: bool
    serving: bool
    terminating: bool
    local: bool
    weight: int
    pod: str
    zones: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def leaving(self) -> bool:
        """Whether it serves, but only while it terminates."""
        return self.serving and self.terminating


@dataclass(slots=True)
class Choices:
    """Endpoints of a port that may be chosen, by policy; and all that are known."""

    cluster: list[Known]
    local: list[Known]
    known: list[Known]


def known(
    slices: Iterable[EndpointSlice],
    port_name: str,
    protocol: str,
    here: Here,
    publish_not_ready: bool,
) -> dict[Key, Known]:
    """Merge the endpoints of slices of one family for a port, by its name and protocol."""
    number = PROTOCOLS[protocol]
    found: dict[Key, Known] = {}
    for one in slices:
        for port in one.ports:
            if port.name != port_name or port.protocol != protocol or not port.number:
                continue
            for end in one.endpoints:
                hi, lo = halves(end.address)
                key = (hi, lo, port.number, number)
                entry = Known(
                    key,
                    end.ready or publish_not_ready,
                    end.serving or publish_not_ready,
                    end.terminating,
                    bool(end.node) and end.node == here.node,
                    one.weight,
                    end.pod,
                    end.zones,
                    end.nodes,
                )
                before = found.get(key)
                found[key] = entry if before is None else _better(before, entry)
    return found


def _better(one: Known, other: Known) -> Known:
    """The readier of two; what speaks for the endpoint in either counts."""
    best = max(one, other, key=lambda end: (end.ready, end.serving, not end.terminating))
    best.local = one.local or other.local
    best.weight = max(one.weight, other.weight)
    best.pod = best.pod or one.pod or other.pod
    return best


def choices(found: dict[Key, Known], here: Here) -> Choices:
    """Divide endpoints by policy, each list in the order of addresses and ports."""
    every = sorted(found.values(), key=lambda end: end.key)
    ready = [end for end in every if end.ready and end.weight]
    leaving = [end for end in every if not end.ready and end.leaving and end.weight]
    cluster = _hinted(ready, here) if ready else leaving
    local = [end for end in ready if end.local] or [end for end in leaving if end.local]
    return Choices(cluster, local, every)


def _hinted(ready: Sequence[Known], here: Here) -> list[Known]:
    if here.node and all(end.nodes for end in ready):
        mine = [end for end in ready if here.node in end.nodes]
        if mine:
            return mine
    if here.zone and all(end.zones for end in ready):
        mine = [end for end in ready if here.zone in end.zones]
        if mine:
            return mine
    return list(ready)


def drains(end: Known) -> bool:
    """Whether connections to an endpoint that is not chosen, or is leaving, may go on."""
    return end.serving or end.key[3] != UDP
