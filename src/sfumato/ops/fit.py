"""Fits of univariate functions as :class:`Series`: constant + linear part + a few sines, for one opening.

Fits are made once, by the client, when a plan is made; they travel in the plan as JSON numbers, so that every party
multiplies with the same words. A function that is no wave is continued beyond its interval by whatever suits the sines
best (a Fourier extension), so the period is one of a few multiples of the interval. Source: [SHAFT]; own: the choice
of period and of word sizes by the bits that an evaluation sends (docs/design/007).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfumato.errors import RangeError
from sfumato.protocol.series import Series, linear_word

__all__ = ["fit_series", "series_bits", "series_from_dict", "series_noise", "series_to_dict"]

Function = Callable[[Tensor], Tensor]
Array = npt.NDArray[np.float64]

_FIT_POINTS = 400
_CHECK_POINTS = 1201
_CENTRE_FRAC = 8
#: A series takes smaller coefficients only, and the sum of them amplifies noise.
_LARGEST, _SUM = 8.0, 120.0
#: Ridges that are tried: a soft one for the fewest sines, a firm one for small coefficients and so narrow words.
_RIDGES = (1e-7, 2e-5)
#: Periods that are tried, as multiples of the interval: dense near it for functions that end as they begin.
_STRETCHES = (1.0, 1.2, 1.5, 2.0, 2.8)
#: Where no more multipliers than these give periods as long as the interval, each is tried.
_FEW = 8
#: The share of a tolerance that the fit itself may take; rounding takes the rest at this many deviations.
_FIT_SHARE, _DEVIATIONS = 0.6, 4.0
#: Fraction bits of the linear coefficient that are tried: 1 keeps the half of SiLU and its kin.
_LINEAR_FRACS = (1, 8)
_LEAST_WORD, _MOST_WORD = 24, 63


def series_noise(series: Series, deviations: float = _DEVIATIONS) -> float:
    """What rounding adds to an evaluation's error: four standard deviations (6e-5 of the values lie beyond)."""
    return deviations * series.noise


def series_bits(series: Series, frac: int, out_frac: int | None = None, ring_bits: int = 64) -> int:
    """Bits that one evaluation of a value with ``frac`` fraction bits sends in all, per element."""
    drop = series.scale - (frac if out_frac is None else out_frac)
    wrap = max(0, ring_bits - series.word + drop)
    closing = 2 * ring_bits + (wrap + 2 if wrap else 0)
    return series.period_log2 + frac + 2 * len(series.cos) * series.word + closing


def fit_series(
    f: Function,
    lo: float,
    hi: float,
    *,
    tolerance: float,
    weight: Function | None = None,
    max_harmonics: int = 32,
    frac: int = 18,
    ring_bits: int = 64,
    linear: bool = True,
    deviations: float = _DEVIATIONS,
) -> Series:
    """The cheapest series for f on [lo, hi] whose error, rounding included, is at most ``tolerance``.

    Rounding counts with ``deviations`` of its noise. ``weight`` multiplies the error before it is compared (1/|f| gives
    relative error). ``frac``: fraction bits of the argument, at most; ``ring_bits``: those that are known of its words,
    all of its ring's or what a product tells that is not closed; ``linear=False``: sines alone, for any scale. When
    nothing meets the tolerance the most accurate fit is returned; its ``error`` says what it reaches.

    Raises:
        RangeError: the interval is empty, or f is not finite on it or too large for a word.
    """
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise RangeError(f"there is nothing to fit on [{lo}, {hi}]; calibrate on inputs that vary")
    problem = _Problem(f, lo, hi, weight, max_harmonics, frac, ring_bits, linear, deviations)
    low, size = 0, 4
    found = problem.cheapest(size, tolerance)
    while found is None and size < max_harmonics:
        low, size = size, min(2 * size, max_harmonics)
        found = problem.cheapest(size, tolerance)
    while found is not None and size - low > 1:
        middle = (low + size) // 2
        smaller = problem.cheapest(middle, tolerance)
        if smaller is None:
            low = middle
        else:
            found, size = smaller, middle
    if found is not None:
        return found
    best = problem.best(tolerance)
    if best is None:
        raise RangeError(
            f"no series of bounded coefficients fits a word on [{lo:g}, {hi:g}]; narrow the range"
        )
    return best


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A fit before its word sizes are chosen, and its weighted error without rounding."""

    series: Series
    miss: float


class _Problem:
    """One function on one interval: grids, weights, and the solver. Waves of a period are computed once."""

    def __init__(
        self,
        f: Function,
        lo: float,
        hi: float,
        weight: Function | None,
        most: int,
        frac: int,
        ring_bits: int,
        linear: bool,
        deviations: float,
    ) -> None:
        self.deviations = deviations
        middle = (lo + hi) / 2
        step = 2.0**-_CENTRE_FRAC
        # A centre that is a short fixed-point number; symmetric intervals keep 0 exactly.
        self.centre = (
            round(middle / step) * step if hi - lo > 8 * step else round(middle * 2.0**frac) / 2.0**frac
        )
        self.lo, self.hi = lo, hi
        self.span = 2 * max(hi - self.centre, self.centre - lo)
        self.most, self.frac, self.ring_bits = most, frac, ring_bits
        self.linear_fracs = (0, *_LINEAR_FRACS) if linear else (0,)
        turns = np.linspace(0.0, math.pi, _FIT_POINTS)
        x = middle - (hi - lo) / 2 * np.cos(turns)
        # Points to fit on, then points to check on, in one array: one evaluation gives both.
        self.x = np.concatenate([x, np.linspace(lo, hi, _CHECK_POINTS)])
        points = torch.from_numpy(self.x)
        self.y = f(points).to(torch.float64).numpy()
        if not np.isfinite(self.y).all():
            raise RangeError(f"the function is not finite on [{lo:g}, {hi:g}]")
        self.top = float(np.abs(self.y).max())
        self.w = weight(points).abs().numpy() if weight else np.ones_like(self.x)
        self.d = self.x - self.centre
        self._waves: dict[float, tuple[Array, Array]] = {}
        self._tried: list[_Candidate] = []

    def cheapest(self, harmonics: int, tolerance: float) -> Series | None:
        """The cheapest series of this size within the tolerance, over periods and linear parts, if there is one."""
        found: list[Series] = []
        for period_log2, multiplier in self._periods():
            for linear_frac, ridge in product(self.linear_fracs, _RIDGES):
                candidate = self._solve(
                    period_log2, multiplier, harmonics, linear_frac, ridge, _FIT_SHARE * tolerance
                )
                if candidate is None:
                    continue
                self._tried.append(candidate)
                if candidate.miss <= _FIT_SHARE * tolerance:
                    sized = self._sized(candidate, tolerance)
                    found += [] if sized is None else [sized]
        return (
            min(found, key=lambda g: series_bits(g, self.frac, ring_bits=self.ring_bits)) if found else None
        )

    def _periods(self) -> list[tuple[int, int]]:
        """(period_log2, multiplier) of the periods that are tried; all there are where these are few."""
        found = dict.fromkeys(
            _period(self.span * stretch, self.frac, self.ring_bits) for stretch in _STRETCHES
        )
        period_log2, most = next(iter(found))
        if most > _FEW:
            return list(found)
        return [
            (period_log2, m) for m in range(most, 0, -1) if 2.0**period_log2 / m <= _STRETCHES[-1] * self.span
        ]

    def best(self, tolerance: float) -> Series | None:
        """The most accurate of all fits that were tried, in the widest words that hold it."""
        for candidate in sorted(self._tried, key=lambda c: c.miss)[:5]:
            sized = self._sized(candidate, tolerance + candidate.miss, force=True)
            if sized is not None:
                return sized
        return None

    def _basis(self, period: float, harmonics: int) -> Array:
        """Columns 1, cosines, sines at every point."""
        if period not in self._waves:
            angle = np.outer(self.d, np.arange(1, self.most + 1)) * (2 * math.pi / period)
            self._waves[period] = np.cos(angle), np.sin(angle)
        cos, sin = self._waves[period]
        return np.concatenate([np.ones((len(self.x), 1)), cos[:, :harmonics], sin[:, :harmonics]], 1)

    def _solve(
        self, period_log2: int, multiplier: int, harmonics: int, linear_frac: int, ridge: float, goal: float
    ) -> _Candidate | None:
        """The fit of one shape; None when its coefficients stay too large. ``linear_frac`` 0: no linear part."""
        fit, check = slice(0, _FIT_POINTS), slice(_FIT_POINTS, None)
        period = 2.0**period_log2 / multiplier
        basis = self._basis(period, harmonics)
        linear = 0.0
        if linear_frac:
            ratio = self.d[fit, None] / (period / 2)
            first = _least_squares(
                np.concatenate([ratio, basis[fit]], 1), self.y[fit], self.w[fit], _RIDGES[-1]
            )
            linear = round(float(first[0]) / (period / 2) * 2.0**linear_frac) / 2.0**linear_frac
            if not linear:
                return None
        rest = self.y - linear * self.d
        emphasis = self.w[fit].copy()
        best: _Candidate | None = None
        for round_ in range(7):
            c = _least_squares(basis[fit], rest[fit], emphasis, ridge)
            while not _small(c[1:]) and ridge < 0.05:
                ridge *= 8
                c = _least_squares(basis[fit], rest[fit], emphasis, ridge)
            if not _small(c[1:]):
                break
            misses = np.abs(basis @ c - rest)
            weighted = misses * self.w
            miss = float(weighted[check].max())
            if best is None or miss < best.miss:
                series = Series(
                    self.lo, self.hi, self.centre, period_log2, multiplier, float(c[0]), linear, linear_frac,
                    tuple(c[1 : harmonics + 1].tolist()), tuple(c[harmonics + 1 :].tolist()),
                    4, 4, 64, float(misses[check].max()),
                )  # fmt: skip
                best = _Candidate(series, miss)
            if miss <= goal or (round_ == 0 and miss > 5 * goal):
                break
            # Lawson: weight follows the error, so that least squares approaches the minimax fit.
            emphasis = emphasis * np.sqrt(np.maximum(weighted[fit] / weighted[fit].max(), 1e-3))
            emphasis = emphasis / emphasis.max()
        return best

    def _sized(self, candidate: _Candidate, tolerance: float, *, force: bool = False) -> Series | None:
        """The narrowest words whose rounding keeps the candidate within the tolerance."""
        heaviest = float(self.w.max())
        # Small functions keep two bits above the point: a result may ask for few fraction bits.
        above = 2 + math.ceil(math.log2(max(1.0, self.top * 1.05 + candidate.series.error)))
        last: Series | None = None
        for dealt in range(6, 30):
            public = min(dealt + 1, 28)
            scale = dealt + public
            short = 0 if not candidate.series.linear else self.frac + candidate.series.linear_frac - scale
            if short > 0:
                public += short
                scale += short
            if self._odd(candidate.series, scale, scale + above):
                public, scale = public + 1, scale + 1
            word = max(_LEAST_WORD, scale + above)
            word += -word % 2
            if public > 28 or word > _MOST_WORD:
                break
            if word > self._longest(candidate.series, scale):
                continue
            last = replace(candidate.series, dealt=dealt, public=public, word=word)
            if candidate.miss + series_noise(last, self.deviations) * heaviest <= tolerance:
                return last
        return last if force else None

    def _longest(self, series: Series, scale: int) -> int:
        """Bits of the longest word that holds a series at ``scale``."""
        if not series.linear:
            return _MOST_WORD
        return linear_word(self.ring_bits, self.frac, scale, series.linear_frac)

    def _odd(self, series: Series, scale: int, word: int) -> bool:
        """Whether the bit that makes a word even has to lie below the point, where a line leaves none above."""
        return word % 2 == 1 and word > _LEAST_WORD and word + 1 > self._longest(series, scale)


def _period(length: float, frac: int, ring_bits: int) -> tuple[int, int]:
    """(period_log2, multiplier, mostly 8..15): a period close above ``length`` whose phase can be opened."""
    period_log2 = math.floor(math.log2(length)) + 4
    while period_log2 + frac < 12:
        period_log2 += 1
    while period_log2 + frac > min(48, ring_bits):
        period_log2 -= 1
    return period_log2, min(255, max(1, math.floor(2.0**period_log2 / length + 1e-9)))


def _small(coefficients: Array) -> bool:
    sizes = np.abs(coefficients)
    return bool(sizes.max() < _LARGEST and sizes.sum() <= _SUM)


def _least_squares(basis: Array, y: Array, w: Array, ridge: float) -> Array:
    """Weighted ridge least squares; the ridge keeps the coefficients of a Fourier extension small."""
    scaled = w / w.mean()
    a, b = basis * scaled[:, None], y * scaled
    # Normal equations: the ridge bounds their condition, and they are several times faster than a QR.
    found: Array = np.linalg.solve(a.T @ a + ridge**2 * len(a) * np.eye(basis.shape[1]), a.T @ b)
    return found


def series_to_dict(series: Series) -> dict[str, Any]:
    """A series as JSON numbers; Python prints floats so that they read back to the same bits."""
    data = asdict(series)
    return {**data, "cos": list(series.cos), "sin": list(series.sin)}


def series_from_dict(data: Mapping[str, Any]) -> Series:
    """The inverse of :func:`series_to_dict`."""
    whole = ("period_log2", "multiplier", "linear_frac", "dealt", "public", "word")
    numbers: dict[str, Any] = {k: int(v) if k in whole else v for k, v in data.items()}
    for k in ("lo", "hi", "centre", "constant", "linear", "error"):
        numbers[k] = float(data[k])
    return Series(**{**numbers, "cos": tuple(map(float, data["cos"])), "sin": tuple(map(float, data["sin"]))})
