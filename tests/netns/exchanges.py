"""A list of exchanges through a NAT, and what their client saw of each: to compare two NATs.

python -m tests.netns.exchanges serve
python -m tests.netns.exchanges ask ADDRESS PORT    prints {exchange: what was seen} as JSON

PORT and the ones after it are the client's; ports in the answers are counted from there.
"""

import errno
import json
import selectors
import socket
import struct
import sys
import time

UDP, TWO_FACED, TCP, CLOSED = 7080, 7081, 7082, 7089
IP_RECVERR, IPV6_RECVERR, SO_NO_CHECK = 11, 25, 11
PATIENCE_S = 3.0
LARGE = 20_000  # bytes of a datagram in many fragments


# --- the server -----------------------------------------------------------------------------------


def _bound(kind: int, port: int) -> socket.socket:
    one = socket.socket(socket.AF_INET6, kind)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(("::", port))
    if kind == socket.SOCK_STREAM:
        one.listen()
    else:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    return one


def _seen(peer: tuple) -> bytes:
    return f"{peer[0].removeprefix('::ffff:')} {peer[1]} ".encode()


def serve() -> None:
    """Answer until killed."""
    sockets = {port: _bound(socket.SOCK_DGRAM, port) for port in (UDP, TWO_FACED, TWO_FACED + 100)}
    sockets[TCP] = _bound(socket.SOCK_STREAM, TCP)
    selector = selectors.DefaultSelector()
    for port, one in sockets.items():
        selector.register(one, selectors.EVENT_READ, port)
    print("serving", flush=True)
    while True:
        for key, _ in selector.select():
            if key.data == TCP:
                _stream(key.fileobj.accept())
                continue
            data, control, _, peer = key.fileobj.recvmsg(65535, 200)
            # From the address that was asked (RFC 3542 6).
            own = [(level, kind, value[:16] + bytes(4)) for level, kind, value in control]
            if key.data == TWO_FACED:
                sockets[TWO_FACED + 100].sendmsg([b"stranger"], own, 0, peer)
            if data.startswith(b"late"):
                time.sleep(1)
            key.fileobj.sendmsg([_seen(peer) + data], own, 0, peer)


def _stream(accepted: tuple) -> None:
    """Read to the client's end, then answer at length: the client has closed its half."""
    one, peer = accepted
    one.settimeout(PATIENCE_S)
    size = 0
    try:
        while data := one.recv(65536):
            size += len(data)
        one.sendall(_seen(peer) + str(size).encode() + b" " + bytes(100_000))
    except OSError:
        pass
    one.close()


# --- the client -----------------------------------------------------------------------------------


class Client:
    """One after the other, each from a port of its own."""

    def __init__(self, address: str, first: int) -> None:
        self.address, self.first, self.port = address, first, first
        self.family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def socket(self, kind: int) -> socket.socket:
        one = socket.socket(self.family, kind)
        one.settimeout(PATIENCE_S)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("", self.port))
        self.port += 1
        return one

    def told(self, data: bytes) -> list:
        """Address, port counted from our first, and length of the rest."""
        host, port, rest = data.split(b" ", 2)
        return [host.decode(), int(port) - self.first, len(rest)]

    def datagram(self, data: bytes, port: int = UDP, **options: int) -> list:
        one = self.socket(socket.SOCK_DGRAM)
        if options.get("unsummed"):
            one.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        one.sendto(data, (self.address, port))
        return self.told(one.recv(65535))

    def stranger(self) -> list:
        """Answers to one datagram: those of another port must not come."""
        one = self.socket(socket.SOCK_DGRAM)
        one.sendto(b"?", (self.address, TWO_FACED))
        found = [one.recv(65535) != b"stranger"]
        one.settimeout(0.3)
        try:
            one.recv(65535)
            found.append("another one")
        except TimeoutError:
            pass
        return found

    def stream(self, size: int) -> list:
        one = self.socket(socket.SOCK_STREAM)
        one.connect((self.address, TCP))
        one.sendall(bytes(size))
        one.shutdown(socket.SHUT_WR)
        found = b""
        while data := one.recv(65536):
            found += data
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()  # by a reset
        return self.told(found)

    def error(self, port: int, hops: int = 0) -> str:
        """Name of the error that ICMP brings."""
        one = self.socket(socket.SOCK_DGRAM)
        six = self.family == socket.AF_INET6
        level = socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP
        one.setsockopt(level, IPV6_RECVERR if six else IP_RECVERR, 1)
        if hops:
            one.setsockopt(level, socket.IPV6_UNICAST_HOPS if six else socket.IP_TTL, hops)
        one.connect((self.address, port))
        one.send(b"?")
        try:
            one.recv(100)
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "silence")
        return "an answer"

    def refused_stream(self) -> str:
        one = self.socket(socket.SOCK_STREAM)
        try:
            one.connect((self.address, CLOSED))
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "silence")
        return "an answer"


def ask(address: str, first: int) -> dict[str, object]:
    """Go through all exchanges."""
    client = Client(address, first)
    return {
        "datagram": client.datagram(b"x" * 10),
        "datagram in fragments": client.datagram(b"x" * LARGE),
        "empty datagram": client.datagram(b""),
        "datagram without checksum": client.datagram(b"x" * 9, unsummed=1),
        "late answer": client.datagram(b"late"),
        "answer of another port": client.stranger(),
        "stream": client.stream(10),
        "long stream": client.stream(1_000_000),
        "closed port": client.error(CLOSED),
        "closed port, stream": client.refused_stream(),
        "hop limit": client.error(UDP, hops=1),
        "the same port again": Client(address, first).datagram(b"again"),
    }


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        print(json.dumps(ask(sys.argv[2], int(sys.argv[3]))))
