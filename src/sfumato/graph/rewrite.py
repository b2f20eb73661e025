"""Forms that must be rewritten once places are known: look-ups by the client's values, and batch norms.

A secret cannot be indexed by a secret, but the client can share its row numbers for a look-up of their own kind, or
one-hot rows whose product with the table picks the same rows; both show nothing, and the lighter upload is taken.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sfumato.graph.look_up import LOOK_UP, numbers_are_lighter
from sfumato.graph.program import Arg, Node, Program, Ref, refs_of

__all__ = ["FORMS", "Rewriter", "attention_calls"]


class Rewriter(ABC):
    """What a form may ask about the values placed so far."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[Node] = []
        self.types = {i.name: (i.shape, i.dtype) for i in program.inputs}

    @abstractmethod
    def used_once(self, name: str) -> bool:
        """One node or result of the captured program reads this value."""

    @abstractmethod
    def is_client(self, name: str) -> bool:
        """The client computes this value in clear."""

    @abstractmethod
    def is_hidden(self, name: str) -> bool:
        """Neither public nor known to the client."""

    @abstractmethod
    def is_secret(self, name: str) -> bool:
        """Under the protocol."""

    def shape(self, arg: Ref) -> tuple[int, ...]:
        return self.types[arg.name][0]

    def take(self, name: str) -> Node | None:
        """Remove and return the node of this name, if it was the last secret one emitted under that name."""
        for i in range(len(self.nodes) - 1, -1, -1):
            if self.nodes[i].name == name:
                return self.nodes.pop(i)
        return None


#: What the client shares of ids, and of indices on several axes: row numbers, or one-hot rows.
_BY_ID = ("sfumato.row_numbers", "sfumato.one_hot")
_BY_POSITION = ("sfumato.row_positions", "sfumato.positions_one_hot")


def _made(like: Node, suffix: str, target: str, args: tuple[Arg, ...], shape: tuple[int, ...]) -> Node:
    return Node(f"{like.name}_{suffix}", target, args, {}, like.module_path, shape, torch.float32)


def _final(like: Node, target: str, args: tuple[Arg, ...]) -> Node:
    return replace(like, target=target, args=args, kwargs={})


def _picking(
    node: Node, numbers: str, one_hot: str, args: tuple[Arg, ...], shape: tuple[int, ...], size: int
) -> tuple[Node, str]:
    """What the client shares to pick ``shape`` of ``size`` rows, and the call that takes it as its first operand and
    the table as its second."""
    if numbers_are_lighter(size):
        return replace(_made(node, "rows", numbers, args, shape), dtype=torch.int64), LOOK_UP
    return _made(node, "rows", one_hot, args, (*shape, size)), "aten.matmul.default"


def _embedding(r: Rewriter, node: Node) -> list[Node] | None:
    table, ids = node.args[0], node.args[1]
    if not (r.is_hidden(table.name) and r.is_client(ids.name)):
        return None
    size = r.shape(table)[0]
    rows, pick = _picking(node, *_BY_ID, (ids, size), r.shape(ids), size)
    return [rows, _final(node, pick, (Ref(rows.name), table))]


def _index(r: Rewriter, node: Node) -> list[Node] | None:
    """x[i, j, ...] with indices on the leading axes, at least one of them the client's."""
    x, indices = node.args
    used = [i for i in indices if i is not None]
    if not r.is_hidden(x.name) or not any(r.is_client(i.name) for i in used):
        return None
    if len(used) != len(tuple(indices)) or any(r.is_hidden(i.name) for i in used):
        return None
    if any(r.types[i.name][1] is torch.bool for i in used):
        return None
    shape = r.shape(x)
    leading, rest = shape[: len(used)], shape[len(used) :]
    flat, width = math.prod(leading), math.prod(rest)
    picked = math.prod(node.shape) // max(width, 1)
    rows, pick = _picking(node, *_BY_POSITION, (tuple(used), leading), (picked,), flat)
    table = _made(node, "table", "aten.reshape.default", (x, (flat, width)), (flat, width))
    product = _made(node, "picked", pick, (Ref(rows.name), Ref(table.name)), (picked, width))
    return [rows, table, product, _final(node, "aten.reshape.default", (Ref(product.name), node.shape))]


def _index_select(r: Rewriter, node: Node) -> list[Node] | None:
    x, dim, ids = node.args
    if not (r.is_hidden(x.name) and r.is_client(ids.name)):
        return None
    shape, (count,) = r.shape(x), (*r.shape(ids), 1)[:1]
    size, dim = shape[dim], dim % len(shape)
    rest = shape[:dim] + shape[dim + 1 :]
    moved = _made(node, "moved", "aten.movedim.int", (x, dim, 0), (size, *rest))
    table = _made(
        node,
        "table",
        "aten.reshape.default",
        (Ref(moved.name), (size, math.prod(rest))),
        (size, math.prod(rest)),
    )
    rows, pick = _picking(node, *_BY_ID, (ids, size), (count,), size)
    picked = _made(node, "picked", pick, (Ref(rows.name), Ref(table.name)), (count, math.prod(rest)))
    shaped = _made(node, "shaped", "aten.reshape.default", (Ref(picked.name), (count, *rest)), (count, *rest))
    return [moved, table, rows, picked, shaped, _final(node, "aten.movedim.int", (Ref(shaped.name), 0, dim))]


def _gather(r: Rewriter, node: Node) -> list[Node] | None:
    """gather(x, dim, index) where the other axes of x and index agree."""
    x, dim, ids = node.args[0], node.args[1], node.args[2]
    if not (r.is_hidden(x.name) and r.is_client(ids.name)):
        return None
    shape, picked = r.shape(x), r.shape(ids)
    dim %= len(shape)
    if shape[:dim] + shape[dim + 1 :] != picked[:dim] + picked[dim + 1 :]:
        return None
    rest, size, count = shape[:dim] + shape[dim + 1 :], shape[dim], picked[dim]
    last = len(shape) - 1
    moved_ids = _made(node, "ids", "aten.movedim.int", (ids, dim, last), (*rest, count))
    moved_ids = replace(moved_ids, dtype=torch.int64)
    rows = _made(node, "rows", "sfumato.one_hot", (Ref(moved_ids.name), size), (*rest, count, size))
    moved = _made(node, "moved", "aten.movedim.int", (x, dim, last), (*rest, size))
    column = _made(node, "column", "aten.unsqueeze.default", (Ref(moved.name), -1), (*rest, size, 1))
    product = _made(
        node, "product", "aten.matmul.default", (Ref(rows.name), Ref(column.name)), (*rest, count, 1)
    )
    flat = _made(node, "flat", "aten.squeeze.dim", (Ref(product.name), -1), (*rest, count))
    return [moved_ids, rows, moved, column, product, flat,
            _final(node, "aten.movedim.int", (Ref(flat.name), last, dim))]  # fmt: skip


_CONVOLUTIONS = ("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.linear.default")


def _batch_norm(r: Rewriter, node: Node) -> list[Node] | None:
    """Eval-mode batch norm: folded into the convolution before it, else one product and one sum with
    constants."""
    x, weight, bias, mean, variance, _, _, eps = node.args[:8]
    if mean is None or variance is None or not r.is_secret(x.name):
        return None
    channels = r.shape(mean)
    scale = _made(node, "scale", "sfumato.norm_scale", (weight, variance, eps), channels)
    shift = _made(node, "shift", "sfumato.norm_shift", (bias, mean, Ref(scale.name)), channels)
    folded = _folded(r, node, x, scale, shift)
    if folded is not None:
        return [scale, shift, *folded]
    spread = (-1, *([1] * (len(node.shape) - 2)))
    shape = channels + (1,) * (len(node.shape) - 2)
    factor = _made(node, "factor", "aten.reshape.default", (Ref(scale.name), spread), shape)
    offset = _made(node, "offset", "aten.reshape.default", (Ref(shift.name), spread), shape)
    scaled = _made(node, "scaled", "aten.mul.Tensor", (x, Ref(factor.name)), node.shape)
    return [
        scale,
        shift,
        factor,
        offset,
        scaled,
        _final(node, "aten.add.Tensor", (Ref(scaled.name), Ref(offset.name))),
    ]


def _folded(r: Rewriter, node: Node, x: Ref, scale: Node, shift: Node) -> list[Node] | None:
    before = next((n for n in reversed(r.nodes) if n.name == x.name), None)
    if before is None or before.target not in _CONVOLUTIONS or not r.used_once(x.name):
        return None
    weight, bias = before.args[1], before.args[2] if len(before.args) > 2 else None
    if any(r.is_secret(name) or r.is_client(name) for name in refs_of((weight, bias))):
        return None
    r.take(x.name)
    rows = _made(node, "kernel", "sfumato.scale_rows", (weight, Ref(scale.name)), r.shape(weight))
    offset = _made(
        node, "offset", "sfumato.scale_bias", (bias, Ref(scale.name), Ref(shift.name)), scale.shape
    )
    args = (before.args[0], Ref(rows.name), Ref(offset.name), *before.args[3:])
    return [rows, offset, replace(before, name=node.name, args=args)]


def _resampled(r: Rewriter, node: Node) -> list[Node] | None:
    """Average pools and linear up-sampling of (N, C, ...): means of equal blocks, or a product with a
    constant matrix."""
    x = node.args[0]
    axes = len(node.shape) - 2
    if not r.is_hidden(x.name) or axes < 1:
        return None
    shape = r.shape(x)
    lead, size, out = shape[:2], shape[2:], node.shape[2:]
    block = tuple(n // m for n, m in zip(size, out, strict=True))
    if _is_block_mean(node, size, out, block):
        split = lead + tuple(d for m, b in zip(out, block, strict=True) for d in (m, b))
        blocks = _made(node, "blocks", "aten.reshape.default", (x, split), split)
        inner = tuple(3 + 2 * a for a in range(axes))
        return [blocks, _final(node, "aten.mean.dim", (Ref(blocks.name), inner))]
    inputs, outputs = math.prod(size), math.prod(out)
    matrix = _made(
        node, "matrix", "sfumato.resample_matrix", (node.target, size, node.args[1:]), (inputs, outputs)
    )
    flat = _made(node, "flat", "aten.reshape.default", (x, (*lead, inputs)), (*lead, inputs))
    product = _made(
        node, "product", "aten.matmul.default", (Ref(flat.name), Ref(matrix.name)), (*lead, outputs)
    )
    return [matrix, flat, product, _final(node, "aten.reshape.default", (Ref(product.name), node.shape))]


def _is_block_mean(node: Node, size: tuple[int, ...], out: tuple[int, ...], block: tuple[int, ...]) -> bool:
    if any(n != m * b for n, m, b in zip(size, out, block, strict=True)):
        return False
    if "adaptive_avg" in node.target:
        return True
    if "avg_pool" not in node.target:
        return False
    kernel, stride, padding = (*node.args[1:4], *((), 0)[len(node.args) - 2 :])[:3]
    return _spread(kernel, block) and (not stride or _spread(stride, block)) and not any(_numbers(padding))


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)


def _spread(value: Any, block: tuple[int, ...]) -> bool:
    given = _numbers(value)
    return (given * len(block) if len(given) == 1 else given) == block


def _masked(r: Rewriter, node: Node) -> list[Node] | None:
    """A client's boolean condition reaches the protocol as 0/1."""
    position = 0 if node.target.startswith("aten.where") else 1
    condition = node.args[position]
    others = [a for i, a in enumerate(node.args) if i != position]
    if not r.is_client(condition.name) or not any(r.is_hidden(n) for n in refs_of(tuple(others))):
        return None
    made, words = _as_words(r, node, condition)
    args = tuple(words if i == position else a for i, a in enumerate(node.args))
    return [*made, replace(node, args=args)]


def _as_words(r: Rewriter, node: Node, condition: Ref) -> tuple[list[Node], Ref]:
    """A client's boolean as 0/1, made once however many calls read it."""
    for known in r.nodes:
        if known.target == "sfumato.to_float" and known.args == (condition,):
            return [], Ref(known.name)
    made = _made(node, "mask", "sfumato.to_float", (condition,), r.shape(condition))
    return [made], Ref(made.name)


def _row_masks(r: Rewriter, node: Node, mask: Ref) -> tuple[list[Node], Ref]:
    """A client's attention mask as 0/1, made once. A row that forbids everything, of padding, allows everything: what
    comes of it nobody reads, but a softmax of nothing would leave every range."""
    for known in r.nodes:
        if known.target == "aten.any.dim" and known.args == (mask, -1, True):
            return [], Ref(known.name.removesuffix("_seen") + "_mask")
    shape = r.shape(mask)
    seen = replace(_made(node, "seen", "aten.any.dim", (mask, -1, True), (*shape[:-1], 1)), dtype=torch.bool)
    blind = replace(
        seen, name=f"{node.name}_blind", target="aten.logical_not.default", args=(Ref(seen.name),)
    )
    filled = (mask, Ref(blind.name))
    rows = replace(_made(node, "rows", "aten.logical_or.default", filled, shape), dtype=torch.bool)
    words = _made(node, "mask", "sfumato.to_float", (Ref(rows.name),), shape)
    return [seen, blind, rows, words], Ref(words.name)


def _attention(r: Rewriter, node: Node) -> list[Node] | None:
    """Attention with a secret additive mask (a learnt position bias) as its two products and the softmax; with the
    client's boolean mask as a call of its own."""
    q, k, v, mask = (*node.args, None)[:4]
    if mask is None or not (r.is_hidden(mask.name) or r.is_client(mask.name)):
        return None
    if r.types[mask.name][1] is torch.bool and r.is_client(mask.name):
        if not any(r.is_hidden(x.name) for x in (q, k)) or any(node.args[4:6]):
            return None
        made, words = _row_masks(r, node, mask)
        return [
            *made,
            replace(node, target="sfumato.masked_attention", args=(q, k, v, words), kwargs=dict(node.kwargs)),
        ]
    if not r.types[mask.name][1].is_floating_point or not any(r.is_hidden(x.name) for x in (q, k)):
        return None
    if node.kwargs.get("enable_gqa") or any(node.args[4:6]):
        return None
    return attention_calls(node, r.shape, node.kwargs.get("scale"), ("aten.add.Tensor", (mask,)))


def attention_calls(
    node: Node,
    shape: Callable[[Ref], tuple[int, ...]],
    scale: Any,
    masked: tuple[str, tuple[Arg, ...]] | None,
) -> list[Node]:
    """Attention call by call: scale, product, ``masked`` (a target and its arguments after the scores), softmax,
    product."""
    q, k, v = node.args[:3]
    shape_q, shape_k = shape(q), shape(k)
    scores = (*node.shape[:-1], shape_k[-2])
    factor = shape_q[-1] ** -0.5 if scale is None else float(scale)
    turned = (*shape_k[:-2], shape_k[-1], shape_k[-2])
    calls = [
        _made(node, "q", "aten.mul.Tensor", (q, factor), shape_q),
        _made(node, "k", "aten.transpose.int", (k, -1, -2), turned),
    ]
    product = (Ref(calls[0].name), Ref(calls[1].name))
    calls.append(_made(node, "scores", "aten.matmul.default", product, scores))
    if masked is not None:
        target, more = masked
        calls.append(_made(node, "masked", target, (Ref(calls[-1].name), *more), scores))
    weights = _made(node, "weights", "aten.softmax.int", (Ref(calls[-1].name), -1), scores)
    return [*calls, weights, _final(node, "aten.matmul.default", (Ref(weights.name), v))]


#: By target; a form returns None where the call can stay as it is.
FORMS: dict[str, Callable[[Any, Node], list[Node] | None]] = {
    "aten.embedding.default": _embedding,
    "aten.index.Tensor": _index,
    "aten.index_select.default": _index_select,
    "aten.gather.default": _gather,
    "aten.batch_norm.default": _batch_norm,
    "aten.scaled_dot_product_attention.default": _attention,
    **{
        f"aten.{name}": _resampled
        for name in (
            "adaptive_avg_pool1d.default",
            "adaptive_avg_pool2d.default",
            "adaptive_avg_pool3d.default",
            "avg_pool1d.default",
            "avg_pool2d.default",
            "_adaptive_avg_pool2d.default",
            "upsample_bilinear2d.vec",
            "upsample_bilinear2d.default",
            "upsample_linear1d.vec",
            "upsample_bicubic2d.vec",
        )
    },
    "aten.where.self": _masked,
    "aten.where.ScalarSelf": _masked,
    "aten.where.ScalarOther": _masked,
    "aten.masked_fill.Scalar": _masked,
    "aten.masked_fill.Tensor": _masked,
}
