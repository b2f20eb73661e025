"""Softmax and scaled dot-product attention with relative accuracy in every row.

A row is moved below zero by a calibrated public offset, when the rows' maxima lie close together, or else by
its own maximum from a tournament. Exponentials keep up to 28 fraction bits; attention divides by the row sum
after P V.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import RangeError, TypeMismatch
from sfumato.ops.basic import Scales, Value, matmul, scale
from sfumato.ops.compare import band, maximum
from sfumato.ops.elementary import (
    HEADROOM_BITS,
    ExpPlan,
    InversePlan,
    Look,
    exp,
    inverse,
    plan_exp,
    plan_inverse,
    with_frac,
)
from sfumato.ops.tiles import DEFAULT_TILES, ceil_log2, concatenate, elementwise, narrow, pieces
from sfumato.protocol.base import Protocol
from sfumato.ring import kernels
from sfumato.session.session import Session
from sfumato.types import Z32, Z64, Ring, Shared

__all__ = [
    "FORBIDDEN",
    "MASKED_BELOW",
    "WEIGHT_FRAC",
    "SoftmaxPlan",
    "attention",
    "lowered",
    "plan_softmax",
    "score_masks",
    "softmax",
    "split_mask",
    "turned",
]

#: Additive masks at or below this value mean "not at all"; they never reach the ring.
MASKED_BELOW = -1e3
#: What published methods add to a score that is masked: more would leave the range of the limit exponentials.
FORBIDDEN = -50.0
#: Most fraction bits that exponentials carry.
_MOST_CARRIED = 40
_SCORE_FRAC = 18
#: Fraction bits of weights in Z32, and of exponentials that become such weights.
WEIGHT_FRAC, SHORT_CARRIED = 14, 26
#: Fraction bits of exponentials that are in Z32 themselves, and the longest rows whose sums keep enough digits then.
NARROW_CARRIED, NARROW_COUNT = 15, 128


@dataclass(frozen=True, slots=True)
class SoftmaxPlan:
    """How rows of at most ``count`` scores in [lo, hi] become weights. ``reach`` bounds |values| in
    attention."""

    method: str
    count: int
    lo: float
    hi: float
    offset: float
    exp: ExpPlan
    inverse: InversePlan
    reach: float

    @property
    def bound(self) -> float:
        return max(abs(self.lo), abs(self.hi))

    @property
    def narrow(self) -> bool:
        """Whether exponentials fit Z32, for weights there."""
        return self.exp.frac <= NARROW_CARRIED

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method, "count": self.count, "lo": self.lo, "hi": self.hi, "offset": self.offset,
            "exp": self.exp.to_dict(), "inverse": self.inverse.to_dict(), "reach": self.reach,
        }  # fmt: skip

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> SoftmaxPlan:
        parts = {"exp": ExpPlan.from_dict(data["exp"]), "inverse": InversePlan.from_dict(data["inverse"])}
        return SoftmaxPlan(**{**data, **parts})


def plan_softmax(
    count: int,
    lo: float,
    hi: float,
    row_lo: float,
    row_hi: float,
    *,
    reach: float = 1.0,
    frac: int = 18,
    method: str | None = None,
    tolerance: float = 5e-4,
    short: bool = False,
) -> SoftmaxPlan:
    """Plan rows of ``count`` scores in [lo, hi] whose maxima lie in [row_lo, row_hi]; margins are the
    caller's. ``short``: for weights in Z32; exponentials are there, too, where rows are short enough and rounding does
    not show.

    Without ``method`` it is ``offset`` if the row with the smallest maximum keeps enough of the ring's bits, else
    ``max``.

    Raises:
        RangeError: an empty range, or scores too wide for the ring.
    """
    if not (count >= 1 and lo <= row_lo <= row_hi <= hi and math.isfinite(hi - lo)):
        raise RangeError(
            f"softmax needs scores [{lo}, {hi}] around row maxima [{row_lo}, {row_hi}]; calibrate first"
        )
    if method not in (None, "offset", "max"):
        raise RangeError(f"softmax knows the methods 'offset' and 'max', not {method!r}")
    reach = max(reach, 2.0**-6)
    shape = (count, lo, hi, row_lo, row_hi, reach, frac, tolerance)
    carried = [NARROW_CARRIED] * (count <= NARROW_COUNT) + [SHORT_CARRIED] if short else [_MOST_CARRIED]
    if method is None:
        found = next((plan for most in carried if (plan := _offset(*shape, most))), None)
        return found or _planned("max", *shape, carried[0])
    return _planned(method, *shape, carried[-1])


def _offset(*shape: float) -> SoftmaxPlan | None:
    """The plan with a public offset; None if rows with a small maximum would keep too few bits."""
    try:
        return _planned("offset", *shape, strict=True)
    except RangeError:
        return None


def _planned(
    method: str,
    count: float,
    lo: float,
    hi: float,
    row_lo: float,
    row_hi: float,
    reach: float,
    frac: float,
    tolerance: float,
    most_carried: float,
    *,
    strict: bool = False,
) -> SoftmaxPlan:
    """The plan of one method; ``strict`` raises RangeError where rounding would show."""
    if method == "offset":
        top, below, offset, spread = hi - row_hi + 0.25, row_hi - lo + 0.25, row_hi, row_hi - row_lo
    else:
        levels = max(1, (int(count) - 1).bit_length())
        slack = 2 * band(2 * max(abs(lo), abs(hi), 1.0), int(frac)) * levels
        top, below, offset, spread = slack, hi - lo + slack, 0.0, 0.0
    least, most = math.exp(-spread) / 2, count * math.exp(top)
    # P V, the sum of count exponentials times values, has to stay in the ring.
    carried = min(int(most_carried), math.floor(HEADROOM_BITS - frac - math.log2(most * max(reach, 1.0))))
    # Smaller scores need no relative accuracy: their errors add up to a total variation of 2e-3 at most.
    cut = -spread - max(1.0, math.log(150.0 * count * tolerance))
    planned = plan_exp(
        -max(below, 1.0), max(top, 0.01), tolerance=tolerance, frac=int(frac), cut=cut, carried=carried
    )
    # Rounding of 2^-frac at every score: four deviations of a weighted sum, and the total variation of a row.
    noise, variation = math.exp(spread) * 2.0**-planned.frac, max(5e-3, 2.5 * tolerance)
    if strict and (1.6 * math.sqrt(count) * noise > tolerance or 0.33 * count * noise > variation):
        raise RangeError(f"rows whose maxima differ by {spread:g} need their own maximum subtracted")
    inverse = plan_inverse(1, least, most, tolerance=tolerance / 4)
    return SoftmaxPlan(method, int(count), lo, hi, offset, planned, inverse, reach)


def split_mask(mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(allowed 0/1 or None, finite additive part or None) of a bool or additive mask, broadcastable to the
    scores."""
    if mask.dtype == torch.bool:
        return (None if bool(mask.all()) else mask), None
    allowed = mask > MASKED_BELOW
    bias = torch.where(allowed, mask.to(torch.float64), 0.0)
    return (None if bool(allowed.all()) else allowed), (bias if bool((bias != 0).any()) else None)


def score_masks(
    shape: tuple[int, int], mask: Tensor | None, causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(allowed or None, finite additive part or None) for scores of ``shape`` (..., L, S), by mask and causality."""
    allowed, bias = (None, None) if mask is None else split_mask(mask)
    if causal:
        allowed = torch.ones(shape, dtype=torch.bool).tril()
    return allowed, bias


async def _weights(
    p: Protocol,
    s: Session,
    x: Shared,
    plan: SoftmaxPlan,
    allowed: Tensor | None,
    frac: int,
    look: Look | None,
) -> tuple[Shared, Shared]:
    """Exponentials over the last axis (masked ones zero) and the reciprocal of each row's sum, of ``frac`` bits.

    ``look`` gets the exponentials' arguments as "scores" and the row sums as "sums", in a fixed order of blocks.
    """
    if x.shape[-1] > plan.count:
        raise TypeMismatch(f"this softmax was planned for rows of {plan.count}, not {x.shape[-1]}")
    keep: Tensor | None = None
    if allowed is not None:
        if allowed.device.type != "meta" and not bool(allowed.expand(x.shape).any(-1).all()):
            raise RangeError("a row of scores is masked entirely; softmax of nothing is undefined")
        keep = allowed.to(torch.int32)
        # Masked scores become the smallest planned one, so that no range is left.
        filler = p.encode(x, torch.where(allowed, 0.0, plan.lo))
        x = p.add_public(s, _kept(p, x, keep), filler)
    if plan.method == "offset":
        moved = p.add_public(s, x, p.encode(x, -plan.offset))
    else:
        moved = p.sub(x, await maximum(p, s.fork("max"), x, -1, plan.bound))
    if look is not None:
        look("scores", moved)
    e = await exp(p, s.fork("exp"), moved, plan.exp, ring=Z32 if plan.narrow else Z64)
    if keep is not None:
        e = _kept(p, e, keep)
    total = await p.cast(s.fork("total"), p.linear(lambda part: part.sum(-1, keepdim=True), e), Z64)
    if look is not None:
        look("sums", total)
    return e, await inverse(p, s.fork("sum"), total, plan.inverse, frac=frac)


def _kept(p: Protocol, x: Shared, keep: Tensor) -> Shared:
    return p.linear(lambda part: part * keep.to(part.device), x)


async def softmax(
    p: Protocol,
    s: Session,
    x: Shared,
    dim: int,
    plan: SoftmaxPlan,
    *,
    allowed: Tensor | None = None,
    look: Look | None = None,
) -> Shared:
    """softmax over one axis; ``allowed`` is a public 0/1 mask over x. Shape kept.

    Domain: scores in [plan.lo, plan.hi], ``offset``: row maxima as calibrated. Error: the planned tolerance (5e-4
    relative by default) per score, and 5e-3 total variation at most from rounding.
    Cost: one exponential (about 400 bits at a range of 16) and one product (3k + f + 2) per score, one reciprocal per
    row; ``max`` adds a tournament: ceil(log2 n) times 4 rounds, about 420 bits per score. Source: [SPU], [CrypTen];
    docs/design/007.
    """
    axis = dim % len(x.shape)
    last = p.linear(lambda part: part.movedim(axis, -1), x)
    mask = None if allowed is None else allowed.expand(x.shape).movedim(axis, -1)
    room = HEADROOM_BITS - plan.exp.frac - 2
    e, inv = await _weights(p, s.fork("weights"), last, plan, mask, min(plan.inverse.frac, room), look)
    y = await _row_product(p, s.fork("scale"), e, inv, e.frac + inv.frac - x.frac)
    return p.linear(lambda part: part.movedim(-1, axis), y)


async def _row_product(
    p: Protocol, s: Session, x: Shared, row: Shared, bits: int, ring: Ring | None = None
) -> Shared:
    """x times one value per row, dropping ``bits`` fraction bits, in ``ring`` (default: x's)."""
    wide = p.linear(lambda part: part.expand(x.shape), row)

    async def step(child: Session, a: Shared, b: Shared) -> Shared:
        return await p.bilinear_truncate(child, torch.mul, a, b, bits, ring=ring)

    return await elementwise(p, s, step, x, wide)


async def attention(
    p: Protocol,
    s: Session,
    q: Value,
    k: Value,
    v: Value,
    plan: SoftmaxPlan,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    grouped: bool = False,
    hidden: tuple[Shared, float] | None = None,
    look: Look | None = None,
) -> Shared:
    """softmax(q k^T scale + mask) v. q (..., H, L, E), k (..., H, S, E), v (..., H, S, V) -> (..., H, L, V).

    ``mask`` is public, bool or additive; entries at or below :data:`MASKED_BELOW` forbid. ``grouped``: k and
    v have fewer heads, each used for several of q's. k and v (or q) may be public. ``hidden``: a secret mask of 0/1
    words without fraction bits, and by how much scores are lowered where it is 0, which the plan's range allows for;
    local. Each row needs a 1.
    Domain: scores in [plan.lo, plan.hi], |v| <= plan.reach. Error: 1e-3 of plan.reach.
    Cost: two matrix products, :func:`softmax`'s exponentials, and one product per output instead of one per
    score.
    Source: as :func:`softmax`; own: division after P V.
    """
    if not isinstance(q, Shared) and not isinstance(k, Shared):
        raise TypeMismatch("attention needs a secret query or key; public scores belong to the client")
    if (
        not isinstance(q, Shared | Tensor)
        or not isinstance(k, Shared | Tensor)
        or not isinstance(v, Shared | Tensor)
    ):
        raise TypeMismatch("attention takes tensors")
    frac = max(x.frac for x in (q, k, v) if isinstance(x, Shared))
    if grouped:
        times = q.shape[-3] // k.shape[-3]
        k, v = _repeated(p, k, times), _repeated(p, v, times)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    attend = _attend
    if isinstance(q, Shared) and q.ring == Z32:
        q, factor = await _rescaled(p, s.fork("q"), q, factor)
        attend = _attend_short
    else:
        q, k = await _narrowed(p, s.fork("q"), q), await _narrowed(p, s.fork("k"), k)
        exponent = math.frexp(abs(factor))[1] - 1
        if ceil_log2(max(plan.bound, 1.0)) + 2 * min(frac, _SCORE_FRAC) + 15 - exponent > HEADROOM_BITS:
            raise RangeError(f"scores of {plan.bound:.3g} leave no headroom in the ring; rescale the queries")
    allowed, bias = score_masks((q.shape[-2], k.shape[-2]), mask, causal)
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    shape = (*lead, q.shape[-2], k.shape[-2])

    async def rows(child: Session, low: int, high: int) -> Shared:
        def cut(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.broadcast_to(shape)[..., low:high, :]

        part = narrow(p, q, len(q.shape) - 2, low, high) if isinstance(q, Shared) else q[..., low:high, :]
        masks = cut(bias), cut(allowed)
        less = None if hidden is None else (_rows(p, hidden[0], low, high), hidden[1])
        return await attend(p, child, part, turned(p, k), v, plan, factor, *masks, less, frac, look)

    bounds = pieces(shape[-2], DEFAULT_TILES.scores // max(1, math.prod(shape) // max(1, shape[-2])))
    if len(bounds) == 1:
        return await rows(s, *bounds[0])
    done = [await rows(s.fork(f"rows{low}"), low, high) for low, high in bounds]
    return concatenate(p, done, len(shape) - 2)


def _rows(p: Protocol, mask: Shared, low: int, high: int) -> Shared:
    """A block of rows of a mask, which may have one row for all."""
    return mask if mask.shape[-2] == 1 else narrow(p, mask, len(mask.shape) - 2, low, high)


def lowered(p: Protocol, s: Session, scores: Shared, mask: Shared, by: float) -> Shared:
    """Scores plus (mask - 1) * by, for a mask of 0/1 words. Local."""
    step = round(by * 2.0**scores.frac)
    added = p.linear(lambda u, m: u + m.broadcast_to(u.shape) * step, scores, mask, frac=scores.frac)
    return p.add_public(s, added, p.encode(added, -by))


async def _attend(
    p: Protocol,
    s: Session,
    q: Value,
    k: Value,
    v: Value,
    plan: SoftmaxPlan,
    factor: float,
    bias: Tensor | None,
    allowed: Tensor | None,
    less: tuple[Shared, float] | None,
    frac: int,
    look: Look | None,
) -> Shared:
    """A block of rows: q (..., l, E), k turned (..., E, S), masks of the scores' shape."""
    scores = await matmul(p, s.fork("scores"), q, k, factor=factor)
    if less is not None:
        scores = lowered(p, s, scores, *less)
    if bias is not None:
        scores = p.add_public(s, scores, p.encode(scores, bias))
    room = HEADROOM_BITS - plan.exp.frac - ceil_log2(plan.reach) - 1
    kept = min(plan.inverse.frac, room)
    e, inv = await _weights(p, s.fork("weights"), scores, plan, allowed, kept, look)
    y = await matmul(p, s.fork("values"), e, v)
    return await _row_product(p, s.fork("scale"), y, inv, y.frac + inv.frac - frac)


async def _attend_short(
    p: Protocol,
    s: Session,
    q: Value,
    k: Value,
    v: Value,
    plan: SoftmaxPlan,
    factor: float,
    bias: Tensor | None,
    allowed: Tensor | None,
    less: tuple[Shared, float] | None,
    frac: int,
    look: Look | None,
) -> Shared:
    """The same in Z32 but for the exponentials: weights are divided by their sum before V, in the product that takes
    them from Z64 to Z32, where no wrap can reach them. ``factor`` is a power of two."""
    if not (isinstance(q, Shared) and isinstance(k, Shared) and isinstance(v, Shared)):
        raise TypeMismatch("attention in Z32 needs secret queries, keys and values")
    bits = q.frac + k.frac - (math.frexp(factor)[1] - 1) - frac
    scores = (await p.bilinear_truncate(s.fork("scores"), kernels.matmul, q, k, bits)).viewed(frac)
    if less is not None:
        scores = lowered(p, s, scores, *less)
    if bias is not None:
        scores = p.add_public(s, scores, p.encode(scores, bias))
    # From Z64 no more than 32 bits are dropped; in Z32 two are left above the weights.
    kept = (29 if plan.narrow else 32 + WEIGHT_FRAC) - plan.exp.frac
    e, inv = await _weights(p, s.fork("weights"), scores, plan, allowed, kept, look)
    inv = p.shorten(s, inv, kept) if plan.narrow else inv
    weights = await _row_product(p, s.fork("scale"), e, inv, e.frac + inv.frac - WEIGHT_FRAC, Z32)
    return await matmul(p, s.fork("values"), weights, v, scales=Scales(frac))


async def _rescaled(p: Protocol, s: Session, q: Shared, factor: float) -> tuple[Shared, float]:
    """q and factor such that the latter is a power of two."""
    mantissa, exponent = math.frexp(factor)
    if mantissa == 0.5:
        return q, factor
    return await scale(p, s, q, mantissa), math.ldexp(1.0, exponent)


async def _narrowed(p: Protocol, s: Session, x: Shared | Tensor) -> Shared | Tensor:
    """At most 18 fraction bits, so that scores keep their headroom."""
    return await with_frac(p, s, x, min(x.frac, _SCORE_FRAC)) if isinstance(x, Shared) else x


def turned(p: Protocol, k: Shared | Tensor) -> Shared | Tensor:
    """The last two axes exchanged. Local."""
    return p.linear(lambda part: part.transpose(-1, -2), k) if isinstance(k, Shared) else k.transpose(-1, -2)


def _repeated(p: Protocol, x: Shared | Tensor, times: int) -> Shared | Tensor:
    """Each head ``times`` times in a row."""
    if isinstance(x, Shared):
        return p.linear(lambda part: part.repeat_interleave(times, -3), x)
    return x.repeat_interleave(times, -3)
