"""Smooth univariate functions on calibrated ranges, each by one opening.

A plan says how: ``series`` evaluates a fit and promises nothing outside [lo, hi]; ``clamped`` clips first
and continues with a straight line at each end, so it holds on the whole range that its comparisons see.
Errors are at 18 fraction bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import RangeError
from sfumato.ops.basic import mul
from sfumato.ops.compare import clamp, overshoots
from sfumato.ops.elementary import with_frac
from sfumato.ops.fit import fit_series, series_bits, series_from_dict, series_to_dict
from sfumato.ops.tiles import elementwise
from sfumato.protocol.base import Protocol, Series
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = ["FUNCTIONS", "SmoothPlan", "hardsigmoid", "hardswish", "plan_smooth", "smooth"]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Known:
    """A function of one variable: below and above ``tails`` it is a straight line of these slopes, to within
    1e-5.

    ``core`` is what is fitted between the tails when ``f`` itself has a kink at one of them.
    """

    f: Function
    tails: tuple[float, float] | None = None
    slopes: tuple[int, int] = (0, 0)
    core: Function | None = None


def _even(tail: float) -> tuple[float, float]:
    return (-tail, tail)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


#: By name: what :func:`plan_smooth` can fit. All are computed in float64.
FUNCTIONS: dict[str, Known] = {
    "silu": Known(F.silu, _even(14.0), (0, 1)),
    "gelu": Known(F.gelu, _even(5.0), (0, 1)),
    "gelu_tanh": Known(_gelu_tanh, _even(5.0), (0, 1)),
    "quick_gelu": Known(lambda x: x * torch.sigmoid(1.702 * x), _even(8.0), (0, 1)),
    "mish": Known(F.mish, _even(15.0), (0, 1)),
    "softplus": Known(F.softplus, _even(12.0), (0, 1)),
    "elu": Known(F.elu, (-12.0, 0.0), (0, 1), torch.expm1),
    "sigmoid": Known(torch.sigmoid, _even(12.0)),
    "logsigmoid": Known(F.logsigmoid, _even(12.0), (1, 0)),
    "tanh": Known(torch.tanh, _even(6.5)),
    "erf": Known(torch.erf, _even(3.5)),
    "sin": Known(torch.sin),
    "cos": Known(torch.cos),
    "exp": Known(torch.exp),
    "log": Known(torch.log),
    "sqrt": Known(torch.sqrt),
}
#: What a clamp's comparisons and rounds weigh when a plan chooses, in bits per element and side.
_CLAMP_BITS = 550
#: Ranges beyond this are never fitted whole.
_WIDEST = 40.0
#: A fit that misses its tolerance by more is refused.
_ACCEPTED = 20.0
_FRAC = 18


@dataclass(frozen=True, slots=True)
class SmoothPlan:
    """How one function is computed: its series, for ``clamped`` the sides it clips and the bound of |x|, and the finest
    argument it takes."""

    name: str
    method: str
    series: Series
    below: bool = False
    above: bool = False
    bound: float = 0.0
    frac: int = _FRAC

    @property
    def error(self) -> float:
        """The fit's largest error on its interval."""
        return self.series.error

    @property
    def bits(self) -> float:
        """Bits per element in all."""
        return series_bits(self.series, self.frac) + _CLAMP_BITS * (self.below + self.above)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "method": self.method, "series": series_to_dict(self.series),
            "below": self.below, "above": self.above, "bound": self.bound, "frac": self.frac,
        }  # fmt: skip

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> SmoothPlan:
        return SmoothPlan(
            str(data["name"]), str(data["method"]), series_from_dict(data["series"]),
            bool(data["below"]), bool(data["above"]), float(data["bound"]), int(data["frac"]),
        )  # fmt: skip


@lru_cache(maxsize=512)
def plan_smooth(
    name: str,
    lo: float,
    hi: float,
    *,
    tolerance: float = 5e-5,
    method: str | None = None,
    frac: int = _FRAC,
    usual: tuple[float, float] | None = None,
    ring_bits: int = 64,
    rare: float = 8.0,
    deviations: float = 4.0,
) -> SmoothPlan:
    """Fit the function ``name`` of :data:`FUNCTIONS` on [lo, hi]; clamp where that is wider than its tails.

    ``method`` forces ``series`` or ``clamped``; clamped plans hold for |x| up to max(|lo|, |hi|). ``frac``: fraction
    bits of the argument, ``ring_bits``: those that are known of its words. ``usual``: where nearly all values lie;
    beyond it ``rare`` times the tolerance will do. ``deviations``: how many of the noise count as its error.

    Raises:
        RangeError: unknown name, empty range, values that leave the ring's headroom, or a clamp without
        tails.
    """
    known = FUNCTIONS.get(name)
    if known is None:
        raise RangeError(f"no smooth function {name!r}; there are {', '.join(sorted(FUNCTIONS))}")
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise RangeError(f"{name} needs a range, not [{lo}, {hi}]; calibrate on inputs that vary")
    if method == "clamped" and known.tails is None:
        raise RangeError(f"{name} has no straight tails and cannot be clamped; use method 'series'")
    fit = partial(_fit, tolerance=tolerance, frac=frac, ring_bits=ring_bits, rare=rare, deviations=deviations)
    whole = clamped = None
    if (
        known.tails is not None
        and method != "series"
        and (method or known.core or lo < known.tails[0] or hi > known.tails[1])
    ):
        clamped = _plan_clamped(name, known, lo, hi, usual or (lo, hi), fit, frac)
    if clamped is None or (method is None and known.core is None and max(-lo, hi) <= _WIDEST):
        series = fit(known.f, lo, hi, usual or (lo, hi))
        whole = SmoothPlan(name, "series", series, frac=frac)
    plan = whole or clamped
    assert plan is not None
    if whole and clamped and _clamp_pays(clamped, whole, tolerance):
        plan = clamped
    if plan.error > _ACCEPTED * tolerance:
        raise RangeError(
            f"{name} on [{lo:g}, {hi:g}] cannot be fitted better than {plan.error:.1g}; narrow its range"
        )
    return plan


def _fit(
    f: Function,
    lo: float,
    hi: float,
    usual: tuple[float, float],
    *,
    tolerance: float,
    frac: int,
    ring_bits: int,
    rare: float,
    deviations: float,
) -> Series:
    """A series on [lo, hi]; its ``error`` is that of the usual part, which is a quarter of it at least."""
    low, high = max(lo, usual[0]), min(hi, usual[1])
    missing = max(0.0, 0.25 * (hi - lo) - (high - low)) / 2
    low, high = max(lo, low - missing), min(hi, high + missing)
    fit = partial(
        fit_series, f, lo, hi, tolerance=tolerance, frac=frac, ring_bits=ring_bits, deviations=deviations
    )
    if low <= lo and high >= hi:
        return fit()

    def weight(x: Tensor) -> Tensor:
        return torch.where((x >= low) & (x <= high), 1.0, 1.0 / rare)

    series = fit(weight=weight)
    x = torch.linspace(low, high, 2001, dtype=torch.float64)
    return replace(series, error=float((series(x) - f(x)).abs().max()))


def _plan_clamped(
    name: str,
    known: Known,
    lo: float,
    hi: float,
    usual: tuple[float, float],
    fit: Callable[[Function, float, float, tuple[float, float]], Series],
    frac: int,
) -> SmoothPlan:
    assert known.tails is not None
    # A side that never reaches its tail is fitted as it is, and never compared.
    # At least one unit long and between the tails, also for a range that lies beyond one of them.
    first, last = known.tails
    high = min(max(hi, first + 1.0), last)
    low = max(min(lo, high - 1.0), first)
    below, above = lo < low or known.core is not None, hi > high
    # What is clipped comes to lie at the ends.
    often = (low if below else usual[0], high if above else usual[1])
    series = fit(known.core or known.f, low, high, often)
    bound = max(abs(lo), abs(hi), abs(low), abs(high))
    return SmoothPlan(name, "clamped", series, below, above, bound, frac)


def _clamp_pays(clamped: SmoothPlan, whole: SmoothPlan, tolerance: float) -> bool:
    """Whether the clamp is worth its comparisons."""
    if whole.error > 1.5 * tolerance:
        return clamped.error < whole.error
    saved = series_bits(whole.series, whole.frac) - series_bits(clamped.series, clamped.frac)
    return saved > _CLAMP_BITS * (clamped.below + clamped.above)


async def smooth(p: Protocol, s: Session, x: Shared, plan: SmoothPlan, *, frac: int | None = None) -> Shared:
    """The planned function, elementwise, with ``frac`` (default: x's) fraction bits.

    Domain: [plan.series.lo, plan.series.hi]; ``clamped``: |x| <= plan.bound.
    Error: the planned tolerance (5e-5 by default; rounding counted at four deviations) plus one ulp; clamped: slopes
    times one comparison band (2^-10 at bound 16) more near the clip.
    Cost: 3 rounds, 2 K words of 30 to 46 bits and about 200 bits (silu on +-8: K = 11, 1,119 bits; at 5e-4 K = 9,
    807); clamped: one batch of comparisons before it. Source: [SHAFT]; docs/design/007.
    """
    wanted = x.frac if frac is None else frac

    async def step(child: Session, piece: Shared) -> Shared:
        if piece.frac > plan.frac:
            piece = await with_frac(p, child.fork("coarse"), piece, plan.frac)
        if plan.method == "series":
            return await p.evaluate(child, plan.series, piece, frac=wanted)
        return await _clamped(p, child, piece, plan, wanted)

    return await elementwise(p, s, step, x)


async def _clamped(p: Protocol, s: Session, x: Shared, plan: SmoothPlan, frac: int) -> Shared:
    """f(clip(x)) and the tails' lines of slope 0 or 1: a tail costs its comparison alone."""
    low = plan.series.lo if plan.below else None
    high = plan.series.hi if plan.above else None
    under, over = await overshoots(p, s.fork("clip"), x, low, high, plan.bound)
    inner = x
    for cut in (under, over):
        if cut is not None:
            inner = p.sub(inner, cut)
    y = await p.evaluate(s.fork("inner"), plan.series, inner, frac=frac)
    for cut, slope in zip((under, over), FUNCTIONS[plan.name].slopes, strict=True):
        if cut is not None and slope:
            y = p.add(y, await with_frac(p, s.fork("tail"), cut, frac))
    return y


async def hardsigmoid(p: Protocol, s: Session, x: Shared, bound: float) -> Shared:
    """clip(x / 6 + 1/2, 0, 1).

    Domain: |x| <= bound. Error: one comparison band / 6 plus two ulp. Cost: two comparisons in one batch
    (about 1,000 bits) and one truncation. Source: [SPU]; docs/design/003.
    """
    clipped = await clamp(p, s.fork("clip"), x, -3.0, 3.0, max(bound, 3.0))
    return await _affine(p, s.fork("scale"), clipped)


async def hardswish(p: Protocol, s: Session, x: Shared, bound: float) -> Shared:
    """x clip(x / 6 + 1/2, 0, 1).

    Domain: |x| <= bound. Error: |x| + 2 ulp, plus one band / 2 near +-3. Cost: :func:`hardsigmoid` and one
    product.
    Source: as :func:`hardsigmoid`.
    """
    gate = await hardsigmoid(p, s.fork("gate"), x, bound)
    return await mul(p, s.fork("mul"), x, gate)


async def _affine(p: Protocol, s: Session, x: Shared) -> Shared:
    sixth, gain = round(2.0**20 / 6), 20

    async def step(child: Session, piece: Shared) -> Shared:
        return await p.linear_truncate(
            child, lambda part: part * sixth, piece, gain, shape=piece.shape, gain_frac=gain
        )

    y = await elementwise(p, s, step, x)
    return p.add_public(s, y, p.encode(y, 0.5))
