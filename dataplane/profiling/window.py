"""What workers and the flow table did between two moments.

Rule: a number is a difference of counters over the same window; none is a lifetime average.

Theory. Workers time the stages of every 64th step and count system calls and what waits in their
rings (engine/loop.py), always, so looking costs them nothing. A thread's processor time is the
scheduler's (schedstat). What XDP forwarded by itself is collected once a second into the last row
of the counters: the hit rate of the flow table is its share of all packets.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataplane.tables.shm import Shm
from xdp.abi import CONST, ENUM, value

FORWARDED = value("REASON_FORWARDED")

STAGES = {
    n: name.removeprefix("STAGE_").lower()
    for name, n in sorted(ENUM["stage"].items(), key=lambda pair: pair[1])
}
SYSTEM_CALLS = ("polls", "kicks", "yields")
"""epoll_wait, sendto, sched_yield."""


@dataclass(frozen=True)
class Moment:
    """All counters at one time."""

    when: float  # s, monotonic
    workers: np.ndarray  # worker_stats
    by_stages: int  # packets that ended in the stages
    by_xdp: int  # packets that the flow table forwarded
    cpu_ns: tuple[int, ...]


def moment(shm: Shm) -> Moment:
    """Read everything once."""
    count = min(int(shm.node[0]["workers"]), CONST["WORKERS_MAX"])
    workers = shm.worker_stats[:count].copy()
    packets = shm.reasons["packets"]
    return Moment(
        time.monotonic(),
        workers,
        int(packets[:-1].sum()),
        int(packets[-1, :, FORWARDED].sum()),
        tuple(_cpu(int(tid)) for tid in workers["tid"]),
    )


def _cpu(tid: int) -> int:
    """Nanoseconds that a thread has run; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{tid}/task/{tid}/schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def between(one: Moment, two: Moment) -> dict[str, Any]:
    """Return what happened from one moment to another: workers, flow table."""
    seconds = two.when - one.when
    rows = [
        _worker(n, seconds, old, new, two.cpu_ns[n] - one.cpu_ns[n])
        for n, (old, new) in enumerate(zip(one.workers, two.workers, strict=False))
    ]
    hits, rest = two.by_xdp - one.by_xdp, two.by_stages - one.by_stages
    return {
        "seconds": round(seconds, 3),
        "workers": rows,
        "flow_table": {
            "packets": hits,
            "pps": round(hits / seconds),
            "hit_rate": round(hits / (hits + rest), 4) if hits + rest else None,
        },
    }


def _worker(number: int, seconds: float, old: np.void, new: np.void, cpu_ns: int) -> dict[str, Any]:
    def grown(name: str) -> int:
        return int(new[name]) - int(old[name])

    packets, steps, sampled = grown("packets"), grown("steps"), grown("sampled_packets")
    looks = grown("sampled_steps")
    stage_ns = np.asarray(new["stage_ns"], np.int64) - np.asarray(old["stage_ns"], np.int64)
    stages = {name: round(int(stage_ns[n]) / max(1, sampled), 1) for n, name in STAGES.items()}
    calls = {name: grown(name) for name in SYSTEM_CALLS}
    return {
        "worker": number,
        "tid": int(new["tid"]),
        "packets": packets,
        "pps": round(packets / seconds),
        "vectors": steps,
        "packets_per_vector": round(packets / steps, 1) if steps else 0.0,
        "cpu": round(cpu_ns / seconds / 1e9, 3),
        "ns_per_packet": round(sum(stages.values()), 1) if sampled else None,
        "stages": stages if sampled else {},
        "sampled_packets": sampled,
        "rx_waiting": round(grown("rx_waiting") / looks, 1) if looks else 0.0,
        "tx_waiting": round(grown("tx_waiting") / looks, 1) if looks else 0.0,
        "free_frames": int(new["free_frames"]),
        "kick_errors": grown("kick_errors"),
        "system_calls": calls,
        "system_calls_per_packet": round(sum(calls.values()) / packets, 4) if packets else None,
        "sleeps_per_s": round(calls["polls"] / seconds, 1),
    }
