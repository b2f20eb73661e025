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

__all__ = ["join_activations", "layer_of"]

#: Places of x, w and the bias among a layer's arguments, and whether w is (O, K).
_LAYERS = {"aten.linear.default": (0, 1, 2, True), "aten.addmm.default": (1, 2, 0, False)}

_RESHAPES = frozenset(("aten.reshape.default", "aten.view.default", "aten._unsafe_view.default"))

Choices = dict[str, Mapping[str, Any]]


def join_activations(
    placed: Placed, measured: Calibration, options: Options, formats: dict[str, Format], choices: Choices
) -> Placed:
    """The program with joined calls, whose choices and formats are put into ``choices`` and ``formats``."""
    program, places = placed.program, dict(placed.places)
    uses = Counter(name for node in program.nodes for name in node.refs())
    uses.update(program.output_names)
    made = {node.name: node for node in program.nodes}
    gone: set[str] = set()
    nodes: list[Node] = []
    for node in program.nodes:
        path = layer_of(node, made, uses)
        joined = (
            None if path is None else _joined(placed, path[-1], node, measured, options, formats, choices)
        )
        if path is None or joined is None:
            nodes.append(node)
            continue
        gone |= {other.name for other in path}
        if len(path) == 1:
            nodes.append(joined)
            continue
        # What was a reshape before the function comes after it, under the function's name.
        inner = replace(joined, name=f"{node.name}_layer", shape=path[-1].shape)
        choices[inner.name], places[inner.name] = choices.pop(node.name), Place.SECRET
        if node.name in formats:
            formats[inner.name] = formats[node.name]
        nodes += [
            inner,
            replace(path[0], name=node.name, args=(Ref(inner.name), node.shape), shape=node.shape),
        ]
    for name in gone:
        choices.pop(name, None)
        places.pop(name)
        formats.pop(name, None)
    kept = tuple(node for node in nodes if node.name not in gone)
    return Placed(replace(program, nodes=kept), places, placed.per_call - gone)


def layer_of(
    node: Node, made: Mapping[str, Node], uses: Mapping[str, int] | None = None
) -> list[Node] | None:
    """The calls from a function's argument back to the linear layer that it is of, if it is. With ``uses``: of which
    nobody else reads anything."""
    path: list[Node] = []
    while node.args and isinstance(node.args[0], Ref) and node.args[0].name in made:
        node = made[node.args[0].name]
        if uses is not None and uses[node.name] != 1:
            return None
        path.append(node)
        if node.target in _LAYERS:
            return path
        if node.target not in _RESHAPES:
            return None
    return None


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
    if isinstance(bias, Ref) and placed.program.types[bias.name][0] != layer.shape[-1:]:
        return None  # an addend of another shape
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
    # Samples have the product's ring.
    inside = [low, high, own.frac, *(("Z32",) if own.ring == "Z32" or "words" in mine else ())]
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
