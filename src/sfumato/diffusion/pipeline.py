"""A diffusers StableDiffusionPipeline whose denoising runs on shares: the same call, the same image, nobody
sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.utils import BaseOutput
from torch import Tensor
from tqdm import tqdm

from sfumato.diffusion.loading import check_pipeline, load_pipeline
from sfumato.diffusion.loop import Denoising
from sfumato.diffusion.parts import decoded, encoded
from sfumato.diffusion.plans import Planner
from sfumato.diffusion.request import Prepared, Request, prepare
from sfumato.errors import JobError
from sfumato.graph.places import SECRETS
from sfumato.graph.plan import PROFILES, Plan
from sfumato.runtime.backend import Backend, open_backend
from sfumato.runtime.report import CostReport

__all__ = ["SecureOutput", "SecurePipeline"]

_BACKENDS = ("local", "simulate", "plain")
#: What runs at the client in clear, unless weights are secret.
_AT_CLIENT = frozenset(("text_encoder", "vae"))


@dataclass
class SecureOutput(BaseOutput):
    """What a call returns: ``images`` as diffusers gives them, and the ``report`` of what it cost."""

    images: Any
    report: Any
    nsfw_content_detected: Any = None


class SecurePipeline:
    """Text to image under MPC. Make one with `from_pretrained`, call it as a diffusers pipeline.

    The client encodes the prompt, draws the noise and decodes the image, all in clear at its side. The three
    parties run the U-Net and the scheduler on shares: they learn shapes, the number of steps, the timesteps and
    the guidance weight.

    With ``secret="inputs+weights"`` the parties hold the weights as shares, too, and run the text encoder and the
    image decoder as well: the client shares its tokens and noise, and what is opened to it is the image alone
    (or the latents, with ``output_type="latent"``). The tokenizer, the scheduler and a safety checker stay at the
    client. Components named in ``public_components`` are in clear at the client, as they are with public weights;
    embeddings that the caller gives are the client's own values.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        secret: str = "inputs",
        profile: str = "precise",
        cluster: str | Path | None = None,
        keys: str | Path | None = None,
        backend: str = "local",
        calibration: Any = None,
        options: dict[str, Any] | None = None,
        public_components: Sequence[str] = (),
    ) -> None:
        _check_options(secret, profile, backend, public_components)
        self._pipe = check_pipeline(pipe)
        self.secret, self.profile, self.backend = secret, profile, backend
        self.cluster, self.keys = cluster, keys
        self.options = dict(options or {})
        self._hidden = frozenset() if secret == "inputs" else _AT_CLIENT - set(public_components)
        self._planner = Planner(
            self._pipe, secret=secret, profile=profile, calibration=calibration, hidden=self._hidden
        )
        self._progress: dict[str, Any] = {}
        #: What party 0 sent of the latest result, as ring words: one uniform summand of three.
        self.last_share: Tensor | None = None
        #: Set by a callback to stop after the current step.
        self.interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        secret: str = "inputs",
        profile: str = "precise",
        cluster: str | Path | None = None,
        keys: str | Path | None = None,
        backend: str = "local",
        calibration: Any = None,
        options: dict[str, Any] | None = None,
        public_components: Sequence[str] = (),
        **loading: Any,
    ) -> Self:
        """The pipeline behind ``"embedded"`` (the shipped model), a folder in diffusers' layout, or a hub id.

        Args:
            path_or_id: what to load; ``loading`` (``variant``, ``revision``, ``scheduler``, ...) goes to
            diffusers.
            secret: ``"inputs"`` (prompt, noise, image) or ``"inputs+weights"`` (the weights of text encoder,
                U-Net and image decoder as well).
            profile: the errors that non-linear functions may have: ``"precise"`` or ``"fast"``.
            cluster: a cluster file of three real parties; ``keys`` the folder of the client's certificate.
            backend: ``"local"`` (three processes over mutual TLS), ``"simulate"`` (one thread), ``"plain"``.
            calibration: ranges of the U-Net to use; by default they are measured in the clear on built-in
                prompts, and cached, as those of the other components always are.
            options: of the protocol, passed to the parties.
            public_components: with secret weights, what may nevertheless run at the client in clear:
                ``"text_encoder"``, ``"vae"``, or both.

        Raises:
            JobError: one sentence on what cannot be loaded or is not served.
        """
        _check_options(secret, profile, backend, public_components)
        return cls(
            load_pipeline(path_or_id, **loading),
            secret=secret,
            profile=profile,
            cluster=cluster,
            keys=keys,
            backend=backend,
            calibration=calibration,
            options=options,
            public_components=public_components,
        )

    @classmethod
    def from_pipe(cls, pipe: Any, **options: Any) -> Self:
        """The same from a diffusers pipeline in memory; its components are shared, and widened to float32 in
        place."""
        return cls(pipe, **options)

    # ---- the calls -----------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        return_dict: bool = True,
        **more: Any,
    ) -> Any:
        """Images for a prompt, with diffusers' arguments and the same image for the same generator.

        ``callback_on_step_end(pipe, step, timestep, kwargs)`` opens nothing, unless
        ``callback_on_step_end_tensor_inputs=["latents"]`` asks: then the client alone sees them.

        Returns:
            `SecureOutput` with ``images`` and ``report``, or ``(images, nsfw flags)`` with
            ``return_dict=False``.

        Raises:
            JobError: an argument that is not served; one sentence, before any work.
            LinkError: a party is gone or silent.
        """
        request = Request.of(
            {
                "prompt": prompt,
                "height": height,
                "width": width,
                "num_inference_steps": num_inference_steps,
                "timesteps": timesteps,
                "sigmas": sigmas,
                "guidance_scale": guidance_scale,
                "negative_prompt": negative_prompt,
                "num_images_per_prompt": num_images_per_prompt or 1,
                "eta": eta,
                "generator": generator,
                "latents": latents,
                **more,
            }
        )
        prepared = self._prepared(request)
        # Local parties need seconds to start: they do it while the plan is made.
        with open_backend(
            self.backend, cluster=self.cluster, keys=self.keys, options={**self.options}
        ) as backend:
            plans = self.plans_for(prepared)
            final, report = self._run(backend, plans, prepared)
        images, flagged = self._images(final, request, decoded="vae" in plans)
        return (
            SecureOutput(images=images, report=report, nsfw_content_detected=flagged)
            if return_dict
            else (images, flagged)
        )

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The same call through diffusers in float32 and in the clear, for comparison."""
        return self._pipe(*args, **kwargs)

    def estimate(self, prompt: str | list[str] = "", **arguments: Any) -> CostReport:
        """What a call with these arguments will cost, exactly: the same commands on shapes, without data.

        Values of the client do not matter, only how many prompts and steps there are.
        """
        prepared = self._prepared(Request.of({"prompt": prompt, **arguments}))
        plans = self.plans_for(prepared)
        with open_backend("meta", options={**self.options}) as backend:
            return self._run(backend, plans, prepared, silent=True)[1]

    def plan(self, prompt: str | list[str] = "", **arguments: Any) -> Plan:
        """The U-Net's plan in a call with these arguments; ``print`` it to see what runs where."""
        return self.plans(prompt, **arguments)["unet"]

    def plans(self, prompt: str | list[str] = "", **arguments: Any) -> dict[str, Plan]:
        """All plans of a call with these arguments: ``"unet"``, and with secret weights ``"text"`` and
        ``"vae"``."""
        return self.plans_for(self._prepared(Request.of({"prompt": prompt, **arguments})))

    def set_progress_bar_config(self, **config: Any) -> None:
        """Options of the progress bar (tqdm's): ``disable=True`` silences it."""
        self._progress = config
        self._pipe.set_progress_bar_config(**config)

    def __getattr__(self, name: str) -> Any:
        # scheduler, unet, vae, tokenizer, text_encoder, components, ... are those of the diffusers pipeline.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._pipe, name)

    @property
    def scheduler(self) -> Any:
        """The scheduler; assign another to change it, as with diffusers."""
        return self._pipe.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._pipe.scheduler = scheduler

    # ---- how -----------------------------------------------------------------------------------------------

    def plans_for(self, prepared: Prepared) -> dict[str, Plan]:
        """The plans of a prepared request, from this object or made now (captured, calibrated, checked)."""
        return self._planner.plans(prepared, progress=not self._progress.get("disable"))

    def _prepared(self, request: Request) -> Prepared:
        return prepare(self._pipe, request, encode="text_encoder" not in self._hidden)

    def _run(
        self, backend: Backend, plans: dict[str, Plan], prepared: Prepared, *, silent: bool = False
    ) -> tuple[Tensor, CostReport]:
        """The image if there is a plan for its decoder, else the latents at the end; and the session's report."""
        request, steps = prepared.request, prepared.schedule.timesteps
        for name, plan in plans.items():
            backend.load(name, plan)
        backend.start_clock()
        embeds: Tensor | str = prepared.embeds
        if prepared.ids is not None:
            embeds = encoded(backend, plans["text"], prepared.ids)
        denoising = Denoising(
            backend,
            plans["unet"],
            prepared.schedule,
            embeds,
            prepared.condition,
            request.guidance_scale if prepared.guided else None,
            None if silent else request.generator,
        )
        self.interrupt = False
        bar = tqdm(total=len(steps), **{"disable": silent, "delay": 2.0, **self._progress})

        def observe(k: int, latents: Any) -> Tensor | None:
            bar.update()
            return self._callback(request, k, steps[k], latents, silent=silent)

        with bar:
            if "vae" in plans:
                held = denoising.run_held(prepared.latents, observe, lambda: self.interrupt)
                final = decoded(backend, plans["vae"], held, tuple(prepared.latents.shape))
            else:
                final = denoising.run(prepared.latents, observe, lambda: self.interrupt)
        self.last_share = backend.last_components[0]
        return final, backend.report(steps=denoising.seconds)

    def _callback(
        self, request: Request, k: int, timestep: Tensor, latents: Any, *, silent: bool
    ) -> Tensor | None:
        asked = {name: latents().to(torch.float32) for name in request.callback_on_step_end_tensor_inputs}
        if request.callback_on_step_end is None or silent:
            return None
        returned = request.callback_on_step_end(self, k, timestep, dict(asked)) or {}
        wrong = sorted(set(returned) - set(asked))
        if wrong:
            raise JobError(
                f"a callback returned {wrong[0]!r}, which callback_on_step_end_tensor_inputs does not name"
            )
        changed = returned.get("latents")
        return None if changed is None or changed is asked.get("latents") else changed

    def _images(self, final: Tensor, request: Request, *, decoded: bool) -> tuple[Any, Any]:
        """Images from latents, or from what the parties ``decoded``, in the clear at the client: diffusers' own
        decoder, safety checker and conversion."""
        pipe, final = self._pipe, final.to(torch.float32)
        if request.output_type == "latent":
            return final, None
        with torch.no_grad():
            image = final
            if not decoded:
                image = pipe.vae.decode(
                    final / pipe.vae.config.scaling_factor, return_dict=False, generator=request.generator
                )[0]
            image, flagged = pipe.run_safety_checker(image, torch.device("cpu"), torch.float32)
        keep = [True] * image.shape[0] if flagged is None else [not bad for bad in flagged]
        return pipe.image_processor.postprocess(
            image, output_type=request.output_type, do_denormalize=keep
        ), flagged


def _check_options(secret: str, profile: str, backend: str, public_components: Sequence[str]) -> None:
    for name, value, known in (
        ("secret", secret, SECRETS),
        ("profile", profile, PROFILES),
        ("backend", backend, _BACKENDS),
    ):
        if value not in known:
            raise JobError(f"there is no {name} {value!r}; use one of {', '.join(known)}")
    unknown = sorted(set(public_components) - _AT_CLIENT)
    if unknown:
        raise JobError(
            f"there is no component {unknown[0]!r} to make public; use {', '.join(sorted(_AT_CLIENT))}"
        )
