"""What a caller asks of the pipeline, checked before any work; the prompt's embeddings and the first
latents."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sfumato.diffusion.correction import Correction
from sfumato.diffusion.cuts import Way, check_cuts, ways
from sfumato.diffusion.denoiser import check_reuse
from sfumato.diffusion.picture import Picture
from sfumato.diffusion.probe import probe_schedule
from sfumato.diffusion.prompts import embeddings
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import JobError

__all__ = [
    "Generators",
    "Prepared",
    "Request",
    "image_size",
    "in_a_sentence",
    "is_real",
    "is_whole",
    "prepare",
]

Generators = torch.Generator | list[torch.Generator] | None
Callback = Callable[[Any, int, Tensor, dict[str, Any]], Any]

_REFUSED = {
    "ip_adapter_image": "image prompts are not served yet; use a text prompt",
    "ip_adapter_image_embeds": "image prompts are not served yet; use a text prompt",
    "callback": "use callback_on_step_end",
    "callback_steps": "use callback_on_step_end",
}
_OUTPUTS = ("pil", "np", "pt", "latent")
#: What a callback can ask for: the secret latents are opened for it, the embeddings are the client's own.
_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


def is_whole(value: Any) -> bool:
    """Whether a caller's value, whatever it is, is a whole number."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether a caller's value, whatever it is, is a number."""
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The arguments of one call, as diffusers names them."""

    #: Whose arguments these are, and which of the names below it does not take.
    title: ClassVar[str] = "SecurePipeline"
    without: ClassVar[frozenset[str]] = frozenset()

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 50
    timesteps: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None
    guidance_scale: float = 7.5
    num_images_per_prompt: int = 1
    eta: float = 0.0
    generator: Generators = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    cross_attention_kwargs: Mapping[str, Any] | None = None
    guidance_rescale: float = 0.0
    clip_skip: int | None = None
    output_type: str = "pil"
    callback_on_step_end: Callback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ()
    correction: Correction | None = None
    unguided_steps: int = 0
    public_noise: bool = False
    reuse_features: int = 1

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """A request from keyword arguments.

        Raises:
            JobError: an argument that is unknown or not served, with what to do instead.
        """
        given = dict(arguments)
        for name, advice in _REFUSED.items():
            if given.pop(name, None) is not None:
                raise JobError(f"{name} cannot be used: {advice}")
        unknown = sorted(set(given) - (set(cls.__dataclass_fields__) - cls.without))
        if unknown:
            raise JobError(f"{cls.title} takes no argument {unknown[0]!r}")
        if isinstance(given.get("callback_on_step_end"), PipelineCallback | MultiPipelineCallbacks):
            given["callback_on_step_end_tensor_inputs"] = given["callback_on_step_end"].tensor_inputs
        request = cls(**given)
        request.check()
        return request

    def check(self) -> None:
        """Everything that needs no model.

        Raises:
            JobError: one sentence.
        """
        if self.output_type not in _OUTPUTS:
            raise JobError(f"output_type must be one of {', '.join(_OUTPUTS)}, not {self.output_type!r}")
        wrong = sorted(set(self.callback_on_step_end_tensor_inputs) - set(_TENSORS))
        if wrong:
            raise JobError(f"a callback can ask for {', '.join(_TENSORS)}, not for {wrong[0]!r}")
        beside = sorted(set(self.cross_attention_kwargs or ()) - {"scale"})
        if beside:
            raise JobError(
                f"cross_attention_kwargs takes 'scale' (of LoRA layers) alone, not {beside[0]!r}: "
                "the attention itself is fixed at capture"
            )
        self._check_numbers()
        self._check_texts()
        check_cuts(self)

    def _check_numbers(self) -> None:
        counts: dict[str, Any] = {"num_images_per_prompt": self.num_images_per_prompt}
        if self.timesteps is None and self.sigmas is None:
            counts["num_inference_steps"] = self.num_inference_steps
        for name, count in counts.items():
            if not is_whole(count) or count < 1:
                raise JobError(f"{name} must be a whole number of at least 1, not {count!r}")
        for name, pixels in (("height", self.height), ("width", self.width)):
            if pixels is not None and not is_whole(pixels):
                raise JobError(f"{name} must be a whole number of pixels, not {pixels!r}")
        for name, number in (
            ("cross_attention_kwargs['scale']", self.lora_scale),
            ("guidance_scale", self.guidance_scale),
            ("guidance_rescale", self.guidance_rescale),
            ("eta", self.eta),
        ):
            if not is_real(number) or not math.isfinite(number):
                raise JobError(f"{name} must be a finite number, not {number!r}")
        if self.correction is not None:
            if not isinstance(self.correction, Correction):
                raise JobError("correction must be a Correction (sfumato.diffusion.scores makes them)")
            if self.guidance_rescale:
                raise JobError("a correction and guidance_rescale cannot be used together; leave one out")
        if self.clip_skip is not None and (not is_whole(self.clip_skip) or self.clip_skip < 0):
            raise JobError(f"clip_skip must be a whole number of layers, not {self.clip_skip!r}")

    def _check_texts(self) -> None:
        """As diffusers does, whose complaints quote the texts."""
        prompt, negative = self.prompt, self.negative_prompt
        for name, text, embeds in (
            ("prompt", prompt, self.prompt_embeds),
            ("negative_prompt", negative, self.negative_prompt_embeds),
        ):
            if text is not None and embeds is not None:
                raise JobError(f"give {name} or {name}_embeds, not both")
            if text is not None and not (isinstance(text, str) or _texts(text)):
                raise JobError(f"{name} must be a text or a list of texts")
            if embeds is not None and getattr(embeds, "ndim", 0) != 3:
                raise JobError(f"{name}_embeds must be a tensor (prompts, tokens, width)")
        if prompt is None and self.prompt_embeds is None:
            raise JobError("give a prompt, or prompt_embeds")
        if isinstance(prompt, list) and not prompt:
            raise JobError("the list of prompts is empty; give at least one")
        if self.guidance_scale <= 1:
            return  # then the negative ones are ignored
        if negative is not None and prompt is not None and type(prompt) is not type(negative):
            raise JobError(
                "negative_prompt must be a text where prompt is one, and a list where prompt is a list"
            )
        count = len(negative) if isinstance(negative, list) else 1
        if self.negative_prompt_embeds is not None:
            count = self.negative_prompt_embeds.shape[0]
        if (negative is not None or self.negative_prompt_embeds is not None) and count != self.prompts:
            raise JobError(
                f"{count} negative prompts were given for {self.prompts} prompts; give one for each"
            )

    def check_model(self, pipe: Any) -> None:
        """diffusers' own checks.

        Raises:
            JobError: one sentence.
        """
        with in_a_sentence():
            pipe.check_inputs(
                self.prompt,
                *image_size(pipe, self),
                None,
                self.negative_prompt,
                self.prompt_embeds,
                self.negative_prompt_embeds,
            )

    def probed(self, scheduler: Any, steps: int | None = None) -> Schedule:
        """The schedule of this call, or one of another number of steps."""
        if steps is not None:
            return probe_schedule(scheduler, steps, eta=self.eta)
        return probe_schedule(
            scheduler, self.num_inference_steps, timesteps=self.timesteps, sigmas=self.sigmas, eta=self.eta
        )

    def begin(self, pipe: Any, schedule: Schedule, batch: int) -> tuple[Tensor, Picture | None]:
        """The latents before the first step, first sigma included, and what else the run starts from."""
        return _latents(self, _shape(pipe, self, batch)) * schedule.init_sigma, None

    def aside(self) -> Self:
        """The same for a call that does not take place: what would be drawn comes from generators of its own."""
        given = self.generator
        own = [torch.Generator() for _ in given] if isinstance(given, list) else torch.Generator()
        return replace(self, generator=own)

    @property
    def lora_scale(self) -> float:
        """The weight of all LoRA layers, on top of the weights of their adapters."""
        scale = (self.cross_attention_kwargs or {}).get("scale")
        return 1.0 if scale is None else scale

    @property
    def prompts(self) -> int:
        """How many prompts."""
        if isinstance(self.prompt, list):
            return len(self.prompt)
        return 1 if self.prompt_embeds is None else self.prompt_embeds.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request made concrete. ``schedule`` is in the scheduler's own scale, ``latents`` include its first
    sigma.

    ``ids``: the texts' tokens where the text encoder runs under the protocol, unconditional half first;
    ``embeds`` are then zeros of the right shape.
    """

    pipe: Any
    request: Request
    schedule: Schedule
    guided: bool
    latents: Tensor
    embeds: Tensor
    condition: Tensor | None
    ids: Tensor | None = None
    picture: Picture | None = None

    @property
    def batch(self) -> int:
        return self.latents.shape[0]

    @property
    def extra(self) -> Tensor | None:
        """What the U-Net takes beside the sample."""
        return None if self.picture is None else self.picture.extra

    @property
    def rescale(self) -> tuple[float, float] | None:
        """(guidance weight, share of the rescaled output) where the U-Net's plan guides and rescales itself."""
        rescale = self.request.guidance_rescale
        return (self.request.guidance_scale, rescale) if self.guided and rescale > 0 else None

    @property
    def guidance(self) -> float | None:
        """The weight with which the sampler combines both halves of an output; None where there are none."""
        return self.request.guidance_scale if self.guided and self.rescale is None else None

    @property
    def ways(self) -> list[Way]:
        """How each step runs the network."""
        request = self.request
        return ways(
            len(self.schedule.steps),
            guided=self.guided,
            unguided=request.unguided_steps,
            known=request.public_noise,
            reuse=request.reuse_features,
        )


def prepare(pipe: Any, request: Request, *, encode: bool = True) -> Prepared:
    """Check against the model, encode the prompt and draw the first latents, exactly as diffusers does.

    With ``encode=False`` the prompt is only made tokens.

    Raises:
        JobError: one sentence on the argument that does not fit.
    """
    request.check_model(pipe)
    schedule = request.probed(pipe.scheduler)
    distilled = pipe.unet.config.time_cond_proj_dim
    guided = request.guidance_scale > 1 and distilled is None
    batch = request.prompts * request.num_images_per_prompt
    embeds, ids = embeddings(pipe, request, guided=guided, encode=encode)
    latents, picture = request.begin(pipe, schedule, batch)
    if request.correction is not None:
        request.correction.check(len(schedule.steps), latents.shape)
    if guided and request.unguided_steps >= len(schedule.steps):
        raise JobError(
            f"unguided_steps must be fewer than the run's {len(schedule.steps)}; "
            "guidance_scale=1 runs all of them without guidance"
        )
    if request.reuse_features > 1:
        check_reuse(pipe.unet)
    return Prepared(
        pipe=pipe,
        request=request,
        schedule=schedule,
        guided=guided,
        latents=latents,
        embeds=embeds,
        condition=_guidance_embedding(pipe, request, batch) if distilled else None,
        ids=ids,
        picture=picture,
    )


@contextlib.contextmanager
def in_a_sentence() -> Iterator[None]:
    """Complaints of diffusers as ours.

    Raises:
        JobError: the first line of the complaint.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise JobError(str(error).strip().splitlines()[0]) from None


def _texts(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(text, str) for text in given)


def _latents(request: Request, shape: tuple[int, ...]) -> Tensor:
    """Unit noise from the caller's generator, as diffusers draws it; or the caller's own latents."""
    generator = request.generator
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise JobError(
            f"{len(generator)} generators were given for {shape[0]} images; give one, or one for each"
        )
    if request.latents is not None:
        return request.latents.detach().to("cpu", torch.float32)
    with in_a_sentence():
        drawn: Tensor = randn_tensor(shape, generator=generator, dtype=torch.float32)
    return drawn


def _shape(pipe: Any, request: Request, batch: int) -> tuple[int, ...]:
    """The latents' shape: that of the caller's own, or of the image that is asked for."""
    height, width = image_size(pipe, request)
    factor, channels = pipe.vae_scale_factor, pipe.unet.config.in_channels
    wanted = (batch, channels, height // factor, width // factor)
    if request.latents is None:
        return wanted
    given = tuple(request.latents.shape)
    # As in diffusers, latents may have a size of their own; one that contradicts height and width is a mistake.
    sized = bool(request.height and request.width)
    if len(given) != 4 or given[:2] != wanted[:2] or (sized and given != wanted):
        raise JobError(f"latents must have the shape {wanted}, not {given}")
    return given


def image_size(pipe: Any, request: Request) -> tuple[int, int]:
    """Pixels. As in diffusers, the model's own size unless both are given."""
    if request.height and request.width:
        if request.height < 0 or request.width < 0:
            raise JobError(f"height and width must be positive, not {request.height} and {request.width}")
        return request.height, request.width
    size = pipe.unet.config.sample_size
    if size is None:
        raise JobError("this U-Net names no sample_size; give height and width")
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def _guidance_embedding(pipe: Any, request: Request, batch: int) -> Tensor:
    """The guidance weight as an input of distilled U-Nets (LCM)."""
    weights = torch.tensor(request.guidance_scale - 1).repeat(batch)
    embedding: Tensor = pipe.get_guidance_scale_embedding(
        weights, embedding_dim=pipe.unet.config.time_cond_proj_dim
    )
    return embedding.to(torch.float32)
