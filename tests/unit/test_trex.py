"""The TRex server without a kernel: messages, streams that are refused, rows."""

import base64
import json

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from bench.trex import wire
from bench.trex.compile import compiled
from bench.trex.ports import Device
from bench.trex.streams import LIMITS, StreamError, parse

MACS = bytes.fromhex("020000000099"), bytes.fromhex("020000000011")
FRAME = bytes(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / IP() / UDP() / bytes(40))


def stream(*instructions, frame: bytes = FRAME, **more) -> dict:
    mode = {"type": "continuous", "rate": {"type": "pps", "value": 10}}
    packet = {"binary": base64.b64encode(frame).decode(), "meta": ""}
    vm = {"instructions": list(instructions)}
    return {"flags": 3, "mode": mode, "packet": packet, "vm": vm, "flow_stats": {}, **more}


def var(name: str = "v", **more) -> dict:
    given = {"type": "flow_var", "name": name, "size": 2, "op": "inc", "init_value": 0}
    return {**given, "min_value": 0, "max_value": 9, "step": 1, **more}


def write(offset: int = 34, name: str = "v") -> dict:
    return {"type": "write_flow_var", "name": name, "pkt_offset": offset, "add_value": 0}


def made(*instructions, group=None, **more):
    return compiled(parse(stream(*instructions, **more)), MACS, group)


# --- messages -------------------------------------------------------------------------------------


def echo(method: str, given: dict) -> dict:
    if method == "no":
        raise wire.RpcError("not here", wire.UNKNOWN)
    return {"method": method, **given}


def ask(said) -> dict:
    return json.loads(wire.answer(json.dumps(said).encode(), echo))


def test_a_call_and_its_answer():
    found = ask({"jsonrpc": "2.0", "id": 7, "method": "ping", "params": {"a": 1}})
    assert found == {"jsonrpc": "2.0", "id": 7, "result": {"method": "ping", "a": 1}}


def test_several_at_a_time_each_with_its_answer():
    one, two = ask([{"id": 1, "method": "ping"}, {"id": 2, "method": "no"}])
    assert one["result"] == {"method": "ping"}
    assert two["error"] == {"code": -32601, "message": "not here", "specific_err": "not here"}


def test_compressed_questions_have_compressed_answers():
    said = wire.pack({"id": 1, "method": "x" * 1000}, True)
    answer = wire.answer(said, echo)
    assert answer[:4] == bytes.fromhex("abe85cea")
    assert wire.unpack(answer) == (
        {"jsonrpc": "2.0", "id": 1, "result": {"method": "x" * 1000}},
        True,
    )


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b"\xab\xe8\x5c\xea\0\0\0\1nonsense", -32700),
        (b"\xab\xe8\x5c\xea\xff\xff\xff\xff", -32700),
        (b"7", -32600),
        (b'{"id": 1}', -32600),
        (b'{"method": "x", "params": []}', -32600),
    ],
)
def test_nonsense_is_answered(data, code):
    assert wire.unpack(wire.answer(data, echo))[0]["error"]["code"] == code


def test_ports_are_named_with_their_namespace():
    found = Device.parse("eth0@pod=02:00:00:00:00:01")
    assert (found.name, str(found.namespace), found.target) == (
        "eth0", "/run/netns/pod", "02:00:00:00:00:01",
    )  # fmt: skip
    assert Device.parse("eth0") == Device("eth0", None, "00:00:00:00:00:00")


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (stream(frame=bytes(4000)), "14..3400"),
        (stream(mode={"type": "bursty"}), "mode.type"),
        (stream(mode={"type": "continuous", "rate": {"type": "pps", "value": 0}}), "mode.*rate"),
        (stream({"type": "flow_var_dance"}), "flow_var_dance"),
        (stream(flow_stats={"enabled": True, "rule_type": "tpg"}), "stats and latency"),
        (stream(flow_stats={"enabled": True, "ieee_1588": True}), "not supported"),
        (stream(packet={"binary": "?"}), "packet.binary"),
        ({}, "mode: Field required"),
    ],
)
def test_streams_that_are_refused_whole(given, text):
    with pytest.raises(StreamError, match=text):
        parse(given)


@pytest.mark.parametrize(
    ("instructions", "text"),
    [
        ([write()], "no variable v"),
        ([var(), var()], "one name"),
        ([var(), write(255)], "must be below"),
        ([var(max_value=70000)], "no range"),
        ([var(init_value=11)], "begins at 11"),
        ([var(value_list=[70000])], "70000"),
        ([var(next_var="w")], "no such variable"),
        ([var(next_var="w"), var("w", next_var="v")], "in a ring"),
        ([var(f"v{n}") for n in range(9)], "at most 8"),
        ([var()] + [write()] * 13, "more than 12"),
        ([var(), {"type": "trim_pkt_size", "name": "v"}], "within 60"),
        ([{"type": "fix_checksum_ipv4", "pkt_offset": 15}], "no IPv4 header"),
        ([{"type": "fix_checksum_hw", "l2_len": 14, "l3_len": 24, "l4_type": 11}], "no UDP"),
    ],
)
def test_programs_that_the_generator_cannot_run(instructions, text):
    with pytest.raises(StreamError, match=text):
        made(*instructions)


def test_macs_come_from_the_packet_or_the_port():
    assert made().body[:12] == FRAME[:12]
    assert made(flags=0).body[:12] == MACS[0] + MACS[1]
    assert made(flags=1).body[:12] == MACS[0] + FRAME[6:12]
    assert made(flags=2).body[:12] == FRAME[:6] + MACS[1]


def test_a_group_is_marked_and_the_header_sums_up():
    body = made(group=5).body
    frame = Ether(body)
    assert frame[IP].id == LIMITS["GROUP_MARK"] + 5
    del frame[IP].chksum
    assert bytes(frame) == body


def test_who_drives_another_comes_before_it():
    found = made(var("b"), var("a", next_var="b"), write(36, "a"), write(34, "b")).row
    assert list(found["variables"]["driver"][:2]) == [0, 1]
    assert list(found["writes"]["variable"][:2]) == [0, 1]
    assert list(found["writes"]["offset"][:2]) == [36, 34]


def test_rates_in_every_unit():
    line, length = 10e9, 60
    for kind, value, pps in (
        ("pps", 5, 5),
        ("bps_L2", 64 * 8, 1),
        ("bps_L1", 84 * 8, 1),
        ("percentage", 100, line / 672),
    ):
        mode = {"type": "continuous", "rate": {"type": kind, "value": value}}
        assert parse(stream(mode=mode)).mode.rate.pps(length, line) == pytest.approx(pps)
