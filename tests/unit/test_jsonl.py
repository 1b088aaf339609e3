"""Questions over unix sockets: answers, errors, silence, nonsense."""

import asyncio
import socket

import pytest

from dataplane.control.jsonl import RemoteError, Unreachable, acall, call, serve


async def handler(op, args):
    if op == "add":
        return args["a"] + args["b"]
    if op == "hang":
        await asyncio.sleep(60)
    raise ValueError(f"unknown operation {op!r}")


def scenario(path, body):
    async def run():
        server = await serve(path, handler)
        try:
            return await body()
        finally:
            server.close()

    return asyncio.run(run())


def test_an_answer(tmp_path):
    path = tmp_path / "s.sock"

    async def body():
        both = (
            await acall(path, "add", a=2, b=3),
            await asyncio.to_thread(call, path, "add", a=1, b=1),
        )
        assert path.stat().st_mode & 0o777 == 0o600
        return both

    assert scenario(path, body) == (5, 2)


def test_an_error_carries_its_name(tmp_path):
    path = tmp_path / "s.sock"

    async def body():
        with pytest.raises(RemoteError, match="unknown operation") as caught:
            await acall(path, "fly")
        assert caught.value.code == "ValueError"

    scenario(path, body)


def test_silence_and_absence_are_unreachable(tmp_path):
    path = tmp_path / "s.sock"

    async def body():
        with pytest.raises(Unreachable):
            await acall(path, "hang", timeout=0.05)

    scenario(path, body)
    with pytest.raises(Unreachable):
        call(tmp_path / "none.sock", "add")


def test_nonsense_gets_an_error_and_the_server_goes_on(tmp_path):
    path = tmp_path / "s.sock"

    def shout():
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"not json\n[]\n{}\n")
            reader = client.makefile("rb")
            return [reader.readline() for _ in range(3)]

    async def body():
        lines = await asyncio.to_thread(shout)
        assert all(b"error" in line for line in lines)
        return await acall(path, "add", a=1, b=2)

    assert scenario(path, body) == 3
