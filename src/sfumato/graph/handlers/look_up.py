"""Rows of a secret table by the client's row numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.errors import TypeMismatch
from sfumato.graph.handlers.kinds import Context, Handler, Options, Stats
from sfumato.graph.program import Node
from sfumato.session.session import Session
from sfumato.types import Ring, Shared, SharedIndex

__all__ = ["HANDLERS_LOOK_UP"]


async def _look_up(
    ctx: Context, s: Session, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Shared:
    """look_up(numbers, table): exact, the table's own words."""
    numbers, table = args
    if not (isinstance(numbers, SharedIndex) and isinstance(table, Shared)):
        raise TypeMismatch(
            f"{node.name} looks up secret row numbers in a secret table, and was given other values"
        )
    return await ctx.protocol.look_up(s, table, numbers)


def _choose(node: Node, stats: Stats, options: Options) -> dict[str, Any]:
    """The one method; its error is that of the table's encoding."""
    return {
        "method": "point function",
        "error": 2.0 ** -(options.frac + 1),
        "bits": 3 * Ring.named(options.ring).bits,
    }


HANDLERS_LOOK_UP: dict[str, Handler] = {"sfumato.look_up": Handler(_look_up, choose=_choose)}
