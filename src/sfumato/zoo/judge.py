"""The judge: a small classifier that says which of the 20 classes an image shows."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

NUM_CLASSES = 20
FEATURES = 96
SHIFTS = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))


class Judge(nn.Module):
    """Convolutional classifier of 28x28 grey images in [0, 1]; digits are 0-9, clothes 10-19."""

    def __init__(self) -> None:
        super().__init__()
        plan = ((1, 24, 1), (24, 32, 2), (32, 64, 1), (64, 96, 2), (96, FEATURES, 1))
        layers: list[nn.Module] = []
        for before, after, stride in plan:
            conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.embed = nn.Linear(2 * FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, NUM_CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Feature vectors (N, 96) used for the diversity measures."""
        maps = self.body(images)
        pooled = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)
        return functional.relu(self.embed(pooled))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores (N, 20)."""
        return self.head(functional.dropout(self.features(images), 0.2, self.training))

    def _batches(self, images: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        self.eval()
        yield from as_judged(images).split(size)

    def _views(self, images: torch.Tensor) -> torch.Tensor:
        """Mean log-probabilities over the image itself and the image moved by one pixel each way."""
        padded = functional.pad(images, (1, 1, 1, 1))
        views = [padded[:, :, dy : dy + 28, dx : dx + 28] for dy, dx in SHIFTS]
        return torch.stack([self(view).log_softmax(1) for view in views]).mean(0)

    @torch.no_grad()
    def classify(self, images: torch.Tensor, batch: int = 500) -> torch.Tensor:
        """Class numbers (N,) of images (N, [1,] 28 or 32, 28 or 32): bytes, or floats in [0, 1]."""
        return torch.cat([self._views(x).argmax(1) for x in self._batches(images, batch)])

    @torch.no_grad()
    def extract(self, images: torch.Tensor, batch: int = 500) -> torch.Tensor:
        """Feature vectors (N, 96) of the same kinds of images as ``classify`` takes."""
        return torch.cat([self.features(x) for x in self._batches(images, batch)])


def as_judged(images: torch.Tensor) -> torch.Tensor:
    """Bring bytes or floats, with or without channel, 28 or 32 pixels wide, to (N, 1, 28, 28) in [0, 1]."""
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or images.shape[1] != 1 or tuple(images.shape[2:]) not in {(28, 28), (32, 32)}:
        raise ValueError(f"the judge takes grey images of 28x28 or 32x32, not {tuple(images.shape)}")
    x = images.float() / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)
    return x if x.shape[-1] == 28 else x[:, :, 2:30, 2:30]


def save_judge(judge: Judge, path: str | os.PathLike[str]) -> None:
    """Write the weights in half precision."""
    state = {k: v.half().contiguous() for k, v in judge.state_dict().items() if v.is_floating_point()}
    save_file(state, path)


def load_judge(path: str | os.PathLike[str]) -> Judge:
    """Judge with the weights of a safetensors file, ready to classify."""
    judge = Judge()
    state = {k: v.float() for k, v in load_file(path).items()}
    wanted = {k for k, v in judge.state_dict().items() if v.is_floating_point()}
    if set(state) != wanted:
        raise ValueError(f"{path}: not the weights of a judge (differs in {sorted(set(state) ^ wanted)[:5]})")
    judge.load_state_dict(state, strict=False)
    return judge.eval()
