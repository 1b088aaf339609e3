"""The whole stage of connections against its twin: random sequences of packets, both families.

After each vector: what became of every packet, byte by byte, and every connection with its state,
flags, counters, and the table's own consistency.
"""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels.batch import VERDICT_DROP, VERDICT_SEND
from tests import records
from tests import segments as sg
from tests import worlds as w
from tests.naive import node
from tests.naive.connect import TICK, Outcome, Stage
from tests.naive.forward import forward
from tests.naive.packets import Packet, Tuple
from tests.naive.rewrite import completed, rewritten
from tests.places import (
    BETWEEN,
    FAMILIES,
    FAR,
    NODE,
    NOWHERE,
    OUT,
    OUT_KEPT,
    PEERS,
    ROUTER,
    SERVICES,
    VIPS,
    A,
    B,
    placed,
    read_in,
)
from tests.segments import ICMP, ICMP6, SCTP, TCP, UDP
from tests.setting import ALLOW, DENY, OPEN, WIDE, Agent, Entry, Policy, Setting, word
from tests.worlds import POD_A, POD_B
from xdp.abi import CONST, value

RECORDS = 1024
WORLDS = [(tunnel, 4, 1_000_000, 1, RECORDS) for tunnel in ("TUNNEL_VXLAN", "TUNNEL_NONE")]
VERDICTS = [word(ALLOW, 1), word(ALLOW, 2), word(DENY, 3), word(DENY, 4, "ICMP")]
VERDICTS += [word(DENY, 5, "RESET")]
OTHERS = [ALLOW] * 3 + [word(DENY), word(DENY, 0, "RESET"), word(DENY, 0, "ICMP")]


def entries(r: Random) -> tuple[Entry, ...]:
    found = {}
    for _ in range(r.randint(0, 5)):
        protocol = r.choice([TCP, UDP, SCTP, ICMP, ICMP6, 255])
        port = 8 if protocol == ICMP else 128 if protocol == ICMP6 else 0
        if protocol in (TCP, UDP, SCTP):
            port = r.choice([80, 8080, 53, 99])
        depth = 0 if protocol == 255 else r.choice([0, 8, 16, 16])
        group = r.choice([0, 1, 2, 3, 4, 5, WIDE, WIDE + 1])
        entry = Entry(r.choice(VERDICTS), group, protocol, port, depth)
        found[entry.group, protocol, port >> 16 - depth, depth] = entry
    return tuple(found.values())


def policy(r: Random) -> Policy | None:
    if r.random() < 0.2:
        return None
    otherwise = r.choice(OTHERS), r.choice(OTHERS)
    return Policy(entries(r), entries(r), *otherwise, r.choice([0, 0, CONST["POLICY_AUDIT"]]))


def scene(r: Random) -> Setting:
    """Policies, services and NAT as they may be."""
    return Setting(
        peers=PEERS,
        policies={POD_A: r.choice([OPEN, policy(r)]), POD_B: policy(r)},
        services=r.choice([SERVICES] * 3 + [()]),
        flags=r.choice([CONST["NODE_REJECT"], 0, CONST["NODE_POLICY_HAIRPIN"]]),
        masquerade=r.random() < 0.7,
        node_ports=r.choice([frozenset(), frozenset({(TCP, 40961), (UDP, 40960)})]),
        nat=r.choice([(40960, 24576), (40960, 3), (40960, 0)]),
    )


class Scene:
    """A world and its twin, driven by chance."""

    def __init__(self, world, agent: Agent, setting: Setting, r: Random) -> None:
        self.world, self.agent, self.r = world, agent, r
        self.direct = not world.tunnel
        self.twin = Stage(self.direct)
        world.forget()
        self.change(setting)

    def change(self, setting: Setting) -> None:
        self.agent.write(setting)
        self.twin.setting = setting
        self.twin.judgement = int(self.world.shm.control[0]["judgement"])

    def wait(self, seconds: float) -> None:
        self.world.now += int(seconds * w.SECOND)

    def sweep(self) -> None:
        self.twin.tick = self.world.now // TICK
        self.world.sweep()
        self.twin.sweep()

    # --- packets ----------------------------------------------------------------------------------

    def fresh(self) -> tuple[int, bytes]:
        """A packet of anybody to anybody."""
        f = self.r.choice(FAMILIES)
        a, b = A[f], B[f]
        clients = [a, a, a, b, FAR[f], OUT[f], OUT_KEPT[f], NODE[f], ROUTER[f]]
        source = self.r.choice(clients)
        targets = [a, b, FAR[f], OUT[f], OUT[f], OUT_KEPT[f], NODE[f], NODE[f], ROUTER[f]]
        targets += [NOWHERE[f], *VIPS[f][1:7], *VIPS[f][1:7]]
        target = self.r.choice([t for t in targets if t != source])
        ports = [1000, 1001, 40960, 41000], [80, 80, 8080, 53, 9, 30080, 30053]
        protocol = self.r.choice([TCP, TCP, UDP, SCTP, ICMP, sg.GRE])
        side = Tuple(source, self.r.choice(ports[0]), target, self.r.choice(ports[1]), protocol)
        if protocol == ICMP:
            side = side._replace(target_port=0, protocol=ICMP if f == 4 else ICMP6)
        return placed(self.frame(side, first=True), self.direct)

    def known(self) -> tuple[int, bytes]:
        """A packet of a connection that the twin knows, either way."""
        connection = self.r.choice(self.twin.connections)
        side = connection.sides[self.r.randint(0, 1)]
        return placed(self.frame(side, first=False), self.direct)

    def error(self) -> tuple[int, bytes]:
        """An ICMP error about a connection; sometimes from or to somebody else."""
        connection = self.r.choice(self.twin.connections)
        side = connection.sides[self.r.randint(0, 1)]
        f = side.source.version
        size = self.r.choice([28, 30, 36, 41, 60] if f == 4 else [48, 50, 61, 80])
        quoted = self.frame(side.back(), first=False)[14:][:size]
        source = self.r.choice([side.source] * 3 + [BETWEEN[f], B[f]])
        target = self.r.choice([side.target] * 5 + [FAR[f], A[f]])
        kind, code = self.r.choice([(3, 3), (3, 4), (11, 0)] if f == 4 else [(1, 4), (2, 0)])
        frame = sg.error(sg.Ends(source, 0, target, 0), kind, code, quoted, 1400)
        return placed(frame, self.direct)

    def frame(self, side: Tuple, first: bool) -> bytes:
        e = sg.Ends(side.source, side.source_port, side.target, side.target_port)
        size = self.r.randint(0, 9)
        if side.protocol == TCP:
            usual = [sg.SYN] * 4 if first else [sg.SYN | sg.ACK, sg.ACK, sg.ACK, sg.FIN | sg.ACK]
            flags = self.r.choice([*usual, sg.SYN, sg.RST, sg.FIN | sg.ACK, 0, 63])
            return sg.tcp(e, flags, bytes(size))
        if side.protocol == UDP:
            return sg.udp(e, bytes(size), check=side.source.version == 6 or size % 2 == 0)
        if side.protocol == SCTP:
            return sg.sctp(e, self.r.choice([1, 1, 2, 10, 11, 0, 3, 6, 7, 14]))
        if side.protocol in (ICMP, ICMP6):
            return sg.echo(e, reply=side.source_port == 0, data=bytes(size))
        return sg.gre(e, bytes(size))

    # --- vectors ----------------------------------------------------------------------------------

    def vector(self) -> None:
        frames = []
        for _ in range(self.r.randint(1, 4)):
            kinds = [self.fresh]
            if self.twin.connections:
                kinds += [self.known] * 3 + [self.error]
            frames.append(self.r.choice(kinds)())
        self.world.now += 1_000_000
        self.twin.tick = self.world.now // TICK
        read = [read_in(port, frame) for port, frame in frames]
        results = self.world.run(frames)
        self.world.tally()
        results = [self.world._result(i) for i in range(len(frames))]
        outcomes = self.twin.vector(read)
        for (_, frame), packet, outcome, result in zip(
            frames, read, outcomes, results, strict=True
        ):
            self.check(frame, packet, outcome, result)
        self.compare()

    def check(self, frame: bytes, packet: Packet, outcome: Outcome, result) -> None:
        reason, egress = self.twin.final(packet, outcome)
        assert result.reason == value(f"REASON_{reason}"), (reason, result, packet)
        assert result.verdict == (VERDICT_DROP if egress is None else VERDICT_SEND), (
            reason,
            packet,
        )
        assert egress is None or result.egress == egress, (reason, packet)
        if reason in ("FORWARDED", "AUDITED"):
            left = self.left(packet, outcome)
            assert result.frame == left, (result.frame.hex(), left.hex(), packet, outcome)

    def left(self, packet: Packet, outcome: Outcome) -> bytes:
        """What should be on the wire."""
        ends, data = outcome.ends, packet.data
        assert ends is not None
        if outcome.connection and {"NAT_SOURCE", "NAT_TARGET"} & outcome.connection[0].flags:
            data = translated(packet, outcome)
        target = node.adjacency(self.world, ends.target)
        return forward(bytes(12) + sg.ETHER[data[0] >> 4] + data, packet.found, target)

    def compare(self) -> None:
        """Every connection is what the twin has."""
        rows = {records.sides(row)[0]: row for row in records.live(self.world).values()}
        twins = {connection.sides[0]: connection for connection in self.twin.connections}
        assert rows.keys() == twins.keys(), rows.keys() ^ twins.keys()
        for side, connection in twins.items():
            row = rows[side]
            assert records.sides(row) == connection.sides
            assert records.state(row) == connection.state, side
            assert records.flags(row) == connection.flags, side
            for name in ("tcp", "packets", "bytes", "last"):
                values = [int(row[f"{name}_{way}"]) for way in ("original", "reply")]
                assert values == getattr(connection, name), (name, side)
            assert int(row["service"]) == connection.service
        records.audit(self.world)
        counters = self.world.tracker.counters[0]
        for name in ("created", "rejudged", "cut", "nat_exhausted"):
            assert int(counters[name]) == self.twin.counters[name], name


def numbers(ends: Tuple) -> tuple[int, int, int, int]:
    return int(ends.source), int(ends.target), ends.source_port, ends.target_port


def translated(packet: Packet, outcome: Outcome) -> bytes:
    """A packet with the addresses and ports that it leaves with, and all checksums anew."""
    ends, at, protocol = outcome.ends, packet.at, packet.tuple.protocol
    assert ends is not None and outcome.connection is not None
    if not packet.error:
        return rewritten(packet.data, at, protocol, numbers(ends))
    connection, way = outcome.connection
    sent, quoted = connection.sides[1 - way], packet.data[at + 8 :]
    start = (quoted[0] & 15) * 4 if quoted[0] >> 4 == 4 else 40
    inner = rewritten(quoted, start, sent.protocol, numbers(sent), whole=False)
    outer = rewritten(packet.data[: at + 8] + inner, at, protocol, numbers(ends))
    return completed(outer, at, protocol)


@pytest.fixture(scope="module", params=WORLDS, ids=["vxlan", "direct"])
def stage(request, worlds):
    world = worlds(*request.param)
    return world, Agent(world)


def play(stage, r: Random, steps: int) -> None:
    """A random story."""
    now, then = scene(r), scene(r)
    told = Scene(*stage, now, r)
    for _ in range(steps):
        match r.choice(["packets"] * 8 + ["wait", "change"]):
            case "wait":
                told.wait(r.choice([1, 9.9, 61, 121, 241, 301]))
                told.sweep()
                told.compare()
            case "change":
                now, then = then, now
                told.change(now)
            case _:
                told.vector()


@settings(max_examples=60, deadline=None)
@given(r=st.randoms(use_true_random=False), steps=st.integers(1, 14))
def test_connections_are_their_twin(stage, r, steps):
    play(stage, r, steps)
