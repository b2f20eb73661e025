"""Sums, products, matrix products, convolutions: calls that are linear in each secret."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import TypeMismatch
from sfumato.graph.handlers.kinds import Context, Handler, Measure, Options, Stats
from sfumato.graph.handlers.nonlinear_ranges import Measured, budget, short_up
from sfumato.graph.program import Node
from sfumato.ops import basic
from sfumato.ops.sums import linear_plus
from sfumato.protocol.base import Bilinear, Protocol
from sfumato.ring import kernels
from sfumato.ring.fixed import encode
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = ["HANDLERS_LINEAR", "LINEAR_PLUS", "product"]

#: x W^T + bias + n * gamma: arguments x, W, bias or None, n, gamma; see :mod:`sfumato.graph.fold`.
LINEAR_PLUS = "sfumato.linear_plus"

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Value = Shared | Tensor


# ---- products ----------------------------------------------------------------------------------------------


async def product(
    ctx: Context, s: Session, f: Bilinear, x: Value, y: Value, shape: tuple[int, ...]
) -> Shared:
    """Any bilinear f of a secret with a secret or public reals, one truncation; exact and lighter for words
    of frac 0."""
    p = ctx.protocol
    if isinstance(x, Shared) and isinstance(y, Shared):
        if 0 in (x.frac, y.frac):
            return await p.bilinear(s, f, x, y)
        x, y = _aligned(p, x, y)
        return await p.bilinear_truncate(s, f, x, y, y.frac)
    if isinstance(y, Shared):
        return await product(ctx, s, lambda a, b: f(b, a), y, x, shape)
    if not isinstance(x, Shared):
        raise TypeMismatch("a product of two public values does not belong under the protocol")
    public: Tensor = y
    whole = not public.is_floating_point()
    gain = 0 if whole else ctx.frac if x.frac == 0 else basic.gain_frac(x)

    def on_words(part: Tensor) -> Tensor:
        return f(part, encode(public.to(part.device), x.ring, gain))

    if whole or x.frac == 0:
        return p.linear(on_words, x, frac=x.frac + gain)
    return await p.linear_truncate(s, on_words, x, gain, shape=shape, gain_frac=gain)


def _aligned(p: Protocol, x: Shared, y: Shared) -> tuple[Shared, Shared]:
    frac = max(x.frac, y.frac)
    return p.lift(x, frac), p.lift(y, frac)


def _plain_scales(*values: Any) -> bool:
    """All secrets have the same fraction bits, so that the fused operations of ``ops`` apply."""
    fracs = {v.frac for v in values if isinstance(v, Shared)}
    return len(fracs) == 1 and 0 not in fracs


def _at_plan_scale(ctx: Context, x: Any) -> Any:
    """Whole-number secrets (frac 0) lifted to the plan's scale; everything else as it is."""
    return ctx.protocol.lift(x, ctx.frac) if isinstance(x, Shared) and x.frac == 0 else x


# ---- products in 32-bit words -------------------------------------------------------------------------------

#: Multiply-adds per operand entry from which half the work of a product is worth shortening its operands.
_REUSE = 100
#: How far a sum may pass the largest one that calibration saw before it leaves Z32; watched.
_SUM_SLACK = 2.0
#: Deviation of a shortened entry, in units.
_SHORTENED = 0.5


def _operand_sizes(first: int) -> Measure:
    """Measure: sizes of the two operands that start at argument ``first``."""

    def measure(args: Args, kwargs: Kwargs, out: Tensor) -> Measured:
        x, y = args[first : first + 2]
        if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.numel() and y.numel()):
            return {}
        sizes = {"hi_reuse": _reuse(x, y, out)}
        for key, operand in (("left", x), ("right", y)):
            real = operand.to(torch.float64)
            sizes |= {
                f"hi_{key}": float(real.abs().max()),
                f"hi_{key}_scale": float(real.square().mean().sqrt()),
            }
        return sizes

    return measure


def _reuse(x: Tensor, y: Tensor, out: Tensor) -> float:
    """Multiply-adds of a product over the entries of its operands."""
    depth = (
        y.numel() // y.shape[0]
        if out.dim() > 2 and y.dim() == out.dim() and x.dim() == y.dim()
        else x.shape[-1]
    )
    return out.numel() * depth / (x.numel() + y.numel())


def _choose_words(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    """Z32 for a large product of secrets, where its sums fit and the profile's budget allows the rounding."""
    weights = node.target in _WEIGHTED and options.secret != "inputs+weights"
    if (
        options.ring != "Z64"
        or weights
        or stats.get("hi_reuse", 0.0) < _REUSE
        or stats.get("lo_scale", 0.0) <= 0.0
    ):
        return {}
    bound = short_up(stats["hi_out"] * _SUM_SLACK)
    total = 30 - math.frexp(bound)[1]  # |sum| 2^total < 2^30
    left, right = max(stats["hi_left_scale"], 2.0**-40), max(stats["hi_right_scale"], 2.0**-40)
    first = (total + math.frexp(right / left)[1]) // 2
    room = [29 - math.frexp(_SUM_SLACK * stats[f"hi_{key}"])[1] for key in ("left", "right")]
    first = max(0, min(first, room[0], options.frac))
    second = max(0, min(total - first, room[1], options.frac))
    # Independent errors of both operands, weighed by the other, over the size of a sum of as many products.
    noise = _SHORTENED * math.hypot(2.0**-first / left, 2.0**-second / right)
    if first + second < options.frac or noise > budget(options).relative:
        return {}
    return {"method": "32-bit product", "error": noise, "words": [first, second], "sum": bound}


def _short(ctx: Context, node: Node) -> basic.Short | None:
    words = ctx.choice(node).get("words")
    return None if words is None else basic.Short(*words)


def _scales(ctx: Context, node: Node) -> basic.Scales:
    """Scales that a mixed plan has given this call."""
    return basic.Scales(*ctx.choice(node).get("scales", (None, None)))


def _one_truncation(ctx: Context, node: Node, x: Value, y: Value) -> bool:
    """Whether the fused operations of ``ops`` take these operands as they are."""
    whole = any(isinstance(v, Shared) and v.frac == 0 for v in (x, y))
    return _plain_scales(x, y) or (not whole and "scales" in ctx.choice(node))


async def _matmul(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    x, y = args[0], args[1]
    if _one_truncation(ctx, node, x, y) and len(x.shape) > 1 and len(y.shape) > 1:
        scales = _scales(ctx, node)
        return await basic.matmul(ctx.protocol, s, x, y, short=_short(ctx, node), scales=scales)
    return await product(ctx, s, kernels.matmul, x, y, node.shape)


async def _addmm(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """beta * bias + alpha * (x @ y)."""
    bias, x, y = args[:3]
    alpha, beta = float(kwargs.get("alpha", 1)), float(kwargs.get("beta", 1))
    p = ctx.protocol
    if beta != 1.0 and beta != 0.0:
        bias = await _times(ctx, s.fork("beta"), bias, beta)
    if not _one_truncation(ctx, node, x, y):
        z = await product(ctx, s.fork("product"), kernels.matmul, x, y, node.shape)
        z = z if alpha == 1.0 else await basic.scale(p, s.fork("alpha"), z, alpha)
        return z if beta == 0.0 else basic.add(p, s, z, bias)
    return await basic.matmul(
        p,
        s,
        x,
        y,
        factor=alpha,
        plus=None if beta == 0.0 else _at_plan_scale(ctx, bias),
        short=_short(ctx, node),
        scales=_scales(ctx, node),
    )


async def _times(ctx: Context, s: Session, x: Any, c: float) -> Any:
    if isinstance(x, Shared):
        return await basic.scale(ctx.protocol, s, x, c)
    return x * c


async def _scaled(ctx: Context, s: Session, node: Node, x: Shared, c: Any) -> Shared:
    """A secret times a public factor, which in a mixed plan has the fraction bits that the call's range allows."""
    return await basic.scale(ctx.protocol, s, _at_plan_scale(ctx, x), c, gain=_scales(ctx, node).gain)


async def _linear(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    x, w = _at_plan_scale(ctx, args[0]), args[1]
    bias = args[2] if len(args) > 2 else None
    if isinstance(x, Shared):
        return await basic.linear(
            ctx.protocol, s, x, w, bias, short=_short(ctx, node), scales=_scales(ctx, node)
        )
    turned = ctx.protocol.linear(lambda part: part.transpose(-1, -2), w)
    z = await basic.matmul(ctx.protocol, s, x, turned)
    return z if bias is None else basic.add(ctx.protocol, s, z, bias)


async def _linear_plus(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """x W^T + bias + n * gamma, all secret: a layer, and the gain of the norm that is added to it."""
    return await linear_plus(ctx.protocol, s, *args, scales=_scales(ctx, node))


async def _einsum(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    equation, operands = args[0], args[1]
    if len(operands) == 1:
        return ctx.protocol.linear(lambda part: torch.einsum(equation, part), operands[0])
    x, y = operands
    return await product(ctx, s, lambda a, b: torch.einsum(equation, a, b), x, y, node.shape)


def _few_operands(node: Node, secret: tuple[bool, ...]) -> str | None:
    return "einsum of more than two operands; split it into pairs" if len(node.args[1]) > 2 else None


# ---- convolutions ------------------------------------------------------------------------------------------


def _each(value: Any, axes: int, default: int) -> tuple[int, ...]:
    if value is None:
        return (default,) * axes
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * (axes if len(value) == 1 else 1)


def _geometry(node: Node, args: Args) -> basic.Conv:
    axes = len(node.shape) - 2
    stride, padding, dilation, groups = (*args[3:7], *(None,) * (7 - len(args)))[:4]
    return basic.Conv(
        _each(stride, axes, 1), _each(padding, axes, 0), _each(dilation, axes, 1), int(groups or 1)
    )


async def _conv(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    x, w = _at_plan_scale(ctx, args[0]), args[1]
    bias = args[2] if len(args) > 2 else None
    geometry = _geometry(node, args)
    if isinstance(x, Shared):
        return await basic.conv(
            ctx.protocol, s, x, w, bias, geometry, short=_short(ctx, node), scales=_scales(ctx, node)
        )
    z = await product(ctx, s, geometry, x, w, node.shape)
    if bias is None:
        return z
    return basic.add(ctx.protocol, s, z, _column(ctx, bias, len(node.shape)))


def _column(ctx: Context, bias: Value, rank: int) -> Value:
    def spread(t: Tensor) -> Tensor:
        return t.reshape(1, -1, *([1] * (rank - 2)))

    return ctx.protocol.linear(spread, bias) if isinstance(bias, Shared) else spread(bias)


async def _conv_transpose(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """conv_transpose(x, w, bias, stride, padding, output_padding, groups, dilation) as a convolution of
    spread-out x."""
    x, w = _at_plan_scale(ctx, args[0]), args[1]
    bias, stride, padding, extra, _, dilation = (*args[2:8], *(None,) * (8 - len(args)))[:6]
    axes = len(node.shape) - 2
    stride, padding, extra, dilation = (
        _each(v, axes, d) for v, d in ((stride, 1), (padding, 0), (extra, 0), (dilation, 1))
    )
    kernel = tuple(w.shape[2:])
    edges = [
        (d * (k - 1) - q, d * (k - 1) - q + e)
        for d, k, q, e in zip(dilation, kernel, padding, extra, strict=True)
    ]

    def spread(t: Tensor) -> Tensor:
        size = [(n - 1) * st + 1 for n, st in zip(t.shape[2:], stride, strict=True)]
        wide = torch.zeros((*t.shape[:2], *size), dtype=t.dtype, device=t.device)
        wide[(slice(None), slice(None), *(slice(None, None, st) for st in stride))] = t
        return torch.nn.functional.pad(wide, [edge for pair in reversed(edges) for edge in pair])

    def turned(t: Tensor) -> Tensor:
        return t.flip(tuple(range(2, t.dim()))).transpose(0, 1)

    p = ctx.protocol
    geometry = basic.Conv((1,) * axes, (0,) * axes, dilation, 1)
    spread_x = p.linear(spread, x) if isinstance(x, Shared) else spread(x)
    turned_w = p.linear(turned, w) if isinstance(w, Shared) else turned(w)
    if isinstance(spread_x, Shared):
        return await basic.conv(p, s, spread_x, turned_w, bias, geometry)
    z = await product(ctx, s, geometry, spread_x, turned_w, node.shape)
    return z if bias is None else basic.add(p, s, z, _column(ctx, bias, len(node.shape)))


def _one_group(node: Node, secret: tuple[bool, ...]) -> str | None:
    groups = node.args[6] if len(node.args) > 6 else 1
    return "a grouped transposed convolution is not supported" if groups != 1 else None


# ---- elementwise -------------------------------------------------------------------------------------------


def _wide(ctx: Context, x: Any, shape: tuple[int, ...]) -> Any:
    """A secret broadcast to the call's result, so that a larger public operand fits."""
    if isinstance(x, Shared) and x.shape != shape:
        return ctx.protocol.linear(lambda part: part.broadcast_to(shape), x)
    return x


async def _add(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    return await _sum_of(
        ctx, s, node, args[0], args[1], float(kwargs.get("alpha", args[2] if len(args) > 2 else 1))
    )


async def _sub(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    return await _sum_of(
        ctx, s, node, args[0], args[1], -float(kwargs.get("alpha", args[2] if len(args) > 2 else 1))
    )


async def _rsub(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    return await _sum_of(
        ctx, s, node, args[1], args[0], -float(kwargs.get("alpha", args[2] if len(args) > 2 else 1))
    )


async def _sum_of(ctx: Context, s: Session, node: Node, x: Any, y: Any, alpha: float) -> Shared:
    if alpha not in (1.0, -1.0):
        y, alpha = await _times(ctx, s.fork("alpha"), y, alpha), 1.0
    x, y = _at_plan_scale(ctx, _wide(ctx, x, node.shape)), _at_plan_scale(ctx, _wide(ctx, y, node.shape))
    return basic.add(ctx.protocol, s, x, y, alpha=alpha)


async def _mul(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    x, y = args[0], args[1]
    if not isinstance(x, Shared):
        x, y = y, x
    if isinstance(y, Shared):
        if _plain_scales(x, y):
            return await basic.mul(ctx.protocol, s, x, y)
        return await product(ctx, s, torch.mul, x, y, node.shape)
    if isinstance(y, Tensor) and not y.is_floating_point():
        return await product(ctx, s, torch.mul, x, y, node.shape)
    return await _scaled(ctx, s, node, x, y)


async def _div(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """x / c for public c: IEEE division is the same on every machine, so the parties may invert c
    themselves."""
    x, c = args[0], args[1]
    inverse = 1.0 / (c.to(torch.float64) if isinstance(c, Tensor) else float(c))
    return await _scaled(ctx, s, node, x, inverse)


def _public_divisor(node: Node, secret: tuple[bool, ...]) -> str | None:
    if len(secret) > 1 and secret[1]:
        return "divides by a secret"
    if any(node.kwargs.values()):
        return "rounds the quotient of a secret"
    return None


async def _neg(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    return basic.neg(ctx.protocol, args[0])


async def _pow(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """Whole powers from 1 by products."""
    x, p = _at_plan_scale(ctx, args[0]), ctx.protocol
    exponent = int(args[1])
    out, base, step = None, x, 0
    while exponent:
        if exponent & 1:
            out = base if out is None else await basic.mul(p, s.fork(f"mul{step}"), out, base)
        exponent >>= 1
        if exponent:
            base = await basic.square(p, s.fork(f"square{step}"), base)
        step += 1
    assert out is not None
    return out


def _whole_power(node: Node, secret: tuple[bool, ...]) -> str | None:
    exponent = node.args[1]
    if isinstance(exponent, int | float) and float(exponent).is_integer() and 1 <= exponent <= 8:
        return None
    return "a secret to a power other than 1, 2, ..., 8"


async def _square(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    return await basic.square(ctx.protocol, s, _at_plan_scale(ctx, args[0]))


def _addc(combine: Callable[..., Any]) -> Handler:
    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        x, a, b = args[:3]
        inner = await combine(ctx, s.fork("inner"), node, (a, b), {})
        return await _sum_of(ctx, s, node, x, inner, float(kwargs.get("value", 1)))

    return Handler(run)


async def _lerp(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """x + weight * (y - x)."""
    x, y, weight = args[:3]
    gap = await _sum_of(ctx, s, node, y, x, -1.0)
    step = await _mul(ctx, s.fork("weight"), node, (gap, weight), {})
    return await _sum_of(ctx, s, node, x, step, 1.0)


async def _cast(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """0/1 or whole words as a float: the same words at the plan's scale."""
    shared: Shared = _at_plan_scale(ctx, args[0])
    return shared


def _to_float_only(node: Node, secret: tuple[bool, ...]) -> str | None:
    return None if node.dtype.is_floating_point else "rounds a secret to whole numbers"


_ADD, _SUB, _RSUB, _MUL = Handler(_add), Handler(_sub), Handler(_rsub), Handler(_mul)
_DIV = Handler(_div, supports=_public_divisor)
_POW = Handler(_pow, supports=_whole_power)
_CONV = Handler(_conv, _operand_sizes(0), _choose_words)
_MATMUL = Handler(_matmul, _operand_sizes(0), _choose_words)
_ADDMM = Handler(_addmm, _operand_sizes(1), _choose_words)
#: Calls whose second operand is a weight of the model.
_WEIGHTED = frozenset(f"aten.{name}.default" for name in ("linear", "conv1d", "conv2d", "conv3d"))

HANDLERS_LINEAR: dict[str, Handler] = {
    "aten.linear.default": Handler(_linear, _operand_sizes(0), _choose_words),
    LINEAR_PLUS: Handler(_linear_plus, _operand_sizes(0)),
    "aten.addmm.default": _ADDMM,
    "aten.baddbmm.default": _ADDMM,
    "aten.matmul.default": _MATMUL,
    "aten.mm.default": _MATMUL,
    "aten.bmm.default": _MATMUL,
    "aten.mv.default": Handler(_matmul),
    "aten.einsum.default": Handler(_einsum, supports=_few_operands),
    "aten.conv1d.default": _CONV,
    "aten.conv2d.default": _CONV,
    "aten.conv3d.default": _CONV,
    "aten.conv_transpose1d.default": Handler(_conv_transpose, supports=_one_group),
    "aten.conv_transpose2d.input": Handler(_conv_transpose, supports=_one_group),
    "aten.add.Tensor": _ADD,
    "aten.add.Scalar": _ADD,
    "aten.sub.Tensor": _SUB,
    "aten.sub.Scalar": _SUB,
    "aten.rsub.Scalar": _RSUB,
    "aten.rsub.Tensor": _RSUB,
    "aten.mul.Tensor": _MUL,
    "aten.mul.Scalar": _MUL,
    "aten.div.Tensor": _DIV,
    "aten.div.Scalar": _DIV,
    "aten.true_divide.Tensor": _DIV,
    "aten.neg.default": Handler(_neg, local=True),
    "aten.pow.Tensor_Scalar": _POW,
    "aten.square.default": Handler(_square),
    "aten.addcmul.default": _addc(_mul),
    "aten.lerp.Scalar": Handler(_lerp),
    "aten.lerp.Tensor": Handler(_lerp),
    "aten.to.dtype": Handler(_cast, supports=_to_float_only, local=True),
}
