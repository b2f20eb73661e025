"""Where a maximum is, as a row with a single 1: an index that a product can use, and that nobody has seen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sfumato.ops.compare import WINDOW_BITS, brackets, played, pools
from sfumato.ops.tiles import concatenate, elementwise, narrow
from sfumato.protocol.base import Protocol
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = ["argmax_one_hot"]


async def argmax_one_hot(
    p: Protocol, s: Session, x: Shared, dim: int, bound: float, *, bits: int = WINDOW_BITS
) -> Shared:
    """1 where x is largest along one axis, 0 elsewhere, as words without fraction bits. Shape kept.

    Every group of the tournament keeps who won it; walking back down, the 1 of the last winner is multiplied into the
    group that it comes from. Exactly one element of a row is 1.

    Domain: |x| <= bound. Error: exact unless the best two are within ceil(log2 n) bands of each other.
    Cost: the rounds of :func:`~sfumato.ops.compare.maximum` and one for each level but the last; about 15k bits more
    for each group of four, and 3k for each element: 860 to 910 bits an element in all, with ``bits`` = 16.
    Leaks: nothing. Source: as :func:`~sfumato.ops.compare.maximum`.
    """
    axis = dim % len(x.shape)
    best, won = p.linear(lambda part: part.movedim(axis, 0), x), list[list[list[Shared]]]()
    for level, groups in enumerate(brackets(best.shape[0])):
        winners = await s.fork(f"level{level}").gather(
            *(
                partial(_play, p, x=best, pool=pool, reach=2 * bound, bits=bits)
                for pool in pools(best.shape[0], groups)
            )
        )
        best = concatenate(p, [pool[0] for pool in winners], 0)
        won.append([pool[1:] for pool in winners])
    hot = _constant(p, s, best, 1)
    for level, rows in reversed(list(enumerate(won))):
        hot = await _down(p, s.fork(f"down{level}"), hot, rows, top=level == len(won) - 1)
    return p.linear(lambda part: part.movedim(0, axis), hot)


async def _play(
    p: Protocol, s: Session, x: Shared, pool: tuple[int, int, int], reach: float, bits: int
) -> list[Shared]:
    """The maxima of a pool's groups, then for each candidate but the first whether it is the maximum."""
    low, high, count = pool
    width = (high - low) // count
    lines = [[narrow(p, x, 0, low + i * width, low + (i + 1) * width) for i in range(count)]]
    for c in range(1, count):
        lines.append([_constant(p, s, line, int(i == c)).viewed(x.frac) for i, line in enumerate(lines[0])])
    best, *places = await played(p, s, lines, reach, bits)
    return [best, *(place.viewed(0) for place in places)]


def _constant(p: Protocol, s: Session, x: Shared, value: int) -> Shared:
    """A whole number in the shape of x, without fraction bits."""
    zeros = p.linear(lambda part: part * 0, x, frac=0)
    return p.add_public(s, zeros, p.encode(zeros, torch.full(x.shape, float(value), dtype=torch.float64), 0))


async def _down(
    p: Protocol, s: Session, hot: Shared, pooled: Sequence[Sequence[Shared]], *, top: bool
) -> Shared:
    """From which of the groups are hot to which of their candidates are; ``top``: there is one group, and it is."""
    parents, at = list[Shared](), 0
    for places in pooled:
        width = places[0].shape[0] if places else hot.shape[0] - at
        parents.append(narrow(p, hot, 0, at, at + width))
        at += width
    bits = [bit for places in pooled for bit in places]
    again = [parent for parent, places in zip(parents, pooled, strict=True) for _ in places]
    found = concatenate(p, bits, 0)
    if not top:

        async def step(child: Session, a: Shared, b: Shared) -> Shared:
            return await p.bilinear(child, torch.mul, a, b)

        found = await elementwise(p, s, step, concatenate(p, again, 0), found)
    lines, at = list[Shared](), 0
    for parent, places in zip(parents, pooled, strict=True):
        width, mine = parent.shape[0], list[Shared]()
        for _ in places:
            mine.append(narrow(p, found, 0, at, at + width))
            at += width
        lines += [p.linear(_rest, parent, *mine), *mine]
    return concatenate(p, lines, 0)


def _rest(parent: Tensor, *children: Tensor) -> Tensor:
    """The first candidate of a group is hot if the group is and none of the others."""
    for child in children:
        parent = parent - child
    return parent
