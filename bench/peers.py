"""What Penstock is compared with, on the same topology: Linux itself, bare XDP, DPDK's testpmd.

Rule: a peer is set up as its own documentation would; where it is given an advantage or cannot do
all that Penstock does, its `remark` says so.

Theory. A LinuxNode routes between the veths of its pods and, through a kernel vxlan device, to
other nodes; its pods look like Penstock's (same CIDRs, /32 and /128 addresses, a gateway). Bare XDP
and testpmd are wires between two pods: they look at no address, so they are limits, not equals.
Generated frames are accepted by a veth only if it has NAPI: `accept_frames` turns GRO on for that.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.lab import UNDERLAY4, UNDERLAY6, Lab, LabError, Namespace, eventually
from xdp.artifacts import find
from xdp.link import attach_netlink, detach_netlink
from xdp.object import BpfObject, ObjectSpec

VXLAN_OVERHEAD = {4: 50, 6: 70}  # RFC 7348: outer IP, UDP, VXLAN, inner Ethernet


@dataclass(frozen=True)
class LinuxPod:
    """A pod of a plain Linux node."""

    name: str
    namespace: Namespace
    addresses: dict[int, str]
    host_device: str


class LinuxNode:
    """A node that is plain Linux: pods on veths, routes, and a kernel vxlan device."""

    def __init__(self, namespace: Namespace, number: int) -> None:
        """number: in the underlay, and of its pod CIDRs, as in bench.penstock."""
        self.namespace = namespace
        self.number = number
        self.pods: list[LinuxPod] = []
        self.path_mtu = 1500
        namespace.sysctl({"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1})

    def pod(self, name: str, mtu: int = 1500) -> LinuxPod:
        """Attach a pod: its own veth, a gateway in both families."""
        host = f"veth{len(self.pods)}"
        pod = self.namespace.lab.namespace(name)
        last = len(self.pods) + 2
        addresses = {4: f"10.244.{self.number}.{last}", 6: f"fd00:244:0:{self.number:x}::{last:x}"}
        routers = {4: f"10.244.{self.number}.1", 6: f"fd00:244:0:{self.number:x}::1"}
        self.namespace.lab.wire(self.namespace, pod, (host, "eth0"), mtu)
        for family, bits in ((4, 32), (6, 128)):
            nodad = " nodad" if family == 6 else ""
            self.namespace.ip(
                f"addr add {routers[family]}/{bits} dev {host}{nodad}",
                f"route add {addresses[family]}/{bits} dev {host}",
            )
            pod.ip(
                f"addr add {addresses[family]}/{bits} dev eth0{nodad}",
                f"route add {routers[family]}/{bits} dev eth0",
                f"route add default via {routers[family]} dev eth0",
            )
        made = LinuxPod(name, pod, addresses, host)
        self.pods.append(made)
        return made

    def overlay(
        self, family: int, mac: str, port: int = 8472, vni: int = 1, underlay_mtu: int = 1500
    ) -> None:
        """Add a kernel vxlan device over the underlay; zero UDP checksums as RFC 6935 allows."""
        local = (UNDERLAY4 if family == 4 else UNDERLAY6) + self.number
        zero = "udp6zerocsumtx udp6zerocsumrx" if family == 6 else ""
        mtu = self.path_mtu = underlay_mtu - VXLAN_OVERHEAD[family]
        self.namespace.ip(
            f"link add vxlan0 address {mac} mtu {mtu} type vxlan id {vni} dstport {port} "
            f"local {local} dev eth0 nolearning {zero}",
            "link set vxlan0 up",
        )

    def reach(self, number: int, family: int, mac: str) -> None:
        """Route the pods of another node through the overlay, to its tunnel MAC."""
        remote = (UNDERLAY4 if family == 4 else UNDERLAY6) + number
        self.namespace.run(
            "bridge", "fdb", "append", mac, "dev", "vxlan0", "dst", str(remote), "permanent"
        )
        for network, bits in ((f"10.244.{number}.0", 24), (f"fd00:244:0:{number:x}::", 64)):
            self.namespace.ip(
                f"neigh add {network} lladdr {mac} dev vxlan0 nud permanent",
                f"route add {network}/{bits} via {network} dev vxlan0 onlink",
            )
        for pod in self.pods:  # the pods' path MTU, as a CNI plugin sets it
            pod.namespace.ip(f"link set eth0 mtu {self.path_mtu}")

    def accept_frames(self, on: bool) -> None:
        """Give the pods' veths NAPI, so that generated frames get in."""
        for pod in self.pods:
            word = "on" if on else "off"
            self.namespace.run("ethtool", "-K", pod.host_device, "gro", word)

    def steer(self, cpus: frozenset[int]) -> None:
        """Receive packet steering: let these cores forward what the pods send (empty: off)."""
        mask = f"{sum(1 << cpu for cpu in cpus):x}"
        for pod in self.pods:
            path = f"/sys/class/net/{pod.host_device}/queues/rx-0/rps_cpus"
            self.namespace.run("sh", "-c", f"echo {mask} > {path}")


class Wire:
    """Two pods in one subnet, joined by whatever moves frames between their host ends."""

    HOST = ("h0", "h1")

    def __init__(self, lab: Lab) -> None:
        """Complete checksums: what moves frames does not complete them."""
        self.node = lab.namespace("middle")
        self.pods = []
        for number, host in enumerate(self.HOST):
            pod = lab.namespace(f"pod{number}")
            lab.wire(self.node, pod, (host, "eth0"))
            self.node.ip(f"link set {host} promisc on")
            addresses = {4: f"10.244.1.{number + 2}", 6: f"fd00:244:0:1::{number + 2:x}"}
            pod.ip(
                f"addr add {addresses[4]}/24 dev eth0",
                f"addr add {addresses[6]}/64 dev eth0 nodad",
            )
            pod.offload_off("eth0")
            self.pods.append(LinuxPod(pod.short, pod, addresses, host))
        self.node.sysctl({f"net.ipv6.conf.{host}.disable_ipv6": 1 for host in self.HOST})

    @contextmanager
    def redirect(self) -> Iterator[None]:
        """Move frames by an XDP program on each host end, for the body."""
        with self.node.inside():
            indexes = [self.node.link(host)["ifindex"] for host in self.HOST]  # type: ignore[index]
            objects = [BpfObject(ObjectSpec.load(find("pass.bpf.o"))) for _ in indexes]
            try:
                for bpf, here, there in zip(objects, indexes, reversed(indexes), strict=True):
                    bpf.maps["devices"].update(1, there)
                    attach_netlink(bpf.programs["redirect"], here)
                for pod in self.pods:
                    pod.namespace.run("ethtool", "-K", "eth0", "gro", "on")
                yield
            finally:
                for here in indexes:
                    detach_netlink(here)
                for bpf in objects:
                    bpf.close()

    @contextmanager
    def testpmd(self, forward_mode: str, cpu: int, device: str = "af_xdp") -> Iterator[None]:
        """Move frames by DPDK over AF_XDP or AF_PACKET on one polling core, for the body."""
        main = next((one for one in sorted(os.sched_getaffinity(0)) if one != cpu), cpu)
        words = ["dpdk-testpmd", "--no-huge", "-m", "512", "--no-pci", "--no-telemetry"]
        words += ["-l", f"{main},{cpu}", "--main-lcore", str(main), "--no-shconf"]
        more = {"af_xdp": "force_copy=1", "af_packet": "qdisc_bypass=1,framecnt=4096"}[device]
        for number, host in enumerate(self.HOST):
            words += ["--vdev", f"net_{device}{number},iface={host},{more}"]
        words += ["--", f"--forward-mode={forward_mode}", "--nb-cores=1", "--burst=32"]
        words += ["--total-num-mbufs=32768"]
        process = self.node.spawn(*words, "--auto-start", "--stats-period=3600")

        def ready() -> bool:
            if not process.alive:
                raise LabError(f"testpmd has ended: {process.output()[-1500:]}")
            if device == "af_xdp":
                return all("xdp" in (self.node.link(host) or {}) for host in self.HOST)
            return "forwards packets" in process.output()

        frames = device == "af_packet"  # no XDP program there: NAPI by GRO
        try:
            if frames:
                self._gro("on")
            eventually(ready, "testpmd")
            yield
        finally:
            process.stop()
            if frames:
                self._gro("off")

    def _gro(self, word: str) -> None:
        for host in self.HOST:
            self.node.run("ethtool", "-K", host, "gro", word)
