"""Calls that only move, copy or sum elements: on words they are the ATen calls themselves, local and
exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.graph.evaluate import resolve
from sfumato.graph.handlers.kinds import Context, Handler
from sfumato.graph.program import Node
from sfumato.ops import basic
from sfumato.ops.masks import FORBIDDEN, lowered, score_masks
from sfumato.ring.fixed import encode
from sfumato.session.session import Session
from sfumato.types import Z32, Z64, Shared

__all__ = ["HANDLERS_SHAPES", "local", "tensors_of"]

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


def tensors_of(arg: Any) -> Iterator[Shared | Tensor]:
    """Secrets and public tensors of a nested argument, in order."""
    if isinstance(arg, Shared | Tensor):
        yield arg
    elif isinstance(arg, tuple | list):
        for item in arg:
            yield from tensors_of(item)


def _replaced(arg: Any, values: Iterator[Any]) -> Any:
    if isinstance(arg, Shared | Tensor):
        return next(values)
    if isinstance(arg, tuple | list):
        return [_replaced(item, values) for item in arg]
    return arg


def local(ctx: Context, s: Session, call: Callable[[Args], Tensor], args: Args) -> Shared:
    """Any linear ``call`` on the tensors of ``args``, secret and public alike: L(x, c) = L(x, 0) + L(0,
    c)."""
    p, tensors = ctx.protocol, list(tensors_of(args))
    frac = max(x.frac for x in tensors if isinstance(x, Shared))
    tensors = [p.lift(x, frac) if isinstance(x, Shared) else x for x in tensors]
    secrets = [x for x in tensors if isinstance(x, Shared)]

    def on_parts(*parts: Tensor) -> Tensor:
        waiting = iter(parts)
        filled = [next(waiting) if isinstance(x, Shared) else _zeros(x.shape, parts[0]) for x in tensors]
        return call(tuple(_replaced(args, iter(filled))))

    out = p.linear(on_parts, *secrets)
    if len(secrets) == len(tensors):
        return out

    def words(x: Shared | Tensor) -> Tensor:
        if isinstance(x, Shared):
            return _zeros(x.shape, device=s.device, dtype=x.ring.dtype)
        return p.encode(secrets[0], x, frac)

    known = [words(x) for x in tensors]
    return p.add_public(s, out, call(tuple(_replaced(args, iter(known)))))


def _zeros(
    shape: tuple[int, ...], like: Tensor | None = None, *, device: Any = None, dtype: Any = None
) -> Tensor:
    if like is not None:
        device, dtype = like.device, like.dtype
    return torch.zeros(tuple(shape), dtype=dtype, device=device)


def _moves(target: str) -> Handler:
    function = resolve(target)

    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        return local(ctx, s, lambda filled: function(*filled, **kwargs), args)

    return Handler(run, local=True)


def _gathered(target: str) -> Handler:
    """Any call whose every result is one element of its first argument or zero, by the positions of the
    elements."""
    function = resolve(target)

    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        x = args[0]
        places = torch.arange(1, x.type.numel + 1, dtype=torch.float64).reshape(x.shape)
        index = function(places, *args[1:], **kwargs).round().to(torch.int64)
        keep, index = index > 0, (index - 1).clamp_min(0)

        def move(part: Tensor) -> Tensor:
            return part.reshape(-1)[index.to(part.device)] * keep.to(device=part.device, dtype=part.dtype)

        return ctx.protocol.linear(move, x)

    return Handler(run, local=True)


def _with_index(target: str, position: int) -> Handler:
    """Calls that read a secret at public integer positions."""
    function = resolve(target)

    async def run(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
        secret = 0
        assert isinstance(args[secret], Shared)

        def read(part: Tensor) -> Tensor:
            filled = [part, *(_on(a, part) for a in args[1:])]
            if target == "aten.embedding.default":
                filled = filled[:2]
            return function(*filled, **kwargs)

        return ctx.protocol.linear(read, args[secret])

    def supports(node: Node, secret: tuple[bool, ...]) -> str | None:
        if len(secret) > position and secret[position]:
            return "reads at secret positions; use client_known= if the client knows them"
        return None

    return Handler(run, supports=supports, local=True)


def _on(arg: Any, part: Tensor) -> Any:
    if isinstance(arg, Tensor):
        return arg.to(part.device)
    if isinstance(arg, tuple | list):
        return [_on(a, part) for a in arg]
    return arg


# ---- padding -----------------------------------------------------------------------------------------------


async def _constant_pad(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    x, pad, value = args[0], list(args[1]), float((args[2] if len(args) > 2 else 0) or 0)
    out = ctx.protocol.linear(lambda part: torch.nn.functional.pad(part, pad), x)
    if value == 0.0:
        return out
    frame = torch.nn.functional.pad(torch.zeros(x.shape, device=s.device), pad, value=1.0) * value
    return ctx.protocol.add_public(s, out, ctx.protocol.encode(out, frame))


async def _pad(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """pad(x, pad, mode="constant", value=None)."""
    mode = args[2] if len(args) > 2 else "constant"
    if mode == "constant":
        return await _constant_pad(ctx, s, node, (args[0], args[1], args[3] if len(args) > 3 else 0), {})
    shared: Shared = await _PAD_BY_POSITION.run(ctx, s, node, args[:3], {})
    return shared


# ---- sums and means ----------------------------------------------------------------------------------------


def _dims(node: Node, args: Args) -> tuple[list[int] | None, bool]:
    dims = args[1] if len(args) > 1 else None
    if isinstance(dims, int):
        dims = (dims,)
    return (list(dims) if dims else None), bool(args[2]) if len(args) > 2 else False


def _summed(ctx: Context, node: Node, args: Args) -> Shared:
    dims, keep = _dims(node, args)

    def add_up(part: Tensor) -> Tensor:
        axes = dims if dims is not None else list(range(part.dim()))
        return torch.sum(part, axes, keepdim=keep, dtype=part.dtype) if axes else part

    return ctx.protocol.linear(add_up, args[0])


async def _sum(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    return _summed(ctx, node, args)


async def _mean(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """One truncation of the sum."""
    x, total = args[0], _summed(ctx, node, args)
    return await basic.scale(ctx.protocol, s, total, total.type.numel / x.type.numel)


async def _cumsum(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    return ctx.protocol.linear(lambda part: torch.cumsum(part, args[1], dtype=part.dtype), args[0])


async def _diff(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    return ctx.protocol.linear(lambda part: torch.diff(part, *args[1:3]), args[0])


# ---- choices by a mask -------------------------------------------------------------------------------------


async def _where(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """where(condition, x, y): local for a public condition, one exact product for 0/1 words (frac 0)."""
    condition, x, y = args
    p = ctx.protocol
    if isinstance(condition, Shared):
        secrets = [v for v in (x, y) if isinstance(v, Shared)]
        if not secrets:
            gap = _public(x) - _public(y)
            frac = ctx.frac

            def scaled(part: Tensor) -> Tensor:
                return part * encode(gap.to(part.device), condition.ring, frac)

            out = p.linear(scaled, condition, frac=frac)
            return p.add_public(s, out, p.encode(out, _public(y)))
        gap_shared = basic.sub(p, s, x, y)
        chosen = await p.bilinear(s, torch.mul, condition, gap_shared)
        return basic.add(p, s, chosen, y)
    mask = condition.to(torch.bool)

    def pick(filled: Args) -> Tensor:
        return torch.where(mask.to(filled[0].device), filled[0], filled[1])

    def masked(v: Any, there: Tensor) -> Shared | Tensor:
        if isinstance(v, Shared):
            return v
        known = _public(v).to(device=mask.device, dtype=torch.float64)
        return torch.where(there, known, torch.zeros_like(known))  # what is not picked need not fit the ring

    return local(ctx, s, pick, (masked(x, mask), masked(y, ~mask)))


def _public(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)


async def _masked_fill(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    x, mask, value = args
    return await _where(ctx, s, node, (mask, value, x), {})


async def _masked_scores(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """scores (..., L, S) with a public mask: what it forbids becomes :data:`FORBIDDEN`."""
    x, mask, causal = args
    allowed, bias = score_masks(tuple(x.shape[-2:]), mask, bool(causal))
    if bias is not None:
        x = ctx.protocol.add_public(s, x, ctx.protocol.encode(x, bias))
    if allowed is None:
        return x
    return await _where(ctx, s, node, (allowed, x, FORBIDDEN), {})


async def _lowered_scores(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """scores (..., L, S) with a secret mask of 0/1 words."""
    x, mask = args
    mask = await ctx.protocol.cast(s, mask, x.ring)
    return lowered(ctx.protocol, s, x, mask, -FORBIDDEN)


# ---- rings -------------------------------------------------------------------------------------------------


async def _shorten(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """Into Z32, the components rounded apart; whole numbers keep their words. Local."""
    x, p = args[0], ctx.protocol
    if x.frac == 0:
        return await p.cast(s, x, Z32)
    return p.shorten(s, p.lift(x, max(x.frac, ctx.frac)), ctx.frac)


async def _widen(ctx: Context, s: Session, node: Node, args: Args, kwargs: Kwargs) -> Shared:
    """Into Z64, exact: 2 rounds, 162 bits an element."""
    wide = await ctx.protocol.cast(s, args[0], Z64)
    return wide if wide.frac == 0 else ctx.protocol.lift(wide, ctx.frac)


def _finite_fill(node: Node, secret: tuple[bool, ...]) -> str | None:
    huge = [a for a in node.args if isinstance(a, float) and abs(a) > 2**20]
    if huge:
        return f"fills a secret with {huge[0]:g}, too large for fixed point; use attention with a mask"
    return None


# ---- the table ---------------------------------------------------------------------------------------------

_MOVES = (
    "reshape.default", "permute.default", "transpose.int", "t.default", "unsqueeze.default",
    "squeeze.default", "squeeze.dim", "squeeze.dims", "expand.default", "expand_as.default", "slice.Tensor",
    "select.int", "cat.default", "stack.default", "flatten.using_ints", "unflatten.int", "repeat.default",
    "roll.default", "flip.default", "movedim.int", "movedim.intlist", "narrow.default",
    "pixel_shuffle.default", "pixel_unshuffle.default", "channel_shuffle.default", "swapaxes.default",
    "swapdims.default", "moveaxis.int", "numpy_T.default", "mT.default", "concat.default",
    "concatenate.default", "hstack.default", "vstack.default", "atleast_1d.default", "view_as.default",
    "reshape_as.default", "tile.default", "broadcast_to.default", "repeat_interleave.self_int",
    "unfold.default", "select_scatter.default", "slice_scatter.default", "diagonal.default", "tril.default",
    "triu.default", "rot90.default", "adjoint.default", "matrix_H.default",
)  # fmt: skip
_GATHERED = (
    "upsample_nearest2d.vec", "upsample_nearest2d.default", "upsample_nearest1d.vec",
    "upsample_nearest1d.default", "upsample_nearest3d.vec", "_upsample_nearest_exact2d.vec",
    "reflection_pad1d.default", "reflection_pad2d.default", "replication_pad1d.default",
    "replication_pad2d.default", "im2col.default",
)  # fmt: skip
_PAD_BY_POSITION = _gathered("aten.pad.default")

HANDLERS_SHAPES: dict[str, Handler] = {
    "sfumato.lowered_scores": Handler(_lowered_scores, local=True),
    "sfumato.masked_scores": Handler(_masked_scores, local=True),
    "sfumato.shorten": Handler(_shorten, local=True),
    "sfumato.widen": Handler(_widen),
    **{f"aten.{name}": _moves(f"aten.{name}") for name in _MOVES},
    **{f"aten.{name}": _gathered(f"aten.{name}") for name in _GATHERED},
    "aten.embedding.default": _with_index("aten.embedding.default", 1),
    "aten.index.Tensor": _with_index("aten.index.Tensor", 1),
    "aten.index_select.default": _with_index("aten.index_select.default", 2),
    "aten.gather.default": _with_index("aten.gather.default", 2),
    "aten.take_along_dim.default": _with_index("aten.take_along_dim.default", 1),
    "aten.constant_pad_nd.default": Handler(_constant_pad, local=True),
    "aten.pad.default": Handler(_pad, local=True),
    "aten.sum.dim_IntList": Handler(_sum, local=True),
    "aten.sum.default": Handler(_sum, local=True),
    "aten.mean.dim": Handler(_mean),
    "aten.mean.default": Handler(_mean),
    "aten.cumsum.default": Handler(_cumsum, local=True),
    "aten.diff.default": Handler(_diff, local=True),
    "aten.where.self": Handler(_where, supports=_finite_fill),
    "aten.where.ScalarSelf": Handler(_where, supports=_finite_fill),
    "aten.where.ScalarOther": Handler(_where, supports=_finite_fill),
    "aten.where.Scalar": Handler(_where, supports=_finite_fill),
    "aten.masked_fill.Scalar": Handler(_masked_fill, supports=_finite_fill),
    "aten.masked_fill.Tensor": Handler(_masked_fill, supports=_finite_fill),
}
