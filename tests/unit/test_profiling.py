"""What `penstock profile` makes of counters and of perf's words."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from dataplane.profiling import flame, hardware, stacks, window
from xdp.abi import DTYPE, ENUM, value

SCRIPT = """worker-0  42
\tffffffff81000010 veth_xmit+0x10
\tffffffff81000020 __sys_sendto
\tffffffff81000030 __x64_sys_sendto
\t    7f0000000001 [unknown]

worker-0  42
\t    7f0000000001 [unknown]

my task  7
\tffffffffc0000001 bpf_prog_0123456789abcdef_pod_rx
\tffffffff81000040 veth_poll
\tffffffff81000050 net_rx_action
\tffffffff81000060 do_softirq

idle  0
\tffffffff81000070 default_idle
"""
COUNTED = """<not supported>;;cycles;0;100.00;;
1234;;instructions;5;100.00;;
;;
12.5;;context-switches:u;5;100.00;;
"""


def moment(when: float, by_stages: int, by_xdp: int, **fields) -> window.Moment:
    row = np.zeros(1, DTYPE["worker_stats"])
    row["tid"] = 42
    for name, number in fields.items():
        if name.startswith("STAGE_"):
            row["stage_ns"][0][value(name)] = number
        else:
            row[name] = number
    return window.Moment(when, row, by_stages, by_xdp, (int(when * 5e8),))


@pytest.fixture
def busy() -> dict:
    one = moment(0.0, 0, 0)
    two = moment(
        2.0, 1000, 3000, packets=1000, steps=100, sampled_steps=10, sampled_packets=100, polls=4,
        kicks=50, yields=6, rx_waiting=30, STAGE_PARSE=2000, STAGE_TRANSMIT=100_000,
    )  # fmt: skip
    return window.between(one, two)


def test_a_window_is_a_difference(busy):
    (row,) = busy["workers"]
    assert (row["pps"], row["packets_per_vector"], row["cpu"]) == (500, 10.0, 0.5)
    assert row["stages"]["parse"] == 20.0
    assert row["ns_per_packet"] == 1020.0
    assert row["system_calls"] == {"polls": 4, "kicks": 50, "yields": 6}
    assert row["system_calls_per_packet"] == 0.06
    assert (row["rx_waiting"], row["sleeps_per_s"]) == (3.0, 2.0)
    assert busy["flow_table"] == {"packets": 3000, "pps": 1500, "hit_rate": 0.75}
    assert set(row["stages"]) == set(window.STAGES.values())
    assert len(window.STAGES) == len(ENUM["stage"])


def test_an_idle_window_has_no_averages():
    found = window.between(moment(0.0, 5, 5), moment(1.0, 5, 5))
    (row,) = found["workers"]
    assert (row["ns_per_packet"], row["stages"], row["system_calls_per_packet"]) == (None, {}, None)
    assert found["flow_table"]["hit_rate"] is None


def test_hardware_counters_that_are_not_there_are_none():
    found = hardware.parse(COUNTED)
    assert (found["cycles"], found["instructions"], found["context-switches"]) == (None, 1234, 12)
    assert found["dTLB-load-misses"] is None
    assert hardware.finish(None) == (dict.fromkeys(hardware.EVENTS), hardware.MISSING)


def test_samples_are_read_outermost_first():
    found = list(stacks.parse(SCRIPT.splitlines()))
    tasks = [("worker-0", 42), ("worker-0", 42), ("my task", 7), ("idle", 0)]
    assert [(one.comm, one.tid) for one in found] == tasks
    assert [name for _, name in found[0].frames][-1] == "veth_xmit"


def test_stacks_stand_under_what_caused_them(busy):
    found = stacks.folded(stacks.parse(SCRIPT.splitlines()), busy)
    sample = pytest.approx(1 / stacks.HERTZ)
    kernel = ("worker 0", "transmit", "__x64_sys_sendto", "__sys_sendto", "veth_xmit")
    assert found[kernel] == sample
    other = ("network receive in other tasks", "my task", "net_rx_action", "veth_poll")
    assert found[*other, "bpf_prog_0123456789abcdef_pod_rx"] == sample
    assert found["worker 0", "parse"] == pytest.approx(20e-6), "as the worker has timed it"
    own = sum(weight for stack, weight in found.items() if stack[0] == "worker 0")
    assert own == pytest.approx(2 / stacks.HERTZ), "its two samples, no more"
    assert not any("default_idle" in stack for stack in found)


def test_without_perf_the_stages_remain(busy):
    found = stacks.folded([], busy)
    assert found["worker 0", "transmit"] == pytest.approx(1e-3)
    assert found["worker 0", "parse"] == pytest.approx(20e-6)


STACKS = {("a", "<b>"): 3.0, ("a",): 1.0, ("c",): 1e-9}


def test_the_svg_is_one_and_its_widths_are_time(tmp_path):
    path = tmp_path / "graph.svg"
    flame.write(STACKS, path, "title & more")
    root = ET.fromstring(path.read_text())
    name = "{http://www.w3.org/2000/svg}"
    widths = {
        group.find(f"{name}title").text.split(":")[0]: float(group.find(f"{name}rect").get("width"))
        for group in root.iter(f"{name}g")
    }
    assert set(widths) == {"all", "a", "<b>"}, "what has no width is not drawn"
    assert widths["<b>"] == pytest.approx(0.75 * widths["all"], rel=0.01)


def test_speedscope_and_other_names(tmp_path):
    found = flame.speedscope(STACKS, "t")
    frames = [one["name"] for one in found["shared"]["frames"]]
    (profile,) = found["profiles"]
    back = {
        tuple(frames[n] for n in sample): weight
        for sample, weight in zip(profile["samples"], profile["weights"], strict=True)
    }
    assert back == STACKS
    assert profile["endValue"] == sum(STACKS.values())
    with pytest.raises(ValueError, match="speedscope"):
        flame.write(STACKS, tmp_path / "graph.png", "t")
