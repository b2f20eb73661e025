"""Published approximations inside plans: a paper's profile, or single methods of the catalogue by name.

A call whose function a paper replaces runs the paper's own method on the secret, composed of products and comparisons;
every other call runs as under ``precise``. Such a run shows what a paper's approximations do to a model, at our prices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.catalogue import ENTRIES, FUNCTIONS, PROFILES, get
from sfumato.catalogue.shares import secure
from sfumato.errors import JobError, RangeError
from sfumato.graph.handlers import Context
from sfumato.graph.handlers.nonlinear_ranges import argument, in_z64, like
from sfumato.graph.program import Node
from sfumato.ops import basic
from sfumato.ops.attention import split_mask, turned
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = ["PAPERS", "entry_choice", "methods_of", "note_of", "run_entry"]

#: Profiles named after papers.
PAPERS = tuple(PROFILES)
#: Functions of the catalogue by target.
_FUNCTIONS = {
    **{f"aten.{name}.default": name for name in ("silu", "gelu", "mish", "sigmoid", "tanh", "erf")},
    **{f"aten.{name}.default": name for name in ("exp", "log", "sqrt")},
    **{f"aten.{name}_.default": name for name in ("silu", "mish", "sigmoid", "tanh", "erf")},
    "aten.reciprocal.default": "reciprocal", "aten.rsqrt.default": "rsqrt",
    "aten.softmax.int": "softmax", "aten._softmax.default": "softmax", "aten._safe_softmax.default": "softmax",
    "aten.scaled_dot_product_attention.default": "softmax",
    "aten.layer_norm.default": "layer_norm", "aten.group_norm.default": "layer_norm",
}  # fmt: skip
#: An additive mask that forbids; more would leave the range of the limit exponentials.
_FORBIDDEN = -100.0


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
    if argument(node.args, node.kwargs, 7, "enable_gqa", False) and "attention" in node.target:
        return None  # grouped heads are ours alone
    return None if name is None else {"method": name, "entry": name}


async def run_entry(
    ctx: Context, s: Session, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Shared:
    """The call by its published method. Rows are normalised by the method; gains and offsets are ours."""
    entry, p = get(str(ctx.choice(node)["entry"])), ctx.protocol
    x = await in_z64(ctx, s.fork("in"), args[0])

    async def method(name: str, value: Shared) -> Shared:
        return await secure(p, s.fork(name), value, entry)

    if node.target == "aten.scaled_dot_product_attention.default":
        y = await _attention(ctx, s, x, args, kwargs, entry)
    elif entry.function == "softmax":
        axis = int(args[1])
        rows = p.linear(lambda part: part.movedim(axis, -1), x)
        weights = await method("softmax", rows)
        y = p.linear(lambda part: part.movedim(-1, axis), weights)
    elif entry.function == "layer_norm":
        y = await _norm(ctx, s, x, node, args, kwargs, entry)
    else:
        y = await method("method", x)
    return await like(ctx, s.fork("out"), y)


async def _attention(
    ctx: Context, s: Session, q: Shared, args: tuple[Any, ...], kwargs: Mapping[str, Any], entry: Any
) -> Shared:
    p = ctx.protocol
    k, v = [await in_z64(ctx, s.fork(f"in{i}"), args[i]) for i in (1, 2)]
    scale = argument(args, kwargs, 6, "scale")
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    scores = await basic.matmul(p, s.fork("scores"), q, turned(p, k), factor=factor)
    allowed, bias = None, None
    mask = argument(args, kwargs, 3, "attn_mask")
    if isinstance(mask, Tensor):
        allowed, bias = split_mask(mask)
    if argument(args, kwargs, 5, "is_causal", False):
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if bias is not None:
        scores = p.add_public(s, scores, p.encode(scores, bias))
    if allowed is not None:
        forbidden = torch.where(allowed, 0.0, _FORBIDDEN).to(torch.float64).broadcast_to(scores.shape)
        scores = p.add_public(s, scores, p.encode(scores, forbidden))
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
