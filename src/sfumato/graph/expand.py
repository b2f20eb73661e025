"""Attention call by call, for plans that give its products and its softmax different rings."""

from __future__ import annotations

from dataclasses import replace

import torch

from sfumato.graph.handlers.nonlinear_ranges import argument
from sfumato.graph.program import Arg, Node, Program, Ref

__all__ = ["expand_attention"]

_ATTENTION = "aten.scaled_dot_product_attention.default"


def expand_attention(program: Program) -> Program:
    """The same function with every attention as scale, product, mask, softmax, product. Grouped heads stay whole."""
    nodes: list[Node] = []
    for node in program.nodes:
        whole = node.target != _ATTENTION or argument(node.args, node.kwargs, 7, "enable_gqa", False)
        nodes += [node] if whole else _calls(program, node)
    return replace(program, nodes=tuple(nodes))


def _calls(program: Program, node: Node) -> list[Node]:
    q, k, v = node.args[:3]
    mask, causal = (
        argument(node.args, node.kwargs, 3, "attn_mask"),
        argument(node.args, node.kwargs, 5, "is_causal"),
    )
    scale = argument(node.args, node.kwargs, 6, "scale")
    shape_q, shape_k = program.types[q.name][0], program.types[k.name][0]
    scores = (*node.shape[:-1], shape_k[-2])
    factor = shape_q[-1] ** -0.5 if scale is None else float(scale)

    def made(suffix: str, target: str, args: tuple[Arg, ...], shape: tuple[int, ...]) -> Node:
        return Node(f"{node.name}_{suffix}", target, args, {}, node.module_path, shape, torch.float32)

    calls = [
        made("q", "aten.mul.Tensor", (q, factor), shape_q),
        made("k", "aten.transpose.int", (k, -1, -2), (*shape_k[:-2], shape_k[-1], shape_k[-2])),
    ]
    calls.append(made("scores", "aten.matmul.default", (Ref(calls[0].name), Ref(calls[1].name)), scores))
    if mask is not None or causal:
        calls.append(
            made("masked", "sfumato.masked_scores", (Ref(calls[-1].name), mask, bool(causal)), scores)
        )
    weights = made("weights", "aten.softmax.int", (Ref(calls[-1].name), -1), scores)
    product = replace(node, target="aten.matmul.default", args=(Ref(weights.name), v), kwargs={})
    return [*calls, weights, product]
