"""The fuzzer itself, for a moment: `make fuzz` runs it for ten million frames."""

from tests.fuzz.fuzz_frames import Fuzzer


def test_a_short_fuzz(worlds):
    for tunnel, underlay in (("TUNNEL_VXLAN", 4), ("TUNNEL_GENEVE", 4), ("TUNNEL_VXLAN", 6)):
        fuzzer = Fuzzer(worlds(tunnel, underlay), seed=7)
        fuzzer.run(60_000)
        assert len(fuzzer.reasons) > 12
