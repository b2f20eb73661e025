"""Tiles: one operation split into pieces whose roles rotate, so that the three parties compute and send alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sfumato.protocol.base import Protocol
from sfumato.session.session import Branch, Session
from sfumato.types import Shared

__all__ = [
    "DEFAULT_TILES",
    "Tiles",
    "bounds_of_tiles",
    "ceil_log2",
    "concatenate",
    "elementwise",
    "in_thirds",
    "in_turns",
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
    ends = [(low + a, low + b) for low, high in _bounds(count, groups) for a, b in _bounds(high - low, 3)]
    done = await in_thirds(s, step, [[_cut(p, x, *cut) for x in flat] for cut in ends])
    whole = concatenate(p, done, -1)
    return p.linear(lambda part: part.reshape(*whole.shape[:-1], *shape), whole)


async def in_thirds(s: Session, step: Step, pieces: Sequence[Sequence[Shared]]) -> list[Shared]:
    """Run ``step(session, *piece)`` for each piece, as :func:`in_turns` does."""

    def branch(piece: Sequence[Shared]) -> Branch:
        return lambda child: step(child, *piece)

    return await in_turns(s, [branch(piece) for piece in pieces])


async def in_turns(s: Session, pieces: Sequence[Branch]) -> list[Shared]:
    """Three pieces at a time share rounds, each with its roles rotated by one more turn."""

    def turned(turn: int, piece: Branch) -> Branch:
        return lambda child: piece(child.fork("turn", turn=child.turn + turn))

    done: list[Shared] = []
    for g in range(0, len(pieces), 3):
        session = s.fork(f"tiles{g // 3}") if len(pieces) > 3 else s
        done += await session.gather(*(turned(i, piece) for i, piece in enumerate(pieces[g : g + 3])))
    return done


def bounds_of_tiles(length: int, numel: int, tiles: Tiles = DEFAULT_TILES) -> list[tuple[int, int]]:
    """Pieces of an axis of ``length``, of a result of ``numel`` elements: one, or a multiple of three small enough."""
    if numel < tiles.smallest or length < 3:
        return [(0, length)]
    return _bounds(length, min(3 * -(-numel // (3 * tiles.elements)), length - length % 3))


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
