"""What the range certificate holds a plan's calls to; decided with the plan, in short numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sfumato.graph.calibrate import Calibration
from sfumato.graph.handlers import HANDLERS, Options
from sfumato.graph.handlers.nonlinear_ranges import short_up
from sfumato.graph.places import Place, Placed
from sfumato.graph.program import Node, Ref

__all__ = ["SLACK", "Watch", "watch_calls"]

#: How far a result may pass the largest one that calibration saw, where only the ring's room matters.
SLACK = 8.0

Choices = Mapping[str, Mapping[str, Any]]


class Watch(NamedTuple):
    """What is looked at of a call: the value ``name``, or without a name a value inside it, which belongs into
    [lo, hi] and has ``frac`` fraction bits (-1: those of the value). ``ranged``: it was planned for that range; else
    the bound is a wide one on a result that has no range of its own. ``ring``: of a value inside a call."""

    name: str
    lo: float
    hi: float
    frac: int = -1
    ranged: bool = True
    ring: str = "Z64"


def watch_calls(
    placed: Placed, measured: Calibration, choices: Choices, options: Options
) -> dict[str, Watch]:
    """The watches of a plan: by call, and by ``call.part`` for values inside one."""
    found: dict[str, Watch] = {}
    for node in placed.program.nodes:
        if placed.places[node.name] is Place.SECRET and not HANDLERS[node.target].local:
            found |= _watches(placed, node, choices.get(node.name, {}), measured, options)
    return found


def _watches(
    placed: Placed, node: Node, choice: Mapping[str, Any], measured: Calibration, options: Options
) -> dict[str, Watch]:
    """The inner values and the argument that a call was planned for; of the others the result, within a wide bound.

    A linear call has no range of its own: its result may pass what calibration saw, as long as the ring has room and
    what consumes it is watched. Nothing of unmeasured calls.
    """
    place = int(choice.get("argument", 0))
    first = node.args[place] if place < len(node.args) else None
    found = {}
    if "inside" in choice and options.ring == "Z64":
        for part, (lo, hi, frac, *ring) in choice["inside"].items():
            found[f"{node.name}.{part}"] = Watch("", float(lo), float(hi), int(frac), True, *ring)
    if "range" in choice and isinstance(first, Ref) and placed.places[first.name] is not Place.PUBLIC:
        lo, hi = choice["range"]
        found[node.name] = Watch(first.name, lo, hi)
    if found:
        return found
    highest = measured.of(node).get("hi_out", 0.0)
    if highest <= 0.0:
        return {}
    bound = float(choice.get("sum", short_up(highest * SLACK)))
    return {node.name: Watch(node.name, -bound, bound, ranged=False)}
