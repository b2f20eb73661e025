"""Public images to pre-train on: a mixture of sources, each drawn with a weight of its own, each with captions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from sfumato.dp.glyphs import Glyphs, draw_glyphs
from sfumato.zoo.train.prompts import DIGITS

__all__ = ["Characters", "Mixture", "Source", "Stills", "caption_of_character"]

_SIDE = 32


class Source(ABC):
    """Images that anybody may have, with captions."""

    name: str
    captions: tuple[str, ...]

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (count, C, side, side) in [0, 1], and the index of each one's caption."""

    @abstractmethod
    def stills(self) -> Tensor | None:
        """The images (N, C, H, W) bytes as they came, by which an overlap with private ones is found; None where every
        image is drawn anew from outlines, so that none of them is a record of anybody."""


def caption_of_character(character: str) -> str:
    """What the character is called in a prompt."""
    if character.isdigit():
        return f"a handwritten {DIGITS[int(character)]}"
    size = "capital" if character.isupper() else "small"
    return f"a handwritten {size} {character.lower()}"


@dataclass(frozen=True)
class Characters(Source):
    """Glyphs drawn with pens of many widths (`glyphs`); ``classes``: labels that are drawn, ``None`` for all;
    ``channels``: 3 for images beside which there are coloured ones."""

    name: str
    glyphs: Glyphs
    classes: tuple[int, ...] | None = None
    channels: int = 1
    captions: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = self.glyphs.names
        captions = [
            caption_of_character(name) if len(name) == 1 else f"a handwritten {name}" for name in names
        ]
        object.__setattr__(self, "captions", tuple(captions))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = self.glyphs.choose(count, generator, self.classes)
        images = padded(draw_glyphs(self.glyphs.fields[chosen], generator))
        return images.expand(-1, self.channels, -1, -1), self.glyphs.labels[chosen]

    def stills(self) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Stills(Source):
    """``images`` (N, C, H, W) bytes, ``labels`` (N,): indices into ``captions``; half mirrored if ``mirror``.
    Of images larger than 32 pixels a square is cut out at random, of a quarter of the side to all of it."""

    name: str
    images: Tensor
    labels: Tensor
    captions: tuple[str, ...]
    mirror: bool = False

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(0, len(self.images), (count,), generator=generator)
        images = padded(self.images[chosen].float() / 255)
        if images.shape[-1] > _SIDE:
            images = _cropped(images, generator)
        if self.mirror:
            turned = torch.rand(count, generator=generator) < 0.5
            images = torch.where(turned[:, None, None, None], images.flip(-1), images)
        return images, self.labels[chosen]

    def stills(self) -> Tensor | None:
        return self.images


def _cropped(images: Tensor, generator: torch.Generator) -> Tensor:
    """A square of each image (N, C, H, W), (N, C, 32, 32)."""
    count, side = len(images), min(images.shape[2:])
    sizes = (side * (0.25 + 0.75 * torch.rand(count, generator=generator))).round().long().clamp(min=_SIDE)
    places = torch.rand(2, count, generator=generator)
    parts = []
    for image, size, y, x in zip(images, sizes.tolist(), *places.tolist(), strict=True):
        top, left = round(y * (image.shape[1] - size)), round(x * (image.shape[2] - size))
        cut = image[None, :, top : top + size, left : left + size]
        parts.append(functional.interpolate(cut, size=(_SIDE, _SIDE), mode="bilinear", antialias=True))
    return torch.cat(parts)


def padded(images: Tensor) -> Tensor:
    """28 pixels a side to 32, with the background's black, as MNIST's users do; other sizes as they are."""
    return functional.pad(images, (2, 2, 2, 2)) if images.shape[-1] == 28 else images


@dataclass(frozen=True)
class Mixture:
    """Sources and how often each is drawn."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(caption for source in self.sources for caption in source.captions)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (count, C, side, side) in [0, 1], and indices into `captions`."""
        shares = _shares(self.weights, count)
        parts, starts = [], 0
        for source, share in zip(self.sources, shares, strict=True):
            if share:
                images, labels = source.draw(share, generator)
                parts.append((images, labels + starts))
            starts += len(source.captions)
        return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _shares(weights: Sequence[float], count: int) -> list[int]:
    """``count`` split in proportion to the weights."""
    edges = (torch.tensor([0.0, *weights]).cumsum(0) / sum(weights) * count).round().long()
    return [int(n) for n in edges.diff()]
