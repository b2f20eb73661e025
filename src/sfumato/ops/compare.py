"""Comparisons on a calibrated range: ReLU and its kin, clamps, maxima and where they are.

A comparison looks at ``bits`` bits below the range's top, so two values within ``band(bound, bits)`` of each
other may be ordered either way; a maximum is then off by at most that band. 16 bits on [-8, 8] give a band
of 2^-12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from sfumato.errors import RangeError
from sfumato.ops.tiles import concatenate, elementwise, narrow
from sfumato.protocol.base import Protocol, Window
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = [
    "absolute",
    "argmax",
    "band",
    "brackets",
    "clamp",
    "leaky_relu",
    "less_than_zero",
    "max_pool",
    "maximum",
    "negative_part",
    "overshoots",
    "played",
    "pools",
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
    top = math.frexp(bound)[1] + frac  # bound < 2^(top - frac), exactly
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
    Cost: 4 rounds, 95 + 3k + 2 bits (289) with ``bits`` = 16. Source: own, docs/design/003; [SHAFT] for the
    window.
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


async def negative_part(
    p: Protocol,
    s: Session,
    x: Shared,
    bound: float,
    *ys: Shared,
    bits: int = WINDOW_BITS,
) -> Shared:
    """[x < 0] * x, or [x < 0] * y for each y (of x's ring and shape), stacked in front if there are several.

    Domain: |x| <= bound, any y. Error: for x in [0, band) the choice may be that of a negative value.
    Cost: 4 rounds, 353 bits with ``bits`` = 16; 3k = 192 for each further y. Source: as
    :func:`less_than_zero`.
    """
    seen = window(bound, x.frac, bits)

    async def step(child: Session, piece: Shared, *chosen: Shared) -> Shared:
        y = (
            p.linear(lambda *parts: torch.stack(parts), *chosen)
            if len(chosen) > 1
            else (chosen or (None,))[0]
        )
        return await p.select_negative(child, piece, seen, y)

    return await elementwise(p, s, step, x, *ys)


async def relu(p: Protocol, s: Session, x: Shared, bound: float, *, bits: int = WINDOW_BITS) -> Shared:
    """max(x, 0). Domain: |x| <= bound. Error: one band (x in [0, band) may become 0). Source: as
    :func:`less_than_zero`.

    Cost: 4 rounds, 353 bits at 16.
    """
    return p.sub(x, await negative_part(p, s, x, bound, bits=bits))


async def leaky_relu(
    p: Protocol, s: Session, x: Shared, slope: float, bound: float, *, bits: int = WINDOW_BITS
) -> Shared:
    """x for x > 0, else slope * x. Domain: |x| <= bound. Error: one band times (1 - slope) plus one ulp.

    Cost: 6 rounds; a :func:`relu` and a truncation (2k + 24 + 2 bits). Source: as :func:`relu`.
    """
    gain = 24
    factor = round((slope - 1.0) * 2.0**gain)
    part = await negative_part(p, s.fork("part"), x, bound, bits=bits)

    async def step(child: Session, piece: Shared, whole: Shared) -> Shared:
        plus = p.lift(whole, whole.frac + gain)
        return await p.linear_truncate(
            child, lambda u: u * factor, piece, gain, shape=piece.shape, plus=plus, gain_frac=gain
        )

    return await elementwise(p, s.fork("scale"), step, part, x)


async def absolute(p: Protocol, s: Session, x: Shared, bound: float, *, bits: int = WINDOW_BITS) -> Shared:
    """|x|. Domain: |x| <= bound. Error: two bands at most, near zero. Cost: as :func:`relu`. Source: as
    :func:`relu`."""
    part = await negative_part(p, s, x, bound, bits=bits)
    return p.linear(lambda whole, negative: whole - 2 * negative, x, part)


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
    """x clipped to [low, high]; None leaves a side open. Both sides are one batch.

    Domain: |x| <= bound. Error: one band next to a limit. Cost: 4 rounds, the bits of :func:`relu` for each
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
    limits = [limit for limit in (low, high) if limit is not None]
    if not limits:
        return None, None
    reach = bound + max(abs(limit) for limit in limits)
    levels = torch.tensor(limits, dtype=torch.float64).reshape(-1, *([1] * len(x.shape)))
    stacked = p.linear(lambda part: part.expand(len(limits), *part.shape), x)
    moved = p.add_public(s, stacked, p.encode(stacked, -levels))
    # max(m, 0) = m - min(m, 0): at both sides a negative part is asked for.
    parts = await negative_part(p, s.fork("parts"), moved, reach, bits=bits)
    under = _first(p, parts, 0) if low is not None else None
    over = _first(p, p.sub(moved, parts), len(limits) - 1) if high is not None else None
    return under, over


def _first(p: Protocol, x: Shared, index: int) -> Shared:
    """One element of the first axis."""
    return p.linear(lambda part: part[index], x)


# ---- maxima ------------------------------------------------------------------------------------------------


def brackets(n: int) -> tuple[int, ...]:
    """How many nearly equal groups of up to four each level of a tournament of n forms: fewest rounds, then fewest
    bits."""
    return _brackets(n)[2]


def pools(n: int, groups: int) -> list[tuple[int, int, int]]:
    """(from, to, candidates a group) of the groups that a level of n forms, larger ones first. In a pool, candidate c
    of the groups is the c-th of as many equal pieces."""
    size, larger = n // groups, n % groups
    cut = larger * (size + 1)
    return [(low, high, count) for low, high, count in ((0, cut, size + 1), (cut, n, size)) if high > low]


@cache
def _brackets(n: int) -> tuple[int, int, tuple[int, ...]]:
    """Rounds and bits of a tournament of n, and its groups by level."""
    if n <= 1:
        return 0, 0, ()
    best: tuple[int, int, tuple[int, ...]] | None = None
    for groups in range(-(-n // 4), n // 2 + 1):
        rounds, bits, rest = _brackets(groups)
        size, larger = n // groups, n % groups
        rounds += _PLAYED[size + (larger > 0)][0]
        bits += larger * _PLAYED[size + (larger > 0)][1] + (groups - larger) * _PLAYED[size][1]
        found = rounds, bits, (groups, *rest)
        best = found if best is None else min(best, found)
    assert best is not None
    return best


#: Rounds and bits of the maximum of 1 to 4 candidates, with 16-bit windows in a 64-bit ring.
_PLAYED = {1: (0, 0), 2: (4, 353), 3: (5, 681), 4: (5, 1113)}


async def maximum(
    p: Protocol, s: Session, x: Shared, dim: int, bound: float, *, bits: int = WINDOW_BITS
) -> Shared:
    """max over one axis, kept with length 1. x (..., n, ...) -> (..., 1, ...).

    Domain: |x| <= bound. Error: at most ceil(log2 n) bands below the true maximum, never above it.
    Cost: levels of groups of up to four, 5 rounds each (4 if of two): 5 ceil(log4 n) at most; 340 to 371 bits
    for each element but one.
    Source: own, docs/design/003; [SPU] for the tournament.
    """
    axis = dim % len(x.shape)
    (best,) = await _tournament(p, s, [x], axis, bound, bits)
    return best


async def argmax(
    p: Protocol, s: Session, x: Shared, dim: int, bound: float, *, bits: int = WINDOW_BITS
) -> Shared:
    """The index of the maximum over one axis, as a secret whole number (frac 0); the axis is kept with
    length 1.

    Domain: |x| <= bound. Error: exact unless the best two are within ceil(log2 n) bands of each other.
    Cost: the rounds of :func:`maximum`; about 2k bits more for each element: one sign chooses value and index.
    Source: as :func:`maximum`.
    """
    axis = dim % len(x.shape)
    n = x.shape[axis]
    line = [1] * len(x.shape)
    line[axis] = n
    zeros = p.linear(lambda part: part * 0, x, frac=0)
    numbers = torch.arange(n, dtype=torch.float64).reshape(line).expand(x.shape)
    index = p.add_public(s, zeros, p.encode(zeros, numbers, 0))
    _, found = await _tournament(p, s, [x, index.viewed(x.frac)], axis, bound, bits)
    return found.viewed(0)


async def _tournament(
    p: Protocol, s: Session, xs: Sequence[Shared], axis: int, bound: float, bits: int
) -> list[Shared]:
    """The largest of the first secret along the axis, and what the others have there."""
    for level, groups in enumerate(brackets(xs[0].shape[axis])):

        async def play(
            child: Session, low: int, high: int, count: int, xs: Sequence[Shared] = xs
        ) -> list[Shared]:
            width = (high - low) // count
            lines = [
                [narrow(p, x, axis, low + i * width, low + (i + 1) * width) for i in range(count)] for x in xs
            ]
            return await played(p, child, lines, 2 * bound, bits)

        winners = await s.fork(f"level{level}").gather(
            *(
                partial(play, low=low, high=high, count=count)
                for low, high, count in pools(xs[0].shape[axis], groups)
            )
        )
        xs = [concatenate(p, [pool[i] for pool in winners], axis) for i in range(len(xs))]
    return list(xs)


async def played(
    p: Protocol, s: Session, lines: Sequence[Sequence[Shared]], reach: float, bits: int
) -> list[Shared]:
    """For each line of up to four equal-shaped candidates, the one at which the first line is largest."""
    count, every = len(lines[0]), [x for line in lines for x in line]
    if count == 1:
        return [line[0] for line in lines]
    if count == 2:
        gaps = [p.sub(left, right) for left, right in lines]
        lag = await negative_part(p, s, gaps[0], reach, *(gaps if len(gaps) > 1 else ()), bits=bits)
        lags = [_first(p, lag, i) for i in range(len(gaps))] if len(gaps) > 1 else [lag]
        return [p.sub(left, behind) for (left, _), behind in zip(lines, lags, strict=True)]
    seen = window(reach, every[0].frac, bits)

    async def step(child: Session, *pieces: Shared) -> Shared:
        shape = pieces[0].shape
        y = p.linear(lambda *parts: torch.stack(parts).reshape((len(lines), count, *shape)), *pieces)
        return await p.select_largest(child, _first(p, y, 0), seen, y)

    best = await elementwise(p, s, step, *every)
    return [_first(p, best, i) for i in range(len(lines))]


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
