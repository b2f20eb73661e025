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
from sfumato.ops.elementary import HEADROOM_BITS, InversePlan, inverse, plan_inverse, with_frac
from sfumato.ops.tiles import elementwise
from sfumato.protocol.base import Protocol
from sfumato.ring.fixed import encode
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = ["NormPlan", "group_norm", "layer_norm", "plan_norm", "rms_norm"]

#: Bits of the mean square below the top of its range.
_SQUARE_BITS = 30
#: Significant bits that the smallest scale keeps.
_SCALE_BITS = 16


@dataclass(frozen=True, slots=True)
class NormPlan:
    """A normalisation over ``count`` values: the rsqrt of n / 2^a (var + eps), a bound on |x| and on the
    result.

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
        return math.ceil(math.log2(self.count))

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
) -> NormPlan:
    """Plan for groups of ``count`` values whose variance (mean square) is calibrated to [var_lo, var_hi].

    ``reach`` bounds |(x - mean) / std|; sqrt(count) always does. ``gain`` bounds |gamma|, public or secret.

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
    chunks = 1
    while largest / chunks >= 2.0 ** (HEADROOM_BITS - 1) and chunks < count:
        chunks *= 2
    if var_hi * 2.0 ** (2 * frac) >= 2.0**HEADROOM_BITS:
        raise RangeError(
            f"a variance of {var_hi:g} at {frac} fraction bits does not fit the ring; rescale the model"
        )
    inverse_plan = plan_inverse(2, low, max(high, low * 1.01))
    # Costs follow from this bound alone, so it is a power of two and says little about the weights.
    top = 2.0 ** max(-6, math.ceil(math.log2(max(gain, 2.0**-6))))
    return NormPlan(count, eps, inverse_plan, chunks, min(reach, math.sqrt(count) + 1), top)


async def _mean(p: Protocol, s: Session, x: Shared) -> Shared:
    """The mean over the last axis, kept. Error: 2^-frac. Cost: 2 rounds, 2k + f + 2 bits per group.

    Gain bits are as many as the ring holds, so the mean of 40,960 ones is 1.0 to the last bit.
    """
    n = x.shape[-1]
    gain = HEADROOM_BITS - 7 - x.frac
    factor = round(2.0**gain / n)
    return await p.linear_truncate(
        s, lambda part: part.sum(-1, keepdim=True) * factor, x, gain, shape=(*x.shape[:-1], 1), gain_frac=gain
    )


async def _inverse_std(p: Protocol, s: Session, d: Shared, plan: NormPlan) -> Shared:
    """1 / sqrt(n / 2^a (mean square + eps)) over the last axis, kept; with the fraction bits that rsqrt
    gives."""
    n = d.shape[-1]
    if n != plan.count:
        raise TypeMismatch(f"this norm was planned for groups of {plan.count} values, not {n}")
    size = math.ceil(n / plan.chunks)
    padding = size * plan.chunks - n
    # The words sum d^2 2^(2 frac) are read with a more fraction bits: that divides by 2^a.
    frac = max(0, _SQUARE_BITS - plan.inverse.exponent)
    view = 2 * d.frac + plan.halvings
    bits = max(0, view - frac)

    def squares(a: Tensor, b: Tensor) -> Tensor:
        c = a * b
        if plan.chunks == 1:
            return c.sum(-1, keepdim=True)
        return torch.nn.functional.pad(c, (0, padding)).unflatten(-1, (plan.chunks, size)).sum(-1)

    total = await p.bilinear_truncate(s.fork("square"), squares, d, d, bits)
    if plan.chunks > 1:
        total = p.linear(lambda part: part.sum(-1, keepdim=True), total)
    total = total.viewed(view - bits)
    total = p.add_public(s, total, p.encode(total, plan.rest * plan.eps))
    return await inverse(p, s.fork("rsqrt"), total, plan.inverse)


def _product_fracs(plan: NormPlan, frac: int, smallest: float) -> int:
    """Fraction bits of the scale r * gamma: enough for the smallest, and the product of reach stays in the
    ring."""
    most = HEADROOM_BITS - frac - math.ceil(math.log2(max(plan.reach * max(plan.gain, 1.0), 2.0**-8)))
    wanted = _SCALE_BITS - math.floor(math.log2(smallest)) + 2
    return max(4, min(most, max(wanted, 18)))


def _smallest(plan: NormPlan) -> float:
    return math.sqrt(plan.rest / plan.inverse.hi)


async def _times(p: Protocol, s: Session, d: Shared, r: Shared, plus: Shared | None) -> Shared:
    """d * r (broadcast) + plus, at d's scale, one truncation; large operands in three tiles of the leading
    axis."""
    addend = None if plus is None else p.lift(plus, d.frac + r.frac)
    if d.type.numel < 3 * 2048:
        return await p.bilinear_truncate(s, torch.mul, d, r, r.frac, plus=addend)
    wide = p.linear(lambda part: part.expand(d.shape), r)

    async def step(child: Session, a: Shared, b: Shared, c: Shared | None = None) -> Shared:
        return await p.bilinear_truncate(child, torch.mul, a, b, b.frac, plus=c)

    return await elementwise(p, s, step, d, wide, *([] if addend is None else [addend]))


async def _scaled(
    p: Protocol, s: Session, r: Shared, gamma: Shared | Tensor | None, plan: NormPlan, frac: int
) -> Shared:
    """r sqrt(n / 2^a) gamma with ``frac`` fraction bits; broadcasts r against gamma. Small."""
    root = math.sqrt(plan.rest)
    lead = math.ceil(math.log2(1.0 / math.sqrt(plan.inverse.lo) + 1))
    if isinstance(gamma, Shared):
        room = HEADROOM_BITS - gamma.frac - lead - 1 - math.ceil(math.log2(max(plan.gain, 1.0)))
        short = max(4, min(r.frac, 19 - math.floor(math.log2(_smallest(plan))), room - 12))
        shrunk = await with_frac(p, s.fork("r"), r, short)
        gain = max(2, min(20, room - short))
        factor = round(root * 2.0**gain)
        view = shrunk.frac + gamma.frac + gain
        y = await p.bilinear_truncate(
            s.fork("gamma"), lambda a, b: a * b * factor, shrunk, gamma, max(0, view - frac)
        )
        return p.lift(y.viewed(view - max(0, view - frac)), frac)
    gains = torch.as_tensor(root, dtype=torch.float64) if gamma is None else gamma.to(torch.float64) * root
    shape = tuple(torch.broadcast_shapes(r.shape, gains.shape))
    gain = max(6, min(26, HEADROOM_BITS - r.frac - lead - math.ceil(math.log2(max(plan.gain, 1.0)))))
    bits = max(0, r.frac + gain - frac)
    y = await p.linear_truncate(
        s,
        lambda part: part * encode(gains.to(part.device), r.ring, gain),
        r,
        bits,
        shape=shape,
        gain_frac=gain,
    )
    return p.lift(y, frac)


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
    r = await _inverse_std(p, s.fork("std"), centred, plan)  # (N, G, 1)
    column = _as_column(p, gamma, (1, groups, per))
    frac = _product_fracs(plan, x.frac, _smallest(plan))
    scale = await _scaled(p, s.fork("scale"), r, column, plan, frac)  # (N, G, C / G) or (N, G, 1)
    width = scale.shape[-1]
    body = p.linear(lambda part: part.reshape(n, groups, width, -1), centred)
    factor = p.linear(lambda part: part.unsqueeze(-1), scale)
    extra = None if plus is None else p.linear(lambda part: part.reshape(body.shape), plus)
    y = await _times(p, s.fork("out"), body, factor, extra)
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
) -> Shared:
    """(x - mean) / sqrt(var + eps) * gamma + beta (+ plus) over the last ``axes`` axes, gamma and beta of
    their shape.

    Domain: var in the planned range; |mean| < 64. Error: as :func:`group_norm`.
    Cost: one product per element, public gamma included (3k + f + g + 2 bits); a secret gamma costs a second
    one, made while rsqrt runs. Rounds as :func:`group_norm`. Source: as :func:`group_norm`.
    """
    return await _row_norm(p, s, x, axes, gamma, beta, plan, plus, True)


async def rms_norm(
    p: Protocol,
    s: Session,
    x: Shared,
    axes: int,
    gamma: Shared | Tensor | None,
    plan: NormPlan,
    *,
    plus: Shared | None = None,
) -> Shared:
    """x / sqrt(mean(x^2) + eps) * gamma (+ plus) over the last ``axes`` axes.

    Domain: mean square in the planned range. Error, Cost, Source: as :func:`layer_norm`, without the mean.
    """
    return await _row_norm(p, s, x, axes, gamma, None, plan, plus, False)


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
) -> Shared:
    lead = x.shape[: len(x.shape) - axes]
    rows = p.linear(lambda part: part.reshape(*lead, -1), x)
    n = rows.shape[-1]
    if centre:
        rows = p.sub(rows, await _mean(p, s.fork("mean"), rows))
    weight = _as_column(p, gamma, (n,))

    async def weighed(child: Session) -> Shared:
        return await _times(p, child, rows, weight, None) if isinstance(weight, Shared) else rows

    body, r = await s.gather(weighed, lambda child: _inverse_std(p, child, rows, plan))
    extra = None if plus is None else p.linear(lambda part: part.reshape(rows.shape), plus)
    frac = _product_fracs(plan, x.frac, _smallest(plan))
    if not isinstance(weight, Tensor):
        scale = await _scaled(p, s.fork("scale"), r, None, plan, frac)
        y = await _times(p, s.fork("out"), body, scale, extra)
    else:
        y = await _weighed_product(p, s, body, r, weight, plan, extra)
    y = p.linear(lambda part: part.reshape(x.shape), y)
    return _shifted(p, s, y, None if beta is None else _as_column(p, beta, x.shape[len(lead) :]))


async def _weighed_product(
    p: Protocol, s: Session, d: Shared, r: Shared, gamma: Tensor, plan: NormPlan, plus: Shared | None
) -> Shared:
    """d * r * gamma for a public gamma along the last axis: gamma rides on the product's truncation."""
    room = (
        HEADROOM_BITS - d.frac - math.ceil(math.log2(plan.reach / math.sqrt(plan.rest) * max(plan.gain, 1.0)))
    )
    scale_frac = min(_SCALE_BITS + 1 - math.floor(math.log2(_smallest(plan))), room - 6, r.frac)
    gain = max(4, min(18, room - scale_frac))
    short = await with_frac(p, s.fork("scale"), r, scale_frac)
    gains = gamma.to(torch.float64) * math.sqrt(plan.rest)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a * b * encode(gains.to(a.device), d.ring, gain)

    bits = scale_frac + gain
    addend = None if plus is None else p.lift(plus, d.frac + bits).viewed(d.frac + scale_frac)
    y = await p.bilinear_truncate(s.fork("out"), product, d, short, bits, plus=addend)
    return y.viewed(d.frac)
