"""A sampler as public coefficients: each step a sum of recent values, of which one may be clamped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["KINDS", "Clip", "Schedule", "Step", "Sum"]

#: What a sum may take: the samples that the steps were given, what they returned (the same, unless somebody changed
#: a sample in between), the model's outputs, and results of clamps.
KINDS = ("samples", "returned", "outputs", "clipped")


@dataclass(frozen=True, slots=True)
class Sum:
    """Coefficients by age (0: this step's) of each of :data:`KINDS`, and that of the step's own noise."""

    samples: Mapping[int, float] = field(default_factory=dict)
    returned: Mapping[int, float] = field(default_factory=dict)
    outputs: Mapping[int, float] = field(default_factory=dict)
    clipped: Mapping[int, float] = field(default_factory=dict)
    noise: float = 0.0

    def terms(self) -> Iterator[tuple[str, int, float]]:
        """(kind, age, coefficient) of everything but the noise."""
        for kind in KINDS:
            yield from ((kind, age, c) for age, c in getattr(self, kind).items())

    def of(self, held: Mapping[str, Mapping[int, Any]], k: int) -> Any:
        """The sum at step ``k`` of plain values, by kind and step; without noise."""
        return sum((c * held[kind][k - age] for kind, age, c in self.terms()), torch.zeros(()))

    def scaled(self, scales: Sequence[float], k: int, after: float) -> Sum:
        """``after`` times the sum at step ``k``, of samples that are kept as ``scales`` times what they were."""

        def moved(coefficients: Mapping[int, float]) -> dict[int, float]:
            return {age: c * after / scales[k - age] for age, c in coefficients.items()}

        return Sum(
            moved(self.samples),
            moved(self.returned),
            {age: c * after for age, c in self.outputs.items()},
            {age: c * after for age, c in self.clipped.items()},
            self.noise * after,
        )


@dataclass(frozen=True, slots=True)
class Clip:
    """A clamp of ``value`` to [low, high]."""

    value: Sum
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Step:
    """One step: the next sample is a sum, of which the result of one clamp may be part.

    The model sees ``input_scale`` times the sample. ``draws``: whether the scheduler draws noise here, even if its
    coefficient is zero.
    """

    timestep: float
    input_scale: float
    result: Sum
    draws: bool
    clip: Clip | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """All steps; the first sample is ``init_sigma`` times unit noise.

    ``noised``: before each step and after the last, the coefficients of picture and noise in a noised picture of that
    level, where the schedule was probed for pictures.
    """

    steps: tuple[Step, ...]
    init_sigma: float
    timesteps: tuple[Tensor, ...] = field(compare=False, repr=False)
    noised: tuple[tuple[float, float], ...] = ()

    @property
    def clip(self) -> tuple[float, float] | None:
        """The limits of the steps' clamps."""
        return next(((s.clip.low, s.clip.high) for s in self.steps if s.clip is not None), None)

    def in_input_scale(self) -> Schedule:
        """The same trajectory kept as what the model sees (c_k x_k), so that scaling the input costs nothing.

        Only the last sample is in the scheduler's own scale.
        """
        scales = [step.input_scale for step in self.steps] + [1.0]
        folded = []
        for k, step in enumerate(self.steps):
            clip = step.clip and replace(step.clip, value=step.clip.value.scaled(scales, k, 1.0))
            result = step.result.scaled(scales, k, scales[k + 1])
            folded.append(replace(step, input_scale=1.0, result=result, clip=clip))
        noised = tuple((a * s, b * s) for (a, b), s in zip(self.noised, scales, strict=False))
        return replace(self, steps=tuple(folded), init_sigma=self.init_sigma * scales[0], noised=noised)

    def keeps(self, k: int) -> dict[str, int]:
        """By kind, the step of the oldest value that is still used after step ``k``."""
        oldest = {**dict.fromkeys(KINDS, k + 2), "samples": k + 1}
        for i, step in list(enumerate(self.steps))[k + 1 :]:
            for part in (step.result, *([step.clip.value] if step.clip else [])):
                for kind, age, _ in part.terms():
                    oldest[kind] = min(oldest[kind], i - age)
        return oldest
