"""`penstock run` over stand-ins for its processes: restarts, order of the end, silence."""

import asyncio
import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from dataplane.control.config import Config
from dataplane.control.jsonl import serve
from dataplane.daemon import supervisor
from dataplane.daemon.notify import EX_CONFIG
from tests.unit.test_daemon_parts import Listener
from xdp.handover import Store

LIMIT_S = 60


def child(tmp_path, body: str, name: str = "agent") -> supervisor.Child:
    """A child that runs Python code; `print` goes into tmp_path/said, a line at a time."""
    said = tmp_path / "said"
    said.touch()
    code = (
        "import os, signal, sys, time\n"
        f"def say(word):\n    with open({str(said)!r}, 'a') as f: f.write(word + '\\n')\n{body}"
    )
    one = supervisor.Child(name, None)
    one._command = [sys.executable, "-c", code]
    return one


WAITS = """
signal.signal(signal.SIGTERM, lambda *_: (say('{name} ends'), sys.exit(0)))
say('{name} starts')
while True: time.sleep(60)
"""


async def until(check):
    async with asyncio.timeout(LIMIT_S):
        while not (found := check()):
            await asyncio.sleep(0.01)
        return found


def said(tmp_path) -> list[str]:
    return (tmp_path / "said").read_text().split("\n")[:-1]


def test_a_child_that_dies_is_started_again(tmp_path):
    one = child(tmp_path, WAITS.format(name="one"))

    async def body():
        stop = asyncio.Event()
        keeper = asyncio.create_task(one.keep(stop))
        await until(lambda: len(said(tmp_path)) == 1)
        first = one.process.pid
        os.kill(first, signal.SIGKILL)
        await until(lambda: len(said(tmp_path)) == 2)
        assert one.process.pid != first
        stop.set()
        await one.end()
        await keeper

    asyncio.run(body())
    assert said(tmp_path) == ["one starts", "one starts", "one ends"]


def test_one_that_fails_again_and_again_waits_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "PAUSES_S", (0.001, 0.002, 0.004))
    waited = []
    one = child(tmp_path, "sys.exit(1)")

    async def body():
        stop = asyncio.Event()

        def warning(message, **words):
            waited.append(words["pause_s"])
            if len(waited) == 4:
                stop.set()

        monkeypatch.setattr(supervisor, "log", SimpleNamespace(warning=warning))
        await asyncio.wait_for(one.keep(stop), LIMIT_S)

    asyncio.run(body())
    assert waited == [0.002, 0.004, 0.004, 0.004]


SUCCEEDS = """
from xdp.handover import Handover, Turn
signal.signal(signal.SIGTERM, lambda *_: (say('one ends'), sys.exit(0)))
turn = Turn()
if turn.waits: say('next prepares')
turn.wait(Handover({}))
say('one starts')
while True: time.sleep(60)
"""


def test_the_next_one_is_prepared_before_the_old_one_ends(tmp_path):
    one = child(tmp_path, SUCCEEDS)
    one._store = Store()

    async def body():
        stop = asyncio.Event()
        keeper = asyncio.create_task(one.keep(stop))
        await until(lambda: said(tmp_path))
        first = one.process.pid
        await asyncio.wait_for(one.renew(), LIMIT_S)
        await until(lambda: said(tmp_path)[-1] == "one starts" and len(said(tmp_path)) == 4)
        assert one.process.pid != first
        stop.set()
        await one.end()
        await keeper

    asyncio.run(body())
    assert said(tmp_path) == ["one starts", "next prepares", "one ends", "one starts", "one ends"]


def test_a_next_one_that_does_not_start_leaves_the_old_one_at_work(tmp_path):
    one = child(tmp_path, SUCCEEDS)
    one._store = Store()

    async def body():
        stop = asyncio.Event()
        keeper = asyncio.create_task(one.keep(stop))
        await until(lambda: said(tmp_path))
        first = one.process.pid
        one._command = [sys.executable, "-c", "raise SystemExit(1)"]
        await asyncio.wait_for(one.renew(), LIMIT_S)
        assert one.process.pid == first
        assert alive(first)
        stop.set()
        await one.end()
        await keeper

    asyncio.run(body())
    assert said(tmp_path) == ["one starts", "one ends"]


def test_a_configuration_error_is_not_tried_again(tmp_path):
    one = child(tmp_path, f"say('one'); sys.exit({EX_CONFIG})")

    async def body():
        stop = asyncio.Event()
        await asyncio.wait_for(one.keep(stop), LIMIT_S)
        assert stop.is_set()

    asyncio.run(body())
    assert said(tmp_path) == ["one"]
    assert one.status == EX_CONFIG


def test_one_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "STOP_S", 0.2)
    one = child(tmp_path, "signal.signal(15, signal.SIG_IGN); say('one')\ntime.sleep(600)")

    async def body():
        stop = asyncio.Event()
        keeper = asyncio.create_task(one.keep(stop))
        await until(lambda: said(tmp_path))
        stop.set()
        await one.end()
        await keeper

    asyncio.run(body())
    assert one.status == -signal.SIGKILL


def test_a_stop_while_a_child_starts_ends_it_too(tmp_path):
    one = child(tmp_path, "time.sleep(600)")

    async def body():
        stop = asyncio.Event()
        keeper = asyncio.create_task(one.keep(stop))
        await asyncio.sleep(0)  # keep() has seen no stop and makes the process
        stop.set()
        await one.end()
        await asyncio.wait_for(keeper, LIMIT_S)

    asyncio.run(body())
    assert one.status == -signal.SIGTERM


def test_children_die_with_a_killed_supervisor(tmp_path):
    code = (
        "import asyncio, os, signal, sys\n"
        "from dataplane.daemon.supervisor import Child\n"
        "async def main():\n"
        "    one = Child('agent', None); one._command = ['sleep', '600']\n"
        "    task = asyncio.create_task(one.keep(asyncio.Event()))\n"
        "    while one.process is None: await asyncio.sleep(0.01)\n"
        "    print(one.process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )

    async def body():
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
        )
        pid = int(await process.stdout.readline())
        assert await process.wait() == -signal.SIGKILL
        await until(lambda: not alive(pid))

    asyncio.run(body())


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_all_others_end_before_the_forwarder(tmp_path, monkeypatch):
    names = ("agent", "forwarder", "observer", "dnsproxy")
    made = {name: child(tmp_path, WAITS.format(name=name), name) for name in names}
    monkeypatch.setattr(supervisor, "Child", lambda name, *_: made[name])
    monkeypatch.setattr(supervisor, "_announce", lambda config: asyncio.sleep(0, True))
    config = Config.model_validate({"node": {"run_dir": str(tmp_path / "run")}})

    async def body():
        running = asyncio.create_task(supervisor._run(config, None))
        await until(lambda: len(said(tmp_path)) == 4)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(running, LIMIT_S) == 0

    asyncio.run(body())
    *first, last = said(tmp_path)[4:]
    assert sorted(first) == ["agent ends", "dnsproxy ends", "observer ends"]
    assert last == "forwarder ends"


# --- silence --------------------------------------------------------------------------------------


def shm(*ages_s: float):
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    stats = np.zeros(4, [("heartbeat_ns", "u8")])
    stats["heartbeat_ns"][: len(ages_s)] = [now - int(age * 1e9) for age in ages_s]
    return SimpleNamespace(node=[{"workers": len(ages_s)}], worker_stats=stats)


def test_the_most_silent_worker_counts():
    assert supervisor.silent_for(shm(1.0, 20.0), since=0.0) == pytest.approx(20, abs=5)


def test_beats_of_an_earlier_process_do_not_count():
    since = time.monotonic() - 10  # the new one compiles its kernels for 10 s now
    assert supervisor.silent_for(shm(300.0), since) == 0
    assert supervisor.silent_for(shm(), since) == 0


def test_a_silent_forwarder_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "LOOK_S", 0.01)
    monkeypatch.setattr(supervisor, "_announce", lambda config: asyncio.sleep(0, True))
    monkeypatch.setattr(supervisor.Shm, "open", lambda run_dir: shm(30.0))
    one = child(tmp_path, WAITS.format(name="one"))

    async def body():
        stop = asyncio.Event()
        keeper = asyncio.create_task(one.keep(stop))
        await until(lambda: said(tmp_path))
        first = one.process
        one.started -= 60  # it beat 30 s ago, and runs for longer
        watcher = asyncio.create_task(supervisor._watch(Config(), one, stop))
        await until(lambda: first.returncode is not None)
        assert first.returncode == -signal.SIGKILL
        stop.set()
        await one.end()
        await asyncio.gather(keeper, watcher)

    asyncio.run(body())


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"ready": True, "errors": []}, "STATUS=ready for pods"),
        ({"ready": False, "errors": ["no Node n"]}, "STATUS=waiting: no Node n"),
    ],
)
def test_systemd_hears_that_the_agent_answers(tmp_path, monkeypatch, state, words):
    listener = Listener(tmp_path, monkeypatch)
    config = Config.model_validate({"node": {"run_dir": str(tmp_path)}})

    async def answer(op, args):
        return json.loads(json.dumps(state))

    async def body():
        assert not await supervisor._announce(config)
        server = await serve(tmp_path / "api.sock", answer)
        assert await supervisor._announce(config)
        server.close()

    asyncio.run(body())
    assert listener.heard() == ["READY=1", words]
