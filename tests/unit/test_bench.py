"""What the benchmark computes: summaries, ratios, intervals, histograms, budgets."""

import numpy as np
import pytest

from bench import checks, measure, results, searches
from bench.drivers import Trial
from bench.histogram import NONE, Histogram, highest, name
from bench.lab import LabError, eventually
from bench.results import Key, Results

PING = """PING 10.0.0.2 (10.0.0.2) 56(84) bytes of data.

--- 10.0.0.2 ping statistics ---
3 packets transmitted, {} received, 0% packet loss, time 402ms
rtt min/avg/max/mdev = 0.076/0.114/0.163/0.036 ms
"""
DNSPERF = """Statistics:

  Queries sent:         1000
  Queries per second:   52345.678
  Average Latency (s):  0.000381 (min 0.000021, max 0.001)
"""


def test_ping_summaries():
    found = checks.parse_ping(PING.format(3))
    assert (found.sent, found.received) == (3, 3)
    assert (found.least, found.average, found.most) == (0.076, 0.114, 0.163)
    with pytest.raises(LabError, match="1 of 3"):
        checks.parse_ping(PING.format(2))
    with pytest.raises(LabError, match="not a summary"):
        checks.parse_ping("ping: unknown host")


def test_dnsperf_summaries():
    assert measure.parse_dnsperf(DNSPERF) == {"per_s": 52.345678, "mean_us": pytest.approx(381)}
    with pytest.raises(LabError, match="not a summary"):
        measure.parse_dnsperf("usage:")


def test_waiting_ends_at_the_deadline():
    assert eventually(lambda: 7, "seven") == 7
    with pytest.raises(LabError, match="not within 0 s: never"):
        eventually(lambda: 0, "never", seconds=0)


# --- results --------------------------------------------------------------------------------------


def key(subject: str, quantity: str = "pps") -> Key:
    return Key("s", "p", "c", subject, quantity)


def test_ratios_are_of_turns_side_by_side_and_more_means_better():
    found = Results()
    for turn, (ours, theirs) in enumerate([(1.0, 2.0), (4.0, 2.0), (3.0, 1.0)]):
        for quantity in ("pps", "p50_us", "cores"):
            found.add(key("penstock", quantity), turn, ours)
            found.add(key("linux", quantity), turn, theirs)
    found.add(key("linux"), 3, 1000.0)  # penstock failed in this turn
    assert found.ratio(key("linux")) == 2.0
    assert found.ratio(key("linux", "p50_us")) == 0.5
    assert found.ratio(key("linux", "cores")) is None, "neither more nor less is better"
    assert found.ratio(key("penstock")) is None
    row = next(row for row in found.rows() if row["subject"] == "linux")
    assert (row["least"], row["median"], row["most"]) == (1.0, 2.0, 1000.0)


def test_an_interval_holds_the_median_and_narrows_with_more_turns():
    random = np.random.default_rng(1)
    few, many = random.normal(100, 5, 8), random.normal(100, 5, 200)
    widths = []
    for values in (few, many):
        low, high = results.bootstrap(values)
        assert low <= np.median(values) <= high
        widths.append(high - low)
    assert widths[1] < widths[0]
    assert results.bootstrap([3.0]) == (3.0, 3.0)
    assert results.bootstrap([1, 2, 3]) == results.bootstrap([1, 2, 3]), "the same each time"


def test_a_noisy_machine_is_said_to_be_one():
    quiet = {"foreign_share": 0.001, "steal_share": 0.001, "yardstick_variation": 0.02}
    assert not results.warnings(quiet)
    noisy = {"foreign_share": 0.4, "steal_share": 0.05, "yardstick_variation": 0.2}
    assert [line.split()[0] for line in results.warnings(noisy)] == ["other", "the", "the"]


def test_a_file_of_results_comes_back(tmp_path):
    found = Results()
    found.add(key("penstock"), 0, 1.5)
    found.noise.append({"yardstick_us": 500.0, "steal_share": 0.5})
    path = tmp_path / "a.json"
    results.dump(path, found.plain({"machine": {"cpu": "x"}}))
    whole = results.read(path)
    assert results.key_of(whole["rows"][0]) == key("penstock")
    assert whole["noise"]["steal_share"] == 0.5
    path.write_text('{"schema": 1}')
    with pytest.raises(LabError, match="not results of this version"):
        results.read(path)


# --- histograms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [7, 11])
def test_buckets_hold_what_they_say(bits):
    most = highest(2000, bits)
    assert (np.diff(most) > 0).all()
    for value in (0, 1, (1 << bits) - 1, 1 << bits, 12345, 99999):
        bucket = int(np.searchsorted(most, value))
        if bucket < len(most):
            assert most[bucket] - value <= value / (1 << (bits - 1)), value


def test_percentiles_of_a_histogram():
    found = Histogram.of_pairs([(10, 90), (100, 9), (1000, 1)])
    assert [found.percentile(p) for p in (0, 50, 90, 90.1, 99, 99.9)] == [
        10,
        10,
        10,
        100,
        100,
        1000,
    ]
    assert (found.count, found.most, found.mean) == (100, 1000, 28.0)
    assert NONE.percentile(50) == NONE.most == 0
    assert [name(p) for p in (50, 99, 99.9)] == ["p50_us", "p99_us", "p999_us"]


def test_histograms_add_up_and_others_can_read_them():
    from hdrh.histogram import HdrHistogram

    one, two = (
        Histogram.of_pairs([(1000, 2), (5000, 1)]),
        Histogram.of_pairs([(1000, 1), (7000, 4)]),
    )
    both = one + two
    assert list(zip(both.values, both.counts, strict=True)) == [(1000, 3), (5000, 1), (7000, 4)]
    decoded = HdrHistogram.decode(both.encode())
    assert decoded.get_total_count() == 8
    assert abs(decoded.get_value_at_percentile(50) - both.percentile(50)) <= 8


# --- searches -------------------------------------------------------------------------------------


class Pipe:
    """A session that forwards `most` frames a second, and bursts that its queue takes."""

    def __init__(self, most: float, queue: int = 1000) -> None:
        self.most, self.queue, self.trials = most, queue, 0

    def flood(self, seconds: float) -> Trial:
        return Trial(0, int(2 * self.most * seconds), int(self.most * seconds), seconds)

    def trial(self, rate: float, seconds: float, stamp: bool = False) -> Trial:
        self.trials += 1
        sent = int(rate * seconds)
        times = Histogram.of_pairs([(int(1e9 / self.most), sent)]) if stamp else NONE
        return Trial(rate, sent, min(sent, int(self.most * seconds)), seconds, times=times)

    def burst(self, frames: int) -> Trial:
        return Trial(0, frames, min(frames, self.queue), frames / 1e6)


def test_throughput_is_found():
    found = searches.throughput(Pipe(730_000), 2_000_000, searches.Goal(0.1, 0.3, 0.01))
    assert 0.98 * 730_000 <= found.ndr <= 730_001
    assert 0.98 * 730_000 <= found.pdr <= 1.01 * 730_000 / (1 - searches.PDR_LOSS)
    assert found.trials > 5


def test_frames_that_were_not_sent_count_only_when_they_are_many():
    assert "intended_count" not in searches.counts(Trial(1.0, 1000, 1000, 1.0, left_out=10))
    assert searches.counts(Trial(1.0, 900, 900, 1.0, left_out=100))["intended_count"] == 1000
    assert searches.counts(Trial(1.0, 10, 12, 1.0))["forwarding_count"] == 10, "others' frames"


def test_the_loss_curve_ends_where_nothing_is_lost():
    curve = searches.loss_curve(Pipe(1e6), 1e6, 0.1)
    assert curve[0] == (pytest.approx(1.5e6), pytest.approx(1 / 3, abs=1e-4))
    assert [loss for _, loss in curve[-2:]] == [0, 0]
    assert len(curve) < len(searches.CURVE)


@pytest.mark.parametrize("queue", [3, 16, 1000, 5_000_000])
def test_the_longest_burst(queue):
    found = searches.longest_burst(Pipe(1e6, queue), 1)
    if queue < searches.BURST_LEAST:
        assert found == 0
    else:
        assert queue / searches.BURST_WIDTH <= found or found == searches.BURST_MOST
        assert found <= queue


def test_a_trial_knows_its_loss():
    assert Trial(0, 100, 75, 2.0).loss == 0.25
    assert Trial(0, 100, 101, 2.0).loss == 0, "never negative"
    assert (Trial(0, 100, 75, 2.0).offered, Trial(0, 100, 75, 2.0).delivered) == (50, 37.5)
