"""Histograms of times: log-linear buckets in C and BPF, HdrHistogram's files for everybody else.

Rule: a histogram is values and how often they came; percentiles are of these, never averaged.

Theory. Values below 2**bits stand alone, above that each power of two has 2**(bits - 1) buckets, so
an error is below 2**(1 - bits). A bucket is known by the highest value that falls into it, as
HdrHistogram does. Merging turns of a run adds counts; `encode` gives HdrHistogram's compressed
text (V2), which its own tools plot.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

LONGEST_NS = 3_600_000_000_000
DIGITS = 3
PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99)


def highest(buckets: int, bits: int) -> np.ndarray:
    """Return the highest value of each bucket, int64[buckets]."""
    bucket = np.arange(buckets, dtype=np.int64)
    half = 1 << (bits - 1)
    shift = np.minimum(np.maximum(bucket // half - 1, 0), 62 - bits)
    return np.where(bucket < 2 * half, bucket, ((bucket - shift * half + 1) << shift) - 1)


@dataclass(frozen=True)
class Histogram:
    """Values, ascending, and their counts."""

    values: np.ndarray  # int64
    counts: np.ndarray  # int64

    @classmethod
    def of_buckets(cls, counts: np.ndarray, bits: int) -> Self:
        """Take what C or BPF has counted."""
        used = np.flatnonzero(counts)
        return cls(highest(len(counts), bits)[used], counts[used].astype(np.int64))

    @classmethod
    def of_pairs(cls, pairs: list[tuple[int, int]]) -> Self:
        """Take (value, count) pairs, ascending."""
        values, counts = zip(*pairs, strict=True) if pairs else ((), ())
        return cls(np.array(values, np.int64), np.array(counts, np.int64))

    @property
    def count(self) -> int:
        """How many values."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Their mean, 0 of none."""
        return float((self.values * self.counts).sum() / self.count) if self.count else 0.0

    @property
    def most(self) -> int:
        """The largest, 0 of none."""
        return int(self.values[-1]) if len(self.values) else 0

    def percentile(self, percent: float) -> int:
        """Return the value below which `percent` of all lie, 0 of none."""
        if not self.count:
            return 0
        wanted = max(1, int(np.ceil(self.count * percent / 100 - 1e-9)))
        return int(self.values[np.searchsorted(np.cumsum(self.counts), wanted)])

    def __add__(self, other: "Histogram") -> "Histogram":
        values, where = np.unique(np.concatenate([self.values, other.values]), return_inverse=True)
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, where, np.concatenate([self.counts, other.counts]))
        return Histogram(values, counts)

    def microseconds(self) -> dict[str, float]:
        """Return p50_us, p90_us, .. of values in ns."""
        found = {name(p): self.percentile(p) / 1000 for p in PERCENTILES}
        return {**found, "mean_us": self.mean / 1000, "max_us": self.most / 1000}

    def encode(self) -> str:
        """Return HdrHistogram's text of values in ns, three digits."""
        from hdrh.histogram import HdrHistogram

        whole = HdrHistogram(1, LONGEST_NS, DIGITS)
        for value, count in zip(self.values.tolist(), self.counts.tolist(), strict=True):
            whole.record_value(min(max(value, 1), LONGEST_NS), count)
        return whole.encode().decode()


def name(percent: float) -> str:
    """Return the name of a percentile: p50_us, p99_us, p999_us."""
    return "p" + f"{percent:g}".replace(".", "") + "_us"


NONE = Histogram.of_pairs([])
