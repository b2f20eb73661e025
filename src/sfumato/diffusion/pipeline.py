"""A diffusers StableDiffusionPipeline whose denoising runs on shares: the same call, the same image, nobody
sees it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from tqdm import tqdm

from sfumato.diffusion.adapters import Kept, merged
from sfumato.diffusion.correction import Correction
from sfumato.diffusion.cuts import known_halves
from sfumato.diffusion.loading import check_pipeline, load_pipeline
from sfumato.diffusion.loop import Denoising
from sfumato.diffusion.parties import KeptParties
from sfumato.diffusion.parts import decoded, encoded
from sfumato.diffusion.plans import Planner
from sfumato.diffusion.request import Prepared, Request, prepare
from sfumato.diffusion.steering import Steering
from sfumato.diffusion.surface import Surface
from sfumato.errors import JobError
from sfumato.graph.places import SECRETS
from sfumato.graph.plan import Plan
from sfumato.graph.planning import PROFILES
from sfumato.runtime.backend import Backend
from sfumato.runtime.names import shared_name
from sfumato.runtime.remote import open_backend
from sfumato.runtime.report import CostReport

__all__ = ["SecureOutput", "SecurePipeline"]

_BACKENDS = ("local", "simulate", "plain")
#: What runs at the client in clear, unless weights are secret.
_AT_CLIENT = frozenset(("text_encoder", "vae"))


@dataclass
class SecureOutput(BaseOutput):
    """What a call returns: ``images`` as diffusers gives them, and the ``report`` of what it cost."""

    images: Any
    nsfw_content_detected: Any = None
    report: Any = None


class SecurePipeline(Surface):
    """Text to image under MPC. Make one with `from_pretrained`, call it as a diffusers pipeline.

    The client encodes the prompt, draws the noise and decodes the image, all in clear at its side. The three
    parties run the U-Net and the scheduler on shares: they learn shapes, the number of steps, the timesteps and
    the guidance weight.

    With ``secret="inputs+weights"`` the parties hold the weights as shares, too, and run the text encoder and the
    image decoder as well: the client shares its tokens and noise, and what is opened to it is the image alone
    (or the latents, with ``output_type="latent"``). The tokenizer, the scheduler and a safety checker stay at the
    client. Components named in ``public_components`` are in clear at the client, as they are with public weights;
    embeddings that the caller gives are the client's own values.

    **Who knows the noise.** The first latents and the noise of every step are drawn at the client, from the caller's
    generators and in diffusers' order, and shared: no party knows them, and nothing that a party sees depends on the
    generators. Whoever knows the seed knows the noise, but of no other value more than the noise says.

    The diffusers pipeline is this object's own: a pipeline in memory that it was made from is not changed, and shares
    its memory where that was in float32. Other attributes and methods (``scheduler``, ``unet``, ``safety_checker``,
    ``load_lora_weights``, ``set_adapters``, ...) are that pipeline's. Active adapters are merged into the weights of
    each plan, so they cost nothing.

    With ``backend="local"`` three party processes serve all calls; `close`, a ``with`` block or the end of this object
    ends them. Every call is a session of its own: shares are gone after it.
    """

    #: The diffusers pipeline that this one runs as, and the arguments of a call.
    _serves = "StableDiffusionPipeline"
    _request: ClassVar[type[Request]] = Request

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
        self.__dict__["_pipe"] = check_pipeline(pipe, self._serves)
        self.secret, self.profile, self.backend = secret, profile, backend
        self.cluster, self.keys = cluster, keys
        self.options = dict(options or {})
        self._hidden = frozenset() if secret == "inputs" else _AT_CLIENT - set(public_components)
        self._planner = Planner(secret=secret, profile=profile, calibration=calibration, hidden=self._hidden)
        self._merged = Kept[dict[str, nn.Module]]()
        self._parties = KeptParties()
        weakref.finalize(self, self._parties.close)
        self._progress: dict[str, Any] = dict(getattr(pipe, "_progress_bar_config", {}))
        #: What each party sent of the latest result, as ring words: uniform summands; and that of party 0.
        self.last_shares: tuple[Tensor, ...] = ()
        self.last_share: Tensor | None = None

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
        """The pipeline behind ``"embedded"`` (the shipped model), a folder in diffusers' layout, a hub id, or
        ``"cluster:NAME"``, a model that its owner has shared with a cluster.

        Args:
            path_or_id: what to load. ``loading`` goes to diffusers as it is: ``variant``, ``revision``, ``token``,
                ``cache_dir``, ``local_files_only``, ``use_safetensors``, ``scheduler``, ``safety_checker=None``, ...
                Weights in half precision (stored so, or by ``torch_dtype``) are widened to float32: values under
                the protocol are in fixed point, whatever the checkpoint's precision.
            secret: ``"inputs"`` (prompt, noise, image) or ``"inputs+weights"`` (the weights of text encoder,
                U-Net and image decoder as well).
            profile: the errors that non-linear functions may have: ``"precise"`` or ``"fast"``.
            cluster: a cluster file of three real parties; ``keys`` the folder of the client's certificate.
            backend: ``"local"`` (three processes over mutual TLS), ``"simulate"`` (one thread), ``"plain"``.
            calibration: prompts to measure the ranges of all components on, in the clear, instead of the built-in
                ones; or ranges of the U-Net that were measured before. What is measured is cached. These prompts are
                not secret: the ranges in a plan depend on them.
            options: of the protocol, passed to the parties.
            public_components: with secret weights, what may nevertheless run at the client in clear:
                ``"text_encoder"``, ``"vae"``, or both.

        Raises:
            JobError: one sentence on what cannot be loaded or is not served.
        """
        _check_options(secret, profile, backend, public_components)
        shared = shared_name(path_or_id)
        if shared is not None:
            if cls._serves != SecurePipeline._serves:
                raise JobError(f"{path_or_id} is offered for text alone; open it with SecurePipeline")
            return cast(Self, _shared(shared, cluster, keys, options, {
                "secret": secret != "inputs", "profile": profile != "precise", "backend": backend != "local",
                "calibration": calibration is not None, "public_components": bool(public_components),
                **dict.fromkeys(loading, True),
            }))  # fmt: skip
        return cls(
            load_pipeline(path_or_id, cls._serves, **loading),
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
        """The same from a diffusers pipeline in memory, with its loaded LoRAs, textual inversions and safety checker.

        The given pipeline stays as it is; float32 weights are shared with it, others are widened in copies. So what
        writes into weights, such as ``fuse_lora`` on either, changes both.

        Raises:
            JobError: one sentence on what is not served.
        """
        for name, component in getattr(pipe, "components", {}).items():
            if isinstance(component, nn.Module) and any(p.is_meta for p in component.parameters()):
                raise JobError(
                    f"the weights of {name} are offloaded; give the pipeline before it is offloaded"
                )
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
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
        correction: Correction | None = None,
        unguided_steps: int = 0,
        public_noise: bool = False,
        reuse_features: int = 1,
        **more: Any,
    ) -> Any:
        """Images for a prompt, with diffusers' arguments, and the same image for the same generator.

        Of every argument the three parties learn what is called public below, and no more; "secret" means that they
        hold random-looking shares of it. What the client computes in the clear it computes on its own machine.

        Args:
            prompt: one text or a list. With public weights the client encodes it; with secret weights its tokens are
                secret. Public: how many there are.
            height, width: of the images, in pixels, multiples of 8; the model's own size unless both are given. Public.
            num_inference_steps: steps of the scheduler. Public, as are all timesteps and coefficients of its steps.
            timesteps, sigmas: one list in place of the scheduler's own. Public.
            guidance_scale: weight of the prompt over the negative one; without guidance at 1 or less. Public.
            negative_prompt: a text, or a list as long as that of the prompts. Secret as the prompt is.
            num_images_per_prompt: Public.
            eta: noise of DDIM's steps; other schedulers ignore it. Public.
            generator: one for all images or a list with one for each. The noise that is drawn from it, before the
                first step and in steps, is drawn at the client and secret.
            latents: the first latents in place of drawn ones, in units of noise; (images, channels, height / 8,
                width / 8) for a decoder of factor 8. Secret.
            prompt_embeds, negative_prompt_embeds: (prompts, tokens, width), in place of the texts. Secret. With a
                secret text encoder both, or neither.
            ip_adapter_image, ip_adapter_image_embeds: not served.
            output_type: ``"pil"``, ``"np"``, ``"pt"``, or ``"latent"`` for the latents as they are. Opened to the
                client alone; with a secret decoder the image is opened and the latents are not.
            return_dict: False for a pair of images and safety flags.
            cross_attention_kwargs: ``{"scale": s}``, the weight of LoRA layers. They are in the weights of the plan,
                which are as public or secret as the model's.
            guidance_rescale: share of the output that is brought to the spread of the conditional one; the spreads are
                computed on shares. Public is the share alone.
            clip_skip: layers of the text encoder to leave out at its end. Public with secret weights.
            callback_on_step_end: ``callback(pipe, step, timestep, tensors)`` after every step, at the client; what it
                returns replaces what it was given. It may set ``pipe.interrupt`` (or ``pipe._interrupt``), and
                ``pipe._guidance_scale`` in a run with guidance.
            callback_on_step_end_tensor_inputs: what it is given: ``"latents"`` are opened to the client alone after
                every step, which the report counts; ``"prompt_embeds"`` and ``"negative_prompt_embeds"`` are the
                client's own. Nothing by default, where diffusers gives the latents.
            correction: public tensors and weights that are added to the model's outputs, at no cost between the parties
                (`sfumato.diffusion.scores` makes them; not in diffusers). Public, and with it the first noise of a run
                that starts from a record's.
            unguided_steps: the last so many steps run without guidance, which halves their cost (not in diffusers).
                Public.
            public_noise: the first noise is public; nothing about the prompt follows from it, as it is drawn before and
                without it. Then the unconditional half of the first step is public, too, and runs in the clear. With
                public weights and without a negative prompt (not in diffusers). Public.
            reuse_features: every how many steps the whole U-Net runs; in between its outer blocks run on the inner
                blocks' features of the last whole step, which stay with the parties (DeepCache; not in diffusers).
                Public.

        Returns:
            `SecureOutput` with ``images``, ``nsfw_content_detected`` (from the checkpoint's safety checker, at the
            client; None without one) and ``report``, or ``(images, nsfw flags)`` with ``return_dict=False``.

        Raises:
            JobError: an argument that is not served or does not fit; one sentence, before any work.
            CaptureError, PlanError: the model holds what cannot run under the protocol.
            RangeError: values left the calibrated ranges; nothing is opened.
            LinkError: a party is gone or silent.
        """
        arguments = {
            name: value for name, value in locals().items() if name not in ("self", "return_dict", "more")
        }
        return self._generate(Request.of({**arguments, **more}), return_dict=return_dict)

    def _generate(self, request: Request, *, return_dict: bool) -> Any:
        prepared = self._prepared(request)
        # Local parties need seconds to start: they do it while the plan is made.
        with self._opened() as backend:
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

        Values of the client do not matter, only how many prompts and steps there are. Nothing is drawn from a
        generator of the caller's, or of torch's, and what the last call left behind stays.
        """
        prepared = self._imagined(prompt, arguments)
        plans = self.plans_for(prepared)
        with open_backend("meta", options={**self.options}) as backend:
            return self._run(backend, plans, prepared, silent=True)[1]

    def plan(self, prompt: str | list[str] = "", **arguments: Any) -> Plan:
        """The U-Net's plan in a call with these arguments (of its first step, where there are several); ``print`` it to
        see what runs where."""
        plans = self.plans(prompt, **arguments)
        return next(plan for name, plan in plans.items() if name.startswith("unet"))

    def plans(self, prompt: str | list[str] = "", **arguments: Any) -> dict[str, Plan]:
        """All plans of a call with these arguments: ``"unet"`` (others beside or in place of it with cost
        cuts), and with secret weights ``"text"`` and ``"vae"``."""
        return self.plans_for(self._imagined(prompt, arguments))

    def set_progress_bar_config(self, **config: Any) -> None:
        """Options of the progress bar (tqdm's): ``disable=True`` silences it."""
        self._progress = config
        self._pipe.set_progress_bar_config(**config)

    def close(self) -> None:
        """End the local parties, if there are any; a later call starts others."""
        self._parties.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- how -----------------------------------------------------------------------------------------------

    def plans_for(self, prepared: Prepared) -> dict[str, Plan]:
        """The plans of a prepared request, from this object or made now (captured, calibrated, checked)."""
        return self._planner.plans(prepared, progress=not self._progress.get("disable"))

    def _prepared(self, request: Request) -> Prepared:
        pipe = merged(self._pipe, request.lora_scale, self._merged)
        if request.public_noise and self.secret != "inputs":
            raise JobError(
                "public_noise needs public weights, secret='inputs': its first step runs in the clear"
            )
        prepared = prepare(pipe, request, encode="text_encoder" not in self._hidden)
        self._planner.check(prepared)
        return prepared

    def _imagined(self, prompt: str | list[str], arguments: dict[str, Any]) -> Prepared:
        """A call that does not take place."""
        return self._prepared(self._request.of({"prompt": prompt, **arguments}).aside())

    def _opened(self) -> AbstractContextManager[Backend]:
        if self.backend == "local" and self.cluster is None:
            return self._parties.session(self.options)
        return open_backend(self.backend, cluster=self.cluster, keys=self.keys, options={**self.options})

    def _run(
        self, backend: Backend, plans: dict[str, Plan], prepared: Prepared, *, silent: bool = False
    ) -> tuple[Tensor, CostReport]:
        """The image if there is a plan for its decoder, else the latents at the end; and the session's report.

        ``silent``: of an estimate, which leaves no trace in this object and does not listen to it.
        """
        request, steps = prepared.request, prepared.schedule.timesteps
        for name, plan in plans.items():
            self._planner.load(backend, name, plan)
        backend.start_clock()
        embeds: Tensor | str = prepared.embeds
        if prepared.ids is not None:
            embeds = encoded(backend, plans["text"], prepared.ids)
        denoising = Denoising(
            backend,
            plans,
            prepared.schedule,
            embeds,
            prepared.condition,
            prepared.guidance,
            request.generator,
            prepared.picture,
            request.correction,
            prepared.ways,
            known_halves(prepared, backend.device == "meta"),
        )
        if not silent:
            self._tell(prepared)
        steering = Steering(self, prepared, denoising, silent)
        bar = tqdm(
            total=len(steps), **{"delay": 2.0, **self._progress, **({"disable": True} if silent else {})}
        )

        def observe(k: int, latents: Any) -> Tensor | None:
            bar.update()
            return steering.observe(k, latents)

        def stop() -> bool:
            return not silent and self.interrupt

        with bar:
            if "vae" in plans:
                held = denoising.run_held(prepared.latents, observe, stop)
                final = decoded(backend, plans["vae"], held, tuple(prepared.latents.shape))
            else:
                final = denoising.run(prepared.latents, observe, stop)
        if not silent:
            self.last_shares = tuple(backend.last_components)
            self.last_share = self.last_shares[0]
        return final, backend.report(steps=denoising.seconds)

    def _tell(self, prepared: Prepared) -> None:
        """What diffusers' own properties (``guidance_scale``, ``num_timesteps``, ...) say in callbacks."""
        pipe, request = self._pipe, prepared.request
        pipe._guidance_scale, pipe._guidance_rescale = request.guidance_scale, request.guidance_rescale
        pipe._clip_skip, pipe._cross_attention_kwargs = request.clip_skip, request.cross_attention_kwargs
        pipe._num_timesteps, pipe._interrupt = len(prepared.schedule.timesteps), False

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


def _shared(name: str, cluster: Any, keys: Any, options: Any, given: dict[str, bool]) -> SecurePipeline:
    """A shared model's pipeline, whose class builds on this file's."""
    from sfumato.diffusion.shared import open_shared

    return open_shared(
        name, cluster=cluster, keys=keys, options=options, decided=[n for n in given if given[n]]
    )


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
