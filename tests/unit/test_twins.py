"""The kernels against their plain-Python twins, on valid, mutated and random frames."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels.batch import (
    FLAG_FRAGMENT,
    FLAG_ICMP_ERROR,
    FLAG_LATER_FRAGMENT,
    KIND_ARP,
    VERDICT_DROP,
)
from dataplane.kernels.parse import parse
from tests import strategies
from tests.naive import forward, headers, node
from tests.worlds import POD_A
from xdp.abi import value

EXAMPLES = 400


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(strategies.frames, min_size=1, max_size=16))
def test_parse_is_its_twin(worlds, batch):
    world = worlds()
    world.load([(POD_A, frame) for frame in batch])
    parse(world.batch)
    b = world.batch
    for i, frame in enumerate(batch):
        try:
            expected = headers.parse(frame)
        except headers.Refused as refused:
            assert b.verdict[i] == VERDICT_DROP, (frame.hex(), str(refused))
            assert b.reason[i] == value(f"REASON_{refused}"), frame.hex()
            continue
        assert b.verdict[i] == 0, (frame.hex(), int(b.reason[i]))
        if expected["kind"] == "arp":
            assert b.kind[i] == KIND_ARP
            continue
        found = {
            "kind": int(b.kind[i]),
            "source": int(b.source_hi[i]) << 64 | int(b.source_lo[i]),
            "target": int(b.target_hi[i]) << 64 | int(b.target_lo[i]),
            "protocol": int(b.protocol[i]),
            "ttl": int(b.ttl[i]),
            "tos": int(b.tos[i]),
            "ip_length": int(b.ip_length[i]),
            "l4": int(b.l4[i]),
            "fragment": bool(b.flags[i] & FLAG_FRAGMENT),
            "later": bool(b.flags[i] & FLAG_LATER_FRAGMENT),
            "identification": int(b.fragment[i]) if b.flags[i] & FLAG_FRAGMENT else None,
            "ports": (int(b.source_port[i]), int(b.target_port[i])),
        }
        assert found == expected, frame.hex()
        source, target = found["ports"]
        word = source << 48 | target << 32 | found["protocol"] << 8 | found["kind"]
        assert b.word[i] == word
        assert b.hash[i] == forward.flow_hash(found)
        assert bool(b.flags[i] & FLAG_ICMP_ERROR) == headers.is_error(expected, frame[14:])


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(strategies.frames, min_size=1, max_size=16))
def test_the_decision_is_its_twin(worlds, batch):
    world = worlds("TUNNEL_VXLAN", 4, 1_000_000)
    world.now += 1_000_000_000
    world.forget()
    results = world.run([(POD_A, frame) for frame in batch])
    firsts: set = set()
    for i, (frame, result) in enumerate(zip(batch, results, strict=True)):
        expected = node.from_pod(POD_A, frame, firsts)
        assert result.sent or result.dropped or (result.held and expected == ("HELD", None))
        if expected is None:
            continue
        reason, egress = expected
        assert result.reason == value(f"REASON_{reason}"), frame.hex()
        if reason == "FORWARDED":
            assert result.sent
            assert result.egress == egress
        assert world.untouched(i, max(len(frame), 128))


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=2, max_size=200))
def test_sums_are_their_twin(data):
    from dataplane.kernels.house import fold16, kernel, sum16

    global _sum
    if _sum is None:

        @kernel
        def _sum(address, length):
            return fold16(sum16(address, length))

    array = np.frombuffer(data, np.uint8)
    assert _sum(array.ctypes.data, len(data)) == headers.ones_sum(data)


_sum = None
