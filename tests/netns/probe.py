"""A server of some ports in a pod, and a prober that tries many targets at once.

python -m tests.netns.probe serve NAME tcp/80 udp/80 sctp/80 ...
python -m tests.netns.probe ask SECONDS ADDRESS,tcp/80 ADDRESS,icmp/0 ...

`ask` prints {target: name or ""} as JSON; who answers an echo request has the name "echo". Kernels
without SCTP are common, so its packets are made here (RFC 9260 3.3.2, 3.3.3), for raw sockets. ICMP
needs the sysctl net.ipv4.ping_group_range.
"""

import json
import selectors
import socket
import struct
import sys
import time

KINDS = {
    "tcp": (socket.SOCK_STREAM, 0),
    "udp": (socket.SOCK_DGRAM, 0),
    "sctp": (socket.SOCK_RAW, socket.IPPROTO_SCTP),
}
ECHO = {
    socket.AF_INET: (socket.IPPROTO_ICMP, struct.pack("!BBHHH", 8, 0, 0, 0, 1)),
    socket.AF_INET6: (socket.IPPROTO_ICMPV6, struct.pack("!BBHHH", 128, 0, 0, 0, 1)),
}
SCTP = struct.Struct("!HHII BBH IIHHI")  # common header, chunk header, fields of INIT and INIT ACK
INIT, INIT_ACK, TAG = 1, 2, 0x50454E53
FIRST_PORT = 20000  # of the prober's own SCTP ports


def _sctp(source: int, target: int, tag: int, chunk: int, name: bytes = b"") -> bytes:
    length = SCTP.size - 12 + len(name)
    return SCTP.pack(source, target, tag, 0, chunk, 0, length, TAG, 65535, 1, 1, 1) + name


def _read_sctp(one: socket.socket, data: bytes) -> tuple[int, int, int, bytes]:
    """Return source port, target port, chunk and name of what a raw socket has received."""
    if one.family == socket.AF_INET:
        data = data[4 * (data[0] & 15) :]
    source, target, _, _, chunk, *_ = SCTP.unpack_from(data)
    return source, target, chunk, data[SCTP.size :]


def serve(name: str, ports: list[str]) -> None:
    """Answer with a name until killed."""
    selector = selectors.DefaultSelector()
    wanted = {tuple(text.split("/")) for text in ports}
    for protocol, number in wanted:
        if protocol == "sctp":
            continue
        one = socket.socket(socket.AF_INET6, *KINDS[protocol])
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("::", int(number)))
        if protocol == "tcp":
            one.listen(256)
        selector.register(one, selectors.EVENT_READ, protocol)
    sctp = {int(number) for protocol, number in wanted if protocol == "sctp"}
    for family in (socket.AF_INET, socket.AF_INET6) if sctp else ():
        one = socket.socket(family, *KINDS["sctp"])
        selector.register(one, selectors.EVENT_READ, "sctp")
    print("serving", flush=True)
    while True:
        for key, _ in selector.select():
            _answer(key.fileobj, key.data, name.encode(), sctp)


def _answer(one: socket.socket, protocol: str, name: bytes, sctp: set[int]) -> None:
    if protocol == "tcp":
        peer, _ = one.accept()
        peer.sendall(name)
        peer.close()
        return
    data, peer = one.recvfrom(2048)
    if protocol == "udp":
        one.sendto(name, peer)
        return
    source, target, chunk, _ = _read_sctp(one, data)
    if chunk == INIT and target in sctp:
        one.sendto(_sctp(target, source, TAG, INIT_ACK, name), (peer[0], 0))


def _open(target: str, own: int) -> socket.socket:
    """Send the first packet to a target. own: SCTP port."""
    address, text = target.split(",")
    protocol, number = text.split("/")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = KINDS.get(protocol) or (socket.SOCK_DGRAM, ECHO[family][0])
    one = socket.socket(family, *kind)
    one.setblocking(False)
    one.connect_ex((address, 0 if protocol in ("icmp", "sctp") else int(number)))
    first = {
        "udp": b"?",
        "icmp": ECHO[family][1],
        "sctp": _sctp(own, int(number), 0, INIT),
    }.get(protocol)
    if first is not None:
        one.send(first)
    return one


def _heard(one: socket.socket, protocol: str, own: int) -> str | None:
    """Return who has answered, "": nobody will; None: it was not for us."""
    try:
        data = one.recv(2048)
    except OSError:
        return ""
    if protocol == "icmp":
        return "echo"
    if protocol != "sctp":
        return data.decode()
    _, target, chunk, name = _read_sctp(one, data)
    return name.decode() if (target, chunk) == (own, INIT_ACK) else None


def ask(seconds: float, targets: list[str]) -> dict[str, str]:
    """Try all targets at the same time; who answers in time is named."""
    selector = selectors.DefaultSelector()
    found = dict.fromkeys(targets, "")
    base = FIRST_PORT + time.monotonic_ns() % 32768  # another one each time
    for number, target in enumerate(targets):
        own = base + number
        selector.register(_open(target, own), selectors.EVENT_READ, (target, own))
    end = time.monotonic() + seconds
    waiting = len(targets)
    while waiting and (left := end - time.monotonic()) > 0:
        for key, _ in selector.select(left):
            target, own = key.data
            protocol = target.partition(",")[2].partition("/")[0]
            heard = _heard(key.fileobj, protocol, own)
            if heard is not None:
                found[target] = heard
                selector.unregister(key.fileobj)
                waiting -= 1
    return found


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], sys.argv[3:])
    else:
        print(json.dumps(ask(float(sys.argv[2]), sys.argv[3:])))
