"""Comparisons on a calibrated range: ReLU and its kin, clamps, maxima and where they are.

A comparison looks at ``bits`` bits below the range's top, so two values within ``band(bound, bits)`` of each
other may be ordered either way; a maximum is then off by at most that band. 16 bits on [-8, 8] give a band
of 2^-12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sfumato.errors import RangeError
from sfumato.ops.basic import neg
from sfumato.ops.tiles import concatenate, elementwise, narrow
from sfumato.protocol.base import Protocol, Window
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = [
    "absolute",
    "argmax",
    "band",
    "clamp",
    "leaky_relu",
    "less_than_zero",
    "max_pool",
    "maximum",
    "overshoots",
    "relu",
    "select",
    "window",
]

#: Bits a comparison looks at by default.
WINDOW_BITS = 16


def window(bound: float, frac: int, bits: int = WINDOW_BITS) -> Window:
    """The narrow window for values in [-bound, bound] with ``frac`` fraction bits.

    Raises:
        RangeError: the bound is not positive and finite, or does not fit the ring.
    """
    if not (math.isfinite(bound) and bound > 0):
        raise RangeError(f"a comparison needs a positive bound on its values, not {bound}; calibrate first")
    top = math.floor(math.log2(bound)) + 1 + frac
    if top >= 62:
        raise RangeError(f"values up to {bound:g} with {frac} fraction bits leave no headroom in the ring")
    shift = max(0, top - (bits - 1))
    return Window(shift, max(2, top + 1 - shift))


def band(bound: float, frac: int, bits: int = WINDOW_BITS) -> float:
    """Differences smaller than this may be judged either way."""
    return 2.0 ** (window(bound, frac, bits).shift - frac)


async def less_than_zero(
    p: Protocol, s: Session, x: Shared, bound: float, *, bits: int = WINDOW_BITS
) -> Shared:
    """[x < 0] as words 0 and 1 with no fraction bits.

    Domain: |x| <= bound. Error: values in [0, band) may count as negative; otherwise exact.
    Cost: 2 + ceil(log2(m - 1)) + 2 rounds, about 8m + 3k bits with m = ``bits`` (310 at 16). Source:
    secure-transformers 9 L3.
    """
    seen = window(bound, x.frac, bits)

    async def step(child: Session, piece: Shared) -> Shared:
        return await p.less_than_zero(child, piece, seen)

    return await elementwise(p, s, step, x)


async def select(p: Protocol, s: Session, bit: Shared, x: Shared, y: Shared | None = None) -> Shared:
    """bit ? x : y (default zero), exact. Domain: bit in {0, 1}, any x. Cost: 1 round, 3k bits. Source: Araki
    et al. 2016."""

    async def step(child: Session, b: Shared, *xy: Shared) -> Shared:
        return await p.select(child, b, *xy)

    return await elementwise(p, s, step, bit, x, *([] if y is None else [y]))


async def relu(p: Protocol, s: Session, x: Shared, bound: float, *, bits: int = WINDOW_BITS) -> Shared:
    """max(x, 0). Domain: |x| <= bound. Error: one band (x in [0, band) may become 0). Source:
    secure-transformers 9 L3.

    Cost: a comparison, 1 round and 3k bits (502 bits at 16).
    """
    negative = await less_than_zero(p, s.fork("sign"), x, bound, bits=bits)
    return p.sub(x, await select(p, s.fork("select"), negative, x))


async def leaky_relu(
    p: Protocol, s: Session, x: Shared, slope: float, bound: float, *, bits: int = WINDOW_BITS
) -> Shared:
    """x for x > 0, else slope * x. Domain: |x| <= bound. Error: one band times (1 - slope) plus one ulp.

    Cost: a comparison and a fused product (3k + f + 2 bits). Source: as :func:`relu`.
    """
    negative = await less_than_zero(p, s.fork("sign"), x, bound, bits=bits)
    gain = 24
    factor = round((slope - 1.0) * 2.0**gain)

    async def step(child: Session, b: Shared, piece: Shared) -> Shared:
        plus = p.lift(piece, piece.frac + gain)
        y = await p.bilinear_truncate(
            child, lambda u, v: u * v * factor, b, piece, gain, plus=plus.viewed(piece.frac)
        )
        return y.viewed(piece.frac)

    return await elementwise(p, s.fork("select"), step, negative, x)


async def absolute(p: Protocol, s: Session, x: Shared, bound: float, *, bits: int = WINDOW_BITS) -> Shared:
    """|x|. Domain: |x| <= bound. Error: two bands at most, near zero. Cost: as :func:`relu`. Source: as
    :func:`relu`."""
    negative = await less_than_zero(p, s.fork("sign"), x, bound, bits=bits)
    part = await select(p, s.fork("select"), negative, x)
    return p.sub(x, p.linear(lambda words: 2 * words, part))


async def clamp(
    p: Protocol,
    s: Session,
    x: Shared,
    low: float | None,
    high: float | None,
    bound: float,
    *,
    bits: int = WINDOW_BITS,
) -> Shared:
    """x clipped to [low, high]; None leaves a side open. Both comparisons share their rounds.

    Domain: |x| <= bound. Error: one band next to a limit. Cost: rounds of :func:`relu`, its bits for each
    side.
    Source: [CrypTen], [SHAFT]; docs/design/005 (batched clip).
    """
    overs = await overshoots(p, s, x, low, high, bound, bits=bits)
    for over in overs:
        if over is not None:
            x = p.sub(x, over)
    return x


async def overshoots(
    p: Protocol,
    s: Session,
    x: Shared,
    low: float | None,
    high: float | None,
    bound: float,
    *,
    bits: int = WINDOW_BITS,
) -> tuple[Shared | None, Shared | None]:
    """(min(x - low, 0), max(x - high, 0)): what a clamp takes away at each side; None for an open side.

    Domain, Error, Cost, Source: as :func:`clamp`.
    """
    if low is None and high is None:
        return None, None
    reach = bound + max(abs(limit) for limit in (low, high) if limit is not None)

    async def side(child: Session, limit: float, below: bool) -> Shared:
        moved = p.add_public(child, x, p.encode(x, -limit))
        turned = moved if below else neg(p, moved)
        negative = await less_than_zero(p, child.fork("sign"), turned, reach, bits=bits)
        return await select(p, child.fork("select"), negative, moved)

    sides = [(limit, below) for limit, below in ((low, True), (high, False)) if limit is not None]
    found = await s.gather(*(partial(side, limit=limit, below=below) for limit, below in sides))
    return (found[0] if low is not None else None), (found[-1] if high is not None else None)


# ---- maxima ------------------------------------------------------------------------------------------------


async def maximum(
    p: Protocol, s: Session, x: Shared, dim: int, bound: float, *, bits: int = WINDOW_BITS
) -> Shared:
    """max over one axis, kept with length 1. x (..., n, ...) -> (..., 1, ...).

    Domain: |x| <= bound. Error: at most ceil(log2 n) bands below the true maximum, never above it.
    Cost: ceil(log2 n) levels of a :func:`relu` (about 9 rounds), (n - 1) / n of its bits per element in all.
    Source: [SPU]; docs/design/003.
    """
    axis = dim % len(x.shape)
    level = 0
    while x.shape[axis] > 1:
        left, right, rest = _halves(p, x, axis)
        gap = p.sub(left, right)
        lead = await relu(p, s.fork(f"level{level}"), gap, 2 * bound, bits=bits)
        best = p.add(right, lead)
        x = best if rest is None else concatenate(p, [best, rest], axis)
        level += 1
    return x


def _halves(p: Protocol, x: Shared, axis: int) -> tuple[Shared, Shared, Shared | None]:
    n = x.shape[axis]
    half = n // 2
    rest = narrow(p, x, axis, 2 * half, n) if n % 2 else None
    return narrow(p, x, axis, 0, half), narrow(p, x, axis, half, 2 * half), rest


async def argmax(
    p: Protocol, s: Session, x: Shared, dim: int, bound: float, *, bits: int = WINDOW_BITS
) -> Shared:
    """The index of the maximum over one axis, as a secret whole number (frac 0); the axis is kept with
    length 1.

    Domain: |x| <= bound. Error: exact unless the best two are within ceil(log2 n) bands of each other.
    Cost: the rounds of :func:`maximum`; 3k bits more per comparison. Source: as :func:`maximum`.
    """
    axis = dim % len(x.shape)
    n = x.shape[axis]
    line = [1] * len(x.shape)
    line[axis] = n
    zeros = p.linear(lambda part: part * 0, x, frac=0)
    numbers = torch.arange(n, dtype=torch.float64).reshape(line).expand(x.shape)
    index = p.add_public(s, zeros, p.encode(zeros, numbers, 0))
    level = 0
    while x.shape[axis] > 1:
        child = s.fork(f"level{level}")
        left, right, rest = _halves(p, x, axis)
        first, second, other = _halves(p, index, axis)
        loses = await less_than_zero(p, child.fork("sign"), p.sub(left, right), 2 * bound, bits=bits)
        x, index = await child.gather(
            partial(_choose, p, loses, right, left), partial(_choose, p, loses, second, first)
        )
        if rest is not None and other is not None:
            x, index = concatenate(p, [x, rest], axis), concatenate(p, [index, other], axis)
        level += 1
    return index


async def _choose(p: Protocol, bit: Shared, x: Shared, y: Shared, s: Session) -> Shared:
    return await select(p, s, bit, x, y)


async def max_pool(
    p: Protocol,
    s: Session,
    x: Shared,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    bound: float,
    *,
    dilation: Sequence[int] | None = None,
    ceil_mode: bool = False,
    bits: int = WINDOW_BITS,
) -> Shared:
    """Maxima over windows of the last len(kernel) axes. x (N, C, ...) -> (N, C, ...).

    Domain: |x| <= bound. Error: as :func:`maximum` over the window. Cost: as :func:`maximum`, per window
    element.
    Source: as :func:`maximum`.
    """
    if ceil_mode:
        raise RangeError("max_pool with ceil_mode is not supported; pad the input instead")
    axes = len(kernel)
    dilation = dilation or [1] * axes
    if any(padding):
        x = _padded(p, s, x, padding, -bound)
    first = len(x.shape) - axes
    for i in range(axes):
        x = _unfold(p, x, first + i, kernel[i], stride[i], dilation[i])
    lines = p.linear(lambda part: part.flatten(-axes), x)
    pooled = await maximum(p, s.fork("max"), lines, -1, bound, bits=bits)
    return p.linear(lambda part: part.squeeze(-1), pooled)


def _padded(p: Protocol, s: Session, x: Shared, padding: Sequence[int], low: float) -> Shared:
    """x with a border of ``low``: zeros by linear padding, then the border added in public."""
    sizes = [n for pad in reversed(padding) for n in (pad, pad)]
    wide = p.linear(lambda part: torch.nn.functional.pad(part, sizes), x)
    inside = torch.zeros(x.shape[-len(padding) :], dtype=torch.float64)
    border = torch.nn.functional.pad(inside, sizes, value=low)
    return p.add_public(s, wide, p.encode(wide, border))


def _unfold(p: Protocol, x: Shared, axis: int, size: int, stride: int, dilation: int) -> Shared:
    """Windows along ``axis``; their elements become a new last axis."""
    count = (x.shape[axis] - dilation * (size - 1) - 1) // stride + 1
    every = (slice(None),) * axis + (slice(None, None, stride),)

    def f(part: Tensor) -> Tensor:
        reach = (count - 1) * stride + 1
        return torch.stack([part.narrow(axis, i * dilation, reach)[every] for i in range(size)], -1)

    return p.linear(f, x)
