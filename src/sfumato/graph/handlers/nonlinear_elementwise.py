"""Activations, roots, quotients and comparisons of single values."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.errors import CaptureError
from sfumato.graph.handlers.kinds import Context, Handler, Options, Stats, Supports
from sfumato.graph.handlers.linear import HANDLERS_LINEAR
from sfumato.graph.handlers.nonlinear_ranges import (
    Args,
    Kwargs,
    Measured,
    argument,
    bound_of,
    budget,
    chosen,
    in_range,
    in_z64,
    like,
    positive,
    range_of,
    room,
    seen,
    spread,
    widened,
    window_bits,
)
from sfumato.graph.handlers.smooth import OPENINGS, log_range_of
from sfumato.graph.program import Node
from sfumato.ops import activation, basic, compare, elementary
from sfumato.protocol import cost
from sfumato.protocol.base import Protocol
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = ["ELEMENTWISE"]

#: ``compute(p, s, x, bound, args, kwargs)`` or a function of ``ops`` with the same beginning.
Compute = Callable[..., Awaitable[Shared]]


# ---- exp, roots, quotients ---------------------------------------------------------------------------------


def _choose_exp(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    """Relative accuracy down to the last bit of the plan's fraction, absolute below it."""
    lo, hi = range_of(node, stats, options)
    cut = -math.log(2.0) * options.frac

    def make() -> dict[str, Any]:
        allowed = budget(options).largest
        plan = elementary.plan_exp(lo, hi, tolerance=allowed, frac=options.frac, cut=cut)
        return {
            "method": "clipped exp" if plan.clip else "exp", "range": [lo, hi], "bits": plan.bits,
            "error": plan.error, "headroom": plan.core.word - room(math.exp(plan.core.hi), plan.core.frac_out),
            "plan": plan.to_dict(),
        }  # fmt: skip

    return chosen(make)


async def _exp(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    plan = elementary.ExpPlan.from_dict(ctx.choice(node)["plan"])
    x = await in_z64(ctx, s.fork("in"), args[0])
    return await like(
        ctx, s.fork("out"), await elementary.exp(ctx.protocol, s.fork("exp"), x, plan, frac=x.frac)
    )


def _inverse_choice(
    root: int, stats: Stats, key: str, options: Options, what: str, product: bool = False
) -> dict[str, Any]:
    low, high = log_range_of(stats, options, key, what)

    def make() -> dict[str, Any]:
        allowed = budget(options).largest
        plan = elementary.plan_inverse(root, low, high, tolerance=allowed, rows=False)
        more = cost.bits("bilinear_truncate", k=64, f=options.frac) if product else 0
        return {
            "method": "buckets" if plan.buckets else "series", "range": [low, high], "error": plan.error,
            "bits": plan.bits + more, "headroom": plan.headroom, "plan": plan.to_dict(),
        }  # fmt: skip

    return chosen(make)


def _inverse(root: int, compute: Compute, what: str) -> Handler:
    """A power -1, -1/2 or 1/2 of a positive secret."""

    def choose(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
        seen(node, stats, "in")
        return _inverse_choice(root, stats, "in", options, what, compute is elementary.sqrt)

    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        plan = elementary.InversePlan.from_dict(ctx.choice(node)["plan"])
        x = await in_z64(ctx, s.fork("in"), args[0])
        return await like(ctx, s.fork("out"), await compute(ctx.protocol, s.fork("root"), x, plan))

    return Handler(run, positive, choose)


_RECIPROCAL = _inverse(1, elementary.reciprocal, "a reciprocal")
_RSQRT = _inverse(2, elementary.rsqrt, "rsqrt")
_SQRT = _inverse(2, elementary.sqrt, "sqrt")


def _measure_div(args: Args, kwargs: Kwargs, out: Tensor) -> Measured:
    if not isinstance(args[1], Tensor):
        return {}
    return {key.replace("in", "div"): value for key, value in positive(args[1:], kwargs, out).items()}


def _choose_div(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    if "lo_log_div" not in stats:
        return {}  # a public divisor, or one that a run will refuse
    try:
        choice = _inverse_choice(1, stats, "div", options, "a divisor", True)
    except CaptureError:
        return {}
    return {**choice, "argument": 1}


async def _div(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """x / y; a secret y through its reciprocal with 24 fraction bits more than its size asks for."""
    if not isinstance(args[1], Shared):
        result: Shared = await HANDLERS_LINEAR[node.target].run(ctx, s, node, args, kwargs)
        return result
    choice = ctx.choice(node)
    if not choice:
        raise CaptureError(f"{node.name} divides by a secret that calibration did not see to be positive")
    plan, p = elementary.InversePlan.from_dict(choice["plan"]), ctx.protocol
    y = await in_z64(ctx, s.fork("in"), args[1])
    if not isinstance(args[0], Shared):
        inverse = await elementary.reciprocal(p, s.fork("inverse"), y, plan, frac=y.frac)
        return await like(ctx, s.fork("out"), await basic.mul(p, s.fork("mul"), inverse, args[0]))
    x = await in_z64(ctx, s.fork("x"), args[0])
    frac = min(28 + plan.exponent, max(ctx.frac, 18 + plan.exponent), 40)
    inverse = await elementary.reciprocal(p, s.fork("inverse"), y, plan, frac=max(0, frac))
    wide = [p.linear(lambda part: part.broadcast_to(node.shape), v) for v in (x, inverse)]
    return await like(ctx, s.fork("out"), await basic.mul(p, s.fork("mul"), *wide))


def _supports_div(node: Node, secret: tuple[bool, ...]) -> str | None:
    return "rounds the quotient of a secret" if any(node.kwargs.values()) else None


_ROOTS = {-1.0: _RECIPROCAL, -0.5: _RSQRT, 0.5: _SQRT}


def _measure_pow(args: Args, kwargs: Kwargs, out: Tensor) -> Measured:
    return positive(args, kwargs, out) if args[1] in _ROOTS else {}


def _choose_pow(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    handler = _ROOTS.get(node.args[1])
    return handler.choose(node, stats, options) if handler and handler.choose else {}


async def _pow(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    handler = _ROOTS.get(args[1], HANDLERS_LINEAR[node.target])
    result: Shared = await handler.run(ctx, s, node, args, kwargs)
    return result


def _supports_pow(node: Node, secret: tuple[bool, ...]) -> str | None:
    if node.args[1] in _ROOTS:
        return None
    linear = HANDLERS_LINEAR[node.target].supports
    return linear(node, secret) if linear else None


# ---- comparisons -------------------------------------------------------------------------------------------


def _window_choice(
    bound: float, scale: float, options: Options, values: int, *, exact: bool = False
) -> dict[str, Any]:
    """A comparison's bits; ``values``: chosen words per element. ``exact``: where a wrong choice has no size."""

    def make() -> dict[str, Any]:
        band = 0.0 if exact else budget(options).band(scale)
        bits = window_bits(bound, band, options.frac)
        return {
            "method": "window", "bound": bound, "bits": cost.bits("select_negative", k=64, m=bits) * values,
            "window": bits, "error": compare.band(bound, options.frac, bits),
            "headroom": 62 - room(bound, options.frac),
        }  # fmt: skip

    return chosen(make)


def _compared(compute: Compute, supports: Supports | None = None, *, values: int = 1) -> Handler:
    """``compute(p, s, x, choice, args, kwargs)`` with a comparison window from the calibrated bound."""

    def choose(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
        lo, hi = range_of(node, stats, options)
        choice = _window_choice(bound_of(node, stats, options), spread(stats, "in"), options, values)
        return {**choice, "range": [lo, hi]}

    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        x = await in_z64(ctx, s.fork("in"), args[0])
        y = await compute(ctx.protocol, s.fork("compare"), x, _Seen.of(ctx.choice(node)), args, kwargs)
        return await like(ctx, s.fork("out"), y)

    return Handler(run, in_range, choose, supports)


class _Seen(NamedTuple):
    """What a comparison sees: values up to ``bound``, by so many ``bits``."""

    bound: float
    bits: int

    @staticmethod
    def of(choice: Mapping[str, Any]) -> _Seen:
        return _Seen(float(choice["bound"]), int(choice["window"]))


async def _relu(p: Protocol, s: Session, x: Shared, seen: _Seen, args: Args, kwargs: Kwargs) -> Shared:
    return await compare.relu(p, s, x, seen.bound, bits=seen.bits)


async def _leaky_relu(p: Protocol, s: Session, x: Shared, seen: _Seen, args: Args, kwargs: Kwargs) -> Shared:
    slope = float(argument(args, kwargs, 1, "negative_slope", 0.01))
    return await compare.leaky_relu(p, s, x, slope, seen.bound, bits=seen.bits)


async def _abs(p: Protocol, s: Session, x: Shared, seen: _Seen, args: Args, kwargs: Kwargs) -> Shared:
    return await compare.absolute(p, s, x, seen.bound, bits=seen.bits)


async def _hardswish(p: Protocol, s: Session, x: Shared, seen: _Seen, args: Args, kwargs: Kwargs) -> Shared:
    return await activation.hardswish(p, s, x, seen.bound)


async def _hardsigmoid(p: Protocol, s: Session, x: Shared, seen: _Seen, args: Args, kwargs: Kwargs) -> Shared:
    return await activation.hardsigmoid(p, s, x, seen.bound)


def _clip(first: float | None, second: float | None, low: str = "min", high: str | None = "max") -> Compute:
    """clamp with defaults; ``high=None`` for one-sided forms named by ``low``."""

    async def run(p: Protocol, s: Session, x: Shared, seen: _Seen, args: Args, kwargs: Kwargs) -> Shared:
        if high is None:
            limit = argument(args, kwargs, 1, low)
            limits = (limit, None) if low == "min" else (None, limit)
        else:
            limits = (argument(args, kwargs, 1, low, first), argument(args, kwargs, 2, high, second))
        given = [None if v is None else float(v) for v in limits]
        return await compare.clamp(p, s, x, given[0], given[1], seen.bound, bits=seen.bits)

    return run


def _public_limits(node: Node, secret: tuple[bool, ...]) -> str | None:
    given = [*node.args[1:], *node.kwargs.values()]
    return (
        None
        if all(v is None or isinstance(v, int | float) for v in given)
        else "clips at limits that are tensors"
    )


def _fixed_clip(low: float, high: float) -> Compute:
    async def run(p: Protocol, s: Session, x: Shared, seen: _Seen, args: Args, kwargs: Kwargs) -> Shared:
        return await compare.clamp(p, s, x, low, high, seen.bound, bits=seen.bits)

    return run


# ---- two secrets -------------------------------------------------------------------------------------------


def _measure_gap(args: Args, kwargs: Kwargs, out: Tensor) -> Measured:
    return {"gap": args[0].to(torch.float64) - args[1]}


def _choose_gap(node: Node, stats: Stats, options: Options, *, exact: bool) -> dict[str, Any]:
    """A bound on the difference; neither value by itself has a range to keep to."""
    seen(node, stats, "gap")
    lo, hi = widened(stats, "gap", options)
    bound = max(abs(lo), abs(hi), 2.0**-6)
    choice = _window_choice(bound, spread(stats, "gap"), options, 1, exact=exact)
    return {**choice, "inside": {"gap": [-bound, bound, options.frac]}}


def _pair(larger: bool) -> Handler:
    """max or min of two values, by the sign of their difference."""

    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        p, seen = ctx.protocol, _Seen.of(ctx.choice(node))
        x, y = [await in_z64(ctx, s.fork(f"in{i}"), args[i]) for i in range(2)]
        gap = basic.sub(p, s, x, y) if larger else basic.sub(p, s, y, x)
        if (look := ctx.watching(node)) is not None:
            look("gap", gap)
        lead = await compare.relu(p, s.fork("relu"), gap, seen.bound, bits=seen.bits)
        best = basic.add(p, s, y, lead) if larger else basic.sub(p, s, y, lead)
        return await like(ctx, s.fork("out"), best)

    return Handler(run, _measure_gap, partial(_choose_gap, exact=False))


def _order(swapped: bool) -> Handler:
    """[x < y] (swapped: [x > y]) as whole words; equal values may come out either way."""

    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        p, seen = ctx.protocol, _Seen.of(ctx.choice(node))
        x, y = [await in_z64(ctx, s.fork(f"in{i}"), args[i]) for i in range(2)]
        gap = basic.sub(p, s, y, x) if swapped else basic.sub(p, s, x, y)
        if (look := ctx.watching(node)) is not None:
            look("gap", gap)
        bit = await compare.less_than_zero(p, s.fork("less"), gap, seen.bound, bits=seen.bits)
        return await like(ctx, s.fork("out"), bit)

    return Handler(run, _measure_gap, partial(_choose_gap, exact=True))


# ---- the table ---------------------------------------------------------------------------------------------

_CLAMP = _compared(_clip(None, None), _public_limits, values=2)
_HARDTANH = _compared(_clip(-1.0, 1.0, "min_val", "max_val"), _public_limits, values=2)
_RELU, _LEAKY = _compared(_relu), _compared(_leaky_relu)
_DIV = Handler(_div, _measure_div, _choose_div, _supports_div)

ELEMENTWISE: dict[str, Handler] = {
    **OPENINGS,
    "aten.exp.default": Handler(_exp, in_range, _choose_exp),
    "aten.reciprocal.default": _RECIPROCAL,
    "aten.rsqrt.default": _RSQRT,
    "aten.sqrt.default": _SQRT,
    "aten.div.Tensor": _DIV,
    "aten.true_divide.Tensor": _DIV,
    "aten.pow.Tensor_Scalar": Handler(_pow, _measure_pow, _choose_pow, _supports_pow),
    "aten.relu.default": _RELU,
    "aten.relu_.default": _RELU,
    "aten.leaky_relu.default": _LEAKY,
    "aten.leaky_relu_.default": _LEAKY,
    "aten.abs.default": _compared(_abs),
    "aten.hardswish.default": _compared(_hardswish, values=2),
    "aten.hardsigmoid.default": _compared(_hardsigmoid, values=2),
    "aten.hardtanh.default": _HARDTANH,
    "aten.hardtanh_.default": _HARDTANH,
    "aten.relu6.default": _compared(_fixed_clip(0.0, 6.0), values=2),
    "aten.clamp.default": _CLAMP,
    "aten.clamp_.default": _CLAMP,
    "aten.clamp_min.default": _compared(_clip(None, None, "min", None), _public_limits),
    "aten.clamp_max.default": _compared(_clip(None, None, "max", None), _public_limits),
    "aten.maximum.default": _pair(True),
    "aten.minimum.default": _pair(False),
    "aten.lt.Scalar": _order(False),
    "aten.lt.Tensor": _order(False),
    "aten.gt.Scalar": _order(True),
    "aten.gt.Tensor": _order(True),
}
