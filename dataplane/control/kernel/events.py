"""The kernel's messages about links, addresses, routes and neighbours, as a doorbell.

Rule: it rings when a snapshot could lead to another plan, and never answers what changed.

Theory. A netlink socket in the multicast groups of rtnetlink(7). A full receive buffer (ENOBUFS)
loses messages, so it rings too: the next snapshot is the resynchronisation. Neighbour entries of
nodes that nobody talks to through the kernel go from STALE over PROBE to REACHABLE and back all
day, and those of dead nodes from INCOMPLETE to FAILED: messages that leave the usable MAC of an
entry as the last snapshot had it do not ring, or an idle agent would be busy.
"""

import errno
import socket
import struct
from collections.abc import Callable, Mapping
from ipaddress import ip_address

from dataplane.control.model import Address, Neighbour

GROUPS = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP: link, neigh, ip4/6 address and route
RTM_NEWNEIGH, RTM_DELNEIGH = 28, 29
NDA_DST, NDA_LLADDR = 1, 2
BUFFER = 1 << 20  # bytes of messages that may wait
SO_RCVBUFFORCE = 33
FAMILIES = (socket.AF_INET, socket.AF_INET6)

_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # ndmsg
_ATTRIBUTE = struct.Struct("=HH")  # rtattr

Key = tuple[int, Address]


class Doorbell:
    """The socket, non-blocking, for a loop's add_reader; in the namespace it was made in."""

    def __init__(self, ring: Callable[[], None]) -> None:
        """ring() is called, at most once a read(), when something changed."""
        self._ring = ring
        self.known: Mapping[Key, Neighbour] = {}  # of the last snapshot
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.setblocking(False)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self._socket.bind((0, GROUPS))

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def read(self) -> None:
        """Take what waits; ring if any of it matters."""
        matters = False
        while True:
            try:
                matters |= self.matters(self._socket.recv(1 << 16))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                matters = True
        if matters:
            self._ring()

    def matters(self, data: bytes) -> bool:
        """Whether a datagram of messages says anything that the last snapshot did not."""
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, _, _, _ = _HEADER.unpack_from(data, at)
            if length < _HEADER.size:
                break
            if kind not in (RTM_NEWNEIGH, RTM_DELNEIGH):
                return True
            if self._neighbour_matters(kind, data[at + _HEADER.size : at + length]):
                return True
            at += length + 3 & ~3
        return False

    def _neighbour_matters(self, kind: int, body: bytes) -> bool:
        if len(body) < _NEIGHBOUR.size:
            return False
        family, device, state, _, _ = _NEIGHBOUR.unpack_from(body)
        attributes = _attributes(body[_NEIGHBOUR.size :])
        if family not in FAMILIES or NDA_DST not in attributes:
            return False
        address = ip_address(attributes[NDA_DST])
        mac = attributes.get(NDA_LLADDR, b"")
        fresh = Neighbour(device, address, mac, 0 if kind == RTM_DELNEIGH else state)
        return _mac(fresh) != _mac(self.known.get((device, address)))


def _mac(entry: Neighbour | None) -> bytes | None:
    """What a next hop would use."""
    if entry is None or not entry.usable:
        return None
    return entry.mac


def _attributes(body: bytes) -> dict[int, bytes]:
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = body[at + _ATTRIBUTE.size : at + length]  # NLA_TYPE_MASK
        at += length + 3 & ~3
    return found
