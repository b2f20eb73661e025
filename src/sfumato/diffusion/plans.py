"""The plans of a pipeline: captured, calibrated in the clear, checked, and kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.diffusion.calibrate import (
    PROMPTS,
    Trajectories,
    cache_file,
    decoder_samples,
    load_cached,
    save_cached,
    trajectories,
)
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.loading import weights_digest
from sfumato.diffusion.loop import call_kwargs
from sfumato.diffusion.parts import ImageDecoder, TextEncoder, text_samples
from sfumato.diffusion.request import Prepared
from sfumato.graph.capture import capture
from sfumato.graph.plan import Plan, make_plan
from sfumato.graph.program import Program

__all__ = ["Planner"]


class Planner:
    """Makes each plan once. ``hidden``: the components beside the U-Net that run under the protocol.

    ``calibration`` holds ranges of the U-Net; those of the other components are always measured here.
    """

    def __init__(
        self, pipe: Any, *, secret: str, profile: str, calibration: Any, hidden: frozenset[str]
    ) -> None:
        self._pipe, self._secret, self._profile = pipe, secret, profile
        self._calibration, self._hidden = calibration, hidden
        self._plans: dict[str, Plan] = {}
        self._digest: tuple[Any, str] = (None, "")

    def plans(self, prepared: Prepared, *, progress: bool = True) -> dict[str, Plan]:
        """By name, in the order of their use: ``text`` and ``vae`` only where they run under the protocol."""
        denoiser = Denoiser(self._pipe.unet, guided=prepared.guided).eval()

        @cache
        def measured() -> Trajectories:
            return trajectories(self._pipe, denoiser, prepared, progress=progress)

        made: dict[str, Plan] = {}
        if prepared.ids is not None:
            made["text"] = self._text(prepared)
        made["unet"] = self._unet(prepared, denoiser, lambda: measured().samples)
        if "vae" in self._hidden and prepared.request.output_type != "latent":
            made["vae"] = self._vae(prepared, lambda: decoder_samples(self._pipe.vae, measured().finals))
        return made

    def _text(self, prepared: Prepared) -> Plan:
        request, ids = prepared.request, prepared.ids
        assert ids is not None
        module = TextEncoder(
            self._pipe.text_encoder,
            guided=prepared.guided,
            clip_skip=request.clip_skip,
            repeats=request.num_images_per_prompt,
        )
        both = prepared.guided and request.clip_skip is not None
        return self._made(
            self._file(prepared, "text"),
            lambda: capture(module.eval(), (torch.zeros_like(ids),)),
            lambda: text_samples(self._pipe, PROMPTS, ids.shape[0], both=both),
        )

    def _unet(self, prepared: Prepared, denoiser: nn.Module, samples: Callable[[], Any]) -> Plan:
        first = call_kwargs(
            prepared.schedule.timesteps[0], torch.zeros_like(prepared.embeds), prepared.condition
        )
        # Embeddings that the parties hold are an input like the latents; else the client knows them.
        held = prepared.ids is not None
        return self._made(
            self._file(prepared, "unet, text held" if held else "unet"),
            lambda: capture(denoiser, (torch.zeros_like(prepared.latents),), first),
            samples,
            self._calibration,
            public=() if prepared.condition is None else ("timestep_cond",),
            client_known=() if held else ("encoder_hidden_states",),
        )

    def _vae(self, prepared: Prepared, samples: Callable[[], Any]) -> Plan:
        decoder = ImageDecoder(self._pipe.vae).eval()
        return self._made(
            self._file(prepared, "vae"),
            lambda: capture(decoder, (torch.zeros_like(prepared.latents),)),
            samples,
        )

    def _file(self, prepared: Prepared, part: str) -> Path:
        return cache_file(self._weights(), prepared, self._profile, self._secret, part)

    def _made(
        self,
        cached: Path,
        program: Callable[[], Program],
        samples: Callable[[], Any],
        calibration: Any = None,
        **options: Any,
    ) -> Plan:
        """The plan under this name, from this object or made now; ranges from the caller, the disk or
        ``samples``."""
        if cached.name in self._plans:
            return self._plans[cached.name]
        captured = program()
        ranges = calibration or load_cached(cached)
        measured = ranges is None
        plan = make_plan(
            captured,
            secret=self._secret,
            profile=self._profile,
            calibration=samples() if measured else ranges,
            **options,
        )
        if measured:
            save_cached(cached, plan.calibration)
        self._plans[cached.name] = plan
        return plan

    def _weights(self) -> str:
        """Digest of the weights that ranges depend on, computed again when they change."""
        pipe = self._pipe
        modules = [pipe.unet, pipe.text_encoder, *([pipe.vae] if "vae" in self._hidden else [])]
        modules = [module for module in modules if module is not None]
        state = tuple(
            (id(p), 0 if p.is_inference() else p._version) for module in modules for p in module.parameters()
        )
        if self._digest[0] != state:
            self._digest = state, weights_digest(*modules)
        return self._digest[1]
