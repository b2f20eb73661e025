"""What a run that starts at a picture takes along: values of the client, which the parties hold as shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.diffusion.schedule import Schedule

__all__ = ["Blend", "Clamp", "Picture", "blank_like", "drawn_like"]

_SEED = 23


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture's ``latents`` and the ``noise`` that a run starts from, both (B, C, h, w).

    ``pure``: the run starts at noise alone. ``mask`` (B, 1, h, w), 1 where the picture is painted anew: after each
    step the rest becomes the noised picture again. ``extra`` (B, 1 + C, h, w): mask and latents of the masked picture,
    which a U-Net with so many channels more takes beside the sample.
    """

    latents: Tensor
    noise: Tensor
    pure: bool = False
    mask: Tensor | None = None
    extra: Tensor | None = None

    def first(self, schedule: Schedule) -> Tensor:
        """The latents before the first step, in the schedule's scale."""
        if self.pure:
            return self.noise * schedule.init_sigma
        return self.noised(schedule, 0)

    def noised(self, schedule: Schedule, k: int) -> Tensor:
        """The picture at the noise level before step ``k``."""
        picture, noise = schedule.noised[k]
        return picture * self.latents + noise * self.noise

    def kept(self) -> tuple[Tensor, Tensor]:
        """Latents and noise where the picture is kept, zero elsewhere."""
        assert self.mask is not None
        return (1.0 - self.mask) * self.latents, (1.0 - self.mask) * self.noise


class Clamp(nn.Module):
    """A scheduler's clamp, as it is captured."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, value: Tensor) -> Tensor:
        """``value`` in [low, high]."""
        return value.clamp(self.low, self.high)


class Blend(nn.Module):
    """The part of the sample that is painted anew, as it is captured; what is kept of the picture is added to it."""

    def forward(self, sample: Tensor, mask: Tensor) -> Tensor:
        """``sample`` (B, C, h, w) where ``mask`` (B, 1, h, w) is 1, else 0."""
        return sample * mask


# ---- for calibration ---------------------------------------------------------------------------------------


def drawn_like(picture: Picture, vae: Any, run: int, factor: int, own: Tensor | None) -> Picture:
    """A picture of ours, with a mask of ours, for a run of the same kind: the model's ``own`` (in latents), or shapes
    on a soft ground."""
    batch, _, height, width = picture.latents.shape
    source = torch.Generator().manual_seed(_SEED + run)
    if own is None:
        pictures = _shapes((batch, vae.config.in_channels, height * factor, width * factor), source)
    else:
        with torch.no_grad():
            pictures = vae.decode(own / vae.config.scaling_factor, return_dict=False)[0].clamp(-1.0, 1.0)
    noise = torch.randn(picture.noise.shape, generator=source)
    mask = torch.stack([_rectangle(height, width, source) for _ in range(batch)])[:, None]
    return _prepared(picture, vae, pictures, noise, mask, source)


def blank_like(picture: Picture, vae: Any, factor: int) -> Picture | None:
    """What a U-Net for inpainting takes where everything is painted anew; None for others."""
    if picture.extra is None:
        return None
    batch, _, height, width = picture.latents.shape
    nothing = torch.zeros(batch, vae.config.in_channels, height * factor, width * factor)
    everywhere = torch.ones(batch, 1, height, width)
    source = torch.Generator().manual_seed(_SEED - 1)
    return _prepared(
        replace(picture, pure=True), vae, nothing, torch.zeros_like(picture.noise), everywhere, source
    )


def _prepared(
    like: Picture, vae: Any, pictures: Tensor, noise: Tensor, mask: Tensor, source: torch.Generator
) -> Picture:
    extra = None
    if like.extra is not None:
        whole = nn.functional.interpolate(mask, pictures.shape[-2:])
        extra = torch.cat([mask, _in_latents(vae, pictures * (1.0 - whole), source)], 1)
    latents = _in_latents(vae, pictures, source)
    return Picture(latents, noise, like.pure, None if like.mask is None else mask, extra)


def _in_latents(vae: Any, pictures: Tensor, source: torch.Generator) -> Tensor:
    """Latents of pictures in the scale of the U-Net, drawn from the encoder's distribution as those of a run are."""
    with torch.no_grad():
        latents: Tensor = vae.encode(pictures).latent_dist.sample(source) * vae.config.scaling_factor
    return latents


def _shapes(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """Pictures (B, channels, height, width) in [-1, 1]: hard shapes on a soft ground."""
    batch, channels, height, width = shape
    ground = torch.randn(batch, channels, 4, 4, generator=source)
    made = nn.functional.interpolate(ground, (height, width), mode="bilinear", align_corners=False)
    for row in made:
        for _ in range(int(torch.randint(4, (), generator=source))):
            area = _rectangle(height, width, source)
            row[:, area > 0] = 4 * torch.rand(channels, 1, generator=source) - 2
    return made.clamp(-1.0, 1.0)


def _rectangle(height: int, width: int, source: torch.Generator) -> Tensor:
    """1 in a rectangle of any size, else 0."""
    top, bottom = torch.randint(height + 1, (2,), generator=source).sort().values.tolist()
    left, right = torch.randint(width + 1, (2,), generator=source).sort().values.tolist()
    made = torch.zeros(height, width)
    made[top:bottom, left:right] = 1.0
    return made
