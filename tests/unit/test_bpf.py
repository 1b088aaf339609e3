"""The filter machine against libpcap's own, over its programs and over any that `check` accepts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.all import ARP, ICMP, IP, TCP, UDP, Dot1Q, Ether, IPv6, raw

from dataplane.capture import filters
from dataplane.kernels import bpf
from dataplane.kernels.house import kernel
from xdp.abi import DTYPE

EXPRESSIONS = [
    "", "arp", "ip", "ip6", "tcp", "tcp port 80", "udp and host 10.0.0.1", "port 53 or icmp",
    "tcp[tcpflags] & (tcp-syn|tcp-fin) != 0", "net 10.0.0.0/8 and not port 22",
    "ip6 host fd00::1", "vlan 5", "less 60", "greater 100", "ip[8] < 5", "src portrange 1-100",
    "ether host 02:00:00:00:00:01", "ip6 proto 58", "tcp[((tcp[12] & 0xf0) >> 2):4] = 0x47455420",
    "ip[2:2] % 7 = 3 or ip[4:2] * 3 > 9000", "icmp[icmptype] = 8", "len % 5 = 1",
]  # fmt: skip
ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
PACKETS = [
    raw(one)
    for one in (
        ETHER / ARP(),
        ETHER / IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=53, dport=99) / (b"x" * 40),
        ETHER / IP(src="10.0.0.3", dst="11.0.0.2", ttl=4) / TCP(dport=80, flags="S"),
        ETHER / IP(src="10.0.0.3", dst="11.0.0.2") / TCP(dport=80) / b"GET / HTTP/1.1\r\n\r\n",
        ETHER / IP(dst="10.9.9.9", frag=3) / UDP(),
        ETHER / IP(dst="10.9.9.9") / ICMP() / (b"y" * 100),
        ETHER / IPv6(src="fd00::1", dst="fd00::2") / TCP(sport=22, flags="F"),
        ETHER / Dot1Q(vlan=5) / IP() / UDP(dport=53),
    )
]
PACKETS += [b"", bytes(13)]
WORDS = np.zeros(bpf.WORDS, np.int64)


@kernel
def _run(program, count, at, captured, length, scratch):
    return bpf.accepts(program, count, at, captured, length, scratch)


def ours(program: np.ndarray, packet: bytes, length: int | None = None) -> bool:
    """What the workers' machine says."""
    if not len(program):
        return True
    data = np.frombuffer(packet + bytes(1), np.uint8)
    code = np.ascontiguousarray(program)
    places = code.ctypes.data, len(code), data.ctypes.data, len(packet)
    return _run(*places, length or len(packet), WORDS.ctypes.data) != 0


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_say_what_libpcap_says(expression):
    program = filters.compile_filter(expression)
    bpf.check(program)
    for packet in PACKETS:
        for size in {len(packet), len(packet) // 2, max(0, len(packet) - 1)}:
            part = packet[:size]
            assert ours(program, part, len(packet)) == filters.accepts(program, part, len(packet))


CODES = sorted(bpf._CODES)
ONE = st.tuples(
    st.sampled_from(CODES),
    st.integers(0, 3),
    st.integers(0, 3),
    st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ONE, max_size=24), st.binary(max_size=80), st.integers(0, 100))
def test_any_program_that_passes_says_what_libpcap_says(instructions, packet, more):
    zeros = [(bpf.ST, 0, 0, n) for n in range(bpf.WORDS)]  # libpcap's words begin as they happen to
    program = np.zeros(bpf.WORDS + len(instructions) + 4, DTYPE["tap_instruction"])
    program[: bpf.WORDS] = zeros
    for number, (code, true, false, k) in enumerate(instructions, bpf.WORDS):
        if code & 7 in (bpf.ST, bpf.STX) or (code & 7 < 2 and code & 0xE0 == bpf.MEM):
            k %= bpf.WORDS
        if code & 7 == bpf.JMP and code & 0xF0 == bpf.JA:
            k %= 4
        if code & 7 == bpf.ALU and not code & bpf.SOURCE_X:
            k = k % 31 + 1  # what libpcap leaves undefined: shifts by 32 and more
        program[number] = (code, true, false, k)
    program["code"][bpf.WORDS + len(instructions) :] = bpf.RET | bpf.RETURN_A
    bpf.check(program)
    length = len(packet) + more
    assert ours(program, packet, length) == filters.accepts(program, packet, length)


@pytest.mark.parametrize(
    ("instructions", "words"),
    [
        ([(0x28, 0, 0, 12)], "does not return"),
        ([(0xFF, 0, 0, 0), (6, 0, 0, 0)], "unknown code 0xff"),
        ([(0x15, 0, 9, 0), (6, 0, 0, 0)], "beyond the end"),
        ([(0x05, 0, 0, 2**32 - 1), (6, 0, 0, 0)], "beyond the end"),
        ([(0x02, 0, 0, 16), (6, 0, 0, 0)], "word 16 of 16"),
        ([(0x34, 0, 0, 0), (6, 0, 0, 0)], "divides by zero"),
    ],
)
def test_programs_that_could_go_astray_are_refused(instructions, words):
    with pytest.raises(ValueError, match=words):
        bpf.check(np.array(instructions, DTYPE["tap_instruction"]))


def test_what_libpcap_refuses_is_said_in_its_words(monkeypatch):
    with pytest.raises(filters.FilterError, match="syntax error"):
        filters.compile_filter("host and and")
    monkeypatch.setattr(filters, "MOST", 3)
    with pytest.raises(filters.FilterError, match="instructions, limit 3"):
        filters.compile_filter("port 1 or port 2")
