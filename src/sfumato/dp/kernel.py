"""A baseline without diffusion: a generator that matches a private kernel mean embedding ([DP-MERF], [DP-Kernel]).

The embedding of an image x of class c is a vector φ(x) of random Fourier features and a constant, of norm 1, in the
rows of class c. What is released once, with Gaussian noise, is its *sum* over all records: adding or removing one
record changes it by a vector of norm 1, so the sensitivity is 1 and the noise multiplier is the standard deviation.
The constant's row counts the records of each class, under the same noise: no size, no histogram of labels and no image
is used beside the sum. All that follows, training, choice of the last step, sampling, is post-processing.

[DP-MERF] (Harder et al. 2021) has one bandwidth and isotropic frequencies. Here, as in [DP-Kernel] (Jiang et al.
2023), the kernel is a mixture: bandwidths over a range, and beside whole images square windows of them, each a Gaussian
kernel of its own, none of them chosen on private data. The generator is trained on the unbiased estimate of the
squared distance of embeddings: the plain one has a term that falls with the variety of a batch's images.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.errors import JobError
from sfumato.zoo.train.loop import Average, learning_rate

from .accountant import Event, noise_multiplier
from .randomness import SecretStream

__all__ = ["Baseline", "KernelSettings", "train_kernel"]

_CHUNK = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSettings:
    """The kernel and the training of the generator.

    ``windows`` are side lengths as shares of the image's, and how many of the ``frequencies`` each takes (in parts).
    Bandwidths are log-uniform between ``narrow`` and ``wide``, in root-mean-square differences of pixels in [0, 1].
    ``counted`` is the share of the squared norm that counts records; ``steps`` of training, as many as the minutes
    allow when 0.
    """

    frequencies: int = 6_000
    block: int = 1_000
    windows: tuple[tuple[float, float], ...] = ((1.0, 0.5), (0.5, 0.5))
    narrow: float = 0.1
    wide: float = 0.6
    counted: float = 0.02
    per_class: int = 40
    noise: int = 16
    rate: float = 5e-3
    decay: float = 0.995
    steps: int = 0


class RandomFeatures(nn.Module):
    """Cosines and sines of random projections of images (N, C, S, S) in [0, 1]: (N, 2 F) of norm 1.

    The frequencies are public and come from ``seed``. A block of them alone is an unbiased estimate of the kernel.
    """

    frequencies: Tensor  # (F, C S S)

    def __init__(self, channels: int, size: int, settings: KernelSettings, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        count = settings.frequencies
        rows = torch.randn(count, channels, size, size, generator=generator)
        parts = torch.tensor([part for _, part in settings.windows])
        which = torch.multinomial(parts, count, replacement=True, generator=generator)
        sides = torch.tensor([max(2, round(share * size)) for share, _ in settings.windows])[which]
        # Windows may reach over the edge by half, so that pixels at the edge are seen often enough too.
        middle = torch.rand(2, count, generator=generator) * (size - 1)
        middle = torch.where(sides >= size, (size - 1) / 2, middle)
        places = torch.arange(size).float()
        near = (places - middle[:, :, None]).abs() <= sides[None, :, None] / 2  # (2, F, S)
        rows *= (near[0][:, :, None] & near[1][:, None, :])[:, None]
        spread = math.log(settings.wide / settings.narrow)
        widths = settings.narrow * torch.exp(spread * torch.rand(count, generator=generator))
        # A bandwidth is of the root mean square over a window's values.
        scale = widths * (channels * sides * sides).sqrt()
        self.register_buffer("frequencies", rows.flatten(1) / scale[:, None])

    def forward(self, images: Tensor, block: slice) -> Tensor:
        """(N, 2 F') of a slice of F' frequencies; the norm is 1 whatever the slice."""
        angles = images.flatten(1) @ self.frequencies[block].T
        return torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(angles.shape[1])


class Generator(nn.Module):
    """Normal noise and a class to images (N, C, S, S) in [0, 1], by two hidden layers and a fixed binomial blur.

    Linear layers, not convolutions: in the same CPU time they take four times as many steps, and what they make was
    better on Fashion-MNIST (classifier 70 % against 66 %, 20 CPU seconds of training each, without noise).
    """

    blur: Tensor

    def __init__(self, noise: int, classes: int, shape: tuple[int, int, int], width: int = 512) -> None:
        super().__init__()
        self.noise, self.classes, self.shape = noise, classes, shape
        self.body = nn.Sequential(
            nn.Linear(noise + classes, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, math.prod(shape)),
        )
        # Before the sigmoid, so that edges can still be sharp; without it the images have grains of single pixels.
        binomial = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("blur", torch.outer(binomial, binomial).expand(shape[0], 1, 3, 3).contiguous())

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        known = functional.one_hot(labels, self.classes).to(noise.dtype)
        scores = self.body(torch.cat([noise, known], 1)).view(len(noise), *self.shape)
        return functional.conv2d(scores, self.blur, padding=1, groups=self.shape[0]).sigmoid()


@dataclass(frozen=True, slots=True)
class Baseline:
    """A trained generator, the events of the ledger that its training cost, and the budget asked for."""

    generator: Generator
    events: tuple[Event, ...]
    epsilon: float
    delta: float
    steps: int
    cpu_s: float

    @torch.no_grad()
    def sample(self, labels: Tensor, seed: int) -> Tensor:
        """Images (N, C, S, S) uint8 of these classes. Sampling is post-processing and costs no budget."""
        if labels.ndim != 1 or (
            len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes
        ):
            raise JobError(f"labels are whole numbers from 0 to {self.classes - 1} in one row")
        source = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(labels), self.generator.noise, generator=source)
        device = next(self.generator.parameters()).device
        self.generator.eval()
        drawn = [
            self.generator(z.to(device), y.to(device)).mul(255).round().to(torch.uint8).cpu()
            for z, y in zip(noise.split(_CHUNK), labels.split(_CHUNK), strict=True)
        ]
        return torch.cat(drawn)

    @property
    def classes(self) -> int:
        return self.generator.classes


@torch.no_grad()
def embedded_sums(
    features: RandomFeatures, images: Tensor, labels: Tensor, classes: int, counted: float
) -> Tensor:
    """(classes, 2 F + 1): sums over each class of features and a constant, a vector of norm 1 a record.

    The norm is right to about 1e-7, far below the steps of 0.0001 that noise multipliers are rounded up in; the sums
    are in float64, so that a record does not also move the rounding of the others.
    """
    device = features.frequencies.device
    total = torch.zeros(classes, 2 * len(features.frequencies) + 1, dtype=torch.float64)
    for x, y in zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True):
        found = features(x.to(device).float() / 255, slice(None)) * math.sqrt(1 - counted)
        whole = functional.pad(found, (0, 1), value=math.sqrt(counted))
        total += (functional.one_hot(y.to(device), classes).T.double() @ whole.double()).cpu()
    return total


def release(
    features: RandomFeatures,
    images: Tensor,
    labels: Tensor,
    classes: int,
    counted: float,
    epsilon: float,
    delta: float,
    stream: SecretStream,
) -> tuple[Tensor, tuple[Event, ...]]:
    """The sums of the embeddings with the noise of (ε, δ), in float64, and the event to account for."""
    sums = embedded_sums(features, images, labels, classes, counted)
    if math.isinf(epsilon):
        return sums, ()
    # One full batch: no subsampling, and the sensitivity is the norm of a record's embedding, 1.
    event = Event(1.0, noise_multiplier(epsilon, delta, 1.0, 1), 1)
    noise = stream.child("kernel mean embedding").normal(tuple(sums.shape), event.noise_multiplier)
    return sums + noise.double(), (event,)


def train_kernel(
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    delta: float,
    stream: SecretStream,
    classes: int = 10,
    seed: int = 0,
    minutes: float = 5.0,
    settings: KernelSettings | None = None,
    device: str = "cpu",
) -> Baseline:
    """Release the noisy embedding of private images (N, C, S, S) uint8 and train a generator to match it.

    ``minutes`` of work of the calling thread train it. ``seed`` draws what is public: the frequencies, the generator's
    first weights and its noise; the release draws from ``stream`` alone. ``classes`` must not come from the labels.
    With an infinite ``epsilon`` nothing is noised and there are no events: what the method could do at best.

    Raises:
        JobError: images, labels or numbers that do not fit.
    """
    settings = settings or KernelSettings()
    if images.ndim != 4 or images.shape[2] != images.shape[3] or images.dtype != torch.uint8:
        raise JobError(
            f"images are bytes (count, channels, size, size), not {images.dtype} {tuple(images.shape)}"
        )
    if labels.shape != images.shape[:1] or not len(labels):
        raise JobError(
            f"{len(images)} images came with {tuple(labels.shape)} labels; give one label an image"
        )
    if minutes <= 0 or settings.per_class < 2 or not epsilon > 0:
        raise JobError(
            f"training needs minutes and epsilon above 0 and at least 2 images of each class a step, not {minutes}, "
            f"{epsilon} and {settings.per_class}"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise JobError(f"a label lies outside 0 to {classes - 1}; name the number of classes")
    started = time.process_time()
    features = RandomFeatures(images.shape[1], images.shape[2], settings, seed).to(device)
    released, events = release(features, images, labels, classes, settings.counted, epsilon, delta, stream)
    # From here on nothing private is read but the images' shape.
    shape = (images.shape[1], images.shape[2], images.shape[3])
    counts = (released[:, -1:] / math.sqrt(settings.counted)).clamp(min=1.0)
    targets = (released[:, :-1] / (counts * math.sqrt(1 - settings.counted))).float().to(device)
    generator, steps = _matched(features, targets, shape, settings, seed, minutes, device)
    return Baseline(generator, events, epsilon, delta, steps, time.process_time() - started)


def _matched(
    features: RandomFeatures,
    targets: Tensor,
    shape: tuple[int, int, int],
    settings: KernelSettings,
    seed: int,
    minutes: float,
    device: str,
) -> tuple[Generator, int]:
    """A generator whose classes have embeddings near ``targets`` (classes, 2 F), with averaged weights."""
    classes, each, count = len(targets), settings.per_class, settings.frequencies
    pairs = targets.view(classes, 2, count)  # cosines, sines
    source = torch.Generator().manual_seed(seed + 1)
    labels = torch.arange(classes).repeat_interleave(each).to(device)
    with torch.random.fork_rng(devices=[] if device == "cpu" else [device]):
        torch.manual_seed(seed)
        generator = Generator(settings.noise, classes, shape).to(device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=settings.rate, betas=(0.9, 0.99))
    average = Average(generator, settings.decay)
    blocks = max(1, count // settings.block)
    size = math.ceil(count / blocks)
    began, steps, progress = time.thread_time(), 0, 0.0
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, settings.rate)
        start = (steps % blocks) * size
        block = slice(start, min(count, start + size))
        noise = torch.randn(classes * each, settings.noise, generator=source).to(device)
        made = features(generator(noise, labels), block).view(classes, each, -1).mean(1)
        wanted = pairs[:, :, block].flatten(1) * math.sqrt(count / (block.stop - block.start))
        # |mean|^2 holds 1 / each of every image's own norm, which is 1: without it the rest is each - 1 over each.
        loss = (each / (each - 1) * (made * made).sum(1) - 2 * (made * wanted).sum(1)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        steps += 1
        average.update(generator, steps)
        progress = steps / settings.steps if settings.steps else (time.thread_time() - began) / (60 * minutes)
    generator.load_state_dict(average.state)
    return generator.eval(), steps
