"""The small node of tests/worlds.py with the real XDP programs over its flow table.

Rule: the same frame goes through the vector stages and through the program; where the program
forwards it, both must have made the same bytes of it.

Theory. The kernel runs the program on one packet (BPF_PROG_RUN) and hands the result back instead
of sending it. All ports of the node have the same device, the only one that is there.
"""

from typing import NamedTuple

import numpy as np

from dataplane.engine import flowtable
from dataplane.engine.conntrack import Conntrack
from tests import worlds as w
from tests.netns.wire import Wire
from tests.places import placed
from tests.worlds import UPLINK, World
from xdp import artifacts
from xdp.abi import CONST, DTYPE, value
from xdp.object import BpfObject, ObjectSpec
from xdp.run import prog_run, prog_run_skb

ABORTED, DROP, PASS, REDIRECT = 0, 1, 2, 4  # enum xdp_action
SHOT, TC_REDIRECT = 2, 7  # TC_ACT_*
SLOTS = CONST["FLOW_SLOTS_LEAST"]


class Ran(NamedTuple):
    """What the program made of a frame."""

    verdict: int
    frame: bytes
    skb: bool = False  # at tc

    @property
    def forwarded(self) -> bool:
        """Whether the flow table had it."""
        return self.verdict == (TC_REDIRECT if self.skb else REDIRECT)

    @property
    def dropped(self) -> bool:
        """Whether it went nowhere: there is no socket, and no trunk."""
        return self.verdict == (SHOT if self.skb else DROP)


class FlowNode:
    """A World whose flow table XDP shares."""

    def __init__(self, world: World, slots: int = SLOTS, hook: str = "xdp") -> None:
        """Load the programs; the node's tables are the world's. hook: of its pods."""
        self.world, self.wire, self.hook = world, Wire(), hook
        self.bpf = BpfObject(
            ObjectSpec.load(artifacts.find("penstock.bpf.o")), flowtable.sizes(slots)
        )
        self.steering = self.bpf.maps["steering"].mmap(DTYPE["steering"])
        self.table = flowtable.FlowTable(world.shm, self.bpf, self.steering)
        self.table.start(True)
        world.nat_ports = self.bpf.maps["nat_ports"].mmap(np.dtype("<u8")).view("<u4")
        world.flows = self.table.flows
        world.shm.ports["ifindex"][:8] = self.wire.ifindex
        with self.wire.inside(self.wire.near):
            for port in range(4):
                self.bpf.maps["flow_devices"].update(port, self.wire.ifindex)
                self.bpf.maps["flow_ifindexes"].update(port, self.wire.ifindex)
        self.table.devices[:4] = flowtable.BY_XDP | flowtable.BY_TC
        world.shm.ports["hook"][[w.POD_A, w.POD_B]] = value(f"HOOK_{hook.upper()}")
        self._steer()
        world.restart()

    def _steer(self) -> None:
        """Steer what an agent would: the tunnel, the node's addresses, the pods' prefixes."""
        row = self.steering[0]
        row["local4_be"][0] = int.from_bytes(w.NODE4.packed, "little")
        row["local6"][:16] = np.frombuffer(w.NODE6.packed, np.uint8)
        row["local4_count"] = row["local6_count"] = 1
        row["tunnel_port_be"] = int.from_bytes(self.world.port.to_bytes(2, "big"), "little")
        row["nat4_be"] = row["local4_be"][0]
        row["nat6"][:] = row["local6"][:16]
        nets = ((4, w.PODS4), (6, w.PODS6))
        for family, net in nets:
            entry = row[f"prefix{family}"][0]
            for field, address in (("address", net.network_address), ("mask", net.netmask)):
                entry[field][: len(address.packed)] = np.frombuffer(address.packed, np.uint8)
            row[f"prefix{family}_count"] = 1

    def xdp(self, port: int, frame: bytes) -> Ran:
        """Run the program of a port on a frame."""
        skb = port != UPLINK and self.hook == "tc"
        name = "uplink_rx" if port == UPLINK else "pod_tc" if skb else "pod_rx"
        program = self.bpf.programs[name]
        with self.wire.inside(self.wire.near):
            if skb:
                done = prog_run_skb(program, frame, self.wire.ifindex)
            else:
                done = prog_run(program, frame, ingress_ifindex=self.wire.ifindex)
        return Ran(done.retval, done.data, skb)

    def runs(self, port: int, frame: bytes) -> bool:
        """Whether the kernel runs the program on such a frame: at tc there are whole IP headers."""
        kind = int.from_bytes(frame[12:14], "big")
        least = {0x0800: 34, 0x86DD: 54}.get(kind, 14)
        return port == UPLINK or self.hook != "tc" or len(frame) >= least

    def settle(self, port: int, frame: bytes, times: int = 8) -> w.Result:
        """Send a frame through the stages until it is worth an entry; return the last result."""
        return [self.world.one(port, frame) for _ in range(times)][-1]

    def same(self, frame: bytes) -> bytes:
        """Send a frame both ways; both must forward it, alike. Returns what left."""
        port, frame = placed(frame, direct=not self.world.tunnel)
        expected = self.settle(port, frame)
        assert expected.sent, expected
        ran = self.xdp(port, frame)
        assert ran.forwarded, f"a miss: {ran.verdict}"
        assert ran.frame == expected.frame
        return ran.frame

    def misses(self, frame: bytes) -> None:
        """A frame that the table must leave to the stages, as it came."""
        port, frame = placed(frame, direct=not self.world.tunnel)
        if not self.runs(port, frame):
            return
        ran = self.xdp(port, frame)
        assert not ran.forwarded
        assert ran.frame == frame

    def collect(self) -> None:
        """Collect XDP's counters."""
        self.table.collect(self.world.tables, self.world.now)

    def forget(self) -> None:
        """Start with no connection, an empty table, and devices that take everything."""
        self.table.devices[:4] = flowtable.BY_XDP | flowtable.BY_TC
        self.bpf_clear()
        self.world.now += 10 * w.SECOND
        self.world.forget()

    def bpf_clear(self) -> None:
        """Take every entry away."""
        self.table.flows.tags.array[:] = 0
        self.world.shm.flow_seen[: self.table.slots] = np.zeros((), DTYPE["flow_seen"])
        self.table.flows.entries.array["packets"] = 0
        self.table.flows.entries.array["bytes"] = 0

    def restart(self) -> Conntrack:
        """Take up the connections that stand."""
        self.world.restart()
        return self.world.conntrack

    def close(self) -> None:
        """Unload."""
        self.bpf.close()
        self.wire.close()
