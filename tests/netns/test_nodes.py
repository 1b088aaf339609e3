"""Nodes join and leave while traffic flows."""

import re
import signal

import pytest

from bench import checks
from bench.lab import Lab, LabError, eventually
from bench.penstock import Cluster, Settings

pytestmark = [pytest.mark.root, pytest.mark.net]


def _reaches(source, address: str) -> bool:
    try:
        return bool(checks.ping(source, address, count=1, wait=1))
    except LabError:
        return False


@pytest.mark.parametrize("mode", ["overlay", "direct"])
def test_a_node_joins_and_leaves(mode):
    with Lab() as lab:
        cluster = Cluster(lab, Settings(mode=mode)).start(nodes=1)
        first = cluster.nodes[0]
        old = first.pod("old")
        neighbour = first.pod("neighbour")
        steady = old.namespace.spawn("ping", "-n", "-i", "0.02", neighbour.addresses[4])

        second = cluster.join()
        new = second.pod("new")
        for address in new.addresses.values():
            eventually(lambda a=address: _reaches(old.namespace, a), f"old -> {address}")
            assert {row["name"] for row in first.ask("node")} == {"node1", "node2"}

        cluster.withdraw(second.name)
        for address in new.addresses.values():
            eventually(lambda a=address: not _reaches(old.namespace, a), f"no way to {address}")
        networks = {row["network"] for row in first.ask("route", "list")}
        assert not [
            network for network in networks if network.startswith(("10.244.2.", "fd00:244:0:2:"))
        ]

        cluster.announce(second.name, second.number)
        eventually(lambda: _reaches(old.namespace, new.addresses[4]), "the node is back")
        steady.stop(signal.SIGINT)
        answered = [int(n) for n in re.findall(r"icmp_seq=(\d+) ttl", steady.output())]
        # Nobody lost a packet meanwhile; the last one may have been under way at the interrupt.
        assert answered == list(range(1, len(answered) + 1))
        assert len(answered) > 20


def test_a_node_that_changes_its_vtep_mac_is_followed():
    with Lab() as lab:
        cluster = Cluster(lab).start(nodes=2)
        one, two = cluster.nodes
        source, target = one.pod("source"), two.pod("target")
        eventually(lambda: _reaches(source.namespace, target.addresses[4]), "a first answer")
        cluster.announce(two.name, two.number, {"penstock.io/vtep-mac": "02:aa:bb:cc:dd:ee"})
        eventually(
            lambda: two.ask("status")["node"]["gateway_mac"] == "02:aa:bb:cc:dd:ee", "the new MAC"
        )
        for address in target.addresses.values():
            eventually(lambda a=address: _reaches(source.namespace, a), "traffic to the new MAC")
