"""The plans of a pipeline: captured, calibrated in the clear, checked, and kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.diffusion.adapters import Kept
from sfumato.diffusion.calibrate import (
    PROMPTS,
    Trajectories,
    cache_file,
    decoder_samples,
    trajectories,
)
from sfumato.diffusion.cuts import Way, of_plan
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.loop import call_kwargs
from sfumato.diffusion.parts import ImageDecoder, TextEncoder, text_samples
from sfumato.diffusion.picture import Blend, Clamp
from sfumato.diffusion.request import Prepared
from sfumato.errors import JobError
from sfumato.graph.capture import capture
from sfumato.graph.kept import load_cached, save_cached, weights_digest
from sfumato.graph.plan import Plan
from sfumato.graph.planning import make_plan
from sfumato.graph.program import Program
from sfumato.runtime.backend import Backend

__all__ = ["Planner"]


class Planner:
    """Makes each plan once. ``hidden``: the components beside the U-Net that run under the protocol.

    ``calibration`` is what ranges are measured on, prompts, or ranges of the U-Net measured before; those of the other
    components are then measured here, on the built-in prompts.
    """

    def __init__(self, *, secret: str, profile: str, calibration: Any, hidden: frozenset[str]) -> None:
        self._secret, self._profile = secret, profile
        entries = calibration if isinstance(calibration, list | tuple) else ()
        if isinstance(calibration, str) or 0 < sum(isinstance(text, str) for text in entries) < len(entries):
            raise JobError(
                "calibration must be a list of prompts, calibration=['...', '...'], or measured ranges"
            )
        prompts = isinstance(calibration, list | tuple) and all(isinstance(text, str) for text in calibration)
        if prompts and not calibration:
            raise JobError(
                "calibration has no prompt; give at least one, or leave it out for the built-in ones"
            )
        self._prompts: tuple[str, ...] = tuple(calibration) if prompts else PROMPTS
        self._calibration, self._hidden = None if prompts else calibration, hidden
        self._plans: dict[str, Plan] = {}
        self._digest = Kept[str]()

    def check(self, prepared: Prepared) -> None:
        """Refuse what cannot be measured: embeddings of our own prompts need a text encoder, and those of the caller
        are secret where ranges are public.

        Raises:
            JobError: one sentence.
        """
        if prepared.pipe.text_encoder is not None:
            return
        if self._calibration is None:
            raise JobError(
                "this pipeline has no text encoder to measure ranges with; give ranges that were measured with one, "
                "calibration=whole.plan(...).calibration"
            )
        beside = self._beside(prepared)
        if beside:
            raise JobError(
                f"this pipeline has no text encoder to measure the ranges of {beside[0]} with; load it with one"
            )

    def _beside(self, prepared: Prepared) -> list[str]:
        """What runs on shares after the U-Net, in words."""
        picture, found = prepared.picture, []
        if prepared.schedule.clip is not None:
            found.append("the scheduler's clamp (clip_sample)")
        if picture is not None and picture.mask is not None:
            found.append("the blend with a picture")
        if "vae" in self._hidden and prepared.request.output_type != "latent":
            found.append("the image decoder")
        return found

    def plans(self, prepared: Prepared, *, progress: bool = True) -> dict[str, Plan]:
        """By name, in the order of their use: ``text`` and ``vae`` only where they run under the protocol."""
        pipe = prepared.pipe
        ways = dict.fromkeys(way._replace(known=False) for way in prepared.ways)
        denoiser = _denoiser(prepared, Way(keeps=any(way.keeps for way in ways)))

        @cache
        def measured() -> Trajectories:
            return trajectories(pipe, denoiser, prepared, self._prompts, progress=progress)

        weights = self._weights(pipe)

        def file(part: str) -> Path:
            return cache_file(weights, prepared, self._profile, self._secret, part, self._prompts)

        made: dict[str, Plan] = {}
        if prepared.ids is not None:
            made["text"] = self._text(prepared, file("text"))
        for way in ways:
            made[way.plan] = self._unet(prepared, file, way, measured)
        if prepared.schedule.clip is not None:
            clamp = Clamp(*prepared.schedule.clip)
            made["clip"] = self._small(prepared, file("clip"), clamp, lambda: measured().clips)
        if prepared.picture is not None and prepared.picture.mask is not None:
            made["blend"] = self._small(
                prepared, file("blend"), Blend(), lambda: measured().blends, prepared.picture.mask
            )
        if "vae" in self._hidden and prepared.request.output_type != "latent":
            made["vae"] = self._vae(
                prepared, file("vae"), lambda: decoder_samples(pipe.vae, measured().finals)
            )
        return made

    def load(self, backend: Backend, name: str, plan: Plan) -> None:
        """Give the parties one of these plans and its weights."""
        backend.load(name, plan)

    def _text(self, prepared: Prepared, cached: Path) -> Plan:
        request, ids = prepared.request, prepared.ids
        assert ids is not None
        module = TextEncoder(
            prepared.pipe.text_encoder,
            guided=prepared.guided,
            clip_skip=request.clip_skip,
            repeats=request.num_images_per_prompt,
        )
        both = prepared.guided and request.clip_skip is not None
        return self._made(
            cached,
            lambda: capture(module.eval(), (torch.zeros_like(ids),)),
            lambda: text_samples(prepared.pipe, self._prompts, ids.shape[0], both=both),
        )

    def _unet(
        self,
        prepared: Prepared,
        file: Callable[[str], Path],
        way: Way,
        measured: Callable[[], Trajectories],
    ) -> Plan:
        denoiser = _denoiser(prepared, way)
        embeds = torch.zeros_like(prepared.embeds.chunk(2)[1] if way.single else prepared.embeds)
        first = call_kwargs(prepared.schedule.timesteps[0], embeds, prepared.condition, prepared.extra)
        if way.partial:
            first["features"] = self._features(prepared, way, {**first})
        # Embeddings that the parties hold are an input like the latents; else the client knows them.
        held = prepared.ids is not None
        part = [way.plan, *(["text held"] if held else []), *(["features"] if way.keeps else [])]
        if prepared.rescale is not None:
            part.append(f"rescaled {prepared.rescale[1]:g}")
        return self._made(
            file(", ".join(part)),
            lambda: capture(denoiser, (torch.zeros_like(prepared.latents),), first),
            lambda: of_plan(measured().partial if way.partial else measured().samples, way),
            self._calibration,
            public=() if prepared.condition is None else ("timestep_cond",),
            client_known=() if held else ("encoder_hidden_states",),
        )

    def _features(self, prepared: Prepared, way: Way, kwargs: dict[str, Any]) -> Tensor:
        """Zeros like the features that a step with this way takes up."""
        whole = _denoiser(prepared, Way(way.single, keeps=True))
        with torch.no_grad():
            return torch.zeros_like(whole(torch.zeros_like(prepared.latents), **kwargs)[1])

    def _vae(self, prepared: Prepared, cached: Path, samples: Callable[[], Any]) -> Plan:
        decoder = ImageDecoder(prepared.pipe.vae).eval()
        return self._made(
            cached,
            lambda: capture(decoder, (torch.zeros_like(prepared.latents),)),
            samples,
        )

    def _small(
        self, prepared: Prepared, cached: Path, module: nn.Module, samples: Callable[[], Any], *beside: Tensor
    ) -> Plan:
        """The plan of what happens between two steps: a function of values like the latents."""
        values = [torch.zeros_like(value) for value in (prepared.latents, *beside)]
        return self._made(cached, lambda: capture(module.eval(), tuple(values)), samples)

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

    def _weights(self, pipe: Any) -> str:
        """Digest of the weights that ranges depend on, computed again when they change."""
        modules = [pipe.unet, pipe.text_encoder, *([pipe.vae] if "vae" in self._hidden else [])]
        modules = [module for module in modules if module is not None]
        return self._digest.get((), modules, lambda: weights_digest(*modules))


def _denoiser(prepared: Prepared, way: Way) -> Denoiser:
    """The network as a step of this way runs it."""
    guided = prepared.guided and not way.single
    rescale = prepared.rescale if guided else None
    return Denoiser(prepared.pipe.unet, guided=guided, rescale=rescale, keeps=way.keeps).eval()
