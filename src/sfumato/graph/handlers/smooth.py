"""Functions that one opening evaluates, by themselves or with the linear layer before them, and one square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sfumato.errors import CaptureError
from sfumato.graph.handlers.kinds import Context, Handler, Options, Stats
from sfumato.graph.handlers.nonlinear_ranges import (
    Args,
    Kwargs,
    argument,
    bound_of,
    budget,
    chosen,
    in_range,
    in_z64,
    is_short,
    like,
    log_range,
    positive,
    range_of,
    room,
    usual,
)
from sfumato.graph.program import Node
from sfumato.ops import activation, basic, opened
from sfumato.ops.fit import series_noise
from sfumato.ops.tiles import elementwise
from sfumato.protocol import cost
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = ["ACTIVATED", "OPENINGS", "choose_smooth", "log_range_of", "smooth_name", "smooth_tolerance"]


def choose_smooth(
    name: str, node: Node, stats: Stats, options: Options, known: int | None = None
) -> dict[str, Any]:
    """The plan of a function of :data:`activation.FUNCTIONS` on its calibrated range. ``known``: bits that are known of
    its argument's words (default: all of its ring's)."""
    lo, hi = range_of(node, stats, options)
    if name in ("log", "sqrt") and lo <= 0:  # a margin must not cross zero
        lo = log_range_of(stats, options, "in", name)[0]
    allowed, short = smooth_tolerance(stats, options), is_short(options)

    def make() -> dict[str, Any]:
        # In Z32 the budget is taken at its word, an L2 error: noise counts twice its deviation where a ripple counts
        # twice its size, and one value in a hundred may err 16 times as much.
        plan = activation.plan_smooth(
            name, lo, hi, tolerance=allowed, frac=options.frac, usual=usual(stats, "in", often=short),
            ring_bits=known or (32 if short else 64), rare=16.0 if short else 8.0, deviations=2.0 if short else 4.0,
        )  # fmt: skip
        series, ends = plan.series, torch.linspace(plan.series.lo, plan.series.hi, 257)
        largest = float(series(ends).abs().max())
        return {
            "method": plan.method, "range": [lo, hi], "bits": plan.bits,
            "error": plan.error + series_noise(series) + 2.0**-options.frac,
            "headroom": series.word - room(largest, series.scale), "plan": plan.to_dict(),
        }  # fmt: skip

    return chosen(make)


def smooth_tolerance(stats: Stats, options: Options) -> float:
    """The largest error that the profile allows a function's results."""
    return budget(options).smooth(stats.get("lo_scale", 1.0), options.frac, short=is_short(options))


def smooth_name(node: Node) -> str | None:
    """Which of :data:`activation.FUNCTIONS` a call is, if any."""
    name = _SMOOTH.get(node.target)
    return name(node) if callable(name) else name


def _smooth(
    name: str | Callable[[Node], str], supports: Callable[[Node], str | None] | None = None
) -> Handler:
    """A function of :data:`activation.FUNCTIONS` on its calibrated range."""

    def choose(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
        return choose_smooth(name if isinstance(name, str) else name(node), node, stats, options)

    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        plan = activation.SmoothPlan.from_dict(ctx.choice(node)["plan"])
        # A series that was planned for a mixed plan's Z32 takes it as it is; clips compare in Z64.
        direct = plan.method == "series" and is_short(ctx.options)
        x = args[0] if direct else await in_z64(ctx, s.fork("in"), args[0])
        return await like(
            ctx, s.fork("out"), await activation.smooth(ctx.protocol, s.fork("smooth"), x, plan)
        )

    measure = positive if name == "log" else in_range
    return Handler(run, measure, choose, None if supports is None else lambda node, secret: supports(node))


async def _activated_linear(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """A linear layer and its activation, whose argument is never closed."""
    choice = ctx.choice(node)
    plan, words = activation.SmoothPlan.from_dict(choice["plan"]), choice.get("words")
    x, w, bias = args
    x = ctx.protocol.lift(x, ctx.frac) if x.frac == 0 else x  # whole numbers
    y = await opened.curve_of_linear(
        ctx.protocol, s.fork("linear"), x, w, bias, plan, turned=bool(kwargs["turned"]),
        short=None if words is None else basic.Short(*words), scales=basic.Scales(*choice["scales"]),
        look=ctx.watching(node),
    )  # fmt: skip
    return await like(ctx, s.fork("out"), y)


def _choose_quad(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    bits, frac = (32 if is_short(options) else 64), options.frac
    largest = (bound_of(node, stats, options) + 1.0) ** 2
    return {
        "method": "square", "range": [*range_of(node, stats, options)], "error": 2.0**-frac,
        "bits": cost.bits("bilinear_truncate", k=bits, f=frac + 3), "headroom": bits - 2 - room(largest, 2 * frac),
    }  # fmt: skip


async def _quad(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """((x + 1)^2 + 3) / 8: one square, whose truncation divides by 8, too."""
    p = ctx.protocol
    x = args[0] if is_short(ctx.options) else await in_z64(ctx, s.fork("in"), args[0])
    moved = p.add_public(s, x, p.encode(x, 1.0))

    async def step(child: Session, piece: Shared) -> Shared:
        return await p.bilinear_truncate(child, torch.mul, piece, piece, piece.frac + 3)

    y = (await elementwise(p, s.fork("square"), step, moved)).viewed(x.frac)
    return await like(ctx, s.fork("out"), p.add_public(s, y, p.encode(y, 0.375)))


def log_range_of(stats: Stats, options: Options, key: str, what: str) -> tuple[float, float]:
    """The range of a quantity whose logarithms were measured, too."""
    if f"lo_log_{key}" not in stats:
        raise CaptureError(
            f"{what} saw {stats[f'lo_{key}']:g} in calibration; it needs positive values away from zero"
        )
    return log_range(stats, f"log_{key}", options)


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


#: Function by target, or what tells it from the call.
_SMOOTH: dict[str, str | Callable[[Node], str]] = {
    **{
        f"aten.{name}{tail}.default": name
        for name in ("silu", "mish", "sigmoid", "tanh", "erf", "sin", "cos", "log")
        for tail in ("", "_")
    },
    "aten.gelu.default": _which_gelu,
    "sfumato.quick_gelu": "quick_gelu",
    "aten.softplus.default": "softplus",
    "aten.log_sigmoid.default": "logsigmoid",
    "aten.elu.default": "elu",
}
_UNIT = {"aten.softplus.default": _unit_softplus, "aten.elu.default": _unit_elu}
#: A linear layer with its activation; see :mod:`sfumato.graph.activated`.
ACTIVATED = "sfumato.activated_linear"

OPENINGS: dict[str, Handler] = {
    **{target: _smooth(name, _UNIT.get(target)) for target, name in _SMOOTH.items()},
    ACTIVATED: Handler(_activated_linear),
    "sfumato.quad": Handler(_quad, in_range, _choose_quad),
}
