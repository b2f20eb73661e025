"""Calls that look at whole rows: norms, softmax, attention, maxima."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.graph.handlers.kinds import Choose, Context, Handler, Options, Stats
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
    is_short,
    like,
    log_range,
    range_of,
    room,
    seen,
    short_up,
    spread,
    widened,
    window_bits,
)
from sfumato.graph.program import Node
from sfumato.ops import attention, compare, masks, norm, softmax
from sfumato.ops.basic import neg
from sfumato.ops.winner import argmax_one_hot
from sfumato.protocol import cost
from sfumato.session.session import Session
from sfumato.types import Z32, Shared

__all__ = ["ROWS"]

_FLOAT_EPS = float(torch.finfo(torch.float32).eps)
#: A mean square of zero without an epsilon is seen as this.
_LEAST_SQUARE = 2.0**-60


# ---- norms -------------------------------------------------------------------------------------------------


def _norm_stats(rows: Tensor, eps: float, centre: bool) -> Measured:
    rows = rows.to(torch.float64)
    if rows.numel() == 0:
        return {}
    d = rows - rows.mean(-1, keepdim=True) if centre else rows
    square = d.square().mean(-1, keepdim=True) + eps
    reach = (d / square.sqrt()).abs().max()
    return {
        "log_square": square.clamp_min(_LEAST_SQUARE).log2(), "hi_reach": float(reach),
        "hi_deviation": float(d.abs().max()), "in": rows,
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


def _measure_group(args: Args, kwargs: Kwargs, out: Tensor) -> Measured:
    x, groups = args[0], int(args[1])
    rows = x.reshape(x.shape[0], groups, -1)
    return {**_norm_stats(rows, _group_eps(args, kwargs), True), **_gain(args, kwargs)}


def _measure_layer(args: Args, kwargs: Kwargs, out: Tensor) -> Measured:
    return {**_norm_stats(_last_axes(args), _group_eps(args, kwargs), True), **_gain(args, kwargs)}


def _measure_rms(args: Args, kwargs: Kwargs, out: Tensor) -> Measured:
    return {**_norm_stats(_last_axes(args), _rms_eps(args, kwargs), False), **_gain(args, kwargs)}


def _last_axes(args: Args) -> Tensor:
    rows: Tensor = args[0].flatten(args[0].dim() - len(args[1]))
    return rows


def _choose_norm(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    """From the range of the mean square and epsilon together, which is positive, in logarithms."""
    seen(node, stats, "log_square")
    rms = node.target == "aten.rms_norm.default"
    eps = _rms_eps(node.args, node.kwargs) if rms else _group_eps(node.args, node.kwargs)
    low, high = log_range(stats, "log_square", options)
    reach, count = options.margin * 2 * stats["hi_reach"], int(stats["hi_count"])
    allowed, short = budget(options).relative, is_short(options)

    def make() -> dict[str, Any]:
        plan = norm.plan_norm(
            count, max(low - eps, 0.0), max(high - eps, 1e-9), eps,
            reach=short_up(reach) if reach > 0 else 0.0, gain=stats.get("hi_gain", 1.0), frac=options.frac,
            tolerance=allowed, ring_bits=32 if short else 64,
        )  # fmt: skip
        product = cost.bits("bilinear_truncate", k=32 if short else 64, f=options.frac)
        squares = high * math.ceil(count / plan.chunks)
        return {
            "method": "buckets" if plan.inverse.buckets else "series", "error": plan.inverse.error,
            "bits": product + (plan.inverse.bits + 2 * product) / count,
            "headroom": (30 if short else 62) - room(squares, 2 * options.frac), "plan": plan.to_dict(),
            "inside": {"square": [plan.inverse.lo, plan.inverse.hi, plan.square_frac(options.frac)]},
            **({"range": [*widened(stats, "in", options)]} if short else {}),
        }  # fmt: skip

    return chosen(make)


async def _affine(ctx: Context, s: Session, *values: Any) -> list[Any]:
    if is_short(ctx.options):
        return list(values)
    return [await in_z64(ctx, s.fork(f"in{i}"), v) for i, v in enumerate(values)]


async def _group_norm(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    plan = norm.NormPlan.from_dict(ctx.choice(node)["plan"])
    weight, bias = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias")
    x, weight, bias = await _affine(ctx, s, args[0], weight, bias)
    y = await norm.group_norm(
        ctx.protocol, s.fork("norm"), x, int(args[1]), weight, bias, plan, look=ctx.watching(node)
    )
    return await like(ctx, s.fork("out"), y)


async def _layer_norm(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    plan = norm.NormPlan.from_dict(ctx.choice(node)["plan"])
    weight, bias = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias")
    x, weight, bias = await _affine(ctx, s, args[0], weight, bias)
    y = await norm.layer_norm(
        ctx.protocol, s.fork("norm"), x, len(args[1]), weight, bias, plan, look=ctx.watching(node)
    )
    return await like(ctx, s.fork("out"), y)


async def _rms_norm(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    plan = norm.NormPlan.from_dict(ctx.choice(node)["plan"])
    x, weight = await _affine(ctx, s, args[0], argument(args, kwargs, 2, "weight"))
    y = await norm.rms_norm(
        ctx.protocol, s.fork("norm"), x, len(args[1]), weight, plan, look=ctx.watching(node)
    )
    return await like(ctx, s.fork("out"), y)


def _secret_input(node: Node, secret: tuple[bool, ...]) -> str | None:
    return None if secret[0] else "normalises a public value with secret weights"


# ---- softmax and attention ---------------------------------------------------------------------------------


def _row_stats(scores: Tensor, allowed: Tensor | None) -> Measured:
    """The scores that count, and the rows' maxima. Rows on the last axis."""
    scores = scores.to(torch.float64)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    rows = scores.amax(-1)
    return {"score": scores[scores > -math.inf], "row": rows, "hi_count": float(scores.shape[-1])}


def _measure_softmax(args: Args, kwargs: Kwargs, out: Tensor) -> Measured:
    return _row_stats(args[0].movedim(int(args[1]), -1), None) if args[0].numel() else {}


def _choose_rows(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    return _planned_rows(node, stats, options)


def _choose_attention(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    return _planned_rows(node, stats, options, known=_known_scores(node, stats, options))


def _choose_masked(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    """The range reaches as far down as masked scores are lowered."""
    return _planned_rows(node, stats, options, masked=True, known=_known_scores(node, stats, options))


def _known_scores(node: Node, stats: Stats, options: Options) -> int:
    """Bits that the product of queries and keys tells of a score before it is closed."""
    if "hi_width" not in stats or (options.ring == "Z32" and not is_short(options)):
        return 0
    scale = argument(node.args, node.kwargs, 6, "scale")
    return attention.known_scores(
        stats["hi_width"] ** -0.5 if scale is None else float(scale), options.frac, short=is_short(options)
    )


def _planned_rows(
    node: Node, stats: Stats, options: Options, *, masked: bool = False, known: int = 0
) -> dict[str, Any]:
    seen(node, stats, "score")
    lo, hi = widened(stats, "score", options)
    row_lo, row_hi = widened(stats, "row", options)
    row_lo, row_hi = max(row_lo, lo), min(row_hi, hi)
    value, count = options.margin * stats.get("hi_value", 1.0), int(stats["hi_count"])
    reach = short_up(value) if value > 0 else value
    # The largest score, masked, in the row with the smallest maximum: all of them together weigh the tolerance.
    allowed = budget(options).of_rows(short=is_short(options))
    lowered = short_up(hi - row_lo + math.log(count / allowed)) if masked else 0.0
    lo -= lowered
    if masked and (max(hi, 0.0) + lowered) * 2.0**options.frac >= 2.0 ** (known - 2):
        known = 0  # a score and what its mask adds have to stay in the ring together

    def make() -> dict[str, Any]:
        plan = softmax.plan_softmax(
            count, lo, hi, row_lo, row_hi, reach=reach, frac=options.frac, short=is_short(options),
            tolerance=allowed, known=known,
        )  # fmt: skip
        product = cost.bits("bilinear_truncate", k=64, f=options.frac)
        search = cost.bits("select_negative", k=64, m=compare.WINDOW_BITS) if plan.method == "max" else 0
        heaviest = count * math.exp(plan.exp.hi) * max(reach, 1.0)
        inside = {
            "scores": [plan.exp.lo, plan.exp.hi, options.frac, *(("Z32",) if is_short(options) else ())],
            "sums": [plan.inverse.lo, plan.inverse.hi, plan.exp.frac],
        }
        return {
            "method": plan.method, "error": plan.exp.error, "bits": plan.exp.bits + search + product,
            "headroom": 62 - room(heaviest, plan.exp.frac + options.frac), "plan": plan.to_dict(),
            "inside": inside, **({"lowered": lowered} if masked else {}),
        }  # fmt: skip

    return chosen(make)


async def _softmax(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    plan = softmax.SoftmaxPlan.from_dict(ctx.choice(node)["plan"])
    x = await in_z64(ctx, s.fork("in"), args[0])
    y = await softmax.softmax(ctx.protocol, s.fork("softmax"), x, int(args[1]), plan, look=ctx.watching(node))
    return await like(ctx, s.fork("out"), y)


def _scores(args: Args, kwargs: Kwargs) -> Tensor:
    q, k = (t.to(torch.float64) for t in args[:2])
    if argument(args, kwargs, 7, "enable_gqa", False):
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scale = argument(args, kwargs, 6, "scale")
    scores: Tensor = q @ k.transpose(-1, -2)
    return scores * (1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale))


def _measure_masked(args: Args, kwargs: Kwargs, out: Tensor) -> Measured:
    """All scores, which are computed before the mask, and the maxima of what it lets through."""
    scores = _scores(args, kwargs)
    return {
        **_row_stats(scores, None), "row": scores.masked_fill(args[3] < 0.5, -math.inf).amax(-1),
        "hi_value": float(args[2].abs().max()), "hi_width": float(args[0].shape[-1]),
    }  # fmt: skip


def _measure_attention(args: Args, kwargs: Kwargs, out: Tensor) -> Measured:
    scores = _scores(args, kwargs)
    mask, allowed = argument(args, kwargs, 3, "attn_mask"), None
    if isinstance(mask, Tensor):
        allowed, bias = masks.split_mask(mask)
        scores = scores if bias is None else scores + bias
    if argument(args, kwargs, 5, "is_causal", False):
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    value, width = float(args[2].abs().max()), float(args[0].shape[-1])
    return {**_row_stats(scores, allowed), "hi_value": value, "hi_width": width}


async def _masked_attention(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """Attention with a secret mask of 0/1 words."""
    plan = softmax.SoftmaxPlan.from_dict(ctx.choice(node)["plan"])
    q, k, v = await _affine(ctx, s, *args[:3])
    ring = next(x.ring for x in (q, k) if isinstance(x, Shared))
    scale, mask = kwargs.get("scale"), await ctx.protocol.cast(s.fork("mask"), args[3], ring)
    y = await attention.attention(
        ctx.protocol, s.fork("attention"), q, k, v, plan, scale=None if scale is None else float(scale),
        grouped=bool(kwargs.get("enable_gqa")), hidden=(mask, float(ctx.choice(node)["lowered"])),
        look=ctx.watching(node),
    )  # fmt: skip
    return await like(ctx, s.fork("out"), y)


async def _attention(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    plan = softmax.SoftmaxPlan.from_dict(ctx.choice(node)["plan"])
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
        look=ctx.watching(node),
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


def _window_choice(exact: bool) -> Choose:
    """``exact``: where a wrong choice has no size."""

    def choose(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
        bound = bound_of(node, stats, options)

        def make() -> dict[str, Any]:
            band = 0.0 if exact else budget(options).band(spread(stats, "in"))
            bits = window_bits(2 * bound, band, options.frac)
            return {
                "method": "tournament", "bound": bound, "window": bits, "range": [*range_of(node, stats, options)],
                "bits": cost.bits("select_negative", k=64, m=bits) * (2 if exact else 1),
                "error": compare.band(2 * bound, options.frac, bits), "headroom": 62 - room(2 * bound, options.frac),
            }  # fmt: skip

        return chosen(make)

    return choose


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
        dilation=_pairs(argument(args, kwargs, 4, "dilation"), 2, 1), bits=int(ctx.choice(node)["window"]),
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
        given = s.fork("in")
        x = await _compared(ctx, given, args[0], bound) if index else await in_z64(ctx, given, args[0])
        x = x if largest else neg(p, x)
        dims = _dims(argument(args, kwargs, 1, "dim"), len(x.shape))
        others = [d for d in range(len(x.shape)) if d not in dims]
        rows = p.linear(lambda part: part.permute(*others, *dims).flatten(len(others)), x)
        find = compare.argmax if index else compare.maximum
        y = await find(p, s.fork("find"), rows, -1, bound, bits=int(ctx.choice(node)["window"]))
        y = y if largest or index else neg(p, y)
        return await like(ctx, s.fork("out"), p.linear(lambda part: part.reshape(node.shape), y))

    return Handler(run, in_range, _window_choice(index))


async def _compared(ctx: Context, s: Session, x: Shared, bound: float) -> Shared:
    """Values in Z32 where their differences fit, for choices that drop the values: words are half as long there."""
    if x.ring == Z32 and bound * 2.0**x.frac < 2.0**30:
        return x
    x = await in_z64(ctx, s, x)
    return await ctx.protocol.cast(s.fork("short"), x, Z32) if bound * 2.0**x.frac < 2.0**30 else x


async def _argmax_one_hot(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """0/1 words in the plan's ring, without fraction bits."""
    choice, bound = ctx.choice(node), float(ctx.choice(node)["bound"])
    x = await _compared(ctx, s.fork("in"), args[0], bound)
    hot = await argmax_one_hot(
        ctx.protocol, s.fork("find"), x, int(args[1]), bound, bits=int(choice["window"])
    )
    return await like(ctx, s.fork("out"), hot)


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
        _attention, _measure_attention, _choose_attention, _supports_attention
    ),
    "sfumato.masked_attention": Handler(_masked_attention, _measure_masked, _choose_masked),
    "sfumato.argmax_one_hot": Handler(_argmax_one_hot, in_range, _window_choice(True)),
    "aten.max_pool2d.default": Handler(_max_pool, in_range, _window_choice(False), _no_ceil),
    "aten.amax.default": _extreme(True, False),
    "aten.amin.default": _extreme(False, False),
    "aten.max.default": _extreme(True, False),
    "aten.min.default": _extreme(False, False),
    "aten.argmax.default": _extreme(True, True),
    "aten.argmin.default": _extreme(False, True),
}
