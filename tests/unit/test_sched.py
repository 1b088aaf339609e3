"""Short slices for threads that move packets."""

import os
import re
import threading
from pathlib import Path

from xdp import libc, sched


def _in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_gets_short_slices_and_others_do_not():
    def asked() -> tuple[bool, int, str]:
        granted = sched.hasten(5)
        tid = threading.get_native_id()
        nice = os.getpriority(os.PRIO_PROCESS, tid)
        return granted, nice, Path(f"/proc/self/task/{tid}/sched").read_text()

    before = os.getpriority(os.PRIO_PROCESS, os.getpid())
    granted, nice, said = _in_a_thread(asked)
    if "se.slice" in said:  # since 6.12
        assert re.search(rf"se\.slice\s*:\s*{sched.SLICE_NS}\b", said)
    assert granted
    assert nice == 5
    assert os.getpriority(os.PRIO_PROCESS, os.getpid()) == before


def test_who_defers_gives_way(monkeypatch):
    def asked() -> tuple[int, int, str]:
        sched.defer()
        said = Path(f"/proc/self/task/{threading.get_native_id()}/sched").read_text()
        return os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), said

    *found, said = _in_a_thread(asked)
    assert found == [os.SCHED_BATCH, max(sched.DEFERRED, os.getpriority(0, 0))]
    if "se.slice" in said:
        assert re.search(rf"se\.slice\s*:\s*{sched.DEFERRED_NS}\b", said)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER, "others go on as before"
    monkeypatch.setattr(sched, "SET_ATTR", {})
    assert _in_a_thread(asked)[0] == os.SCHED_OTHER


def test_who_is_refused_goes_on(monkeypatch):
    monkeypatch.setattr(sched, "SET_ATTR", {})
    assert not sched.hasten(0)
    monkeypatch.undo()

    def refuse(*_):
        raise libc.KernelError("sched_setattr", 1)

    monkeypatch.setattr(libc, "call", refuse)
    assert not sched.hasten(0)
