"""Callbacks at the end of a step: what they are given, and what they may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        given = {
            name: latents().to(torch.float32) if name == "latents" else self._embeds(name)
            for name in request.callback_on_step_end_tensor_inputs
        }
        if request.callback_on_step_end is None or self.silent:
            return None
        timestep = self.prepared.schedule.timesteps[k]
        before = {name: None if value is None else value.clone() for name, value in given.items()}
        returned = request.callback_on_step_end(self.pipe, k, timestep, dict(given)) or {}
        wrong = sorted(set(returned) - set(given))
        if wrong:
            raise JobError(
                f"a callback returned {wrong[0]!r}, which callback_on_step_end_tensor_inputs does not name"
            )
        self._weigh(self.pipe.guidance_scale)
        # As in diffusers, what was given stays where it is not returned, and may have been written to.
        after = {**given, **returned}
        embeds = _changed("prompt_embeds", before, after)
        if embeds is not None:
            self._replace(embeds)
        latents_after = _changed("latents", before, after)
        if latents_after is not None and latents_after.shape != given["latents"].shape:
            raise JobError(
                f"a callback returned latents of {tuple(latents_after.shape)}, not {tuple(given['latents'].shape)}"
            )
        return latents_after

    def _embeds(self, name: str) -> Any:
        """As diffusers has them in its loop: both halves under the name of the prompt's. Copies, which the callback
        may write to."""
        embeds, negative = self.denoising.embeds, self.prepared.request.negative_prompt_embeds
        assert isinstance(embeds, Tensor)
        if name == "prompt_embeds":
            return embeds.clone()
        if self.prepared.guided:
            return embeds.chunk(2)[0].clone()
        return None if negative is None else negative.clone()

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
        given = embeds
        if self.prepared.guided and given.shape[0] * 2 == known.shape[0]:
            given = torch.cat([known.chunk(2)[0], given])
        if given.shape != known.shape:
            raise JobError(
                f"a callback returned prompt_embeds of {tuple(given.shape)}, not {tuple(known.shape)}"
            )
        self.denoising.embeds = given


def _changed(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Tensor | None:
    """The tensor after a callback, in float32, if it is another than before.

    Raises:
        JobError: it is no tensor.
    """
    if name not in before:
        return None
    if not isinstance(after[name], Tensor):
        raise JobError(f"a callback returned {name} that is no tensor; return a tensor, or leave it out")
    found: Tensor = after[name].detach().to("cpu", torch.float32)
    return None if torch.equal(found, before[name]) else found
