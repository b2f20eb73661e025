"""Sums, products, matrix products and convolutions of secrets with secrets or public reals.

Scale policy: every result has the fraction bits of its first secret argument; a product is truncated once, with bias,
residual and public factors folded into that truncation. Costs are those of the protocol's fused moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import TypeMismatch
from sfumato.ops.tiles import (
    DEFAULT_TILES,
    Step,
    Tiles,
    concatenate,
    elementwise,
    in_thirds,
    narrow,
    thirds,
)
from sfumato.protocol.base import Protocol
from sfumato.ring import kernels
from sfumato.ring.fixed import encode
from sfumato.session.session import Branch, Session
from sfumato.types import Ring, Shared

__all__ = [
    "AS_GIVEN",
    "GAIN_FRAC",
    "Conv",
    "Scales",
    "Short",
    "add",
    "at_scale",
    "conv",
    "factor_words",
    "gain_frac",
    "linear",
    "matmul",
    "mul",
    "neg",
    "scale",
    "square",
    "sub",
]

#: Fraction bits of public factors (weights and constants) where the ring has room for them.
GAIN_FRAC = 20

Value = Shared | Tensor | float | int


def _is_public(x: Value) -> bool:
    return not isinstance(x, Shared)


def _tensor(x: Tensor | float | int) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)


def add(p: Protocol, s: Session, x: Value, y: Value, *, alpha: float = 1.0) -> Shared:
    """x + alpha * y with broadcasting for alpha = 1 or -1; either may be public. Local, exact.

    Raises:
        TypeMismatch: both are public, or alpha is another number (use :func:`scale` first).
    """
    if alpha not in (1.0, -1.0):
        raise TypeMismatch(f"add takes alpha 1 or -1, not {alpha}; scale the operand first")
    if isinstance(x, Shared) and isinstance(y, Shared):
        frac = max(x.frac, y.frac)
        x, y = p.lift(x, frac), p.lift(y, frac)
        return p.add(x, y) if alpha == 1.0 else p.sub(x, y)
    if isinstance(x, Shared):
        return p.add_public(s, x, p.encode(x, alpha * _tensor(y)))  # type: ignore[arg-type]
    if isinstance(y, Shared):
        signed = y if alpha == 1.0 else neg(p, y)
        return p.add_public(s, signed, p.encode(signed, _tensor(x)))
    raise TypeMismatch("add needs at least one secret")


def sub(p: Protocol, s: Session, x: Value, y: Value) -> Shared:
    """x - y with broadcasting; either may be public. Local, exact."""
    return add(p, s, x, y, alpha=-1.0)


def neg(p: Protocol, x: Shared) -> Shared:
    """-x. Local, exact."""
    return p.linear(torch.neg, x)


async def scale(
    p: Protocol, s: Session, x: Shared, c: Tensor | float | int, *, gain: int | None = None
) -> Shared:
    """x * c for public reals c, with broadcasting. Python whole numbers cost nothing; else one truncation.

    Error: one ulp plus |x| 2^-(gain + 1). Cost: 2 rounds, 2k + gain + 2 bits.
    """
    t = _tensor(c)
    shape = tuple(torch.broadcast_shapes(x.shape, t.shape))
    if not isinstance(c, Tensor) and float(c) == round(float(c)):
        whole = int(c)
        return p.linear(lambda part: part * whole, x)
    if gain is None:
        gain = gain_frac(x) if isinstance(c, Tensor) else _scalar_gain(float(c), x)
    g = gain
    if t.numel() > 1 or shape != x.shape:
        return await p.linear_truncate(
            s, lambda part: part * encode(t.to(part.device), x.ring, g), x, g, shape=shape, gain_frac=g
        )

    async def step(child: Session, piece: Shared) -> Shared:
        return await p.linear_truncate(
            child,
            lambda part: part * encode(t.reshape(()).to(part.device), x.ring, g),
            piece,
            g,
            shape=piece.shape,
            gain_frac=g,
        )

    return await elementwise(p, s, step, x)


def gain_frac(x: Shared) -> int:
    """Fraction bits of public tensors that multiply x. By its type alone: message sizes must not depend on values that
    may be known only at the run. Eight bits are left for the product's whole part and its sign."""
    return min(GAIN_FRAC, x.ring.bits - 8 - x.frac)


def _scalar_gain(c: float, x: Shared) -> int:
    """Fraction bits of a number that the plan knows: about as many significant bits whatever its size."""
    if c == 0.0 or not math.isfinite(c):
        return gain_frac(x)
    return max(0, min(30, gain_frac(x) - (math.frexp(c)[1] - 1)))


async def mul(p: Protocol, s: Session, x: Value, y: Value, *, plus: Shared | None = None) -> Shared:
    """x * y (+ plus) with broadcasting; truncated to x's scale. ``plus`` has x's scale."""
    if _is_public(x):
        x, y = y, x
    if not isinstance(x, Shared):
        raise TypeMismatch("mul needs at least one secret")
    if not isinstance(y, Shared):
        scaled = await scale(p, s, x, y)
        return scaled if plus is None else p.add(scaled, plus)
    lifted = None if plus is None else p.lift(plus, x.frac + y.frac)
    if x.shape == y.shape and (lifted is None or lifted.shape == x.shape):
        bits = y.frac

        async def step(child: Session, a: Shared, b: Shared, c: Shared | None = None) -> Shared:
            return await p.bilinear_truncate(child, torch.mul, a, b, bits, plus=c)

        return await elementwise(p, s, step, x, y, *([] if lifted is None else [lifted]))
    return await p.bilinear_truncate(s, torch.mul, x, y, y.frac, plus=lifted)


async def square(p: Protocol, s: Session, x: Shared) -> Shared:
    """x * x, truncated to x's scale."""
    return await mul(p, s, x, x)


@dataclass(frozen=True, slots=True)
class Short:
    """Fraction bits with which the operands of a product go into Z32, where a plan proved that sums fit 30 bits.

    Error: 1/2 unit of 2^-left and 2^-right deviation per entry. The product's local work is halved.
    """

    left: int
    right: int

    def __call__(self, p: Protocol, s: Session, x: Shared, y: Shared) -> tuple[Shared, Shared]:
        """Both operands in Z32. Local."""
        return p.shorten(s, x, min(self.left, x.frac)), p.shorten(s, y, min(self.right, y.frac))


@dataclass(frozen=True, slots=True)
class Scales:
    """Fraction bits of a product's result (default: those of its first secret), and of its public operand (default:
    :func:`gain_frac`)."""

    out: int | None = None
    gain: int | None = None

    def of(self, x: Shared) -> int:
        """The result's fraction bits."""
        return x.frac if self.out is None else self.out

    def gain_of(self, x: Shared) -> int:
        """The public operand's fraction bits."""
        return gain_frac(x) if self.gain is None else self.gain


AS_GIVEN = Scales()


async def matmul(
    p: Protocol,
    s: Session,
    x: Value,
    y: Value,
    *,
    factor: float = 1.0,
    plus: Value | None = None,
    tiles: Tiles = DEFAULT_TILES,
    short: Short | None = None,
    scales: Scales = AS_GIVEN,
) -> Shared:
    """factor * (x @ y) (+ plus), batched as in torch, one truncation. x (..., M, K), y (..., K, N).

    ``short``: a product of two secrets is made in Z32 and closed in Z64. ``scales``: of the result and of a public
    operand.
    ``factor`` is a public number folded into the truncation; ``plus`` (public or secret) broadcasts to the result.
    Raises TypeMismatch when both are public. Split in three along M or N when large.
    """
    if isinstance(x, Shared) and isinstance(y, Shared):
        return await _tiled_product(p, s, x, y, factor, plus, tiles, short, scales)
    if isinstance(x, Shared):
        return await _public_product(p, s, x, _tensor(y), False, factor, plus, tiles, scales)  # type: ignore[arg-type]
    if isinstance(y, Shared):
        return await _public_product(p, s, y, _tensor(x), True, factor, plus, tiles, scales)
    raise TypeMismatch("matmul needs at least one secret")


def factor_words(factor: float) -> tuple[int, int]:
    """(multiplier, its fraction bits) of a public factor, as short as they can be: (1, 0) for one, (1, 3) for 1/8."""
    bits = max(0, 14 - (math.frexp(factor)[1] - 1))
    multiplier = round(factor * 2.0**bits)
    while bits and multiplier % 2 == 0:
        multiplier, bits = multiplier // 2, bits - 1
    return multiplier, bits


async def _tiled_product(
    p: Protocol,
    s: Session,
    x: Shared,
    y: Shared,
    factor: float,
    plus: Value | None,
    tiles: Tiles,
    short: Short | None,
    scales: Scales,
) -> Shared:
    multiplier, gain = factor_words(factor)
    out, ring = scales.of(x), x.ring
    if short is not None and factor == 1.0:
        x, y = short(p, s, x, y)
    bits = x.frac + y.frac + gain - out

    def product(a: Tensor, b: Tensor) -> Tensor:
        z = kernels.matmul(a, b)
        return z if multiplier == 1 else z * multiplier

    async def step(child: Session, a: Shared, b: Shared, c: Shared | None = None) -> Shared:
        typed = None if c is None else at_scale(p, c, out + bits, a.ring).viewed(a.frac + b.frac)
        z = await p.bilinear_truncate(child, product, a, b, bits, plus=typed, ring=ring)
        return z.viewed(out)

    shape = _matmul_shape(x.shape, y.shape)
    extra = _as_secret_plus(p, s, x, plus, shape)
    work = math.prod(shape) * x.shape[-1]
    if p.parties == 1 or work < tiles.products or len(x.shape) < 2 or len(y.shape) < 2:
        z = await step(s, x, y, *extra[0])
    elif x.shape[-2] >= y.shape[-1]:
        z = await _split(p, s, step, x, y, extra[0], shape, -2)
    else:
        z = await _split(p, s, step, x, y, extra[0], shape, -1)
    return z if extra[1] is None else p.add_public(s, z, p.encode(z, extra[1]))


def at_scale(p: Protocol, x: Shared, frac: int, ring: Ring) -> Shared:
    """A summand of a product at its scale; in Z32 its words mod 2^32, right wherever the sum fits."""
    lifted = p.lift(x, frac)
    return lifted if lifted.ring == ring else p.linear(lambda part: part.to(ring.dtype), lifted, ring=ring)


async def _split(
    p: Protocol,
    s: Session,
    step: Callable[..., object],
    x: Shared,
    y: Shared,
    extra: list[Shared],
    shape: tuple[int, ...],
    axis: int,
) -> Shared:
    """Three pieces along the rows of x (axis -2) or the columns of y (axis -1)."""
    pieces = []
    for low, high in thirds(shape[axis]):
        a = narrow(p, x, len(x.shape) + axis, low, high) if axis == -2 else x
        b = narrow(p, y, len(y.shape) + axis, low, high) if axis == -1 else y
        cut = [narrow(p, c, len(shape) + axis, low, high) for c in extra]
        pieces.append([a, b, *cut])
    return concatenate(p, await in_thirds(s, step, pieces), axis)  # type: ignore[arg-type]


def _as_secret_plus(
    p: Protocol, s: Session, x: Shared, plus: Value | None, shape: tuple[int, ...]
) -> tuple[list[Shared], Tensor | None]:
    """Split ``plus`` into a full-shaped secret to fold in, or a public tensor to add afterwards."""
    if plus is None:
        return [], None
    if isinstance(plus, Shared):
        return [p.linear(lambda part: part.broadcast_to(shape), plus)], None
    return [], _tensor(plus)


def _matmul_shape(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    meta = torch.matmul(torch.empty(tuple(a), device="meta"), torch.empty(tuple(b), device="meta"))
    return tuple(meta.shape)


async def _public_product(
    p: Protocol,
    s: Session,
    x: Shared,
    w: Tensor,
    left: bool,
    factor: float,
    plus: Value | None,
    tiles: Tiles,
    scales: Scales,
) -> Shared:
    """x @ w, or w @ x when ``left``, for public reals w; factor is folded into w in float64."""
    w = w.to(torch.float64) * factor if factor != 1.0 else w
    gain, out_frac = scales.gain_of(x), scales.of(x)
    drop = x.frac + gain - out_frac
    shape = _matmul_shape(w.shape, x.shape) if left else _matmul_shape(x.shape, w.shape)
    extra, public = _as_secret_plus(p, s, x, plus, shape)

    def run(child: Session, a: Shared, c: Shared | None, out: tuple[int, ...]) -> object:
        def f(part: Tensor) -> Tensor:
            words = encode(w.to(part.device), x.ring, gain)
            return kernels.matmul(words, part) if left else kernels.matmul(part, words)

        lifted = None if c is None else p.lift(c, x.frac + gain)
        return p.linear_truncate(child, f, a, drop, shape=out, plus=lifted, gain_frac=gain)

    async def step(child: Session, a: Shared, *c: Shared) -> Shared:
        rest = list(shape)
        axis = len(shape) - (1 if left else 2)
        if len(x.shape) >= 2:
            rest[axis] = a.shape[-1 if left else -2]
        return await run(child, a, c[0] if c else None, tuple(rest))  # type: ignore[misc]

    work = math.prod(shape) * x.shape[-2 if left and len(x.shape) > 1 else -1]
    axis = -1 if left else -2
    if p.parties == 1 or work < tiles.products or len(x.shape) < 2 or shape[axis] < 3:
        z = await step(s, x, *extra)
    else:
        pieces = [
            [
                narrow(p, x, len(x.shape) + axis, low, high),
                *(narrow(p, c, len(shape) + axis, low, high) for c in extra),
            ]
            for low, high in thirds(shape[axis])
        ]
        z = concatenate(p, await in_thirds(s, step, pieces), axis)
    return z if public is None else p.add_public(s, z, p.encode(z, public))


async def linear(
    p: Protocol,
    s: Session,
    x: Shared,
    w: Shared | Tensor,
    bias: Shared | Tensor | None = None,
    *,
    plus: Shared | None = None,
    tiles: Tiles = DEFAULT_TILES,
    short: Short | None = None,
    scales: Scales = AS_GIVEN,
) -> Shared:
    """x @ w^T + bias (+ plus) with one truncation. x (..., K), w (O, K), bias (O,) -> (..., O). ``short`` and
    ``scales`` as in :func:`matmul`."""
    lead = x.shape[:-1]
    rows = p.linear(lambda part: part.reshape(-1, part.shape[-1]), x)
    turned = (
        p.linear(lambda part: part.transpose(-1, -2), w) if isinstance(w, Shared) else w.transpose(-1, -2)
    )
    addend: Value | None = (
        plus if plus is None else p.linear(lambda part: part.reshape(-1, part.shape[-1]), plus)
    )
    public_bias = None
    if isinstance(bias, Shared):
        addend = bias if addend is None else add(p, s, addend, bias)
    elif bias is not None:
        public_bias = bias
    z = await matmul(
        p,
        s,
        rows,
        turned,
        plus=addend if addend is not None else public_bias,
        tiles=tiles,
        short=short,
        scales=scales,
    )
    if addend is not None and public_bias is not None:
        z = p.add_public(s, z, p.encode(z, public_bias))
    return p.linear(lambda part: part.reshape(*lead, part.shape[-1]), z)


@dataclass(frozen=True, slots=True)
class Conv:
    """Geometry of a convolution: one entry per spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def out_shape(self, x: Sequence[int], w: Sequence[int]) -> tuple[int, ...]:
        """(N, O, ...) for x (N, C, ...) and w (O, C / groups, ...)."""
        spatial = tuple(
            (n + 2 * pad - dil * (k - 1) - 1) // st + 1
            for n, k, st, pad, dil in zip(x[2:], w[2:], self.stride, self.padding, self.dilation, strict=True)
        )
        return (x[0], w[0], *spatial)

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        return kernels.conv(
            x, w, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups
        )


async def conv(
    p: Protocol,
    s: Session,
    x: Shared,
    w: Shared | Tensor,
    bias: Shared | Tensor | None,
    geometry: Conv,
    *,
    plus: Shared | None = None,
    tiles: Tiles = DEFAULT_TILES,
    short: Short | None = None,
    scales: Scales = AS_GIVEN,
) -> Shared:
    """Convolution (+ bias + plus) with one truncation. x (N, C, ...), w (O, C / groups, ...) -> (N, O, ...). ``short``
    and ``scales`` as in :func:`matmul`.

    Split in three along the output channels when large (never across groups).
    """
    shape = geometry.out_shape(x.shape, w.shape)
    public_bias: Tensor | None = None
    addend = plus
    if bias is not None:
        if isinstance(bias, Shared):
            column = p.linear(
                lambda part: part.reshape(1, -1, *([1] * (len(shape) - 2))).broadcast_to(shape), bias
            )
            addend = column if addend is None else add(p, s, addend, column)
        else:
            public_bias = bias.reshape(1, -1, *([1] * (len(shape) - 2)))

    frac, ring = scales.of(x), x.ring
    if short is not None and isinstance(w, Shared):
        x, w = short(p, s, x, w)

    async def step(child: Session, a: Shared, kernel: Shared | Tensor, c: Shared | None) -> Shared:
        out = geometry.out_shape(a.shape, kernel.shape)
        if isinstance(kernel, Shared):
            lifted = None if c is None else at_scale(p, c, a.frac + kernel.frac, a.ring)
            bits = a.frac + kernel.frac - frac
            return await p.bilinear_truncate(child, geometry, a, kernel, bits, plus=lifted, ring=ring)
        gain = scales.gain_of(a)
        lifted = None if c is None else p.lift(c, a.frac + gain)

        def f(part: Tensor) -> Tensor:
            return geometry(part, encode(kernel.to(part.device), a.ring, gain))

        drop = a.frac + gain - frac
        return await p.linear_truncate(child, f, a, drop, shape=out, plus=lifted, gain_frac=gain)

    work = math.prod(shape) * math.prod(w.shape[1:])
    if p.parties == 1 or work < tiles.products or geometry.groups > 1 or shape[1] < 3:
        z = await step(s, x, w, addend)
    else:
        branches = []
        for i, (low, high) in enumerate(thirds(shape[1])):
            kernel = narrow(p, w, 0, low, high) if isinstance(w, Shared) else w.narrow(0, low, high - low)
            part = None if addend is None else narrow(p, addend, 1, low, high)
            branches.append(_turned(step, s.turn + i, x, kernel, part))
        z = concatenate(p, await s.gather(*branches), 1)
    return z if public_bias is None else p.add_public(s, z, p.encode(z, public_bias))


def _turned(step: Step, turn: int, *args: object) -> Branch:
    return lambda child: step(child.fork("turn", turn=turn), *args)
