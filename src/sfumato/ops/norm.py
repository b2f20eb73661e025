"""Group, layer and RMS normalisation: one inner product and one calibrated rsqrt per group.

The mean square is read as a change of view: dividing by the power of two 2^a >= n is free, and the public
rest, n / 2^a, joins epsilon and the scale. So no constant 1/n is ever rounded against a small scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import RangeError, TypeMismatch
from sfumato.ops.basic import scale
from sfumato.ops.elementary import HEADROOM_BITS, InversePlan, inverse, plan_inverse, with_frac
from sfumato.ops.look import Look
from sfumato.ops.tiles import DEFAULT_TILES, ceil_log2, concatenate, narrow, thirds
from sfumato.protocol.base import Bilinear, Protocol
from sfumato.ring.fixed import encode
from sfumato.session.session import Branch, Session
from sfumato.types import Z32, Z64, Ring, Shared

__all__ = ["NormPlan", "group_norm", "layer_norm", "plan_norm", "rms_norm"]

#: Bits of the mean square below the top of its range.
_SQUARE_BITS = 30
#: Significant bits that the smallest scale keeps.
_SCALE_BITS = 16
#: Fraction bits of 1 / n where a sum of values from Z32 is divided.
_SHORT_GAIN = 30


@dataclass(frozen=True, slots=True)
class NormPlan:
    """A normalisation over ``count`` values: sqrt(n / 2^a) times the rsqrt of n / 2^a (var + eps), a bound on |x| and
    on the result.

    ``chunks``: parts of the inner product that are truncated apart, so that no sum of squares leaves the
    ring.
    """

    count: int
    eps: float
    inverse: InversePlan
    chunks: int
    reach: float
    gain: float

    @property
    def halvings(self) -> int:
        """a: the smallest power of two with 2^a >= count."""
        return ceil_log2(self.count)

    def square_frac(self, frac: int) -> int:
        """Fraction bits of the mean square of values with ``frac``."""
        return min(2 * frac + self.halvings, max(0, _SQUARE_BITS - self.inverse.exponent))

    @property
    def rest(self) -> float:
        """count / 2^a, in (1/2, 1]."""
        return self.count / 2.0**self.halvings

    def to_dict(self) -> dict[str, Any]:
        return {
            "count": self.count, "eps": self.eps, "inverse": self.inverse.to_dict(), "chunks": self.chunks,
            "reach": self.reach, "gain": self.gain,
        }  # fmt: skip

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> NormPlan:
        return NormPlan(**{**data, "inverse": InversePlan.from_dict(data["inverse"])})


def plan_norm(
    count: int,
    var_lo: float,
    var_hi: float,
    eps: float,
    *,
    reach: float = 64.0,
    gain: float = 4.0,
    frac: int = 18,
    tolerance: float = 2e-5,
    ring_bits: int = 64,
) -> NormPlan:
    """Plan for groups of ``count`` values whose variance (mean square) is calibrated to [var_lo, var_hi].

    ``reach`` bounds |(x - mean) / std|; sqrt(count) always does. ``gain`` bounds |gamma|, public or secret.
    ``ring_bits``: the ring of the values; in Z32 it is the caller's to see that a single square fits.

    Raises:
        RangeError: the variance can be zero without an epsilon, or is too large for the ring.
    """
    if count < 1 or not (math.isfinite(var_hi) and 0.0 <= var_lo <= var_hi and eps >= 0.0):
        raise RangeError(
            f"a norm needs a variance range, not [{var_lo}, {var_hi}] with eps {eps}; calibrate first"
        )
    halvings = math.ceil(math.log2(count))
    rest = count / 2.0**halvings
    low, high = rest * (var_lo + eps), rest * (var_hi + eps)
    # Squares of values below one unit of 2^-frac vanish; nothing smaller can come out of the inner product.
    low = max(low, 2.0 ** (-2 * frac + 4), high * 2.0**-33)
    largest = max(var_hi, eps) * count * 2.0 ** (2 * frac)
    chunks, room = 1, HEADROOM_BITS - (64 - ring_bits)
    while largest / chunks >= 2.0 ** (room - 1) and chunks < count:
        chunks *= 2
    if var_hi * 2.0 ** (2 * frac) >= 2.0**room:
        raise RangeError(
            f"a variance of {var_hi:g} at {frac} fraction bits does not fit the ring; rescale the model"
        )
    inverse_plan = plan_inverse(2, low, max(high, low * 1.01), tolerance=tolerance, factor=math.sqrt(rest))
    # Costs follow from this bound alone, so it is a power of two and says little about the weights.
    top = 2.0 ** max(-6, math.ceil(math.log2(max(gain, 2.0**-6))))
    return NormPlan(count, eps, inverse_plan, chunks, min(reach, math.sqrt(count) + 1), top)


async def _mean(p: Protocol, s: Session, x: Shared) -> Shared:
    """The mean over the last axis, kept. Error: 2^-frac. Cost: 2 rounds, 2k + f + 2 bits per group; of values in Z32
    162 bits, as the sum is divided in Z64.

    Gain bits are as many as the ring holds, so the mean of 40,960 ones is 1.0 to the last bit.
    """
    n = x.shape[-1]
    if x.ring == Z32:
        total = await p.cast(s, p.linear(lambda part: part.sum(-1, keepdim=True), x), Z64)
        part_of = round(2.0**_SHORT_GAIN / n)
        wide = p.linear(lambda part: part * part_of, total, frac=x.frac + _SHORT_GAIN)
        return p.shorten(s, wide, x.frac)
    gain = HEADROOM_BITS - 7 - x.frac
    factor = round(2.0**gain / n)
    return await p.linear_truncate(
        s, lambda part: part.sum(-1, keepdim=True) * factor, x, gain, shape=(*x.shape[:-1], 1), gain_frac=gain
    )


async def _inverse_std(
    p: Protocol, s: Session, d: Shared, plan: NormPlan, frac: int, look: Look | None
) -> Shared:
    """1 / sqrt(mean square + eps) over the last axis, kept, with ``frac`` fraction bits. 6 rounds without buckets.

    ``look`` gets the inverse root's argument as "square".
    """
    n = d.shape[-1]
    if n != plan.count:
        raise TypeMismatch(f"this norm was planned for groups of {plan.count} values, not {n}")
    size = math.ceil(n / plan.chunks)
    padding = size * plan.chunks - n
    # The words sum d^2 2^(2 frac) are read with a more fraction bits: that divides by 2^a.
    view = 2 * d.frac + plan.halvings
    bits = view - plan.square_frac(d.frac)

    def squares(a: Tensor, b: Tensor) -> Tensor:
        c = a * b
        if plan.chunks == 1:
            return c.sum(-1, keepdim=True)
        return torch.nn.functional.pad(c, (0, padding)).unflatten(-1, (plan.chunks, size)).sum(-1)

    # Z32 leaves the sum of many squares no room to drop bits for.
    drop = bits if d.ring == Z64 else 0
    total = await p.bilinear_truncate(s.fork("square"), squares, d, d, drop, ring=Z64)
    if plan.chunks > 1:
        total = p.linear(lambda part: part.sum(-1, keepdim=True), total)
    total = await with_frac(p, s.fork("fit"), total.viewed(view - drop), view - bits)
    total = p.add_public(s, total, p.encode(total, plan.rest * plan.eps))
    if look is not None:
        look("square", total)
    return await inverse(p, s.fork("rsqrt"), total, plan.inverse, frac=frac)


def _scale_fracs(plan: NormPlan, frac: int, ring: Ring = Z64) -> tuple[int, int]:
    """Fraction bits of the scale 1 / std and of a gain that rides on the same product: enough for the smallest scale,
    and the product of reach stays in the ring."""
    smallest = math.sqrt(plan.rest / plan.inverse.hi)
    room = HEADROOM_BITS - (64 - ring.bits) - frac - ceil_log2(plan.reach * max(plan.gain, 1.0))
    kept = room - (6 if ring == Z64 else 0)  # a gain of its own does not ride in Z32
    scale = max(4, min(_SCALE_BITS + 2 - math.frexp(smallest)[1], kept, plan.inverse.frac))
    return scale, max(4, min(18, room - scale))


def _worthwhile(plan: NormPlan) -> int:
    """Fraction bits of the scale with which rounding the smallest one costs no more than the planned error."""
    smallest = math.sqrt(plan.rest / plan.inverse.hi)
    return 2 - math.frexp(plan.inverse.error)[1] - math.frexp(smallest)[1]


async def _times(
    p: Protocol,
    s: Session,
    d: Shared,
    r: Shared,
    plus: Shared | None,
    *,
    gains: Tensor | None = None,
    gain: int = 0,
    out: int | None = None,
) -> Shared:
    """d * r (* gains) (+ plus), broadcast, with ``out`` (default: d's) fraction bits and one truncation.

    Public ``gains`` ride on the truncation with ``gain`` fraction bits. Large operands go in three tiles.
    """
    out = d.frac if out is None else out
    gain = 0 if gains is None else gain
    shape = torch.broadcast_shapes(d.shape, r.shape)
    bits = d.frac + r.frac + gain - out
    factors = None if gains is None else gains.to(torch.float64).broadcast_to(shape)
    addend = None if plus is None else p.lift(plus, d.frac + r.frac + gain).viewed(d.frac + r.frac)

    def product(words: Tensor | None) -> Bilinear:
        return torch.mul if words is None else lambda a, b: a * b * encode(words.to(a.device), d.ring, gain)

    if math.prod(shape) < DEFAULT_TILES.smallest or p.parties == 1:
        y = await p.bilinear_truncate(s, product(factors), d, r, bits, plus=addend)
        return y.viewed(out)
    left, right = (p.linear(lambda part: part.expand(shape).reshape(-1), v) for v in (d, r))
    flat = None if addend is None else p.linear(lambda part: part.reshape(-1), addend)
    words = None if factors is None else factors.reshape(-1)
    parts = [left, right] if flat is None else [left, right, flat]

    def third(turn: int, low: int, high: int) -> Branch:
        own = product(None if words is None else words[low:high])
        a, b, *c = (narrow(p, v, 0, low, high) for v in parts)
        return lambda child: p.bilinear_truncate(
            child.fork("turn", turn=s.turn + turn), own, a, b, bits, plus=c[0] if c else None
        )

    done = await s.gather(*(third(i, low, high) for i, (low, high) in enumerate(thirds(math.prod(shape)))))
    y = concatenate(p, done, 0)
    return p.linear(lambda part: part.reshape(shape), y).viewed(out)


def _as_column(p: Protocol, v: Shared | Tensor | None, shape: tuple[int, ...]) -> Shared | Tensor | None:
    if v is None:
        return None
    return p.linear(lambda part: part.reshape(shape), v) if isinstance(v, Shared) else v.reshape(shape)


def _shifted(p: Protocol, s: Session, y: Shared, bias: Shared | Tensor | None) -> Shared:
    if bias is None:
        return y
    return p.add(y, bias) if isinstance(bias, Shared) else p.add_public(s, y, p.encode(y, bias))


async def group_norm(
    p: Protocol,
    s: Session,
    x: Shared,
    groups: int,
    gamma: Shared | Tensor | None,
    beta: Shared | Tensor | None,
    plan: NormPlan,
    *,
    plus: Shared | None = None,
    look: Look | None = None,
) -> Shared:
    """(x - mean) / sqrt(var + eps) * gamma + beta (+ plus) over each group of channels. x (N, C, ...).

    Domain: var in the planned range; |mean| < 64. gamma and beta (C,), public or secret.
    Error: 1e-4 relative to the result's range, down to var of 1e-4; below that x's own rounding tells.
    Cost: one product per element (3k + f + 2 bits), the rest per group; 2 + 3 + rsqrt + 2 + 3 rounds.
    Source: [SPU]; docs/design/003; own: 1/n as a view.
    """
    n, channels = x.shape[0], x.shape[1]
    per = channels // groups
    if per * groups != channels:
        raise TypeMismatch(f"{channels} channels do not split into {groups} groups")
    rows = p.linear(lambda part: part.reshape(n, groups, -1), x)
    centred = p.sub(rows, await _mean(p, s.fork("mean"), rows))
    frac, gain = _scale_fracs(plan, x.frac)
    scale = await _inverse_std(p, s.fork("std"), centred, plan, frac, look)  # (N, G, 1)
    scale = p.linear(lambda part: part.unsqueeze(-1), scale)
    column = _as_column(p, gamma, (1, groups, per, 1))
    if isinstance(column, Shared):
        # r * gamma per channel is small beside d * gamma
        scale, column = await _times(p, s.fork("gamma"), column, scale, None, out=frac), None
    body = p.linear(lambda part: part.reshape(n, groups, per, -1), centred)
    extra = None if plus is None else p.linear(lambda part: part.reshape(body.shape), plus)
    y = await _times(p, s.fork("out"), body, scale, extra, gains=column, gain=gain)
    y = p.linear(lambda part: part.reshape(x.shape), y)
    return _shifted(p, s, y, _as_column(p, beta, (1, channels, *([1] * (len(x.shape) - 2)))))


async def layer_norm(
    p: Protocol,
    s: Session,
    x: Shared,
    axes: int,
    gamma: Shared | Tensor | None,
    beta: Shared | Tensor | None,
    plan: NormPlan,
    *,
    plus: Shared | None = None,
    look: Look | None = None,
) -> Shared:
    """(x - mean) / sqrt(var + eps) * gamma + beta (+ plus) over the last ``axes`` axes, gamma and beta of
    their shape.

    Domain: var in the planned range; |mean| < 64. Error: as :func:`group_norm`.
    Cost: one product per element, public gamma included (3k + f + g + 2 bits); a secret gamma costs a second
    one, made while rsqrt runs. Rounds as :func:`group_norm`. Source: as :func:`group_norm`.
    """
    return await _row_norm(p, s, x, axes, gamma, beta, plan, plus, True, look)


async def rms_norm(
    p: Protocol,
    s: Session,
    x: Shared,
    axes: int,
    gamma: Shared | Tensor | None,
    plan: NormPlan,
    *,
    plus: Shared | None = None,
    look: Look | None = None,
) -> Shared:
    """x / sqrt(mean(x^2) + eps) * gamma (+ plus) over the last ``axes`` axes.

    Domain: mean square in the planned range. Error, Cost, Source: as :func:`layer_norm`, without the mean.
    """
    return await _row_norm(p, s, x, axes, gamma, None, plan, plus, False, look)


async def _row_norm(
    p: Protocol,
    s: Session,
    x: Shared,
    axes: int,
    gamma: Shared | Tensor | None,
    beta: Shared | Tensor | None,
    plan: NormPlan,
    plus: Shared | None,
    centre: bool,
    look: Look | None,
) -> Shared:
    lead = x.shape[: len(x.shape) - axes]
    rows = p.linear(lambda part: part.reshape(*lead, -1), x)
    n = rows.shape[-1]
    if centre:
        rows = p.sub(rows, await _mean(p, s.fork("mean"), rows))
    weight = _as_column(p, gamma, (n,))
    if x.ring == Z32:
        y = await _short_norm(p, s, rows, weight, plan, look)
        y = p.linear(lambda part: part.reshape(x.shape), y if plus is None else p.add(y, plus))
        return _shifted(p, s, y, None if beta is None else _as_column(p, beta, x.shape[len(lead) :]))
    # Where the ring has room, rows * gamma keep the fraction bits of both, and one truncation drops them all.
    fine = x.frac + weight.frac if isinstance(weight, Shared) else x.frac
    if fine > x.frac and _scale_fracs(plan, fine)[0] < min(_worthwhile(plan), _scale_fracs(plan, x.frac)[0]):
        fine = x.frac
    frac, gain = _scale_fracs(plan, fine)

    async def weighed(child: Session) -> Shared:
        return await _times(p, child, rows, weight, None, out=fine) if isinstance(weight, Shared) else rows

    body, r = await s.gather(weighed, lambda child: _inverse_std(p, child, rows, plan, frac, look))
    extra = None if plus is None else p.linear(lambda part: part.reshape(rows.shape), plus)
    gains = weight if isinstance(weight, Tensor) else None
    y = await _times(p, s.fork("out"), body, r, extra, gains=gains, gain=gain, out=x.frac)
    y = p.linear(lambda part: part.reshape(x.shape), y)
    return _shifted(p, s, y, None if beta is None else _as_column(p, beta, x.shape[len(lead) :]))


async def _short_norm(
    p: Protocol,
    s: Session,
    rows: Shared,
    weight: Shared | Tensor | None,
    plan: NormPlan,
    look: Look | None,
) -> Shared:
    """Centred rows in Z32 over their deviation, times gamma. Only what there is one of in a row is in Z64."""
    frac, _ = _scale_fracs(plan, rows.frac, Z32)

    async def weighed(child: Session) -> Shared:
        if isinstance(weight, Tensor):
            return await scale(p, child, rows, weight, gain=_gain_bits(plan, rows.frac))
        return rows if weight is None else await _times(p, child, rows, weight, None)

    body, r = await s.gather(weighed, lambda child: _inverse_std(p, child, rows, plan, frac, look))
    return await _times(p, s.fork("out"), body, p.shorten(s, r, frac), None)


def _gain_bits(plan: NormPlan, frac: int) -> int:
    """Fraction bits of a public gamma in Z32: deviations up to the square root of the largest variance, by reach."""
    largest = math.sqrt(plan.inverse.hi / plan.rest) * plan.reach * plan.gain
    return max(4, min(14, 30 - frac - ceil_log2(largest)))
