"""Calls that look at whole rows: norms, softmax, attention, maxima."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import CaptureError
from sfumato.graph.handlers.kinds import Context, Handler, Options, Stats
from sfumato.graph.handlers.nonlinear_ranges import (
    Args,
    Kwargs,
    argument,
    bound_of,
    chosen,
    in_range,
    in_z64,
    like,
    short_down,
    short_up,
    tolerances,
    widened,
)
from sfumato.graph.program import Node
from sfumato.ops import attention, compare, norm
from sfumato.ops.basic import neg
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = ["ROWS"]

_FLOAT_EPS = float(torch.finfo(torch.float32).eps)


# ---- norms -------------------------------------------------------------------------------------------------


def _norm_stats(rows: Tensor, eps: float, centre: bool) -> dict[str, float]:
    rows = rows.to(torch.float64)
    if rows.numel() == 0:
        return {}
    d = rows - rows.mean(-1, keepdim=True) if centre else rows
    square = d.square().mean(-1, keepdim=True)
    reach = (d / (square + eps).sqrt()).abs().max()
    return {
        "lo_var": float(square.min()), "hi_var": float(square.max()), "hi_reach": float(reach),
        "hi_count": float(rows.shape[-1]),
    }  # fmt: skip


def _group_eps(args: Args, kwargs: Kwargs) -> float:
    return float(argument(args, kwargs, 4, "eps", 1e-5))


def _rms_eps(args: Args, kwargs: Kwargs) -> float:
    eps = argument(args, kwargs, 3, "eps")
    return _FLOAT_EPS if eps is None else float(eps)


def _gain(args: Args, kwargs: Kwargs) -> dict[str, float]:
    weight = argument(args, kwargs, 2, "weight")
    return {"hi_gain": float(weight.abs().max())} if isinstance(weight, Tensor) and weight.numel() else {}


def _measure_group(args: Args, kwargs: Kwargs, out: Tensor) -> dict[str, float]:
    x, groups = args[0], int(args[1])
    rows = x.reshape(x.shape[0], groups, -1)
    return {**_norm_stats(rows, _group_eps(args, kwargs), True), **_gain(args, kwargs)}


def _measure_layer(args: Args, kwargs: Kwargs, out: Tensor) -> dict[str, float]:
    return {**_norm_stats(_last_axes(args), _group_eps(args, kwargs), True), **_gain(args, kwargs)}


def _measure_rms(args: Args, kwargs: Kwargs, out: Tensor) -> dict[str, float]:
    return {**_norm_stats(_last_axes(args), _rms_eps(args, kwargs), False), **_gain(args, kwargs)}


def _last_axes(args: Args) -> Tensor:
    rows: Tensor = args[0].flatten(args[0].dim() - len(args[1]))
    return rows


def _choose_norm(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    if "lo_var" not in stats:
        raise CaptureError(f"{node.name} was not calibrated; give calibration inputs that reach it")
    tolerances(options)
    eps = (
        _rms_eps(node.args, node.kwargs)
        if node.target == "aten.rms_norm.default"
        else _group_eps(node.args, node.kwargs)
    )
    wide = options.margin**3
    # eps keeps the norm's inverse root finite where a row has no variance at all.
    low = short_down(stats["lo_var"] / wide) if stats["lo_var"] > 0 else stats["lo_var"]
    high = short_up(max(stats["hi_var"], 1e-9) * wide)

    def make() -> dict[str, Any]:
        plan = norm.plan_norm(
            int(stats["hi_count"]),
            low,
            high,
            eps,
            reach=short_up(2 * options.margin * stats["hi_reach"]) if stats["hi_reach"] > 0 else 0.0,
            gain=stats.get("hi_gain", 1.0),
            frac=options.frac,
        )
        method = "buckets" if plan.inverse.buckets else "newton"
        return {"method": method, "error": plan.inverse.error, "plan": plan.to_dict()}

    return chosen(make)


async def _affine(ctx: Context, s: Session, *values: Any) -> list[Any]:
    return [await in_z64(ctx, s.fork(f"in{i}"), v) for i, v in enumerate(values)]


async def _group_norm(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    plan = norm.NormPlan.from_dict(ctx.choice(node)["plan"])
    weight, bias = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias")
    x, weight, bias = await _affine(ctx, s, args[0], weight, bias)
    y = await norm.group_norm(ctx.protocol, s.fork("norm"), x, int(args[1]), weight, bias, plan)
    return await like(ctx, s.fork("out"), y)


async def _layer_norm(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    plan = norm.NormPlan.from_dict(ctx.choice(node)["plan"])
    weight, bias = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias")
    x, weight, bias = await _affine(ctx, s, args[0], weight, bias)
    y = await norm.layer_norm(ctx.protocol, s.fork("norm"), x, len(args[1]), weight, bias, plan)
    return await like(ctx, s.fork("out"), y)


async def _rms_norm(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    plan = norm.NormPlan.from_dict(ctx.choice(node)["plan"])
    x, weight = await _affine(ctx, s, args[0], argument(args, kwargs, 2, "weight"))
    y = await norm.rms_norm(ctx.protocol, s.fork("norm"), x, len(args[1]), weight, plan)
    return await like(ctx, s.fork("out"), y)


def _secret_input(node: Node, secret: tuple[bool, ...]) -> str | None:
    return None if secret[0] else "normalises a public value with secret weights"


# ---- softmax and attention ---------------------------------------------------------------------------------


def _row_stats(scores: Tensor, allowed: Tensor | None) -> dict[str, float]:
    """Range of the scores that count, and of the rows' maxima. Rows on the last axis."""
    scores = scores.to(torch.float64)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    rows = scores.amax(-1)
    low = scores.masked_fill(scores == -math.inf, math.inf).min()
    return {
        "lo_score": float(low), "hi_score": float(rows.max()), "lo_row": float(rows.min()),
        "hi_count": float(scores.shape[-1]),
    }  # fmt: skip


def _measure_softmax(args: Args, kwargs: Kwargs, out: Tensor) -> dict[str, float]:
    return _row_stats(args[0].movedim(int(args[1]), -1), None) if args[0].numel() else {}


def _choose_rows(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    if "lo_score" not in stats:
        raise CaptureError(f"{node.name} was not calibrated; give calibration inputs that reach it")
    lo, hi = widened(stats["lo_score"], stats["hi_score"], options.margin)
    row_lo, row_hi = widened(stats["lo_row"], stats["hi_score"], options.margin)
    row_lo, row_hi = max(row_lo - 0.5, lo), min(row_hi + 0.5, hi + 0.5)
    value = options.margin * stats.get("hi_value", 1.0)
    reach = short_up(value) if value > 0 else value

    def make() -> dict[str, Any]:
        plan = attention.plan_softmax(
            int(stats["hi_count"]), lo, max(hi, row_hi), row_lo, row_hi, reach=reach, frac=options.frac,
            tolerance=tolerances(options).exp,
        )  # fmt: skip
        return {"method": plan.method, "error": plan.exp.error, "plan": plan.to_dict()}

    return chosen(make)


async def _softmax(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    plan = attention.SoftmaxPlan.from_dict(ctx.choice(node)["plan"])
    x = await in_z64(ctx, s.fork("in"), args[0])
    y = await attention.softmax(ctx.protocol, s.fork("softmax"), x, int(args[1]), plan)
    return await like(ctx, s.fork("out"), y)


def _measure_attention(args: Args, kwargs: Kwargs, out: Tensor) -> dict[str, float]:
    q, k, v = (t.to(torch.float64) for t in args[:3])
    if argument(args, kwargs, 7, "enable_gqa", False):
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scale = argument(args, kwargs, 6, "scale")
    scores = q @ k.transpose(-1, -2) * (1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale))
    mask, allowed = argument(args, kwargs, 3, "attn_mask"), None
    if isinstance(mask, Tensor):
        allowed, bias = attention.split_mask(mask)
        scores = scores if bias is None else scores + bias
    if argument(args, kwargs, 5, "is_causal", False):
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return {**_row_stats(scores, allowed), "hi_value": float(v.abs().max())}


async def _attention(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    plan = attention.SoftmaxPlan.from_dict(ctx.choice(node)["plan"])
    q, k, v = await _affine(ctx, s, *args[:3])
    scale = argument(args, kwargs, 6, "scale")
    y = await attention.attention(
        ctx.protocol,
        s.fork("attention"),
        q,
        k,
        v,
        plan,
        scale=None if scale is None else float(scale),
        mask=argument(args, kwargs, 3, "attn_mask"),
        causal=bool(argument(args, kwargs, 5, "is_causal", False)),
        grouped=bool(argument(args, kwargs, 7, "enable_gqa", False)),
    )
    return await like(ctx, s.fork("out"), y)


def _supports_attention(node: Node, secret: tuple[bool, ...]) -> str | None:
    flags = [*node.args, *node.kwargs]
    if not (secret[0] or secret[1]):
        return "weighs secret values by public scores"
    if len(node.args) > 3 and secret[3]:
        return "attention with a secret mask"
    if "attn_mask" in node.kwargs and secret[len(node.args) + list(node.kwargs).index("attn_mask")]:
        return "attention with a secret mask"
    if argument(node.args, node.kwargs, 4, "dropout_p", 0.0):
        return "attention with dropout; put the model in eval mode"
    return None if flags else "attention without arguments"


# ---- maxima ------------------------------------------------------------------------------------------------


def _choose_window(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    bound = bound_of(node, stats, options)
    error = compare.band(2 * bound, options.frac)
    return {"method": "tournament", "bound": bound, "bits": compare.WINDOW_BITS, "error": error}


def _pairs(value: Any, axes: int, default: int) -> tuple[int, ...]:
    if value is None or (isinstance(value, Sequence) and not value):
        return (default,) * axes
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


async def _max_pool(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    x = await in_z64(ctx, s.fork("in"), args[0])
    kernel = _pairs(args[1], 2, 1)
    stride = argument(args, kwargs, 2, "stride")
    y = await compare.max_pool(
        ctx.protocol, s.fork("pool"), x, kernel, _pairs(stride, 2, 1) if stride else kernel,
        _pairs(argument(args, kwargs, 3, "padding"), 2, 0), float(ctx.choice(node)["bound"]),
        dilation=_pairs(argument(args, kwargs, 4, "dilation"), 2, 1),
    )  # fmt: skip
    return await like(ctx, s.fork("out"), y)


def _no_ceil(node: Node, secret: tuple[bool, ...]) -> str | None:
    return "max_pool2d with ceil_mode" if argument(node.args, node.kwargs, 5, "ceil_mode", False) else None


def _dims(given: Any, rank: int) -> list[int]:
    dims = (
        list(range(rank))
        if given is None or given == ()
        else [given]
        if isinstance(given, int)
        else list(given)
    )
    return sorted(d % rank for d in dims)


def _extreme(largest: bool, index: bool) -> Handler:
    """Maximum, minimum or where they are, over the axes of the call; the result has the node's shape."""

    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        p, bound = ctx.protocol, float(ctx.choice(node)["bound"])
        x = await in_z64(ctx, s.fork("in"), args[0])
        x = x if largest else neg(p, x)
        dims = _dims(argument(args, kwargs, 1, "dim"), len(x.shape))
        others = [d for d in range(len(x.shape)) if d not in dims]
        rows = p.linear(lambda part: part.permute(*others, *dims).flatten(len(others)), x)
        find = compare.argmax if index else compare.maximum
        y = await find(p, s.fork("find"), rows, -1, bound)
        y = y if largest or index else neg(p, y)
        return await like(ctx, s.fork("out"), p.linear(lambda part: part.reshape(node.shape), y))

    return Handler(run, in_range, _choose_window)


# ---- the table ---------------------------------------------------------------------------------------------

_SOFTMAX = Handler(_softmax, _measure_softmax, _choose_rows)

ROWS: dict[str, Handler] = {
    "aten.group_norm.default": Handler(_group_norm, _measure_group, _choose_norm, _secret_input),
    "aten.layer_norm.default": Handler(_layer_norm, _measure_layer, _choose_norm, _secret_input),
    "aten.rms_norm.default": Handler(_rms_norm, _measure_rms, _choose_norm, _secret_input),
    "aten.softmax.int": _SOFTMAX,
    "aten._softmax.default": _SOFTMAX,
    "aten._safe_softmax.default": _SOFTMAX,
    "aten.scaled_dot_product_attention.default": Handler(
        _attention, _measure_attention, _choose_rows, _supports_attention
    ),
    "aten.max_pool2d.default": Handler(_max_pool, in_range, _choose_window, _no_ceil),
    "aten.amax.default": _extreme(True, False),
    "aten.amin.default": _extreme(False, False),
    "aten.max.default": _extreme(True, False),
    "aten.min.default": _extreme(False, False),
    "aten.argmax.default": _extreme(True, True),
    "aten.argmin.default": _extreme(False, True),
}
