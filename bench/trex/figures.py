"""Statistics under the names that TRex's client knows.

Rule: a figure that this server does not have is 0 and said so in the documentation, never made up.

Theory. Byte counts contain the frame check sequence, as a network card's do. Packet groups count
what each port has sent and received; latency is in microseconds, its histogram in TRex's decades
(one leading digit), while the whole one goes along as HdrHistogram's text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.histogram import Histogram
from bench.trex.ports import EVERYTHING, Port
from bench.trex.streams import LIMITS

SUB_BITS = 7  # of histogram.h
TIME_BUCKETS = LIMITS["TIME_BUCKETS"]
XSTATS = ("tx_left_out_packets", "rx_marked_packets")
UNKNOWN = frozenset(
    f"m_{name}"
    for name in (
        "cpu_util", "cpu_util_raw", "rx_cpu_util", "rx_core_pps", "bw_per_core", "platform_factor",
        "active_flows", "active_sockets", "open_flows", "socket_util", "tx_cps", "tx_expected_cps",
        "tx_expected_pps", "tx_expected_bps", "total_servers", "total_clients", "total_alloc_error",
    )
)  # fmt: skip
"""What this server does not know."""
ERRORS = {
    "drp": "lost", "ooo": "reordered", "dup": "duplicate", "sth": "too_high", "stl": "too_low",
}  # fmt: skip


def of_port(port: Port) -> dict[str, float]:
    """get_port_stats."""
    sent = port.counts()[EVERYTHING]
    received = port.receive_counts([EVERYTHING])[0]
    tx_pps, tx_bps, rx_pps, rx_bps = port.rates[EVERYTHING].tolist()
    return {
        "opackets": int(sent[0]),
        "obytes": int(sent[1]),
        "oerrors": 0,
        "ipackets": int(received[0]),
        "ibytes": int(received[1]),
        "ierrors": 0,
        "m_total_tx_pps": tx_pps,
        "m_total_tx_bps": tx_bps,
        "m_total_rx_pps": rx_pps,
        "m_total_rx_bps": rx_bps,
        "m_cpu_util": 0.0,
    }


def of_all(ports: Sequence[Port]) -> dict[str, float]:
    """get_global_stats."""
    tx_pps, tx_bps, rx_pps, rx_bps = sum(port.rates[EVERYTHING] for port in ports).tolist()
    left_out = sum(int(port.counts()[EVERYTHING, 4]) for port in ports)
    return {
        **dict.fromkeys(UNKNOWN, 0),
        "m_tx_pps": tx_pps,
        "m_tx_bps": tx_bps,
        "m_rx_pps": rx_pps,
        "m_rx_bps": rx_bps,
        "m_rx_drop_bps": max(0.0, tx_bps - rx_bps),
        "m_total_queue_full": left_out,
    }


def xstats(port: Port) -> list[int]:
    """get_port_xstats_values."""
    marked = port.receive_counts(range(EVERYTHING))
    return [int(port.counts()[EVERYTHING, 4]), int(marked[:, 0].sum())]


def of_groups(
    ports: Sequence[Port], groups: Mapping[int, int], versions: Mapping[int, int]
) -> dict:
    """get_pgid_stats. groups: number by TRex's id; versions: how often the id was given anew."""
    flow: dict[str, Any] = {}
    latency: dict[str, Any] = {}
    numbers = list(groups.values())
    sent = [port.counts() for port in ports]
    received = [port.receive_counts(numbers) for port in ports]
    for n, (name, group) in enumerate(groups.items()):
        flow[str(name)] = {
            "tp": _by_port(counts[group, 0] for counts in sent),
            "tb": _by_port(counts[group, 1] for counts in sent),
            "rp": _by_port(counts[n, 0] for counts in received),
            "rb": _by_port(counts[n, 1] for counts in received),
            "tps": _by_port(port.rates[group, 0] for port in ports),
            "tbs": _by_port(port.rates[group, 1] for port in ports),
            "rps": _by_port(port.rates[group, 2] for port in ports),
            "rbs": _by_port(port.rates[group, 3] for port in ports),
        }
        if group < LIMITS["TIMED_MAX"]:
            latency[str(name)] = of_times(ports, group)
    zero = _by_port(0 for _ in ports)
    flow["g"] = {"rx_err": zero, "tx_err": zero}
    old = sum(int(port.times["old"].sum()) for port in ports)
    bad = sum(int(port.times["bad"].sum()) for port in ports)
    latency["g"] = {"old_flow": old, "bad_hdr": bad}
    known = {str(name): versions[name] for name in groups}
    return {"flow_stats": flow, "latency": latency, "ver_id": known}


def _by_port(numbers: Any) -> dict[str, float]:
    return {str(n): np.asarray(one).item() for n, one in enumerate(numbers)}


def of_times(ports: Sequence[Port], group: int) -> dict[str, Any]:
    """Errors and latency of a timed group."""
    rows = [port.times[group] for port in ports]
    timed = sum(int(row["timed"]) for row in rows)
    place = slice(group * TIME_BUCKETS, (group + 1) * TIME_BUCKETS)
    counts = np.sum([port.buckets[place] for port in ports], axis=0)
    whole = Histogram.of_buckets(counts, SUB_BITS)
    least = [int(row["least_ns"]) for row in rows if row["timed"]]
    most = max(int(row["most_ns"]) for row in rows) / 1000
    return {
        "er": {name: sum(int(row[ours]) for row in rows) for name, ours in ERRORS.items()},
        "lat": {
            "average": sum(int(row["sum_ns"]) for row in rows) / 1000 / timed if timed else 0.0,
            "total_max": most,
            "total_min": min(least) / 1000 if least else 0.0,
            "last_max": most,
            "jit": max(int(row["jitter_ns"]) >> 4 for row in rows) / 1000,
            "histogram": decades(whole),
            "hdrh": whole.encode() if timed else "",
        },
    }


def decades(found: Histogram) -> dict[str, int]:
    """Return how many values have each leading digit, by its lower bound in microseconds."""
    counts: dict[str, int] = {}
    for value, count in zip(found.values.tolist(), found.counts.tolist(), strict=True):
        us = value // 1000
        unit = 10 ** (len(str(us)) - 1)
        bound = us // unit * unit
        counts[str(bound)] = counts.get(str(bound), 0) + count
    return counts
