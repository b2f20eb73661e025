"""How good generated images are: classifiers trained on them, distances to real images, and a search for copies.

Nothing here is private. Every number of this module is computed on real images, the private ones among them, without
noise: no epsilon covers it. Compare methods with it; whoever releases a number measured on private images releases
something of them, and whoever picks a model by such numbers has tuned on private data. The classifiers themselves are
chosen on *synthetic* validation images, never on the real test set, which would flatter the result.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sfumato.errors import JobError
from sfumato.quality import Features, frechet, precision_recall
from sfumato.zoo.judge import load_named_judge
from sfumato.zoo.train.loop import Average, channels_last, learning_rate

from .classifiers import ImageClassifier, make_classifier

__all__ = [
    "Copies",
    "Distance",
    "Labelled",
    "ClassifierRecipe",
    "TrainedClassifier",
    "Utility",
    "copies",
    "distance",
    "judge_features",
    "predict",
    "train_classifier",
    "utility",
]

#: Images (N, C, H, W) uint8 and their labels (N,) int64.
Labelled = tuple[Tensor, Tensor]

#: Images a side whose neighbours are counted for precision and recall; memory is that of all pairs.
_PAIRS = 2_000
_CHUNK = 1_000
#: Kinds that are trained for more epochs than the recipe says, by this factor.
_MORE = {"mlp": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierRecipe:
    """How a classifier is trained: AdamW, a warm-up and half a cosine, averaged weights, images that move.

    ``epochs`` are those of a CNN or a residual network; an MLP, whose epoch costs a sixth of a CNN's, has three times
    as many.
    ``shift`` in pixels, ``degrees`` of turning, both ways and uniform; ``mirror`` flips half of the images, which is
    right for photographs and wrong for digits. ``validation`` is the share of the synthetic images kept for choosing
    the epoch.
    """

    epochs: int = 8
    batch: int = 128
    rate: float = 2e-3
    weight_decay: float = 1e-2
    smoothing: float = 0.05
    decay: float = 0.995
    shift: float = 2.0
    degrees: float = 10.0
    mirror: bool = False
    validation: float = 0.1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2 or not 0.0 < self.validation < 1.0:
            raise JobError(
                f"a recipe needs at least 1 epoch, batches of at least 2 and a share of validation between 0 and 1, "
                f"not {self.epochs}, {self.batch} and {self.validation}"
            )


@dataclass(frozen=True, slots=True)
class TrainedClassifier:
    """A classifier and how it came about; ``validation`` is its accuracy on synthetic images it did not see."""

    model: ImageClassifier
    kind: str
    validation: float
    best_epoch: int
    cpu_s: float
    wall_s: float


def as_floats(images: Tensor) -> Tensor:
    """Bytes (N, C, H, W) to floats in [0, 1]; floats stay as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _checked(images: Tensor, labels: Tensor, least: int = 1) -> None:
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise JobError(f"images are (count, channels, size, size), not {tuple(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise JobError(
            f"{len(images)} images came with {tuple(labels.shape)} labels; give one label an image"
        )
    if len(images) < least:
        raise JobError(f"{len(images)} images are too few; give at least {least}")


def moved(images: Tensor, recipe: ClassifierRecipe, generator: torch.Generator) -> Tensor:
    """Float images (N, C, H, W) each turned, shifted and perhaps mirrored at random, bilinear, black outside."""
    count, size = len(images), images.shape[-1]
    draw = torch.rand(4, count, generator=generator).to(images.device)
    angle = (2 * draw[0] - 1) * math.radians(recipe.degrees)
    flip = torch.where((draw[3] < 0.5) & recipe.mirror, -1.0, 1.0)
    shift = (2 * draw[1:3] - 1) * (2 * recipe.shift / size)  # the picture is 2 wide in the grid's units
    rows = [angle.cos() * flip, -angle.sin(), shift[0], angle.sin() * flip, angle.cos(), shift[1]]
    maps = torch.stack(rows, 1).view(count, 2, 3)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


@torch.no_grad()
def predict(model: ImageClassifier, images: Tensor) -> Tensor:
    """Classes (N,) that the model tells of images, bytes or floats in [0, 1], on the CPU."""
    model.eval()
    device = model.head.weight.device
    return torch.cat([model(as_floats(x.to(device))).argmax(1).cpu() for x in images.split(_CHUNK)])


def train_classifier(
    kind: str,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    recipe: ClassifierRecipe | None = None,
    classes: int | None = None,
    device: str = "cpu",
) -> TrainedClassifier:
    """A classifier (``cnn``, ``mlp``, ``wrn-40-4``) of images (N, C, H, W) uint8, trained on these alone.

    A share of them is kept apart, and the epoch whose averaged weights are best on that share is the one returned.
    ``classes`` is one more than the largest label unless given. The caller's random state is left alone.

    Raises:
        JobError: shapes, kind or numbers that do not fit.
    """
    recipe = recipe or ClassifierRecipe()
    _checked(images, labels, least=20)
    classes = classes or int(labels.max()) + 1
    started, ticked = time.perf_counter(), time.process_time()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held = max(1, round(recipe.validation * len(images)))
    kept, rest = order[:held], order[held:]
    x, y = images.to(device), labels.long().to(device)
    # Dropout and the first weights draw from torch's own generators.
    with torch.random.fork_rng(devices=[] if device == "cpu" else [device]):
        torch.manual_seed(seed)
        model = make_classifier(kind, images.shape[1], classes, images.shape[-1]).to(device)
        model = channels_last(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay)
        average = Average(model, recipe.decay)
        judged = make_classifier(kind, images.shape[1], classes, images.shape[-1]).to(device)
        batches = max(1, len(rest) // recipe.batch)
        epochs = recipe.epochs * _MORE.get(kind, 1)
        best, best_epoch, chosen = -1.0, 0, {}
        for epoch in range(epochs):
            model.train()
            shuffled = rest[torch.randperm(len(rest), generator=generator)]
            for number, rows in enumerate(shuffled.tensor_split(batches)):
                step = epoch * batches + number
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step / (epochs * batches), recipe.rate)
                rows = rows.to(device)
                shown = moved(as_floats(x[rows]), recipe, generator)
                scores = model(shown.contiguous(memory_format=torch.channels_last))
                loss = functional.cross_entropy(scores, y[rows], label_smoothing=recipe.smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                average.update(model, step + 1)
            judged.load_state_dict(average.state)
            found = float((predict(judged, x[kept.to(device)]) == labels[kept]).double().mean())
            if found >= best:
                best, best_epoch = found, epoch + 1
                chosen = {k: v.clone() for k, v in average.state.items()}
        judged.load_state_dict(chosen)
    spent = time.process_time() - ticked, time.perf_counter() - started
    return TrainedClassifier(judged.eval(), kind, best, best_epoch, *spent)


@dataclass(frozen=True, slots=True)
class Utility:
    """Accuracy on real images of classifiers of one kind trained on synthetic ones, a value a seed.

    ``spread`` is the sample standard deviation over seeds (0 of one seed); ``per_class`` the mean over seeds, nan of a
    class without test images; ``validation`` the accuracy on synthetic images, by which the epoch was chosen.
    """

    kind: str
    trained_on: int
    tested_on: int
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    per_class: tuple[float, ...]
    validation: tuple[float, ...]
    best_epochs: tuple[int, ...]
    cpu_s: tuple[float, ...]
    wall_s: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**_plain(self), "mean": self.mean, "spread": self.spread}


def utility(
    synthetic: Labelled,
    test: Labelled,
    *,
    kinds: Sequence[str] = ("cnn", "mlp", "wrn-40-4"),
    seeds: Sequence[int] = (0, 1, 2),
    recipe: ClassifierRecipe | None = None,
    classes: int | None = None,
    device: str = "cpu",
) -> list[Utility]:
    """Train each kind of classifier on ``synthetic`` once a seed, and test it on ``test``: one record a kind.

    ``classes`` is one more than the largest label of either set unless given.

    Raises:
        JobError: shapes, kinds or numbers that do not fit.
    """
    _checked(*synthetic, least=20)
    _checked(*test)
    if synthetic[0].shape[1:] != test[0].shape[1:]:
        raise JobError(
            f"synthetic images {tuple(synthetic[0].shape[1:])} and real ones {tuple(test[0].shape[1:])} differ in "
            "shape; bring them to one"
        )
    if not kinds or not seeds:
        raise JobError("name at least one kind of classifier and one seed")
    classes = classes or 1 + max(int(synthetic[1].max()), int(test[1].max()))
    records = []
    for kind in kinds:
        runs = [
            train_classifier(kind, *synthetic, seed=seed, recipe=recipe, classes=classes, device=device)
            for seed in seeds
        ]
        hits = torch.stack([predict(run.model, test[0]) == test[1] for run in runs]).double()  # (seeds, N)
        records.append(
            Utility(
                kind=kind,
                trained_on=len(synthetic[0]),
                tested_on=len(test[0]),
                seeds=tuple(seeds),
                accuracies=tuple(hits.mean(1).tolist()),
                per_class=tuple(float(hits[:, test[1] == c].mean()) for c in range(classes)),
                validation=tuple(run.validation for run in runs),
                best_epochs=tuple(run.best_epoch for run in runs),
                cpu_s=tuple(run.cpu_s for run in runs),
                wall_s=tuple(run.wall_s for run in runs),
            )
        )
    return records


@dataclass(frozen=True, slots=True)
class Distance:
    """Of two sets of images, in the features called ``features``; ``floor`` is the Fréchet distance of decoded
    encodings of real images, which no sampler behind that autoencoder can be expected to pass, or None."""

    features: str
    samples: int
    real: int
    frechet: float
    precision: float
    recall: float
    floor: float | None

    def to_json(self) -> dict[str, Any]:
        return _plain(self)


def judge_features(name: str) -> Callable[[Tensor], Tensor]:
    """Features of the zoo's judge ``grey`` (28x28 digits and clothes) or ``cifar10``, of images (N, C, H, W).

    The judges were trained on the real training images of those data sets: right for measuring, and one more reason
    why the measure is not private. Distances in them are not FID, which is Inception's alone, and compare with nothing
    published.

    Raises:
        JobError: no such judge, or its weights are not here.
    """
    if name not in ("grey", "cifar10"):
        raise JobError(f"no judge {name!r}; use grey or cifar10")
    return load_named_judge(name).extract


def distance(
    samples: Tensor,
    real: Tensor,
    *,
    features: Callable[[Tensor], Tensor],
    name: str,
    reconstructions: Tensor | None = None,
    seed: int = 0,
) -> Distance:
    """Fréchet distance of two sets of images (N, C, H, W), and precision and recall of 2,000 a side.

    ``features`` gives (N, width) of such images (:func:`judge_features`, the ``features`` of a
    :class:`TrainedClassifier`'s model, or Inception's) and ``name`` says which they are. ``reconstructions`` are real
    images that went through the autoencoder. The distance is biased upwards by small sets: compare at one size.

    Raises:
        JobError: fewer than two images on a side.
    """
    if min(len(samples), len(real)) < 2:
        raise JobError(f"a distance needs two sets of images, not {len(samples)} and {len(real)} images")
    ours, theirs = features(samples).cpu(), features(real).cpu()
    of_real = Features.of(theirs)
    generator = torch.Generator().manual_seed(seed)
    size = min(_PAIRS, len(ours), len(theirs))
    few = [x[torch.randperm(len(x), generator=generator)[:size]] for x in (ours, theirs)]
    # The fifth neighbour needs six images.
    precision, recall = precision_recall(*few) if size > 5 else (math.nan, math.nan)
    floor = None
    if reconstructions is not None:
        floor = frechet(Features.of(features(reconstructions).cpu()), of_real)
    value = frechet(Features.of(ours), of_real)
    return Distance(name, len(ours), len(theirs), value, precision, recall, floor)


@dataclass(frozen=True, slots=True)
class Copies:
    """How near samples come to the private training images, beside how near other real images come to them.

    Quantiles of the distance to the nearest training image (root mean square over pixels in [0, 1]): ``samples`` and
    ``held_out``, each (smallest, 1 %, median). ``nearer`` is the share of samples nearer to a training image than 99 %
    of the held-out images are: 0.01 is what real images reach by themselves. ``identical`` counts samples at distance
    0 (below half a grey level in the mean). A sanity check: passing it proves nothing about privacy.
    """

    training: int
    samples: tuple[float, float, float]
    held_out: tuple[float, float, float]
    nearer: float
    identical: int

    def to_json(self) -> dict[str, Any]:
        return _plain(self)


def nearest(images: Tensor, others: Tensor) -> Tensor:
    """(N,) root-mean-square pixel distance of each image to the nearest of ``others``; error below 2e-3."""
    flat = as_floats(others).flatten(1)
    norms = (flat * flat).sum(1)
    found = []
    for chunk in as_floats(images).flatten(1).split(_CHUNK):
        squares = [
            (norms[i : i + 10 * _CHUNK] - 2 * chunk @ flat[i : i + 10 * _CHUNK].T).amin(1)
            for i in range(0, len(flat), 10 * _CHUNK)
        ]
        found.append(torch.stack(squares).amin(0) + (chunk * chunk).sum(1))
    return (torch.cat(found).clamp(min=0) / flat.shape[1]).sqrt()


def copies(samples: Tensor, training: Tensor, held_out: Tensor) -> Copies:
    """Compare samples and held-out real images (N, C, H, W) by their distances to the training images.

    Raises:
        JobError: images of different shapes, or none.
    """
    shapes = {tuple(x.shape[1:]) for x in (samples, training, held_out)}
    if len(shapes) > 1 or not all(len(x) for x in (samples, training, held_out)):
        raise JobError(
            f"the three sets of images must be of one shape and none empty, not of {sorted(shapes)}"
        )
    ours, theirs = nearest(samples, training).double(), nearest(held_out, training).double()
    at = torch.tensor([0.0, 0.01, 0.5], dtype=torch.float64)
    low, one, half = theirs.quantile(at).tolist()
    first, second, third = ours.quantile(at).tolist()
    return Copies(
        training=len(training),
        samples=(first, second, third),
        held_out=(low, one, half),
        nearer=float((ours < one).double().mean()),
        identical=int((ours < 0.5 / 255).sum()),
    )


def _plain(record: Any) -> dict[str, Any]:
    """A result as JSON takes it: lists for tuples, None for numbers that are not finite."""
    return {key: _value(value) for key, value in asdict(record).items()}


def _value(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_value(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
