"""Sums of products with one closing."""

from __future__ import annotations

import math

import torch

from sfumato.ops.basic import AS_GIVEN, Scales, at_scale
from sfumato.ops.tiles import DEFAULT_TILES, Tiles, concatenate, in_turns, narrow, thirds
from sfumato.protocol.base import Protocol
from sfumato.ring import kernels
from sfumato.session.session import Branch, Session
from sfumato.types import Shared

__all__ = ["linear_plus"]


async def linear_plus(
    p: Protocol,
    s: Session,
    x: Shared,
    w: Shared,
    bias: Shared | None,
    n: Shared,
    gamma: Shared,
    *,
    scales: Scales = AS_GIVEN,
    tiles: Tiles = DEFAULT_TILES,
) -> Shared:
    """x @ w^T + bias + n * gamma, one truncation. x (..., K), w (O, K), bias and gamma (O,), n (..., O) -> (..., O).

    Cost: that of the layer alone, 3 rounds and 3k + f + 2 bits an element; local work for n * gamma. Error: one ulp.
    Split in three along rows or columns when large.
    """
    rows, beside = (p.linear(lambda part: part.reshape(-1, part.shape[-1]), v) for v in (x, n))
    columns = p.linear(lambda part: part.transpose(-1, -2), w)
    out = scales.of(x)
    # Both products have the finer one's scale.
    frac = max(rows.frac + columns.frac, beside.frac + gamma.frac)
    columns, gamma = p.lift(columns, frac - rows.frac), p.lift(gamma, frac - beside.frac)
    plus = None if bias is None else at_scale(p, bias, frac, rows.ring)
    length, width = beside.shape

    def piece(axis: int, low: int, high: int) -> Branch:
        def cut(v: Shared, where: int) -> Shared:
            return narrow(p, v, where, low, high)

        a, b = (cut(rows, 0), columns) if axis == 0 else (rows, cut(columns, 1))
        g, c = (gamma, plus) if axis == 0 else (cut(gamma, 0), None if plus is None else cut(plus, 0))
        m = cut(beside, axis)

        async def run(child: Session) -> Shared:
            z = await p.bilinear_truncate(
                child, kernels.matmul, a, b, frac - out, plus=c, more=((torch.mul, m, g),), ring=x.ring
            )
            return z.viewed(out)

        return run

    axis = 0 if length >= width else 1
    size = (length, width)[axis]
    if p.parties == 1 or size < 3 or math.prod(x.shape) * width < tiles.products:
        y = await piece(axis, 0, size)(s)
    else:
        y = concatenate(p, await in_turns(s, [piece(axis, *ends) for ends in thirds(size)]), axis)
    return p.linear(lambda part: part.reshape(n.shape), y)
