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
from sfumato.graph.handlers import HANDLERS
from sfumato.graph.places import Place, Placed
from sfumato.graph.program import Node

__all__ = ["Calibration", "calibrate"]


@dataclass(frozen=True)
class Calibration:
    """Statistics by node name. Keys that start with ``lo_`` merge by minimum, with ``hi_`` by maximum."""

    stats: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: int = 0

    def merge(self, other: Calibration) -> Calibration:
        """What both saw together."""
        names = dict.fromkeys([*self.stats, *other.stats])
        merged = {n: _merge(self.stats.get(n, {}), other.stats.get(n, {})) for n in names}
        return Calibration(merged, self.samples + other.samples)

    def of(self, node: Node) -> Mapping[str, float]:
        return self.stats.get(node.name, {})

    def to_json(self) -> dict[str, Any]:
        return {"samples": self.samples, "stats": {n: dict(s) for n, s in self.stats.items()}}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Calibration:
        """Read what `to_json` wrote.

        Raises:
            CaptureError: something else was given.
        """
        try:
            stats = {str(n): {str(k): float(v) for k, v in s.items()} for n, s in data["stats"].items()}
            return Calibration(stats, int(data["samples"]))
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

        def visit(
            node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor,
            stats: dict[str, dict[str, float]] = stats,
        ) -> None:  # fmt: skip
            if node.name not in secret:
                return
            handler = HANDLERS.get(node.target)
            found = handler.measure(args, kwargs, out) if handler and handler.measure else {}
            stats[node.name] = {**found, "hi_out": _largest(node, out)}

        evaluate(program.nodes, {**program.weights, **sample}, program.output_names, visit)
        total = total.merge(Calibration(stats, 1))
    return total


def _largest(node: Node, out: Any) -> float:
    if not isinstance(out, Tensor) or out.numel() == 0:
        return 0.0
    top = float(out.abs().max()) if out.is_floating_point() else float(out.to(torch.float64).abs().max())
    if not math.isfinite(top):
        raise CaptureError(
            f"{node.target} at {node.module_path or 'the root'} is not finite on a sample input"
        )
    return top
