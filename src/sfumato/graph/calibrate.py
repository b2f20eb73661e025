"""Calibration: what the secret calls of a program see on sample inputs, as a few numbers per call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import CaptureError
from sfumato.graph.evaluate import evaluate
from sfumato.graph.handlers import HANDLERS, Stats
from sfumato.graph.places import Place, Placed
from sfumato.graph.program import Node, Ref
from sfumato.graph.tails import Sketch

__all__ = ["Calibration", "calibrate"]

Sketches = Mapping[str, Mapping[str, Sketch]]


@dataclass(frozen=True)
class Calibration:
    """Numbers and sketches by node name. Number keys that start with ``lo_`` merge by minimum, with ``hi_`` by maximum;
    sketches add their counts. Merging is exact, so the order of runs does not matter."""

    stats: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: int = 0
    sketches: Sketches = field(default_factory=dict)

    def merge(self, other: Calibration) -> Calibration:
        """What both saw together."""
        names = dict.fromkeys([*self.stats, *other.stats])
        stats = {n: _merge(self.stats.get(n, {}), other.stats.get(n, {})) for n in names}
        names = dict.fromkeys([*self.sketches, *other.sketches])
        sketches = {n: _joined(self.sketches.get(n, {}), other.sketches.get(n, {})) for n in names}
        return Calibration(stats, self.samples + other.samples, sketches)

    def completed(self, other: Calibration) -> Calibration:
        """This, and of calls that it does not know what ``other`` saw of them."""
        return Calibration({**other.stats, **self.stats}, self.samples, {**other.sketches, **self.sketches})

    def as_one_run(self) -> Calibration:
        """The same, as seen in one run: calls that belong together, such as the steps of a trajectory."""
        sketches = {
            n: {
                k: sketch.as_one_run(self.stats[n][f"lo_{k}"], self.stats[n][f"hi_{k}"])
                for k, sketch in s.items()
            }
            for n, s in self.sketches.items()
        }
        return Calibration(self.stats, 1, sketches)

    def of(self, node: Node) -> Stats:
        return Stats(self.stats.get(node.name, {}), self.sketches.get(node.name, {}))

    def to_json(self) -> dict[str, Any]:
        sketches = {n: {k: sketch.to_json() for k, sketch in s.items()} for n, s in self.sketches.items()}
        return {
            "samples": self.samples,
            "stats": {n: dict(s) for n, s in self.stats.items()},
            "sketches": sketches,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Calibration:
        """Read what `to_json` wrote; ranges without sketches, too.

        Raises:
            CaptureError: something else was given.
        """
        try:
            stats = {str(n): {str(k): float(v) for k, v in s.items()} for n, s in data["stats"].items()}
            sketches = {
                str(n): {str(k): Sketch.from_json(v) for k, v in s.items()}
                for n, s in data.get("sketches", {}).items()
            }
            return Calibration(stats, int(data["samples"]), sketches)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CaptureError("this is not the JSON of a calibration") from error


def _merge(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    merged = dict(a)
    for key, value in b.items():
        if key not in merged:
            merged[key] = value
        else:
            merged[key] = min(merged[key], value) if key.startswith("lo_") else max(merged[key], value)
    return merged


def _joined(a: Mapping[str, Sketch], b: Mapping[str, Sketch]) -> dict[str, Sketch]:
    return {**a, **{key: a[key].merge(sketch) if key in a else sketch for key, sketch in b.items()}}


def calibrate(placed: Placed, samples: Iterable[Mapping[str, Tensor]]) -> Calibration:
    """Run the program in float32 on each sample (tensors by input name) and measure its secret calls.

    Raises:
        CaptureError: a value is not finite; names the call.
    """
    total = Calibration()
    secret = {n for n, where in placed.places.items() if where is Place.SECRET}
    program = placed.program
    for sample in samples:
        stats: dict[str, dict[str, float]] = {}
        sketches: dict[str, dict[str, Sketch]] = {}

        def visit(
            node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor,
            stats: dict[str, dict[str, float]] = stats, sketches: dict[str, dict[str, Sketch]] = sketches,
        ) -> None:  # fmt: skip
            if node.name not in secret:
                return
            numbers = stats[node.name] = _sizes(node, out)
            numbers |= _of_weights(placed, node, args)
            handler = HANDLERS.get(node.target)
            found = handler.measure(args, kwargs, out) if handler and handler.measure else {}
            for key, value in found.items():
                if not isinstance(value, Tensor):
                    numbers[key] = value
                elif value.numel() > 0:
                    low, high = float(value.min()), float(value.max())
                    if not (math.isfinite(low) and math.isfinite(high)):
                        raise _not_finite(node)
                    numbers |= {f"lo_{key}": low, f"hi_{key}": high}
                    sketches.setdefault(node.name, {})[key] = Sketch.of(value)

        evaluate(program.nodes, {**program.weights, **sample}, program.output_names, visit)
        total = total.merge(Calibration(stats, 1, sketches))
    return total


def _sizes(node: Node, out: Any) -> dict[str, float]:
    """The largest result, and the root of the mean square of the results of one run."""
    if not isinstance(out, Tensor) or out.numel() == 0:
        return {"hi_out": 0.0}
    real = out if out.is_floating_point() else out.to(torch.float64)
    top = float(real.abs().max())
    if not math.isfinite(top):
        raise _not_finite(node)
    scale = _scale(real)
    return {"hi_out": top, "lo_scale": scale, "hi_scale": scale}


def _not_finite(node: Node) -> CaptureError:
    return CaptureError(f"{node.target} at {node.module_path or 'the root'} is not finite on a sample input")


def _of_weights(placed: Placed, node: Node, args: tuple[Any, ...]) -> dict[str, float]:
    """Largest entry and scale of the first matrix or kernel of a call, where that is a weight."""
    for given, value in zip(node.args, args, strict=False):
        if isinstance(given, Ref) and isinstance(value, Tensor) and value.dim() > 1:
            known = placed.places[given.name] in (Place.PUBLIC, Place.OWNER)
            if known and given.name not in placed.per_call and value.is_floating_point():
                return {"hi_weight": float(value.abs().max()), "hi_weight_scale": _scale(value)}
    return {}


def _scale(x: Tensor) -> float:
    """The root of the mean square, to eight bits: no thread's order of summing shows in a plan."""
    mantissa, exponent = math.frexp(float(x.square().mean(dtype=torch.float64).sqrt()))
    return math.ldexp(round(mantissa * 256), exponent - 8)
