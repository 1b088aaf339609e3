"""The fuzzer itself, for a moment: `make fuzz` runs it for ten million frames."""

from tests.fuzz.fuzz_frames import RATE, RECORDS, Fuzzer
from xdp.abi import value

ANSWERS = ("REASON_ANSWERED_ARP", "REASON_ANSWERED_ND", "REASON_ANSWERED_ECHO")


def test_a_short_fuzz(worlds):
    for tunnel, underlay in (("TUNNEL_VXLAN", 4), ("TUNNEL_GENEVE", 4), ("TUNNEL_VXLAN", 6)):
        fuzzer = Fuzzer(worlds(tunnel, underlay, RATE, 1, RECORDS), seed=7)
        fuzzer.run(60_000)
        assert len(fuzzer.reasons) > 15
        assert {value(name) for name in ANSWERS} <= set(fuzzer.reasons)
