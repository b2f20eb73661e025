"""What a plan's operations would send at published prices: a budget to hold ourselves to, and SPU's column beside it.

Prices are bits per element summed over the three parties, everything counted: ``budget`` from docs/design/003 (Z64,
18 fraction bits), ``spu`` measured on SPU 0.9.5, ABY3, 64 bit (benchmarks/results/peers, MB of a party times three),
or from its cost model where no case was measured ([SPU]). Counts are those of the plan's own calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sfumato.graph.handlers.linear import LINEAR_PLUS
from sfumato.graph.handlers.smooth import ACTIVATED
from sfumato.graph.look_up import LOOK_UP
from sfumato.graph.places import Place
from sfumato.graph.plan import Plan
from sfumato.graph.program import Node, Ref

__all__ = ["PRICES", "Price", "Priced", "priced"]


@dataclass(frozen=True, slots=True)
class Price:
    """Bits per element of one kind of work."""

    budget: float
    spu: float


#: By kind of work. ``product``: an output of a matrix product, convolution or elementwise product of secrets.
PRICES: dict[str, Price] = {
    "product": Price(212, 416),
    "public product": Price(148, 224),
    "silu": Price(1374, 15_740),
    "gelu": Price(1374, 42_960),
    "gelu_tanh": Price(1374, 9_310),
    "quick_gelu": Price(1374, 15_740),
    "mish": Price(1374, 36_960),
    "tanh": Price(1374, 7_780),
    "sigmoid": Price(1374, 14_690),
    "smooth": Price(1374, 7_780),
    "exp": Price(1374, 3_550),
    "inverse": Price(3_000, 10_750),
    "score": Price(1250, 7_488),
    "norm": Price(212, 1_248),
    "comparison": Price(144, 864),
    "select": Price(192, 576),
}
_LINEAR = frozenset(
    f"aten.{name}" for name in (
        "linear.default", "conv1d.default", "conv2d.default", "conv3d.default", "conv_transpose1d.default",
        "conv_transpose2d.input", "matmul.default", "mm.default", "bmm.default", "addmm.default", "baddbmm.default",
        "mv.default", "einsum.default", "mul.Tensor", "div.Tensor", "true_divide.Tensor", "addcmul.default",
        "square.default", "lerp.Tensor", "pow.Tensor_Scalar",
    )
) | {LOOK_UP, LINEAR_PLUS}  # fmt: skip
_SMOOTH = {
    "aten.silu.default": "silu", "aten.silu_.default": "silu",
    "aten.mish.default": "mish", "aten.mish_.default": "mish",
    "sfumato.quick_gelu": "quick_gelu", "aten.sigmoid.default": "sigmoid", "aten.sigmoid_.default": "sigmoid",
    "aten.tanh.default": "tanh", "aten.tanh_.default": "tanh", "aten.exp.default": "exp",
}  # fmt: skip
_INVERSE = frozenset(f"aten.{name}.default" for name in ("reciprocal", "rsqrt", "sqrt"))
_NORMS = frozenset(f"aten.{name}.default" for name in ("group_norm", "layer_norm", "rms_norm"))
_SOFTMAX = frozenset(("aten.softmax.int", "aten._softmax.default", "aten._safe_softmax.default"))
_COMPARED = frozenset(f"aten.{name}" for name in (
    "relu.default", "relu_.default", "abs.default", "clamp.default", "clamp_min.default", "clamp_max.default",
    "leaky_relu.default", "leaky_relu_.default", "amax.default", "amin.default", "max.default", "min.default",
    "argmax.default", "argmin.default", "maximum.default", "minimum.default", "max_pool2d.default", "gt.Tensor",
    "gt.Scalar", "lt.Tensor", "lt.Scalar", "hardtanh.default", "relu6.default", "hardsigmoid.default",
    "hardswish.default",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Priced:
    """Counts by kind of work, and total bytes of all parties at each price."""

    counts: dict[str, int]
    budget_bytes: float
    spu_bytes: float


def priced(plan: Plan) -> Priced:
    """One run of the plan at the prices of :data:`PRICES`. Sums, copies and reshapes cost nothing at any price."""
    counts: dict[str, int] = {}
    for node in plan.secret_nodes:
        for kind, count in _work(plan, node):
            counts[kind] = counts.get(kind, 0) + count
    totals = [
        sum(n * getattr(PRICES[kind], name) for kind, n in counts.items()) / 8 for name in ("budget", "spu")
    ]
    return Priced(counts, totals[0], totals[1])


def _work(plan: Plan, node: Node) -> list[tuple[str, int]]:
    """(kind, how many elements) of one call."""
    target, out = node.target, math.prod(node.shape)
    operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Ref)]
    shapes = [plan.program.types[a.name][0] for a in operands]
    first = math.prod(shapes[0]) if shapes else out
    if target in _LINEAR or target == ACTIVATED:
        secret = all(plan.places[a.name] is not Place.PUBLIC for a in operands[:2]) and len(operands) > 1
        whole = secret or target.endswith(("square.default", "pow.Tensor_Scalar"))
        found = [("product" if whole else "public product", out)]
        if target == ACTIVATED:
            name = str(node.kwargs["function"])
            found.append((name if name in PRICES else "smooth", out))
        return found
    if target == "aten.gelu.default":
        tanh = "tanh" in (*node.args[1:2], node.kwargs.get("approximate"))
        return [("gelu_tanh" if tanh else "gelu", out)]
    if target in _SMOOTH or target in _INVERSE:
        return [(_SMOOTH.get(target, "inverse"), out)]
    if target in _SOFTMAX:
        return [("score", out)]
    if target in ("aten.scaled_dot_product_attention.default", "sfumato.masked_attention"):
        scores = math.prod(shapes[0][:-1]) * shapes[1][-2]
        return [("product", scores + out), ("score", scores)]
    if target in _NORMS:
        return [("norm", first)]
    if target in _COMPARED or target == "sfumato.argmax_one_hot":
        return [("comparison", first), ("select", first)]
    choice = plan.choices.get(node.name, {})
    return [("smooth", out)] if choice.get("method") in ("series", "clamped") else []
