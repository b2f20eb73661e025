"""The denoising loop in the clear, of any denoiser: what a run under the protocol is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.correction import Correction
from sfumato.diffusion.schedule import KINDS, Schedule

__all__ = ["Network", "sample"]

#: Called at each step with the sample in the scheduler's own scale and the combined output.
Watch = Callable[[Tensor, Tensor], None]
#: (sample, timestep, text) -> outputs: the half without a prompt first where ``text`` has two halves.
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def sample(
    network: Network,
    schedule: Schedule,
    latents: Tensor,
    text: Tensor,
    guidance: float | Sequence[float] | None,
    *,
    correction: Correction | None = None,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Latents (images, channels, height, width) after all steps, in float64.

    ``latents``: the first ones, first sigma included. ``guidance``: the weight of the prompt, one for all steps or one
    for each; None where ``text`` has one half.

    Raises:
        JobError: the correction does not fit the run.
    """
    if correction is not None:
        correction.check(len(schedule.steps), latents.shape)
    folded, held = schedule.in_input_scale(), {kind: dict[int, Any]() for kind in KINDS}
    first = latents.to(torch.float64) * schedule.steps[0].input_scale
    held["samples"][0] = held["returned"][0] = first
    for k, step in enumerate(folded.steps):
        with torch.no_grad():
            output = network(held["samples"][k].float(), folded.timesteps[k], text).to(torch.float64)
        without, towards = (output, output) if guidance is None else output.chunk(2)
        weight = 1.0 if guidance is None else guidance if isinstance(guidance, float | int) else guidance[k]
        combined = without + weight * (towards - without)
        if correction is not None:
            combined = combined - correction.pulls[k] * towards + correction.additions[k]
        held["outputs"][k] = combined
        if watch is not None:
            watch(held["samples"][k] / schedule.steps[k].input_scale, combined)
        if step.clip is not None:
            held["clipped"][k] = step.clip.value.of(held, k).clamp(step.clip.low, step.clip.high)
        following = step.result.of(held, k)
        if step.draws:
            noise = torch.randn(first.shape, generator=generator, dtype=torch.float32)
            following = following + step.result.noise * noise
        held["samples"][k + 1] = held["returned"][k + 1] = following
    final: Tensor = held["samples"][len(folded.steps)]
    return final
