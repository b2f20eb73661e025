"""The last pass of a plan: a linear layer that only an activation reads becomes one call with it.

The product is opened as the function's argument without being closed, where its words tell enough bits of it
(:mod:`sfumato.ops.opened`). Formats and methods of both calls are decided before; this joins what they allow, and
leaves the rest as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfumato.errors import CaptureError
from sfumato.graph.calibrate import Calibration
from sfumato.graph.formats import Format, Formats, options_at
from sfumato.graph.handlers import Options
from sfumato.graph.handlers.nonlinear_ranges import is_short
from sfumato.graph.handlers.smooth import ACTIVATED, choose_smooth, smooth_name, smooth_tolerance
from sfumato.graph.places import Place, Placed
from sfumato.graph.program import Node, Ref
from sfumato.ops.basic import GAIN_FRAC
from sfumato.ops.opened import known_bits
from sfumato.protocol import cost
from sfumato.types import Ring

__all__ = ["join_activations"]

#: Places of x, w and the bias among a layer's arguments, and whether w is (O, K).
_LAYERS = {"aten.linear.default": (0, 1, 2, True), "aten.addmm.default": (1, 2, 0, False)}

Choices = dict[str, Mapping[str, Any]]


def join_activations(
    placed: Placed, measured: Calibration, options: Options, formats: Formats, choices: Choices
) -> Placed:
    """The program with joined calls, whose choices are put into ``choices``."""
    program = placed.program
    uses = Counter(name for node in program.nodes for name in node.refs())
    uses.update(program.outputs)
    made = {node.name: node for node in program.nodes}
    gone: set[str] = set()
    nodes = []
    for node in program.nodes:
        layer = made.get(node.args[0].name) if node.args and isinstance(node.args[0], Ref) else None
        if layer is not None and layer.target in _LAYERS and uses[layer.name] == 1:
            joined = _joined(placed, layer, node, measured, options, formats, choices)
            if joined is not None:
                gone.add(layer.name)
                node = joined
        nodes.append(node)
    for name in gone:
        choices.pop(name, None)
    kept = tuple(node for node in nodes if node.name not in gone)
    places = {name: where for name, where in placed.places.items() if name not in gone}
    return Placed(replace(program, nodes=kept), places, placed.per_call - gone)


def _joined(
    placed: Placed,
    layer: Node,
    node: Node,
    measured: Calibration,
    options: Options,
    formats: Formats,
    choices: Choices,
) -> Node | None:
    """The call that stands for both, or None where they stay two."""
    name, places = smooth_name(node), placed.places
    first, second, third, turned = _LAYERS[layer.target]
    x, w = layer.args[first], layer.args[second]
    bias = layer.args[third] if third < len(layer.args) else None
    if name is None or not (isinstance(x, Ref) and isinstance(w, Ref)) or layer.kwargs:
        return None
    old, mine = choices.get(node.name, {}), choices.get(layer.name, {})
    common = Format(options.ring, options.frac)
    own = formats.get(node.name, common)
    if (
        places[node.name] is not Place.SECRET or places[layer.name] is not Place.SECRET
        or places[x.name] is Place.PUBLIC or old.get("method") != "series" or "entry" in old or "entry" in mine
        or formats.get(layer.name, common) != own
    ):  # fmt: skip
        return None
    at = options_at(options, own)
    if own.ring == "Z32" and not is_short(at):
        return None
    known = _known(placed, x, w, mine, formats, common, own)
    try:
        choice = choose_smooth(name, node, measured.of(node), at, known=known) if known else {}
    except CaptureError:
        return None
    bits = Ring.named(own.ring).bits
    accepted = max(smooth_tolerance(measured.of(node), at) + 2.0**-own.frac, 1.25 * float(old["error"]))
    if (
        choice.get("method") != "series" or choice["error"] > accepted
        or choice["bits"] + choice["plan"]["series"]["period_log2"] + own.frac
        > old["bits"] + cost.bits("truncate", k=bits, f=bits - known)
    ):  # fmt: skip
        return None
    low, high = choice.pop("range")
    inside = [low, high, own.frac, *(("Z32",) if own.ring == "Z32" else ())]
    choices[node.name] = {
        **choice, "inside": {"argument": inside}, "scales": mine.get("scales", [None, None]),
        **({"words": mine["words"]} if "words" in mine else {}),
    }  # fmt: skip
    return replace(node, target=ACTIVATED, args=(x, w, bias), kwargs={"function": name, "turned": turned})


def _known(
    placed: Placed, x: Ref, w: Ref, choice: Mapping[str, Any], formats: Formats, common: Format, own: Format
) -> int:
    """Bits that the layer's product tells of its result."""
    out, public = choice.get("scales", (None, None))
    left = formats.get(x.name, common).frac
    if left == 0 or (out is not None and out != own.frac):
        return 0  # whole numbers have exact products of their own
    bits = Ring.named(own.ring).bits
    if "words" in choice:
        bits, (left, right) = 32, choice["words"]
    elif placed.places[w.name] is not Place.PUBLIC:
        right = formats.get(w.name, common).frac
    else:
        right = min(GAIN_FRAC, bits - 8 - left) if public is None else public
    return known_bits(bits, left, right, own.frac) if right else 0
