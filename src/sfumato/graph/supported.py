"""What of a program cannot run on secrets, all of it at once, with what would help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sfumato.errors import CaptureError
from sfumato.graph.handlers import HANDLERS
from sfumato.graph.look_up import index_problems
from sfumato.graph.places import Place, Placed
from sfumato.graph.program import Node

__all__ = ["problems_of", "refuse"]


def problems_of(placed: Placed) -> list[str]:
    """Every secret call that cannot run, one line each, and results that would give the weights away."""
    found = []
    for node in placed.program.nodes:
        if placed.places[node.name] is not Place.SECRET:
            continue
        handler = HANDLERS.get(node.target)
        where = f"{node.target} at {node.module_path or 'the root'} ({node.name})"
        if handler is None:
            found.append(f"{where}: no protocol for it on a secret")
            continue
        reason = handler.supports(node, _flags(placed, node)) if handler.supports else None
        if reason:
            found.append(f"{where}: {reason}{_remedy(placed, node)}")
    secret = (n for n in placed.program.nodes if placed.places[n.name] is Place.SECRET)
    found += index_problems(secret, {n.name: n for n in placed.program.nodes})
    for name in placed.program.output_names:
        if placed.places[name] is Place.OWNER:
            found.append(
                f"the result {name} follows from secret weights alone; revealing it would give them away"
            )
    return found


def _remedy(placed: Placed, node: Node) -> str:
    """Which arguments would have to be public, where the secret part of a call is the client's own."""
    mine = [name for name in node.refs() if placed.places[name] is Place.CLIENT]
    if not mine:
        return ""
    origins = set(mine)
    for other in reversed(placed.program.nodes):
        if other.name in origins:
            origins.update(other.refs())
    arguments = [
        i.source
        for i in placed.program.user_inputs
        if i.name in origins and placed.places[i.name] is Place.CLIENT
    ]
    return f"; it would run with public={tuple(arguments)!r}"


def _flags(placed: Placed, node: Node) -> tuple[bool, ...]:
    def hidden(arg: Any) -> bool:
        if isinstance(arg, tuple) and hasattr(arg, "_fields"):
            return placed.places[arg[0]] is not Place.PUBLIC
        return any(hidden(a) for a in arg) if isinstance(arg, tuple) else False

    return tuple(hidden(a) for a in (*node.args, *node.kwargs.values()))


def refuse(title: str, problems: Sequence[str]) -> None:
    """
    Raises:
        CaptureError: there is a problem; lists them all.
    """
    if problems:
        raise CaptureError(
            f"{title} cannot run on secrets; {len(problems)} calls are not supported:", problems
        )
