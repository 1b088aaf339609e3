"""The generator's field engine against its twin, frame by frame."""

import base64
from itertools import islice

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from bench.trex.compile import compiled
from bench.trex.streams import LAYOUT, LIMITS, parse
from tests.naive.streams import frames
from xdp import artifacts
from xdp.object import BpfObject, ObjectSpec
from xdp.run import prog_run

pytestmark = pytest.mark.root
MACS = bytes(6), bytes(6)
RUNNING = LIMITS["STREAM_RUNNING"]
COUNT = 12


class Engine:
    """The program with one stream, run frame by frame without live frames."""

    def __init__(self) -> None:
        self.bpf = BpfObject(ObjectSpec.load(artifacts.find("streams.bpf.o")))
        maps = self.bpf.maps
        self.control = maps["control"].mmap(LAYOUT["stream_control"])
        self.rows = maps["streams"].mmap(LAYOUT["stream"])
        self.bodies = maps["bodies"].mmap(LAYOUT["stream_body"])
        self.lists = maps["lists"].mmap(np.dtype("<u8"))

    def load(self, stream: dict) -> None:
        made = compiled(parse(stream), MACS, None)
        for name in self.control.dtype.names:
            self.control[name] = 0
        row = made.row.copy()
        row["gap"], row["left"], row["bursts_left"] = 1, row["burst"], row["bursts"]
        row["state"] = RUNNING
        self.lists[: len(made.values)] = made.values
        self.bodies["bytes"][0] = 0
        self.bodies["bytes"][0][: len(made.body)] = np.frombuffer(made.body, np.uint8)
        self.rows[0] = row
        self.control["streams"] = 1

    def frame(self) -> bytes:
        """The next frame; empty: none was due."""
        before = int(self.rows[0]["sent"])
        found = prog_run(self.bpf.programs["transmit"], bytes(LIMITS["FRAME_MOST"]))
        return found.data if int(self.rows[0]["sent"]) > before else b""


@pytest.fixture(scope="module")
def engine():
    made = Engine()
    yield made
    made.bpf.close()


SIZES = st.sampled_from([1, 2, 4, 8])


@st.composite
def variables(draw, name: str) -> dict:
    size = draw(SIZES)
    least = draw(st.integers(0, 200))
    most = least + draw(st.integers(0, 40))
    one = {
        "type": "flow_var",
        "name": name,
        "size": size,
        "op": draw(st.sampled_from(["inc", "dec"])),
    }
    one |= {"min_value": least, "max_value": most, "step": draw(st.integers(1, 5))}
    one["init_value"] = draw(st.integers(least, most))
    if draw(st.booleans()):
        one["value_list"] = draw(
            st.lists(st.integers(0, (1 << 8 * size) - 1), min_size=1, max_size=5)
        )
    return one


@st.composite
def programs(draw, ports_at: int, body_at: int, end: int) -> list[dict]:
    """Variables, a tuple or none, writes into a port and the payload."""
    names = ["a", "b", "c"][: draw(st.integers(1, 3))]
    found = [draw(variables(name)) for name in names]
    if len(names) > 1 and draw(st.booleans()):
        found[0]["next_var"] = "b"
    sizes = {one["name"]: one["size"] for one in found}
    if draw(st.booleans()):
        found.append({
            "type": "tuple_flow_var", "name": "t", "ip_min": 0x10000001, "ip_max": 0x10000003,
            "port_min": 5, "port_max": 7, "limit_flows": draw(st.integers(0, 9)),
        })  # fmt: skip
        sizes |= {"t.ip": 4, "t.port": 2}
    for name in draw(st.lists(st.sampled_from(sorted(sizes)), min_size=1, max_size=4)):
        big = draw(st.booleans())
        common = {"name": name, "add_value": draw(st.integers(0, 9)), "is_big_endian": big}
        if draw(st.booleans()):
            width = draw(st.sampled_from([1, 2, 4]))
            at = draw(st.integers(body_at, end - width))
            mask = draw(st.integers(0, (1 << 8 * width) - 1))
            one = {"type": "write_mask_flow_var", "pkt_offset": at, "pkt_cast_size": width}
            found.append({**one, **common, "mask": mask, "shift": draw(st.integers(-7, 7))})
        elif sizes[name] == 2 and draw(st.booleans()):
            found.append({"type": "write_flow_var", "pkt_offset": ports_at, **common})
        else:
            at = draw(st.integers(body_at, end - sizes[name]))
            found.append({"type": "write_flow_var", "pkt_offset": at, **common})
    return found


@st.composite
def streams(draw) -> dict:
    six, tcp = draw(st.booleans()), draw(st.booleans())
    ip = IPv6(src="fd00::1", dst="fd00::2") if six else IP(src="16.0.0.1", dst="48.0.0.1")
    l4 = TCP(sport=1, dport=2) if tcp else UDP(sport=1, dport=2)
    payload = draw(st.binary(min_size=24, max_size=400))
    data = bytes(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / ip / l4 / payload)
    ports_at = 54 if six else 34
    body_at = ports_at + (20 if tcp else 8)
    end = min(len(data) - 3, LIMITS["WRITE_REACH"])
    program = draw(programs(ports_at, body_at, end))
    if draw(st.booleans()):
        l4_type = 13 if tcp else 11
        fix = {"type": "fix_checksum_hw", "l2_len": 14, "l3_len": ports_at - 14, "l4_type": l4_type}
        program.append(fix)
    return {
        "flags": 3,
        "mode": {"type": "continuous", "rate": {"type": "pps", "value": 1}},
        "packet": {"binary": base64.b64encode(data).decode()},
        "vm": {"instructions": program},
    }


@given(streams())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_frames_are_those_of_the_twin(engine, stream):
    template = base64.b64decode(stream["packet"]["binary"])
    engine.load(stream)
    expected = islice(frames(template, stream["vm"]["instructions"]), COUNT)
    for n, frame in enumerate(expected):
        assert engine.frame() == frame, n


def plain(**mode) -> dict:
    data = bytes(Ether() / IP() / UDP() / bytes(40))
    return {
        "flags": 3,
        "mode": {"rate": {"type": "pps", "value": 1}, **mode},
        "packet": {"binary": base64.b64encode(data).decode()},
    }


@pytest.mark.parametrize(
    ("mode", "count"),
    [
        ({"type": "single_burst", "total_pkts": 5}, 5),
        ({"type": "multi_burst", "pkts_per_burst": 3, "count": 2, "ibg": 0}, 6),
    ],
)
def test_bursts_end_to_the_frame(engine, mode, count):
    engine.load(plain(**mode))
    found = [engine.frame() for _ in range(count + 20)]
    assert sum(bool(frame) for frame in found) == count


def test_random_values_stay_within_and_repeat_when_they_are_to(engine):
    for kind, more in (
        ("flow_var", {"op": "random", "init_value": 3, "step": 1}),
        ("flow_var_rand_limit", {"limit": 4, "seed": 7}),
    ):
        stream = plain(type="continuous")
        variable = {"type": kind, "name": "r", "size": 2, "min_value": 3, "max_value": 900, **more}
        write = {"type": "write_flow_var", "name": "r", "pkt_offset": 34, "add_value": 0}
        stream["vm"] = {"instructions": [variable, write]}
        engine.load(stream)
        found = [int.from_bytes(engine.frame()[34:36], "big") for _ in range(40)]
        assert all(3 <= value <= 900 for value in found)
        assert len(set(found)) > 2
        if kind == "flow_var_rand_limit":
            assert found == found[:4] * 10


@pytest.mark.parametrize("lengths", [range(60, 200), range(1500, 1580), range(3330, 3401)])
def test_every_byte_of_every_length(engine, lengths):
    for length in lengths:
        data = bytes(Ether() / IP()) + bytes(1 + n % 251 for n in range(length - 34))
        stream = plain(type="continuous")
        stream["packet"]["binary"] = base64.b64encode(data).decode()
        engine.load(stream)
        assert engine.frame() == data, length


def test_a_variable_is_the_length(engine):
    stream = plain(type="continuous")
    variable = {"type": "flow_var", "name": "n", "size": 2, "op": "inc", "init_value": 60}
    variable |= {"min_value": 60, "max_value": 63, "step": 1}
    stream["vm"] = {"instructions": [variable, {"type": "trim_pkt_size", "name": "n"}]}
    engine.load(stream)
    assert [len(engine.frame()) for _ in range(6)] == [60, 61, 62, 63, 60, 61]
