"""The whole of connections, slowly: twin of track, connect, policy, service, nat, related.

Rule: a dictionary of tuples; a Setting (tests/setting.py) and the routes of tests/naive/node.py are
all it knows of the node.

Theory. One packet is one call of `settle` or `create`; a vector is two passes, first what is known
and judged, then the rest in order, as kernels/track.py says. Ports and backends that are chosen by
the flow's hash are chosen here by the same hash.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

from tests import worlds as w
from tests.naive import judgement, node, states
from tests.naive.forward import mix
from tests.naive.packets import Packet, Tuple
from tests.setting import PORT_ROWS, Service, Setting
from xdp.abi import CONST

TICK = 1 << CONST["TICK_SHIFT"]
TRIES = 256
WITH_PORTS = (6, 17, 132, 1, 58)
REPLIES = {1: (0, 14, 16, 18), 58: (129,)}  # ICMP types that answer a query
REJECT, KEEP_SOURCE = CONST["NODE_REJECT"], CONST["PEER_KEEP_SOURCE"]
CLUSTER_IP, ADDRESS = CONST["SERVICE_CLUSTER_IP"], CONST["SERVICE_ADDRESS"]


@dataclass
class Connection:
    """What is known of a connection. sides: tuple of its first packet as it came, of a reply."""

    sides: tuple[Tuple, Tuple]
    state: str
    generation: int
    icmp_type: int
    service: int = 0
    backend: object = None
    flags: set[str] = field(default_factory=set)
    tcp: list[int] = field(default_factory=lambda: [0, 0])
    packets: list[int] = field(default_factory=lambda: [0, 0])
    bytes: list[int] = field(default_factory=lambda: [0, 0])
    last: list[int] = field(default_factory=lambda: [0, 0])
    refusal: tuple[str, int] | None = None  # reason and verdict word of a denied one


@dataclass(frozen=True)
class Outcome:
    """reason: its name; answered: a message goes back; ends: of the packet as it leaves."""

    reason: str = "FORWARDED"
    answered: bool = False
    ends: Tuple | None = None
    connection: tuple[Connection, int] | None = None


class Stage:
    """All connections of a node."""

    def __init__(self, direct: bool = False) -> None:
        """direct: node 2 is reached without a tunnel."""
        self.route = partial(node.route, direct=direct)
        self.known: dict[Tuple, tuple[Connection, int]] = {}
        self.affine: dict[tuple[int, int], tuple[object, int]] = {}
        self.counters: Counter[str] = Counter()
        self.setting = Setting()
        self.judgement = self.tick = 0

    @property
    def connections(self) -> list[Connection]:
        return [connection for connection, way in self.known.values() if way == 0]

    def nat_ports(self) -> Counter:
        """(row of the port table, port) -> connections."""
        taken = [c.sides[1] for c in self.connections if "PORT_TAKEN" in c.flags]
        return Counter((PORT_ROWS.get(t.protocol, 3), t.target_port) for t in taken)

    def sweep(self) -> None:
        """Forget what has been idle for too long."""
        for connection in self.connections:
            idle_s = (self.tick - max(connection.last)) * TICK // w.SECOND
            if idle_s >= w.TIMEOUTS[connection.state]:
                self._remove(connection)

    def vector(self, packets: list[Packet]) -> list[Outcome]:
        """Decide about packets that came together."""
        outcomes: list[Outcome | None] = [None] * len(packets)
        for i, packet in enumerate(packets):
            hit = None if packet.error else self.known.get(packet.tuple)
            if hit and hit[0].generation == self.judgement and not self._anew(hit[0], packet):
                outcomes[i] = self._settle(*hit, packet)
        for i, packet in enumerate(packets):
            if outcomes[i] is None:
                outcomes[i] = self._one(packet)
        return [outcome for outcome in outcomes if outcome is not None]

    def _one(self, packet: Packet) -> Outcome:
        if packet.error:
            return self._relate(packet)
        hit = self.known.get(packet.tuple)
        if hit and not self._anew(hit[0], packet) and self._judged(hit[0]):
            return self._settle(*hit, packet)
        if hit:
            self._remove(hit[0])
        return self._create(packet)

    # --- what is known ----------------------------------------------------------------------------

    def _anew(self, connection: Connection, packet: Packet) -> bool:
        return states.opens_anew(connection.state, packet.tuple.protocol, packet.mark)

    def _remove(self, connection: Connection) -> None:
        for side in connection.sides:
            del self.known[side]

    def _settle(self, connection: Connection, way: int, packet: Packet) -> Outcome:
        if connection.refusal:
            return self._refused(packet, *connection.refusal)
        c, protocol = connection, packet.tuple.protocol
        self._count(c, way, packet)
        c.state = states.after(c.state, protocol, packet.mark, way, (c.tcp[0], c.tcp[1]))
        if protocol == states.TCP:
            c.tcp[way] |= packet.mark
        return self._passes(c, way)

    def _count(self, connection: Connection, way: int, packet: Packet) -> None:
        connection.packets[way] += 1
        connection.bytes[way] += len(packet.data)
        connection.last[way] = self.tick

    def _passes(self, connection: Connection, way: int) -> Outcome:
        reason = "AUDITED" if "AUDITED" in connection.flags else "FORWARDED"
        ends = connection.sides[1 - way].back()
        return Outcome(reason, ends=ends, connection=(connection, way))

    def _judged(self, connection: Connection) -> bool:
        """Judge again where the policies have changed; False: it has to be made anew."""
        c = connection
        if c.generation == self.judgement:
            return True
        movable = c.sides[0].protocol != states.TCP or c.state == "SYN_SENT"
        if c.service and movable and not judgement.stands(self.setting, c.backend):
            return False
        reply = c.sides[1]
        port = c.icmp_type if reply.protocol in (1, 58) else reply.source_port
        verdict = judgement.both(
            self.setting, c.sides[0].source, reply.source, reply.protocol, port
        )
        self.counters["rejudged"] += 1
        self.counters["cut"] += bool(verdict.reason and not c.refusal)
        c.refusal = (verdict.reason, verdict.word) if verdict.reason else None
        c.flags -= {"DENIED", "AUDITED"}
        c.flags |= {"DENIED"} if verdict.reason else set()
        c.flags |= {"AUDITED"} if verdict.audited else set()
        c.generation = self.judgement
        return True

    # --- refusals ---------------------------------------------------------------------------------

    def _refused(self, packet: Packet, reason: str, word: int) -> Outcome:
        how = word >> CONST["POLICY_ANSWER_SHIFT"] & 3
        if how == 0:
            return Outcome(reason)
        return Outcome(reason, self._may_answer(packet, how == 2))

    def _may_answer(self, packet: Packet, reset: bool) -> bool:
        if reset and packet.tuple.protocol == states.TCP:
            return not packet.mark & states.RST
        return not packet.error

    def _rejected(self, packet: Packet) -> Outcome:
        answers = self.setting.flags & REJECT
        return Outcome("NO_BACKEND", bool(answers) and self._may_answer(packet, True))

    # --- new ones ---------------------------------------------------------------------------------

    def _unasked(self, packet: Packet) -> Outcome:
        kind, _ = self.route(packet.tuple.target)
        own = packet.outside and kind == "host"
        return Outcome(ends=packet.tuple) if own else Outcome("CT_INVALID")

    def _create(self, packet: Packet) -> Outcome:
        t = packet.tuple
        if packet.mark in REPLIES.get(t.protocol, ()):
            return self._unasked(packet)
        number, service = self._front(packet)
        backend = None
        if service is not None:
            refused = self._at_the_door(packet, service)
            if refused:
                return refused
            backend = self._choose(packet, number, service)
            if backend is None:
                return self._rejected(packet)
        target, port = (backend.address, backend.port) if backend else (t.target, t.target_port)
        kind, egress = self.route(target)
        if packet.outside and not service and kind == "host":
            return Outcome(ends=t)  # the node's own
        l4 = packet.mark if t.protocol in (1, 58) else port
        verdict = judgement.both(self.setting, t.source, target, t.protocol, l4)
        if verdict.reason:
            return self._refused(packet, verdict.reason, verdict.word)
        through = packet.port == w.UPLINK and not service and kind in ("hop", "tunnel")
        if kind in ("none", "blackhole", "unresolved") or through:
            ends = t._replace(target=target, target_port=port)
            return Outcome(ends=ends)  # nothing to remember: it has no way
        source, flags = self._source(packet, bool(service), kind, egress, target)
        own = self._port(t, source, target, port, "PORT_TAKEN" in flags)
        if isinstance(own, str):
            return Outcome(own, self._may_answer(packet, False))
        if own != t.source_port:
            flags.add("NAT_SOURCE")
        flags |= {"NAT_TARGET"} if service else set()
        flags |= {"OUTSIDE"} if packet.outside else set()
        flags |= {"AUDITED"} if verdict.audited else set()
        asks = t.protocol == 17 and 53 in (t.target_port, port)
        flags |= {"DNS"} if asks and packet.port in (w.POD_A, w.POD_B) else set()
        reply = Tuple(target, port, source, own, t.protocol)
        connection = Connection(
            (t, reply), states.first(t.protocol, packet.mark), self.judgement,
            l4 if t.protocol in (1, 58) else 0, number, backend, flags,
        )  # fmt: skip
        connection.tcp[0] = packet.mark if t.protocol == states.TCP else 0
        connection.last = [self.tick, self.tick]
        self.known[t], self.known[reply] = (connection, 0), (connection, 1)
        self.counters["created"] += 1
        self._count(connection, 0, packet)
        return self._passes(connection, 0)

    def _front(self, packet: Packet) -> tuple[int, Service | None]:
        t = packet.tuple
        keys = [(t.target, 0, 0)]
        if t.protocol in (6, 17, 132):
            keys.insert(0, (t.target, t.target_port, t.protocol))
        for key in keys:
            for number, service in enumerate(self.setting.services, 1):
                if key in service.fronts:
                    return number, service
        return 0, None

    def _at_the_door(self, packet: Packet, service: Service) -> Outcome | None:
        if packet.outside and service.flags & CLUSTER_IP:
            return Outcome("IS_CLUSTER_IP")
        if service.flags & ADDRESS:
            return Outcome("ANSWERED_ECHO", True) if packet.asks else self._rejected(packet)
        if packet.outside and service.sources:
            if not any(packet.tuple.source in network for network in service.sources):
                return Outcome("SOURCE_RANGE")
        return None

    def _choose(self, packet: Packet, number: int, service: Service):
        backends = service.away if packet.outside else service.inside
        if not backends:
            return None
        t = packet.tuple
        if not service.affinity_s:
            return self._picked(service, backends, mix(int(t.source), int(t.target), t.word))
        known = self.affine.get((number, int(t.source)))
        if known and (self.tick - known[1]) * TICK // w.SECOND <= service.affinity_s:
            chosen = known[0]
            if chosen not in backends:
                known = None
        else:
            known = None
        if not known:
            hashed = mix(int(t.source), number, 0)
            chosen = self._picked(service, backends, hashed)
        self.affine[number, int(t.source)] = (chosen, self.tick)
        return chosen

    @staticmethod
    def _picked(service: Service, backends: tuple, hashed: int):
        if service.table:
            return service.inside[service.table[(hashed >> 32) % len(service.table)]]
        return backends[(hashed >> 32) % len(backends)]

    # --- the source -------------------------------------------------------------------------------

    def _source(self, packet: Packet, service: bool, kind: str, egress, target):
        four = packet.tuple.source.version == 4
        mine = w.NODE4 if four else w.NODE6
        router = w.ROUTER4 if four else w.ROUTER6
        from_pod = packet.port in w.POD4
        here = kind in ("host", "gateway")
        if service:
            to_itself = kind == "pod" and egress == packet.port
            if to_itself or (here and (packet.port == w.HOST or packet.outside)):
                return w.LOOPBACK4 if four else w.LOOPBACK6, {"NAT_SOURCE", "HAIRPIN"}
            if packet.port == w.UPLINK and kind in ("hop", "tunnel"):
                source = mine if self.setting.masquerade else router
                return source, {"NAT_SOURCE", "PORT_TAKEN"}
        if kind == "hop" and (from_pod or (service and packet.port == w.HOST)):
            kept = judgement.peer(self.setting, target).flags & KEEP_SOURCE
            if self.setting.masquerade and not kept:
                return mine, {"NAT_SOURCE", "PORT_TAKEN"}
        return packet.tuple.source, set()

    def _port(self, t: Tuple, source, target, port: int, nodes: bool) -> int | str:
        first, count = self.setting.nat if nodes else (1024, 64512)

        row = PORT_ROWS.get(t.protocol, 3)
        own_ports = {port for p, port in self.setting.node_ports if PORT_ROWS.get(p, 3) == row}

        def free(own: int) -> bool:
            if nodes and own in own_ports:
                return False
            return Tuple(target, port, source, own, t.protocol) not in self.known

        own = t.source_port
        if (not nodes or not count or first <= own < first + count) and free(own):
            return own
        if t.protocol not in WITH_PORTS:
            return "NAT_UNSUPPORTED"
        start = mix(int(t.source), int(t.target), t.word) >> 16 & 0xFFFFFFFF
        for n in range(min(TRIES, count)):
            own = first + (start + n) % count
            if free(own):
                return own
        self.counters["nat_exhausted"] += 1
        return "NO_NAT_MAPPING"

    # --- ICMP errors ------------------------------------------------------------------------------

    def _relate(self, packet: Packet) -> Outcome:
        hit = self.known.get(packet.quoted.back()) if packet.quoted else None
        invalid = Outcome("CT_INVALID")
        if hit is None:
            return self._unasked(packet)
        connection, way = hit
        mine = connection.sides[way]
        if packet.tuple.target != mine.target:
            return invalid  # an error goes to who has sent what it quotes
        if packet.port in w.POD4 and packet.tuple.source != mine.source:
            return invalid  # a pod speaks of what it has received itself
        if not self._judged(connection):
            return invalid
        if connection.refusal:
            return self._refused(packet, *connection.refusal)
        ends = connection.sides[1 - way].back()
        if packet.tuple.source != mine.source:
            ends = ends._replace(source=packet.tuple.source)  # a router between
        return Outcome(ends=ends, connection=hit)

    # --- the rest of the way ----------------------------------------------------------------------

    def final(self, packet: Packet, outcome: Outcome) -> tuple[str, int | None]:
        """Reason, and the port that something leaves by; None: nothing does."""
        home = self.route(packet.tuple.source)
        back = None if home[0] in ("none", "blackhole", "unresolved") else home[1]
        if outcome.answered:
            return outcome.reason, back
        if outcome.ends is None:
            return outcome.reason, None
        kind, egress = self.route(outcome.ends.target)
        if kind == "gateway" and packet.asks:
            return "ANSWERED_ECHO", back
        if kind in ("host", "gateway", "pod"):
            return outcome.reason, egress
        if kind in ("none", "blackhole"):
            return "UNROUTABLE", None if packet.error else back
        if kind == "unresolved":
            return "FIB_FAILED", None
        hit = outcome.connection
        translated = hit and {"NAT_SOURCE", "NAT_TARGET"} & hit[0].flags
        if packet.port == w.UPLINK and not translated:
            return "UNROUTABLE", None
        return outcome.reason, egress
