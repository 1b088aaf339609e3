"""Large packets of pods at tc: the kernel cuts them behind us, and nothing of them is lost.

The oracle is the receiver's kernel: it hands a program datagrams of the size that was asked for,
with checksums that hold.
"""

import sys

import pytest

from bench.lab import Lab, eventually
from bench.penstock import Cluster

pytestmark = [pytest.mark.root, pytest.mark.net]
SIZE, PARTS, TIMES = 1000, 3, 40
UDP_SEGMENT = 103  # linux/udp.h
SEND = f"""
import socket, sys, time
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
out = socket.socket(family, socket.SOCK_DGRAM)
out.setsockopt(socket.SOL_UDP, {UDP_SEGMENT}, {SIZE})
out.connect((sys.argv[1], 9999))
for n in range({TIMES}):
    out.send(bytes([n]) * {SIZE * PARTS})
    time.sleep(0.005)
"""
RECEIVE = f"""
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
into = socket.socket(family, socket.SOCK_DGRAM)
into.bind((sys.argv[1], 9999))
print("ready", flush=True)
sizes = [len(into.recv(65536)) for _ in range({PARTS * TIMES})]
print(len(sizes), sorted(set(sizes)), flush=True)
"""


@pytest.fixture(scope="module")
def cluster():
    with Lab() as lab:
        cluster = Cluster(lab).start()
        one, two = cluster.nodes
        cluster.source = one.pod("a")
        cluster.targets = {"same node": one.pod("b"), "across": two.pod("c")}
        yield cluster


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("path", ["same node", "across"])
def test_datagrams_that_a_program_sends_in_one_call_arrive_one_by_one(cluster, family, path):
    target, table = cluster.targets[path], cluster.nodes[0]
    address = target.addresses[family]
    before = table.ask("status")["forwarder"]["flow_table"]
    server = target.namespace.spawn(
        sys.executable, "-c", RECEIVE, address, log=f"datagrams-{path[:4]}-{family}"
    )
    eventually(lambda: "ready" in server.output(), "the server")
    cluster.source.namespace.run(sys.executable, "-c", SEND, address)
    whole = f"{PARTS * TIMES} [{SIZE}]"
    eventually(lambda: whole in server.output(), f"{whole}, not {server.output()!r}")

    def forwarded() -> bool:
        after = table.ask("status")["forwarder"]["flow_table"]
        assert after["faults"] == 0
        return after["packets"] - before["packets"] >= PARTS * TIMES // 2

    eventually(forwarded, "most of them in the flow table's counters, segment by segment")
