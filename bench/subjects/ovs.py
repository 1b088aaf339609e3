"""Open vSwitch's userspace datapath: forwarding, conntrack, NAT, VXLAN by OpenFlow.

Rule: the same rules as everybody's (rules.py), a flow each, behind its connection tracker.

Theory. Pods have a gateway, as Penstock's: addresses are routed by a flow a pod, which rewrites
MACs and counts down the TTL. With conntrack every packet goes through the tracker; what is
established passes, what is new meets the rules. One process stands for both nodes of a VXLAN, with
two bridges and two uplinks that are joined by a wire: two polling threads on one core would measure
the scheduler. The daemon polls, so it is stopped (SIGSTOP) while it is another's turn.
"""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from bench import ovs, rules
from bench.lab import UNDERLAY4, Namespace
from bench.rules import Asked
from bench.scenario import Measure, Place
from bench.subjects.base import WORLD, End, Subject, polling_cpu

GATEWAY_MAC, WIRE_MAC = "02:50:c0:00:00:01", "02:50:c0:00:00:02"
ROUTER = {4: "10.244.1.1", 6: "fd00:244:0:1::1"}
ADDRESSES = (
    {4: "10.244.1.2", 6: "fd00:244:0:1::2"},
    {4: "10.244.1.3", 6: "fd00:244:0:1::3"},
)
FAR = {4: "10.244.2.2", 6: "fd00:244:0:2::2"}
VNI, PORT = 1, 8472
WORDS = {4: ("ip", "nw"), 6: ("ipv6", "ipv6")}


def forward(asked: Asked, ends: dict[str, tuple[str, int]], table: int) -> list[str]:
    """Flows that route: address -> (MAC, port)."""
    word, prefix = WORDS[asked.family]
    found = []
    for address, (mac, port) in ends.items():
        then = f"mod_dl_src:{GATEWAY_MAC},mod_dl_dst:{mac},dec_ttl,output:{port}"
        found.append(f"table={table},priority=10,{word},{prefix}_dst={address} actions={then}")
    return found


def tracked(asked: Asked, masquerade: str = "") -> list[str]:
    """Flows before those that route (table 2): tracker, rules, translation.

    masquerade: the address that the world sees.
    """
    word, prefix = WORDS[asked.family]
    track, commit = "zone=1,nat,table=1", "ct(commit,zone=1,table=2)"
    new = f"table=1,ct_state=+trk+new,{word}"
    lines = [f"table=0,priority=10,{word} actions=ct({track})"]
    lines.append(f"table=1,priority=100,ct_state=+trk+est,{word} actions=resubmit(,2)")
    if asked.services:
        nat = f"ct(commit,zone=1,nat(dst={_literal(asked.server)}),table=2)"
        lines.append(f"{new},priority=90,{prefix}_dst={asked.vip} actions={nat}")
    if masquerade:
        commit = f"ct(commit,zone=1,nat(src={_literal(masquerade)}),table=2)"
        lines.append(f"{new},priority=60,{prefix}_src={asked.client} actions={commit}")
    if asked.rules:
        subject, peer = (f"{prefix}_{way}" for way in asked.ways)
        to = f"{subject}={asked.subject}"
        udp, tcp = ("udp", "tcp") if asked.family == 4 else ("udp6", "tcp6")
        state = "table=1,ct_state=+trk+new"
        for address, port in rules.strangers(asked.family, asked.rules - 1):
            line = f"{state},priority=80,{udp},{peer}={address},{to},tp_dst={port}"
            lines.append(f"{line} actions={commit}")
        mine = f"priority=80,{{}},{peer}={asked.peer},{to},tp_dst={{}} actions={commit}"
        ports = [(udp, port) for port in (*_masks(), rules.DNS_PORT)]
        ports += [(tcp, port) for port in rules.TCP_PORTS]
        lines += [f"{state},{mine.format(kind, port)}" for kind, port in ports]
        lines += [f"{state},priority=70,{kind},{to} actions=drop" for kind in (udp, tcp)]
    lines.append(f"{new},priority=1 actions=ct(commit,zone=1,table=2)")
    return lines


def _masks() -> list[str]:
    """The range of target ports as value/mask."""
    first, end, found = rules.TARGET_PORT, rules.LAST_PORT + 1, []
    while first < end:
        size = min(first & -first, 1 << (end - first).bit_length() - 1)
        found.append(f"{first}/{0xFFFF & ~(size - 1):#x}")
        first += size
    return found


def _literal(address: str) -> str:
    return f"[{address}]" if ":" in address else address


class Ovs(Subject):
    """Open vSwitch forwards between the pods' veths."""

    name = "ovs afxdp"
    remark = "Open vSwitch, userspace datapath over AF_XDP; polls the other core; MTU 1500"
    quick = False
    stateful = False

    @classmethod
    def refuses(cls, place: Place) -> str:
        """Forwarding alone, on one node or over VXLAN."""
        here = place.topology in ("same", "vxlan") and place.mtu == 1500
        return "" if place.plain and here else " "

    def build(self) -> tuple[End, End]:
        """Pods, bridges, flows."""
        self.node = self.lab.namespace("node1")
        self.switch = ovs.Switch(self.node, polling_cpu())
        first = self._pod("client", "h0", ADDRESSES[0], 1)
        if self.place.topology == "outside":
            return first, self._world()
        if self.place.topology == "vxlan":
            self._overlay()
            return first, self._pod("server", "h1", FAR, 1, "br2")
        return first, self._pod("server", "h1", ADDRESSES[1], 2)

    def _pod(
        self, name: str, host: str, addresses: dict[int, str], port: int, bridge: str = "br0"
    ) -> End:
        pod = self.lab.namespace(name)
        mtu = 1450 if self.place.topology == "vxlan" else 1500
        self.lab.wire(self.node, pod, (host, "eth0"), 1500)
        pod.offload_off("eth0")
        for family, bits in ((4, 32), (6, 128)):
            nodad = " nodad" if family == 6 else ""
            pod.ip(
                f"addr add {addresses[family]}/{bits} dev eth0{nodad}",
                f"route add {ROUTER[family]}/{bits} dev eth0",
                f"route add default via {ROUTER[family]} dev eth0",
                f"neigh add {ROUTER[family]} lladdr {GATEWAY_MAC} dev eth0 nud permanent",
            )
        pod.ip(f"link set eth0 mtu {mtu}")
        self.switch.port(host, port, bridge=bridge)
        return End(pod, addresses)

    def settle(self) -> None:
        """Load the flows."""
        asked = self.asked
        client, server = (end.addresses[asked.family] for end in (self.client, self.server))
        near, far = (client, (self.client.mac(), 1)), (server, (self.server.mac(), 2))
        self.switch.flows(self._flows(asked, dict((near, far))))
        if self.place.topology == "vxlan":
            ends = {server: (self.server.mac(), 1), client: (self.client.mac(), 2)}
            self.switch.flows(forward(asked, ends, 0), "br2")
        self.switch.daemon.popen.send_signal(signal.SIGSTOP)

    def _flows(self, asked: Asked, ends: dict[str, tuple[str, int]]) -> list[str]:
        return forward(asked, ends, 0)

    def next_hop(self) -> str:
        """The gateway's; nobody answers for it."""
        return GATEWAY_MAC

    @contextmanager
    def turn(self, measure: Measure) -> Iterator[None]:
        """Only now it runs, since it never sleeps."""
        self.switch.daemon.popen.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.switch.daemon.popen.send_signal(signal.SIGSTOP)

    def pids(self) -> Iterable[int]:
        """The daemon; its thread polls, so this is always a whole core."""
        return (self.switch.pid,)

    # --- beyond one node --------------------------------------------------------------------------

    def _world(self) -> End:
        world = self.lab.namespace("world")
        self.lab.pair(self.node, world)
        for family, bits in ((4, 32), (6, 128)):
            world.ip(f"addr add {WORLD[family]}/{bits} dev lo{' nodad' * (family == 6)}")
        link = self.node.link("eth0")
        assert link is not None
        mac = link["address"]
        world.ip(f"neigh replace {UNDERLAY4 + 1} lladdr {mac} dev eth0 nud permanent")
        self.switch.port("eth0", 2)
        return End(world, WORLD)

    def _overlay(self) -> None:
        """A second bridge for the server, and an uplink with its bridge for each.

        Both ends of the tunnel belong to one daemon, which would take the short way: what is local
        has no route out, so the tunnel's routes are for marked packets; what is sent to the MAC of
        the other end is unwrapped at once, so on the wire there is another one, from which it
        learns it, too, and no ARP.
        """
        switch = self.switch
        self.lab.wire(self.node, self.node, ("up1", "up2"))
        for number in (1, 2):
            self.node.offload_off(f"up{number}")
            switch.bridge(f"phy{number}")
            switch.port(f"up{number}", 1, bridge=f"phy{number}")
            macs = f"mod_dl_src:{WIRE_MAC},mod_dl_dst:{_mac(self.node, f'phy{number}')}"
            flows = ["in_port=LOCAL,ip actions=output:1", f"in_port=1,ip actions={macs},LOCAL"]
            switch.flows(flows, f"phy{number}")
            self.node.ip(
                f"addr add {UNDERLAY4 + number}/24 dev phy{number}", f"link set phy{number} up"
            )
        switch.bridge("br2")
        for number, bridge in ((1, "br0"), (2, "br2")):
            there = str(UNDERLAY4 + 3 - number)
            switch.appctl("ovs/route/add", f"{there}/32", f"phy{number}", "pkt_mark=1")
            switch.appctl("tnl/neigh/set", f"phy{number}", there, WIRE_MAC)
            words = {"remote_ip": there, "key": str(VNI), "dst_port": str(PORT)}
            switch.port(f"vx{number}", 2, "vxlan", bridge, egress_pkt_mark="1", **words)


class OvsTracked(Ovs):
    """Open vSwitch with its connection tracker, and what is asked for."""

    name = "ovs afxdp, conntrack"
    remark = "the same with ct(nat) and a flow a rule"
    stateful = True

    @classmethod
    def refuses(cls, place: Place) -> str:
        """What one bridge can do; over VXLAN it only tracks."""
        if place.topology == "direct" or place.mtu != 1500:
            return " "
        if place.topology == "vxlan" and place.policy and place.services:
            return "policy and service at two ends of a tunnel are not set up"
        return ""

    def _flows(self, asked: Asked, ends: dict[str, tuple[str, int]]) -> list[str]:
        world = str(UNDERLAY4 + 1) if asked.masquerade else ""
        return tracked(asked, world) + forward(asked, ends, 2)


def _mac(node: Namespace, device: str) -> str:
    link = node.link(device)
    assert link is not None
    return link["address"]
