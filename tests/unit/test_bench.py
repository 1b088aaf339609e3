"""What the benchmark computes: frames, summaries, ratios."""

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from bench import checks
from bench.generator import Flow
from bench.lab import LabError, eventually
from bench.report import Results

PING = """PING 10.0.0.2 (10.0.0.2) 56(84) bytes of data.

--- 10.0.0.2 ping statistics ---
3 packets transmitted, {} received, 0% packet loss, time 402ms
rtt min/avg/max/mdev = 0.076/0.114/0.163/0.036 ms
"""


@pytest.mark.parametrize("size", [64, 128, 1518])
def test_a_generated_frame_is_what_scapy_would_send(size):
    flow = Flow("0a:00:00:00:00:01", "0a:00:00:00:00:02", "10.244.1.2", "10.244.2.3", size)
    frame = flow.frame()
    assert len(frame) == size - 4
    payload = bytes(size - 4 - 42)
    ours = Ether(frame)
    theirs = (
        Ether(src=flow.source_mac, dst=flow.target_mac)
        / IP(src=flow.source, dst=flow.target, flags="DF", id=0)
        / UDP(sport=1024, dport=9, chksum=0)
        / payload
    )
    assert bytes(theirs) == frame
    assert ours[IP].chksum == Ether(bytes(theirs))[IP].chksum


def test_a_frame_that_is_too_short_is_refused():
    flow = Flow("0a:00:00:00:00:01", "0a:00:00:00:00:02", "10.244.1.2", "10.244.2.3", 45)
    with pytest.raises(LabError, match="frame size 45"):
        flow.frame()


def test_ping_summaries():
    found = checks.parse_ping(PING.format(3))
    assert (found.sent, found.received) == (3, 3)
    assert (found.least, found.average, found.most) == (0.076, 0.114, 0.163)
    with pytest.raises(LabError, match="1 of 3"):
        checks.parse_ping(PING.format(2))
    with pytest.raises(LabError, match="not a summary"):
        checks.parse_ping("ping: unknown host")


def test_ratios_are_of_turns_side_by_side_and_more_means_better():
    results = Results()
    for turn, (ours, theirs) in enumerate([(1.0, 2.0), (4.0, 2.0), (3.0, 1.0)]):
        results.add("s", "m", "penstock", turn, {"pps": ours, "p50_us": ours})
        results.add("s", "m", "linux", turn, {"pps": theirs, "p50_us": theirs})
    results.add("s", "m", "linux", 3, {"pps": 1000.0})  # penstock failed in this turn
    assert results.ratio(("s", "m", "linux", "pps")) == 2.0
    assert results.ratio(("s", "m", "linux", "p50_us")) == 0.5
    assert results.ratio(("s", "m", "penstock", "pps")) is None
    row = next(row for row in results.plain() if row["subject"] == "linux")
    assert (row["least"], row["median"], row["most"]) == (1.0, 2.0, 1000.0)


def test_waiting_ends_at_the_deadline():
    assert eventually(lambda: 7, "seven") == 7
    with pytest.raises(LabError, match="not within 0 s: never"):
        eventually(lambda: 0, "never", seconds=0)
