"""Tiles: one operation split into pieces whose roles rotate, so that the three parties compute and send alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sfumato.protocol.base import Protocol
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = [
    "DEFAULT_TILES",
    "Tiles",
    "ceil_log2",
    "concatenate",
    "elementwise",
    "in_thirds",
    "narrow",
    "pieces",
    "thirds",
]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile settings; part of the hashed plan, because paths, streams and roles follow from them.

    ``elements``: largest tile of an elementwise operation; more elements cost more rounds.
    ``smallest``: operations with fewer elements are not split.
    ``scores``: attention works on so many scores at a time, so that long sequences fit in memory.
    ``products``: matrix products and convolutions with at least this many multiply-adds are split in three.
    """

    elements: int = 1 << 19
    smallest: int = 3 * 2048
    products: int = 1 << 24
    scores: int = 1 << 22


DEFAULT_TILES = Tiles()

Step = Callable[..., Coroutine[Any, Any, Shared]]


def ceil_log2(x: float) -> int:
    """ceil(log2 x) of a positive number without a float library: alike on every machine."""
    mantissa, exponent = math.frexp(x)
    return exponent - (mantissa == 0.5)


def _bounds(length: int, pieces: int) -> list[tuple[int, int]]:
    return [(length * i // pieces, length * (i + 1) // pieces) for i in range(pieces)]


def concatenate(p: Protocol, xs: Sequence[Shared], axis: int) -> Shared:
    """Concatenate along an axis. Local."""
    return p.linear(lambda *parts: torch.cat(parts, axis), *xs)


async def elementwise(
    p: Protocol, s: Session, step: Step, *xs: Shared, tiles: Tiles = DEFAULT_TILES
) -> Shared:
    """``step(session, *tiles)`` over flattened tiles of equal-shaped secrets; three tiles at a time share rounds.

    Shape is kept; a step may put axes in front. Rounds: those of one tile per group of three tiles.
    """
    shape, count = xs[0].shape, xs[0].type.numel
    if count < tiles.smallest or p.parties == 1:
        return await step(s, *xs)
    flat = [p.linear(lambda part: part.reshape(-1), x) for x in xs]
    groups = -(-count // (3 * tiles.elements))
    done: list[Shared] = []
    for g, (low, high) in enumerate(_bounds(count, groups)):
        session = s.fork(f"tiles{g}") if groups > 1 else s
        pieces = [[_cut(p, x, low + a, low + b) for x in flat] for a, b in _bounds(high - low, 3)]
        done += await in_thirds(session, step, pieces)
    whole = concatenate(p, done, -1)
    return p.linear(lambda part: part.reshape(*whole.shape[:-1], *shape), whole)


async def in_thirds(s: Session, step: Step, pieces: Sequence[Sequence[Shared]]) -> list[Shared]:
    """Run ``step(session, *piece)`` for each piece at once, each with its roles rotated by one more turn."""

    def branch(turn: int, piece: Sequence[Shared]) -> Callable[[Session], Coroutine[Any, Any, Shared]]:
        return lambda child: step(child.fork("turn", turn=s.turn + turn), *piece)

    results: list[Shared] = await s.gather(*(branch(i, piece) for i, piece in enumerate(pieces)))
    return results


def _cut(p: Protocol, x: Shared, start: int, stop: int) -> Shared:
    return p.linear(lambda part: part[start:stop], x)


def pieces(length: int, most: int) -> list[tuple[int, int]]:
    """Bounds of nearly equal pieces of at most ``most``."""
    return _bounds(length, max(1, -(-length // max(1, most))))


def thirds(length: int) -> list[tuple[int, int]]:
    """Bounds of three nearly equal pieces."""
    return _bounds(length, 3)


def narrow(p: Protocol, x: Shared, axis: int, start: int, stop: int) -> Shared:
    """A slice of one axis. Local."""
    return p.linear(lambda part: part.narrow(axis, start, stop - start), x)
