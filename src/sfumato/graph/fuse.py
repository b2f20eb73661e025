"""Patterns that models spell out call by call, and the single call that the protocol runs cheaper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sfumato.graph.handlers import HANDLERS
from sfumato.graph.normalize import without_dead_code
from sfumato.graph.program import Arg, Node, Program, Ref

__all__ = ["PATTERNS", "Pattern", "fuse"]


@dataclass(frozen=True)
class _Call:
    """A call to ``aten.<target>``; the first two arguments of a commutative one match in both orders."""

    target: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class _Any:
    """Any argument; the same name must match the same one. ``kind``: ``value`` (a Ref) or ``number``."""

    name: str
    kind: str = "value"


@dataclass(frozen=True)
class Pattern:
    """``found`` in a program becomes ``build(node, bound)``: the new target and arguments, or None if it does
    not apply."""

    name: str
    found: _Call
    build: Callable[[Program, Node, dict[str, Arg]], tuple[str, tuple[Arg, ...], dict[str, Arg]] | None]


_COMMUTATIVE = frozenset(("mul.Tensor", "add.Tensor", "mul.Scalar", "add.Scalar"))
_X = _Any("x")


def fuse(program: Program) -> Program:
    """The same function with the patterns that the handlers know as single calls; the last call of each keeps
    its name."""
    made = {node.name: node for node in program.nodes}
    nodes: list[Node] = []
    for node in program.nodes:
        for pattern in PATTERNS:
            bound = next(_match(pattern.found, Ref(node.name), made, {}), None)
            built = None if bound is None else pattern.build(program, node, bound)
            if built is not None and built[0] in HANDLERS:
                node = replace(node, target=built[0], args=built[1], kwargs=built[2])
                break
        nodes.append(node)
    return without_dead_code(replace(program, nodes=tuple(nodes)))


def _match(pattern: Any, arg: Arg, made: dict[str, Node], bound: dict[str, Arg]) -> Iterator[dict[str, Arg]]:
    """Every way in which ``arg`` fits, as what the pattern's names stand for."""
    if isinstance(pattern, _Any):
        fits = isinstance(arg, Ref) if pattern.kind == "value" else isinstance(arg, int | float)
        if fits and bound.get(pattern.name, arg) == arg:
            yield {**bound, pattern.name: arg}
    elif isinstance(pattern, _Call):
        node = made.get(arg.name) if isinstance(arg, Ref) else None
        if node is None or node.target != f"aten.{pattern.target}":
            return
        orders = [node.args]
        if pattern.target in _COMMUTATIVE:
            orders.append((node.args[1], node.args[0], *node.args[2:]))
        for order in orders:
            if len(order) >= len(pattern.args) and not node.kwargs.get("alpha"):
                yield from _match_all(pattern.args, order, made, bound)
    elif isinstance(pattern, int | float):
        if isinstance(arg, int | float) and math.isclose(arg, pattern, rel_tol=1e-4):
            yield bound
    elif pattern == arg:
        yield bound


def _match_all(
    patterns: tuple[Any, ...], args: tuple[Arg, ...], made: dict[str, Node], bound: dict[str, Arg]
) -> Iterator[dict[str, Arg]]:
    if not patterns:
        yield bound
        return
    for first in _match(patterns[0], args[0], made, bound):
        yield from _match_all(patterns[1:], args[1:], made, first)


# ---- the patterns ------------------------------------------------------------------------------------------


def _mul(a: Any, b: Any) -> _Call:
    return _Call("mul.Tensor", (a, b))


def _add(a: Any, b: Any) -> _Call:
    return _Call("add.Tensor", (a, b))


def _to(
    target: str, *more: Arg
) -> Callable[[Program, Node, dict[str, Arg]], tuple[str, tuple[Arg, ...], dict[str, Arg]]]:
    return lambda program, node, bound: (target, (bound["x"], *more), {})


def _gelu(approximate: str) -> Callable[..., tuple[str, tuple[Arg, ...], dict[str, Arg]]]:
    return lambda program, node, bound: ("aten.gelu.default", (bound["x"],), {"approximate": approximate})


_CUBE = _add(_X, _mul(_Call("pow.Tensor_Scalar", (_X, 3)), 0.044715))
_TANH = _add(_Call("tanh.default", (_mul(_CUBE, math.sqrt(2 / math.pi)),)), 1)
_ERF = _add(_Call("erf.default", (_mul(_X, math.sqrt(0.5)),)), 1)
_ERF_BY_DIVISION = _add(_Call("erf.default", (_Call("div.Tensor", (_X, math.sqrt(2))),)), 1)
_QUAD = _add(_add(_mul(_mul(_X, 0.125), _X), _mul(_X, 0.25)), 0.5)
_MEAN_SQUARE = _Call("mean.dim", (_Call("pow.Tensor_Scalar", (_X, 2)), (-1,), True))
_RMS = _mul(_X, _Call("rsqrt.default", (_add(_MEAN_SQUARE, _Any("eps", "number")),)))


def _rms_norm(
    program: Program, node: Node, bound: dict[str, Arg]
) -> tuple[str, tuple[Arg, ...], dict[str, Arg]] | None:
    weight, width = bound.get("weight"), node.shape[-1:]
    if weight is not None and program.types[weight.name][0] != width:
        return None
    return "aten.rms_norm.default", (bound["x"], width, weight, bound["eps"]), {}


def _argmax_one_hot(
    program: Program, node: Node, bound: dict[str, Arg]
) -> tuple[str, tuple[Arg, ...], dict[str, Arg]] | None:
    shape = program.types[bound["x"].name][0]
    if bound["dim"] % len(shape) != len(shape) - 1 or node.shape != shape:
        return None
    return "sfumato.argmax_one_hot", (bound["x"], -1), {}


def _eager_attention(product: str) -> Iterator[Pattern]:
    """softmax(q k^T [times or over a number] [plus a mask]) v, with ``product`` for the products."""
    turned = _Call("transpose.int", (_Any("k"), _Any("a", "number"), _Any("b", "number")))
    scores = _Call(product, (_Any("q"), turned))
    for scaled in (
        _mul(scores, _Any("scale", "number")),
        _Call("div.Tensor", (scores, _Any("over", "number"))),
        scores,
    ):
        for masked in (_add(scaled, _Any("mask")), scaled):
            weights = _Call("softmax.int", (masked, -1))
            yield Pattern(f"attention by {product}", _Call(product, (weights, _Any("v"))), _attention)


def _attention(
    program: Program, node: Node, bound: dict[str, Arg]
) -> tuple[str, tuple[Arg, ...], dict[str, Arg]] | None:
    rank = len(node.shape)
    if {bound["a"] % rank, bound["b"] % rank} != {rank - 1, rank - 2}:
        return None
    scale = bound.get("scale", 1.0) / bound.get("over", 1.0)
    args = (bound["q"], bound["k"], bound["v"], bound.get("mask"), 0.0, False)
    return "aten.scaled_dot_product_attention.default", args, {"scale": float(scale)}


#: Larger patterns first.
PATTERNS: tuple[Pattern, ...] = (
    *_eager_attention("matmul.default"),
    *_eager_attention("bmm.default"),
    Pattern("gelu, tanh form", _mul(_mul(_X, 0.5), _TANH), _gelu("tanh")),
    Pattern("gelu, tanh form, half last", _mul(_mul(_X, _TANH), 0.5), _gelu("tanh")),
    Pattern("gelu", _mul(_mul(_X, 0.5), _ERF), _gelu("none")),
    Pattern("gelu, by division", _mul(_mul(_X, 0.5), _ERF_BY_DIVISION), _gelu("none")),
    Pattern("quadratic in place of gelu", _QUAD, _to("sfumato.quad")),
    Pattern("quick gelu", _mul(_X, _Call("sigmoid.default", (_mul(_X, 1.702),))), _to("sfumato.quick_gelu")),
    Pattern("silu", _mul(_X, _Call("sigmoid.default", (_X,))), _to("aten.silu.default")),
    Pattern(
        "mish", _mul(_X, _Call("tanh.default", (_Call("softplus.default", (_X,)),))), _to("aten.mish.default")
    ),
    Pattern(
        "one-hot of an argmax",
        _Call(
            "to.dtype", (_Call("one_hot.default", (_Call("argmax.default", (_X, _Any("dim", "number"))),)),)
        ),
        _argmax_one_hot,
    ),
    Pattern("rms norm with weight", _mul(_Any("weight"), _RMS), _rms_norm),
    Pattern("rms norm", _RMS, _rms_norm),
)
