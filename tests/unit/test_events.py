"""Events of the forwarder: what becomes of connections and packets, told once and exactly."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from dataplane.kernels.drops import PENDING, tell_drops
from dataplane.kernels.house import kernel
from dataplane.tables.events import EventReader
from tests import records
from tests import segments as sg
from tests.places import FAMILIES, HTTP, OUT, PEERS, SERVICES, VIPS, A, B, inside, send
from tests.segments import ACK, FIN, SYN
from tests.setting import ALLOW, DENY, Agent, Entry, Policy, Setting, word
from tests.worlds import HOST, IDENTITY, POD_A, POD_B, SECOND, UPLINK
from xdp.abi import CONST, ENUM, value

BY_FAMILY = pytest.mark.parametrize("f", FAMILIES)
OPEN = Setting(peers=PEERS, services=SERVICES, masquerade=True)
KINDS = {number: name.removeprefix("EVENT_") for name, number in ENUM["flow_event"].items()}
DROPS = 130


@kernel
def told_at_once(counters):
    tell_drops(counters)


@pytest.fixture(scope="module")
def stage(worlds):
    world = worlds("TUNNEL_VXLAN", 4, 1_000_000, 1, 1024)
    return world, Agent(world)


@pytest.fixture
def world(stage):
    world, agent = stage
    agent.write(OPEN)
    world.shm.node[0]["events_off"] = world.shm.node[0]["sample_shift"] = 0
    world.forget()
    world.now += 2 * SECOND
    return world


@pytest.fixture
def agent(stage, world):
    return stage[1]


@pytest.fixture
def told(world):
    """Return a function that gives what was told since it was asked last, by time."""
    reader = EventReader(world.shm, 0)

    def read() -> np.ndarray:
        some = [batch.records for batch in reader.read(1 << 20)]
        assert not any(reader.lost)
        together = np.concatenate(some) if some else np.zeros(0, world.shm.flow_records.dtype)
        return together[np.argsort(together["time_ns"], kind="stable")]

    return read


def kinds(rows: np.ndarray) -> list[str]:
    return [KINDS[int(kind)] for kind in rows["kind"]]


def ends_of(row: np.void) -> sg.Ends:
    """Source and target as a record says them."""
    made = [
        sg.ip_address(
            (int(row[f"{end}_hi"]) << 64 | int(row[f"{end}_lo"])).to_bytes(
                4 if row["family"] == 4 else 16, "big"
            )
        )
        for end in ("source", "target")
    ]
    return sg.Ends(made[0], int(row["source_port"]), made[1], int(row["target_port"]))


def handshake(world, e: sg.Ends) -> None:
    for frame in (sg.tcp(e), sg.tcp(e.back(), SYN | ACK), sg.tcp(e, ACK)):
        assert send(world, frame).sent


@BY_FAMILY
def test_what_is_told_of_dns_is_no_reply(world, told, f):
    """CONNECTION_FLAG_DNS and EVENT_REPLY are the same bit."""
    assert send(world, sg.udp(sg.Ends(A[f], 1000, B[f], 53), b"query")).sent
    world.now += 10_000 * SECOND
    assert world.sweep() == 1
    rows = told()
    assert kinds(rows) == ["NEW", "END"]
    assert not any(int(row["flags"]) & CONST["EVENT_REPLY"] for row in rows)


@BY_FAMILY
def test_the_life_of_a_connection(world, told, f):
    e = sg.Ends(A[f], 1000, B[f], HTTP)
    handshake(world, e)
    for n in range(5):
        world.now += SECOND
        assert send(world, sg.tcp(e, ACK, b"x" * n)).sent
    assert kinds(told()) == ["NEW", "CHANGE", "CHANGE"]  # SYN, SYN-ACK, ACK; then nothing
    assert send(world, sg.tcp(e, FIN | ACK)).sent
    assert send(world, sg.tcp(e.back(), FIN | ACK)).sent
    row = records.live(world).popitem()[1].copy()
    world.now += 10_000 * SECOND
    assert world.sweep() == 1
    rows = told()
    assert kinds(rows) == ["CHANGE", "CHANGE", "END"]
    assert [int(r["flags"]) & CONST["EVENT_REPLY"] for r in rows] == [0, CONST["EVENT_REPLY"], 0]
    assert [int(r["tcp"]) for r in rows] == [FIN | ACK, FIN | ACK, SYN | FIN | ACK]
    end = rows[-1]
    assert ends_of(end) == e
    assert int(end["tcp_reply"]) == SYN | FIN | ACK
    for name, kept in (("packets", "packets_original"), ("reply_packets", "packets_reply"),
                       ("bytes", "bytes_original"), ("reply_bytes", "bytes_reply")):  # fmt: skip
        assert int(end[name]) == int(row[kept]) > 0, name
    assert int(end["lasted"]) << CONST["TICK_SHIFT"] == pytest.approx(10_005 * SECOND, rel=1e-3)


@BY_FAMILY
def test_a_new_connection_names_its_rules_identities_and_service(world, agent, told, f):
    allow = (Entry(word(ALLOW, 11), 0, sg.TCP, 8080, 16),)
    closed = Policy(egress=allow, egress_otherwise=word(DENY, 9))
    agent.write(Setting(peers=PEERS, services=SERVICES, policies={POD_A: closed}))
    send(world, sg.tcp(sg.Ends(A[f], 1000, VIPS[f][2], 80)))
    (row,) = told()
    assert ends_of(row) == sg.Ends(A[f], 1000, B[f], 8080)
    assert int(row["egress_rule"]) == word(ALLOW, 11)
    assert (int(row["source_identity"]), int(row["target_identity"])) == (
        IDENTITY[POD_A], IDENTITY[POD_B],
    )  # fmt: skip
    assert int(row["service"]) > 0
    assert (int(row["port"]), int(row["tcp"])) == (POD_A, SYN)


@BY_FAMILY
def test_a_masqueraded_connection_says_its_new_source(world, told, f):
    out = inside(send(world, sg.udp(sg.Ends(A[f], 1000, OUT[f], 53)))).payload
    (row,) = told()
    fresh = int(row["new_source_hi"]) << 64 | int(row["new_source_lo"])
    assert fresh == int(sg.ip_address(out.src))
    assert int(row["new_source_port"]) == out.payload.sport


@BY_FAMILY
def test_a_drop_behind_a_service_says_where_that_would_have_led(world, agent, told, f):
    agent.write(
        Setting(
            peers=PEERS,
            services=SERVICES,
            policies={POD_B: Policy(ingress_otherwise=word(DENY, 12))},
        )
    )
    send(world, sg.tcp(sg.Ends(A[f], 1000, VIPS[f][2], 80)))
    world.tally()
    (row,) = told()
    assert (KINDS[int(row["kind"])], int(row["egress_rule"])) == ("DROP", word(DENY, 12))
    assert ends_of(row) == sg.Ends(A[f], 1000, B[f], 8080)
    assert int(row["service"]) > 0


@BY_FAMILY
@pytest.mark.parametrize("answer", ["DROP", "ICMP", "RESET"])
def test_what_is_answered_instead_of_forwarded_is_a_drop_too(world, agent, told, f, answer):
    agent.write(
        Setting(
            peers=PEERS,
            services=SERVICES,
            policies={POD_A: Policy(egress_otherwise=word(DENY, 7, answer))},
        )
    )
    e = sg.Ends(A[f], 1000, B[f], HTTP)
    result = send(world, sg.tcp(e))
    world.tally()
    assert result.dropped == (answer == "DROP")
    (row,) = told()
    assert ends_of(row) == e
    assert int(row["egress_rule"]) == word(DENY, 7, answer)
    assert int(row["reason"]) == value("REASON_POLICY_DENIED")


def test_a_flood_of_the_same_drop_is_few_events_with_exact_counts(world, agent, told):
    agent.write(Setting(peers=PEERS, policies={POD_A: Policy(egress_otherwise=word(DENY, 7))}))
    frame = sg.udp(sg.Ends(A[4], 1000, B[4], 53), b"x" * 20)
    for _ in range(100):
        world.run([(POD_A, frame)] * 200)
        world.tally()
        world.now += SECOND // 20
    world.now += SECOND
    world.run([])
    world.tally()
    rows = told()
    assert len(rows) <= 8
    assert int(rows["packets"].sum()) == 20_000
    assert int(rows["bytes"].sum()) == 20_000 * len(frame)
    assert int(rows[0]["packets"]) == 1, "the first is told at once"


def some_frame(rng: Random) -> tuple[int, bytes]:
    """A packet, often one that is dropped."""
    f = rng.choice(FAMILIES)
    e = sg.Ends(A[f], rng.randrange(1, 2000), B[f], rng.choice((53, 80, 81)))
    frame = sg.udp(e, bytes(rng.randrange(8))) if rng.random() < 0.6 else sg.tcp(e)
    match rng.randrange(8):
        case 0:
            frame = frame[:14] + bytes([0x95]) + frame[15:]  # no version of IP
        case 1:
            frame = frame[: rng.randrange(15, 34)]
        case 2:
            frame = frame[:12] + b"\x88\xcc" + frame[14:]
        case 3:
            return HOST, frame
    return POD_A, frame


def test_each_dropped_packet_is_in_exactly_one_event(world, agent, told):
    """Any mix of drops, more flows than are gathered: events and counters agree, by reason."""
    agent.write(Setting(peers=PEERS, policies={POD_A: Policy(egress_otherwise=word(DENY, 7))}))
    world.shm.reasons[:] = 0
    rng = Random(5)
    pool = [some_frame(rng) for _ in range(3 * PENDING)]
    for _ in range(60):
        world.run([rng.choice(pool[: rng.choice((9, len(pool)))]) for _ in range(256)])
        world.tally()
        world.now += rng.randrange(SECOND // 10)
    world.now += 2 * SECOND
    world.run([])
    world.tally()
    seen: Counter = Counter()
    sizes: Counter = Counter()
    rows = told()
    for row in rows[rows["kind"] == value("EVENT_DROP")]:
        seen[int(row["reason"])] += int(row["packets"])
        sizes[int(row["reason"])] += int(row["bytes"])
    counted = world.shm.reasons
    packets, size = (counted[name].sum(axis=(0, 1)) for name in ("packets", "bytes"))
    wanted = {n: int(packets[n]) for n in range(DROPS, 256) if packets[n]}
    assert len(wanted) >= 3
    assert dict(seen) == wanted
    assert dict(sizes) == {n: int(size[n]) for n in wanted}


def test_what_is_new_and_has_not_ended_is_live(world, told):
    """Evicted, closed and made anew, swept: NEW less END are the records that stand."""
    rng = Random(6)
    began = ended = 0
    for _ in range(80):
        frames = []
        for _ in range(128):
            f, port = rng.choice(FAMILIES), rng.randrange(1, 3000)
            e = sg.Ends(A[f], port, B[f], 80)
            flags = rng.choice((SYN, SYN, ACK, FIN | ACK, sg.RST))
            if rng.random() < 0.3:
                frames.append((POD_B, sg.tcp(e.back(), flags | ACK)))
            else:
                frames.append((POD_A, sg.tcp(e, flags)))
        world.run(frames)
        world.now += SECOND * rng.randrange(30)
        if rng.random() < 0.2:
            world.sweep()
        found = kinds(told())
        began += found.count("NEW")
        ended += found.count("END")
        assert began - ended == len(records.live(world))
    assert ended > 1000
    assert int(world.tracker.counters[0]["created"]) == began


def test_kinds_can_be_switched_off_but_not_drops(world, agent, told):
    off = [value(f"EVENT_{name}") for name in ("NEW", "CHANGE", "END")]
    world.shm.node[0]["events_off"] = sum(1 << kind for kind in off)
    e = sg.Ends(A[4], 1000, B[4], HTTP)
    handshake(world, e)
    assert kinds(told()) == []
    agent.write(Setting(peers=PEERS, policies={POD_A: Policy(egress_otherwise=word(DENY, 7))}))
    send(world, sg.tcp(e, ACK))
    world.tally()
    assert kinds(told()) == ["DROP"]


def test_a_sample_is_one_packet_of_many(world, told):
    world.shm.node[0]["events_off"] = 0xFF & ~(1 << value("EVENT_SAMPLE"))
    world.shm.node[0]["sample_shift"] = 6
    e = sg.Ends(A[4], 1000, B[4], 53)
    for n in range(64):
        world.run(([(POD_A, sg.udp(e)), (POD_B, sg.udp(e.back()))] * 8)[: 1 + n % 16])
        world.tally()
    rows = told()
    packets = sum(1 + n % 16 for n in range(64))
    assert kinds(rows) == ["SAMPLE"] * (packets // 64)
    assert {ends_of(row) for row in rows} == {e, e.back()}
    turned = rows["flags"] & CONST["EVENT_REPLY"] != 0
    assert [ends_of(row) == e.back() for row in rows] == turned.tolist()


def test_a_worker_that_stops_tells_what_it_gathered(world, agent):
    """The counts in `pending` are told by tell_drops, which the loop calls when it is left."""
    agent.write(Setting(peers=PEERS, policies={POD_A: Policy(egress_otherwise=word(DENY, 7))}))
    reader = EventReader(world.shm, 0)
    world.run([(POD_A, sg.udp(sg.Ends(A[4], 1000, B[4], 53)))] * 50)
    world.tally()
    told_at_once(world.counters)
    rows = np.concatenate([batch.records for batch in reader.read(100)])
    assert rows["packets"].tolist() == [1, 49]
    told_at_once(world.counters)
    assert not reader.read(100)


def test_the_same_flow_at_two_ports_is_two_drops(world, told):
    """A spoofed source and the node's own are told apart by where they came in."""
    frame = sg.udp(sg.Ends(OUT[4], 5, B[4], 53))
    world.run([(POD_A, frame), (POD_B, frame), (POD_A, frame)])
    world.tally()
    world.now += 2 * SECOND
    world.run([])
    world.tally()
    rows = told()
    by_port = Counter()
    for row in rows:
        by_port[int(row["port"])] += int(row["packets"])
    assert by_port == {POD_A: 2, POD_B: 1}
    assert UPLINK not in by_port
