"""Callbacks at the end of a step: what they are given, and what they may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.loop import Denoising
from sfumato.diffusion.request import Prepared
from sfumato.errors import JobError

__all__ = ["Steering"]


@dataclass(slots=True)
class Steering:
    """Calls the caller's callback in one run, with ``pipe`` (what the caller sees as the pipeline) and the tensors that
    it asks for. ``silent``: open what would be opened, and call nothing (an estimate)."""

    pipe: Any
    prepared: Prepared
    denoising: Denoising
    silent: bool = False

    def observe(self, k: int, latents: Callable[[], Tensor]) -> Tensor | None:
        """New latents, if the callback returns any.

        Raises:
            JobError: it returns something that it did not ask for, or that cannot be changed in a run.
        """
        request = self.prepared.request
        asked = {
            name: latents().to(torch.float32) if name == "latents" else self._embeds(name)
            for name in request.callback_on_step_end_tensor_inputs
        }
        if request.callback_on_step_end is None or self.silent:
            return None
        timestep = self.prepared.schedule.timesteps[k]
        returned = request.callback_on_step_end(self.pipe, k, timestep, dict(asked)) or {}
        wrong = sorted(set(returned) - set(asked))
        if wrong:
            raise JobError(
                f"a callback returned {wrong[0]!r}, which callback_on_step_end_tensor_inputs does not name"
            )
        self._weigh(self.pipe.guidance_scale)
        if returned.get("prompt_embeds") is not asked.get("prompt_embeds"):
            self._replace(returned["prompt_embeds"])
        changed = returned.get("latents")
        return None if changed is asked.get("latents") else changed

    def _embeds(self, name: str) -> Any:
        """As diffusers has them in its loop: both halves under the name of the prompt's."""
        embeds, given = self.denoising.embeds, self.prepared.request.negative_prompt_embeds
        assert isinstance(embeds, Tensor)
        if name == "prompt_embeds":
            return embeds
        return embeds.chunk(2)[0] if self.prepared.guided else given

    def _weigh(self, guidance: float) -> None:
        """From now on another guidance weight. Without guidance the unconditional half is computed for nothing."""
        prepared = self.prepared
        if guidance == prepared.request.guidance_scale and self.denoising.guidance == prepared.guidance:
            return
        if prepared.guidance is None:
            if prepared.condition is None and guidance != prepared.request.guidance_scale:
                raise JobError(
                    "a callback cannot change guidance_scale in a run without guidance, or with guidance_rescale"
                )
            return
        self.denoising.guidance = guidance if guidance > 1 else 1.0

    def _replace(self, embeds: Tensor) -> None:
        known = self.denoising.embeds
        assert isinstance(known, Tensor)
        given = embeds.detach().to("cpu", torch.float32)
        if self.prepared.guided and given.shape[0] * 2 == known.shape[0]:
            given = torch.cat([known.chunk(2)[0], given])
        if given.shape != known.shape:
            raise JobError(
                f"a callback returned prompt_embeds of {tuple(given.shape)}, not {tuple(known.shape)}"
            )
        self.denoising.embeds = given
