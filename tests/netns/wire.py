"""A veth between two fresh network namespaces, and AF_XDP rings moved by plain Python."""

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import time
import uuid

import numpy as np

from xdp.abi import CONST
from xdp.xsk import AF_XDP

STRIDE, HEADROOM = CONST["FRAME_STRIDE"], CONST["FRAME_HEADROOM"]
BASE_MASK = (1 << 48) - 1
CONTINUES = 1  # XDP_PKT_CONTD
EXPERIMENT = 0x88B5  # IEEE 802 local experimental EtherType: nobody else sends it
SO_RCVBUFFORCE = 33
_libc = ctypes.CDLL(None, use_errno=True)


def sh(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def eventually(check, seconds: float = 20.0):
    """Return the first true value of check(), or its last value after the deadline."""
    deadline = time.monotonic() + seconds
    while not (found := check()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return found


class Wire:
    """Device `here` in a namespace that the test's thread works in; `there` in another."""

    def __init__(self, mtu: int = 1500, queues: int = 1, peer_queues: int = 1) -> None:
        tag = uuid.uuid4().hex[:8]
        self.near, self.far = f"px{tag}a", f"px{tag}b"
        for namespace in (self.near, self.far):
            sh("ip", "netns", "add", namespace)
            self._quiet(namespace)
        near = ["mtu", str(mtu), "numrxqueues", str(queues), "numtxqueues", str(queues)]
        count = str(peer_queues)
        far = ["mtu", str(mtu), "numrxqueues", count, "numtxqueues", count]
        sh("ip", "-n", self.near, "link", "add", "here", *near, "type", "veth",
           "peer", "name", "there", "netns", self.far, *far)  # fmt: skip
        sh("ip", "-n", self.near, "link", "set", "here", "up")
        sh("ip", "-n", self.far, "link", "set", "there", "up")
        with self.inside(self.near):
            self.ifindex = socket.if_nametoindex("here")
        with self.inside(self.far):
            self.far_ifindex = socket.if_nametoindex("there")

    def _quiet(self, namespace: str) -> None:
        """No IPv6: its neighbours and routers would talk on the wire."""
        for kind in ("all", "default"):
            with (
                self.inside(namespace),
                open(f"/proc/sys/net/ipv6/conf/{kind}/disable_ipv6", "w") as file,
            ):
                file.write("1")

    @staticmethod
    @contextlib.contextmanager
    def inside(namespace: str):
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
            assert _libc.setns(there.fileno(), 0x40000000) == 0
            try:
                yield
            finally:
                assert _libc.setns(home.fileno(), 0x40000000) == 0

    @contextlib.contextmanager
    def peer(self):
        """An AF_PACKET socket at the far end."""
        with self.inside(self.far):
            packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EXPERIMENT))
        with packet:
            packet.bind(("there", EXPERIMENT))
            packet.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
            packet.settimeout(20)
            yield packet

    def program(self) -> dict:
        """What iproute2 says is attached to `here`: {} for nothing."""
        return json.loads(sh("ip", "-n", self.near, "-j", "link", "show", "here"))[0].get("xdp", {})

    def close(self) -> None:
        for namespace in (self.near, self.far):
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)


def frame(payload: bytes) -> bytes:
    """An Ethernet frame of the experimental type."""
    return b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02" + EXPERIMENT.to_bytes(2, "big") + payload


def _words(address: int, kind: type, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((kind * count).from_address(address))


class Cursor:
    """One ring as numpy: indices and descriptors, in the memory shared with the kernel."""

    def __init__(self, ring, words: int) -> None:
        self.size, self.words = ring.size, words
        self.producer = _words(ring.producer, ctypes.c_uint32, 1)
        self.consumer = _words(ring.consumer, ctypes.c_uint32, 1)
        self.memory = _words(ring.descriptors, ctypes.c_uint64, ring.size * words)

    def level(self) -> int:
        return (int(self.producer[0]) - int(self.consumer[0])) & 0xFFFFFFFF

    def put(self, *words: int) -> None:
        at = int(self.producer[0]) % self.size * self.words
        self.memory[at : at + self.words] = words
        self.producer[0] += 1

    def take(self) -> list[int]:
        at = int(self.consumer[0]) % self.size * self.words
        words = [int(word) for word in self.memory[at : at + self.words]]
        self.consumer[0] += 1
        return words


class Rings:
    """A socket's rings, one packet at a time."""

    def __init__(self, xsk, umem) -> None:
        self.xsk, self.umem = xsk, umem
        self.rx, self.tx = Cursor(xsk.rx, 2), Cursor(xsk.tx, 2)
        self.fill_ring, self.completion = Cursor(xsk.fill, 1), Cursor(xsk.completion, 1)
        self.descriptors: list[tuple[int, int, int]] = []  # of the last packet received

    def fill(self, frames) -> None:
        for number in frames:
            self.fill_ring.put(number * STRIDE)

    def receive(self) -> bytes:
        """The next packet, with its descriptors (address, length, options) kept."""
        assert eventually(self.rx.level), f"nothing came: {self.xsk.statistics()}"
        parts, self.descriptors = [], []
        more = CONTINUES
        while more:
            assert eventually(self.rx.level), f"cut off after {len(parts)} parts"
            address, rest = self.rx.take()
            length, options = rest & 0xFFFFFFFF, rest >> 32
            self.descriptors.append((address, length, options))
            start = (address & BASE_MASK) + (address >> 48)
            parts.append(self.umem.area[start : start + length].tobytes())
            more = options & CONTINUES
        return b"".join(parts)

    def send(self, descriptors) -> None:
        """Queue descriptors (address, length, options) and have the kernel send them."""
        for address, length, options in descriptors:
            self.tx.put(address, length | options << 32)
        self.kick()

    def kick(self) -> None:
        with self.opened(self.xsk.tx_fd) as opened:
            opened.send(b"", socket.MSG_DONTWAIT)

    def opened(self, fd: int) -> socket.socket:
        """A second handle of a socket; AF_XDP has no getsockname to guess the family from."""
        return socket.socket(AF_XDP, socket.SOCK_RAW, 0, fileno=os.dup(fd))

    def completed(self, count: int) -> list[int]:
        assert eventually(lambda: self.completion.level() >= count), self.completion.level()
        return [self.completion.take()[0] for _ in range(count)]
