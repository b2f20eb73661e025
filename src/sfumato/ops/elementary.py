"""Exponential, reciprocal and roots on calibrated ranges, with relative accuracy.

A plan object holds what was decided at plan time (fits, steps, buckets) as plain numbers; `to_dict`/`from_dict` carry
it as JSON, so that all parties compute with the same words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import RangeError
from sfumato.ops.compare import overshoots
from sfumato.ops.fit import fit_series, series_bits, series_from_dict, series_noise, series_to_dict
from sfumato.ops.tiles import elementwise
from sfumato.protocol.base import Exponential, Protocol, Series, Unclosed, Window
from sfumato.session.session import Session
from sfumato.types import Z64, Ring, Shared

__all__ = [
    "HEADROOM_BITS",
    "ExpPlan",
    "InversePlan",
    "core_and_squarings",
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
#: What a round weighs beside bits per element when a plan chooses, for large operands.
_ROUND_BITS = 40.0
_LOG2E = math.log2(math.e)


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

#: An input finer than this is truncated first.
_FINEST = 26
#: exp of hi - 20 is nothing beside exp(hi): what lies below may be clipped to it.
_FLOOR = -20.0
#: A clip: one comparison and product (about 420 bits, 4 rounds; in Z32 230 bits).
_CLIP_BITS, _SHORT_CLIP_BITS = 600.0, 260.0
#: Fraction bits carried through squarings.
_CARRIED = 30


@dataclass(frozen=True, slots=True)
class ExpPlan:
    """exp(x) = core(x / 2^squarings)^(2^squarings) on [lo, hi], after clipping x to at least ``floor`` if ``clip``.

    The result has ``frac`` fraction bits and the relative error ``error`` (rounding of 2^-frac apart). ``bound``: the
    largest |x| that a clip's comparison sees.
    """

    lo: float
    hi: float
    clip: bool
    floor: float
    bound: float
    squarings: int
    core: Exponential
    frac: int
    error: float

    def __call__(self, x: Tensor) -> Tensor:
        """The same in float64."""
        return torch.exp(x.to(torch.float64).clamp_min(self.floor) if self.clip else x.to(torch.float64))

    @property
    def fine(self) -> int:
        """Fraction bits of the argument."""
        return self.core.frac - self.squarings

    @property
    def bits(self) -> float:
        """Bits per element in all."""
        return self.weight(short=False)

    def weight(self, *, short: bool) -> float:
        """The same, for an argument in Z32 if ``short``."""
        clip = _SHORT_CLIP_BITS if short else _CLIP_BITS
        return _exponential_bits(self.core, self.frac, self.squarings) + (clip if self.clip else 0.0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ExpPlan:
        return ExpPlan(**{**data, "core": Exponential(**data["core"])})


def _exponential_bits(core: Exponential, frac: int, squarings: int) -> float:
    wrap = max(0, 64 - core.word + core.frac_out - frac)
    return core.opened + core.entries * core.word + 128 + wrap + 2 + squarings * (194 + frac)


@lru_cache(maxsize=256)
def plan_exp(
    lo: float,
    hi: float = 0.0,
    *,
    tolerance: float = 5e-4,
    frac: int = 18,
    cut: float = -math.inf,
    carried: int = _CARRIED,
    floor: float | None = None,
    short: bool = False,
    known: int = 64,
) -> ExpPlan:
    """Choose squarings, block bits and words for the relative ``tolerance`` on [lo, hi]; ``frac`` is the input's.

    Below ``cut`` the error is absolute, tolerance times exp(cut). ``carried``: the result's fraction bits at most.
    ``floor``: what lies below may be clipped to it (default: ``cut``, or hi - 20 without one). ``short``: the argument
    is in Z32. ``known``: bits that are known of its words, fewer than the ring's for a product that is not closed.
    Where the range is too wide for the ring, or it is cheaper, x is first clipped.

    Raises:
        RangeError: [lo, hi] is empty, or exp(hi) too large for the ring.
    """
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise RangeError(f"exp needs a range, not [{lo}, {hi}]; calibrate on inputs that vary")
    frac = min(frac, _FINEST)
    carried = min(carried, math.floor(HEADROOM_BITS - 1 - max(hi, 0.0) * _LOG2E))
    whole = _cheapest_exp(lo, hi, tolerance, frac, carried, max(cut, lo), known)
    # Where even the range above the cut does not fit, the cut moves up: errors stay absolute, and small beside exp(hi).
    if floor is None:
        floor = cut if math.isfinite(cut) else hi + _FLOOR
    clipped = None
    while lo < floor < hi - 6.0 and clipped is None:
        clipped = _cheapest_exp(floor, hi, tolerance, frac, carried, floor, known)
        floor += 0.0 if clipped else 1.0
    options = []
    if whole is not None:
        options.append(ExpPlan(lo, hi, False, lo, 0.0, *whole))
    if clipped is not None:
        bound = max(abs(lo), abs(hi), abs(floor))
        options.append(ExpPlan(lo, hi, True, floor, bound, *clipped))
    if not options:
        raise RangeError(
            f"exp on [{lo:g}, {hi:g}] does not fit the ring at {frac} fraction bits; narrow the scores' range"
        )
    return min(options, key=lambda plan: plan.weight(short=short) + 3 * _ROUND_BITS * plan.squarings)


def _cheapest_exp(
    lo: float, hi: float, tolerance: float, frac: int, carried: int, cut: float, known: int
) -> tuple[int, Exponential, int, float] | None:
    """(squarings, core, result's frac, error) with the fewest bits; None if nothing reaches the tolerance."""
    found: list[tuple[float, tuple[int, Exponential, int, float]]] = []
    for squarings in range(6):
        if frac + squarings > 40:
            break
        kept = (
            carried
            if squarings == 0
            else min(carried, (HEADROOM_BITS - 1 - math.ceil(max(hi, 0.0) * _LOG2E)) // 2)
        )
        # Each squaring doubles a relative error; it also rounds, at exp(cut / 2) in the last one.
        rounding = 0.0 if squarings == 0 else 2.0 ** (1 - kept) * math.exp(-max(cut, -2.0 * _CARRIED) / 2)
        if kept < 10 or rounding > tolerance / 2:
            continue
        for blocks in (1, 2, 3):
            allowed = (tolerance - rounding) / 2.0**squarings
            core = _core(lo, hi, cut, squarings, frac, blocks, allowed, kept, known)
            if core is not None:
                choice = (squarings, core, min(kept, core.frac_out), core.error * 2.0**squarings + rounding)
                weight = _exponential_bits(core, choice[2], squarings) + 3 * _ROUND_BITS * squarings
                found.append((weight, choice))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _core(
    lo: float,
    hi: float,
    cut: float,
    squarings: int,
    frac: int,
    blocks: int,
    tolerance: float,
    kept: int,
    known: int,
) -> Exponential | None:
    """One opening for exp(x / 2^squarings) on [lo, hi], relative accuracy above ``cut``; None if it does not fit."""
    fine = frac + squarings
    # Ends as multiples of the input's unit; what a comparison's band lets pass is inside.
    low = math.floor((lo / 2.0**squarings) * 2.0**fine - 1) / 2.0**fine
    high = (hi / 2.0**squarings) + 2.0**-fine
    length = (high - low) * 2.0**fine
    period = length / (1.0 - 2.0**-blocks)
    opened = min(max(math.ceil(math.log2(period)) + 3, 8 + blocks), known)
    multiplier = min(math.ceil((2.0**opened - 2.0 ** (opened - blocks)) / length) - 1, 255)
    if not 8 + blocks <= opened <= 48 or multiplier < 1:
        return None
    block_bits = 2.0 ** (opened - blocks) / multiplier / 2.0**fine * _LOG2E
    digits = max(4, math.ceil(-math.log2(tolerance)))
    # The dealt factor's rounding is an absolute error of the product, so that below the cut precision costs nothing;
    # nor does it below half a unit of the result.
    cut = max(low * _LOG2E, cut * _LOG2E / 2.0**squarings, -float(kept + 1))
    frac_out = math.ceil(2 * digits + block_bits - cut)
    word = frac_out + max(math.ceil(high * _LOG2E + 1e-9), 1 - kept) + 3
    if word > 64 or digits > 26 or word < 10:
        return None
    return Exponential(
        low, high, fine, multiplier, opened, blocks, digits, frac_out, max(word, 16), 2.0**-digits
    )


async def exp(
    p: Protocol, s: Session, x: Shared, plan: ExpPlan, *, frac: int | None = None, ring: Ring | None = None
) -> Shared:
    """exp(x). ``frac``: the result's fraction bits (default: as the plan carries); ``ring``: its ring (default: x's).

    Domain: [plan.lo, plan.hi]; outside it the result is meaningless. Error: relative ``plan.error`` (at most the
    planned tolerance), and one unit of the result; below a clip's floor or a cut it is absolute, that of exp there.
    Cost: 3 rounds, about 190 bits and 2, 4 or 8 words of 40 to 64 bits; 3 rounds and 3k + frac + 2 bits more for each
    squaring, 4 rounds and about 420 bits for a clip. Source: [SHAFT] for one opening; own: docs/design/007.
    """

    # Squarings need the carried bits; a single opening gives those that are asked for, if its words can drop so many.
    carried, core = plan.frac, plan.core
    if frac is not None and not plan.squarings:
        carried = min(max(frac, core.frac_out - core.word + 2), core.frac_out)

    async def step(child: Session, piece: Shared) -> Shared:
        fine = plan.fine
        if piece.frac > fine:
            piece = await with_frac(p, child.fork("coarse"), piece, fine)
        piece = p.lift(piece, fine)
        if plan.clip:
            below, _ = await overshoots(p, child.fork("clip"), piece, plan.floor, None, plan.bound)
            assert below is not None
            piece = p.sub(piece, below)
        return await core_and_squarings(p, child, piece.viewed(plan.core.frac), plan, carried, ring)

    y = await elementwise(p, s.fork("exp"), step, x)
    return y if frac is None else await with_frac(p, s.fork("frac"), y, frac)


async def core_and_squarings(
    p: Protocol, s: Session, x: Shared | Unclosed, plan: ExpPlan, frac: int, ring: Ring | None
) -> Shared:
    """The planned exponential of an argument in its range, read with the core's fraction bits."""
    y = await p.exponential(s, plan.core, x, frac=frac, ring=ring)
    for i in range(plan.squarings):
        y = await p.bilinear_truncate(s.fork(f"double{i}"), torch.mul, y, y, plan.frac)
    return y


# ---- reciprocal and rsqrt ----------------------------------------------------------------------------------

#: Fraction bits of results, of normalised values in (0, 1].
_RESULT = 28
#: Normalised inputs with more fraction bits are truncated first.
_FINE = 40
#: Fraction bits with which a series' centre is exact enough.
_CENTRED = 24
#: Bits that a comparison for a bucket looks at below the smallest threshold.
_BELOW = 6


@dataclass(frozen=True, slots=True)
class InversePlan:
    """factor x^(-1/root) on [lo, hi], root 1 or 2: x / 2^exponent lies in (0, 1]; ``buckets`` comparisons multiply it
    by powers of 2^step into a range that the series covers; ``error`` is the relative error."""

    root: int
    lo: float
    hi: float
    exponent: int
    buckets: int
    step: int
    series: Series
    error: float
    factor: float = 1.0

    @property
    def frac(self) -> int:
        """Fraction bits of the result, unless fewer are asked for."""
        return _RESULT + self.exponent // self.root

    @property
    def bits(self) -> float:
        """Bits per value in all."""
        return _inverse_cost(self)[1]

    @property
    def headroom(self) -> int:
        """Bits that the series' words leave above its largest value."""
        largest = self.factor * self.series.lo ** (-1.0 / self.root)
        return self.series.word - 1 - self.series.scale - math.frexp(largest)[1]

    @property
    def top(self) -> float:
        """The largest normalised value."""
        return math.ldexp(self.hi, -self.exponent)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "series": series_to_dict(self.series)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> InversePlan:
        return InversePlan(**{**data, "series": series_from_dict(data["series"])})


@lru_cache(maxsize=256)
def plan_inverse(
    root: int, lo: float, hi: float, *, tolerance: float = 2e-5, rows: bool = True, factor: float = 1.0
) -> InversePlan:
    """Plan factor x^(-1/root), root 1 or 2, factor in [1/4, 4], for positive [lo, hi].

    ``rows``: one value per row or group, where rounds count and bits do not; else the fewest bits, with a round at 40.

    Raises:
        RangeError: the range is not positive and finite, or wider than 2^34.
    """
    if root not in (1, 2) or not (math.isfinite(hi) and 0.0 < lo <= hi):
        raise RangeError(f"a reciprocal (root) needs a positive range, not [{lo}, {hi}]; add an epsilon")
    # hi <= 2^exponent, exactly
    mantissa, exponent = math.frexp(hi)
    exponent -= 1 if mantissa == 0.5 else 0
    exponent += exponent % 2 if root == 2 else 0
    top, ratio = math.ldexp(hi, -exponent), hi / lo
    if ratio > 2.0**34:
        raise RangeError(
            f"the range [{lo:g}, {hi:g}] is too wide for a reciprocal; raise epsilon or calibrate"
        )
    found: list[tuple[float, InversePlan]] = []
    widest = (40.0 if root == 1 else 100.0) if rows else (12.0 if root == 1 else 30.0)
    for step in (0, *((2, 4) if root == 2 else (2, 3))):
        buckets = 0 if step == 0 else max(1, math.ceil(math.log2(ratio) / step - 1e-9) - 1)
        covered = ratio * 1.02 if step == 0 else 2.0**step * 1.03
        if covered > widest and not (step == 2 and not found):
            continue
        series = _inverse_series(root, factor, top * (1.0 + 2.0**-_BELOW), covered, tolerance)
        plan = InversePlan(
            root, lo, hi, exponent, buckets, step, series, _inverse_error(root, factor, series), factor
        )
        if plan.error <= 1.5 * tolerance:
            rounds, bits = _inverse_cost(plan)
            found.append((rounds + bits * 1e-5 if rows else bits + _ROUND_BITS * rounds, plan))
            if rows and step == 0:
                break
    if not found:
        raise RangeError(f"a reciprocal on [{lo:g}, {hi:g}] cannot be fitted; calibrate a narrower range")
    return min(found, key=lambda pair: pair[0])[1]


def _inverse_series(root: int, factor: float, ceiling: float, ratio: float, tolerance: float) -> Series:
    power = -1.0 / root
    return fit_series(
        lambda x: factor * x**power, ceiling / ratio, ceiling, tolerance=tolerance,
        weight=lambda x: x**-power / factor,
        max_harmonics=48, frac=_CENTRED, linear=False,
    )  # fmt: skip


def _inverse_error(root: int, factor: float, series: Series) -> float:
    x = torch.linspace(series.lo, series.hi, 2001, dtype=torch.float64)
    y = x ** (1.0 / root) / factor
    return float(((series(x) * y - 1).abs() + series_noise(series) * y).max())


def _inverse_cost(plan: InversePlan) -> tuple[int, float]:
    """(rounds, bits per element) of :func:`inverse`."""
    bits = float(series_bits(plan.series, 24, _RESULT))
    return (9, bits + plan.buckets * (150 + 194) + 2 * 192) if plan.buckets else (3, bits)


async def inverse(
    p: Protocol, s: Session, x: Shared, plan: InversePlan, *, frac: int | None = None
) -> Shared:
    """factor x^(-1/root) with ``frac`` fraction bits (default: ``plan.frac``).

    Domain: [plan.lo, plan.hi]. Error: relative 1.3 ``plan.error`` (rounding counted at four deviations), and two units
    of the result.
    Cost: 3 rounds, and with buckets 6 more: one batch of comparisons (about 350
    bits each) and two products (192 bits each). Source: [SHAFT]; own: buckets by one batch of narrow comparisons
    (docs/design/007).
    """
    if not x.frac + plan.exponent >= 4:
        raise RangeError(
            f"a value below {plan.hi:g} has too few of its {x.frac} fraction bits left for a reciprocal"
        )
    shift = plan.exponent // plan.root
    # What is multiplied by a bucket's factor keeps the planned digits; fewer would do for the result's last bit alone.
    digits = 2 - math.frexp(plan.error)[1]
    wanted = _RESULT if frac is None else min(max(frac - shift, digits, 8), _RESULT)
    x = x.viewed(x.frac + plan.exponent)
    if x.frac > _FINE:
        x = await with_frac(p, s.fork("coarse"), x, _FINE)
    gain: Shared | None = None
    if plan.buckets:
        factor = 2**plan.step
        low = await _below(
            p, s.fork("buckets"), x, [plan.top / factor**j for j in range(1, plan.buckets + 1)]
        )
        x = await p.bilinear(s.fork("scale"), torch.mul, x, _gain(p, s, low, factor))
        gain = _gain(p, s, low, round(factor ** (1 / plan.root)))
    x = p.lift(x, max(x.frac, _CENTRED))
    y = await p.evaluate(s.fork("series"), plan.series, x, frac=wanted, ring=Z64)
    if gain is not None:
        y = await p.bilinear(s.fork("unscale"), torch.mul, y, gain)
    y = y.viewed(wanted + shift)
    return y if frac is None else await with_frac(p, s.fork("frac"), y, frac)


async def _below(p: Protocol, s: Session, x: Shared, thresholds: list[float]) -> Shared:
    """[x < t] for every t, stacked in front: one batch of comparisons. 0 < x < 2."""
    count = len(thresholds)
    levels = torch.tensor(thresholds, dtype=torch.float64).reshape(count, *([1] * len(x.shape)))
    stacked = p.linear(lambda part: part.expand(count, *part.shape), x)
    shift = max(0, math.frexp(thresholds[-1])[1] - 1 + x.frac - _BELOW)
    window = Window(shift, x.frac + 2 - shift)
    return await p.less_than_zero(s, p.add_public(s, stacked, p.encode(stacked, -levels)), window)


def _gain(p: Protocol, s: Session, low: Shared, g: int) -> Shared:
    """1 + sum_j low_j (g^j - g^(j-1)): the power of g that the comparisons ask for."""
    factors = torch.tensor([g**j - g ** (j - 1) for j in range(1, low.shape[0] + 1)])
    factors = factors.reshape(-1, *([1] * (len(low.shape) - 1)))
    total = p.linear(lambda part: (part * factors.to(part.device)).sum(0), low)
    return p.add_public(s, total, p.encode(total, torch.ones(total.shape, dtype=torch.float64)))


async def reciprocal(
    p: Protocol, s: Session, x: Shared, plan: InversePlan, *, frac: int | None = None
) -> Shared:
    """1 / x with ``frac`` (default: x's) fraction bits.

    Domain: [plan.lo, plan.hi], positive. Error, Cost, Source: as :func:`inverse`.
    """
    return await _inverse_of_root(p, s, x, plan, 1, frac)


async def rsqrt(p: Protocol, s: Session, x: Shared, plan: InversePlan, *, frac: int | None = None) -> Shared:
    """1 / sqrt(x) with ``frac`` (default: x's) fraction bits.

    Domain: [plan.lo, plan.hi], positive. Error, Cost, Source: as :func:`inverse`.
    """
    return await _inverse_of_root(p, s, x, plan, 2, frac)


async def _inverse_of_root(
    p: Protocol, s: Session, x: Shared, plan: InversePlan, root: int, frac: int | None
) -> Shared:
    if plan.root != root:
        raise RangeError(f"this plan is for x^(-1/{plan.root}), not for x^(-1/{root})")
    wanted = x.frac if frac is None else frac

    async def step(child: Session, piece: Shared) -> Shared:
        return await inverse(p, child, piece, plan, frac=wanted)

    return await elementwise(p, s, step, x)


async def sqrt(p: Protocol, s: Session, x: Shared, plan: InversePlan) -> Shared:
    """sqrt(x) as x / sqrt(x), at x's scale.

    Domain: [plan.lo, plan.hi], positive. Error: relative as :func:`inverse`, plus one ulp.
    Cost: as :func:`rsqrt`, and one product. Source: as :func:`inverse`.
    """
    # Both factors keep 20 significant bits; their product is at most sqrt(hi).
    extra = max(0, math.frexp(plan.hi)[1] // 2 + 1)
    frac = min(_RESULT + plan.exponent // 2, HEADROOM_BITS - x.frac - extra)
    root = await rsqrt(p, s.fork("rsqrt"), x, plan, frac=frac)

    async def step(child: Session, a: Shared, b: Shared) -> Shared:
        return await p.bilinear_truncate(child, torch.mul, a, b, b.frac)

    return await elementwise(p, s.fork("mul"), step, x, root)
