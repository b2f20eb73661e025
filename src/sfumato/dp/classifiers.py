"""The classifiers that generated images are judged by: a small CNN, an MLP and wide residual networks.

They are trained on synthetic images alone and tested on real ones ([DP-LDM], section 5). All take images
(N, channels, size, size) in [0, 1] and give class scores (N, classes); ``features`` is what comes before the last
linear layer, (N, width), for distances between sets of images.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.errors import JobError

__all__ = ["CNN", "MLP", "WRN", "ImageClassifier", "make_classifier"]

_SIZES = (28, 32)
_WRN = re.compile(r"wrn-(\d+)-(\d+)")


class ImageClassifier(nn.Module):
    """A body that makes features (N, width), and a linear head on them."""

    head: nn.Linear

    def features(self, images: Tensor) -> Tensor:
        """(N, width) of images (N, channels, size, size) in [0, 1]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class CNN(ImageClassifier):
    """Three 3x3 convolutions of 32, 64 and 128 channels without padding, each but the last followed by a 2x2 maximum,
    dropout, and two linear layers. At 32x32 the first of them takes 2,048 values, as in the authors' code."""

    def __init__(self, channels: int = 1, classes: int = 10, size: int = 28, dropout: float = 0.5) -> None:
        super().__init__()
        left = ((size - 2) // 2 - 2) // 2 - 2
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3),
            # The maximum of rectified values is the rectified maximum, and costs a quarter of the rectifying.
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(128 * left * left, 128),
            nn.ReLU(),
        )
        self.head = nn.Linear(128, classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images)


class MLP(ImageClassifier):
    """One hidden layer of 100."""

    def __init__(self, channels: int = 1, classes: int = 10, size: int = 28) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 100), nn.ReLU())
        self.head = nn.Linear(100, classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images)


class _Block(nn.Module):
    """Normalise, rectify and convolve twice, beside a shortcut (Zagoruyko and Komodakis 2016)."""

    def __init__(self, before: int, after: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        same = before == after and stride == 1
        self.shortcut = None if same else nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ready = functional.relu(self.norm1(x))
        # Where the shape changes, the shortcut starts from the normalised input.
        beside = x if self.shortcut is None else self.shortcut(ready)
        inner = functional.relu(self.norm2(self.conv1(ready)))
        return beside + self.conv2(self.dropout(inner))


class WRN(ImageClassifier):
    """Wide residual network of ``depth`` = 6 n + 4 layers, ``widen`` times 16, 32 and 64 channels.

    40-4 is the paper's (9 M parameters, for a GPU); 16-1 has 0.18 M and trains on a CPU.

    Raises:
        JobError: no such depth.
    """

    def __init__(
        self,
        depth: int = 40,
        widen: int = 4,
        channels: int = 1,
        classes: int = 10,
        size: int = 28,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or widen < 1:
            raise JobError(
                f"a wide residual network has 6 n + 4 layers (10, 16, 22, 28, 34, 40) and a width of 1 or more, "
                f"not {depth} and {widen}"
            )
        width = 16
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
        for stage in range(3):
            after = 16 * widen * 2**stage
            for number in range((depth - 4) // 6):
                layers.append(_Block(width, after, 2 if stage and not number else 1, dropout))
                width = after
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, images: Tensor) -> Tensor:
        return torch.mean(self.body(images), (2, 3))


def make_classifier(kind: str, channels: int, classes: int, size: int) -> ImageClassifier:
    """``cnn``, ``mlp`` or ``wrn-DEPTH-WIDEN`` for images of ``size`` x ``size``.

    Raises:
        JobError: no such kind or size.
    """
    if size not in _SIZES:
        raise JobError(f"the classifiers take images of 28x28 or 32x32, not {size}x{size}; resize them")
    if kind == "cnn":
        return CNN(channels, classes, size)
    if kind == "mlp":
        return MLP(channels, classes, size)
    wide = _WRN.fullmatch(kind)
    if wide is None:
        raise JobError(f"no classifier {kind!r}; use cnn, mlp or wrn-DEPTH-WIDEN such as wrn-40-4")
    return WRN(int(wide[1]), int(wide[2]), channels, classes, size)
