"""Softmax with relative accuracy in every row.

A row is moved below zero by a calibrated public offset, when the rows' maxima lie close together, or else by
its own maximum from a tournament. Exponentials keep up to 28 fraction bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import RangeError, TypeMismatch
from sfumato.ops.compare import band, maximum
from sfumato.ops.elementary import (
    HEADROOM_BITS,
    ExpPlan,
    InversePlan,
    exp,
    inverse,
    plan_exp,
    plan_inverse,
)
from sfumato.ops.look import Look
from sfumato.ops.tiles import elementwise
from sfumato.protocol import cost
from sfumato.protocol.base import Protocol
from sfumato.session.session import Session
from sfumato.types import Z32, Z64, Ring, Shared

__all__ = [
    "WEIGHT_FRAC",
    "SoftmaxPlan",
    "kept",
    "plan_softmax",
    "row_product",
    "row_weights",
    "softmax",
    "weighed",
]

#: Most fraction bits that exponentials carry.
_MOST_CARRIED = 40
#: Fraction bits of weights in Z32, and of exponentials that become such weights.
WEIGHT_FRAC, SHORT_CARRIED = 14, 26
#: Fraction bits of exponentials that are in Z32 themselves, and the longest rows whose sums keep enough digits then.
NARROW_CARRIED, NARROW_COUNT = 15, 128


@dataclass(frozen=True, slots=True)
class SoftmaxPlan:
    """How rows of at most ``count`` scores in [lo, hi] become weights. ``reach`` bounds |values| in
    attention. ``known``: scores are the argument of the exponential before they are closed, by a product that tells so
    many bits of them; 0 where they are closed first."""

    method: str
    count: int
    lo: float
    hi: float
    offset: float
    exp: ExpPlan
    inverse: InversePlan
    reach: float
    known: int = 0

    @property
    def bound(self) -> float:
        return max(abs(self.lo), abs(self.hi))

    @property
    def narrow(self) -> bool:
        """Whether exponentials fit Z32, for weights there."""
        return self.exp.frac <= NARROW_CARRIED

    @property
    def direct(self) -> bool:
        """Whether they come out there. Squarings need the room of Z64; what comes out of the last one is small."""
        return self.narrow and not self.exp.squarings

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method, "count": self.count, "lo": self.lo, "hi": self.hi, "offset": self.offset,
            "exp": self.exp.to_dict(), "inverse": self.inverse.to_dict(), "reach": self.reach, "known": self.known,
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
    known: int = 0,
) -> SoftmaxPlan:
    """Plan rows of ``count`` scores in [lo, hi] whose maxima lie in [row_lo, row_hi]; margins are the
    caller's. ``short``: for weights in Z32; exponentials are there, too, where rows are short enough and rounding does
    not show. ``known``: bits that a product tells of scores that are not closed; these are planned where method and
    range allow it and closing them costs more, 2 words and a round, than opening them both ways.

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
        for most in carried:
            if (found := _offset(*shape, most)) is not None:
                return _unclosed(found, (*shape, most), 32 if short else 64, known) if known else found
        return _planned("max", *shape, carried[0])
    return _planned(method, *shape, carried[-1])


def _offset(*shape: float, known: int = 64) -> SoftmaxPlan | None:
    """The plan with a public offset; None if rows with a small maximum would keep too few bits."""
    try:
        return _planned("offset", *shape, strict=True, known=known)
    except RangeError:
        return None


def _unclosed(closed: SoftmaxPlan, shape: tuple[float, ...], ring_bits: int, known: int) -> SoftmaxPlan:
    """The plan for scores that are not closed, unless it costs more."""
    found = _offset(*shape, known=known)
    if found is None or found.exp.clip or found.exp.fine != shape[6]:
        return closed
    saved = cost.bits("truncate", k=ring_bits, f=ring_bits - known)
    more = found.exp.bits + found.exp.core.opened - closed.exp.bits
    return replace(found, known=known) if more < saved else closed


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
    known: int = 64,
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
    short = most_carried < _MOST_CARRIED
    # All scores that are clipped together weigh a quarter of the tolerance.
    floor = -spread + math.log(tolerance / (4.0 * count)) if short else None
    planned = plan_exp(
        -max(below, 1.0), max(top, 0.01), tolerance=tolerance, frac=int(frac), cut=cut, carried=carried,
        floor=floor, short=short, known=known,
    )  # fmt: skip
    # Rounding of 2^-frac at every score: four deviations of a weighted sum, and the total variation of a row.
    noise, variation = math.exp(spread) * 2.0**-planned.frac, max(5e-3, 2.5 * tolerance)
    if strict and (1.6 * math.sqrt(count) * noise > tolerance or 0.33 * count * noise > variation):
        raise RangeError(f"rows whose maxima differ by {spread:g} need their own maximum subtracted")
    inverse = plan_inverse(1, least, most, tolerance=tolerance / 4)
    return SoftmaxPlan(method, int(count), lo, hi, offset, planned, inverse, reach)


async def row_weights(
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
        keep = kept(allowed, x.shape)
        # Masked scores become the smallest planned one, so that no range is left.
        filler = p.encode(x, torch.where(allowed, 0.0, plan.lo))
        x = p.add_public(s, _kept(p, x, keep), filler)
    if plan.method == "offset":
        moved = p.add_public(s, x, p.encode(x, -plan.offset))
    else:
        moved = p.sub(x, await maximum(p, s.fork("max"), x, -1, plan.bound))
    if look is not None:
        look("scores", moved)
    e = await exp(p, s.fork("exp"), moved, plan.exp, ring=Z32 if plan.direct else Z64)
    return await weighed(p, s, e, plan, keep, frac, look)


async def weighed(
    p: Protocol,
    s: Session,
    e: Shared,
    plan: SoftmaxPlan,
    keep: Tensor | None,
    frac: int,
    look: Look | None,
) -> tuple[Shared, Shared]:
    """:func:`row_weights` of exponentials as the plan carries them; where ``keep`` is 0 they become zero."""
    if plan.narrow and not plan.direct:
        e = p.shorten(s, e, e.frac)
    if keep is not None:
        e = _kept(p, e, keep)
    total = await p.cast(s.fork("total"), p.linear(lambda part: part.sum(-1, keepdim=True), e), Z64)
    if look is not None:
        look("sums", total)
    return e, await inverse(p, s.fork("sum"), total, plan.inverse, frac=frac)


def kept(allowed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A public mask over scores of ``shape`` as words.

    Raises:
        RangeError: a row has nothing left.
    """
    if allowed.device.type != "meta" and not bool(allowed.expand(shape).any(-1).all()):
        raise RangeError("a row of scores is masked entirely; softmax of nothing is undefined")
    return allowed.to(torch.int32)


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
    e, inv = await row_weights(p, s.fork("weights"), last, plan, mask, min(plan.inverse.frac, room), look)
    y = await row_product(p, s.fork("scale"), e, inv, e.frac + inv.frac - x.frac)
    return p.linear(lambda part: part.movedim(-1, axis), y)


async def row_product(
    p: Protocol, s: Session, x: Shared, row: Shared, bits: int, ring: Ring | None = None
) -> Shared:
    """x times one value per row, dropping ``bits`` fraction bits, in ``ring`` (default: x's)."""
    wide = p.linear(lambda part: part.expand(x.shape), row)

    async def step(child: Session, a: Shared, b: Shared) -> Shared:
        return await p.bilinear_truncate(child, torch.mul, a, b, bits, ring=ring)

    return await elementwise(p, s, step, x, wide)
