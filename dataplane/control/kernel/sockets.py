"""Which ports the node's own sockets have.

Rule: a bit is set if any socket of this network namespace has the port, whatever its address or
state.

Theory. Masquerading must not give a pod's packets a source port that the node itself uses towards
the same peer. The kernel's own choices are kept apart by ip_local_reserved_ports; what is left are
sockets that bind by name, and those change seldom, so a look every few seconds is enough. sock_diag
(NETLINK_SOCK_DIAG, linux/inet_diag.h) answers with 72 bytes a socket, some ten times faster than
the text of /proc/net/tcp, which is read only where the kernel has no inet_diag for a protocol. The
fourth row holds the identifiers of ping sockets, which only /proc/net knows.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import structlog

EVERY_S = 3.0
PROTOCOLS = (socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_SCTP)  # rows of the bitmap
FAMILIES = (socket.AF_INET, socket.AF_INET6)
PING_ROW = 3

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
REQUEST = struct.Struct("=BBBBI48x")  # struct inet_diag_req_v2, any socket
PORT = struct.Struct(">H")
PORT_AT = HEADER.size + 4  # in struct inet_diag_msg: behind family, state, timer, retrans
ALL_STATES = 0xFFFFFFFF
RECEIVE_BYTES = 1 << 18

PROC = Path("/proc/thread-self/net")
PROC_FILES = {
    socket.IPPROTO_TCP: ("tcp", "tcp6"),
    socket.IPPROTO_UDP: ("udp", "udp6", "udplite", "udplite6"),
    socket.IPPROTO_SCTP: (),  # its files have other columns; without sctp_diag there is no SCTP
}
PING_FILES = ("icmp", "icmp6")

log = structlog.get_logger(subsys="sockets")


def refresh(rows: np.ndarray) -> int:
    """Bring the bitmap in line with the sockets of the calling thread's network namespace.

    rows: uint8[4, 8192], of TCP, UDP, SCTP and ping identifiers; port p is bit p % 8 of byte
    p // 8.
    Return the number of ports in use. Raises OSError when the kernel tells nothing.
    """
    total = 0
    for row, protocol in enumerate(PROTOCOLS):
        total += _store(rows[row], _ports(protocol))
    return total + _store(rows[PING_ROW], set(_read(PING_FILES)))


def _store(row: np.ndarray, ports: set[int]) -> int:
    ports.discard(0)
    wanted = np.zeros(65536, np.uint8)
    wanted[list(ports)] = 1
    packed = np.packbits(wanted, bitorder="little")
    changed = np.flatnonzero(row != packed)
    row[changed] = packed[changed]  # a byte at a time: workers read beside it
    return len(ports)


def _ports(protocol: int) -> set[int]:
    found: set[int] = set()
    for family in FAMILIES:
        try:
            found.update(_dump(family, protocol))
        except OSError:
            return set(_read(PROC_FILES[protocol]))
    return found


def _dump(family: int, protocol: int) -> Iterator[int]:
    """Yield the local port of every socket. Raises OSError where inet_diag does not know them."""
    body = REQUEST.pack(family, protocol, 0, 0, ALL_STATES)
    kind = SOCK_DIAG_BY_FAMILY
    head = HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(5)
        netlink.send(head + body)
        while True:
            data = netlink.recv(RECEIVE_BYTES)
            at = 0
            while at + HEADER.size <= len(data):
                length, kind, *_ = HEADER.unpack_from(data, at)
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    code = -struct.unpack_from("=i", data, at + HEADER.size)[0]
                    raise OSError(code, f"inet_diag of protocol {protocol}, family {family}")
                yield PORT.unpack_from(data, at + PORT_AT)[0]
                at += (length + 3) & ~3


def _read(names: tuple[str, ...]) -> Iterator[int]:
    """Yield the local ports of files such as /proc/net/udp, those that are there."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            for line in (PROC / name).read_text().splitlines()[1:]:
                yield int(line.split()[1].rpartition(":")[2], 16)


async def follow(rows: np.ndarray, stop: asyncio.Event, every_s: float = EVERY_S) -> None:
    """Refresh the bitmap now and every few seconds until stop is set; failures are logged."""
    failing = False
    while not stop.is_set():
        try:
            await asyncio.to_thread(refresh, rows)
            failing = False
        except OSError as error:
            if not failing:
                log.warning("the node's ports cannot be read", error=str(error))
            failing = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), every_s)
