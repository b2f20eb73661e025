"""What the range certificate holds a plan's calls to; decided with the plan, in short numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sfumato.graph.calibrate import Calibration
from sfumato.graph.handlers import HANDLERS, Options
from sfumato.graph.handlers.nonlinear_ranges import range_of, short_down, short_up
from sfumato.graph.places import Place, Placed
from sfumato.graph.program import Node, Ref

__all__ = ["SLACK", "Watch", "watch_calls"]

#: How far a result may pass the largest one that calibration saw, where only the ring's room matters.
SLACK = 8.0
#: Planned from the smallest value seen over the margin cubed: a margin must not cross zero.
_POSITIVE = frozenset(f"aten.{name}.default" for name in ("log", "sqrt", "rsqrt", "reciprocal"))


class Watch(NamedTuple):
    """What is looked at of one call: the value ``name``, which belongs into [lo, hi]."""

    name: str
    lo: float
    hi: float


def watch_calls(placed: Placed, measured: Calibration, options: Options) -> dict[str, Watch]:
    """The watches of a plan by call."""
    found = {}
    for node in placed.program.nodes:
        if placed.places[node.name] is Place.SECRET and not HANDLERS[node.target].local:
            watch = _watch(placed.places, node, measured.of(node), options)
            if watch is not None:
                found[node.name] = watch
    return found


def _watch(
    places: Mapping[str, Place], node: Node, stats: Mapping[str, Any], options: Options
) -> Watch | None:
    """The argument of a call that was planned for a range; of the others the result, within a wide bound.

    A linear call has no range of its own: its result may pass what calibration saw, as long as the ring has room and
    what consumes it is watched. None for unmeasured calls.
    """
    first = node.args[0] if node.args else None
    if "lo_in" in stats and isinstance(first, Ref) and places[first.name] is not Place.PUBLIC:
        lo, hi = range_of(node, stats, options)
        if node.target in _POSITIVE and stats["lo_in"] > 0:
            lo = max(lo, short_down(stats["lo_in"] / options.margin**3))
        return Watch(first.name, lo, hi)
    highest = stats.get("hi_out", 0.0)
    if highest <= 0.0:
        return None
    bound = short_up(highest * SLACK)
    return Watch(node.name, -bound, bound)
