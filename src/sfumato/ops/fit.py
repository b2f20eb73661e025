"""Fits of univariate functions as :class:`Series`: constant + linear + quadratic + a few sines, for one
opening.

Fits are made once, by the client, when a plan is made; they travel in the plan as JSON numbers, so that
every party multiplies with the same words. Source: digest mpc-friendly 6.8; own: short polynomial
coefficients are rounded first and the sines refitted to what is left, so that rounding them costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import RangeError
from sfumato.protocol.base import Series

__all__ = ["fit_series", "series_bits", "series_from_dict", "series_noise", "series_to_dict"]

Function = Callable[[Tensor], Tensor]

#: Error per unit of sum |coefficients|: dealt sines are rounded to 2^-22, public ones are good to 2^-23.
_SINE_NOISE = 2.0**-22
_FIT_POINTS = 400
_CHECK_POINTS = 3001
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
    problem = _Problem(f, lo, hi, weight)
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
    """One function on one interval: grids, weights, and the solver."""

    def __init__(self, f: Function, lo: float, hi: float, weight: Function | None) -> None:
        middle = (lo + hi) / 2
        step = 2.0**-_CENTRE_FRAC
        # A centre that is a short fixed-point number; symmetric intervals keep 0 exactly.
        self.centre = round(middle / step) * step if hi - lo > 8 * step else middle
        self.lo, self.hi = lo, hi
        self.span = 2 * max(hi - self.centre, self.centre - lo)
        turns = torch.linspace(0.0, math.pi, _FIT_POINTS, dtype=torch.float64)
        self.x = middle - (hi - lo) / 2 * torch.cos(turns)
        self.dense = torch.linspace(lo, hi, _CHECK_POINTS, dtype=torch.float64)
        self.y, self.wanted = f(self.x), f(self.dense)
        if not bool(torch.isfinite(self.wanted).all()):
            raise RangeError(f"the function is not finite on [{lo:g}, {hi:g}]")
        ones = torch.ones_like
        self.w = weight(self.x).abs() if weight else ones(self.x)
        self.dense_w = weight(self.dense).abs() if weight else ones(self.dense)

    def solve(
        self, period_log2: int, harmonics: int, squared: bool, tolerance: float, limit: float
    ) -> tuple[Series | None, float]:
        """The series of one shape and its weighted error; None when its coefficients are too large."""
        d = self.x - self.centre
        angle = torch.outer(d, torch.arange(1, harmonics + 1, dtype=torch.float64)) * (
            2 * math.pi / 2.0**period_log2
        )
        half = 2.0 ** (period_log2 - 1)
        polynomial = torch.stack([torch.ones_like(d), d / half, (d / half) ** 2], 1)[:, : 3 if squared else 2]
        waves = torch.cat([torch.cos(angle), torch.sin(angle)], 1)
        first = _least_squares(torch.cat([polynomial, waves], 1), self.y, self.w)
        grain = 2.0**-Series.POLY_FRAC
        linear = round(float(first[1]) / half / grain) * grain
        square = round(float(first[2]) / half**2 / grain) * grain if squared else 0.0
        rest = self.y - linear * d - square * d * d
        basis = torch.cat([torch.ones_like(d)[:, None], waves], 1)
        emphasis = self.w.clone()
        best: tuple[Series | None, float] = (None, math.inf)
        ridge = _RIDGE
        for round_ in range(9):
            c = _least_squares(basis, rest, emphasis, ridge).tolist()
            while not _small(c[1:], limit) and ridge < 0.05:
                ridge *= 8
                c = _least_squares(basis, rest, emphasis, ridge).tolist()
            if not _small(c[1:], limit):
                break
            series = Series(
                self.lo, self.hi, self.centre, period_log2, c[0], linear, square,
                tuple(c[1 : harmonics + 1]), tuple(c[harmonics + 1 :]), 0.0,
            )  # fmt: skip
            miss = float(((series(self.dense) - self.wanted) * self.dense_w).abs().max())
            error = miss + series_noise(series) * float(self.dense_w.max())
            if error < best[1]:
                plain = float((series(self.dense) - self.wanted).abs().max())
                best = (_with_error(series, plain), error)
            if error <= tolerance or (round_ == 0 and error > 6 * tolerance):
                break
            # Lawson: weight follows the error, so that least squares approaches the minimax fit.
            miss_at = ((series(self.x) - self.y) * self.w).abs()
            emphasis = emphasis * (miss_at / miss_at.max()).clamp_min(1e-3).sqrt()
            emphasis = emphasis / emphasis.max()
        return best


def _small(coefficients: Sequence[float], limit: float) -> bool:
    sizes = [abs(v) for v in coefficients]
    return max(sizes) < _LARGEST and sum(sizes) <= limit


def _least_squares(basis: Tensor, y: Tensor, w: Tensor, ridge: float = _RIDGE) -> Tensor:
    """Weighted ridge least squares; the ridge keeps the coefficients of a Fourier extension small."""
    columns = basis.shape[1]
    scale = w.mean()
    a = torch.cat([basis * (w / scale)[:, None], torch.eye(columns, dtype=torch.float64) * ridge])
    b = torch.cat([y * (w / scale), torch.zeros(columns, dtype=torch.float64)])
    return torch.linalg.lstsq(a, b).solution


def _with_error(series: Series, error: float) -> Series:
    return Series(
        series.lo, series.hi, series.centre, series.period_log2, series.constant, series.linear, series.quadratic,
        series.cos, series.sin, error,
    )  # fmt: skip


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
