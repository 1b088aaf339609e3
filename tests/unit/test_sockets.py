"""The bitmap of the node's own ports against sockets that the test opens."""

import asyncio
import contextlib
import socket
import time

import numpy as np
import pytest

from dataplane.control.kernel import sockets

TCP, UDP, SCTP, PING = range(4)


def fresh() -> np.ndarray:
    return np.zeros((4, 8192), np.uint8)


def taken(rows: np.ndarray, row: int, port: int) -> bool:
    return bool(rows[row, port // 8] >> port % 8 & 1)


@contextlib.contextmanager
def opened(family: int, kind: int, address: str, protocol: int = 0):
    with socket.socket(family, kind, protocol) as one:
        one.bind((address, 0))
        if kind == socket.SOCK_STREAM:
            one.listen(1)
        yield one.getsockname()[1]


CASES = [
    (socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1", TCP),
    (socket.AF_INET6, socket.SOCK_STREAM, "::1", TCP),
    (socket.AF_INET, socket.SOCK_DGRAM, "127.0.0.1", UDP),
    (socket.AF_INET6, socket.SOCK_DGRAM, "::1", UDP),
]


@pytest.mark.parametrize("without_diag", [False, True], ids=["diag", "proc"])
@pytest.mark.parametrize(("family", "kind", "address", "row"), CASES)
def test_a_port_is_taken_while_its_socket_is_open(
    monkeypatch, family, kind, address, row, without_diag
):
    if without_diag:

        def refuse(*_):
            raise OSError("no inet_diag")

        monkeypatch.setattr(sockets, "_dump", refuse)
    rows = fresh()
    with opened(family, kind, address) as port:
        assert sockets.refresh(rows) > 0
        assert taken(rows, row, port)
    sockets.refresh(rows)
    assert not taken(rows, row, port)


def test_established_connections_count():
    rows = fresh()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        with socket.create_connection(server.getsockname()) as client:
            sockets.refresh(rows)
            assert taken(rows, TCP, client.getsockname()[1])


def test_ping_sockets_stand_in_their_row():
    rows = fresh()
    try:
        ping = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    except PermissionError:
        pytest.skip("net.ipv4.ping_group_range lets us have none")
    with ping:
        ping.bind(("127.0.0.1", 0))
        sockets.refresh(rows)
        assert taken(rows, PING, ping.getsockname()[1])


def test_many_sockets_are_read_quickly():
    rows = fresh()
    with contextlib.ExitStack() as stack:
        ports = [
            stack.enter_context(opened(socket.AF_INET, socket.SOCK_DGRAM, "127.0.0.1"))
            for _ in range(500)
        ]
        began = time.perf_counter()
        sockets.refresh(rows)
        assert time.perf_counter() - began < 1
        assert all(taken(rows, UDP, port) for port in ports)


def test_it_follows_until_it_is_stopped():
    async def main():
        rows, stop = fresh(), asyncio.Event()
        task = asyncio.create_task(sockets.follow(rows, stop, every_s=0.01))
        with opened(socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1") as port:
            async with asyncio.timeout(10):
                while not taken(rows, TCP, port):
                    await asyncio.sleep(0.01)
        stop.set()
        await task

    asyncio.run(main())
