"""Published approximations inside plans: a paper's profile, or single methods of the catalogue by name.

A call whose function a paper replaces runs the paper's own method on the secret, composed of products and comparisons;
every other call runs as under ``precise``. Such a run shows what a paper's approximations do to a model, at our prices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from sfumato.catalogue import ENTRIES, FUNCTIONS, PROFILES, get
from sfumato.catalogue.entry import Entry
from sfumato.catalogue.methods.rows import softmax_shifted
from sfumato.catalogue.shares import Shares, secure
from sfumato.errors import JobError, RangeError
from sfumato.graph.handlers import Context
from sfumato.graph.handlers.nonlinear_ranges import argument, in_z64, is_short, like
from sfumato.graph.program import Node, Program
from sfumato.ops import basic
from sfumato.ops.attention import turned
from sfumato.ops.masks import FORBIDDEN, lowered, score_masks
from sfumato.protocol.base import Protocol
from sfumato.session.session import Session
from sfumato.types import Z64, Shared

__all__ = ["PAPERS", "QUAD", "as_quad", "entry_choice", "methods_of", "note_of", "run_entry"]

#: The quadratic that students of [MPCFormer] and [Ditto] have in place of GELU.
QUAD = "mpcformer.gelu"
#: Profiles named after papers.
PAPERS = tuple(PROFILES)
#: Functions of the catalogue by target.
_FUNCTIONS = {
    **{f"aten.{name}.default": name for name in ("silu", "gelu", "mish", "sigmoid", "tanh", "erf")},
    **{f"aten.{name}.default": name for name in ("exp", "log", "sqrt")},
    **{f"aten.{name}_.default": name for name in ("silu", "mish", "sigmoid", "tanh", "erf")},
    "aten.reciprocal.default": "reciprocal", "aten.rsqrt.default": "rsqrt",
    "aten.softmax.int": "softmax", "aten._softmax.default": "softmax", "aten._safe_softmax.default": "softmax",
    "aten.scaled_dot_product_attention.default": "softmax", "sfumato.masked_attention": "softmax",
    "aten.layer_norm.default": "layer_norm", "aten.group_norm.default": "layer_norm",
}  # fmt: skip


def methods_of(profile: str, methods: Mapping[str, str]) -> dict[str, str]:
    """Entry names by function: those of the paper that the profile names, then those chosen one by one.

    Raises:
        JobError: an unknown function or entry, an entry of another function, or one that needs table look-ups.
    """
    for name, entry in methods.items():
        if name not in FUNCTIONS:
            raise JobError(f"the catalogue has no function {name!r}; there are {', '.join(FUNCTIONS)}")
        try:
            found = get(entry)
        except RangeError as error:
            raise JobError(str(error)) from error
        if found.function != name:
            raise JobError(f"{entry} approximates {found.function}, not {name}")
        if not found.secure:
            raise JobError(f"{entry} needs table look-ups, which are no move here; choose another entry")
    return {k: v for k, v in {**PROFILES.get(profile, {}), **methods}.items() if ENTRIES[v].secure}


def note_of(profile: str, methods: Mapping[str, str]) -> list[str]:
    """What a plan says of its published methods, and of those that cannot run."""
    notes = []
    if methods:
        known = ", ".join(sorted(methods.values()))
        notes.append(f"published approximations, right on their own ranges alone: {known}")
    missing = [v for k, v in PROFILES.get(profile, {}).items() if k not in methods]
    if missing:
        notes.append(f"our own methods stand in for {', '.join(sorted(missing))}, which need table look-ups")
    return notes


def entry_choice(node: Node, methods: Mapping[str, str]) -> dict[str, Any] | None:
    """The choice of a call that a published method replaces; None if none does."""
    name = methods.get(_FUNCTIONS.get(node.target, ""))
    if "attention" in node.target and argument(node.args, node.kwargs, 7, "enable_gqa", False):
        return None  # grouped heads are ours alone
    return None if name is None else {"method": name, "entry": name}


def as_quad(program: Program) -> Program:
    """The program with :data:`QUAD` in place of every GELU, as the call that a student which was trained so has: one
    square where the paper's own form takes a square and a product with constants."""
    nodes = [
        replace(n, target="sfumato.quad", args=n.args[:1], kwargs={})
        if _FUNCTIONS.get(n.target) == "gelu"
        else n
        for n in program.nodes
    ]
    return replace(program, nodes=tuple(nodes))


async def run_entry(
    ctx: Context, s: Session, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Shared:
    """The call by its published method. Rows are normalised by the method; gains and offsets are ours."""
    entry, p = get(str(ctx.choice(node)["entry"])), ctx.protocol
    narrow = is_short(ctx.options)
    x = args[0] if narrow else await in_z64(ctx, s.fork("in"), args[0])

    async def method(name: str, value: Shared) -> Shared:
        return await secure(p, s.fork(name), value, entry)

    if "attention" in node.target:
        y = await _attention(ctx, s, x, args, kwargs, entry)
    elif entry.function == "softmax":
        axis = int(args[1])
        rows = p.linear(lambda part: part.movedim(axis, -1), x)
        weights = await (_mixed_softmax(p, s, rows, entry) if narrow else method("softmax", rows))
        y = p.linear(lambda part: part.movedim(-1, axis), weights)
    elif entry.function == "layer_norm":
        y = await _norm(ctx, s, x, node, args, kwargs, entry)
    else:
        y = await method("method", x)
    return await like(ctx, s.fork("out"), y)


async def _mixed_softmax(p: Protocol, s: Session, x: Shared, entry: Entry) -> Shared:
    """A softmax by the row's maximum that finds it in Z32 and does the rest in Z64, at the entry's fraction bits.

    Source: [Ditto] 2.2: maximum and subtraction before the cast up, the weights cast down (2.3, in its local form).
    """
    words = Shares(p, s.fork("max"), x.frac, cut_constants=entry.cut_constants)
    moved = words.sub(x, words.spread(await words.row_max(x), x))
    wide = p.lift(await p.cast(s.fork("widen"), moved, Z64), entry.frac)
    rest = Shares(p, s.fork("weights"), entry.frac, cut_constants=entry.cut_constants)
    weights: Shared = await softmax_shifted(rest, wide, **entry.options)
    return p.shorten(s, weights, x.frac)


async def _attention(
    ctx: Context, s: Session, q: Shared, args: tuple[Any, ...], kwargs: Mapping[str, Any], entry: Any
) -> Shared:
    p = ctx.protocol
    k, v = [await in_z64(ctx, s.fork(f"in{i}"), args[i]) for i in (1, 2)]
    mask, causal, scale = (
        argument(args, kwargs, i, n) for i, n in ((3, "attn_mask"), (5, "is_causal"), (6, "scale"))
    )
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    scores = await basic.matmul(p, s.fork("scores"), q, turned(p, k), factor=factor)
    if isinstance(mask, Shared):
        scores = lowered(p, s, scores, await p.cast(s.fork("mask"), mask, scores.ring), -FORBIDDEN)
        return await _weighed(p, s, scores, v, entry)
    allowed, bias = score_masks((scores.shape[-2], scores.shape[-1]), mask, bool(causal))
    if bias is not None:
        scores = p.add_public(s, scores, p.encode(scores, bias))
    if allowed is not None:
        forbidden = torch.where(allowed, 0.0, FORBIDDEN).to(torch.float64).broadcast_to(scores.shape)
        scores = p.add_public(s, scores, p.encode(scores, forbidden))
    return await _weighed(p, s, scores, v, entry)


async def _weighed(p: Protocol, s: Session, scores: Shared, v: Shared, entry: Entry) -> Shared:
    weights = await secure(p, s.fork("softmax"), scores, entry)
    return await basic.matmul(p, s.fork("values"), weights, v)


async def _norm(
    ctx: Context,
    s: Session,
    x: Shared,
    node: Node,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    entry: Any,
) -> Shared:
    p = ctx.protocol
    grouped = node.target == "aten.group_norm.default"
    weight = await in_z64(ctx, s.fork("weight"), argument(args, kwargs, 2, "weight"))
    bias = await in_z64(ctx, s.fork("bias"), argument(args, kwargs, 3, "bias"))
    lead = (x.shape[0], int(args[1])) if grouped else x.shape[: len(x.shape) - len(args[1])]
    rows = p.linear(lambda part: part.reshape(*lead, -1), x)
    y = await secure(p, s.fork("norm"), rows, entry)
    y = p.linear(lambda part: part.reshape(x.shape), y)
    column = (1, -1, *([1] * (len(x.shape) - 2)))

    def shaped(v: Any) -> Any:
        if not grouped:
            return v
        return p.linear(lambda part: part.reshape(column), v) if isinstance(v, Shared) else v.reshape(column)

    if weight is not None:
        y = await basic.mul(p, s.fork("gain"), y, shaped(weight))
    return y if bias is None else basic.add(p, s, y, shaped(bias))
