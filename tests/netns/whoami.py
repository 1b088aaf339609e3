"""A server that tells each client its own name and the client's address, and a client for it.

python -m tests.netns.whoami serve NAME PORT
python -m tests.netns.whoami ask tcp|udp ADDRESS PORT [COUNT [BYTES]]
"""

import json
import selectors
import socket
import sys
import time


def serve(name: str, port: int) -> None:
    """Serve TCP and UDP in both families until killed."""
    selector = selectors.DefaultSelector()
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        one = socket.socket(socket.AF_INET6, kind)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        one.bind(("::", port))
        if kind == socket.SOCK_STREAM:
            one.listen(512)
        else:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        selector.register(one, selectors.EVENT_READ, kind)
    held = []
    while True:
        for key, _ in selector.select():
            if key.data == socket.SOCK_STREAM:
                peer, address = key.fileobj.accept()
                peer.sendall(_answer(name, address))
                selector.register(peer, selectors.EVENT_READ, None)
                held.append(peer)
            elif key.data == socket.SOCK_DGRAM:
                # With the address that was asked: of several the kernel would choose another.
                data, notes, _, address = key.fileobj.recvmsg(65536, 256)
                key.fileobj.sendmsg([_answer(name, address, len(data))], notes, 0, address)
            else:
                data = key.fileobj.recv(65536)
                if data:
                    key.fileobj.sendall(data)
                else:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()


def _answer(name: str, address: tuple, length: int = 0) -> bytes:
    seen = address[0].removeprefix("::ffff:")
    return json.dumps({"name": name, "seen": seen, "bytes": length}).encode() + b"\n"


def ask(protocol: str, address: str, port: int, count: int = 1, length: int = 1) -> None:
    """Ask `count` times, each from a port of its own; print a list of answers or errors."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    answers = []
    for _ in range(count):
        began = time.monotonic()
        with socket.socket(family, kind) as one:
            one.settimeout(5)
            try:
                one.connect((address, port))
                if protocol == "udp":
                    one.send(b"x" * length)
                answers.append(json.loads(one.recv(65536)))
            except OSError as error:
                what = type(error).__name__
                answers.append({"error": what, "seconds": time.monotonic() - began})
    print(json.dumps(answers))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        ask(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
