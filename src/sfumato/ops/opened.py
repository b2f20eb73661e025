"""Functions of products that are opened without being closed: what a truncation and a reshare would cost is saved.

A linear layer under an activation, and scores under an exponential, are read by nobody else. The summands of the
product drop their own fraction bits and are opened under masks as the function's argument; see :class:`Unclosed` and
docs/design/014. Pieces are those of :mod:`sfumato.ops.tiles`: roles rotate from one to the next.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from sfumato.errors import TypeMismatch
from sfumato.ops.activation import SmoothPlan
from sfumato.ops.basic import AS_GIVEN, Scales, Short, at_scale
from sfumato.ops.elementary import ExpPlan, core_and_squarings
from sfumato.ops.look import Look
from sfumato.ops.tiles import bounds_of_tiles, concatenate, in_turns, narrow
from sfumato.protocol.base import Protocol, Unclosed
from sfumato.ring import kernels
from sfumato.ring.fixed import encode
from sfumato.session.session import Branch, Session
from sfumato.types import Ring, Shared

__all__ = ["curve_of_linear", "exp_of", "known_bits"]


def known_bits(ring_bits: int, left: int, right: int, out: int) -> int:
    """Bits of a product's argument that are known, with ``left`` and ``right`` fraction bits of its operands and
    ``out`` of the argument; 0 if nothing could be dropped."""
    drop = left + right - out
    return ring_bits - drop if 0 <= drop < ring_bits else 0


def _watched(look: Look | None, part: str, s: Session, x: Unclosed) -> Unclosed:
    """The product with what a certificate wants of its argument."""
    found = None if look is None else look.sampler(part, s.path, math.prod(x.shape))
    return x if found is None else replace(x, pick=found[0], seen=found[1])


async def exp_of(
    p: Protocol, s: Session, x: Unclosed, plan: ExpPlan, ring: Ring, look: Look | None
) -> Shared:
    """exp of a product in [plan.lo, plan.hi], with the fraction bits that the plan carries; ``look`` gets the
    arguments as "scores".

    Error: as :func:`sfumato.ops.elementary.exp`, and up to a unit of the argument. Cost: that of its single opening,
    two ways, and the product's message. Source: own (docs/design/014).
    """
    if plan.clip or x.frac != plan.fine:
        raise TypeMismatch(
            f"an exponential with a clip, or of {plan.fine} fraction bits, is not one of {x.type}"
        )
    x = _watched(look, "scores", s, x)
    seen, fine = x.seen, x.frac
    if plan.squarings:
        # The core reads the same words as x / 2^squarings.
        x = replace(
            x, frac=plan.core.frac, offset=x.offset / 2.0**plan.squarings,
            seen=None if seen is None else lambda z: seen(z.viewed(fine)),
        )  # fmt: skip
    return await core_and_squarings(p, s, x, plan, plan.frac, ring)


async def curve_of_linear(
    p: Protocol,
    s: Session,
    x: Shared,
    w: Shared | Tensor,
    bias: Shared | Tensor | None,
    plan: SmoothPlan,
    *,
    turned: bool = True,
    short: Short | None = None,
    scales: Scales = AS_GIVEN,
    look: Look | None = None,
) -> Shared:
    """The planned series of x @ w^T + bias, x (..., K), w (O, K), bias (O,) -> (..., O); ``turned=False``: w (K, O).

    ``short`` and ``scales`` as in :func:`sfumato.ops.basic.matmul`; ``look`` gets the arguments as "argument".
    Domain: the series'. Error: that of the series, and up to a unit of the argument times its slope. Cost: 4 rounds;
    the product's k bits (none with public w), the phase both ways, 2 K words and one closing truncation.
    Source: own (docs/design/014).
    """
    rows = p.linear(lambda part: part.reshape(-1, part.shape[-1]), x)
    ring, out = x.ring, scales.of(x)
    if turned:
        w = p.linear(lambda part: part.transpose(-1, -2), w) if isinstance(w, Shared) else w.transpose(-1, -2)
    if short is not None and isinstance(w, Shared):
        rows, w = short(p, s, rows, w)
    right = w.frac if isinstance(w, Shared) else scales.gain_of(x)
    length, width = rows.shape[0], w.shape[-1]
    by_rows = length >= width
    plus = at_scale(p, bias, rows.frac + right, rows.ring) if isinstance(bias, Shared) else None

    def piece(low: int, high: int) -> Branch:
        a = narrow(p, rows, 0, low, high) if by_rows else rows
        b, c, public = w, plus, None if isinstance(bias, Shared) else bias
        if not by_rows:
            b = narrow(p, w, 1, low, high) if isinstance(w, Shared) else w[:, low:high]
            c = None if plus is None else narrow(p, plus, 0, low, high)
            public = None if public is None else public[low:high]
        shape = (a.shape[0], b.shape[-1])
        words = b if isinstance(b, Tensor) else None

        def mapped(part: Tensor) -> Tensor:
            assert words is not None
            return kernels.matmul(part, encode(words.to(part.device), a.ring, right))

        made = Unclosed(
            kernels.matmul if words is None else mapped, a, b if isinstance(b, Shared) else None, shape,
            a.frac + right - out, out, c, 0.0 if public is None else public,
        )  # fmt: skip

        async def run(child: Session) -> Shared:
            return await p.evaluate(
                child, plan.series, _watched(look, "argument", child, made), frac=out, ring=ring
            )

        return run

    bounds = bounds_of_tiles(length if by_rows else width, length * width)
    if p.parties == 1 or len(bounds) == 1:
        y = await piece(0, length if by_rows else width)(s)
    else:
        y = concatenate(p, await in_turns(s, [piece(*ends) for ends in bounds]), 0 if by_rows else 1)
    return p.linear(lambda part: part.reshape(*x.shape[:-1], width), y)
