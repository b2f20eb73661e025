"""Judges: small classifiers that say which class an image shows, and give the features it is compared by."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from sfumato.errors import JobError

NUM_CLASSES = 20
FEATURES = 96
SHIFTS = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))


Trained = TypeVar("Trained", bound="Classifier")


class Classifier(nn.Module, ABC):
    """Convolutions, pooled means and maxima, a vector of features, and scores of classes."""

    def __init__(self, plan: tuple[tuple[int, int, int], ...], features: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in plan:
            conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.embed = nn.Linear(2 * plan[-1][1], features)
        self.head = nn.Linear(features, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Feature vectors (N, width) used for the measures of sets of images."""
        maps = self.body(images)
        pooled = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)
        return functional.relu(self.embed(pooled))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores (N, classes)."""
        return self.head(functional.dropout(self.features(images), 0.2, self.training))

    @abstractmethod
    def prepared(self, images: torch.Tensor) -> torch.Tensor:
        """Images as `forward` takes them."""

    @abstractmethod
    def views(self, images: torch.Tensor) -> torch.Tensor:
        """Mean log-probabilities over views of each image."""

    def _batches(self, images: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        self.eval()
        yield from self.prepared(images).split(size)

    @torch.no_grad()
    def classify(
        self, images: torch.Tensor, batch: int = 500, among: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Class numbers (N,) of images, bytes or floats in [0, 1]. ``among``: the likeliest of these classes alone."""
        scores = torch.cat([self.views(x) for x in self._batches(images, batch)])
        if among is None:
            return scores.argmax(1)
        chosen = torch.tensor(list(among))
        return chosen[scores[:, chosen].argmax(1)]

    @torch.no_grad()
    def extract(self, images: torch.Tensor, batch: int = 500) -> torch.Tensor:
        """Feature vectors (N, width) of the same kinds of images as ``classify`` takes."""
        return torch.cat([self.features(x) for x in self._batches(images, batch)])


class Judge(Classifier):
    """Of 28x28 grey images in [0, 1]; digits are 0-9, clothes 10-19. Takes (N, [1,] 28 or 32, 28 or 32)."""

    def __init__(self) -> None:
        plan = ((1, 24, 1), (24, 32, 2), (32, 64, 1), (64, 96, 2), (96, FEATURES, 1))
        super().__init__(plan, FEATURES, NUM_CLASSES)

    def prepared(self, images: torch.Tensor) -> torch.Tensor:
        return as_judged(images)

    def views(self, images: torch.Tensor) -> torch.Tensor:
        """Over the image itself and the image moved by one pixel each way."""
        padded = functional.pad(images, (1, 1, 1, 1))
        views = [padded[:, :, dy : dy + 28, dx : dx + 28] for dy, dx in SHIFTS]
        return torch.stack([self(view).log_softmax(1) for view in views]).mean(0)


class ColourJudge(Classifier):
    """Of 32x32 colour images (N, 3, 32, 32), of CIFAR-10's classes."""

    def __init__(self) -> None:
        plan = ((3, 32, 1), (32, 48, 2), (48, 64, 1), (64, 96, 2), (96, 128, 1), (128, 128, 2))
        super().__init__(plan, FEATURES, 10)

    def prepared(self, images: torch.Tensor) -> torch.Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, 32, 32):
            raise ValueError(f"the judge takes colour images of 32x32, not {tuple(images.shape)}")
        return images.float() / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)

    def views(self, images: torch.Tensor) -> torch.Tensor:
        """Over the image itself and its mirror image."""
        return (self(images).log_softmax(1) + self(images.flip(-1)).log_softmax(1)) / 2


def as_judged(images: torch.Tensor) -> torch.Tensor:
    """Bring bytes or floats, with or without channel, 28 or 32 pixels wide, to (N, 1, 28, 28) in [0, 1]."""
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or images.shape[1] != 1 or tuple(images.shape[2:]) not in {(28, 28), (32, 32)}:
        raise ValueError(f"the judge takes grey images of 28x28 or 32x32, not {tuple(images.shape)}")
    x = images.float() / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)
    return x if x.shape[-1] == 28 else x[:, :, 2:30, 2:30]


def save_judge(judge: Classifier, path: str | os.PathLike[str]) -> None:
    """Write the weights in half precision."""
    state = {k: v.half().contiguous() for k, v in judge.state_dict().items() if v.is_floating_point()}
    save_file(state, path)


def load_judge(path: str | os.PathLike[str]) -> Judge:
    """Judge of grey images with the weights of a safetensors file, ready to classify."""
    return _loaded(Judge(), path)


#: By name: its class, and the file of its weights.
JUDGES: dict[str, tuple[Callable[[], Classifier], str]] = {
    "grey": (Judge, "judge.safetensors"),
    "cifar10": (ColourJudge, "judge-cifar10.safetensors"),
}


def load_named_judge(name: str, folder: Path | None = None) -> Classifier:
    """The judge of the models that name it.

    Raises:
        JobError: its weights are not here.
    """
    made, file = JUDGES[name]
    path = (folder or Path(__file__).resolve().parent / "weights") / file
    if not path.is_file():
        raise JobError(
            f"the weights of the judge {name} do not come with sfumato; train it with python -m sfumato.zoo.train "
            f"--classes {name} --data FOLDER --out FOLDER"
        )
    return _loaded(made(), path)


def _loaded(judge: Trained, path: str | os.PathLike[str]) -> Trained:
    state = {k: v.float() for k, v in load_file(path).items()}
    wanted = {k for k, v in judge.state_dict().items() if v.is_floating_point()}
    if set(state) != wanted:
        raise ValueError(f"{path}: not the weights of a judge (differs in {sorted(set(state) ^ wanted)[:5]})")
    judge.load_state_dict(state, strict=False)
    return judge.eval()
