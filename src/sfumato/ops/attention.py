"""Scaled dot-product attention: two products around :mod:`sfumato.ops.softmax`, the division by row sums after P V.

In Z32 the division comes before V, in the product that brings the weights there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.errors import RangeError, TypeMismatch
from sfumato.ops.basic import Scales, Value, factor_words, matmul, scale
from sfumato.ops.elementary import HEADROOM_BITS, with_frac
from sfumato.ops.look import Look
from sfumato.ops.masks import lowered, raised, score_masks
from sfumato.ops.opened import exp_of, known_bits
from sfumato.ops.softmax import WEIGHT_FRAC, SoftmaxPlan, kept, row_product, row_weights, weighed
from sfumato.ops.tiles import DEFAULT_TILES, bounds_of_tiles, ceil_log2, concatenate, in_turns, narrow, pieces
from sfumato.protocol.base import Protocol, Unclosed
from sfumato.ring import kernels
from sfumato.session.session import Branch, Session
from sfumato.types import Z32, Z64, Shared

__all__ = ["attention", "known_scores", "turned"]

#: Fraction bits of queries and keys at most, so that scores keep their headroom.
_SCORE_FRAC = 18


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
        gain = factor_words(factor)[1]
        if ceil_log2(max(plan.bound, 1.0)) + 2 * min(frac, _SCORE_FRAC) + gain > HEADROOM_BITS:
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
    room = HEADROOM_BITS - plan.exp.frac - ceil_log2(plan.reach) - 1
    left = min(plan.inverse.frac, room)
    if plan.known and isinstance(q, Shared) and isinstance(k, Shared):
        e, inv = await _opened(p, s, q, k, plan, factor, q.frac, bias, allowed, less, left, look)
    else:
        scores = await matmul(p, s.fork("scores"), q, k, factor=factor)
        if less is not None:
            scores = lowered(p, s, scores, *less)
        if bias is not None:
            scores = p.add_public(s, scores, p.encode(scores, bias))
        e, inv = await row_weights(p, s.fork("weights"), scores, plan, allowed, left, look)
    y = await matmul(p, s.fork("values"), e, v)
    return await row_product(p, s.fork("scale"), y, inv, y.frac + inv.frac - frac)


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
    # From Z64 no more than 32 bits are dropped; in Z32 two are left above the weights.
    left = (29 if plan.narrow else 32 + WEIGHT_FRAC) - plan.exp.frac
    if plan.known:
        e, inv = await _opened(p, s, q, k, plan, factor, frac, bias, allowed, less, left, look)
    else:
        bits = q.frac + k.frac - (math.frexp(factor)[1] - 1) - frac
        scores = (await p.bilinear_truncate(s.fork("scores"), kernels.matmul, q, k, bits)).viewed(frac)
        if less is not None:
            scores = lowered(p, s, scores, *less)
        if bias is not None:
            scores = p.add_public(s, scores, p.encode(scores, bias))
        e, inv = await row_weights(p, s.fork("weights"), scores, plan, allowed, left, look)
    inv = p.shorten(s, inv, left) if plan.narrow else inv
    weights = await row_product(p, s.fork("scale"), e, inv, e.frac + inv.frac - WEIGHT_FRAC, Z32)
    return await matmul(p, s.fork("values"), weights, v, scales=Scales(frac))


async def _opened(
    p: Protocol,
    s: Session,
    q: Shared,
    k: Shared,
    plan: SoftmaxPlan,
    factor: float,
    frac: int,
    bias: Tensor | None,
    allowed: Tensor | None,
    less: tuple[Shared, float] | None,
    left: int,
    look: Look | None,
) -> tuple[Shared, Shared]:
    """What :func:`row_weights` gives, of scores with ``frac`` fraction bits that are opened without being closed."""
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    shape = (*lead, q.shape[-2], k.shape[-1])
    keep = None if allowed is None else kept(allowed, shape)
    multiplier, gain = factor_words(factor)
    bits = q.frac + k.frac + gain - frac
    # Masked scores become the smallest planned one, so that no range is left.
    move = torch.tensor(-plan.offset - (0.0 if less is None else less[1]), dtype=torch.float64)
    move = move if bias is None else move + bias
    move = move if allowed is None else torch.where(allowed, move, plan.lo - plan.offset)

    def piece(low: int, high: int) -> Branch:
        def cut(t: Tensor) -> Tensor:
            return t.broadcast_to(shape)[..., low:high, :]

        mine = None if keep is None else cut(keep)

        def product(a: Tensor, b: Tensor) -> Tensor:
            z = kernels.matmul(a, b)
            z = z if multiplier == 1 else z * multiplier
            return z if mine is None or z.device.type == "meta" else z * mine.to(z.device)

        a, plus = narrow(p, q, len(q.shape) - 2, low, high), None
        if less is not None:
            plus = raised(p, _rows(p, less[0], low, high), less[1], frac + bits, mine)
        x = Unclosed(
            product,
            a,
            k,
            (*lead, high - low, shape[-1]),
            bits,
            frac,
            plus,
            cut(move) if move.dim() else float(move),
        )

        async def run(child: Session) -> Shared:
            return await exp_of(p, child, x, plan.exp, Z32 if plan.direct else Z64, look)

        return run

    child = s.fork("scores")
    bounds = bounds_of_tiles(shape[-2], math.prod(shape))
    if p.parties == 1 or len(bounds) == 1:
        e = await piece(0, shape[-2])(child)
    else:
        e = concatenate(p, await in_turns(child, [piece(*ends) for ends in bounds]), len(shape) - 2)
    return await weighed(p, s.fork("weights"), e, plan, keep, left, look)


def known_scores(factor: float, frac: int, *, short: bool) -> int:
    """Bits that the product of queries and keys of ``frac`` fraction bits tells of a score, times ``factor``, before it
    is closed; ``short``: in Z32."""
    if short:
        return known_bits(32, frac, frac + factor_words(_power(factor))[1], frac)
    if frac > _SCORE_FRAC:  # queries and keys are truncated first, and scores are not what was planned
        return 0
    return known_bits(64, frac, frac + factor_words(factor)[1], frac)


def _power(factor: float) -> float:
    """The power of two that is left of a factor when queries take the rest, or the factor if it is one."""
    mantissa, exponent = math.frexp(factor)
    return factor if mantissa == 0.5 else math.ldexp(1.0, exponent)


async def _rescaled(p: Protocol, s: Session, q: Shared, factor: float) -> tuple[Shared, float]:
    """q and factor such that the latter is a power of two."""
    power = _power(factor)
    return (q, power) if power == factor else (await scale(p, s, q, factor / power), power)


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
