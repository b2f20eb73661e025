"""In which order a plan's secret calls run: groups whose rounds overlap, roles, and when a value is freed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sfumato.graph.handlers import HANDLERS
from sfumato.graph.program import Node

__all__ = ["LOOKAHEAD", "Order", "ordered", "turns", "waves"]

#: How many calls ahead in program order a call may start; bounds the values that are alive at once.
LOOKAHEAD = 24


def waves(nodes: Sequence[Node], frontier: Iterable[str], lookahead: int = LOOKAHEAD) -> list[list[int]]:
    """Indices of the secret calls in groups whose rounds overlap; local calls go alone and as early as they
    can.

    A group is the first interactive call left, in program order, with every other one in the next
    ``lookahead`` calls that does not wait for any of them. Depends on the plan alone.
    """
    uses = [node.refs() for node in nodes]
    ready = set(frontier)
    left = list(range(len(nodes)))
    groups: list[list[int]] = []

    def start(chosen: Sequence[int]) -> None:
        groups.append(list(chosen))
        ready.update(nodes[i].name for i in chosen)
        for i in chosen:
            left.remove(i)

    while left:
        open_calls = [i for i in left[:lookahead] if all(name in ready for name in uses[i])]
        at_once = [i for i in open_calls if HANDLERS[nodes[i].target].local]
        if at_once:
            for i in at_once:
                start([i])
        else:
            start(open_calls)
    return groups


def turns(nodes: Sequence[Node]) -> list[int]:
    """The role rotation of each secret call: calls of one kind take turns by size, so that all send alike."""
    loads: dict[str, list[int]] = {}
    chosen = []
    for node in nodes:
        load = loads.setdefault(node.target, [0, 0, 0])
        turn = load.index(min(load))
        load[turn] += math.prod(node.shape)
        chosen.append(turn)
    return chosen


class Order(NamedTuple):
    """``groups``: indices of calls that run at once. ``turns``: role rotation of each call. ``freed``: values that
    nobody needs after each group."""

    groups: list[list[int]]
    turns: list[int]
    freed: list[list[str]]


def ordered(nodes: Sequence[Node], frontier: Iterable[str], kept: Iterable[str]) -> Order:
    """The order of a plan's secret calls; ``kept`` are its results."""
    groups = waves(nodes, frontier)
    last = {name: g for g, group in enumerate(groups) for i in group for name in nodes[i].refs()}
    freed: list[list[str]] = [[] for _ in groups]
    results = set(kept)
    for name, g in last.items():
        if name not in results:
            freed[g].append(name)
    return Order(groups, turns(nodes), freed)
