"""Image to image and inpainting under MPC: picture and mask are the client's secrets, as prompt and noise are."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from sfumato.diffusion.picture import Picture
from sfumato.diffusion.pipeline import SecurePipeline
from sfumato.diffusion.probe import probe_schedule
from sfumato.diffusion.request import Prepared, Request, in_a_sentence, is_real
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import JobError

__all__ = ["SecureImg2ImgPipeline", "SecureInpaintPipeline"]

_MODES = {1: "L", 3: "RGB"}
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class _ImageRequest(Request):
    """The arguments of an image-to-image call. Its size is the picture's."""

    title: ClassVar[str] = "SecureImg2ImgPipeline"
    without: ClassVar[frozenset[str]] = frozenset(
        ("guidance_rescale", "height", "latents", "public_noise", "width")
    )

    image: Any = None
    strength: float = 0.8

    def check(self) -> None:
        """As `Request.check`."""
        Request.check(self)
        if not is_real(self.strength) or not 0 <= self.strength <= 1:
            raise JobError(f"strength must lie between 0 and 1, not {self.strength!r}")

    def check_model(self, pipe: Any) -> None:
        """As `Request.check_model`."""
        with in_a_sentence():
            pipe.check_inputs(
                self.prompt,
                self.strength,
                None,
                self.negative_prompt,
                self.prompt_embeds,
                self.negative_prompt_embeds,
            )

    def probed(self, scheduler: Any, steps: int | None = None) -> Schedule:
        """As `Request.probed`, for a run that starts at a picture."""
        if steps is not None:
            return probe_schedule(
                scheduler, math.ceil(steps / self.strength), eta=self.eta, strength=self.strength
            )
        return probe_schedule(
            scheduler,
            self.num_inference_steps,
            timesteps=self.timesteps,
            sigmas=self.sigmas,
            eta=self.eta,
            strength=self.strength,
        )

    def begin(self, pipe: Any, schedule: Schedule, batch: int) -> tuple[Tensor, Picture | None]:
        """As `Request.begin`: the picture in latents, noised, all in the clear at the client."""
        image = _pixels(pipe, self.image, "image", pipe.image_processor.preprocess)
        _as_many(image, batch, "images")
        with _noting(pipe, schedule) as (noting, noted):
            noting.prepare_latents(
                image, None, self.prompts, self.num_images_per_prompt, torch.float32, _CPU, self.generator
            )
        picture = Picture(*noted[0])
        return picture.first(schedule), picture


@dataclass(frozen=True, slots=True, kw_only=True)
class _InpaintRequest(_ImageRequest):
    """The arguments of an inpainting call."""

    title: ClassVar[str] = "SecureInpaintPipeline"
    without: ClassVar[frozenset[str]] = frozenset(("guidance_rescale", "public_noise"))

    mask_image: Any = None
    masked_image_latents: Tensor | None = None
    padding_mask_crop: int | None = None
    strength: float = 1.0

    def size(self, pipe: Any) -> tuple[int, int]:
        """Height and width in pixels; as in diffusers, each the model's own unless it is given."""
        own = pipe.unet.config.sample_size
        height, width = (own, own) if isinstance(own, int) else own
        return self.height or height * pipe.vae_scale_factor, self.width or width * pipe.vae_scale_factor

    def check_model(self, pipe: Any) -> None:
        """As `Request.check_model`."""
        with in_a_sentence():
            pipe.check_inputs(
                self.prompt,
                self.image,
                self.mask_image,
                *self.size(pipe),
                self.strength,
                None,
                self.output_type,
                self.negative_prompt,
                self.prompt_embeds,
                self.negative_prompt_embeds,
                padding_mask_crop=self.padding_mask_crop,
            )
        if "mask" in pipe.vae.forward.__code__.co_varnames:
            raise JobError(
                "a decoder that takes the mask (AsymmetricAutoencoderKL) is not served; use AutoencoderKL"
            )

    def crop(self, pipe: Any) -> tuple[int, int, int, int] | None:
        """The part of the picture that ``padding_mask_crop`` asks for."""
        if self.padding_mask_crop is None:
            return None
        height, width = self.size(pipe)
        found: tuple[int, int, int, int] = pipe.mask_processor.get_crop_region(
            self.mask_image, width, height, pad=self.padding_mask_crop
        )
        return found

    def begin(self, pipe: Any, schedule: Schedule, batch: int) -> tuple[Tensor, Picture | None]:
        """As `Request.begin`: picture, masked picture and mask in latents, all in the clear at the client."""
        (height, width), crop = self.size(pipe), self.crop(pipe)

        def fitted(processor: Any) -> Callable[[Any], Tensor]:
            return lambda given: processor.preprocess(
                given,
                height=height,
                width=width,
                crops_coords=crop,
                resize_mode="default" if crop is None else "fill",
            )

        image = _pixels(pipe, self.image, "image", fitted(pipe.image_processor))
        _as_many(image, batch, "images")
        mask = _pixels(pipe, self.mask_image, "mask_image", fitted(pipe.mask_processor), channels=1)
        _as_many(mask, batch, "masks")
        masked = self.masked_image_latents
        if masked is None:
            if image.shape[-2:] != mask.shape[-2:]:
                raise JobError(
                    "with latents as image give masked_image_latents, too; or give the picture itself"
                )
            masked = image * (mask < 0.5)
        blended = pipe.unet.config.in_channels == pipe.vae.config.latent_channels
        pure = self.strength == 1.0
        with _noting(pipe, schedule) as (noting, noted):
            found = noting.prepare_latents(
                batch,
                pipe.vae.config.latent_channels,
                height,
                width,
                torch.float32,
                _CPU,
                self.generator,
                self.latents,
                image=image,
                timestep=schedule.timesteps[:1],
                is_strength_max=pure,
                return_noise=True,
                return_image_latents=blended,
            )
            small, masked = noting.prepare_mask_latents(
                mask, masked, batch, height, width, torch.float32, _CPU, self.generator, False
            )
        noise = found[1]
        latents = found[2] if blended else noted[0][0] if noted else torch.zeros_like(noise)
        if not noise.shape[-2:] == latents.shape[-2:] == small.shape[-2:] == masked.shape[-2:]:
            raise JobError(
                f"latents must have the shape {(batch, *latents.shape[1:-2], *small.shape[-2:])}, "
                f"not {tuple(noise.shape)}"
            )
        picture = Picture(
            latents,
            noise,
            pure or self.latents is not None,
            small if blended else None,
            None if blended else torch.cat([small, masked], 1),
        )
        return picture.first(schedule), picture


class SecureImg2ImgPipeline(SecurePipeline):
    """Image to image under MPC, as diffusers' StableDiffusionImg2ImgPipeline; made and used like `SecurePipeline`.

    The client encodes the picture, adds the noise and shares what comes of it: the parties learn its size and how many
    steps are left to do, which ``strength`` decides.
    """

    _serves = "StableDiffusionImg2ImgPipeline"
    _request = _ImageRequest

    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **more: Any,
    ) -> Any:
        """Images for a prompt and a picture, with diffusers' arguments.

        Args:
            image: a PIL image, an array (height, width, channels), a tensor (channels, height, width), values between
                0 and 1, a batch or a list of these; or latents (images, 4, height / 8, width / 8). Secret.
            strength: how much of the steps to do: at 1 little of the picture is left. Public.

        The others are those of `SecurePipeline`; the size is the picture's.

        Raises:
            JobError: an argument that is not served; one sentence, before any work.
        """
        given = {
            name: value for name, value in locals().items() if name not in ("self", "return_dict", "more")
        }
        return self._generate(_ImageRequest.of({**given, **more}), return_dict=return_dict)

    def _prepared(self, request: Request) -> Prepared:
        if "vae" in self._hidden:
            raise JobError(
                f"{request.title} encodes the picture at the client, where the weights of the VAE are secret; "
                "use public_components=('vae',)"
            )
        return SecurePipeline._prepared(self, request)


class SecureInpaintPipeline(SecureImg2ImgPipeline):
    """Inpainting under MPC, as diffusers' StableDiffusionInpaintPipeline; made and used like `SecurePipeline`.

    Runs U-Nets that take mask and masked picture beside the sample, and those of text to image, where the kept part
    of the picture is put back after each step. Picture and mask are encoded at the client; the parties learn their
    size alone.
    """

    _serves = "StableDiffusionInpaintPipeline"
    _request = _InpaintRequest

    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
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
        """Images for a prompt, a picture and a mask, with diffusers' arguments.

        Args:
            image: as in `SecureImg2ImgPipeline`; brought to ``height`` and ``width``. Secret.
            mask_image: as ``image``, with one channel: what is 0.5 or more is painted anew. Secret.
            masked_image_latents: latents of the picture without that part, in place of encoding it. Secret.
            padding_mask_crop: paint only the mask's surroundings, with so many pixels around, at full size. Secret, as
                the client crops and puts the result back.
            strength: how much of the steps to do. Public.

        The others are those of `SecurePipeline`.

        Raises:
            JobError: an argument that is not served; one sentence, before any work.
        """
        given = {
            name: value for name, value in locals().items() if name not in ("self", "return_dict", "more")
        }
        return self._generate(_InpaintRequest.of({**given, **more}), return_dict=return_dict)

    def _images(self, final: Tensor, request: Request, *, decoded: bool) -> tuple[Any, Any]:
        """As `SecurePipeline`, and back into the picture that it was cropped from."""
        images, flagged = SecurePipeline._images(self, final, request, decoded=decoded)
        assert isinstance(request, _InpaintRequest)
        crop = request.crop(self._pipe)
        if crop is not None:
            overlay = self._pipe.image_processor.apply_overlay
            images = [overlay(request.mask_image, request.image, image, crop) for image in images]
        return images, flagged


# ---- diffusers' own preparation ----------------------------------------------------------------------------


@contextlib.contextmanager
def _noting(pipe: Any, schedule: Schedule) -> Iterator[tuple[Any, list[tuple[Tensor, Tensor]]]]:
    """The pipeline with a scheduler that notes (picture, noise) in place of adding them, and the notes."""
    noted: list[tuple[Tensor, Tensor]] = []

    def add_noise(picture: Tensor, noise: Tensor, _: Any) -> Tensor:
        noted.append((picture, noise))
        return picture

    double = copy.copy(pipe)
    double.__dict__["scheduler"] = SimpleNamespace(add_noise=add_noise, init_noise_sigma=schedule.init_sigma)
    with in_a_sentence(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on one picture for several prompts
        yield double, noted


def _pixels(
    pipe: Any, given: Any, name: str, process: Callable[[Any], Tensor], *, channels: int | None = None
) -> Tensor:
    """A picture as diffusers' ``process`` gives it, (images, channels, height, width); latents as they are.

    Raises:
        JobError: what it is not, in one sentence.
    """
    channels = channels or pipe.vae.config.in_channels
    several = given if isinstance(given, list) else [given]
    if not several:
        raise JobError(f"the list of {name} is empty; give at least one")
    for one in several:
        _check_values(one, name, pipe.vae.config.latent_channels)
    if any(isinstance(one, PIL.Image.Image) for one in several):
        mode = _MODES.get(channels)
        given = [one.convert(mode) if isinstance(one, PIL.Image.Image) and mode else one for one in several]
    with in_a_sentence(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on tensors with values below 0
        try:
            made = process(given).to(torch.float32)
        except (AttributeError, IndexError, RuntimeError) as error:
            raise JobError(
                f"{name} cannot be read as pictures of one size, at least {pipe.vae_scale_factor} pixels wide and high "
                f"({type(error).__name__})"
            ) from None
    if made.dim() != 4 or made.shape[1] not in (channels, pipe.vae.config.latent_channels):
        raise JobError(
            f"{name} must have {channels} channels, as this model's pictures do, not {made.shape[1]}"
        )
    return made


def _check_values(one: Any, name: str, latent_channels: int) -> None:
    if not isinstance(one, PIL.Image.Image | np.ndarray | Tensor):
        raise JobError(
            f"{name} must be a PIL image, an array, a tensor, or a list of these, not {type(one).__name__}"
        )
    if isinstance(one, PIL.Image.Image):
        return
    values = torch.as_tensor(one)
    if not values.is_floating_point():
        raise JobError(f"{name} holds whole numbers; give floats between 0 and 1 (divide bytes by 255)")
    if values.numel() == 0 or not bool(values.isfinite().all()):
        raise JobError(f"{name} is empty, or holds values that are not finite")
    in_latents = isinstance(one, Tensor) and one.dim() == 4 and one.shape[1] == latent_channels
    if not in_latents and float(values.abs().max()) > 1.0:
        raise JobError(f"{name} holds values above 1; arrays and tensors lie between 0 and 1")


def _as_many(pictures: Tensor, batch: int, what: str) -> None:
    if batch % len(pictures):
        raise JobError(
            f"{len(pictures)} {what} were given for {batch} results; give one, or one for each prompt"
        )
