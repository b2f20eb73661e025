"""Measures of sets of images, each with a 95 % interval.

The Fréchet distance here is that of two Gaussians fitted to the features of *a classifier trained on the same real
data*, not of Inception: it orders settings of one model on one data set, and is not comparable with published FID. It
is biased upwards by small samples, alike for sets of one size, so settings are compared at one size, seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import JobError

__all__ = [
    "Features",
    "Interval",
    "accuracy",
    "f1_of_two",
    "frechet",
    "frechet_difference",
    "precision_recall",
    "psnr",
]

_Z = 1.959963984540054
#: Resamples of a bootstrap; percentiles at 2.5 and 97.5 move by about 3 % of the interval's width between seeds.
_RESAMPLES = 300
_NEIGHBOURS = 5


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True, slots=True)
class Features:
    """Mean (d) and covariance (d, d) of feature vectors, in float64."""

    mean: Tensor
    covariance: Tensor

    @staticmethod
    def of(vectors: Tensor) -> Features:
        """Of (N, d) vectors.

        Raises:
            JobError: fewer than two.
        """
        if vectors.ndim != 2 or len(vectors) < 2:
            raise JobError(f"features are (images, width) of at least two images, not {tuple(vectors.shape)}")
        x = vectors.to(torch.float64)
        return Features(x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1]))


def frechet(a: Features, b: Features) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017), by the symmetric root."""
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    between = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0.0).sqrt().sum()
    total = ((a.mean - b.mean) ** 2).sum() + a.covariance.trace() + b.covariance.trace() - 2.0 * between
    return max(0.0, float(total))


def frechet_difference(
    ours: Tensor, theirs: Tensor, real: Features, *, relative: bool = True, seed: int = 0
) -> Interval:
    """Fréchet distance to ``real`` of ``ours`` minus that of ``theirs``, over that of ``theirs`` if ``relative``.

    ``ours`` and ``theirs`` (N, d) are features of images of the same prompts and seeds, pair by pair: the bootstrap
    draws pairs, so what both share cancels.

    Raises:
        JobError: they are not pairs.
    """
    if ours.shape != theirs.shape:
        raise JobError(f"{len(ours)} and {len(theirs)} images are no pairs; draw both with the same seeds")

    def difference(rows: Tensor) -> float:
        a, b = (frechet(Features.of(x[rows]), real) for x in (ours, theirs))
        return (a - b) / b if relative else a - b

    source = torch.Generator().manual_seed(seed)
    whole = torch.arange(len(ours))
    draws = [difference(torch.randint(len(ours), (len(ours),), generator=source)) for _ in range(_RESAMPLES)]
    # A resample's distances are larger than the sample's, by a bias that is not that of the sample itself: the draws
    # say how wide the interval is, not where.
    found, value = torch.tensor(draws, dtype=torch.float64), difference(whole)
    low, high = (found - found.mean()).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(value, value + float(low), value + float(high))


def accuracy(said: Tensor, wanted: Tensor) -> Interval:
    """Share of images of the wanted class, with Wilson's interval."""
    n = len(wanted)
    if n == 0 or len(said) != n:
        raise JobError(f"{len(said)} classes were told for {n} images")
    p = float((said == wanted).double().mean())
    middle, spread = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
    return Interval(p, (middle - spread) / (1 + _Z**2 / n), (middle + spread) / (1 + _Z**2 / n))


def f1_of_two(said: Tensor, wanted: Tensor, classes: Sequence[int]) -> float:
    """Mean F1 score of two (or more) classes; what was taken for another class counts against recall."""
    scores = []
    for label in classes:
        hit = int(((said == label) & (wanted == label)).sum())
        told, meant = int((said == label).sum()), int((wanted == label).sum())
        scores.append(2.0 * hit / (told + meant) if told + meant else 0.0)
    return sum(scores) / len(scores)


def precision_recall(fake: Tensor, real: Tensor) -> tuple[float, float]:
    """(share of fake within the reach of real, and the reverse), by the distance to the 5th neighbour (Kynkäänniemi
    et al. 2019). Both sets of one size, at most some thousands: memory is that of all pairs."""

    def radii(points: Tensor) -> Tensor:
        return torch.cdist(points, points).kthvalue(_NEIGHBOURS + 1, dim=1).values

    between = torch.cdist(real, fake)
    precision = (between <= radii(real)[:, None]).any(0).double().mean()
    recall = (between <= radii(fake)[None]).any(1).double().mean()
    return float(precision), float(recall)


def psnr(images: Tensor, wanted: Tensor) -> Tensor:
    """(N,) peak signal-to-noise ratio in dB of images (N, ...) in [0, 1], at most 100."""
    error = ((images.double() - wanted.double()) ** 2).flatten(1).mean(1)
    return -10.0 * torch.log10(error.clamp(min=1e-10))
