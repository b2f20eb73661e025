"""What a caller asks of the pipeline, checked before any work; the prompt's embeddings and the first
latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sfumato.diffusion.parts import listening
from sfumato.diffusion.schedule import Schedule, probe_schedule
from sfumato.errors import JobError

__all__ = ["Generators", "Prepared", "Request", "prepare"]

Generators = torch.Generator | list[torch.Generator] | None
Callback = Callable[[Any, int, Tensor, dict[str, Any]], Any]

_REFUSED = {
    "guidance_rescale": "it divides by the spread of secret values; leave it at 0",
    "ip_adapter_image": "image prompts are not served yet; use a text prompt",
    "ip_adapter_image_embeds": "image prompts are not served yet; use a text prompt",
    "cross_attention_kwargs": "attention is fixed at capture; fuse a LoRA into the weights first",
    "callback": "use callback_on_step_end",
    "callback_steps": "use callback_on_step_end",
}
_OUTPUTS = ("pil", "np", "pt", "latent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The arguments of one call, as diffusers names them."""

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
    clip_skip: int | None = None
    output_type: str = "pil"
    callback_on_step_end: Callback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ()

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> Request:
        """A request from keyword arguments.

        Raises:
            JobError: an argument that is unknown or not served, with what to do instead.
        """
        given = dict(arguments)
        for name, advice in _REFUSED.items():
            if given.pop(name, None):
                raise JobError(f"{name} cannot be used: {advice}")
        unknown = sorted(set(given) - set(Request.__dataclass_fields__))
        if unknown:
            raise JobError(f"SecurePipeline takes no argument {unknown[0]!r}")
        request = Request(**given)
        request.check()
        return request

    def check(self) -> None:
        """Everything that needs no model.

        Raises:
            JobError: one sentence.
        """
        if self.output_type not in _OUTPUTS:
            raise JobError(f"output_type must be one of {', '.join(_OUTPUTS)}, not {self.output_type!r}")
        if self.num_images_per_prompt < 1:
            raise JobError(f"num_images_per_prompt must be at least 1, not {self.num_images_per_prompt}")
        if isinstance(self.prompt, list) and not self.prompt:
            raise JobError("the list of prompts is empty; give at least one")
        wrong = sorted(set(self.callback_on_step_end_tensor_inputs) - {"latents"})
        if wrong:
            raise JobError(f"a callback can ask for 'latents' alone, not {wrong[0]!r}")

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

    request: Request
    schedule: Schedule
    guided: bool
    latents: Tensor
    embeds: Tensor
    condition: Tensor | None
    ids: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.latents.shape[0]


def prepare(pipe: Any, request: Request, *, encode: bool = True) -> Prepared:
    """Check against the model, encode the prompt and draw the first latents, exactly as diffusers does.

    With ``encode=False`` the prompt is only made tokens.

    Raises:
        JobError: one sentence on the argument that does not fit.
    """
    height, width = _size(pipe, request)
    try:
        pipe.check_inputs(
            request.prompt,
            height,
            width,
            None,
            request.negative_prompt,
            request.prompt_embeds,
            request.negative_prompt_embeds,
        )
    except (ValueError, TypeError) as error:
        raise JobError(str(error).strip().splitlines()[0]) from None
    schedule = probe_schedule(
        pipe.scheduler,
        request.num_inference_steps,
        timesteps=request.timesteps,
        sigmas=request.sigmas,
        eta=request.eta,
    )
    distilled = pipe.unet.config.time_cond_proj_dim
    guided = request.guidance_scale > 1 and distilled is None
    batch = request.prompts * request.num_images_per_prompt
    embeds, ids = _text(pipe, request, guided, encode=encode)
    factor = pipe.vae_scale_factor
    shape = (batch, pipe.unet.config.in_channels, height // factor, width // factor)
    latents = _latents(request, shape)
    return Prepared(
        request=request,
        schedule=schedule,
        guided=guided,
        latents=latents * schedule.init_sigma,
        embeds=embeds,
        condition=_guidance_embedding(pipe, request, batch) if distilled else None,
        ids=ids,
    )


def _text(pipe: Any, request: Request, guided: bool, *, encode: bool) -> tuple[Tensor, Tensor | None]:
    """Embeddings of all texts, or zeros and the token ids; the caller's own embeddings are never encoded."""
    encoder, heard = (pipe, []) if encode or pipe.text_encoder is None else listening(pipe)
    try:
        embeds, negative = encoder.encode_prompt(
            request.prompt,
            torch.device("cpu"),
            request.num_images_per_prompt,
            guided,
            request.negative_prompt,
            prompt_embeds=request.prompt_embeds,
            negative_prompt_embeds=request.negative_prompt_embeds,
            clip_skip=request.clip_skip,
        )
    except IndexError:
        raise JobError(f"clip_skip={request.clip_skip} is more than this text encoder has layers") from None
    except (ValueError, TypeError) as error:
        raise JobError(str(error).strip().splitlines()[0]) from None
    embeds = (torch.cat([negative, embeds]) if guided else embeds).detach()
    if not heard:
        return embeds, None
    if len(heard) != (2 if guided else 1):
        raise JobError(
            "with a secret text encoder give prompt_embeds and negative_prompt_embeds both, or neither of them"
        )
    return embeds, torch.cat(heard[::-1])


def _latents(request: Request, shape: tuple[int, ...]) -> Tensor:
    """Unit noise from the caller's generator, as diffusers draws it; or the caller's own latents."""
    generator = request.generator
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise JobError(
            f"{len(generator)} generators were given for {shape[0]} images; give one, or one for each"
        )
    if request.latents is None:
        drawn: Tensor = randn_tensor(shape, generator=generator, dtype=torch.float32)
        return drawn
    if tuple(request.latents.shape) != shape:
        raise JobError(f"latents must have the shape {shape}, not {tuple(request.latents.shape)}")
    return request.latents.detach().to(torch.float32)


def _size(pipe: Any, request: Request) -> tuple[int, int]:
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    factor = pipe.vae_scale_factor
    return request.height or height * factor, request.width or width * factor


def _guidance_embedding(pipe: Any, request: Request, batch: int) -> Tensor:
    """The guidance weight as an input of distilled U-Nets (LCM)."""
    weights = torch.tensor(request.guidance_scale - 1).repeat(batch)
    embedding: Tensor = pipe.get_guidance_scale_embedding(
        weights, embedding_dim=pipe.unet.config.time_cond_proj_dim
    )
    return embedding.to(torch.float32)
