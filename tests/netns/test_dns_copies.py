"""DNS of pods whose policies name no names: the flow table forwards it, its copies are counted.

The stages are the oracle: a message that they have seen and one that was read from a copy must
have left the same counters and the same event.
"""

import threading
import time
from functools import partial

import pytest

from bench.lab import eventually
from dataplane.engine.account import make_lane
from dataplane.engine.copies import CopyReader
from dataplane.engine.worker import make_tables
from dataplane.kernels import dns_copies
from dataplane.kernels.dns_copies import ALL
from tests import worlds as w
from tests.dns_world import SERVER, STORE, STORY, DnsWorld, question, response
from tests.netns.flow_node import FlowNode
from tests.segments import Ends, udp
from tests.worlds import POD_A, POD_B, UPLINK, World
from xdp.abi import CONST, value

pytestmark = [pytest.mark.root, pytest.mark.net]
BY_FAMILY = pytest.mark.parametrize(("f", "kind"), [(4, "A"), (6, "AAAA")])
MOST = CONST["DNS_COPY_MOST"]
NAME = "example.org"
FREE = 2  # endpoint of pod B, which no policy means
BY_NAME = STORY.replace("app: genai", "app: free")


class Node:
    """A node whose flow table the programs share, and pods that ask for names."""

    def __init__(self, folder, hook: str) -> None:
        self.world = World(folder, records=1024, slots=1024)
        self.flow = FlowNode(self.world, hook=hook)
        self.dns = DnsWorld(self.world)
        self.number = 0

    def forget(self) -> None:
        self.flow.forget()
        self.read()
        self.clock()
        for name in list(self.dns.policies):
            self.dns.remove(name)

    def clock(self) -> None:
        """Let the stages have the programs' time."""
        self.world.now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)

    def read(self, most: int = ALL) -> int:
        lane = make_lane(self.world.shm, CONST["DNS_READER"])
        return dns_copies.read(self.world.tables, self.flow.table.flows, lane, most, 16)

    def apply(self, text: str, name: str = "genai") -> None:
        """Put a policy into force, as the agent does: every entry is stale then."""
        self.dns.apply(text, name)
        self.flow.table.renew()

    def query(self, f: int, kind: str, pod: int = POD_B, identifier: int = 7) -> tuple[int, bytes]:
        ends = Ends((w.POD4 if f == 4 else w.POD6)[pod], 5000, SERVER[f], 53)
        return pod, udp(ends, question(NAME, kind, identifier))

    def answer(self, f: int, kind: str, pod: int = POD_B, identifier: int = 7) -> tuple[int, bytes]:
        ends = Ends(SERVER[f], 53, (w.POD4 if f == 4 else w.POD6)[pod], 5000)
        message = response(NAME, f"{kind} {STORE[f]}", kind=kind, identifier=identifier)
        return UPLINK, self.dns.tunnelled(udp(ends, message))

    def settle(self, f: int, kind: str, pod: int = POD_B, times: int = 8) -> None:
        """Ask and answer until both directions have entries, or could have them."""
        for _ in range(times):
            self.number += 1
            assert self.world.one(*self.query(f, kind, pod, self.number)).sent
            assert self.world.one(*self.answer(f, kind, pod, self.number)).sent

    def counts(self) -> tuple:
        """What is counted of the free pod, of its server, and the last event; without times."""
        pod, server = dict(self.dns.reader.pods()[FREE]), dict(self.dns.reader.servers()[0])
        events, _ = self.dns.reader.events()
        event = {key: one for key, one in events[-1].items() if key not in ("time_ns", "id")}
        for one in (pod, server):
            for key in [key for key in one if key.endswith("_ms") or key == "buckets"]:
                del one[key]
        event["latency_ms"] = event["latency_ms"] > 0
        return pod, server, event


@pytest.fixture(scope="module", params=["xdp", "tc"])
def standing(request, tmp_path_factory):
    made = Node(tmp_path_factory.mktemp("copies"), request.param)
    yield made
    made.dns.engine.close()
    made.flow.close()
    made.world.close()


@pytest.fixture
def node(standing):
    standing.forget()
    return standing


def _more(now, before):
    """What was added, of counters that may be dicts themselves."""
    if not isinstance(now, dict):
        return now - before if isinstance(now, int) else now
    return {key: _more(one, before.get(key, 0) if isinstance(before, dict) else 0)
            for key, one in now.items()}  # fmt: skip


def _added(node, action) -> tuple:
    before = node.counts()
    node.clock()
    action()
    now = node.counts()
    return *(_more(one, its) for one, its in zip(now[:2], before[:2], strict=True)), now[2]


@BY_FAMILY
def test_a_copy_counts_as_the_message_would(node, f, kind):
    node.settle(f, kind)
    by_stages = _added(node, lambda: node.world.one(*node.query(f, kind, identifier=901)))

    def ask():
        assert node.flow.xdp(*node.query(f, kind, identifier=902)).forwarded
        assert node.read() == 1

    def tell():
        assert node.flow.xdp(*node.answer(f, kind, identifier=902)).forwarded
        assert node.read() == 1

    assert _added(node, ask) == by_stages
    by_stages = _added(node, lambda: node.world.one(*node.answer(f, kind, identifier=901)))
    assert by_stages[0]["answers"] == 1
    assert _added(node, tell) == by_stages
    again = _added(node, tell)
    assert (again[0]["answers"], again[0]["unasked"]) == (0, 1), "the second answer fits nothing"


@BY_FAMILY
def test_what_leaves_is_what_the_stages_would_send(node, f, kind):
    node.settle(f, kind)
    for port, frame in (node.query(f, kind, identifier=77), node.answer(f, kind, identifier=77)):
        ran = node.flow.xdp(port, frame)
        assert ran.forwarded
        assert ran.frame == node.world.one(port, frame).frame


@BY_FAMILY
def test_where_names_count_each_message_is_for_the_stages(node, f, kind):
    node.apply(STORY.replace("myblobstorage.com", NAME))
    node.settle(f, kind, POD_A)
    node.settle(f, kind, POD_B)
    for frame in (node.query(f, kind, POD_A), node.answer(f, kind, POD_A)):
        assert not node.flow.xdp(*frame).forwarded
    assert node.flow.xdp(*node.query(f, kind, POD_B)).forwarded


def test_a_policy_by_names_takes_the_flow_out_of_the_table(node):
    node.settle(4, "A")
    assert node.flow.xdp(*node.query(4, "A")).forwarded
    node.apply(BY_NAME, "free")
    assert not node.flow.xdp(*node.query(4, "A")).forwarded
    refused = node.world.one(*node.query(4, "A"))
    assert refused.reason == value("REASON_ANSWERED_DNS")
    node.apply(BY_NAME.replace("myblobstorage.com", NAME), "free")
    node.settle(4, "A")
    assert not node.flow.xdp(*node.query(4, "A")).forwarded
    node.dns.remove("free")
    node.flow.table.renew()
    node.settle(4, "A")
    assert node.flow.xdp(*node.query(4, "A")).forwarded


def test_a_query_in_flight_is_known_when_names_begin_to_count(node):
    """It was forwarded and copied under the old policy; its answer comes under the new one."""
    node.settle(4, "A")
    assert node.flow.xdp(*node.query(4, "A", identifier=555)).forwarded
    node.apply(BY_NAME.replace("myblobstorage.com", NAME), "free")
    node.read()
    assert node.world.one(*node.answer(4, "A", identifier=555)).sent
    assert STORE[4] in node.dns.reader.addresses_of(NAME)


def _large(size: int) -> tuple[int, bytes]:
    """A datagram of pod B to pod A's port 53, of so many bytes with its UDP header."""
    message = question(NAME) + bytes(size)
    return POD_B, udp(Ends(w.POD4[POD_B], 5001, w.POD4[POD_A], 53), message[: size - 8])


def test_what_is_larger_than_a_copy_is_for_the_stages(node):
    for _ in range(8):
        assert node.world.one(*_large(100)).sent
    assert node.flow.xdp(*_large(MOST)).forwarded
    assert not node.flow.xdp(*_large(MOST + 1)).forwarded
    assert node.read() == 1


def test_a_full_ring_stops_no_message_and_each_copy_lost_is_counted(node):
    for _ in range(8):
        assert node.world.one(*_large(100)).sent
    lost, sent = node.flow.table.drops[value("LOST_DNS_COPY")], 0
    read = node.dns.reader.notes()["copies"]
    while node.flow.table.drops[value("LOST_DNS_COPY")] < lost + 10:
        assert node.flow.xdp(*_large(MOST)).forwarded
        sent += 1
    assert node.read(64) == 64
    assert node.read() == sent - 10 - 64
    assert node.dns.reader.notes()["copies"] - read == sent - 10
    assert node.flow.xdp(*_large(MOST)).forwarded
    assert node.read() == 1, "there is room again"


def test_a_copy_whose_flow_is_no_more_is_counted_as_lost(node):
    node.settle(4, "A")
    assert node.flow.xdp(*node.query(4, "A")).forwarded
    before = node.dns.reader.notes()
    node.world.forget()
    assert node.read() == 1
    now = node.dns.reader.notes()
    assert (now["copies"] - before["copies"], now["copies_lost"] - before["copies_lost"]) == (0, 1)


def test_several_threads_read_each_copy_once(node):
    """One that does nothing else, two as workers do; the programs go on writing."""
    for _ in range(8):
        assert node.world.one(*_large(100)).sent
    before, stop = node.dns.reader.notes(), threading.Event()
    flow, tables = node.flow.table.flows, [make_tables(node.world.shm) for _ in range(3)]
    lanes = [make_lane(node.world.shm, lane) for lane in (0, 1, CONST["DNS_READER"])]

    def work(n: int) -> None:
        while dns_copies.read(tables[n], flow, lanes[n], 3, 2) or not stop.is_set():
            pass

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(2000):
        assert node.flow.xdp(*_large(100)).forwarded
    stop.set()
    for thread in threads:
        thread.join()
    now = node.dns.reader.notes()
    assert now["copies"] - before["copies"] == 2000
    assert now["copies_lost"] == before["copies_lost"]
    ring = node.flow.table.copies.ring()
    assert ring.consumer[0] == ring.producer[0], "all may be written over"


def test_the_reader_is_woken_and_reads_what_came_while_it_slept(node):
    """It sleeps for a minute when none come; the first copy wakes it."""
    for _ in range(8):
        assert node.world.one(*_large(100)).sent
    reader = CopyReader(node.world.shm, make_tables(node.world.shm), node.flow.table)
    reader.start()
    try:
        for _ in range(3):
            before = node.dns.reader.notes()["copies"]
            eventually(lambda: node.flow.steering["dns_wake"][0], "sleep", 10)
            time.sleep(0.02)
            assert node.flow.xdp(*_large(100)).forwarded
            read = partial(_copies_after, node, before)
            eventually(read, "the copy", 10)
    finally:
        reader.stop()


def _copies_after(node, before: int) -> bool:
    return node.dns.reader.notes()["copies"] == before + 1
