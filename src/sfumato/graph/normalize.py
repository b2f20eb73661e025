"""Clean-up of a fresh capture: calls that change nothing are removed, and every call has one result and one
spelling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sfumato.graph.program import Arg, Node, Program, Ref, map_refs

__all__ = ["normalize", "without_dead_code"]

Types = dict[str, tuple[tuple[int, ...], torch.dtype]]

#: First argument passed through unchanged (float types are all float32 here, and memory layout is nobody's
#: business).
_IDENTITIES = frozenset((
    "aten.alias.default", "aten.contiguous.default", "aten.clone.default", "aten.detach.default",
    "aten.detach_.default", "aten.dropout.default", "aten.dropout_.default", "aten.feature_dropout.default",
    "aten.alpha_dropout.default", "aten.lift_fresh.default", "aten.lift_fresh_copy.default",
    "aten.lift.default", "aten.positive.default", "aten.resolve_conj.default", "aten.resolve_neg.default",
))  # fmt: skip
_CASTS = frozenset((
    "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.to.other", "aten._to_copy.default",
    "aten.type_as.default", "aten.float.default", "aten.double.default",
))  # fmt: skip
_ASSERTIONS = ("aten._assert", "aten.sym_constrain", "aten._functional_assert", "aten._functional_sym")
_RENAMED = {
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
    "aten.view_copy.default": "aten.reshape.default",
    "aten._reshape_copy.default": "aten.reshape.default",
    "aten.split_with_sizes.default": "aten.split.sizes",
    "aten.native_layer_norm.default": "aten.layer_norm.default",
}
_SHAPE_ONLY = frozenset(
    (
        "aten.reshape.default",
        "aten.expand.default",
        "aten.slice.Tensor",
        "aten.flatten.using_ints",
        "aten.squeeze.default",
    )
)
#: Second argument with which the call returns its first one.
_NEUTRAL = {
    "aten.mul.Tensor": 1, "aten.mul.Scalar": 1, "aten.div.Tensor": 1, "aten.div.Scalar": 1,
    "aten.add.Tensor": 0,
    "aten.add.Scalar": 0, "aten.sub.Tensor": 0, "aten.sub.Scalar": 0, "aten.pow.Tensor_Scalar": 1,
}  # fmt: skip
#: What a call fills its result with: a number, or the position of the argument that says it.
_FILLS: dict[str, int | tuple[int]] = {
    "aten.ones_like.default": 1, "aten.zeros_like.default": 0, "aten.full_like.default": (1,),
    "aten.new_ones.default": 1, "aten.new_zeros.default": 0, "aten.new_full.default": (2,),
    "aten.empty_like.default": 0, "aten.new_empty.default": 0,
    "aten.fill.Scalar": (1,), "aten.fill.Tensor": (1,),
}  # fmt: skip
_PADDED = ("aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding")


def normalize(program: Program) -> Program:
    """The same program with identities, assertions and multi-result calls rewritten away, and no dead
    code."""
    types = dict(program.types)
    known: dict[str, Ref] = {}
    multi: dict[str, Node] = {}
    nodes: list[Node] = []
    for raw in program.nodes:
        if raw.target.startswith(_ASSERTIONS):
            continue
        node = _renamed(raw, known)
        same = _identity(node, types)
        if same is not None:
            known[node.name] = same
            continue
        node = _filled(node)
        if node.target in _PADDED and isinstance(node.args[4], str):
            nodes += _explicit_padding(node, types)
            continue
        if node.target == "aten.getitem.int" and node.args[0].name in multi:
            node = _single(multi[node.args[0].name], node)
            types[node.name] = (node.shape, node.dtype)
        elif node.target in _SPLITS or node.target in _FIRSTS:
            multi[node.name] = node
        nodes.append(node)
    outputs = tuple(map_refs(o, lambda n: known.get(n, Ref(n))) for o in program.outputs)
    return without_dead_code(replace(program, nodes=tuple(nodes), outputs=outputs))


def _renamed(node: Node, known: dict[str, Ref]) -> Node:
    def follow(arg: Arg) -> Any:
        return map_refs(arg, lambda n: known.get(n, Ref(n)))

    target = _RENAMED.get(node.target, node.target)
    return replace(
        node, target=target, args=follow(node.args), kwargs={k: follow(v) for k, v in node.kwargs.items()}
    )


def _identity(node: Node, types: Types) -> Ref | None:
    first = node.args[0] if node.args else None
    if not isinstance(first, Ref):
        return None
    shape, dtype = types[first.name]
    if node.target in _IDENTITIES:
        return first
    neutral = _NEUTRAL.get(node.target)
    if neutral is not None:
        if isinstance(node.args[1], Ref | bool) or node.args[1] != neutral or any(node.kwargs.values()):
            return None
    elif node.target not in _CASTS and node.target not in _SHAPE_ONLY:
        return None
    return first if (shape, dtype) == (node.shape, node.dtype) else None


def _filled(node: Node) -> Node:
    """Calls that read only the shape of their argument say so: their value is public whatever the argument
    is."""
    if node.target in _FILLS:
        value = _FILLS[node.target]
        value = node.args[value[0]] if isinstance(value, tuple) else value
        if not isinstance(value, Ref):
            return replace(
                node, target="aten.full.default", args=(node.shape, value), kwargs={"dtype": node.dtype}
            )
        return replace(node, target="aten.expand.default", args=(value, node.shape), kwargs={})
    return node


def _explicit_padding(node: Node, types: Types) -> list[Node]:
    """conv(..., padding="same" or "valid") with numbers; what is not symmetric is padded before."""
    kernel = types[node.args[1].name][0][2:]
    given = [*node.args, *((1,) * len(kernel), 1)[len(node.args) - 5 :]]
    x, weight, bias, stride, padding, dilation, groups = given
    spread = [0] * len(kernel)
    if padding == "same":
        steps = (
            (dilation,) * len(kernel)
            if isinstance(dilation, int)
            else tuple(dilation) * (len(kernel) // len(dilation))
        )
        spread = [d * (k - 1) for d, k in zip(steps, kernel, strict=True)]
    target = node.target.replace(".padding", ".default")
    before: list[Node] = []
    pads = tuple(total // 2 for total in spread)
    if any(total % 2 for total in spread):
        edges = tuple(e for total in reversed(spread) for e in (total // 2, total - total // 2))
        shape, dtype = types[x.name]
        size = shape[: -len(spread)] + tuple(
            n + total for n, total in zip(shape[-len(spread) :], spread, strict=True)
        )
        padded = Node(
            f"{node.name}_padded",
            "aten.constant_pad_nd.default",
            (x, edges, 0.0),
            {},
            node.module_path,
            size,
            dtype,
        )
        before, x, pads = [padded], Ref(padded.name), (0,) * len(spread)
    return [
        *before,
        replace(node, target=target, args=(x, weight, bias, stride, pads, dilation, groups), kwargs={}),
    ]


def without_dead_code(program: Program) -> Program:
    """Drop nodes and weights that no result needs. User inputs stay."""
    needed, kept = set(program.output_names), list[Node]()
    for node in reversed(program.nodes):
        if node.name in needed:
            needed.update(node.refs())
            kept.append(node)
    inputs = tuple(i for i in program.inputs if i.kind == "user" or i.name in needed)
    weights = {k: v for k, v in program.weights.items() if k in needed}
    return replace(
        program, inputs=inputs, nodes=tuple(_canonical_cast(n) for n in reversed(kept)), weights=weights
    )


def _canonical_cast(node: Node) -> Node:
    if node.target in _CASTS and node.target != "aten.to.dtype":
        return replace(node, target="aten.to.dtype", args=(node.args[0], node.dtype), kwargs={})
    return node


# ---- calls with several results ----------------------------------------------------------------------------


def _single(source: Node, item: Node) -> Node:
    """The call that gives one of a multi-result call's results directly."""
    index = item.args[1]
    target, args = (_SPLITS.get(source.target) or _FIRSTS[source.target])(source, index)
    if target is None:
        return item
    return replace(item, target=target, args=args, module_path=source.module_path)


def _argument(node: Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


def _slice(node: Node, start: int, stop: int, dim: int) -> tuple[str, tuple[Arg, ...]]:
    return "aten.slice.Tensor", (node.args[0], dim, start, stop)


def _chunk(node: Node, index: int) -> tuple[str, tuple[Arg, ...]]:
    dim = _argument(node, 2, 0)
    size = node.shape[dim]  # of the first piece, which is the largest
    return _slice(node, index * size, (index + 1) * size, dim)


def _split(node: Node, index: int) -> tuple[str, tuple[Arg, ...]]:
    size, dim = node.args[1], _argument(node, 2, 0)
    return _slice(node, index * size, (index + 1) * size, dim)


def _split_sizes(node: Node, index: int) -> tuple[str, tuple[Arg, ...]]:
    sizes, dim = node.args[1], _argument(node, 2, 0)
    return _slice(node, sum(sizes[:index]), sum(sizes[: index + 1]), dim)


def _unbind(node: Node, index: int) -> tuple[str, tuple[Arg, ...]]:
    return "aten.select.int", (node.args[0], _argument(node, 1, 0), index)


def _first(target: str, *positions: int) -> Callable[[Node, int], tuple[str | None, tuple[Arg, ...]]]:
    """The single-result call that equals result 0, with these arguments of the multi-result call."""

    def single(node: Node, index: int) -> tuple[str | None, tuple[Arg, ...]]:
        if index != 0:
            return None, ()
        return target, tuple(_argument(node, p, None) for p in positions)

    return single


def _extreme(value: str, index_of: str) -> Callable[[Node, int], tuple[str, tuple[Arg, ...]]]:
    def single(node: Node, index: int) -> tuple[str, tuple[Arg, ...]]:
        dim, keep = node.args[1], _argument(node, 2, False)
        return (value, (node.args[0], (dim,), keep)) if index == 0 else (index_of, (node.args[0], dim, keep))

    return single


def _batch_norm(node: Node, index: int) -> tuple[str | None, tuple[Arg, ...]]:
    x, weight, bias, mean, var, momentum, eps = node.args
    return (
        ("aten.batch_norm.default", (x, weight, bias, mean, var, False, momentum, eps, False))
        if index == 0
        else (None, ())
    )


_SPLITS: dict[str, Callable[[Node, int], tuple[Any, tuple[Arg, ...]]]] = {
    "aten.chunk.default": _chunk,
    "aten.split.Tensor": _split,
    "aten.split.sizes": _split_sizes,
    "aten.unbind.int": _unbind,
}
_FIRSTS: dict[str, Callable[[Node, int], tuple[Any, tuple[Arg, ...]]]] = {
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten.layer_norm.default": _first("aten.layer_norm.default", 0, 1, 2, 3, 4),
    "aten.native_group_norm.default": _first("aten.group_norm.default", 0, 6, 1, 2, 7),
    "aten.max_pool2d_with_indices.default": _first("aten.max_pool2d.default", 0, 1, 2, 3, 4, 5),
    "aten.max.dim": _extreme("aten.amax.default", "aten.argmax.default"),
    "aten.min.dim": _extreme("aten.amin.default", "aten.argmin.default"),
}
