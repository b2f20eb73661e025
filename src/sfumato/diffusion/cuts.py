"""Cost cuts that keep the image: steps without guidance, a public first step, features used again.

All of it is decided by public numbers before a run (docs/corrections.md, "Cost cuts").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Denoiser
from sfumato.errors import JobError

__all__ = ["CutNetwork", "Way", "check_cuts", "known_halves", "of_plan", "ways"]


class Way(NamedTuple):
    """How one step runs the network.

    ``single``: without the unconditional half; ``known``: that half is a public value, so the step is guided all the
    same. ``keeps``: the features are left at the parties, for the next step that is ``partial``, of which the outer
    blocks alone run.
    """

    single: bool = False
    known: bool = False
    keeps: bool = False
    partial: bool = False

    @property
    def plan(self) -> str:
        """The name of the plan that it needs."""
        return "unet" + "-single" * self.single + "-partial" * self.partial


def ways(steps: int, *, guided: bool, unguided: int = 0, known: bool = False, reuse: int = 1) -> list[Way]:
    """One way for each step: the last ``unguided`` run without guidance, and at the first the unconditional half is
    ``known``; every ``reuse``-th step runs in full (DeepCache, Ma et al. 2024, section 3.2, with N = ``reuse``).

    A step with both halves needs features of both, so a full step comes first where the last had one.
    """
    found: list[Way] = []
    full = -reuse  # the last full step
    for k in range(steps):
        first = known and guided and k == 0
        single = first or (guided and k >= steps - unguided)
        partial = full >= 0 and k - full < reuse and (single or not found[full].single)
        full = full if partial else k
        found.append(Way(single, first, reuse > 1 and not partial, partial))
    return found


def check_cuts(request: Any) -> None:
    """Refuse numbers that are none, and a public noise that would not be one.

    Raises:
        JobError: one sentence.
    """
    for name, least in (("unguided_steps", 0), ("reuse_features", 1)):
        value = getattr(request, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise JobError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if not isinstance(request.public_noise, bool):
        raise JobError(f"public_noise must be True or False, not {request.public_noise!r}")
    if request.guidance_rescale and (request.unguided_steps or request.public_noise):
        cut = "unguided_steps" if request.unguided_steps else "public_noise"
        raise JobError(f"{cut} and guidance_rescale cannot be used together; leave one out")
    if not request.public_noise:
        return
    if request.latents is not None:
        raise JobError("public_noise would make your latents public; leave one of the two out")
    negative = request.negative_prompt
    texts = negative if isinstance(negative, list) else [negative or ""]
    if request.negative_prompt_embeds is not None or any(texts):
        raise JobError(
            "public_noise would make the negative prompt's output public; leave one of the two out"
        )


def known_halves(prepared: Any, shapes: bool = False) -> dict[int, Tensor]:
    """By step, the exact network's output without a prompt where that is public: in float64, computed in the clear by
    whoever has the weights. ``shapes``: zeros in its place."""
    steps = [k for k, way in enumerate(prepared.ways) if way.known]
    if not steps or shapes:
        return {k: torch.zeros(prepared.latents.shape, dtype=torch.float64) for k in steps}
    schedule = prepared.schedule
    sample = prepared.latents.float() * schedule.steps[0].input_scale  # the first step is the only one
    with torch.no_grad():
        denoiser = Denoiser(prepared.pipe.unet, guided=False).eval()
        time = schedule.timesteps[0].to(torch.float32)
        output: Tensor = denoiser(sample, time, prepared.embeds.chunk(2)[0])
    return {steps[0]: output.to(torch.float64)}


class CutNetwork:
    """``unet`` in the clear, each step its way: the network of one run of `sampling.sample`, whose guidance is None at
    the steps that are single and not known."""

    def __init__(self, unet: Any, steps: Sequence[Way]) -> None:
        self._unet, self._left = unet, list(steps)
        self._features: Tensor | None = None

    def __call__(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        way, time = self._left.pop(0), timestep.to(torch.float32)
        without, towards = text.chunk(2) if way.known else (None, text)
        denoiser = self._denoiser(towards.shape[0] > sample.shape[0], way.keeps)
        if way.partial:
            assert self._features is not None
            output = denoiser(sample, time, towards, features=self._features[-towards.shape[0] :])
        else:
            output = denoiser(sample, time, towards)
        if way.keeps:
            output, self._features = output
        if without is not None:
            output = torch.cat([self._denoiser(False)(sample, time, without), output])
        found: Tensor = output
        return found

    def _denoiser(self, guided: bool, keeps: bool = False) -> Denoiser:
        return Denoiser(self._unet, guided=guided, keeps=keeps).eval()


def of_plan(samples: Sequence[Sequence[Any]], way: Way) -> list[list[Any]]:
    """Arguments of the network of both halves as those of a plan with one: the prompt's half of text and features."""

    def halved(kwargs: dict[str, Any]) -> dict[str, Any]:
        halves = ("encoder_hidden_states", "features")
        return {n: v.chunk(2)[1] if n in halves else v for n, v in kwargs.items()}

    if not way.single:
        return [list(run) for run in samples]
    return [[(args, halved(kwargs)) for args, kwargs in run] for run in samples]
