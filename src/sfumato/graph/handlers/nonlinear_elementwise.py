"""Activations, roots, quotients and comparisons of single values."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import CaptureError
from sfumato.graph.handlers.kinds import Context, Handler, Options, Stats, Supports
from sfumato.graph.handlers.linear import HANDLERS_LINEAR
from sfumato.graph.handlers.nonlinear_ranges import (
    Args,
    Kwargs,
    argument,
    bound_of,
    chosen,
    in_range,
    in_z64,
    like,
    range_of,
    short_down,
    short_up,
    tolerances,
    widened,
)
from sfumato.graph.program import Node
from sfumato.ops import activation, basic, compare, elementary
from sfumato.protocol.base import Protocol
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = ["ELEMENTWISE"]

#: ``compute(p, s, x, bound, args, kwargs)`` or a function of ``ops`` with the same beginning.
Compute = Callable[..., Awaitable[Shared]]


# ---- one opening -------------------------------------------------------------------------------------------


def _smooth(
    name: str | Callable[[Node], str], supports: Callable[[Node], str | None] | None = None
) -> Handler:
    """A function of :data:`activation.FUNCTIONS` on its calibrated range."""

    def choose(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
        lo, hi = range_of(node, stats, options)
        known = name if isinstance(name, str) else name(node)
        low = _domain_start(known, stats, options, lo)

        def make() -> dict[str, Any]:
            plan = activation.plan_smooth(known, low, hi, tolerance=tolerances(options).smooth)
            return {"method": plan.method, "error": plan.error, "plan": plan.to_dict()}

        return chosen(make)

    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        plan = activation.SmoothPlan.from_dict(ctx.choice(node)["plan"])
        x = await in_z64(ctx, s.fork("in"), args[0])
        return await like(
            ctx, s.fork("out"), await activation.smooth(ctx.protocol, s.fork("smooth"), x, plan)
        )

    return Handler(run, in_range, choose, None if supports is None else lambda node, secret: supports(node))


def _domain_start(name: str, stats: Stats, options: Options, lo: float) -> float:
    """Where a function that needs positive values starts: a margin must not cross zero."""
    if name not in ("log", "sqrt") or lo > 0:
        return lo
    if stats["lo_in"] <= 0:
        raise CaptureError(f"{name} saw {stats['lo_in']:g} in calibration; it needs positive values")
    return short_down(stats["lo_in"] / options.margin**2)


def _which_gelu(node: Node) -> str:
    return "gelu_tanh" if argument(node.args, node.kwargs, 1, "approximate", "none") == "tanh" else "gelu"


def _unit_softplus(node: Node) -> str | None:
    beta = argument(node.args, node.kwargs, 1, "beta", 1)
    return None if beta == 1 else "softplus with a beta other than 1"


def _unit_elu(node: Node) -> str | None:
    given = [
        argument(node.args, node.kwargs, i, n, 1) for i, n in ((1, "alpha"), (2, "scale"), (3, "input_scale"))
    ]
    return None if all(v == 1 for v in given) else "elu with an alpha or a scale other than 1"


# ---- exp, roots, quotients ---------------------------------------------------------------------------------


def _choose_exp(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    lo, hi = range_of(node, stats, options)

    def make() -> dict[str, Any]:
        plan = elementary.plan_exp(lo, hi, tolerance=tolerances(options).exp, frac=options.frac, cut=-18.0)
        return {"method": "squarings", "error": plan.error, "plan": plan.to_dict()}

    return chosen(make)


async def _exp(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    plan = elementary.ExpPlan.from_dict(ctx.choice(node)["plan"])
    x = await in_z64(ctx, s.fork("in"), args[0])
    return await like(
        ctx, s.fork("out"), await elementary.exp(ctx.protocol, s.fork("exp"), x, plan, frac=x.frac)
    )


def _positive_range(lo: float, hi: float, options: Options, what: str) -> tuple[float, float]:
    if lo <= 0:
        raise CaptureError(f"{what} saw {lo:g} in calibration; it needs positive values away from zero")
    return short_down(lo / options.margin**3), short_up(hi * options.margin**3)


def _inverse_choice(root: int, lo: float, hi: float, options: Options, what: str) -> dict[str, Any]:
    low, high = _positive_range(lo, hi, options, what)

    def make() -> dict[str, Any]:
        plan = elementary.plan_inverse(root, low, high, tolerance=tolerances(options).inverse)
        method = "buckets" if plan.buckets else "newton"
        return {"method": method, "error": plan.error, "plan": plan.to_dict()}

    return chosen(make)


def _inverse(root: int, compute: Compute, what: str) -> Handler:
    """A power -1, -1/2 or 1/2 of a positive secret."""

    def choose(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
        range_of(node, stats, options)
        return _inverse_choice(root, stats["lo_in"], stats["hi_in"], options, what)

    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        plan = elementary.InversePlan.from_dict(ctx.choice(node)["plan"])
        x = await in_z64(ctx, s.fork("in"), args[0])
        return await like(ctx, s.fork("out"), await compute(ctx.protocol, s.fork("root"), x, plan))

    return Handler(run, in_range, choose)


_RECIPROCAL = _inverse(1, elementary.reciprocal, "a reciprocal")
_RSQRT = _inverse(2, elementary.rsqrt, "rsqrt")
_SQRT = _inverse(2, elementary.sqrt, "sqrt")


def _measure_div(args: Args, kwargs: Kwargs, out: Tensor) -> dict[str, float]:
    if not isinstance(args[1], Tensor):
        return {}
    d = args[1].to(torch.float64)
    return {"lo_div": float(d.min()), "hi_div": float(d.max())} if d.numel() else {}


def _choose_div(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    if not stats.get("lo_div", 0.0) > 0:
        return {}  # a public divisor, or one that a run will refuse
    try:
        return _inverse_choice(1, stats["lo_div"], stats["hi_div"], options, "a divisor")
    except CaptureError:
        return {}


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


def _choose_bound(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    return _window_choice(bound_of(node, stats, options), options)


def _window_choice(bound: float, options: Options) -> dict[str, Any]:
    error = chosen(lambda: {"error": compare.band(bound, options.frac)})
    return {"method": "window", "bound": bound, "bits": compare.WINDOW_BITS, **error}


def _compared(compute: Compute, supports: Supports | None = None) -> Handler:
    """``compute(p, s, x, bound, args, kwargs)`` with a comparison window from the calibrated bound."""

    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        x = await in_z64(ctx, s.fork("in"), args[0])
        y = await compute(ctx.protocol, s.fork("compare"), x, float(ctx.choice(node)["bound"]), args, kwargs)
        return await like(ctx, s.fork("out"), y)

    return Handler(run, in_range, _choose_bound, supports)


async def _relu(p: Protocol, s: Session, x: Shared, bound: float, args: Args, kwargs: Kwargs) -> Shared:
    return await compare.relu(p, s, x, bound)


async def _leaky_relu(p: Protocol, s: Session, x: Shared, bound: float, args: Args, kwargs: Kwargs) -> Shared:
    return await compare.leaky_relu(p, s, x, float(argument(args, kwargs, 1, "negative_slope", 0.01)), bound)


async def _abs(p: Protocol, s: Session, x: Shared, bound: float, args: Args, kwargs: Kwargs) -> Shared:
    return await compare.absolute(p, s, x, bound)


async def _hardswish(p: Protocol, s: Session, x: Shared, bound: float, args: Args, kwargs: Kwargs) -> Shared:
    return await activation.hardswish(p, s, x, bound)


async def _hardsigmoid(
    p: Protocol, s: Session, x: Shared, bound: float, args: Args, kwargs: Kwargs
) -> Shared:
    return await activation.hardsigmoid(p, s, x, bound)


def _clip(first: float | None, second: float | None, low: str = "min", high: str | None = "max") -> Compute:
    """clamp with defaults; ``high=None`` for one-sided forms named by ``low``."""

    async def run(p: Protocol, s: Session, x: Shared, bound: float, args: Args, kwargs: Kwargs) -> Shared:
        if high is None:
            limit = argument(args, kwargs, 1, low)
            limits = (limit, None) if low == "min" else (None, limit)
        else:
            limits = (argument(args, kwargs, 1, low, first), argument(args, kwargs, 2, high, second))
        given = [None if v is None else float(v) for v in limits]
        return await compare.clamp(p, s, x, given[0], given[1], bound)

    return run


def _public_limits(node: Node, secret: tuple[bool, ...]) -> str | None:
    given = [*node.args[1:], *node.kwargs.values()]
    return (
        None
        if all(v is None or isinstance(v, int | float) for v in given)
        else "clips at limits that are tensors"
    )


def _fixed_clip(low: float, high: float) -> Compute:
    async def run(p: Protocol, s: Session, x: Shared, bound: float, args: Args, kwargs: Kwargs) -> Shared:
        return await compare.clamp(p, s, x, low, high, bound)

    return run


# ---- two secrets -------------------------------------------------------------------------------------------


def _measure_gap(args: Args, kwargs: Kwargs, out: Tensor) -> dict[str, float]:
    gap = args[0].to(torch.float64) - args[1]
    return {"lo_gap": float(gap.min()), "hi_gap": float(gap.max())} if gap.numel() else {}


def _choose_gap(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    """A bound on the difference, with the margin; neither value by itself has a range to keep to."""
    if "lo_gap" not in stats:
        raise CaptureError(f"{node.name} was not calibrated; give calibration inputs that reach it")
    lo, hi = widened(stats["lo_gap"], stats["hi_gap"], options.margin)
    return _window_choice(max(abs(lo), abs(hi), 2.0**-6), options)


def _pair(larger: bool) -> Handler:
    """max or min of two values, by the sign of their difference."""

    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        p, bound = ctx.protocol, float(ctx.choice(node)["bound"])
        x, y = [await in_z64(ctx, s.fork(f"in{i}"), args[i]) for i in range(2)]
        gap = basic.sub(p, s, x, y) if larger else basic.sub(p, s, y, x)
        lead = await compare.relu(p, s.fork("relu"), gap, bound)
        best = basic.add(p, s, y, lead) if larger else basic.sub(p, s, y, lead)
        return await like(ctx, s.fork("out"), best)

    return Handler(run, _measure_gap, _choose_gap)


def _order(swapped: bool) -> Handler:
    """[x < y] (swapped: [x > y]) as whole words; equal values may come out either way."""

    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        p, bound = ctx.protocol, float(ctx.choice(node)["bound"])
        x, y = [await in_z64(ctx, s.fork(f"in{i}"), args[i]) for i in range(2)]
        gap = basic.sub(p, s, y, x) if swapped else basic.sub(p, s, x, y)
        bit = await compare.less_than_zero(p, s.fork("less"), gap, bound)
        return await like(ctx, s.fork("out"), bit)

    return Handler(run, _measure_gap, _choose_gap)


# ---- the table ---------------------------------------------------------------------------------------------

_CLAMP = _compared(_clip(None, None), _public_limits)
_HARDTANH = _compared(_clip(-1.0, 1.0, "min_val", "max_val"), _public_limits)
_RELU, _LEAKY = _compared(_relu), _compared(_leaky_relu)
_DIV = Handler(_div, _measure_div, _choose_div, _supports_div)

ELEMENTWISE: dict[str, Handler] = {
    **{
        f"aten.{name}{tail}.default": _smooth(name)
        for name in ("silu", "mish", "sigmoid", "tanh", "erf", "sin", "cos", "log")
        for tail in ("", "_")
    },
    "aten.gelu.default": _smooth(_which_gelu),
    "sfumato.quick_gelu": _smooth("quick_gelu"),
    "aten.softplus.default": _smooth("softplus", _unit_softplus),
    "aten.log_sigmoid.default": _smooth("logsigmoid"),
    "aten.elu.default": _smooth("elu", _unit_elu),
    "aten.exp.default": Handler(_exp, in_range, _choose_exp),
    "aten.reciprocal.default": _RECIPROCAL,
    "aten.rsqrt.default": _RSQRT,
    "aten.sqrt.default": _SQRT,
    "aten.div.Tensor": _DIV,
    "aten.true_divide.Tensor": _DIV,
    "aten.pow.Tensor_Scalar": Handler(_pow, in_range, _choose_pow, _supports_pow),
    "aten.relu.default": _RELU,
    "aten.relu_.default": _RELU,
    "aten.leaky_relu.default": _LEAKY,
    "aten.leaky_relu_.default": _LEAKY,
    "aten.abs.default": _compared(_abs),
    "aten.hardswish.default": _compared(_hardswish),
    "aten.hardsigmoid.default": _compared(_hardsigmoid),
    "aten.hardtanh.default": _HARDTANH,
    "aten.hardtanh_.default": _HARDTANH,
    "aten.relu6.default": _compared(_fixed_clip(0.0, 6.0)),
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
