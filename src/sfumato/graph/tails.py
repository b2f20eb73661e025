"""What calibration keeps of a quantity: histograms that merge exactly, and the bound that future runs stay within.

The tail model. Far out, the excess of a quantity over a level decays at least exponentially, at the rate that
calibration shows. With enough runs, their extremes alone are asked: each is one draw of a Gumbel law, whose scale is
that rate, however values depend on each other within a run. With few runs nothing is known of how they differ, and all
values are asked instead, by peaks over a threshold: of the generalised Pareto laws of no positive shape that the counts
do not contradict, the one that reaches farthest is believed; bounded quantities, such as uniform inputs, show their
end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["FEW_RUNS", "Histogram", "Sketch", "extreme_bound", "tail_bound"]

#: Most bins of a histogram; there are at least half as many where values vary.
_BINS = 48
#: Bins are no narrower than 2^-24 of the largest value, nor than 2^-60.
_FINEST, _LEAST = 24, -60
#: With fewer runs than this nothing is known of how runs differ.
FEW_RUNS = 8


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of values in [i w, (i + 1) w), w = 2^exponent, for i from ``first`` on.

    The width follows from the values alone (the smallest power of two with at most 48 bins from end to end), so a
    histogram is a function of the values counted, in whatever order and groups they were merged.
    """

    exponent: int
    first: int
    counts: tuple[int, ...]

    @staticmethod
    def of(values: Tensor) -> Histogram:
        """The histogram of finite values, at least one."""
        flat = values.reshape(-1).to(torch.float64)
        low, high = float(flat.min()), float(flat.max())
        exponent, top = _LEAST, max(abs(low), abs(high))
        if top > 0.0:
            exponent = max(exponent, math.frexp(top)[1] - _FINEST)
        if high > low:  # with narrower bins there would be 64 at least
            exponent = max(exponent, math.frexp(high - low)[1] - _BINS.bit_length())
        while _bin(high, exponent) - _bin(low, exponent) >= _BINS:
            exponent += 1
        first = _bin(low, exponent)
        places = (torch.floor(flat * 2.0**-exponent) - first).to(torch.int64)
        return Histogram(exponent, first, tuple(torch.bincount(places).tolist()))

    @property
    def width(self) -> float:
        return 2.0**self.exponent

    @property
    def total(self) -> int:
        return sum(self.counts)

    def central(self, share: float) -> tuple[float, float]:
        """The bins' ends beyond which, on each side, lies at most half of what ``share`` leaves of the values."""
        left = (1.0 - share) / 2.0 * self.total
        low, high = 0, len(self.counts)
        below = above = 0
        while low < high - 1 and below + self.counts[low] <= left:
            below, low = below + self.counts[low], low + 1
        while high > low + 1 and above + self.counts[high - 1] <= left:
            above, high = above + self.counts[high - 1], high - 1
        return (self.first + low) * self.width, (self.first + high) * self.width

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both multisets of values; exact, and the same in any order."""
        exponent = max(self.exponent, other.exponent)
        while True:
            a, b = self._coarser(exponent), other._coarser(exponent)
            first = min(a.first, b.first)
            last = max(a.first + len(a.counts), b.first + len(b.counts))
            if last - first <= _BINS:
                break
            exponent += 1
        counts = [0] * (last - first)
        for h in (a, b):
            for i, count in enumerate(h.counts):
                counts[h.first + i - first] += count
        return Histogram(exponent, first, tuple(counts))

    def _coarser(self, exponent: int) -> Histogram:
        by = exponent - self.exponent
        first = self.first >> by
        counts = [0] * (((self.first + len(self.counts) - 1) >> by) - first + 1)
        for i, count in enumerate(self.counts):
            counts[((self.first + i) >> by) - first] += count
        return Histogram(exponent, first, tuple(counts))

    def mirrored(self) -> Histogram:
        """The histogram of -x, but for values on an edge."""
        return Histogram(self.exponent, -self.first - len(self.counts), self.counts[::-1])

    def to_json(self) -> list[Any]:
        return [self.exponent, self.first, list(self.counts)]

    @staticmethod
    def from_json(data: Sequence[Any]) -> Histogram:
        exponent, first, counts = data
        return Histogram(int(exponent), int(first), tuple(int(count) for count in counts))


def _bin(x: float, exponent: int) -> int:
    return math.floor(math.ldexp(x, -exponent))


@dataclass(frozen=True, slots=True)
class Sketch:
    """One quantity at one call: histograms of all its values, and of the smallest and largest value of each run."""

    values: Histogram
    lows: Histogram
    highs: Histogram

    @staticmethod
    def of(values: Tensor) -> Sketch:
        """The sketch of one run."""
        low, high = values.min().reshape(1), values.max().reshape(1)
        return Sketch(Histogram.of(values), Histogram.of(low), Histogram.of(high))

    @property
    def runs(self) -> int:
        return self.highs.total

    def merge(self, other: Sketch) -> Sketch:
        return Sketch(
            self.values.merge(other.values), self.lows.merge(other.lows), self.highs.merge(other.highs)
        )

    def to_json(self) -> list[Any]:
        return [self.values.to_json(), self.lows.to_json(), self.highs.to_json()]

    @staticmethod
    def from_json(data: Sequence[Any]) -> Sketch:
        values, lows, highs = (Histogram.from_json(part) for part in data)
        return Sketch(values, lows, highs)

    def as_one_run(self, low: float, high: float) -> Sketch:
        """The same values as those of a single run, whose extremes are given."""
        extremes = (Histogram.of(torch.tensor([end], dtype=torch.float64)) for end in (low, high))
        return Sketch(self.values, *extremes)

    def above(self, high: float, risk: float) -> float:
        """The level that the largest value of a future run passes with probability ``risk``, by the tail model; at
        least ``high``, the largest seen."""
        if self.runs >= FEW_RUNS:
            return max(high, extreme_bound(self.highs, risk))
        return tail_bound(self.values, high, self.values.total / self.runs, risk)

    def below(self, low: float, risk: float) -> float:
        """As :meth:`above`, for the smallest value."""
        return -Sketch(self.values.mirrored(), self.highs.mirrored(), self.lows.mirrored()).above(-low, risk)


def extreme_bound(highs: Histogram, risk: float) -> float:
    """The level that one more draw passes with probability ``risk``: a Gumbel law with the mean and the deviation of at
    least two draws."""
    counts = np.array(highs.counts, dtype=np.float64)
    middles = (highs.first + 0.5 + np.arange(len(counts))) * highs.width
    total = counts.sum()
    mean = float((counts * middles).sum() / total)
    variance = float((counts * (middles - mean) ** 2).sum() / (total - 1))
    scale = math.sqrt(6.0 * max(variance, highs.width**2 / 12)) / math.pi
    return mean - scale * (float(np.euler_gamma) + math.log(-math.log1p(-risk)))


# ---- peaks over a threshold --------------------------------------------------------------------------------

#: Values that should lie above the threshold, at most half of all, in at least so many bins.
_PEAKS, _PEAK_BINS = 50, 3
#: Shapes that are tried; 0 is exponential, -1 uniform.
_SHAPES = np.array([0.0, -0.04, -0.08, -0.12, -0.16, -0.2, -0.25, -0.3, -0.4, -0.5, -0.65, -0.8, -1.0])
#: Scales that are tried, as multiples of the mean excess.
_SCALES = np.geomspace(0.3, 6.0, 60)
#: Values of one run are alike: so many count for one that is independent.
_CLUSTER = 8
#: How far below the largest log likelihood a law is still believed: one deviation.
_BELIEVED = 0.5


def tail_bound(h: Histogram, high: float, count: float, risk: float) -> float:
    """The level that the largest of ``count`` further values passes with probability ``risk``; at least ``high``.

    The union bound over ``count`` values needs no independence.
    """
    total = h.total
    peaks = min(_PEAKS, max(1, total // 2))
    above, j = 0, len(h.counts)
    while j > 0 and (above < peaks or len(h.counts) - j < _PEAK_BINS):
        j -= 1
        above += h.counts[j]
    threshold = (h.first + j) * h.width
    ratio = risk * total / (count * above)
    if ratio >= 1.0:
        return high
    counts = np.array(h.counts[j:], dtype=np.float64)
    middles = (np.arange(len(counts)) + 0.5) * h.width
    mean = max(float((counts * middles).sum() / above), h.width / 4)
    shape = _SHAPES[:, None]
    scale = _SCALES * mean * (1.0 - shape)
    edges = np.arange(len(counts) + 1) * h.width
    survival = _survival(edges[:, None, None], shape, scale)
    inside = survival[:-1] - survival[1:]
    hit = counts > 0
    with np.errstate(divide="ignore"):
        likelihood = (counts[hit, None, None] * np.log(inside[hit])).sum(0) / _CLUSTER
    # A bounded law has to reach the largest value that was seen.
    bent = np.where(shape < 0, shape, -1.0)
    ends = -scale / bent
    likelihood = np.where((shape == 0) | (ends >= high - threshold), likelihood, -np.inf)
    if not np.isfinite(likelihood).any():
        return high
    believed = likelihood >= likelihood.max() - _BELIEVED
    reach = np.where(shape < 0, ends * (1.0 - ratio**-bent), -scale * math.log(ratio))
    return max(high, threshold + float(reach[believed].max()))


def _survival(y: Any, shape: Any, scale: Any) -> Any:
    """P(excess > y) of the generalised Pareto law."""
    bent = np.where(shape < 0, shape, -1.0)
    bounded = np.maximum(1.0 + bent * y / scale, 0.0) ** (-1.0 / bent)
    return np.where(shape < 0, bounded, np.exp(-y / scale))
