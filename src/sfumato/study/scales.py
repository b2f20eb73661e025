"""Scales that the engine does not have, by fake quantization: real ones, and one for each output channel of a weight.

A mixed plan is imitated in float64, call by call, with the engine's rounding: operands from outside to the nearest,
results of products, functions and norms to the floor, or the ceiling with the probability of the fraction; scores and
weights of attention as there. The insides of functions and norms are exact. With the plan's own scales this is the
engine's result up to those insides, which a test holds.

What a scale costs. Words have 32 bits whatever a step means, so bytes differ in the bits that a truncation drops alone,
one a result for each bit of a weight. A real step of a weight goes into its encoding. The step of the result,
step(x) step(w) 2^drop, is then real too: functions and the next product take it into public factors, a sum of two such
results needs the same step on both sides, which leaves a layer before a residual powers of two. Steps by output channel
differ by powers of two from a common one, or the result could not be summed over: rows then drop different numbers of
bits, side by side in the same round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import JobError
from sfumato.graph.evaluate import evaluate, resolve
from sfumato.graph.handlers import HANDLERS
from sfumato.graph.handlers.smooth import ACTIVATED
from sfumato.graph.places import Place
from sfumato.graph.plan import Plan, load_side
from sfumato.graph.program import Node, Ref, map_refs
from sfumato.graph.quantize import SCHEMES
from sfumato.ops.softmax import WEIGHT_FRAC
from sfumato.protocol import cost
from sfumato.study.precision import short_frac

__all__ = ["Imitation", "Weights", "channel_tops", "dropped", "finest_unit", "tensor_steps", "weight_steps"]

_SUMS = frozenset(("aten.add.Tensor", "aten.sub.Tensor"))
_ATTENTION = frozenset(("sfumato.masked_attention", "aten.scaled_dot_product_attention.default"))
_LINEAR = "aten.linear.default"
_WITH_SUM = "sfumato.linear_plus"  # and another product, of a residual, before the truncation
_WEIGHTED = frozenset((_LINEAR, _WITH_SUM, ACTIVATED))
#: Sums before truncation stay below 2^_ROOM, after a slack for runs beyond the calibration (graph/quantize.py).
_ROOM, _SLACK = 30, 2.0


@dataclass(frozen=True, slots=True)
class Weights:
    """How a weight in Z32 gets its step. ``bits``: whole numbers of so many bits with the sign, by the largest entry
    (None: as fine as the sums of its product leave, as our profiles do). ``frac``: this many fraction bits, as in
    [Ditto]. ``free``: any real step, not a power of two. ``rows``: one for each output channel."""

    label: str
    bits: int | None = None
    frac: int | None = None
    free: bool = False
    rows: bool = False


def _products(plan: Plan) -> Iterator[tuple[Node, str, str]]:
    """Linear layers in Z32 whose weight (O, K) is the owner's, alone or with their activation: the call, its input, its
    weight."""
    for node in plan.secret_nodes:
        if node.target in _WEIGHTED and node.kwargs.get("turned", True):
            x, w = node.args[0].name, node.args[1].name
            if plan.places[w] is Place.OWNER and plan.format_of(w).ring == "Z32":
                yield node, x, w


def channel_tops(plan: Plan, calls: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """By weight: the largest |sum| of its linear layer by output channel (O,), in float, over ``calls`` (keyword
    arguments): those that the plan's ranges come from."""
    wanted = {node.name: w for node, _, w in _products(plan)}
    tops: dict[str, Tensor] = {}

    def look(node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> None:
        if node.name in wanted:
            sums = F.linear(*args[:3]) if node.target == ACTIVATED else out
            top = sums.abs().reshape(-1, sums.shape[-1]).amax(0).to(torch.float64)
            w = wanted[node.name]
            tops[w] = torch.maximum(tops[w], top) if w in tops else top

    program = plan.program
    for call in calls:
        evaluate(program.nodes, {**program.weights, **program.bind((), call)}, program.output_names, look)
    return tops


def weight_steps(
    plan: Plan, tops: Mapping[str, Tensor], how: Weights, steps: Mapping[str, float]
) -> dict[str, Tensor]:
    """By call: the step of its weight, () or (O, 1). ``tops``: of :func:`channel_tops`; ``steps``: of results.

    Raises:
        JobError: the plan has no linear layer in Z32 with secret weights.
    """
    owned, found = load_side(plan).secrets, dict[str, Tensor]()
    for node, x, w in _products(plan):
        weight, top, step = owned[w].to(torch.float64), tops[w], steps[x]
        largest = weight.abs().amax(1) if how.rows else weight.abs().amax()
        top = top if how.rows else top.amax()
        if how.frac is not None:
            needed = torch.full_like(largest, 2.0**-how.frac)
        elif how.bits is not None:
            needed = (largest / (2 ** (how.bits - 1) - 1)).clamp_min(2.0**-_ROOM)
        else:  # as fine as the sums leave, but no finer than the plan's own steps may be
            limit = SCHEMES[plan.options.profile].weights
            needed = (_SLACK * top * 2.0**-_ROOM / step).clamp_min(2.0**-limit)
        if not how.free:
            needed = 2.0 ** needed.log2().ceil()
        found[node.name] = needed.reshape(-1, 1) if how.rows else needed
    if not found:
        raise JobError(
            "no linear layer of this plan has secret weights in Z32; use ring='mixed' and secret='inputs+weights'"
        )
    return found


def dropped(plan: Plan, steps: Mapping[str, Tensor]) -> float:
    """Bytes of all parties that a call sends for the bits which linear layers in Z32 drop, given weights' steps. With
    its activation a layer drops none."""
    size = {node.name: math.prod(node.shape) for node, *_ in _products(plan) if node.target != ACTIVATED}
    return sum(count * float((-steps[name].log2()).round().mean()) / 8 for name, count in size.items())


def finest_unit(plan: Plan) -> float:
    """The step of activations in Z32, over the plan's, with which the squares of every norm there still fit."""
    sizes = [
        plan.calibration.of(n)["hi_deviation"] * plan.options.margin
        for n in plan.secret_nodes
        if "norm" in n.target and plan.format_of(n.name).ring == "Z32"
    ]
    return min(1.0, 2.0 ** (short_frac(plan) - _square_bits(max(sizes)))) if sizes else 1.0


def _square_bits(size: float) -> float:
    """Fraction bits, not whole ones, with which squares of values up to ``size`` take a quarter of what Z32 holds."""
    return 14.0 - math.log2(size)


def _product_bits(size: float) -> float:
    """Fraction bits, not whole ones, that two operands have together if the sums of their product reach ``size``."""
    return _ROOM - math.log2(_SLACK * size)


def tensor_steps(plan: Plan) -> tuple[dict[str, float], float]:
    """A step for each result in Z32 by its own range, powers of two, and the bytes that the casts take.

    As fine as the norm, the scores or the sums leave that read it (in a product with weights the fraction bits are
    divided so that both operands lose as much), 14 bits at most. A product that a residual alone reads gets the sum's
    step for nothing; whatever else is finer than a sum needs a truncation, which the engine does not have there.
    """
    nodes = {n.name: n for n in plan.secret_nodes}
    short = [n for n in nodes.values() if plan.format_of(n.name).ring == "Z32"]
    readers: dict[str, list[tuple[Node, int]]] = {}
    for node in nodes.values():
        for place, arg in enumerate(node.args):
            if isinstance(arg, Ref):
                readers.setdefault(arg.name, []).append((node, place))
    fracs: dict[str, int] = {}

    def limit(name: str) -> list[int]:
        found = []
        for reader, place in readers.get(name, []):
            if HANDLERS[reader.target].local and reader.target not in _SUMS:
                found += limit(reader.name)
            else:
                found += _limit(plan, reader, place)
        return found

    for node in reversed(short):
        read = [reader for reader, _ in readers.get(node.name, [])]
        alone = len(read) == 1 and read[0].target in _SUMS and read[0].name in fracs
        fracs[node.name] = fracs[read[0].name] if alone else max(1, min([14, *limit(node.name)]))
    extra = 0.0
    for node in short:
        for name in _addends(node):
            if fracs.get(name, 0) > fracs[node.name]:
                drop = fracs[name] - fracs[node.name]
                extra += math.prod(node.shape) * cost.bits("truncate", k=32, f=drop) / 8
    return {name: 2.0**-frac for name, frac in fracs.items()}, extra


def _addends(node: Node) -> list[str]:
    """Values that a call adds as they are, so that they need its result's step."""
    return [arg.name for arg in node.args if isinstance(arg, Ref)] if node.target in _SUMS else []


def _limit(plan: Plan, reader: Node, place: int) -> list[int]:
    """The most fraction bits that a call in Z32 leaves its argument."""
    stats = plan.calibration.of(reader)
    if plan.format_of(reader.name).ring != "Z32":
        return []
    if "norm" in reader.target and place == 0:
        return [math.floor(_square_bits(stats["hi_deviation"] * plan.options.margin))]
    if reader.target in _WEIGHTED and place == 0:
        joined = reader.target == ACTIVATED
        largest = max(abs(stats["lo_in"]), abs(stats["hi_in"])) if joined else stats["hi_out"]
        return [math.floor((_product_bits(largest) + _balance(plan, reader)) / 2)]
    if reader.target in _ATTENTION and place < 2:
        scores = max(abs(stats["lo_score"]), abs(stats["hi_score"])) / _factor(plan, reader)
        return [math.floor(_product_bits(scores) / 2)]
    if reader.target in _ATTENTION:
        return [math.floor(_product_bits(stats["hi_value"])) - WEIGHT_FRAC]
    if reader.target == "sfumato.quad":
        largest = max(abs(stats["lo_in"]), abs(stats["hi_in"])) * plan.options.margin + 1.0
        return [math.floor(_ROOM / 2 - math.log2(largest))]
    return []


def _balance(plan: Plan, layer: Node) -> float:
    """Log2 of a weight's size over its input's; where those were not measured, the latter is that of a norm's results,
    1."""
    stats = plan.calibration.of(layer)
    size = stats.get("hi_left_scale", plan.calibration.stats.get(layer.args[0].name, {}).get("hi_scale", 1.0))
    weight = stats.get("hi_right_scale", 0.0)
    if not weight:
        w = load_side(plan).secrets[layer.args[1].name].to(torch.float64)
        weight = float(w.square().mean().sqrt())
    return math.log2(weight / size)


def _factor(plan: Plan, node: Node) -> float:
    scale = node.kwargs.get("scale")
    return float(scale) if scale is not None else plan.program.types[node.args[0].name][0][-1] ** -0.5


class Imitation:
    """A plan in float64 with other scales than its own.

    ``unit``: the step of activations in Z32 over the plan's; ``own``: steps of single results, by call.
    """

    def __init__(self, plan: Plan, *, unit: float = 1.0, own: Mapping[str, float] | None = None) -> None:
        self.plan, self.own = plan, dict(own or {})
        self.secret = {n.name for n in plan.secret_nodes}
        self.frontier = set(plan.frontier)
        self.steps: dict[str, float] = {}
        for name in plan.frontier:
            held = plan.secret_type(name)
            self.steps[name] = 2.0**-held.frac * (unit if held.ring.bits == 32 and held.frac else 1.0)
        for node in plan.secret_nodes:
            ring, frac = plan.format_of(node.name)
            known = [self.steps[name] for name in node.refs() if name in self.steps]
            if node.name in self.own:
                self.steps[node.name] = self.own[node.name]
            elif self._moves(node) and known:
                self.steps[node.name] = known[0]
            else:
                self.steps[node.name] = 2.0**-frac * (unit if ring == "Z32" else 1.0)

    @staticmethod
    def _moves(node: Node) -> bool:
        return HANDLERS[node.target].local and node.target not in _SUMS | {"sfumato.shorten"}

    def __call__(self, call: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        """The first result of the program for keyword arguments. ``weights``: of :func:`weight_steps`; a layer that is
        not among them keeps the plan's step."""
        program, generator = self.plan.program, torch.Generator().manual_seed(0)
        values: dict[str, Any] = {**program.weights, **program.bind((), call)}
        for node in program.nodes:
            inside = node.name in self.secret

            def value(name: str, node: Node = node, inside: bool = inside) -> Any:
                found = values[name]
                if not (isinstance(found, Tensor) and found.is_floating_point()):
                    return found
                found = found.to(torch.float64)
                if not inside or name not in self.frontier:
                    return found
                held = len(node.args) > 1 and node.args[1] == Ref(name)
                step = weights.get(node.name) if held else None
                return _nearest(found, self.steps[name] if step is None else step)

            args = map_refs(node.args, value)
            kwargs = {key: map_refs(arg, value) for key, arg in node.kwargs.items()}
            values[node.name] = (
                self._run(node, args, kwargs, generator) if inside else _real(node, args, kwargs)
            )
        found: Tensor = values[program.output_names[0]]
        return found

    def _run(
        self, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        step = self.steps[node.name]
        if node.target == "sfumato.shorten":
            return _nearest(args[0], step)
        finer = {name for name in _addends(node) if self.steps.get(name, step) < step * (1 - 1e-9)}
        args = tuple(
            _cut(arg, step, generator) if isinstance(ref, Ref) and ref.name in finer else arg
            for ref, arg in zip(node.args, args, strict=True)
        )
        if node.target in _SUMS:
            return _real(node, args, kwargs)
        if self._moves(node) or node.target == "sfumato.widen":
            return _real(node, args, kwargs)
        if (
            node.target in _ATTENTION
            and not {"attn_mask", "is_causal"} & set(kwargs)
            and self.plan.format_of(node.name).ring == "Z32"
        ):
            q, k, v, *mask = args[:4]
            scores = _cut(torch.matmul(q, k.mT) * _factor(self.plan, node), step, generator)
            inside = (scores.masked_fill(mask[0] < 0.5, -math.inf) if mask else scores).softmax(-1)
            return _cut(torch.matmul(_cut(inside, 2.0**-WEIGHT_FRAC, generator), v), step, generator)
        return _cut(_real(node, args, kwargs), step, generator)


def _real(node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    wide = [list(arg) if isinstance(arg, tuple) else arg for arg in args]
    found: Tensor = resolve(node.target)(*wide, **kwargs)
    return found.to(torch.float64) if found.is_floating_point() else found


def _nearest(x: Tensor, step: float | Tensor) -> Tensor:
    """Rounded to the nearest multiple, as an encoding is."""
    return (x / step).round() * step


def _cut(x: Tensor, step: float, generator: torch.Generator) -> Tensor:
    """Floor, or ceiling with the probability of the fraction, as a truncation is."""
    return (x / step + torch.rand(x.shape, generator=generator, dtype=torch.float64)).floor() * step
