"""How much memory a party needs for a plan: an estimate from shapes, before anything runs.

Counted: the shares that are alive at each call, in the order in which they are freed, and the working set of the call
at hand (tables dealt for one group of tiles, a block of attention, an encoded weight). Weights that a party maps from
a file are shared by the processes of a host and not counted. Measured beside it in benchmarks/results/sd15.md.
"""

from __future__ import annotations

import math
from typing import Any

from sfumato.graph.look_up import LOOK_UP
from sfumato.graph.places import Place
from sfumato.graph.plan import Plan
from sfumato.graph.program import Node, Ref
from sfumato.ops.tiles import DEFAULT_TILES
from sfumato.protocol.rep3_look_up import WORDS_AT_ONCE

__all__ = ["BASE", "peak_memory"]

#: A party's process with torch, its allocator's slack and an idle session (measured, Linux, torch 2.13).
BASE = 350 * 10**6
#: A share is two components of eight bytes.
_SHARE, _WORD = 16, 8
#: Words that a move holds per element while it runs: operands, summand, messages both ways, stream, result.
_MOVE = 8


def peak_memory(plan: Plan) -> int:
    """Bytes of private memory of one party at the plan's fullest call; an estimate, good to about a third."""
    nodes, order = plan.secret_nodes, plan.order
    sizes = {name: _SHARE * math.prod(shape) for name, (shape, _) in plan.program.types.items()}
    alive = sum(sizes[name] for name in (*plan.client_inputs, *plan.public_inputs))
    peak = 0
    for g, group in enumerate(order.groups):
        outs = [nodes[i] for i in group]
        alive += sum(sizes.get(node.name, 0) for node in outs)
        peak = max(peak, alive + sum(_working(plan, node) for node in outs))
        alive -= sum(sizes.get(name, 0) for name in order.freed[g])
    return BASE + peak


def _working(plan: Plan, node: Node) -> int:
    """Bytes that a call holds beside its operands and its result."""
    out, choice = math.prod(node.shape), plan.choices.get(node.name, {})
    shapes = [(a.name, plan.program.types[a.name][0]) for a in node.args if isinstance(a, Ref)]
    if node.target in ("aten.scaled_dot_product_attention.default", "sfumato.masked_attention"):
        scores = math.prod(shapes[0][1][:-1]) * shapes[1][1][-2]
        block = min(scores, DEFAULT_TILES.scores)
        return block * _WORD * _MOVE + _dealt(choice.get("plan", {}), block) + out * _WORD * 2
    if node.target == LOOK_UP:
        picked = math.prod(shapes[0][1]) * shapes[1][1][0]  # one-hot words, expanded in blocks
        return 2 * min(picked, WORDS_AT_ONCE) * _WORD + out * _WORD * _MOVE
    held = sum(_WORD * math.prod(shape) for name, shape in shapes if plan.places[name] is Place.PUBLIC)
    return held + min(out, 3 * DEFAULT_TILES.elements) * _WORD * _MOVE + _dealt(choice.get("plan", {}), out)


def _dealt(plan: Any, count: int) -> int:
    """Tables of the widest evaluation in a call's plan, for one group of tiles, as stream and as message."""
    series, core = plan.get("series"), plan.get("core") or plan.get("exp", {}).get("core")
    words = 2 * len(series["cos"]) if series else 1 << core["blocks"] if core else 0
    return 2 * words * _WORD * min(count, 3 * DEFAULT_TILES.elements)
