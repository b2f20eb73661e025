"""The denoising loop in the clear, of any denoiser: what a run under the protocol is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.correction import Correction
from sfumato.diffusion.schedule import KINDS, Schedule

__all__ = ["Network", "guided", "sample"]

#: Called at each step with the sample in the scheduler's own scale and the combined output.
Watch = Callable[[Tensor, Tensor], None]
#: (sample, timestep, text) -> outputs: the half without a prompt first where ``text`` has two halves.
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def guided(output: Tensor, weight: float) -> Tensor:
    """Both halves of an output, the one without a prompt first, combined with the prompt's weight."""
    without, towards = output.chunk(2)
    return without + weight * (towards - without)


def sample(
    network: Network,
    schedule: Schedule,
    latents: Tensor,
    text: Tensor,
    guidance: float | Sequence[float | None] | None,
    *,
    correction: Correction | None = None,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
    clips: list[Tensor] | None = None,
) -> Tensor:
    """Latents (images, channels, height, width) after all steps, in float64.

    ``latents``: the first ones, first sigma included. ``guidance``: the weight of the prompt, one for all steps or one
    for each; None where ``text`` has one half, and for a step without guidance, at which the network is given the
    prompt's half alone. ``clips`` is given the values that the scheduler clamps.

    Raises:
        JobError: the correction does not fit the run.
    """
    if correction is not None:
        correction.check(len(schedule.steps), latents.shape)
    folded, held = schedule.in_input_scale(), {kind: dict[int, Any]() for kind in KINDS}
    weights: Sequence[float | None]
    if guidance is None or isinstance(guidance, float | int):
        weights = [guidance] * len(schedule.steps)
    else:
        weights = guidance
    first = latents.to(torch.float64) * schedule.steps[0].input_scale
    held["samples"][0] = held["returned"][0] = first
    for k, step in enumerate(folded.steps):
        with torch.no_grad():
            single = guidance is not None and weights[k] is None
            given = text.chunk(2)[1] if single else text
            output = network(held["samples"][k].float(), folded.timesteps[k], given).to(torch.float64)
        weight = weights[k]
        towards = output if weight is None else output.chunk(2)[1]
        combined = output if weight is None else guided(output, weight)
        if correction is not None:
            combined = combined - correction.pulls[k] * towards + correction.additions[k]
        held["outputs"][k] = combined
        if watch is not None:
            watch(held["samples"][k] / schedule.steps[k].input_scale, combined)
        if step.clip is not None:
            value = step.clip.value.of(held, k)
            held["clipped"][k] = value.clamp(step.clip.low, step.clip.high)
            if clips is not None:
                clips.append(value)
        following = step.result.of(held, k)
        if step.draws:
            noise = torch.randn(first.shape, generator=generator, dtype=torch.float32)
            following = following + step.result.noise * noise
        held["samples"][k + 1] = held["returned"][k + 1] = following
    final: Tensor = held["samples"][len(folded.steps)]
    return final
