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

from sfumato.diffusion.calibrate import cache_file, load_cached, save_cached, trajectories
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.loading import check_pipeline, load_pipeline, weights_digest
from sfumato.diffusion.loop import Denoising, call_kwargs
from sfumato.diffusion.request import Prepared, Request, prepare
from sfumato.errors import JobError
from sfumato.graph.capture import capture
from sfumato.graph.places import SECRETS
from sfumato.graph.plan import PROFILES, Plan, make_plan
from sfumato.runtime.backend import Backend, open_backend
from sfumato.runtime.report import CostReport

__all__ = ["SecureOutput", "SecurePipeline"]

_BACKENDS = ("local", "simulate", "plain")
_AT_CLIENT = {"text_encoder", "vae"}


@dataclass
class SecureOutput(BaseOutput):
    """What a call returns: ``images`` as diffusers gives them, and the ``report`` of what it cost."""

    images: Any
    report: Any
    nsfw_content_detected: Any = None


class SecurePipeline:
    """Text to image under MPC. Make one with `from_pretrained`, call it as a diffusers pipeline.

    The client encodes the prompt, draws the noise and decodes the image, all in clear at its side. The three
    parties
    run the U-Net and the scheduler on shares: they learn shapes, the number of steps, the timesteps and the
    guidance weight.
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
        self._calibration = calibration
        self._plans: dict[Any, Plan] = {}
        self._digest: tuple[Any, str] = (None, "")
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
            secret: ``"inputs"`` (prompt, noise, image) or ``"inputs+weights"`` (the U-Net's weights as well).
            profile: how non-linear functions are computed: ``"precise"``, ``"fast"``, or a paper's name.
            cluster: a cluster file of three real parties; ``keys`` the folder of the client's certificate.
            backend: ``"local"`` (three processes over mutual TLS), ``"simulate"`` (one thread), ``"plain"``.
            calibration: ranges to use; by default they are measured in the clear on built-in prompts, and
            cached.
            options: of the protocol, passed to the parties.
            public_components: with secret weights, what may nevertheless run at the client in clear: today
                ``("text_encoder", "vae")``, both of them.

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
        prepared = prepare(self._pipe, request)
        # Local parties need seconds to start: they do it while the plan is made.
        with open_backend(
            self.backend, cluster=self.cluster, keys=self.keys, options={**self.options}
        ) as backend:
            plan = self.plan_for(prepared)
            final, report = self._run(backend, plan, prepared)
        images, flagged = self._decoded(final, request)
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
        prepared = prepare(self._pipe, Request.of({"prompt": prompt, **arguments}))
        plan = self.plan_for(prepared)
        with open_backend("meta", options={**self.options}) as backend:
            return self._run(backend, plan, prepared, silent=True)[1]

    def plan(self, prompt: str | list[str] = "", **arguments: Any) -> Plan:
        """The plan that a call with these arguments uses; ``print`` it to see what runs where."""
        return self.plan_for(prepare(self._pipe, Request.of({"prompt": prompt, **arguments})))

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

    def plan_for(self, prepared: Prepared) -> Plan:
        """The plan of a prepared request, from this object or made now (captured, calibrated, checked)."""
        condition = prepared.condition
        cached = cache_file(self._weights(), prepared, self.profile, self.secret)
        if cached.name in self._plans:
            return self._plans[cached.name]
        denoiser = Denoiser(self._pipe.unet, guided=prepared.guided).eval()
        sample = torch.zeros_like(prepared.latents)
        kwargs = call_kwargs(prepared.schedule.timesteps[0], torch.zeros_like(prepared.embeds), condition)
        program = capture(denoiser, (sample,), kwargs)
        calibration: Any = self._calibration or load_cached(cached)
        measured = calibration is None
        if measured:
            calibration = trajectories(
                self._pipe, denoiser, prepared, progress=not self._progress.get("disable")
            )
        plan = make_plan(
            program,
            secret=self.secret,
            public=() if condition is None else ("timestep_cond",),
            client_known=("encoder_hidden_states",),
            profile=self.profile,
            calibration=calibration,
        )
        if measured:
            save_cached(cached, plan.calibration)
        self._plans[cached.name] = plan
        return plan

    def _weights(self) -> str:
        """Digest of the weights that ranges depend on, computed again when they change."""
        modules = (self._pipe.unet, self._pipe.text_encoder)
        state = tuple(
            (id(p), 0 if p.is_inference() else p._version) for module in modules for p in module.parameters()
        )
        if self._digest[0] != state:
            self._digest = state, weights_digest(*modules)
        return self._digest[1]

    def _run(
        self, backend: Backend, plan: Plan, prepared: Prepared, *, silent: bool = False
    ) -> tuple[Tensor, CostReport]:
        """The latents at the end, and the report of the session."""
        request, steps = prepared.request, prepared.schedule.timesteps
        denoising = Denoising(
            backend,
            plan,
            prepared.schedule,
            prepared.embeds,
            prepared.condition,
            request.guidance_scale if prepared.guided else None,
            None if silent else request.generator,
        )
        backend.load("unet", plan)
        backend.start_clock()
        self.interrupt = False
        bar = tqdm(total=len(steps), **{"disable": silent, "delay": 2.0, **self._progress})

        def observe(k: int, latents: Any) -> Tensor | None:
            bar.update()
            return self._callback(request, k, steps[k], latents, silent=silent)

        with bar:
            final = denoising.run(prepared.latents, observe, lambda: self.interrupt)
        self.last_share = backend.last_components[0]
        backend.check_ranges("unet")
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

    def _decoded(self, latents: Tensor, request: Request) -> tuple[Any, Any]:
        """Images from latents, in the clear at the client: diffusers' own decoder, safety checker and
        conversion."""
        pipe, latents = self._pipe, latents.to(torch.float32)
        if request.output_type == "latent":
            return latents, None
        with torch.no_grad():
            image = pipe.vae.decode(
                latents / pipe.vae.config.scaling_factor, return_dict=False, generator=request.generator
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
    if secret != "inputs" and set(public_components) != _AT_CLIENT:
        raise JobError(
            "with secret weights the text encoder and the image decoder still run at the client in clear; "
            "allow it with public_components=('text_encoder', 'vae')"
        )
