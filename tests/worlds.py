"""A small node in memory: tables as the agent writes them, frames through all stages.

Rule: tests and the fuzzer run exactly the list of stages that a worker runs (loop.process).

Theory. Port 0 is the node's own stack, 1 and 2 are pods, 3 is the uplink. Node 2 is behind the
tunnel (or, direct, behind the uplink). Frames lie in an area of their own with the engine's stride
and headroom, pre-filled with 0xA5, so that a byte written outside a frame shows. Policies, peers
and services are written by tests/agent.py. A world may have several workers (`lanes`) over one
table of connections.
"""

from copy import copy
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path

import numpy as np

from dataplane.engine import loop
from dataplane.engine.account import Counters, dns_rows, make_counters
from dataplane.engine.conntrack import NAT_PORTS, Conntrack
from dataplane.engine.worker import make_tables
from dataplane.kernels.ageing import sweep
from dataplane.kernels.batch import VERDICT_DROP, VERDICT_HOLD, VERDICT_SEND, make_batch
from dataplane.kernels.connections import MASK, Tracker
from dataplane.kernels.events import NOW
from dataplane.kernels.flows import make_flows
from dataplane.kernels.fragments import Fragments, make_fragments
from dataplane.kernels.rows import Rows
from dataplane.tables.model import Adjacency, Port, Tunnel
from dataplane.tables.shm import Shm
from dataplane.tables.writer import TableWriter
from xdp.abi import CONST, value

HOST, POD_A, POD_B, UPLINK = 0, 1, 2, 3
GATEWAY_MAC = bytes.fromhex("025000000001")
HOST_MAC = bytes.fromhex("0250000000fe")
POD_MACS = {POD_A: bytes.fromhex("0a0000000001"), POD_B: bytes.fromhex("0a0000000002")}
UPLINK_MAC = bytes.fromhex("0c0000000001")
NEIGHBOUR_MAC = bytes.fromhex("0c0000000002")
REMOTE_MAC = bytes.fromhex("025000000002")
ROUTER4, ROUTER6 = ip_address("10.1.1.1"), ip_address("fd00:1:1::1")
POD4 = {POD_A: ip_address("10.1.1.2"), POD_B: ip_address("10.1.1.3")}
POD6 = {POD_A: ip_address("fd00:1:1::2"), POD_B: ip_address("fd00:1:1::3")}
NODE4, NODE6 = ip_address("192.0.2.1"), ip_address("2001:db8::1")
REMOTE4, REMOTE6 = ip_address("192.0.2.2"), ip_address("2001:db8::2")
PODS4, PODS6 = ip_network("10.1.1.0/24"), ip_network("fd00:1:1::/64")
FAR4, FAR6 = ip_network("10.1.2.0/24"), ip_network("fd00:1:2::/64")
OUTSIDE4, OUTSIDE6 = ip_network("198.51.100.0/24"), ip_network("2001:db8:f::/48")
UNKNOWN4 = ip_network("203.0.113.0/24")
VNI = 7
IDENTITY = {POD_A: 70001, POD_B: 70002}
PATH_MTU = 1450
STRIDE, HEADROOM = CONST["FRAME_STRIDE"], CONST["FRAME_HEADROOM"]
FILL = 0xA5
SECOND = 1_000_000_000
TIMEOUTS = {
    "CLOSED": 10, "SYN_SENT": 240, "INIT": 200, "UNREPLIED": 120, "ICMP": 60,
    "SYN_RECEIVED": 230, "CLOSING": 220, "REPLIED": 300, "ESTABLISHED": 8000,
}  # fmt: skip
"""Seconds by state of a connection; each its own, so that one taken for another shows."""
NAT_FIRST, NAT_COUNT = 40960, 24576
LOOPBACK4, LOOPBACK6 = ip_address("169.254.42.1"), ip_address("fd00:42::1")


@dataclass(frozen=True)
class Result:
    """What became of a frame."""

    verdict: int
    reason: int
    egress: int
    frame: bytes

    @property
    def sent(self) -> bool:
        return self.verdict == VERDICT_SEND

    @property
    def dropped(self) -> bool:
        return self.verdict == VERDICT_DROP

    @property
    def held(self) -> bool:
        return self.verdict == VERDICT_HOLD


@dataclass(frozen=True)
class Lane:
    """What is one worker's own."""

    tracker: Tracker
    fragments: Fragments
    counters: Counters


def open_pods(shm: Shm, identities: dict[int, int]) -> None:
    """Let policy row 1 allow everything to these ports. identities: by port."""
    for way in ("ingress", "egress"):
        shm.policies[1][f"{way}_otherwise"] = CONST["POLICY_ALLOW"]
    for index, identity in identities.items():
        row = shm.subjects[index]
        row["identity"], row["policy"] = identity, 1


class World:
    """Tables, an area of frames, and the compiled stages."""

    def __init__(
        self,
        folder: Path,
        tunnel: str = "TUNNEL_VXLAN",
        underlay: int = 4,
        rate: int = 1000,
        workers: int = 1,
        records: int = 0,
        slots: int = 0,
    ) -> None:
        """tunnel: an enumerator of enum tunnel_kind; records: of the table of connections.

        slots: of the flow table, 0: it is off.
        """
        self.shm = Shm.create(folder)
        self.workers, self.records = workers, records
        self.writer = TableWriter(self.shm)
        self.tunnel, self.underlay = value(tunnel), underlay
        self.port = 8472 if tunnel == "TUNNEL_VXLAN" else 6081
        self._node(rate)
        self._ports()
        self._routes()
        self.writer.publish()
        open_pods(self.shm, IDENTITY)
        self.tables = make_tables(self.shm)
        self.batch = make_batch()
        self.flows = make_flows(slots)
        self.nat_ports = np.zeros(NAT_PORTS, np.uint32)
        self.area = np.full(STRIDE * CONST["VECTOR_MAX"], FILL, np.uint8)
        self.now = 1_000_000_000
        self.forget()

    def forget(self) -> None:
        """Start with no connection, no affinity, no fragment."""
        for name in ("connections", "affinities"):
            self.shm.clear(name)
        self.shm.exhausted[: self.workers] = 0
        self.restart()

    def restart(self) -> None:
        """Take up the connections that stand, as a forwarder does that starts."""
        self.nat_ports[:] = 0
        self.conntrack = Conntrack(self.shm, self.nat_ports, self.workers, self.flows)
        self.lanes = [self._lane(n) for n in range(self.workers)]
        self.tracker, self.fragments = self.lanes[0].tracker, self.lanes[0].fragments
        self.counters = self.lanes[0].counters

    def _lane(self, n: int) -> Lane:
        shm = self.shm
        rows = (shm.reasons[n], shm.port_counters[n], shm.worker_stats[n : n + 1])
        tracker = self.conntrack.trackers[n]
        counters = make_counters(*rows, dns_rows(shm, n), tracker.ring)
        return Lane(tracker, make_fragments(), counters)

    def _node(self, rate: int) -> None:
        six = int(ROUTER6)
        self.writer.set_node(
            gateway_mac=GATEWAY_MAC,
            tunnel_kind=self.tunnel,
            tunnel_port=self.port if self.tunnel else 0,
            host_port=HOST,
            vni=VNI,
            error_rate=rate,
            error_burst=rate,
            router4=int(ROUTER4),
            router6_hi=six >> 64,
            router6_lo=six & ((1 << 64) - 1),
            workers=self.workers,
            connections=self.records,
            flags=CONST["NODE_REJECT"],
            timeout_s=self._timeouts(),
            nat_first=NAT_FIRST,
            nat_count=NAT_COUNT,
            loopback4=int(LOOPBACK4),
            loopback6_hi=int(LOOPBACK6) >> 64,
            loopback6_lo=int(LOOPBACK6) & ((1 << 64) - 1),
        )

    @staticmethod
    def _timeouts() -> tuple[int, ...]:
        seconds = [0] * CONST["TIMEOUTS_MAX"]
        for name, timeout in TIMEOUTS.items():
            seconds[value(f"CONNECTION_{name}")] = timeout
        return tuple(seconds)

    def _ports(self) -> None:
        self.writer.set_port(
            HOST, Port(value("PORT_HOST"), "penstock1", 10, 65000, 1, GATEWAY_MAC, HOST_MAC)
        )
        for number, index in enumerate((POD_A, POD_B), 1):
            port = Port(
                value("PORT_POD"), f"pst{index}", 10 + index, 65000, 1, GATEWAY_MAC,
                POD_MACS[index], POD4[index], POD6[index], number,
            )  # fmt: skip
            self.writer.set_port(index, port)
        self.writer.set_port(UPLINK, Port(value("PORT_UPLINK"), "eth0", 13, 1500, 1, UPLINK_MAC))

    def _routes(self) -> None:
        def here(kind: str) -> Adjacency:
            return Adjacency(value(kind), HOST, 65000, GATEWAY_MAC, HOST_MAC)

        blackhole = Adjacency(value("ADJACENCY_BLACKHOLE"))
        hop = Adjacency(value("ADJACENCY_NEXTHOP"), UPLINK, 1500, UPLINK_MAC, NEIGHBOUR_MAC)
        unresolved = Adjacency(value("ADJACENCY_UNRESOLVED"), UPLINK, 1500)
        routes = {PODS4: blackhole, PODS6: blackhole, OUTSIDE4: hop, OUTSIDE6: hop}
        routes[UNKNOWN4] = unresolved
        for address in (ROUTER4, ROUTER6):
            routes[ip_network(address)] = here("ADJACENCY_GATEWAY")
        for address in (NODE4, NODE6):
            routes[ip_network(address)] = here("ADJACENCY_HOST")
        for index in (POD_A, POD_B):
            pod = Adjacency(value("ADJACENCY_POD"), index, 65000, GATEWAY_MAC, POD_MACS[index])
            routes[ip_network(POD4[index])] = routes[ip_network(POD6[index])] = pod
        for network in (FAR4, FAR6):
            routes[network] = self.far() if self.tunnel else hop
        self.writer.replace_routes(routes)

    def far(self) -> Adjacency:
        """The adjacency of node 2 behind the tunnel."""
        local, remote = (NODE4, REMOTE4) if self.underlay == 4 else (NODE6, REMOTE6)
        return Adjacency(
            value("ADJACENCY_TUNNEL"),
            UPLINK,
            PATH_MTU,
            UPLINK_MAC,
            NEIGHBOUR_MAC,
            Tunnel(self.tunnel, local, remote, self.port, VNI, GATEWAY_MAC, REMOTE_MAC),
        )

    def load(self, frames: list[tuple[int, bytes]]) -> None:
        """Put (ingress port, frame) into the vector, as `receive` does."""
        b = self.batch
        b.count[0] = len(frames)
        b.now_ns[0] = self.now
        b.area[0] = self.area.ctypes.data
        self.area[:] = FILL
        for i, (port, frame) in enumerate(frames):
            self._put(i, frame)
            b.address[i] = self.area.ctypes.data + i * STRIDE + HEADROOM
            b.frame[i] = i * STRIDE
            b.length[i] = b.total[i] = len(frame)
            b.ingress[i] = port
            b.egress[i] = -1
            for column in (b.segments, b.verdict, b.reason, b.kind, b.flags, b.adjacency):
                column[i] = 0
            for column in (b.identity, b.refusal, b.source_identity, b.target_identity):
                column[i] = 0

    def _put(self, i: int, data: bytes) -> None:
        start = i * STRIDE + HEADROOM
        self.area[start : start + len(data)] = np.frombuffer(data, np.uint8)

    def load_segments(self, port: int, frame: bytes, sizes: list[int]) -> None:
        """Put one frame into the vector, cut into segments of these sizes and a rest."""
        self.load([(port, frame[: sizes[0]])])
        b = self.batch
        b.total[0] = len(frame)
        at = sizes[0]
        for n, size in enumerate([*sizes[1:], len(frame)]):
            part = frame[at : at + size]
            self._put(1 + n, part)
            b.segment_frame[n], b.segment_offset[n] = (1 + n) * STRIDE, HEADROOM
            b.segment_length[n] = len(part)
            at += len(part)
        b.segments[0] = len(sizes)

    def process(self, worker: int = 0) -> None:
        """Run all stages on what is loaded."""
        lane = self.lanes[worker]
        stages = (lane.tracker, lane.fragments, self.flows, lane.counters)
        loop.process(self.batch, self.tables, *stages)

    def run(self, frames: list[tuple[int, bytes]], worker: int = 0) -> list[Result]:
        """Send frames through all stages."""
        assert len(frames) <= CONST["VECTOR_MAX"]
        self.load(frames)
        self.process(worker)
        return [self._result(i) for i in range(len(frames))]

    def tally(self, worker: int = 0) -> None:
        """Count the vector that was processed."""
        loop.tally(self.batch, self.tables, self.lanes[worker].counters)

    def sweep(self) -> int:
        """Forget connections that are idle for too long; return how many."""
        timeouts, mask = Rows(self.shm.node[0]["timeout_s"]), int(self.tracker.words[MASK])
        tables = (self.tables.connections, self.tables.connection_index, self.tracker.places)
        tick = self.now >> CONST["TICK_SHIFT"]
        ring = self.conntrack.ring
        ring[NOW] = self.now
        return sweep(*tables, ring, timeouts, mask, 0, self.conntrack.records, tick)[2]

    def one(self, port: int, frame: bytes, worker: int = 0) -> Result:
        """Send one frame through all stages."""
        return self.run([(port, bytes(frame))], worker)[0]

    def _result(self, i: int) -> Result:
        b = self.batch
        start = int(b.address[i]) - self.area.ctypes.data
        data = self.area[start : start + int(b.length[i])].tobytes()
        return Result(int(b.verdict[i]), int(b.reason[i]), int(b.egress[i]), data)

    def beside(self) -> "World":
        """Another vector over the same tables, for a thread of its own."""
        other = copy(self)
        other.batch = make_batch()
        other.area = np.full(STRIDE * CONST["VECTOR_MAX"], FILL, np.uint8)
        return other

    def close(self) -> None:
        """Let go of shared memory."""
        del self.tables, self.lanes, self.tracker, self.fragments, self.counters, self.conntrack
        self.shm.close()

    def untouched(self, i: int, used: int) -> bool:
        """True when nothing was written behind `used` bytes of frame i or before its headroom."""
        base = i * STRIDE
        after = self.area[base + HEADROOM + used : base + STRIDE]
        before = self.area[base : base + HEADROOM - 128]
        return bool((after == FILL).all() and (before == FILL).all())
