"""A server of some ports in a pod, and a prober that tries many targets at once.

python -m tests.netns.probe serve NAME tcp/80 udp/80 ...
python -m tests.netns.probe ask SECONDS ADDRESS,tcp/80 ...    prints {target: name or ""} as JSON
"""

import json
import selectors
import socket
import sys
import time

KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def serve(name: str, ports: list[str]) -> None:
    """Answer with a name until killed."""
    selector = selectors.DefaultSelector()
    for text in ports:
        protocol, number = text.split("/")
        one = socket.socket(socket.AF_INET6, KINDS[protocol])
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("::", int(number)))
        if protocol == "tcp":
            one.listen(256)
        selector.register(one, selectors.EVENT_READ, protocol)
    print("serving", flush=True)
    while True:
        for key, _ in selector.select():
            if key.data == "tcp":
                peer, _ = key.fileobj.accept()
                peer.sendall(name.encode())
                peer.close()
            else:
                _, peer = key.fileobj.recvfrom(2048)
                key.fileobj.sendto(name.encode(), peer)


def ask(seconds: float, targets: list[str]) -> dict[str, str]:
    """Try all targets at the same time; who answers in time is named."""
    selector = selectors.DefaultSelector()
    found = dict.fromkeys(targets, "")
    for target in targets:
        address, text = target.split(",")
        protocol, number = text.split("/")
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        one = socket.socket(family, KINDS[protocol])
        one.setblocking(False)
        one.connect_ex((address, int(number)))
        if protocol == "udp":
            one.send(b"?")
        selector.register(one, selectors.EVENT_READ, target)
    end = time.monotonic() + seconds
    waiting = len(targets)
    while waiting and (left := end - time.monotonic()) > 0:
        for key, _ in selector.select(left):
            try:
                found[key.data] = key.fileobj.recv(100).decode()
            except OSError:
                found[key.data] = ""
            selector.unregister(key.fileobj)
            waiting -= 1
    return found


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], sys.argv[3:])
    else:
        print(json.dumps(ask(float(sys.argv[2]), sys.argv[3:])))
