"""A node in memory for the engine's benchmark: tables, frames, and the compiled loop over them.

Rule: no device, no ring, no system call: the kernels that a worker runs, on frames in memory.

Theory. Packets come from a pod, 64-byte UDP. A *case* says where they go: to a pod of the same
node, to another node through VXLAN, or to a ClusterIP whose backends are behind VXLAN, with
policies in force. A frame is restored from an image table at each turn, as a NIC would write it,
into one of RING frames, as many as a forwarder has; images are read in their order, but the
connections that they belong to lie where their hashes put them, so tables of a million connections
miss the cache at each packet.
"""

import struct
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path

import numpy as np

from dataplane.engine.account import account, dns_rows, make_counters
from dataplane.engine.conntrack import NAT_PORTS, Conntrack
from dataplane.engine.rings import start
from dataplane.engine.worker import make_tables
from dataplane.kernels.admit import admit
from dataplane.kernels.answer import answer
from dataplane.kernels.batch import VERDICT_SEND, make_batch
from dataplane.kernels.connect import connect
from dataplane.kernels.flows import install
from dataplane.kernels.forward import forward
from dataplane.kernels.fragments import fragments, make_fragments
from dataplane.kernels.house import copy32, inline, kernel, prefetch
from dataplane.kernels.judge import judge
from dataplane.kernels.parse import parse
from dataplane.kernels.route import route
from dataplane.kernels.track import track
from dataplane.kernels.translate import translate
from dataplane.tables.model import Adjacency, Port, Tunnel
from dataplane.tables.services import ServiceRow, ServiceWriter
from dataplane.tables.shm import Shm
from dataplane.tables.writer import TableWriter
from xdp.abi import CONST, value

STAGES = (
    "load", "parse", "admit", "track", "connect", "route", "judge", "answer", "translate",
    "forward", "install", "account",
)  # fmt: skip
POD_CASE, VXLAN_CASE, SERVICE_CASE = "pod", "vxlan", "service, policy, vxlan"

VECTOR = CONST["VECTOR_MAX"]
STRIDE, HEADROOM = CONST["FRAME_STRIDE"], CONST["FRAME_HEADROOM"]
RING = 16384  # frames: what a forwarder has by default
FRAME = 64
POD, UPLINK = 1, 2
GATEWAY = bytes.fromhex("025000000001")
MAC = bytes.fromhex("0a0000000001")
CLIENT = ip_address("10.1.1.2")
VIPS, BACKENDS = 64, 16  # services, and backends of each
CLIENT_PORTS = 50_000
UDP = 17


@inline
def _load(b, area, images, first, frames, slot):
    """Put VECTOR packets of the image table into frames, as received."""
    b.count[0] = VECTOR
    for i in range(VECTOR):
        n = first + i
        n = n - frames if n >= frames else n
        at = area + (slot + i) * STRIDE + HEADROOM
        prefetch(images + (n + 64) * FRAME)
        copy32(at, images + n * FRAME)
        copy32(at + 32, images + n * FRAME + 32)
        start(b, i, at, (slot + i) * STRIDE, FRAME, POD)


@kernel
def run_stages(b, t, k, f, x, c, area, images, frames, vectors, last):
    """Send `vectors` vectors through the stages up to number `last` of STAGES."""
    first = 0
    slot = 0
    for _ in range(vectors):
        _load(b, area, images, first, frames, slot)
        b.now_ns[0] += 1000
        first += VECTOR
        first = first - frames if first >= frames else first
        slot = slot + VECTOR if slot + VECTOR < RING else 0
        if last >= 1:
            parse(b)
        if last >= 2:
            admit(b, t)
            fragments(b, f, k)
        if last >= 3:
            track(b, t, k)
        if last >= 4 and b.todo_count[0]:
            connect(b, t, k)
        if last >= 5:
            route(b, t)
        if last >= 6:
            judge(b, t)
        if last >= 7:
            answer(b, t, c)
        if last >= 8:
            translate(b, t)
        if last >= 9:
            forward(b, t)
        if last >= 10:
            install(b, t, x)
        if last >= 11:
            account(b, t, c)


@dataclass(frozen=True)
class Case:
    """What is measured."""

    way: str
    flows: int


class World:
    """Tables, frames and the compiled loop of one case."""

    def __init__(self, folder: Path, case: Case) -> None:
        """folder: on tmpfs, for the tables."""
        self.shm = Shm.create(folder)
        writer = TableWriter(self.shm)
        records = 1 << max(17, (case.flows * 5 // 4).bit_length())
        self._tables(writer, case.way != POD_CASE, min(records, CONST["CONNECTIONS_MOST"]))
        self._open_policy()
        if case.way == SERVICE_CASE:
            self._services()
        writer.publish()
        self.frames = -(-case.flows // VECTOR) * VECTOR
        self.images = _images(case, self.frames)
        self.area = np.zeros(RING * STRIDE + 4096, np.uint8)
        self.batch = make_batch()
        self.tables = make_tables(self.shm)
        self.conntrack = Conntrack(self.shm, np.zeros(NAT_PORTS, np.uint32), 1)
        self.fragments = make_fragments()
        rows = (self.shm.reasons[0], self.shm.port_counters[0], self.shm.worker_stats[0:1])
        ring = self.conntrack.trackers[0].ring
        self.counters = make_counters(*rows, dns_rows(self.shm, 0), ring)

    def _tables(self, writer: TableWriter, tunnel: bool, records: int) -> None:
        kind = value("TUNNEL_VXLAN")
        flags = CONST["NODE_IDENTITY_VNI"]
        writer.set_node(
            gateway_mac=GATEWAY, tunnel_kind=kind, tunnel_port=8472, workers=1, flags=flags,
            connections=records,
        )  # fmt: skip
        pod = Port(value("PORT_POD"), "pod", 11, 65000, 1, GATEWAY, MAC, CLIENT, None, 1)  # type: ignore
        writer.set_port(POD, pod)
        writer.set_port(UPLINK, Port(value("PORT_UPLINK"), "eth0", 12, 1500, 1, GATEWAY))
        local, remote = ip_address("192.0.2.1"), ip_address("192.0.2.2")
        outer = Tunnel(kind, local, remote, 8472, 0, GATEWAY, MAC)
        far = Adjacency(value("ADJACENCY_TUNNEL"), UPLINK, 1450, GATEWAY, MAC, outer)
        near = Adjacency(value("ADJACENCY_POD"), POD, 65000, GATEWAY, MAC)
        away = far if tunnel else Adjacency(value("ADJACENCY_NEXTHOP"), UPLINK, 1500, GATEWAY, MAC)
        writer.replace_routes({ip_network(CLIENT): near, ip_network("10.2.0.0/16"): away})

    def _open_policy(self) -> None:
        """One policy that allows the client everything, found by its default."""
        for way in ("ingress", "egress"):
            self.shm.policies[1][f"{way}_otherwise"] = CONST["POLICY_ALLOW"]
        self.shm.subjects[POD]["identity"], self.shm.subjects[POD]["policy"] = 70001, 1

    def _services(self) -> None:
        writer = ServiceWriter(self.shm)
        for n in range(VIPS):
            backends = tuple((0, 0x0A020000 + n * BACKENDS + m, 8080, UDP) for m in range(BACKENDS))
            writer.set_service(f"s{n}", ServiceRow(inside=backends, active=backends))
            writer.set_frontend((0, _vip(n), 80, UDP), f"s{n}")
        writer.settle()
        writer.commit()

    def run(self, last: int, vectors: int) -> None:
        """Send vectors through the stages up to number `last`."""
        run_stages(
            self.batch, self.tables, self.conntrack.trackers[0], self.fragments,
            self.conntrack.flows, self.counters,
            self.area.ctypes.data, self.images.ctypes.data, self.frames, vectors, last,
        )  # fmt: skip

    def warm(self) -> None:
        """Send every flow once; all must pass."""
        self.run(len(STAGES) - 1, self.frames // VECTOR)
        sent = self.batch.verdict[:VECTOR] == VERDICT_SEND
        assert sent.all(), f"reasons {set(self.batch.reason[:VECTOR].tolist())} in the benchmark"

    def forget(self) -> None:
        """Take all connections away."""
        self.shm.clear("connections")
        self.conntrack = Conntrack(self.shm, np.zeros(NAT_PORTS, np.uint32), 1)

    def close(self) -> None:
        """Unmap."""
        del self.tables, self.counters, self.conntrack
        self.shm.close()


def _vip(n: int) -> int:
    return 0x0A600000 + n + 1


def _images(case: Case, frames: int) -> np.ndarray:
    """uint8[frames + 64, FRAME]: a frame for each flow; flows differ in target and source port."""
    flow = np.arange(frames + 64) % case.flows
    target = 0x0A020000 + (flow // CLIENT_PORTS) * 256 + (flow & 0xFF)
    port = np.full(len(flow), 9)
    if case.way == SERVICE_CASE:
        target, port = _vip(0) + (flow // CLIENT_PORTS) % VIPS, np.full(len(flow), 80)
    ip = struct.pack(">BBHHHBBHI", 0x45, 0, 50, 0, 0x4000, 64, UDP, 0, int(CLIENT))
    head = np.frombuffer(GATEWAY + MAC + b"\x08\x00" + ip, np.uint8)
    images = np.zeros((len(flow), FRAME), np.uint8)
    images[:, : len(head)] = head
    images[:, 30:34] = target.astype(">u4").view(np.uint8).reshape(-1, 4)
    words = images[:, 14:34].copy().view(">u2").astype(np.int64)
    total = words.sum(axis=1)
    for _ in range(3):
        total = (total & 0xFFFF) + (total >> 16)
    images[:, 24:26] = (~total & 0xFFFF).astype(">u2").view(np.uint8).reshape(-1, 2)
    ports = np.stack([1024 + flow % CLIENT_PORTS, port, np.full(len(flow), 30)], 1).astype(">u2")
    images[:, 34:40] = ports.view(np.uint8).reshape(-1, 6)
    return images
