"""Descriptors that one forwarder leaves to the next."""

import asyncio
import os

import pytest

from xdp.handover import Gate, Handover, Store, Turn


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def heir(store: Store) -> Handover:
    """What a forwarder that the supervisor starts now has; in one process the numbers are equal."""
    environment, fds = store.inheritance()
    copies = {str(fd): os.dup(fd) for fd in fds}
    environment["PENSTOCK_STORE"] = str(copies[environment["PENSTOCK_STORE"]])
    pairs = (text.partition("=") for text in environment["PENSTOCK_KEPT"].split())
    environment["PENSTOCK_KEPT"] = " ".join(f"{name}={copies[fd]}" for name, _, fd in pairs)
    return Handover(environment)


def test_what_is_kept_arrives_at_the_next(pipe):
    store = Store()
    first = heir(store)
    assert first.kept == {}
    first.keep("uplink:7", pipe[1])
    second = heir(store)
    assert second.kept.keys() == {"uplink:7"}
    os.write(second.kept["uplink:7"], b"x")
    assert os.read(pipe[0], 1) == b"x"


def test_a_name_stands_for_the_last_that_was_kept(pipe):
    store = Store()
    first = heir(store)
    first.keep("steering", pipe[0])
    first.keep("steering", pipe[1])
    fd = heir(store).kept["steering"]
    assert os.fstat(fd).st_ino == os.fstat(pipe[1]).st_ino
    os.write(fd, b"x")
    first.drop("steering")
    assert heir(store).kept == {}


def test_without_a_supervisor_nothing_is_kept(pipe):
    alone = Handover({})
    alone.keep("steering", pipe[0])
    alone.drop("steering")
    assert alone.kept == {}
    assert not alone.kept_by_another


def test_a_successor_waits_and_is_given_what_is_kept_then(pipe):
    """In one process the child's end is a copy."""
    store, gate = Store(), Gate()
    old, successor = heir(store), heir(store)
    environment, (fd,) = gate.inheritance()
    turn = Turn({name: str(os.dup(fd)) for name in environment})
    assert turn.waits

    async def body():
        begun = asyncio.create_task(asyncio.to_thread(turn.wait, successor))
        assert await gate.prepared()
        old.keep("uplink:7", pipe[1])  # after the successor's start
        assert not begun.done()
        gate.open(store)
        await begun

    asyncio.run(body())
    gate.close()
    os.write(successor.kept["uplink:7"], b"x")
    assert os.read(pipe[0], 1) == b"x"


def test_a_successor_that_is_not_let_in_hears_of_it():
    gate = Gate()
    environment, (fd,) = gate.inheritance()
    turn = Turn({name: str(os.dup(fd)) for name in environment})

    async def body():
        begun = asyncio.create_task(asyncio.to_thread(turn.wait, Handover({})))
        assert await gate.prepared()
        gate.close()
        with pytest.raises(EOFError):
            await begun

    asyncio.run(body())


def test_who_has_no_predecessor_does_not_wait():
    turn, handover = Turn({}), Handover({})
    assert not turn.waits
    turn.wait(handover)
    assert handover.kept == {}
