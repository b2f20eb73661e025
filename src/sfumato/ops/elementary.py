"""Exponential, reciprocal and roots on calibrated ranges, with relative accuracy.

A plan object holds what was decided at plan time (fits, steps, buckets) as plain numbers;
`to_dict`/`from_dict` carry it as JSON, so that all parties compute with the same words. Errors below are at
18 fraction bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import RangeError
from sfumato.ops.fit import fit_series, series_from_dict, series_to_dict
from sfumato.ops.tiles import elementwise
from sfumato.protocol.base import Protocol, Series, Window
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = [
    "HEADROOM_BITS",
    "ExpPlan",
    "InversePlan",
    "exp",
    "inverse",
    "plan_exp",
    "plan_inverse",
    "reciprocal",
    "rsqrt",
    "sqrt",
    "with_frac",
]

#: Words before a truncation stay below 2^62; one bit is kept for rounding and margins.
HEADROOM_BITS = 61
#: Fraction bits carried by normalised values in (0, 1].
_CARRIED = 28
#: Fraction bits at which the first guess is evaluated.
_GUESS = 18
_BUCKET_LOG2 = 2
#: Finer inputs of exp are truncated first: u^2 has to stay in the ring.
_FINEST = 20


async def with_frac(p: Protocol, s: Session, x: Shared, frac: int) -> Shared:
    """The same value with other fraction bits: a local shift up, or one truncation (2 rounds, 2k + bits + 2
    bits)."""
    if frac >= x.frac:
        return p.lift(x, frac)
    drop = x.frac - frac

    async def step(child: Session, piece: Shared) -> Shared:
        return await p.truncate(child, piece, drop)

    return await elementwise(p, s, step, x)


# ---- exp ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExpPlan:
    """exp(x) = P(x / 2^squarings)^(2^squarings) on [lo, hi]; P(u) = (r w^2 + a)^2 + b w + c with w = u +
    shift.

    ``r`` is the integer ``root`` at ``root_bits`` fraction bits; the result has ``frac`` fraction bits and
    the relative error ``error`` (rounding of 2^-frac apart).
    """

    lo: float
    hi: float
    squarings: int
    root: int
    root_bits: int
    shift: float
    a: float
    b: float
    c: float
    frac: int
    error: float

    def __call__(self, x: Tensor) -> Tensor:
        """The same in float64."""
        w = x.to(torch.float64) / 2.0**self.squarings + self.shift
        y = (self.root / 2.0**self.root_bits * w * w + self.a) ** 2 + self.b * w + self.c
        return y ** (2**self.squarings)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ExpPlan:
        return ExpPlan(**dict(data))


@lru_cache(maxsize=256)
def plan_exp(
    lo: float,
    hi: float = 0.0,
    *,
    tolerance: float = 5e-4,
    frac: int = 18,
    cut: float = -math.inf,
    carried: int = _CARRIED,
) -> ExpPlan:
    """Choose the fewest squarings that reach the relative ``tolerance`` on [lo, hi]; ``frac`` is the input's.

    Below ``cut`` the result need only lie in [0, 2 exp(cut)]. ``carried``: at most so many fraction bits of
    the result.

    Raises:
        RangeError: [lo, hi] is empty, or too wide for the ring.
    """
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise RangeError(f"exp needs a range, not [{lo}, {hi}]; calibrate on inputs that vary")
    # The last square, exp(hi) at twice the carried bits, has to stay in the ring.
    carried = min(carried, math.floor((HEADROOM_BITS - 1 - max(hi, 0.0) * math.log2(math.e)) / 2))
    frac = _GUESS if frac > _FINEST else frac
    for squarings in range(13):
        fine = frac + squarings
        if fine > 27 or carried < 10:
            break
        plan = _fit_exp(max(lo, cut), hi, squarings, fine, carried)
        if plan is not None and plan.error <= tolerance and _fades(plan, lo):
            return replace(plan, lo=lo)
    raise RangeError(
        f"exp on [{lo:g}, {hi:g}] does not fit the ring at {frac} fraction bits; narrow the scores' range"
    )


def _fades(plan: ExpPlan, lo: float) -> bool:
    """Whether the plan stays small between ``lo`` and the end of its fit."""
    if lo >= plan.lo:
        return True
    y = plan(torch.linspace(lo, plan.lo, 501, dtype=torch.float64))
    return bool((y.abs() <= 2 * math.exp(plan.lo)).all())


def _fit_exp(lo: float, hi: float, squarings: int, fine: int, carried: int) -> ExpPlan | None:
    u = torch.linspace(lo, hi, 2001, dtype=torch.float64) / 2.0**squarings
    if float(u[-1] - u[0]) > 6.0:
        return None
    target, weight = torch.exp(u), torch.exp(-u)
    powers = torch.stack([u**i for i in range(5)], 1)
    quartic = torch.linalg.lstsq(powers * weight[:, None], target * weight).solution
    if float(quartic[4]) <= 0:
        return None
    root_bits = min(16, 60 - 2 * fine)
    root = max(1, round(math.sqrt(float(quartic[4])) * 2.0**root_bits))
    r = root / 2.0**root_bits
    shift = round(float(quartic[3]) / (4 * r * r) * 2.0**16) / 2.0**16
    w = u + shift
    basis = torch.stack([torch.ones_like(w), w, w * w], 1)
    emphasis = weight.clone()
    best: ExpPlan | None = None
    for _ in range(12):
        left = target - r * r * w**4
        c0, c1, c2 = torch.linalg.lstsq(basis * emphasis[:, None], left * emphasis).solution.tolist()
        a = c2 / (2 * r)
        plan = ExpPlan(lo, hi, squarings, root, root_bits, shift, a, c1, c0 - a * a, carried, 0.0)
        miss = ((plan(u * 2.0**squarings) / torch.exp(u * 2.0**squarings)) - 1).abs()
        error = float(miss.max())
        if best is None or error < best.error:
            best = ExpPlan(lo, hi, squarings, root, root_bits, shift, a, c1, c0 - a * a, carried, error)
        emphasis = emphasis * (miss / max(error, 1e-300)).clamp_min(1e-3).sqrt()
    return best


async def exp(p: Protocol, s: Session, x: Shared, plan: ExpPlan, *, frac: int | None = None) -> Shared:
    """exp(x). ``frac``: the result's fraction bits (default: as the plan carries, up to 28).

    Domain: [plan.lo, plan.hi].
    Error: relative ``plan.error`` (at most 5e-4 by default) plus 2^-(frac) 2^squarings absolute.
    Cost: 2 (2 + squarings) + 2 rounds; 3k + 2 + (18 to 44) bits for each of the 2 + squarings products.
    Source: [CrypTen], [SHAFT]; docs/design/005; own: a quartic as two squares, division by 2^s as a change of view.
    """

    async def step(child: Session, piece: Shared) -> Shared:
        if piece.frac > _FINEST:
            piece = await with_frac(p, child.fork("coarse"), piece, _GUESS)
        return await _exp_tile(p, child, piece, plan)

    y = await elementwise(p, s.fork("exp"), step, x)
    return y if frac is None else await with_frac(p, s.fork("frac"), y, frac)


async def _exp_tile(p: Protocol, s: Session, x: Shared, plan: ExpPlan) -> Shared:
    root, carried = plan.root, plan.frac
    u = x.viewed(x.frac + plan.squarings)
    if 2 * u.frac + plan.root_bits > 61:
        raise RangeError(
            f"this exp was planned for fewer than {x.frac} fraction bits; plan it for this scale"
        )
    w = p.add_public(s, u, p.encode(u, plan.shift))
    bits = 2 * w.frac + plan.root_bits - carried
    z = await p.bilinear_truncate(s.fork("square"), lambda a, b: a * b * root, w, w, bits)
    z = p.add_public(s, z.viewed(carried), p.encode(z.viewed(carried), plan.a))
    slope = round(plan.b * 2.0 ** (2 * carried - w.frac))
    rest = p.linear(lambda part: part * slope, w, frac=2 * carried)
    rest = p.add_public(s, rest, p.encode(rest, plan.c))
    y = await p.bilinear_truncate(s.fork("quartic"), torch.mul, z, z, carried, plus=rest)
    for i in range(plan.squarings):
        y = await p.bilinear_truncate(s.fork(f"double{i}"), torch.mul, y, y, carried)
    return y


# ---- reciprocal and rsqrt ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InversePlan:
    """x^(-1/root) on [lo, hi] for root 1 or 2: x / 2^exponent lies in (0, 1]; ``buckets`` comparisons bring
    it into a range of ratio 4; ``guess`` starts ``steps`` Newton steps; ``error`` is the relative error."""

    root: int
    lo: float
    hi: float
    exponent: int
    buckets: int
    guess: Series
    steps: int
    error: float

    @property
    def top(self) -> float:
        """The largest normalised value."""
        return self.hi / 2.0**self.exponent

    def to_dict(self) -> dict[str, Any]:
        return {
            "root": self.root, "lo": self.lo, "hi": self.hi, "exponent": self.exponent,
            "buckets": self.buckets, "guess": series_to_dict(self.guess),
            "steps": self.steps, "error": self.error,
        }  # fmt: skip

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> InversePlan:
        return InversePlan(**{**data, "guess": series_from_dict(data["guess"])})


@lru_cache(maxsize=256)
def plan_inverse(
    root: int, lo: float, hi: float, *, tolerance: float = 2e-5, direct: float = 10.0
) -> InversePlan:
    """Plan x^(-1/root), root 1 or 2, for positive [lo, hi]; ratios above ``direct`` go through buckets.

    Raises:
        RangeError: the range is not positive and finite, or wider than 2^34.
    """
    if root not in (1, 2) or not (math.isfinite(hi) and 0.0 < lo <= hi):
        raise RangeError(f"a reciprocal (root) needs a positive range, not [{lo}, {hi}]; add an epsilon")
    exponent = math.ceil(math.log2(hi) - 1e-12)
    exponent += exponent % 2 if root == 2 else 0
    top, ratio = hi / 2.0**exponent, hi / lo
    if ratio > 2.0**34:
        raise RangeError(
            f"the range [{lo:g}, {hi:g}] is too wide for a reciprocal; raise epsilon or calibrate"
        )
    buckets = 0 if ratio <= direct else math.ceil(math.log2(ratio) / _BUCKET_LOG2 - 1e-9) - 1
    bottom = top / ratio * 0.97 if buckets == 0 else top / 2.0**_BUCKET_LOG2 * 0.93
    ceiling = top * 1.04
    power = -1.0 / root
    guess = fit_series(
        lambda x: x**power, bottom, ceiling, tolerance=0.03, weight=lambda x: x**-power, max_harmonics=8
    )
    x = torch.linspace(bottom, ceiling, 2001, dtype=torch.float64)
    y, steps = guess(x), 0
    while (error := float((y * x**-power - 1).abs().max())) > tolerance:
        y = y * (2 - x * y) if root == 1 else y * (3 - x * y * y) / 2
        steps += 1
        if steps > 8:
            raise RangeError(
                f"the reciprocal on [{lo:g}, {hi:g}] does not converge; calibrate a narrower range"
            )
    return InversePlan(root, lo, hi, exponent, buckets, guess, steps, error)


async def inverse(p: Protocol, s: Session, x: Shared, plan: InversePlan) -> Shared:
    """x^(-1/root) with as many fraction bits as it has (28 + exponent / root).

    Domain: [plan.lo, plan.hi]. Error: relative ``plan.error`` plus 2^-26 and half of x's own rounding; meant
    for one value per row or group. Cost: 5 + 6 steps rounds (at most 7 more to start with more than 18 bits;
    with buckets 10 to 12 more).
    Source: [CrypTen], [SHAFT]; docs/design/005, 6.7; own: buckets of ratio 4 by one batch of narrow comparisons.
    """
    if not x.frac + plan.exponent >= 4:
        raise RangeError(
            f"a value below {plan.hi:g} has too few of its {x.frac} fraction bits left for a reciprocal"
        )
    x = x.viewed(x.frac + plan.exponent)
    gain: Shared | None = None
    if plan.buckets:
        low = await _below(p, s.fork("buckets"), x, [plan.top / 4.0**j for j in range(1, plan.buckets + 1)])
        x = await p.bilinear(s.fork("scale"), torch.mul, x, _gain(p, s, low, 1))
        gain = _gain(p, s, low, plan.root)
    fine, coarse = await s.gather(
        lambda child: with_frac(p, child, x, _CARRIED), lambda child: with_frac(p, child, x, _GUESS)
    )
    y = await p.evaluate(s.fork("guess"), plan.guess, coarse, frac=_CARRIED)
    for i in range(plan.steps):
        newton = _newton_reciprocal if plan.root == 1 else _newton_rsqrt
        y = await newton(p, s.fork(f"newton{i}"), fine, y)
    if gain is not None:
        y = await p.bilinear(s.fork("unscale"), torch.mul, y, gain)
    return y.viewed(_CARRIED + plan.exponent // plan.root)


async def _below(p: Protocol, s: Session, x: Shared, thresholds: list[float]) -> Shared:
    """[x < t] for every t, stacked in front: one batch of comparisons. 0 < x < 2."""
    count = len(thresholds)
    levels = torch.tensor(thresholds, dtype=torch.float64).reshape(count, *([1] * len(x.shape)))
    stacked = p.linear(lambda part: part.expand(count, *part.shape), x)
    shift = max(0, math.floor(math.log2(thresholds[-1])) + x.frac - 5)
    window = Window(shift, x.frac + 2 - shift)
    return await p.less_than_zero(s, p.add_public(s, stacked, p.encode(stacked, -levels)), window)


def _gain(p: Protocol, s: Session, low: Shared, root: int) -> Shared:
    """1 + sum_j low_j (g^j - g^(j-1)) with g = 4^(1/root): the power of four (two) that the comparisons ask
    for."""
    g = 4 // root
    factors = torch.tensor([g**j - g ** (j - 1) for j in range(1, low.shape[0] + 1)])
    factors = factors.reshape(-1, *([1] * (len(low.shape) - 1)))
    total = p.linear(lambda part: (part * factors.to(part.device)).sum(0), low)
    return p.add_public(s, total, p.encode(total, torch.ones(total.shape, dtype=torch.float64)))


async def _newton_reciprocal(p: Protocol, s: Session, x: Shared, y: Shared) -> Shared:
    """y (2 - x y). Cost: 6 rounds."""
    xy = await p.bilinear_truncate(s.fork("xy"), lambda a, b: -(a * b), x, y, _CARRIED)
    return await p.bilinear_truncate(
        s.fork("y"), torch.mul, y, p.add_public(s, xy, p.encode(xy, torch.full(xy.shape, 2.0))), _CARRIED
    )


async def _newton_rsqrt(p: Protocol, s: Session, x: Shared, y: Shared) -> Shared:
    """y (3 - x y^2) / 2. Cost: 6 rounds."""
    xy, yy = await s.gather(
        lambda child: p.bilinear_truncate(child, torch.mul, x, y, _CARRIED),
        lambda child: p.bilinear_truncate(child, torch.mul, y, y, _CARRIED),
    )
    thrice = p.linear(lambda part: 3 * part, p.lift(y, 2 * _CARRIED))
    half = await p.bilinear_truncate(s.fork("y"), lambda a, b: -(a * b), xy, yy, _CARRIED + 1, plus=thrice)
    return half.viewed(_CARRIED)


async def reciprocal(
    p: Protocol, s: Session, x: Shared, plan: InversePlan, *, frac: int | None = None
) -> Shared:
    """1 / x with ``frac`` (default: x's) fraction bits.

    Domain: [plan.lo, plan.hi], positive. Error: relative 2e-5 by default, plus one ulp. Cost: as
    :func:`inverse`, and one truncation. Source: as :func:`inverse`.
    """
    return await _inverse_of_root(p, s, x, plan, 1, frac)


async def rsqrt(p: Protocol, s: Session, x: Shared, plan: InversePlan, *, frac: int | None = None) -> Shared:
    """1 / sqrt(x) with ``frac`` (default: x's) fraction bits.

    Domain: [plan.lo, plan.hi], positive. Error: relative 2e-5 by default, plus one ulp. Cost: as
    :func:`inverse`, and one truncation. Source: as :func:`inverse`.
    """
    return await _inverse_of_root(p, s, x, plan, 2, frac)


async def _inverse_of_root(
    p: Protocol, s: Session, x: Shared, plan: InversePlan, root: int, frac: int | None
) -> Shared:
    if plan.root != root:
        raise RangeError(f"this plan is for x^(-1/{plan.root}), not for x^(-1/{root})")
    wanted = x.frac if frac is None else frac

    async def step(child: Session, piece: Shared) -> Shared:
        y = await inverse(p, child.fork("inverse"), piece, plan)
        return await with_frac(p, child.fork("frac"), y, wanted)

    return await elementwise(p, s, step, x)


async def sqrt(p: Protocol, s: Session, x: Shared, plan: InversePlan) -> Shared:
    """sqrt(x) as x / sqrt(x), at x's scale.

    Domain: [plan.lo, plan.hi], positive. Error: relative 2e-5 by default, plus one ulp.
    Cost: as :func:`rsqrt`, and one product. Source: as :func:`inverse`.
    """
    # Both factors keep 20 significant bits; their product is at most sqrt(hi).
    extra = max(0, math.ceil(math.log2(plan.hi) / 2))
    frac = min(_CARRIED + plan.exponent // 2, HEADROOM_BITS - x.frac - extra)
    root = await rsqrt(p, s.fork("rsqrt"), x, plan, frac=frac)

    async def step(child: Session, a: Shared, b: Shared) -> Shared:
        return await p.bilinear_truncate(child, torch.mul, a, b, b.frac)

    return await elementwise(p, s.fork("mul"), step, x, root)
