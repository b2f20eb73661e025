"""Attention call by call, for plans that give its products and its softmax different rings."""

from __future__ import annotations

from dataclasses import replace

import torch

from sfumato.graph.handlers.nonlinear_ranges import argument
from sfumato.graph.places import Place, Placed
from sfumato.graph.program import Arg, Node, Ref

__all__ = ["expand_attention"]

_PUBLIC, _HIDDEN = "aten.scaled_dot_product_attention.default", "sfumato.masked_attention"


def expand_attention(placed: Placed) -> Placed:
    """The same with every attention under the protocol as scale, product, mask, softmax, product. Grouped heads stay
    whole."""
    nodes: list[Node] = []
    places, per_call = dict(placed.places), set(placed.per_call)
    for node in placed.program.nodes:
        whole = node.target not in (_PUBLIC, _HIDDEN) or placed.places[node.name] is not Place.SECRET
        if whole or argument(node.args, node.kwargs, 7, "enable_gqa", False):
            nodes.append(node)
            continue
        calls = _calls(placed, node)
        nodes += calls
        places |= {call.name: Place.SECRET for call in calls}
        per_call |= {call.name for call in calls}
    program = replace(placed.program, nodes=tuple(nodes))
    return replace(placed, program=program, places=places, per_call=frozenset(per_call))


def _calls(placed: Placed, node: Node) -> list[Node]:
    q, k, v = node.args[:3]
    mask = argument(node.args, node.kwargs, 3, "attn_mask")
    hidden = node.target == _HIDDEN
    causal = not hidden and bool(argument(node.args, node.kwargs, 5, "is_causal", False))
    scale = node.kwargs.get("scale") if hidden else argument(node.args, node.kwargs, 6, "scale")
    shape_q, shape_k = placed.program.types[q.name][0], placed.program.types[k.name][0]
    scores = (*node.shape[:-1], shape_k[-2])
    factor = shape_q[-1] ** -0.5 if scale is None else float(scale)

    def made(suffix: str, target: str, args: tuple[Arg, ...], shape: tuple[int, ...]) -> Node:
        return Node(f"{node.name}_{suffix}", target, args, {}, node.module_path, shape, torch.float32)

    calls = [
        made("q", "aten.mul.Tensor", (q, factor), shape_q),
        made("k", "aten.transpose.int", (k, -1, -2), (*shape_k[:-2], shape_k[-1], shape_k[-2])),
    ]
    calls.append(made("scores", "aten.matmul.default", (Ref(calls[0].name), Ref(calls[1].name)), scores))
    if hidden:
        calls.append(made("masked", "sfumato.lowered_scores", (Ref(calls[-1].name), mask), scores))
    elif mask is not None or causal:
        calls.append(made("masked", "sfumato.masked_scores", (Ref(calls[-1].name), mask, causal), scores))
    weights = made("weights", "aten.softmax.int", (Ref(calls[-1].name), -1), scores)
    product = replace(node, target="aten.matmul.default", args=(Ref(weights.name), v), kwargs={})
    return [*calls, weights, product]
