"""Fits of univariate functions as :class:`Series`: constant + linear + quadratic + a few sines, for one
opening.

Fits are made once, by the client, when a plan is made; they travel in the plan as JSON numbers, so that
every party multiplies with the same words. Source: [SHAFT]; own: short polynomial
coefficients are rounded first and the sines refitted to what is left, so that rounding them costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfumato.errors import RangeError
from sfumato.protocol.base import Series

__all__ = ["fit_series", "series_bits", "series_from_dict", "series_noise", "series_to_dict"]

Function = Callable[[Tensor], Tensor]
Array = npt.NDArray[np.float64]

#: Error per unit of sum |coefficients|: dealt sines are rounded to 2^-22, public ones are good to 2^-23.
_SINE_NOISE = 2.0**-22
_FIT_POINTS = 400
_CHECK_POINTS = 1501
_CENTRE_FRAC = 8
#: A series takes smaller coefficients only.
_LARGEST = 8.0
_RIDGE = 2e-5


def series_noise(series: Series) -> float:
    """What rounded sines add to the error of an evaluation, at most."""
    return _SINE_NOISE * sum(abs(c) for c in (*series.cos, *series.sin))


def series_bits(series: Series, frac: int) -> int:
    """Bits that one evaluation at ``frac`` fraction bits sends in all, per element of Z64."""
    squared = series.quadratic != 0.0
    opened = 64 if squared else series.period_log2 + frac
    return opened + 64 * (2 * len(series.cos) + squared) + 2 * 64 + (frac + Series.POLY_FRAC) + 2


def fit_series(
    f: Function,
    lo: float,
    hi: float,
    *,
    tolerance: float,
    weight: Function | None = None,
    max_harmonics: int = 24,
    coefficient_sum: float = 24.0,
    quadratic: bool | None = None,
) -> Series:
    """The cheapest series for f on [lo, hi] whose error, sine noise included, is at most ``tolerance``.

    ``weight`` multiplies the error before it is compared (1/|f| gives relative error). Periods are powers of
    two: the smallest that covers the interval, and twice and four times that (a Fourier extension, for
    functions that are not periodic). Without ``quadratic`` fewer bits are opened, so it is preferred at
    equal size. When nothing meets the tolerance the most accurate fit is returned; its ``error`` says what
    it reaches.

    Raises:
        RangeError: the interval is empty, or f is not finite on it.
    """
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise RangeError(f"there is nothing to fit on [{lo}, {hi}]; calibrate on inputs that vary")
    problem = _Problem(f, lo, hi, weight, max_harmonics)
    shortest = math.ceil(math.log2(problem.span) - 1e-9)
    forms = (False, True) if quadratic is None else (quadratic,)
    tried: list[tuple[float, Series]] = []

    def attempt(harmonics: int) -> Series | None:
        found: list[Series] = []
        for squared in forms:
            for period_log2 in (shortest, shortest + 1, shortest + 2):
                series, error = problem.solve(period_log2, harmonics, squared, tolerance, coefficient_sum)
                if series is not None:
                    tried.append((error, series))
                    if error <= tolerance:
                        found.append(series)
        return min(found, key=partial(series_bits, frac=18)) if found else None

    low, size = 0, 1
    chosen = attempt(size)
    while chosen is None and size < max_harmonics:
        low, size = size, min(2 * size, max_harmonics)
        chosen = attempt(size)
    while chosen is not None and size - low > 1:
        middle = (low + size) // 2
        smaller = attempt(middle)
        if smaller is None:
            low = middle
        else:
            chosen, size = smaller, middle
    if chosen is not None:
        return chosen
    if not tried:
        raise RangeError(f"no series of bounded coefficients fits on [{lo:g}, {hi:g}]; narrow the range")
    return min(tried, key=lambda pair: pair[0])[1]


class _Problem:
    """One function on one interval: grids, weights, and the solver. Waves of a period are computed once."""

    def __init__(self, f: Function, lo: float, hi: float, weight: Function | None, most: int) -> None:
        middle = (lo + hi) / 2
        step = 2.0**-_CENTRE_FRAC
        # A centre that is a short fixed-point number; symmetric intervals keep 0 exactly.
        self.centre = round(middle / step) * step if hi - lo > 8 * step else middle
        self.lo, self.hi = lo, hi
        self.span = 2 * max(hi - self.centre, self.centre - lo)
        self.most = most
        turns = np.linspace(0.0, math.pi, _FIT_POINTS)
        x = middle - (hi - lo) / 2 * np.cos(turns)
        # Points to fit on, then points to check on, in one array: one evaluation gives both.
        self.x = np.concatenate([x, np.linspace(lo, hi, _CHECK_POINTS)])
        points = torch.from_numpy(self.x)
        self.y = f(points).numpy()
        if not np.isfinite(self.y).all():
            raise RangeError(f"the function is not finite on [{lo:g}, {hi:g}]")
        self.w = weight(points).abs().numpy() if weight else np.ones_like(self.x)
        self.d = self.x - self.centre
        self._waves: dict[int, tuple[Array, Array]] = {}

    def _basis(self, period_log2: int, harmonics: int) -> Array:
        """Columns 1, cosines, sines at every point."""
        if period_log2 not in self._waves:
            angle = np.outer(self.d, np.arange(1, self.most + 1)) * (2 * math.pi / 2.0**period_log2)
            self._waves[period_log2] = np.cos(angle), np.sin(angle)
        cos, sin = self._waves[period_log2]
        return np.concatenate([np.ones((len(self.x), 1)), cos[:, :harmonics], sin[:, :harmonics]], 1)

    def solve(
        self, period_log2: int, harmonics: int, squared: bool, tolerance: float, limit: float
    ) -> tuple[Series | None, float]:
        """The series of one shape and its weighted error; None when its coefficients are too large."""
        fit, check = slice(0, _FIT_POINTS), slice(_FIT_POINTS, None)
        basis = self._basis(period_log2, harmonics)
        half = 2.0 ** (period_log2 - 1)
        ratio = self.d[fit, None] / half
        powers = np.concatenate([ratio, ratio**2], 1) if squared else ratio
        first = _least_squares(np.concatenate([powers, basis[fit]], 1), self.y[fit], self.w[fit])
        grain = 2.0**-Series.POLY_FRAC
        linear = round(float(first[0]) / half / grain) * grain
        square = round(float(first[1]) / half**2 / grain) * grain if squared else 0.0
        rest = self.y - linear * self.d - square * self.d * self.d
        emphasis = self.w[fit].copy()
        best: tuple[Series | None, float] = (None, math.inf)
        ridge = _RIDGE
        for round_ in range(9):
            c = _least_squares(basis[fit], rest[fit], emphasis, ridge)
            while not _small(c[1:], limit) and ridge < 0.05:
                ridge *= 8
                c = _least_squares(basis[fit], rest[fit], emphasis, ridge)
            if not _small(c[1:], limit):
                break
            misses = np.abs(basis @ c - rest)
            series = Series(
                self.lo, self.hi, self.centre, period_log2, float(c[0]), linear, square,
                tuple(c[1 : harmonics + 1].tolist()), tuple(c[harmonics + 1 :].tolist()),
                float(misses[check].max()),
            )  # fmt: skip
            weighted = misses * self.w
            error = float(weighted[check].max()) + series_noise(series) * float(self.w[check].max())
            if error < best[1]:
                best = (series, error)
            if error <= tolerance or (round_ == 0 and error > 6 * tolerance):
                break
            # Lawson: weight follows the error, so that least squares approaches the minimax fit.
            emphasis = emphasis * np.sqrt(np.maximum(weighted[fit] / weighted[fit].max(), 1e-3))
            emphasis = emphasis / emphasis.max()
        return best


def _small(coefficients: Array, limit: float) -> bool:
    sizes = np.abs(coefficients)
    return bool(sizes.max() < _LARGEST and sizes.sum() <= limit)


def _least_squares(basis: Array, y: Array, w: Array, ridge: float = _RIDGE) -> Array:
    """Weighted ridge least squares; the ridge keeps the coefficients of a Fourier extension small."""
    scaled = w / w.mean()
    a, b = basis * scaled[:, None], y * scaled
    # Normal equations: the ridge bounds their condition, and they are several times faster than a QR.
    found: Array = np.linalg.solve(a.T @ a + ridge**2 * np.eye(basis.shape[1]), a.T @ b)
    return found


def series_to_dict(series: Series) -> dict[str, Any]:
    """A series as JSON numbers; Python prints floats so that they read back to the same bits."""
    return {
        "lo": series.lo, "hi": series.hi, "centre": series.centre, "period_log2": series.period_log2,
        "constant": series.constant, "linear": series.linear, "quadratic": series.quadratic,
        "cos": list(series.cos), "sin": list(series.sin), "error": series.error,
    }  # fmt: skip


def series_from_dict(data: Mapping[str, Any]) -> Series:
    """The inverse of :func:`series_to_dict`."""
    return Series(
        lo=float(data["lo"]), hi=float(data["hi"]), centre=float(data["centre"]),
        period_log2=int(data["period_log2"]), constant=float(data["constant"]), linear=float(data["linear"]),
        quadratic=float(data["quadratic"]), cos=tuple(map(float, data["cos"])),
        sin=tuple(map(float, data["sin"])), error=float(data["error"]),
    )  # fmt: skip
