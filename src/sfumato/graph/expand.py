"""Attention call by call, for plans that give its products and its softmax different rings."""

from __future__ import annotations

from dataclasses import replace

from sfumato.graph.handlers.nonlinear_ranges import argument
from sfumato.graph.places import Place, Placed
from sfumato.graph.program import Arg, Node
from sfumato.graph.rewrite import attention_calls

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
    mask = argument(node.args, node.kwargs, 3, "attn_mask")
    hidden = node.target == _HIDDEN
    causal = not hidden and bool(argument(node.args, node.kwargs, 5, "is_causal", False))
    scale = node.kwargs.get("scale") if hidden else argument(node.args, node.kwargs, 6, "scale")
    masked: tuple[str, tuple[Arg, ...]] | None = None
    if hidden:
        masked = "sfumato.lowered_scores", (mask,)
    elif mask is not None or causal:
        masked = "sfumato.masked_scores", (mask, causal)
    types = placed.program.types
    return attention_calls(node, lambda ref: types[ref.name][0], scale, masked)
